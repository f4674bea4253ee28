"""The room between a torch checkpoint and a bundle."""

from __future__ import annotations
