"""From log-odds to a probability and a threshold, for every stage."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np

from edge_safe.evaluation import metrics
from edge_safe.models.examples import LogOdds
from edge_safe.models.safety_file import Calibration
from edge_safe.models.safety_head import FINAL


def calibrate(odds: LogOdds, target_fpr: float, fitted_on: str) -> dict[str, Calibration]:
    """Fits scale, bias and threshold of every stage.

    Args:
        odds: Verdicts on rows that nothing was trained on.
        target_fpr: Share of their harmless rows that the threshold may refuse.
        fitted_on: The rows, in words.
    """
    fitted = {}
    for stage, values in odds.stages.items():
        scale, bias = metrics.fit_platt(odds.unsafe, values)
        p_unsafe = metrics.sigmoid(scale * values + bias)
        threshold = metrics.threshold_at_fpr(p_unsafe[~odds.unsafe], target_fpr)
        # Where every harmless row may be refused the threshold is -inf, which JSON cannot hold.
        threshold = threshold if math.isfinite(threshold) else 0.0
        refused = p_unsafe >= threshold
        fitted[stage] = Calibration(
            scale=scale,
            bias=bias,
            threshold=threshold,
            fitted_on=fitted_on,
            rows=len(values),
            auroc=metrics.auroc(odds.unsafe, values),
            asr=metrics.attack_success_rate(odds.unsafe, refused),
            fpr=metrics.false_positive_rate(odds.unsafe, refused),
        )
    return fitted


def refused_by_source(
    odds: LogOdds, stage: str, calibration: Calibration
) -> dict[str, dict[str, float]]:
    """Rows and share refused of each source, harmful and harmless rows apart."""
    p_unsafe = metrics.sigmoid(calibration.scale * odds.stages[stage] + calibration.bias)
    groups: defaultdict[str, list[bool]] = defaultdict(list)
    for source, unsafe, p in zip(odds.sources, odds.unsafe, p_unsafe, strict=True):
        label = "unsafe" if unsafe else "safe"
        # All wrapped rows are one group, all split ones another, and so on.
        groups[f"{source.split(':')[0]} ({label})"].append(bool(p >= calibration.threshold))
    return {
        name: {"rows": len(flags), "refused": round(float(np.mean(flags)), 4)}
        for name, flags in sorted(groups.items())
    }


def best_layer(fitted: dict[str, Calibration]) -> int | None:
    """The gate with the best AUROC, the earliest of equals; None without gates."""
    gates = [(c.auroc, -int(s.split(".")[1])) for s, c in fitted.items() if s != FINAL]
    return -max(gates)[1] if gates else None
