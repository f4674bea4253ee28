"""Graphs and engines for TensorRT. Knows nothing of torch; runs no engine, which takes a GPU."""

from __future__ import annotations
