"""Will a bundle fit a device, and how fast will it be there? Predicted, nothing is run.

Knows bundles, devices and published figures; measures nothing and opens no session.
"""

from __future__ import annotations
