"""Writes the graphs of a bundle and their weights, and compares them with torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from edge_safe.errors import ExportError
from edge_safe.export.activations import Activations
from edge_safe.export.cache_format import CacheFormat
from edge_safe.export.clock import Clock
from edge_safe.export.families.base import Emission, Opened
from edge_safe.export.graphs.cut_gate import early_graph, late_graph
from edge_safe.export.graphs.decoder import (
    ModelWeights,
    decoder_graph,
    embedding_graph,
    gate_graph,
    store_model,
)
from edge_safe.export.graphs.matrices import Matrix
from edge_safe.export.graphs.spec import DecoderSpec
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.language_graphs import LanguageGraphs
from edge_safe.export.language_parity import check_language
from edge_safe.export.parity import FP32_TOLERANCE, check_towers, require
from edge_safe.export.quantization import Precision
from edge_safe.export.reference import Reference
from edge_safe.export.report import HELD, STREAMED, MatrixRecord, Parity
from edge_safe.export.safety_plan import SafetyPlan
from edge_safe.export.scaling import balanced, least_error, scaled_source
from edge_safe.export.tensorrt.folder import lower_folder
from edge_safe.export.tensorrt.releases import Release
from edge_safe.runtime.manifest import LATE
from edge_safe.runtime.prefill import PREFILL

WEIGHTS_FILE = "weights.onnx.data"


@dataclass(frozen=True, slots=True)
class Form:
    """How a bundle's weights and caches are kept.

    Attributes:
        precision: Of the matrices.
        cache: Of keys and values.
        seen: What flows through the torch model; None where neither asks for it.
        release: The TensorRT that reads the graphs; None for ONNX Runtime's own operators.
    """

    precision: Precision
    cache: CacheFormat
    seen: Activations | None
    release: Release | None = None

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded."""
        return self.precision.exact and self.cache == "fp32"


def emit(
    folder: Path, opened: Opened, plan: SafetyPlan, form: Form, clock: Clock
) -> list[MatrixRecord]:
    """Writes the weights files and all graphs."""
    if form.release is None:
        return _emit(folder, opened, plan, form, form.cache, clock)
    # Made as for the CPU, without conditions, then written again in standard operators.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        records = _emit(Path(scratch), opened, plan, form, "fp32", clock)
        with clock.step("lower") as share:
            lower_folder(
                Path(scratch), folder, form.release, half=not form.precision.exact, progress=share
            )
    return records


def _emit(
    folder: Path,
    opened: Opened,
    plan: SafetyPlan,
    form: Form,
    cache: CacheFormat,
    clock: Clock,
) -> list[MatrixRecord]:
    spec, precision = opened.spec, form.precision
    tensor = opened.tensor
    smoothed = None
    if precision.scaled and form.seen is not None:
        tensor = scaled_source(tensor, spec, form.seen, least_error(precision.weights))
    if precision.smoothed and form.seen is not None:
        smoothed = scaled_source(tensor, spec, form.seen, balanced)
    with WeightStore(folder / WEIGHTS_FILE) as store:
        with clock.step("quantize") as share:
            weights = store_model(
                store,
                spec,
                tensor,
                precision,
                share,
                plan.exit_layer,
                opened.lattice if precision.imported else None,
                None if form.seen is None else form.seen.caches,
                cache,
                smoothed,
            )
        embedding_graph(weights, spec).save(folder / "embed_tokens.onnx")
        if form.release is not None:
            _save_cut_graphs(folder, weights, spec, plan, store)
        else:
            _save_graphs(folder, weights, spec, plan, store, "")
        if weights.prefill:
            _save_graphs(folder, weights.for_prefill(), spec, plan, store, PREFILL)
        records = _language_records(weights)
        if opened.towers:
            with clock.step("towers") as share:
                emission = Emission(folder, store, weights, precision)
                for number, tower in enumerate(opened.towers):
                    records += _records(tower.name, tower.emit(emission))
                    share((number + 1) / len(opened.towers))
    return records


def _save_graphs(
    folder: Path,
    weights: ModelWeights,
    spec: DecoderSpec,
    plan: SafetyPlan,
    store: WeightStore,
    suffix: str,
) -> None:
    """Writes gate and decoder over some layers.

    Slot T of a prompt goes through the decoder for single tokens, so that lm_head is packed once.
    """
    single = bool(weights.prefill) and suffix == ""
    if plan.exit_layer is not None and plan.head is not None:
        early = None if plan.early is None else plan.early.head
        gate = gate_graph(weights, spec, plan.exit_layer, plan.head, store, early, single=single)
        gate.save(folder / f"gate{suffix}.onnx")
    decoder = decoder_graph(
        weights,
        spec,
        plan.exit_layer,
        plan.final,
        store,
        answers=suffix != PREFILL,
        single=single,
    )
    decoder.save(folder / f"decoder{suffix}.onnx")


def _save_cut_graphs(
    folder: Path,
    weights: ModelWeights,
    spec: DecoderSpec,
    plan: SafetyPlan,
    store: WeightStore,
) -> None:
    """Writes gate and decoder so that no run depends on a condition inside a graph."""
    if plan.exit_layer is not None and plan.head is not None:
        if plan.early is None:
            gate = gate_graph(weights, spec, plan.exit_layer, plan.head, store)
        else:
            early = plan.early.head
            gate = early_graph(weights, spec, early, plan.head, store)
            late = late_graph(weights, spec, plan.exit_layer, early, plan.head, store)
            late.save(folder / f"gate{LATE}.onnx")
        gate.save(folder / "gate.onnx")
    decoder = decoder_graph(weights, spec, plan.exit_layer, plan.final, store)
    decoder.save(folder / "decoder.onnx")


def compare_with_torch(
    folder: Path,
    opened: Opened,
    plan: SafetyPlan,
    reference: Reference,
    form: Form,
    clock: Clock,
) -> Parity:
    """Compares everything with torch; what is not rounded has to agree.

    Raises:
        ExportError: An exact graph differs, or a quantized one gives no finite numbers.
    """
    tolerance = FP32_TOLERANCE if form.exact else None
    with clock.step("compare with torch") as share:
        graphs = LanguageGraphs(
            folder,
            opened.spec,
            plan.exit_layer,
            plan.columns,
            form.cache,
            () if form.seen is None else form.seen.caches,
        )
        language = check_language(
            graphs,
            reference,
            opened.tokenizer,
            plan.safe_token_id,
            plan.stages[plan.first_stage],
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
    return Parity(
        tolerance,
        True,
        boundaries,
        language.greedy,
        language.verdicts,
        STREAMED if reference.streamed else HELD,
    )


def _language_records(weights: ModelWeights) -> list[MatrixRecord]:
    records = []
    for kind, layers in (("layers", weights.layers), ("layers of prefill", weights.prefill)):
        matrices = [
            affine.matrix
            for layer in layers
            for affine in (layer.qkv, layer.output, layer.gate, layer.up, layer.down)
            if affine is not None
        ]
        records += _records(kind, matrices)
    records += _records("embedding", [weights.embedding])
    if weights.lm_head is not weights.embedding:
        records += _records("lm_head", [weights.lm_head])
    return records


def _records(kind: str, matrices: Iterable[Matrix]) -> list[MatrixRecord]:
    """One record per format that matrices of a kind have."""

    def key(matrix: Matrix) -> str:
        return repr(matrix.format)

    return [_record(kind, list(group)) for _, group in groupby(sorted(matrices, key=key), key=key)]


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
