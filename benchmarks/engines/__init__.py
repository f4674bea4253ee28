"""Engines of TensorRT for RTX of every family, built here without a GPU: sizes, times, reasons."""

from __future__ import annotations
