"""pebble, the reference model: a small language model that reads, sees and hears.

Knows nothing of export, bundles or the runtime.
"""

from __future__ import annotations
