"""What one sequence has left behind: caches, the gate's columns, and what is still owed to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_safe.runtime.cache import GateColumns, KeyValueCache
from edge_safe.runtime.inputs import Inputs
from edge_safe.runtime.prefill import Span


@dataclass(slots=True)
class Owed:
    """A refused prompt of which the gate's layers above the early exit have seen nothing yet.

    Attributes:
        inputs: Its embeddings, T positions.
        spans: Of these, those that see each other.
    """

    inputs: Inputs
    spans: Sequence[Span]


@dataclass(slots=True)
class State:
    """What one sequence has left behind.

    Attributes:
        cache: The model's keys and values.
        columns: What the gate keeps of every position; None without a gate.
        owed: What ``Engine.settle`` has to add to the columns before anything follows.
    """

    cache: KeyValueCache
    columns: GateColumns | None
    owed: Owed | None = None

    def lengths(self) -> tuple[int, int]:
        """Positions in the cache and columns of the gate, for ``rewind``."""
        return self.cache.length, self.columns.length if self.columns is not None else 0

    def rewind(self, lengths: tuple[int, int]) -> None:
        """Forgets all that came after ``lengths()`` was asked."""
        self.owed = None
        self.cache.truncate(lengths[0])
        if self.columns is not None:
            self.columns.truncate(lengths[1])

    def clear(self) -> None:
        """Forgets everything and keeps the memory."""
        self.rewind((0, 0))

    def free(self) -> None:
        """Forgets everything, the memory included."""
        self.clear()
        self.cache.free()
        if self.columns is not None:
            self.columns.free()

    def size_of(self, length: int) -> int:
        """Bytes that so many positions take."""
        columns = 0 if self.columns is None else self.columns.size_of(length)
        return self.cache.size_of(length) + columns

    @property
    def size(self) -> int:
        """Bytes that it takes now."""
        columns = 0 if self.columns is None else self.columns.size
        return self.cache.size_of(self.cache.capacity) + columns
