"""From a checkpoint folder to a bundle: open, emit, compare, calibrate, accept, publish."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from edge_safe.errors import ExportError
from edge_safe.export import acceptance as tests
from edge_safe.export.bundle_files import (
    copy_tokenizer,
    describe_graphs,
    hash_files,
    provenance,
    write_manifest,
)
from edge_safe.export.drift import ThresholdDrift, threshold_drift
from edge_safe.export.families.base import Emission, Opened, find_family
from edge_safe.export.graphs.decoder import (
    ModelWeights,
    decoder_graph,
    embedding_graph,
    gate_graph,
    store_model,
)
from edge_safe.export.graphs.matrices import Matrix
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.language_graphs import LanguageGraphs
from edge_safe.export.language_parity import check_language
from edge_safe.export.parity import FP32_TOLERANCE, check_towers, require
from edge_safe.export.publish import check_free, staged
from edge_safe.export.quantization import Precision, precision_named
from edge_safe.export.reference import Reference
from edge_safe.export.report import ExportReport, MatrixRecord, Parity, write_report
from edge_safe.export.safety_plan import (
    SafetyPlan,
    check_tokens,
    plan_from_module,
    plan_from_tokens,
    stage_calibration,
)
from edge_safe.models.calibration import calibrate
from edge_safe.models.prompts import PromptEncoder
from edge_safe.runtime import manifest as schema
from edge_safe.runtime.calibration import StageCalibration
from edge_safe.runtime.policy import STAGES, Stage

Progress = Callable[[str, float], None]

WEIGHTS_FILE = "weights.onnx.data"

# Targets whose provider runs these graphs; the precision that ``auto`` stands for.
TARGETS = {"cpu": "int4", "cuda": "int4"}


@dataclass(slots=True)
class Clock:
    """Says what is being done, and remembers how long it took."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[float], None]]:
        """Times a step; gives a function that is told the share done."""
        self.progress(name, 0.0)
        start = time.perf_counter()
        yield lambda share: self.progress(name, share)
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.progress(name, 1.0)


def export_bundle(
    source: Path | str,
    out: Path | str,
    *,
    target: str = "cpu",
    precision: str = "int4",
    exit_layer: str = "auto",
    calibration: Path | None = None,
    acceptance: Path | None = None,
    overwrite: bool = False,
    safe_token: str | None = None,
    unsafe_token: str | None = None,
    progress: Progress = lambda step, share: None,
) -> ExportReport:
    """Turns a checkpoint folder into a bundle, or leaves everything as it was.

    Args:
        source: The checkpoint folder.
        out: The bundle folder to write.
        target: Hardware and provider, a key of ``TARGETS``.
        precision: A row of the table of precisions, or ``auto`` for what suits the target.
        exit_layer: ``auto`` for the checkpoint's own, ``none`` for full depth, or a layer.
        calibration: Labelled rows to re-fit the bundle's thresholds on; without it those of the
            torch model are carried over.
        acceptance: Labelled rows on which the bundle is compared with torch.
        overwrite: Whether a folder that is there may be replaced, after success.
        safe_token: With ``unsafe_token``, for a model that was only fine-tuned to emit the two.
        unsafe_token: The other one.
        progress: Told the step and the share of it that is done.

    Returns:
        What was done, as in ``report.json``.

    Raises:
        ExportError: The checkpoint cannot be exported, or the folder cannot be written.
        CheckpointError: The checkpoint cannot be read.
        UsageError: The arguments do not go together.
        DataError: A calibration or acceptance file is malformed.
    """
    source, out = Path(source), Path(out)
    row = precision_named(_target_precision(target) if precision == "auto" else precision)
    _target_precision(target)
    only_tokens = check_tokens(source, safe_token, unsafe_token)
    model_type, open_checkpoint = find_family(source)
    check_free(out, overwrite=overwrite)
    calibration_rows = None if calibration is None else tests.read_labelled(calibration)
    acceptance_rows = None if acceptance is None else tests.read_labelled(acceptance)
    plan = None if only_tokens else plan_from_module(source, exit_layer)
    clock = Clock(progress)

    with staged(out, overwrite=overwrite) as folder:
        with clock.step("open the checkpoint"):
            opened = open_checkpoint(source)
        if plan is None:
            plan = plan_from_tokens(opened, str(safe_token), str(unsafe_token))
        matrices = _emit(folder, opened, plan, row, clock)
        copy_tokenizer(source, opened.tokenizer, folder)
        for name, data in opened.files.items():
            (folder / name).write_bytes(data)
        reference = Reference(opened.language, plan.module, plan.final, plan.exit_layer)
        parity = _compare(folder, opened, plan, reference, row, clock)

        manifest = schema.Manifest(
            name=source.resolve().name,
            family=model_type,
            target=target,
            precision=row.name,
            modalities={n: schema.Modality(t) for n, t in opened.modalities.items()},
            files={},
            graphs=describe_graphs(folder),
            model=_model_info(opened),
            processors=opened.processors,
            safety=_safety(plan),
            provenance=provenance(source, _command(source, out, target, row, plan)),
        )
        drift: list[ThresholdDrift] = []
        if calibration is not None and calibration_rows is not None:
            with clock.step("fit the thresholds"):
                stages, drift = _refit(folder, manifest, source, calibration_rows, calibration.name)
            manifest = _with_stages(manifest, stages, refitted=True)
        report = ExportReport(
            name=manifest.name,
            family=model_type,
            target=target,
            precision=row.name,
            exit_layer=plan.exit_layer,
            matrices=matrices,
            parity=parity,
            calibration={str(k): v for k, v in manifest.safety.stages.items()},
            refitted=manifest.safety.refitted,
            drift=drift,
            acceptance=None,
            accepted=None,
            sizes={p.name: p.stat().st_size for p in sorted(folder.glob("*.onnx*"))},
            seconds=clock.seconds,
        )
        if acceptance is not None and acceptance_rows is not None:
            with clock.step("test the bundle"):
                _write(folder, manifest, report)
                first = first_stage(plan)
                found = tests.measure_agreement(
                    folder,
                    acceptance_rows,
                    acceptance.name,
                    reference,
                    PromptEncoder(opened.tokenizer),
                    plan.safe_token_id,
                    plan.stages[first],
                )
            accepted = tests.judge_agreement(found)
            report = msgspec.structs.replace(report, acceptance=found, accepted=accepted)
            manifest = msgspec.structs.replace(
                manifest,
                safety=msgspec.structs.replace(manifest.safety, acceptance=accepted),
            )
        _write(folder, manifest, report)
    return report


def first_stage(plan: SafetyPlan) -> Stage:
    """The stage that a bundle asks when its policy says nothing."""
    return next(stage for stage in STAGES if stage in plan.stages)


def _target_precision(target: str) -> str:
    """The precision that ``auto`` stands for.

    Raises:
        ExportError: The target is unknown or not built yet.
    """
    if target.startswith("tensorrt"):
        raise ExportError(
            f"Target {target!r} is not built yet in this version; targets: {', '.join(TARGETS)}."
        )
    if target not in TARGETS:
        raise ExportError(f"There is no target {target!r}; targets: {', '.join(TARGETS)}.")
    return TARGETS[target]


def _emit(
    folder: Path, opened: Opened, plan: SafetyPlan, precision: Precision, clock: Clock
) -> list[MatrixRecord]:
    """Writes the weights file and all graphs."""
    spec = opened.spec
    with WeightStore(folder / WEIGHTS_FILE) as store:
        with clock.step("quantize") as share:
            weights = store_model(store, spec, opened.tensor, precision, share)
        embedding_graph(weights, spec).save(folder / "embed_tokens.onnx")
        if plan.exit_layer is not None and plan.head is not None:
            gate = gate_graph(weights, spec, plan.exit_layer, plan.head, store)
            gate.save(folder / "gate.onnx")
        decoder = decoder_graph(weights, spec, plan.exit_layer, plan.final, store)
        decoder.save(folder / "decoder.onnx")
        records = _language_records(weights)
        if opened.towers:
            with clock.step("towers") as share:
                emission = Emission(folder, store, weights, precision)
                for number, tower in enumerate(opened.towers):
                    stored = tower.emit(emission)
                    if stored:
                        records.append(_record(tower.name, stored))
                    share((number + 1) / len(opened.towers))
    return records


def _compare(
    folder: Path,
    opened: Opened,
    plan: SafetyPlan,
    reference: Reference,
    precision: Precision,
    clock: Clock,
) -> Parity:
    """Compares everything with torch; fp32 has to agree.

    Raises:
        ExportError: An fp32 graph differs, or a quantized one gives no finite numbers.
    """
    tolerance = FP32_TOLERANCE if precision.name == "fp32" else None
    shape = (0, 0) if plan.head is None else plan.head.query.shape
    with clock.step("compare with torch") as share:
        graphs = LanguageGraphs(folder, opened.spec, plan.exit_layer, (shape[0], shape[1]))
        language = check_language(
            graphs,
            reference,
            opened.tokenizer,
            plan.safe_token_id,
            plan.stages[first_stage(plan)],
            tolerance,
        )
        share(0.7)
        boundaries = language.boundaries + check_towers(folder, opened.towers, tolerance)
    require(boundaries)
    if tolerance is not None and language.greedy.agreement < 1:
        raise ExportError(
            f"Greedy text differs from torch at {1 - language.greedy.agreement:.1%} of the steps, "
            "though all outputs agree within the tolerance."
        )
    if language.verdicts.slot_change > FP32_TOLERANCE:
        raise ExportError(
            f"What stands at slot T changes the verdict by {language.verdicts.slot_change:.3g}."
        )
    return Parity(tolerance, True, boundaries, language.greedy, language.verdicts)


def _refit(
    folder: Path,
    manifest: schema.Manifest,
    source: Path,
    rows: list[tests.LabelledRow],
    data: str,
) -> tuple[dict[Stage, StageCalibration], list[ThresholdDrift]]:
    """Fits every stage and way in of the bundle on its own log-odds, as training does."""
    before = manifest.safety.stages
    measuring = _with_stages(manifest, dict.fromkeys(before, tests.MEASURING))
    write_manifest(folder, msgspec.structs.replace(measuring, files=hash_files(folder)))
    section = tests.calibration_section(source)
    odds = tests.measure_stages(folder, rows, list(before))
    fitted = calibrate(
        odds,
        section.target_fpr,
        data,
        method=section.method,
        media_target_fpr=section.media_target_fpr,
    )
    after = {stage: stage_calibration(fitted[stage]) for stage in before}
    return after, threshold_drift(odds, before, after)


def _with_stages(
    manifest: schema.Manifest, stages: dict[Stage, StageCalibration], *, refitted: bool = False
) -> schema.Manifest:
    safety = msgspec.structs.replace(manifest.safety, stages=stages, refitted=refitted)
    return msgspec.structs.replace(manifest, safety=safety)


def _write(folder: Path, manifest: schema.Manifest, report: ExportReport) -> None:
    """Writes the report, then the manifest with the hashes of everything."""
    write_report(folder, report)
    write_manifest(folder, msgspec.structs.replace(manifest, files=hash_files(folder)))


def _safety(plan: SafetyPlan) -> schema.Safety:
    attention = None
    if plan.head is not None:
        heads, width = plan.head.query.shape
        attention = schema.AttentionInfo(heads, width)
    return schema.Safety(
        safe_token_id=plan.safe_token_id,
        unsafe_token_id=plan.unsafe_token_id,
        control_token_ids=[plan.safe_token_id, plan.unsafe_token_id],
        exit_layer=plan.exit_layer,
        layers=list(plan.layers),
        attention=attention,
        stages=plan.stages,
    )


def _model_info(opened: Opened) -> schema.ModelInfo:
    """What the engine has to know, with the tokens that end an answer."""
    spec = opened.spec
    ends = getattr(opened.language.generation_config, "eos_token_id", None)
    if ends is None:
        ends = opened.tokenizer.eos_token_id
    ids = [ends] if isinstance(ends, int) else list(ends or [])
    if not ids:
        raise ExportError("The checkpoint names no end-of-text token (eos_token_id).")
    pad = opened.tokenizer.pad_token_id
    return schema.ModelInfo(
        layers=spec.layers,
        hidden_size=spec.hidden_size,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        context_length=spec.context_length,
        eos_token_ids=[int(index) for index in ids],
        pad_token_id=int(ids[0] if pad is None else pad),
        position_axes=3 if spec.position_axes == 3 else 1,
        deepstack=spec.deepstack,
    )


def _language_records(weights: ModelWeights) -> list[MatrixRecord]:
    layers = [
        affine.matrix
        for layer in weights.layers
        for affine in (layer.qkv, layer.output, layer.gate, layer.up, layer.down)
    ]
    records = [_record("layers", layers), _record("embedding", [weights.embedding])]
    if weights.lm_head is not weights.embedding:
        records.append(_record("lm_head", [weights.lm_head]))
    return records


def _record(kind: str, matrices: list[Matrix]) -> MatrixRecord:
    form = matrices[0].format
    energy = sum(matrix.energy for matrix in matrices)
    return MatrixRecord(
        kind=kind,
        bits=form.bits,
        block=form.block,
        offsets=form.offsets,
        parameters=sum(matrix.rows * matrix.columns for matrix in matrices),
        bytes=sum(matrix.size for matrix in matrices),
        relative_error=(sum(matrix.error for matrix in matrices) / max(energy, 1e-30)) ** 0.5,
    )


def _command(source: Path, out: Path, target: str, precision: Precision, plan: SafetyPlan) -> str:
    """The call, with what ``auto`` stood for and without the machine's own folders."""
    layer = "none" if plan.exit_layer is None else str(plan.exit_layer)
    return (
        f"edge-safe export {source.resolve().name} --out {out.name} --target {target} "
        f"--precision {precision.name} --exit-layer {layer}"
    )
