"""Repeated measurements, interleaved, so that a busy moment hits all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Action = Callable[[], Mapping[str, float]]
"""Does one thing once and returns what it measured, by name."""


@dataclass(slots=True)
class Samples:
    """Measured values by name, in the order they were taken."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, measured: Mapping[str, float]) -> None:
        """Takes one value of each name."""
        for name, value in measured.items():
            self.values.setdefault(name, []).append(value)

    def divide(self, name: str, upper: str, lower: str) -> None:
        """Keeps the ratio of two names' values, pair by pair, under a name of its own."""
        pairs = zip(self.values[upper], self.values[lower], strict=True)
        self.values[name] = [value / other for value, other in pairs]

    def medians(self) -> dict[str, float]:
        """The median of each name."""
        return {name: statistics.median(values) for name, values in self.values.items()}

    def spread(self) -> dict[str, list[float]]:
        """The lower and the upper quartile of each name."""
        return {name: quartiles(values) for name, values in self.values.items()}


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower and upper quartile; a single value is both."""
    if len(values) < 2:
        return [values[0], values[0]]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return [lower, upper]


def interleave(
    actions: Iterable[Action], rounds: int, done: Callable[[], None] = lambda: None
) -> Samples:
    """Runs every action once to warm up, then all of them in turn, ``rounds`` times.

    Every other round runs backwards, so that no action always follows the same one.

    Args:
        actions: What to measure.
        rounds: How often.
        done: Told after every round.
    """
    samples = Samples()
    order = list(actions)
    for action in order:
        action()
    for turn in range(rounds):
        for action in order if turn % 2 == 0 else reversed(order):
            samples.add(action())
        done()
    return samples
