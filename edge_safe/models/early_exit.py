"""Thresholds of two heads that judge one after the other, fitted together.

The lower head ends a request that it is sure of; the upper one decides all others. Both refuse, so
the harmless requests that they refuse add up: the pair is given the false-positive rate that the
upper head alone would have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_safe.evaluation import metrics
from edge_safe.models.calibration import calibration_rows, threshold_for
from edge_safe.models.examples import LogOdds
from edge_safe.models.safety_file import Calibration, EarlyExit, Fitted, Medium

EARLY_SHARE = 0.25
"""Of the harmless requests that a pair may refuse, those that the lower head may at most: what ends
there is meant to be clear, on other rows too."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two thresholds and what they do on the rows they were fitted on.

    Attributes:
        early: Lowest p_unsafe that ends a request at the lower head.
        gate: Lowest p_unsafe that the upper head refuses.
        ended: (n,) bool, rows that end at the lower head.
        refused: (n,) bool, rows that either refuses.
    """

    early: float
    gate: float
    ended: metrics.BoolArray
    refused: metrics.BoolArray


def fit_early_exit(
    odds: LogOdds,
    fitted: dict[str, Calibration],
    layer: int,
    stages: tuple[str, str],
    target_fpr: float,
    media_target_fpr: float | None = None,
) -> EarlyExit:
    """Fits both thresholds for each way in, over the calibrated probabilities of each head.

    Of the shares of the false positives that the lower head may have, up to ``EARLY_SHARE``, the
    one is taken at which most harmful rows end there, among those at which the pair lets no more
    harmful rows pass than the upper head alone.

    Args:
        odds: Verdicts on rows that nothing was trained on.
        fitted: Each stage by itself, on the same rows.
        layer: The lower head's.
        stages: Names of the lower and of the upper stage.
        target_fpr: Share of harmless rows that the pair may refuse.
        media_target_fpr: The same for pictures and sound; None for the same.
    """
    own, parts = calibration_rows(odds)
    early, gate = (fitted[stage] for stage in stages)
    lower, upper = _fit(own, (early, gate), stages, target_fpr)
    others = {
        name: _fit(
            part,
            (early.of(name), gate.of(name)),
            stages,
            target_fpr if media_target_fpr is None else media_target_fpr,
        )
        for name, part in parts.items()
    }
    return EarlyExit(
        layer,
        _with_modalities(lower, {name: pair[0] for name, pair in others.items()}),
        _with_modalities(upper, {name: pair[1] for name, pair in others.items()}),
    )


def _with_modalities(own: Fitted, others: dict[Medium, Fitted]) -> Calibration:
    fields = {name: getattr(own, name) for name in Fitted.__struct_fields__}
    return Calibration(**fields, modalities=others)


def _fit(
    odds: LogOdds, alone: tuple[Fitted, Fitted], stages: tuple[str, str], target_fpr: float
) -> tuple[Fitted, Fitted]:
    """Both calibrations of one way in."""
    unsafe = odds.unsafe
    p_early, p_gate = (
        one.p_unsafe(odds.stages[stage]) for one, stage in zip(alone, stages, strict=True)
    )
    harmless = int((~unsafe).sum())
    budget = int(target_fpr * harmless)
    passing = int((unsafe & (p_gate < threshold_for(p_gate[~unsafe], target_fpr))).sum())
    best = None
    for count in range(int(EARLY_SHARE * budget) + 1):
        pair = _pair(unsafe, p_early, p_gate, count / harmless, budget)
        worse = int((unsafe & ~pair.refused).sum()) > passing
        if not worse and (
            best is None or (pair.ended & unsafe).sum() > (best.ended & unsafe).sum()
        ):
            best = pair
    if best is None:
        best = _pair(unsafe, p_early, p_gate, 0.0, budget)
    score = np.where(best.ended, np.maximum(p_early, p_gate), p_gate)
    return (
        _with_rates(alone[0], best.early, unsafe, best.ended, alone[0].auroc, target_fpr),
        _with_rates(
            alone[1], best.gate, unsafe, best.refused, metrics.auroc(unsafe, score), target_fpr
        ),
    )


def _pair(
    unsafe: metrics.BoolArray,
    p_early: metrics.FloatArray,
    p_gate: metrics.FloatArray,
    early_fpr: float,
    budget: int,
) -> _Pair:
    """The pair whose lower head refuses a share of the harmless rows, and the upper the rest."""
    early = threshold_for(p_early[~unsafe], early_fpr)
    ended = p_early >= early
    left = p_gate[~unsafe & ~ended]
    room = max(0, budget - int((ended & ~unsafe).sum()))
    gate = threshold_for(left, room / max(1, len(left)))
    return _Pair(early, gate, ended, ended | (p_gate >= gate))


def _with_rates(
    fitted: Fitted,
    threshold: float,
    unsafe: metrics.BoolArray,
    refused: metrics.BoolArray,
    auroc: float,
    target_fpr: float,
) -> Fitted:
    """The same curve with another threshold and the rates it gives."""
    passed, stopped = ~refused[unsafe], refused[~unsafe]
    return Fitted(
        **{
            name: getattr(fitted, name)
            for name in ("scale", "bias", "fitted_on", "rows", "method", "knots")
        },
        threshold=threshold,
        auroc=auroc,
        asr=float(passed.mean()),
        fpr=float(stopped.mean()),
        target_fpr=target_fpr,
        asr_interval=metrics.clopper_pearson_interval(int(passed.sum()), passed.size),
        fpr_interval=metrics.clopper_pearson_interval(int(stopped.sum()), stopped.size),
    )
