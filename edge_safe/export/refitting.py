"""Thresholds of a bundle, fitted on what the bundle itself says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from edge_safe.export import acceptance
from edge_safe.export.acceptance_rows import LabelledRow
from edge_safe.export.bundle_files import hash_files, write_manifest
from edge_safe.export.bundle_manifest import with_stages
from edge_safe.export.drift import ThresholdDrift, threshold_drift
from edge_safe.export.safety_plan import stage_calibration
from edge_safe.models.calibration import calibrate
from edge_safe.runtime import manifest as schema
from edge_safe.runtime.calibration import StageCalibration
from edge_safe.runtime.policy import Stage


def refit(
    folder: Path,
    manifest: schema.Manifest,
    source: Path,
    data: str,
    rows: Sequence[LabelledRow],
) -> tuple[dict[Stage, StageCalibration], list[ThresholdDrift]]:
    """Fits every stage and way in of the bundle on its own log-odds, as training does."""
    before = manifest.safety.stages
    measuring = with_stages(manifest, dict.fromkeys(before, acceptance.MEASURING))
    write_manifest(folder, msgspec.structs.replace(measuring, files=hash_files(folder)))
    section = acceptance.calibration_section(source)
    odds = acceptance.measure_stages(folder, rows, list(before))
    fitted = calibrate(
        odds,
        section.target_fpr,
        data,
        method=section.method,
        media_target_fpr=section.media_target_fpr,
    )
    after = {stage: stage_calibration(fitted[stage]) for stage in before}
    return after, threshold_drift(odds, before, after)
