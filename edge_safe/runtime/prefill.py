"""How a run of new positions is cut into chunks and told to a graph."""

from __future__ import annotations

import itertools

import numpy as np

from edge_safe.runtime.cache import KeyValueCache
from edge_safe.runtime.inputs import Inputs
from edge_safe.runtime.session import Array, Binding, Session

DEEPSTACK = "deepstack_features"

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


def bind_part(
    session: Session, source: str, cache: KeyValueCache, inputs: Inputs, start: int, end: int
) -> Binding:
    """Binds the new positions start .. end-1 with their mask behind what the cache holds.

    Args:
        session: The graph.
        source: Its input for rows.
        cache: What came before ``inputs``.
        inputs: All new positions.
        start: First of this run.
        end: Behind its last.
    """
    binding = session.binding()
    part = slice(start, end)
    binding.input("attention_mask", np.ones((1, cache.length + end), np.int64))
    binding.input("position_ids", position_ids(inputs.places[:, part] + cache.place))
    binding.input(source, np.ascontiguousarray(inputs.rows[None, part]))
    if DEEPSTACK in session.inputs:
        binding.input(DEEPSTACK, np.ascontiguousarray(inputs.deepstack[:, None, part]))
    return binding


def position_ids(places: Array) -> Array:
    """(A, n) places as a graph takes them: (1, n) counted one by one, else (3, 1, n)."""
    return np.ascontiguousarray(places if len(places) == 1 else places[:, None])
