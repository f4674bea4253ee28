"""Engines that are built on the device, as the bundle plans them, and kept in the user's cache.

The store knows folders, hashes and locks; the builder knows TensorRT. Neither knows what flows
through a graph.
"""

from __future__ import annotations
