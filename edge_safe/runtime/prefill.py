"""How a run of new positions is cut into chunks and told to a graph."""

from __future__ import annotations

import itertools

import numpy as np

from edge_safe.runtime.session import Binding

CHUNK = 512


def chunks(total: int, size: int = CHUNK) -> list[tuple[int, int]]:
    """Cuts ``total`` positions into (start, end) pieces of at most ``size``.

    The last piece never holds slot T alone: the verdict is read from T-1, which has to be in the
    same run.
    """
    edges = [*range(0, total, size), total]
    if len(edges) > 2 and edges[-1] - edges[-2] == 1:
        edges[-2] -= 1
    return list(itertools.pairwise(edges))


def bind_positions(binding: Binding, past: int, count: int) -> None:
    """Binds mask and position numbers for ``count`` new positions after ``past`` cached ones."""
    binding.input("attention_mask", np.ones((1, past + count), np.int64))
    binding.input("position_ids", np.arange(past, past + count, dtype=np.int64)[None])
