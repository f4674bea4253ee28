"""Thresholds of a bundle, fitted on what the bundle itself says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_safe.export import acceptance
from edge_safe.export.acceptance_rows import LabelledRow
from edge_safe.export.bundle_files import hash_files, write_manifest
from edge_safe.export.bundle_manifest import with_stages
from edge_safe.export.drift import ThresholdDrift, threshold_drift
from edge_safe.export.safety_plan import stage_calibration
from edge_safe.models.calibration import calibrate
from edge_safe.models.early_exit import fit_early_exit
from edge_safe.runtime import manifest as schema
from edge_safe.runtime.calibration import StageCalibration
from edge_safe.runtime.policy import Stage

_EARLY = "early"


@dataclass(frozen=True, slots=True)
class Refitted:
    """What a bundle's own verdicts say of its thresholds.

    Attributes:
        stages: The calibration of each stage.
        early: That of the early exit, None without one.
        drift: How far each stage's threshold moved.
    """

    stages: dict[Stage, StageCalibration]
    early: StageCalibration | None
    drift: list[ThresholdDrift]


def refit(
    folder: Path,
    manifest: schema.Manifest,
    source: Path,
    data: str,
    rows: Sequence[LabelledRow],
) -> Refitted:
    """Fits every stage and way in of the bundle on its own log-odds, as training does."""
    before, early = manifest.safety.stages, manifest.safety.early
    measuring = dict.fromkeys(before, acceptance.MEASURING)
    _write(folder, with_stages(manifest, measuring))
    section = acceptance.calibration_section(source)
    odds = acceptance.measure_stages(folder, rows, list(before))
    if early is not None:
        _write(folder, with_stages(manifest, measuring, acceptance.ALL_END_EARLY))
        odds.stages[_EARLY] = acceptance.measure_log_odds(folder, rows, "gate")
    fitted = calibrate(
        odds,
        section.target_fpr,
        data,
        method=section.method,
        media_target_fpr=section.media_target_fpr,
    )
    after = {stage: stage_calibration(fitted[stage]) for stage in before}
    exit_there = None
    if early is not None:
        pair = fit_early_exit(
            odds,
            fitted,
            early.layer,
            (_EARLY, "gate"),
            section.target_fpr,
            section.media_target_fpr,
        )
        after["gate"] = stage_calibration(pair.gate)
        exit_there = stage_calibration(pair.calibration)
    return Refitted(after, exit_there, threshold_drift(odds, before, after))


def _write(folder: Path, manifest: schema.Manifest) -> None:
    write_manifest(folder, msgspec.structs.replace(manifest, files=hash_files(folder)))
