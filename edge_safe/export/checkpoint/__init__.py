"""Reading a checkpoint's weights: one tensor at a time, whatever form they are stored in."""

from __future__ import annotations
