"""From a checkpoint folder to a bundle: open, emit, compare, calibrate, accept, publish."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from edge_safe.errors import ExportError, UsageError
from edge_safe.export import acceptance as tests
from edge_safe.export import auto
from edge_safe.export.acceptance_rows import (
    AcceptanceRows,
    LabelledRow,
    acceptance_rows,
    check_apart,
    read_labelled,
)
from edge_safe.export.activations import observe
from edge_safe.export.bundle_files import copy_tokenizer, hash_files, write_manifest
from edge_safe.export.bundle_manifest import draft_manifest, with_stages
from edge_safe.export.cache_format import cache_format_named
from edge_safe.export.clock import Clock, Progress
from edge_safe.export.drift import ThresholdDrift
from edge_safe.export.emission import Form, compare_with_torch, emit
from edge_safe.export.families.base import Opened, find_family
from edge_safe.export.footprint import check_room, least_bytes, peak_memory_mb
from edge_safe.export.language_parity import encode_prompts
from edge_safe.export.publish import check_free, staged
from edge_safe.export.quantization import precision_named
from edge_safe.export.reference import Reference
from edge_safe.export.refitting import refit
from edge_safe.export.report import AutoSearch, ExportReport, write_report
from edge_safe.export.safety_plan import (
    SafetyPlan,
    check_tokens,
    plan_from_module,
    plan_from_tokens,
)
from edge_safe.export.targets import Target, target_named
from edge_safe.export.tensorrt.engines import add_engines
from edge_safe.export.tensorrt.precisions import PRECISIONS as TENSORRT
from edge_safe.export.tensorrt.precisions import tensorrt_precision
from edge_safe.export.tensorrt.releases import RELEASES, Release, release_for
from edge_safe.export.tensorrt.rtx import USUAL
from edge_safe.models.prompts import Message, PromptEncoder
from edge_safe.runtime import manifest as schema
from edge_safe.runtime.policy import Policy, load_policy


@dataclass(frozen=True, slots=True)
class Job:
    """What all attempts at one export share.

    Attributes:
        source: The checkpoint folder.
        folder: Where the bundle is being built.
        out: Where it will stand.
        family: The model_type.
        target: What it is for.
        opened: The checkpoint.
        plan: Its safety part.
        reference: The torch model.
        calibration: Rows to re-fit the thresholds on, and the name of their file.
        acceptance: Rows to test on.
        clock: Tells progress.
        command: The precision as it was asked for, and the tables' formats if they were.
        policy: What the bundle comes with.
    """

    source: Path
    folder: Path
    out: Path
    family: str
    target: Target
    opened: Opened
    plan: SafetyPlan
    reference: Reference
    calibration: tuple[str, list[LabelledRow]] | None
    acceptance: AcceptanceRows
    clock: Clock
    command: str
    policy: Policy


def export_bundle(
    source: Path | str,
    out: Path | str,
    *,
    target: str = "cpu",
    precision: str = "int4",
    embedding: str | None = None,
    lm_head: str | None = None,
    kv_cache: str = "fp32",
    exit_layer: str = "auto",
    calibration: Path | None = None,
    acceptance: Path | None = None,
    allow_unaccepted: bool = False,
    overwrite: bool = False,
    safe_token: str | None = None,
    unsafe_token: str | None = None,
    policy: Path | None = None,
    release: str | None = None,
    capabilities: Sequence[str] = USUAL,
    progress: Progress = lambda step, share: None,
) -> ExportReport:
    """Turns a checkpoint folder into a bundle, or leaves everything as it was.

    Args:
        source: The checkpoint folder, or that of a peft adapter.
        out: The bundle folder to write.
        target: Hardware and provider, a row of the table of targets.
        precision: A row of the table of precisions, or ``auto`` for the smallest mixture of
            formats that is accepted.
        embedding: A format for the embedding in place of the row's own.
        lm_head: The same for the output matrix.
        kv_cache: What keys and values are kept as.
        exit_layer: ``auto`` for the checkpoint's own, or for the earliest that is within the
            policy's ``max_asr``; ``none`` for full depth, or a layer.
        calibration: Labelled rows to re-fit the bundle's thresholds on; without it those of the
            torch model are carried over. Its texts also show what flows through the model, for
            precisions and caches that ask for it.
        acceptance: Labelled rows on which the bundle is compared with torch; without it a few mild
            ones that come with the package.
        allow_unaccepted: Writes a bundle that failed the test; its manifest says so, and the
            runtime does not load it unless told to.
        overwrite: Whether a folder that is there may be replaced, after success.
        safe_token: With ``unsafe_token``, for a model that was only fine-tuned to emit the two.
        unsafe_token: The other one.
        policy: The policy file that the bundle comes with.
        release: Which TensorRT reads the bundle; None for the oldest that reads the precision.
        capabilities: GPUs that engines of TensorRT for RTX are built for.
        progress: Told the step and the share of it that is done.

    Returns:
        What was done, as in ``report.json``.

    Raises:
        ExportError: The checkpoint cannot be exported, the bundle is not accepted, or the folder
            cannot be written.
        CheckpointError: The checkpoint cannot be read.
        UsageError: The arguments do not go together.
        DataError: A calibration or acceptance file is malformed, or they share rows.
        PolicyError: The policy is malformed.
    """
    own_policy = Policy() if policy is None else load_policy(policy)
    source, out = Path(source), Path(out)
    made_for = target_named(target)
    if made_for.tensorrt:
        forms = _tensorrt_forms(made_for.name, precision, release, [embedding, lm_head], kv_cache)
    else:
        forms = [_form(made_for, precision, embedding, lm_head, kv_cache, release)]
    row, cache = forms[0].precision, forms[0].cache
    if row.scaled and calibration is None:
        raise UsageError(f"Precision {row.name} needs --calibration FILE: texts to look at.")
    only_tokens = check_tokens(source, safe_token, unsafe_token)
    model_type, open_checkpoint = find_family(source)
    check_free(out, overwrite=overwrite)
    fitted_on = None if calibration is None else (calibration.name, read_labelled(calibration))
    tested_on = acceptance_rows(acceptance)
    if fitted_on is not None:
        check_apart(fitted_on[1], tested_on.rows)
    plan = None if only_tokens else plan_from_module(source, exit_layer, own_policy.max_asr)
    clock = Clock(progress)

    with staged(out, overwrite=overwrite) as folder:
        with clock.step("open the checkpoint"):
            opened = open_checkpoint(source)
        if plan is None:
            plan = plan_from_tokens(opened, str(safe_token), str(unsafe_token))
        if row.imported and opened.lattice is None:
            raise ExportError(
                f"{source} does not come in 4 bits, so there is nothing to import; choose another "
                "precision."
            )
        check_room(out.absolute().parent, least_bytes(opened.spec, row, plan.exit_layer))
        job = Job(
            source,
            folder,
            out,
            model_type,
            made_for,
            opened,
            plan,
            Reference(
                opened.language,
                plan.module,
                plan.final,
                plan.exit_layer,
                opened.streamed,
                opened.spec.bidirectional,
                None if plan.early is None else plan.early.layer,
            ),
            fitted_on,
            tested_on,
            clock,
            _asked_for(precision, embedding, lm_head),
            own_policy,
        )
        seen = None
        if row.scaled or row.smoothed or cache == "int8":
            with clock.step("look at activations"):
                seen = observe(opened.language, opened.spec, _prompts(job))
        forms = [replace(form, seen=seen) for form in forms]
        if precision == "auto" and not made_for.tensorrt:
            report = _search(job, forms[0])
        else:
            report = _first_accepted(job, forms)
        accepted = report.accepted
        if not accepted.passed and not allow_unaccepted:
            raise ExportError(
                f"The bundle failed its acceptance test on {accepted.data}: {accepted.reason}. "
                "Nothing was written. Choose another precision, or ask for --allow-unaccepted to "
                "write it marked as failed."
            )
        chosen = next((form for form in forms if form.precision.name == report.precision), forms[0])
        if chosen.release is not None:
            report = add_engines(job.folder, opened.towers, chosen.release, capabilities, clock)
    return report


def _form(
    target: Target,
    precision: str,
    embedding: str | None,
    lm_head: str | None,
    cache: str,
    release: str | None,
) -> Form:
    """What is asked for of ONNX Runtime's own operators."""
    if release is not None:
        raise UsageError("A release is TensorRT's; leave it out, or choose --target tensorrt.")
    if precision == "auto" and (embedding or lm_head):
        raise UsageError("Precision auto chooses all formats; leave embedding and lm_head out.")
    row = precision_named("int4" if precision == "auto" else precision, embedding, lm_head)
    if target.half_caches:
        if cache == "int8" or row.smoothed:
            raise ExportError(
                f"Provider {target.name} has no kernel for "
                f"{'a cache in int8' if cache == 'int8' else f'the products of {row.name}'}; "
                "choose another."
            )
        cache = "fp16"
    return Form(row, cache_format_named(cache), None)


def _tensorrt_forms(
    target: str, precision: str, release: str | None, tables: Sequence[str | None], cache: str
) -> list[Form]:
    """What is asked for of TensorRT; with ``auto`` all it reads, the smallest first."""
    if any(tables) or cache != "fp32":
        raise UsageError(
            "For TensorRT the precision says what embedding, lm_head and caches are kept as; leave "
            "--embedding, --lm-head and --kv-cache out."
        )
    if precision == "auto":
        read = release_for(target, "fp16", release)
        newest = [row for row in RELEASES.values() if row.target == target][-1]
        chosen = newest if release is None else read
        names = [name for name in TENSORRT if name in chosen.precisions and name != "fp32"]
        return [_tensorrt_form(name, chosen) for name in names]
    return [_tensorrt_form(precision, release_for(target, precision, release))]


def _tensorrt_form(name: str, release: Release) -> Form:
    row = tensorrt_precision(name)
    return Form(row, "fp32" if row.exact else "fp16", None, release)


def _first_accepted(job: Job, forms: Sequence[Form]) -> ExportReport:
    """Builds one after the other until one is accepted; the last one otherwise."""
    for number, form in enumerate(forms):
        if number:
            _empty(job.folder)
        report = _attempt(job, form)
        if report.accepted.passed:
            break
    return report


def _search(job: Job, form: Form) -> ExportReport:
    """Builds candidates, the smallest first, until one is accepted; the last one otherwise.

    Those that cost more perplexity in torch than acceptance lets pass are not built.
    """
    encoder = PromptEncoder(job.opened.tokenizer)
    texts = [row.prompt for row in job.acceptance.rows if row.modality == "text"][: auto.PROMPTS]
    with job.clock.step("measure layer groups"):
        groups, choices = auto.search(
            job.reference,
            job.opened.language,
            job.opened.spec,
            [
                np.array([[*encoder.encode([Message("user", text)]), job.plan.safe_token_id]])
                for text in texts
            ],
            job.plan.stages[job.plan.first_stage],
            job.plan.exit_layer,
        )
    candidates = [choice.candidate for choice in choices]
    bound = job.target.bounds.perplexity
    worth = [number for number, one in enumerate(candidates) if not one.hopeless(bound)]
    for number in worth or [len(choices) - 1]:
        _empty(job.folder)
        report = _attempt(job, replace(form, precision=choices[number].precision))
        passed = report.accepted.passed
        candidates[number] = msgspec.structs.replace(candidates[number], accepted=passed)
        if passed:
            break
    auto.draw(candidates, number, job.folder / auto.PICTURE)
    report = msgspec.structs.replace(report, search=AutoSearch(groups, candidates, number))
    write_report(job.folder, report)
    manifest = schema.load_manifest(job.folder)
    write_manifest(job.folder, msgspec.structs.replace(manifest, files=hash_files(job.folder)))
    return report


def _attempt(job: Job, form: Form) -> ExportReport:
    """Builds one bundle in the job's folder, compares, calibrates and tests it."""
    opened, plan, folder, clock = job.opened, job.plan, job.folder, job.clock
    matrices = emit(folder, opened, plan, form, clock)
    copy_tokenizer(job.source, opened.tokenizer, folder)
    for name, data in opened.files.items():
        (folder / name).write_bytes(data)
    parity = compare_with_torch(folder, opened, plan, job.reference, form, clock)
    manifest = draft_manifest(
        folder,
        job.source,
        opened,
        plan,
        family=job.family,
        target=job.target.name,
        precision=form.precision.name,
        command=_command(job, form),
        policy=job.policy,
    )
    drift: list[ThresholdDrift] = []
    if job.calibration is not None:
        with clock.step("fit the thresholds"):
            again = refit(folder, manifest, job.source, *job.calibration)
        drift = again.drift
        manifest = with_stages(manifest, again.stages, again.early, refitted=True)
    with clock.step("test the bundle"):
        write_manifest(folder, msgspec.structs.replace(manifest, files=hash_files(folder)))
        found = tests.measure_agreement(
            folder,
            job.acceptance.rows,
            job.acceptance.name,
            job.reference,
            PromptEncoder(opened.tokenizer),
            plan.safe_token_id,
            plan.stages[plan.first_stage],
            None if plan.early is None else plan.early.calibration,
        )
    accepted = tests.judge_agreement(
        found,
        job.target.bounds,
        drift,
        parity.greedy.perplexity,
        builtin=job.acceptance.builtin,
        wrong_tokens=tests.check_control_tokens(
            schema.load_manifest(folder).safety, plan.safe_token_id, plan.unsafe_token_id
        ),
    )
    safety = msgspec.structs.replace(manifest.safety, acceptance=accepted)
    manifest = msgspec.structs.replace(manifest, safety=safety)
    report = ExportReport(
        name=manifest.name,
        family=job.family,
        target=job.target.name,
        precision=form.precision.name,
        cache=form.cache,
        exit_layer=plan.exit_layer,
        matrices=matrices,
        parity=parity,
        calibration={str(k): v for k, v in manifest.safety.stages.items()},
        refitted=manifest.safety.refitted,
        drift=drift,
        acceptance=found,
        accepted=accepted,
        sizes={p.name: p.stat().st_size for p in sorted(folder.glob("*.onnx*"))},
        seconds=clock.seconds,
        peak_memory_mb=peak_memory_mb(),
    )
    write_report(folder, report)
    write_manifest(folder, msgspec.structs.replace(manifest, files=hash_files(folder)))
    return report


def _prompts(job: Job) -> list[list[int]]:
    """Ids of the calibration file's texts, of a few everyday ones without a file."""
    tokenizer = job.opened.tokenizer
    rows = [] if job.calibration is None else job.calibration[1]
    texts = [row.prompt for row in rows if row.modality == "text"]
    if not texts:
        return encode_prompts(tokenizer)
    encoder = PromptEncoder(tokenizer)
    return [encoder.encode([Message("user", text)]) for text in texts]


def _empty(folder: Path) -> None:
    """Removes an attempt that was not accepted."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _asked_for(precision: str, embedding: str | None, lm_head: str | None) -> str:
    """The options that choose formats of matrices."""
    options = {"--precision": precision, "--embedding": embedding, "--lm-head": lm_head}
    return " ".join(f"{name} {value}" for name, value in options.items() if value is not None)


def _command(job: Job, form: Form) -> str:
    """The call, with what ``auto`` stood for and without the machine's own folders."""
    layer = "none" if job.plan.exit_layer is None else str(job.plan.exit_layer)
    words = [
        f"edge-safe export {job.source.resolve().name} --out {job.out.name}",
        f"--target {job.target.name} {job.command} --exit-layer {layer}",
    ]
    if form.release is not None:
        words.append(f"--release {form.release.name}")
    elif form.cache != "fp32":
        words.append(f"--kv-cache {form.cache}")
    return " ".join(words)
