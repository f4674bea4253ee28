"""Peers of ``edge-safe bench --peer``: their environments, their models, their workers."""

from __future__ import annotations
