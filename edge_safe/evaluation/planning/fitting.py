"""Fits the constants to half of the published figures and checks them against the others.

The figures of a phase and a kind of device are sorted by device, model, tokens and source; every
other one, the first among them, is fitted, the rest is held out. Where figures of this very runtime
exist for a phase, only they are fitted: every other one of them, and all of other runtimes are held
out. Figures that stand apart are neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from edge_safe.evaluation.planning.devices import Kind
from edge_safe.evaluation.planning.formulas import Constants, seconds
from edge_safe.evaluation.planning.published import OWN, PHASES, Figure, Phase, figures

KINDS: tuple[Kind, ...] = ("gpu", "thor", "cpu")

WITHIN = 0.35
"""How far a held-out prediction should be from the figure at most."""

_SEARCH_STEPS = 80
_LOWEST, _HIGHEST = 0.01, 10.0


@dataclass(frozen=True, slots=True)
class Check:
    """A figure beside its prediction.

    Attributes:
        figure: What was published.
        fitted: Whether the constants were fitted on it.
        predicted: Seconds.
    """

    figure: Figure
    fitted: bool
    predicted: float

    @property
    def error(self) -> float:
        """Predicted over published time, less one."""
        return self.predicted / self.figure.seconds - 1.0


def group(phase: Phase, kind: Kind) -> Kind:
    """Whose figures a constant is fitted on: decoding is one for all GPUs."""
    return "gpu" if phase == "decode" and kind == "thor" else kind


def split(phase: Phase, kind: Kind) -> tuple[list[Figure], list[Figure]]:
    """The figures that are fitted, and those held out."""
    own_group = group(phase, kind)
    found = sorted(
        (
            figure
            for figure in figures()
            if figure.phase == phase
            and group(phase, figure.device.kind) == own_group
            and not figure.apart
        ),
        key=_order,
    )
    pool = [figure for figure in found if figure.source == OWN] or found
    fitted = pool[::2]
    return fitted, [figure for figure in found if figure not in fitted]


def _order(figure: Figure) -> tuple[str, str, str, int, str]:
    device = figure.device.name
    return device, figure.mode.name, figure.model, figure.tokens, figure.source


@cache
def constants_of(kind: Kind) -> Constants:
    """The constants of one kind of device."""
    fitted = Constants(1.0, 1.0, 1.0)
    # Decode first: the others read as it does.
    for phase in reversed(PHASES):
        fitted = _fit(phase, fitted, split(phase, kind)[0])
    return fitted


def _fit(phase: Phase, constants: Constants, known: Sequence[Figure]) -> Constants:
    """Least squares of the logarithms, by ternary search: the sum has one minimum."""

    def with_share(logarithm: float) -> Constants:
        share = math.exp(logarithm)
        match phase:
            case "encode":
                return replace(constants, encode=share)
            case "prefill":
                return replace(constants, prefill=share)
            case "decode":
                return replace(constants, decode=share)

    def squares(logarithm: float) -> float:
        tried = with_share(logarithm)
        return sum(
            math.log(seconds(phase, one.step, one.mode, tried) / one.seconds) ** 2 for one in known
        )

    low, high = math.log(_LOWEST), math.log(_HIGHEST)
    for _ in range(_SEARCH_STEPS):
        third = (high - low) / 3
        if squares(low + third) < squares(high - third):
            high -= third
        else:
            low += third
    return with_share((low + high) / 2)


def checks(phase: Phase, kind: Kind) -> list[Check]:
    """Every figure of a phase and a kind of device beside its prediction."""
    fitted, held_out = split(phase, kind)
    return sorted(
        (_check(figure, figure in fitted) for figure in (*fitted, *held_out)),
        key=lambda check: _order(check.figure),
    )


def apart() -> list[Check]:
    """The figures that the formulas do not describe."""
    return [_check(figure, False) for figure in figures() if figure.apart]


def _check(figure: Figure, fitted: bool) -> Check:
    constants = constants_of(figure.device.kind)
    return Check(figure, fitted, seconds(figure.phase, figure.step, figure.mode, constants))


@cache
def farthest(phase: Phase, kind: Kind) -> float:
    """The held-out figure that is farthest off: the larger of predicted and published, over it."""
    ratios = (
        check.predicted / check.figure.seconds for check in checks(phase, kind) if not check.fitted
    )
    return max(max(ratio, 1.0 / ratio) for ratio in ratios)
