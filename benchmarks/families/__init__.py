"""Every family, every precision, every way in: measured, or with the reason why not."""

from __future__ import annotations
