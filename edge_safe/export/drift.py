"""How far quantizing moved the place of a threshold: the torch model's beside the bundle's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec
import numpy as np

from edge_safe.models.examples import LogOdds
from edge_safe.runtime.calibration import (
    MODALITIES,
    Modality,
    StageCalibration,
    edge,
    refuses,
)
from edge_safe.runtime.policy import Stage


class ThresholdDrift(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stage and way in, re-fitted on the bundle's own verdicts.

    Attributes:
        stage: The stage.
        modality: The way in.
        rows: Rows of this way in; the rates below are on them.
        torch: Log-odds from which on the carried-over calibration refuses.
        bundle: Those from which on the re-fitted one does.
        drift: ``bundle - torch``.
        torch_asr: Harmful rows that the bundle would let pass under the carried-over one.
        torch_fpr: Harmless rows that it would refuse under it.
        asr: Harmful rows that it lets pass now.
        fpr: Harmless rows that it refuses now.
    """

    stage: Stage
    modality: Modality
    rows: int
    torch: float
    bundle: float
    drift: float
    torch_asr: float | None
    torch_fpr: float | None
    asr: float | None
    fpr: float | None


def threshold_drift(
    odds: LogOdds,
    before: Mapping[Stage, StageCalibration],
    after: Mapping[Stage, StageCalibration],
) -> list[ThresholdDrift]:
    """Compares two calibrations of the same stages, for every way in that has rows.

    Args:
        odds: The bundle's log-odds, by stage of the bundle.
        before: The torch model's calibrations.
        after: The re-fitted ones.
    """
    return list(_drifts(odds, before, after))


def _drifts(
    odds: LogOdds,
    before: Mapping[Stage, StageCalibration],
    after: Mapping[Stage, StageCalibration],
) -> Iterator[ThresholdDrift]:
    for stage, calibration in after.items():
        for modality in MODALITIES:
            part = odds.of_modality(modality)
            if not len(part.unsafe):
                continue
            old, new = before[stage].of(modality), calibration.of(modality)
            values = part.stages[stage].tolist()
            rates = []
            for fitted in (old, new):
                refused = np.array([refuses(fitted, value) for value in values])
                rates += [_share(~refused[part.unsafe]), _share(refused[~part.unsafe])]
            ends = edge(old), edge(new)
            yield ThresholdDrift(stage, modality, len(values), *ends, ends[1] - ends[0], *rates)


def _share(flags: np.ndarray) -> float | None:
    return float(flags.mean()) if flags.size else None
