"""From log-odds to a probability and a threshold, for every stage and every way in."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Literal

import msgspec
import numpy as np

from edge_safe.evaluation import metrics
from edge_safe.models.examples import LogOdds
from edge_safe.models.safety_file import Calibration, Fitted, Medium
from edge_safe.models.safety_head import FINAL

LEAST_ROWS = 50
"""A way in is calibrated by itself from so many rows of each label on."""

_BOOTSTRAP_SEED = 0
_ROUNDING = 1e-9


def calibrate(
    odds: LogOdds,
    target_fpr: float,
    fitted_on: str,
    *,
    method: metrics.Method | Literal["auto"] = "platt",
    media_target_fpr: float | None = None,
) -> dict[str, Calibration]:
    """Fits curve and threshold of every stage, for each way in that has rows enough.

    The stage's own calibration is that of texts; see ``calibration_rows``. Pictures and sound get
    their own on top, each from its own rows.

    Args:
        odds: Verdicts on rows that nothing was trained on.
        target_fpr: Share of their harmless rows that the threshold may refuse.
        fitted_on: The rows, in words.
        method: How log-odds become probabilities; ``auto`` takes, for each stage and way in, the
            method with the least log loss on held-out rows.
        media_target_fpr: The same share for pictures and sound; None for the same.

    Raises:
        DataError: The rows have one label only.
    """
    own_rows, parts = calibration_rows(odds)
    if media_target_fpr is None:
        media_target_fpr = target_fpr
    fitted = {}
    for stage in odds.stages:
        own = _fit(own_rows, stage, target_fpr, fitted_on, method)
        others = {
            name: _fit(part, stage, media_target_fpr, fitted_on, method)
            for name, part in parts.items()
        }
        fitted[stage] = Calibration(**msgspec.structs.asdict(own), modalities=others)
    return fitted


def calibration_rows(odds: LogOdds) -> tuple[LogOdds, dict[Medium, LogOdds]]:
    """The rows that a stage's own calibration is fitted on, and those of other ways in.

    Jailbreak forms around harmless questions are every other row in training and rare in use, so
    they would put the threshold where no use needs it: requests as they come are taken. Where such
    rows are too few all of text serves, or all there is. Contrasts are left out where there are
    rows enough: their harmless readings are written to be mistaken, and would put the threshold
    where ordinary requests do not need it. Pictures and sound are there where they have rows
    enough.
    """
    text = odds.of_modality("text")
    own = next((rows for rows in (text.as_they_came(), text) if _enough(rows)), odds)
    media: tuple[Medium, ...] = ("image", "audio")
    parts = {name: _as_asked(odds.of_modality(name)) for name in media}
    return own, {name: part for name, part in parts.items() if _enough(part)}


def refused_by_source(
    odds: LogOdds, stage: str, calibration: Calibration
) -> dict[str, dict[str, float]]:
    """Rows and share refused of each source, harmful and harmless rows apart."""
    groups: defaultdict[str, list[bool]] = defaultdict(list)
    refused = np.zeros(len(odds.unsafe), dtype=bool)
    for modality in set(odds.modalities):
        rows = np.array([name == modality for name in odds.modalities])
        fitted = calibration.of(modality)
        refused[rows] = fitted.p_unsafe(odds.stages[stage][rows]) >= fitted.threshold
    for source, unsafe, stopped in zip(odds.sources, odds.unsafe, refused, strict=True):
        label = "unsafe" if unsafe else "safe"
        # All wrapped rows are one group, all split ones another, and so on.
        groups[f"{source.split(':')[0]} ({label})"].append(bool(stopped))
    return {
        name: {"rows": len(flags), "refused": round(float(np.mean(flags)), 4)}
        for name, flags in sorted(groups.items())
    }


def best_layer(fitted: dict[str, Calibration]) -> int | None:
    """The gate with the best AUROC, the earliest of equals; None without gates."""
    gates = [(c.auroc, -int(s.split(".")[1])) for s, c in fitted.items() if s != FINAL]
    return -max(gates)[1] if gates else None


def _as_asked(odds: LogOdds) -> LogOdds:
    asked = odds.without_contrasts()
    return asked if _enough(asked) else odds


def _enough(odds: LogOdds) -> bool:
    unsafe = int(odds.unsafe.sum())
    return LEAST_ROWS <= unsafe <= len(odds.unsafe) - LEAST_ROWS


def threshold_for(safe: metrics.FloatArray, target_fpr: float) -> float:
    """The lowest threshold for the target, within [0, 1] and clear of rounding."""
    lowest = metrics.threshold_at_fpr(safe, target_fpr)
    # Where every harmless row may be refused it is -inf, which JSON cannot hold. Above 1 nothing
    # would ever be refused. The row it must let pass may come out an ulp higher elsewhere.
    return min(lowest * (1.0 + _ROUNDING), 1.0) if math.isfinite(lowest) else 0.0


def _fit(
    odds: LogOdds,
    stage: str,
    target_fpr: float,
    fitted_on: str,
    method: metrics.Method | Literal["auto"],
) -> Fitted:
    """Fits one stage on all the rows given."""
    unsafe, values = odds.unsafe, odds.stages[stage]
    fit = metrics.fit_calibration(unsafe, values, method)
    p_unsafe = fit.p_unsafe(values)
    threshold = threshold_for(p_unsafe[~unsafe], target_fpr)
    passed, stopped = (p_unsafe < threshold)[unsafe], (p_unsafe >= threshold)[~unsafe]
    auroc = {"auroc": metrics.weighted_auroc(unsafe, values)}
    return Fitted(
        scale=fit.scale,
        bias=fit.bias,
        threshold=threshold,
        fitted_on=fitted_on,
        rows=len(values),
        auroc=metrics.auroc(unsafe, values),
        asr=float(passed.mean()),
        fpr=float(stopped.mean()),
        method=fit.method,
        knots=fit.knots,
        target_fpr=target_fpr,
        auroc_interval=metrics.bootstrap_intervals(unsafe, auroc, seed=_BOOTSTRAP_SEED)["auroc"],
        asr_interval=metrics.clopper_pearson_interval(int(passed.sum()), passed.size),
        fpr_interval=metrics.clopper_pearson_interval(int(stopped.sum()), stopped.size),
    )
