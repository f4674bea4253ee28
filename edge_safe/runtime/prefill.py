"""How a run of new positions is cut into chunks and told to a graph."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_safe.runtime.cache import KeyValueCache
from edge_safe.runtime.inputs import Inputs
from edge_safe.runtime.session import Array, Binding, Session

DEEPSTACK = "deepstack_features"

PREFILL = "_prefill"
"""Ending of the names of the graphs that read prompts, in bundles that decode with others."""

EARLY_BOUND = "early_bound"
"""Input of a gate with an early exit: log-odds (B,) from which on a prompt ends there."""

STATES = "gate_states."
"""Outputs of a gate's graph, by layer: states entering a layer below the gate's, which it reads."""

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


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some of the new positions, in one run.

    Attributes:
        inputs: All new positions.
        start: First of this run.
        end: Behind its last.
        spans: Of all new positions, those that see each other.
    """

    inputs: Inputs
    start: int
    end: int
    spans: Sequence[Span] = ()

    def __len__(self) -> int:
        return self.end - self.start

    def bind(self, session: Session, source: str | None, cache: KeyValueCache) -> Binding:
        """Binds the positions with their mask behind what the cache holds.

        Args:
            session: The graph.
            source: Its input for rows; None where others give them.
            cache: What came before ``inputs``.
        """
        binding, inputs = session.binding(), self.inputs
        part = slice(self.start, self.end)
        binding.input("attention_mask", np.ones((1, cache.length + self.end), np.int64))
        binding.input("position_ids", position_ids(inputs.places[:, part] + cache.place))
        if source is not None:
            binding.input(source, np.ascontiguousarray(inputs.rows[None, part]))
        if DEEPSTACK in session.inputs:
            binding.input(DEEPSTACK, np.ascontiguousarray(inputs.deepstack[:, None, part]))
        if ATTENTION_END in session.inputs:
            ends = attention_ends(cache.length, self.start, self.end, self.spans)
            binding.input(ATTENTION_END, ends)
        return binding


def position_ids(places: Array) -> Array:
    """(A, n) places as a graph takes them: (1, n) counted one by one, else (3, 1, n)."""
    return np.ascontiguousarray(places if len(places) == 1 else places[:, None])
