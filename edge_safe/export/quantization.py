"""Precisions as a table of rows: what each kind of matrix is stored as."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, TypeVar

from edge_safe.errors import ExportError

Row = TypeVar("Row")
Rounding = Literal["nearest", "k_quant", "hqq"]


@dataclass(frozen=True, slots=True)
class MatrixFormat:
    """How one kind of matrix is stored.

    Attributes:
        bits: 4 or 8 for whole numbers, 16 or 32 for floating point.
        block: Columns that share a scale; 0 for all of a row, whose inputs are then rounded to 8
            bits as well, with a scale per position.
        symmetric: Whether the zero point is the middle of the range and not stored.
        positive: With ``symmetric``, whether no scale is negative, which TensorRT does not take.
        accuracy_level: Of MatMulNBits; 4 multiplies in int8, 0 in the input's own type.
        offsets: Whether what whole zero points cannot express is kept, see ``rounding.quantize``.
        rounding: How values and scales are found.
        brain: With 16 bits, bfloat16 instead of float16.
    """

    bits: int
    block: int = 32
    symmetric: bool = False
    positive: bool = False
    accuracy_level: int = 4
    offsets: bool = False
    rounding: Rounding = "nearest"
    brain: bool = False

    @property
    def blocked(self) -> bool:
        """Whether values stand in blocks with a scale each."""
        return self.bits < 16 and self.block > 0

    @property
    def whole(self) -> bool:
        """Whether a scale holds for a whole row."""
        return self.bits < 16 and self.block == 0

    @property
    def label(self) -> str:
        """Short name: ``int4``, ``int8``, ``fp16``, ``bf16`` or ``fp32``."""
        if self.bits < 16:
            return f"int{self.bits}"
        return "bf16" if self.brain else f"fp{self.bits}"


PLAIN = MatrixFormat(bits=32)
HALF = MatrixFormat(bits=16)
BRAIN = MatrixFormat(bits=16, brain=True)
INT8 = MatrixFormat(8)
INT4 = MatrixFormat(4, offsets=True)
FAST = MatrixFormat(4, block=128)
ROWS = MatrixFormat(8, block=0, symmetric=True)

# What embedding and lm_head can be stored as by their own options.
TABLE_FORMATS = {"fp32": PLAIN, "fp16": HALF, "int8": INT8, "int4": MatrixFormat(4)}


@dataclass(frozen=True, slots=True)
class Precision:
    """One row of the table.

    Attributes:
        name: What ``--precision`` says.
        good_for: When to take it, for help texts and documents.
        weights: Matrices of the decoder's layers.
        embedding: The embedding.
        towers: Linear layers of towers and projectors.
        lm_head: The output matrix; None for that of the embedding, whose bytes it shares if tied.
        below_gate: Matrices of the layers whose states the gate reads; None for ``weights``.
        layers: A format per layer, which goes before the two; empty in the table itself.
        scaled: Whether inputs of linear layers are scaled first by what calibration texts show.
        imported: Whether 4-bit values of a GPTQ or AWQ checkpoint are kept as they are.
        prefill: Matrices of the layers once more, in graphs that prompts are read with; None where
            the same ones serve.
    """

    name: str
    good_for: str
    weights: MatrixFormat
    embedding: MatrixFormat = INT8
    towers: MatrixFormat = INT8
    lm_head: MatrixFormat | None = None
    below_gate: MatrixFormat | None = None
    layers: tuple[MatrixFormat, ...] = ()
    scaled: bool = False
    imported: bool = False
    prefill: MatrixFormat | None = None

    @property
    def smoothed(self) -> bool:
        """Whether rows are rounded as a whole, before which channels are made alike."""
        below = self.below_gate is not None and self.below_gate.whole
        return self.weights.whole or below or self.prefill is not None

    @property
    def head(self) -> MatrixFormat:
        """Format of lm_head."""
        return self.embedding if self.lm_head is None else self.lm_head

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded, so that everything has to agree with torch."""
        forms = {self.weights, self.embedding, self.head, self.towers, *self.layers}
        return forms == {PLAIN} and self.below_gate in (None, PLAIN)

    def of_layer(self, index: int, exit_layer: int | None) -> MatrixFormat:
        """Format of one layer's matrices."""
        if self.layers:
            return self.layers[index]
        below = exit_layer is not None and index < exit_layer
        return self.below_gate if below and self.below_gate is not None else self.weights


def _int4(symmetric: bool, block: int) -> Precision:
    kind = "symmetric" if symmetric else "asymmetric"
    use = "smaller and faster, less exact" if symmetric else "whole zero points"
    return Precision(
        f"int4-{kind}-{block}",
        f"4 bits, {kind}, a scale per {block} weights: {use}",
        MatrixFormat(4, block, symmetric),
    )


# Mean KL divergence of the next token from the fp32 model's, on answers of a 135M Llama whose
# weights came from a 4-bit GGUF file: int4 0.004; without offsets 0.315; with a 4-bit embedding
# 0.071; int8 0.004; ONNX Runtime's dynamic int8 in its place 0.161. On other answers: int4 0.002,
# int4-fast 0.50, llama.cpp's Q4_0 0.35; perplexity against fp32's 1.01, 1.40 and 1.45.
#
# fp16 and bf16 are what weights are stored as; they are cast to float32 as a graph is opened. The
# CPU provider of onnxruntime 1.31 has no bfloat16 product at all and computes float16 ones in
# float32 on x86.
PRECISIONS = {
    row.name: row
    for row in (
        Precision("fp32", "reference: agrees with torch within 1e-4", PLAIN, PLAIN, PLAIN),
        Precision("fp16", "half the file, computed in fp32; keeps fp16 exactly", HALF, HALF, HALF),
        Precision(
            "bf16", "half the file, computed in fp32; keeps bf16 exactly", BRAIN, BRAIN, BRAIN
        ),
        Precision("int8", "8 bits, activations in 8 bits too, block by block: next to fp32", INT8),
        Precision(
            "int8-weights",
            "8 bits, activations in fp32: slower than int8, a little closer",
            MatrixFormat(8, accuracy_level=0),
        ),
        Precision("int4", "4 bits in blocks of 32 with offsets: the default of devices", INT4),
        Precision(
            "int4-fast",
            "int4 below the gate; above it blocks of 128, and lm_head in 4 bits: decodes faster",
            FAST,
            lm_head=TABLE_FORMATS["int4"],
            below_gate=INT4,
        ),
        Precision(
            "int8-rows",
            "8 bits, a scale per output and per position: reads prompts fastest, decodes slower",
            ROWS,
        ),
        Precision(
            "int4-int8",
            "int8-rows to read prompts, blocks of 128 to decode: fastest, verdicts next to fp32",
            FAST,
            lm_head=TABLE_FORMATS["int4"],
            prefill=ROWS,
        ),
        Precision(
            "int4-rows",
            "int8-rows below the gate, int4-fast above it: reads prompts fast in little memory",
            FAST,
            lm_head=TABLE_FORMATS["int4"],
            below_gate=ROWS,
        ),
        *(_int4(symmetric, block) for symmetric in (True, False) for block in (32, 64, 128)),
        Precision(
            "int4-kquant",
            "4 bits, scale and zero point searched block by block",
            MatrixFormat(4, rounding="k_quant"),
        ),
        Precision(
            "int4-hqq",
            "4 bits, zero points by half-quadratic optimization, kept as offsets",
            MatrixFormat(4, offsets=True, rounding="hqq"),
        ),
        Precision(
            "int4-awq",
            "4 bits, inputs scaled by what --calibration texts show (AWQ)",
            MatrixFormat(4),
            scaled=True,
        ),
        Precision(
            "int4-gate8",
            "int4, with 8 bits in the layers below the gate: verdicts next to fp32",
            INT4,
            below_gate=INT8,
        ),
        Precision(
            "imported",
            "keeps the 4-bit values of a GPTQ or AWQ checkpoint",
            MatrixFormat(4),
            imported=True,
        ),
    )
}


# What is asked for elsewhere, and why it is not here.
REFUSED = {
    "int8-dynamic": (
        "one scale for all activations of a tensor (MatMulInteger, DynamicQuantizeMatMul) lets "
        "what stands at slot T, and padding, change the verdict: by 0.06 on a tiny model. int8 "
        "rounds activations as well, but each position and block for itself"
    ),
}


def precision_named(
    name: str, embedding: str | None = None, lm_head: str | None = None
) -> Precision:
    """Finds a row of the table.

    Args:
        name: The row.
        embedding: A key of ``TABLE_FORMATS`` in place of the row's own.
        lm_head: The same for the output matrix.

    Raises:
        ExportError: There is no such row or format; the message lists those there are.
    """
    if name in REFUSED:
        raise ExportError(f"There is no precision {name!r}: {REFUSED[name]}.")
    row = _find("precision", name, PRECISIONS)
    if embedding is not None:
        form = _find("format of the embedding", embedding, TABLE_FORMATS)
        # An embedding of its own does not take lm_head along.
        row = dataclasses.replace(row, embedding=form, lm_head=row.head)
    if lm_head is not None:
        row = dataclasses.replace(row, lm_head=_find("format of lm_head", lm_head, TABLE_FORMATS))
    return row


def _find(what: str, name: str, table: dict[str, Row]) -> Row:
    if name not in table:
        raise ExportError(f"There is no {what} {name!r}. Choose one of: {', '.join(table)}.")
    return table[name]
