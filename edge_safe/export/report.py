"""``report.json``: what an export did, and how the result differs from the torch model."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge_safe.export.auto import Candidate, GroupEffect
from edge_safe.export.drift import ThresholdDrift
from edge_safe.export.greedy_parity import GreedyParity
from edge_safe.export.language_parity import VerdictParity
from edge_safe.export.parity import Boundary
from edge_safe.export.tensorrt.rtx import EngineRecord
from edge_safe.runtime.calibration import StageCalibration
from edge_safe.runtime.manifest import Acceptance

REPORT_FILE = "report.json"

# What the graphs were compared with.
HELD = "torch in fp32, the whole model in memory"
STREAMED = (
    "torch in fp32, its weights read layer by layer; all layers were run, but no prompts were "
    "steered to either verdict, and greedy text is the bundle's own, which torch read along"
)


class MatrixRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one kind of matrix was packed.

    Attributes:
        kind: ``layers``, ``embedding``, ``lm_head`` or the name of a tower.
        bits: Bits of a value; 32 is plain float32.
        block: Columns that share a scale.
        offsets: Whether blocks keep the part that whole zero points cannot express.
        parameters: Number of weights.
        bytes: Their size in the weights file.
        relative_error: Root of the mean squared rounding error over that of the weights.
    """

    kind: str
    bits: int
    block: int
    offsets: bool
    parameters: int
    bytes: int
    relative_error: float


class Parity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Agreement with torch.

    Attributes:
        tolerance: Largest relative difference allowed; None where differences are reported only.
        passed: Whether every boundary passed.
        boundaries: All comparisons.
        greedy: Greedy decoding.
        verdicts: Verdicts of the bundle's first stage.
        reference: What stood on the other side, in words.
    """

    tolerance: float | None
    passed: bool
    boundaries: list[Boundary]
    greedy: GreedyParity
    verdicts: VerdictParity
    reference: str = HELD


class ModalityRates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows of one way in, and the bundle's rates on them; None where a label is missing."""

    rows: int
    auroc: float | None
    asr: float | None
    fpr: float | None


class Agreement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bundle, run by the real runtime, beside the torch model on labelled rows.

    Attributes:
        data: The file.
        rows: Rows judged.
        errors: Rows on which the bundle could not decide.
        compared: Rows that torch judged too, texts all of them.
        compared_unsafe: Harmful ones among these.
        agreement: Share of rows with the same decision as torch; None where torch cannot judge.
        max_p_difference: Largest difference of p_unsafe; None likewise.
        auroc: Of the bundle.
        asr: Harmful rows that the bundle allows.
        fpr: Harmless rows that it refuses.
        torch_auroc: Of the torch model.
        torch_asr: Of the torch model.
        torch_fpr: Of the torch model.
        modalities: The bundle's rates by way in.
    """

    data: str
    rows: int
    errors: int
    compared: int
    compared_unsafe: int
    agreement: float | None
    max_p_difference: float | None
    auroc: float | None
    asr: float | None
    fpr: float | None
    torch_auroc: float | None
    torch_asr: float | None
    torch_fpr: float | None
    modalities: dict[str, ModalityRates] = {}


class AutoSearch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How precision ``auto`` came to its choice.

    Attributes:
        groups: What each format does in each group of matrices alone.
        candidates: What was considered, the smallest first.
        chosen: Which of them the bundle is.
    """

    groups: list[GroupEffect]
    candidates: list[Candidate]
    chosen: int


class Engines(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What TensorRT runs of a bundle.

    Attributes:
        release: The TensorRT that its graphs are written for.
        built: Engines in the bundle; empty where they are built on the device.
        on_the_cpu: All other graphs, and why the CPU runs them.
    """

    release: str
    built: list[EngineRecord]
    on_the_cpu: dict[str, str]


class ExportReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole of ``report.json``.

    Attributes:
        name: Name of the bundle.
        family: The model_type.
        target: Hardware it was made for.
        precision: Row of the table of precisions.
        exit_layer: Layer of the gate, None without one.
        matrices: How matrices were packed.
        parity: Agreement with torch.
        calibration: Per stage, as in the manifest.
        refitted: Whether the calibration was fitted on this bundle itself.
        drift: How far that moved each threshold; empty where it was not.
        acceptance: The safety test's figures.
        accepted: Its result, as in the manifest.
        sizes: Bytes of every graph and weights file.
        seconds: Time of every step.
        search: How precision ``auto`` chose, None where a row was named.
        cache: What keys and values are kept as.
        engines: For TensorRT: what was built, and what runs beside it.
        peak_memory_mb: Largest resident memory of the exporting process, in MB of 2**20 bytes.
        schema_version: Version of this layout.
    """

    schema_version: int = 1
    name: str
    family: str
    target: str
    precision: str
    exit_layer: int | None
    matrices: list[MatrixRecord]
    parity: Parity
    calibration: dict[str, StageCalibration]
    refitted: bool
    drift: list[ThresholdDrift]
    acceptance: Agreement
    accepted: Acceptance
    sizes: dict[str, int]
    seconds: dict[str, float]
    peak_memory_mb: int
    cache: str
    search: AutoSearch | None = None
    engines: Engines | None = None


def write_report(folder: Path, report: ExportReport) -> None:
    """Writes ``report.json``; a difference that is no number is written as null."""
    encoded = msgspec.json.format(msgspec.json.encode(report), indent=2)
    (folder / REPORT_FILE).write_bytes(encoded + b"\n")
