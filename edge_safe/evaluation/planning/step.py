"""What a run has to read and to compute."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """One run of one or more graphs.

    Attributes:
        read_bytes: Weights, keys and values that are read, each once.
        operations: Multiplications and additions in floating point.
        integer_operations: Those that integer kernels make, of 8-bit activations and weights.
    """

    read_bytes: float = 0.0
    operations: float = 0.0
    integer_operations: float = 0.0

    def __add__(self, other: Step) -> Step:
        return Step(
            self.read_bytes + other.read_bytes,
            self.operations + other.operations,
            self.integer_operations + other.integer_operations,
        )

    def times(self, factor: float) -> Step:
        """The same, so many times."""
        return Step(
            self.read_bytes * factor, self.operations * factor, self.integer_operations * factor
        )
