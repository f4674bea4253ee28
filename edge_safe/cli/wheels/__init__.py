"""Wheels for another machine: which machines there are, pip run as if on one, the folder itself."""

from __future__ import annotations
