"""Weight matrices in the weights file, plain or packed, and the nodes that use them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_safe.errors import ExportError
from edge_safe.export.graphs.builder import GraphBuilder
from edge_safe.export.graphs.spec import FloatArray
from edge_safe.export.graphs.store import Stored, WeightStore
from edge_safe.export.quantization import MatrixFormat, dequantize, quantize


@dataclass(frozen=True, slots=True)
class Matrix:
    """One stored matrix of N rows (outputs, or words) and K columns (inputs, or widths).

    Attributes:
        rows: N.
        columns: K.
        format: How it is packed.
        values: Packed values; plain float32, (K, N) for a linear layer and (N, K) for a table.
        scales: (N, blocks) float32, None when plain.
        zero_points: (N, bytes) uint8, None when plain or symmetric.
        is_table: Whether rows can be looked up.
        error: Sum of squared rounding errors.
        energy: Sum of squared weights.
    """

    rows: int
    columns: int
    format: MatrixFormat
    values: Stored
    scales: Stored | None
    zero_points: Stored | None
    is_table: bool
    error: float
    energy: float

    @property
    def size(self) -> int:
        """Bytes in the weights file."""
        parts = (self.values, self.scales, self.zero_points)
        return sum(part.length for part in parts if part is not None)


def store_linear(store: WeightStore, weight: FloatArray, form: MatrixFormat) -> Matrix:
    """Quantizes the (out, in) weight of a linear layer and stores it."""
    return _store(store, weight, form, is_table=False)


def store_table(store: WeightStore, weight: FloatArray, form: MatrixFormat) -> Matrix:
    """Quantizes a (words, width) embedding, to be looked up and multiplied with, and stores it.

    Raises:
        ExportError: The format cannot be looked up row by row.
    """
    if form.bits < 32 and (form.offsets or weight.shape[1] % form.block):
        raise ExportError(
            f"An embedding of width {weight.shape[1]} cannot be packed in blocks of {form.block}"
            f"{' with offsets' if form.offsets else ''}. Use precision fp32."
        )
    return _store(store, weight, form, is_table=True)


def _store(store: WeightStore, weight: FloatArray, form: MatrixFormat, *, is_table: bool) -> Matrix:
    rows, columns = weight.shape
    energy = float(np.square(weight, dtype=np.float64).sum())
    if form.bits == 32:
        plain = store.add(weight if is_table else weight.T)
        return Matrix(rows, columns, form, plain, None, None, is_table, 0.0, energy)
    packed = quantize(weight, form)
    missing = weight - dequantize(packed, form, columns)
    error = float(np.square(missing, dtype=np.float64).sum())
    zeros = None if packed.zero_points is None else store.add(packed.zero_points)
    values, scales = store.add(packed.values), store.add(packed.scales)
    return Matrix(rows, columns, form, values, scales, zeros, is_table, error, energy)


def linear(g: GraphBuilder, x: str, matrix: Matrix, name: str, bias: Stored | None = None) -> str:
    """Multiplies (..., K) by a matrix into (..., N).

    A plain table takes (M, K) only, a matrix with offsets (B, S, K) only.
    """
    added = [] if bias is None else [g.weight(f"{name}.bias", bias)]
    weight = f"{name}.weight"
    if matrix.scales is None:
        values = g.weight(weight, matrix.values)
        if matrix.is_table:
            return g.op("Gemm", [x, values, *added], scope=name, transB=1)
        product = g.op("MatMul", [x, values], scope=name)
        return g.op("Add", [product, *added], scope=name) if added else product
    width = matrix.columns
    if matrix.format.offsets:
        x = _with_sums(g, x, matrix.format.block)
        width += width // matrix.format.block
    inputs = [x, *_packed_inputs(g, matrix, weight)]
    if added:
        inputs += [""] * (5 - len(inputs)) + added
    return g.contrib(
        "MatMulNBits",
        inputs,
        scope=name,
        K=width,
        N=matrix.rows,
        bits=matrix.format.bits,
        block_size=matrix.format.block,
        accuracy_level=matrix.format.accuracy_level,
    )


def look_up(g: GraphBuilder, ids: str, table: Matrix, name: str) -> str:
    """Reads rows of a table: (...) int64 -> (..., K)."""
    weight = f"{name}.table"
    if table.scales is None:
        return g.op("Gather", [g.weight(weight, table.values), ids], scope=name, axis=0)
    # The same bytes as the linear layer's, without the axis of blocks.
    width = table.values.length // table.rows
    data = g.weight(weight, table.values, (table.rows, width))
    scales = g.weight(f"{weight}_scales", table.scales)
    inputs = [data, ids, scales]
    if table.zero_points is not None:
        inputs.append(g.weight(f"{weight}_zeros", table.zero_points))
    return g.contrib(
        "GatherBlockQuantized",
        inputs,
        scope=name,
        bits=table.format.bits,
        block_size=table.format.block,
        gather_axis=0,
        quantize_axis=1,
    )


def _with_sums(g: GraphBuilder, x: str, block: int) -> str:
    """[x, its sums over blocks]; layers that read the same x share the nodes."""

    def join() -> str:
        scope = f"{x}/sums"
        grouped = g.op("Reshape", [x, g.constant([0, 0, -1, block])], scope=scope)
        sums = g.op("ReduceSum", [grouped, g.constant([3])], scope=scope, keepdims=0)
        return g.op("Concat", [x, sums], scope=scope, axis=-1)

    return g.once(f"{x}/sums", join)


def _packed_inputs(g: GraphBuilder, matrix: Matrix, name: str) -> list[str]:
    """Values, scales and zero points as MatMulNBits takes them.

    onnxruntime 1.23 wants scales and zero points flat, later ones take both forms.
    """
    if matrix.scales is None:
        return [g.weight(name, matrix.values)]
    flat = int(np.prod(matrix.scales.shape))
    names = [
        g.weight(name, matrix.values),
        g.weight(f"{name}_scales", matrix.scales, (flat,)),
    ]
    if matrix.zero_points is not None:
        names.append(g.weight(f"{name}_zeros", matrix.zero_points, (matrix.zero_points.length,)))
    return names
