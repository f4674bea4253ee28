"""How fast a bundle is on this machine: times, memory, and what bounds them.

Stands on the runtime alone, so that it runs on a device. Peers are processes of their own.
"""

from __future__ import annotations
