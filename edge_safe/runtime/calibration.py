"""From a stage's log-odds to p_unsafe: one calibration for text, others for pictures and sound.

What is fitted here was fitted elsewhere; this knows the formula and nothing of graphs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

Medium = Literal["image", "audio"]
Modality = Literal["text", "image", "audio"]
"""A way in: audio for whatever has sound, else image for whatever has a picture, else text."""

MODALITIES: tuple[Modality, ...] = ("text", "image", "audio")

Interval = tuple[float, float]


class Fitted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From log-odds, verdict logit unsafe - safe, to a decision: refuse when p_unsafe >= threshold.

    ``p_unsafe = sigmoid(scale * curve(log-odds) + bias)``. ``fitted_on`` and ``rows`` say on what
    it was fitted; rates and intervals were measured there, or are null where nothing was measured.

    Attributes:
        scale: Factor on the curve.
        bias: Added to it.
        threshold: Lowest p_unsafe that is refused.
        fitted_on: The data, in words.
        rows: Number of rows.
        auroc: Area under the ROC curve.
        asr: Share of harmful rows that pass at the threshold.
        fpr: Share of harmless rows that are refused at it.
        method: How it was fitted.
        knots: Points (log-odds, value) of the curve of ``isotonic``, straight lines between them,
            level beyond them, never falling; empty for the identity.
        target_fpr: Share of harmless rows that the threshold was to refuse at most.
        auroc_interval: 95 % interval of ``auroc``; the other two likewise.
    """

    scale: float = 1.0
    bias: float = 0.0
    threshold: float = 0.5
    fitted_on: str | None = None
    rows: int = 0
    auroc: float | None = None
    asr: float | None = None
    fpr: float | None = None
    method: Literal["platt", "temperature", "isotonic"] = "platt"
    knots: tuple[tuple[float, float], ...] = ()
    target_fpr: float | None = None
    auroc_interval: Interval | None = None
    asr_interval: Interval | None = None
    fpr_interval: Interval | None = None


class StageCalibration(Fitted, frozen=True, forbid_unknown_fields=True):
    """A stage's calibration for text, and those of the other ways in that have their own.

    Attributes:
        modalities: By way in; one that is absent uses the stage's own.
    """

    modalities: dict[Medium, Fitted] = {}

    def of(self, modality: Modality) -> Fitted:
        """The calibration of a conversation that came in this way."""
        return self if modality == "text" else self.modalities.get(modality, self)


def way_in(modalities: Iterable[Modality]) -> Modality:
    """The way in of a whole conversation: audio if anything has sound, else image, else text."""
    return max(modalities, key=MODALITIES.index, default="text")


def score(calibration: Fitted, log_odds: float) -> float:
    """Calibrated log-odds: the curve, scaled and moved."""
    if calibration.knots:
        odds, values = zip(*calibration.knots, strict=True)
        log_odds = _between(log_odds, odds, values)
    return calibration.scale * log_odds + calibration.bias


def sigmoid(value: float) -> float:
    """Logistic function that does not overflow."""
    if value >= 0:
        return 1.0 / (1.0 + math.exp(-value))
    power = math.exp(value)
    return power / (1.0 + power)


def edge(calibration: Fitted, threshold: float | None = None) -> float:
    """Log-odds at which the decision changes; scale is not negative.

    Args:
        calibration: What turns log-odds into p_unsafe.
        threshold: In place of the calibration's own.
    """
    share = calibration.threshold if threshold is None else threshold
    share = min(max(share, 1e-9), 1 - 1e-9)
    value = (math.log(share) - math.log1p(-share) - calibration.bias) / max(calibration.scale, 1e-9)
    if calibration.knots:
        odds, values = zip(*calibration.knots, strict=True)
        return _between(value, values, odds)
    return value


def _between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Straight lines between points (x, y) with rising x, at one x; flat outside of them."""
    # numpy is imported later than manifests are read.
    import numpy as np

    return float(np.interp(x, xs, ys))


def refuses(calibration: Fitted, log_odds: float, threshold: float | None = None) -> bool:
    """Whether a request of these log-odds is refused."""
    share = calibration.threshold if threshold is None else threshold
    return sigmoid(score(calibration, log_odds)) >= share


def problem(calibration: StageCalibration) -> str | None:
    """What keeps a calibration from being used; None for a good one."""
    for fitted in (calibration, *calibration.modalities.values()):
        numbers = (fitted.scale, fitted.bias, fitted.threshold)
        if not all(map(math.isfinite, (*numbers, *(n for knot in fitted.knots for n in knot)))):
            return "a number that is not finite"
        for (x, y), (next_x, next_y) in zip(fitted.knots, fitted.knots[1:], strict=False):
            if next_x < x or next_y < y:
                return f"a curve that falls at {next_x:g}"
    return None
