"""How a run of new positions is cut into chunks and told to a graph."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from edge_safe.runtime.session import Array, Binding

CHUNK = 512
ATTENTION_END = "attention_end"
"""Input of graphs in which the positions of a span see each other."""

Span = tuple[int, int]
"""First new position, and the one behind the last, of positions that all see each other."""


def chunks(total: int, size: int = CHUNK, spans: Sequence[Span] = ()) -> list[tuple[int, int]]:
    """Cuts ``total`` positions into (start, end) pieces of at most ``size``.

    The last piece never holds slot T alone: the verdict is read from T-1, which has to be in the
    same run. A span is never cut, so that a piece is longer than ``size`` where a span is.
    """
    edges = [0]
    while edges[-1] < total:
        end = min(edges[-1] + size, total)
        if end == total - 1:
            # One position would be left over.
            end = total if end - 1 == edges[-1] else end - 1
        for start, stop in spans:
            if start < end < stop:
                end = start if start > edges[-1] else stop
        # What a span has moved may leave slot T alone again.
        edges.append(total if end == total - 1 else end)
    return list(itertools.pairwise(edges))


def attention_ends(past: int, start: int, end: int, spans: Sequence[Span] = ()) -> Array:
    """The last position that each of new positions start .. end-1 sees, (1, end - start) int64.

    It is the position itself, or the last one of its span; ``past`` positions are cached before
    all new ones.
    """
    ends = np.arange(past + start, past + end, dtype=np.int64)
    for first, stop in spans:
        ends[max(first - start, 0) : max(stop - start, 0)] = past + stop - 1
    return ends[None]


def bind_positions(
    binding: Binding, past: int, start: int, end: int, spans: Sequence[Span] | None
) -> None:
    """Binds mask and position numbers of new positions start .. end-1.

    Args:
        binding: Of a gate or decoder.
        past: Positions that are cached before all new ones.
        start: First position of this run.
        end: The one behind its last.
        spans: Of all new positions; None for a graph that knows none.
    """
    binding.input("attention_mask", np.ones((1, past + end), np.int64))
    binding.input("position_ids", np.arange(past + start, past + end, dtype=np.int64)[None])
    if spans is not None:
        binding.input(ATTENTION_END, attention_ends(past, start, end, spans))
