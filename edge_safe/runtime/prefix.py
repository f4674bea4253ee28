"""What requests have in common at their beginning, computed once: the system text, say.

Only states are kept, never a verdict: the gate judges every request anew, over kept columns and
new ones. Which beginnings are worth keeping shows when a second request begins like an earlier one.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np

from edge_safe.runtime.cache import GateColumns, KeyValueCache
from edge_safe.runtime.session import Array

LEAST = 8
"""Positions below which keeping a beginning is not worth the copying."""

# Requests whose ids are remembered, to find what the next one has in common with them.
_RECENT = 8


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """The states of a prompt's first n positions; a shorter beginning of them is valid as well.

    Attributes:
        ids: (n,) their ids.
        caches: Keys and values (1, kv_heads, n, head_dim) of the first layers, or of all.
        columns: (1, K, n, d) of the gate; None without one.
        states: (n, d) entering the gate's layer, where ``caches`` end there; else None.
    """

    ids: Array
    caches: list[Array]
    columns: Array | None
    states: Array | None

    @property
    def size(self) -> int:
        """Bytes."""
        arrays = [self.ids, *self.caches, self.columns, self.states]
        return sum(array.nbytes for array in arrays if array is not None)

    def load(self, count: int, cache: KeyValueCache, columns: GateColumns | None) -> None:
        """Puts the first positions into empty caches, which then hold that many."""
        cache.load(self.caches, count)
        cache.extend(count, count)
        if columns is not None and self.columns is not None:
            columns.append(self.columns[:, :, :count])


class PrefixCache:
    """Beginnings that requests share, the least recently used out first. Shared between threads.

    Args:
        limit: Bytes it may hold; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: list[Prefix] = []  # the most recently used last
        self._recent: deque[Array] = deque(maxlen=_RECENT)
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes held."""
        with self._lock:
            return sum(prefix.size for prefix in self._kept)

    def find(self, ids: Array) -> tuple[Prefix | None, int]:
        """What begins like ``ids`` for the longest, and for how many positions.

        Of equals that which all layers have read.
        """
        with self._lock:
            best, most = None, (LEAST - 1, True)
            for prefix in self._kept:
                rank = (common_length(prefix.ids, ids), prefix.states is None)
                if rank > most:
                    best, most = prefix, rank
            if best is None:
                return None, 0
            self._kept.remove(best)
            self._kept.append(best)
            return best, most[0]

    def worth_keeping(self, ids: Array) -> int:
        """How many of these first positions an earlier request had and nothing kept covers."""
        if not self._limit:
            return 0
        with self._lock:
            count = max((common_length(earlier, ids) for earlier in self._recent), default=0)
            if not any(np.array_equal(earlier, ids) for earlier in self._recent):
                self._recent.append(ids)
            known = any(common_length(prefix.ids, ids) >= count for prefix in self._kept)
            return 0 if known or count < LEAST else count

    def keep(self, prefix: Prefix) -> None:
        """Takes a beginning in place of those it covers, unless it is larger than all may be."""
        with self._lock:
            if prefix.size > self._limit:
                return
            self._kept = [
                other
                for other in self._kept
                if common_length(prefix.ids, other.ids) < len(other.ids)
            ]
            self._kept.append(prefix)
            while sum(other.size for other in self._kept) > self._limit:
                del self._kept[0]


def common_length(first: Array, second: Array) -> int:
    """How many ids two sequences (n,) and (m,) have in common at their beginning."""
    shorter = min(len(first), len(second))
    different = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(different[0]) if len(different) else shorter
