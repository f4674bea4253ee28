"""Runs a recipe from start to end: trains, calibrates, reports and writes the checkpoint."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import msgspec

from edge_safe.models import training
from edge_safe.models.cache import cache_folder
from edge_safe.models.calibration import best_layer, calibrate, refused_by_source
from edge_safe.models.checkpoint import check_target, write_checkpoint
from edge_safe.models.early_exit import fit_early_exit
from edge_safe.models.lm_training import Fidelity
from edge_safe.models.progress import Progress, silent
from edge_safe.models.recipe import read_recipe
from edge_safe.models.run import Run
from edge_safe.models.safety_file import Calibration, EarlyExit, describe, stage_name
from edge_safe.models.safety_head import FINAL

CURVES = "loss_curves.png"
REPORT = "training_report.json"


class TrainingReport(msgspec.Struct, frozen=True):
    """What a run did.

    Attributes:
        out: The checkpoint folder.
        work: Folder of checkpoints and logs while training.
        log: JSON Lines file with every step's losses and every epoch's validation.
        seconds: Wall time of this call; less than the whole after a resume.
        steps: Optimizer steps of the main task.
        examples: Numbers of training and validation examples.
        exit_layer: The gate's layer, None without heads.
        stage: The stage the report leads with.
        stages: Calibration and error rates of every stage on the validation split.
        early: Both thresholds of a gate with an early exit.
        sources: Rows and share refused of each kind of row, by the leading stage.
        fidelity: How near benign answers are to the base model's, where answers were given.
        reading: Share of word pieces that a text projector trained here reads right.
        hearing: Share of words that a speech decoder trained here hears right.
        naming: Share of confident pictures that an objects projector trained here names wholly.
    """

    out: str
    work: str
    log: str
    seconds: float
    steps: int
    examples: dict[str, int]
    exit_layer: int | None
    stage: str
    stages: dict[str, Calibration]
    early: EarlyExit | None
    sources: dict[str, dict[str, float]]
    fidelity: Fidelity | None
    reading: float | None
    hearing: float | None
    naming: float | None


def train_recipe(
    recipe: Path,
    *,
    data: Path,
    out: Path,
    resume: bool = True,
    cache: Path | None = None,
    progress: Progress = silent,
) -> TrainingReport:
    """Trains a safety-token model.

    Every process of an ``accelerate launch`` calls this; the first one writes.

    Args:
        recipe: TOML file; the model it names is relative to it.
        data: Folder its data files are relative to.
        out: Checkpoint folder to write. ``<out>.work`` beside it keeps checkpoints and the log.
        resume: Go on from the checkpoints of a run that was stopped.
        cache: Folder of cached features; by default ``$EDGE_SAFE_CACHE``, or else the
            user's cache.
        progress: Told how far each job is.

    Raises:
        RecipeError: The recipe has an unknown key or an impossible value.
        DataError: A data file is missing or malformed.
        CheckpointError: The model cannot be opened, or the folder cannot be written.
    """
    started = time.monotonic()
    settings = read_recipe(recipe)
    out = out.resolve()
    check_target(out)
    accelerator = training.make_accelerator()
    work = out.with_name(f"{out.name}.work")
    if accelerator.is_main_process:
        if not resume:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    run = Run(settings, data, recipe.parent, work, cache or cache_folder(), accelerator, progress)
    steps, odds = run.train()

    section = settings.calibration
    fitted = calibrate(
        odds,
        section.target_fpr,
        run.fitted_on,
        method=section.method,
        media_target_fpr=section.media_target_fpr,
    )
    chosen = settings.heads.exit_layer
    exit_layer = best_layer(fitted) if chosen == "auto" else chosen
    early = None
    lower = settings.heads.early_layer
    if lower is not None:
        early = fit_early_exit(
            odds,
            fitted,
            lower,
            (stage_name(lower), stage_name(exit_layer)),
            section.target_fpr,
            section.media_target_fpr,
        )
    stage = FINAL if section.stage == FINAL else stage_name(exit_layer)
    report = TrainingReport(
        out=str(out),
        work=str(work),
        log=str(run.log),
        seconds=round(time.monotonic() - started, 1),
        steps=steps,
        examples=run.counts,
        exit_layer=exit_layer,
        stage=stage,
        stages=fitted,
        early=early,
        sources=refused_by_source(odds, stage, fitted[stage]),
        fidelity=run.fidelity,
        reading=run.tower_scores.reading,
        hearing=run.tower_scores.hearing,
        naming=run.tower_scores.naming,
    )
    if accelerator.is_main_process:
        (work / REPORT).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
        training.plot_losses(training.read_log(run.log), work / CURVES)
        file = describe(run.safety.config, run.tokens, exit_layer, fitted, early)
        beside = (work / REPORT, work / CURVES)
        write_checkpoint(
            out, run.base.model, run.base.tokenizer, run.safety, file, beside, run.source
        )
    accelerator.wait_for_everyone()
    return report
