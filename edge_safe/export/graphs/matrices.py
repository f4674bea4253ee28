"""Weight matrices in the weights file, plain or packed, and the nodes that use them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from edge_safe.errors import ExportError
from edge_safe.export.graphs.builder import FLOAT, GraphBuilder
from edge_safe.export.graphs.spec import FloatArray
from edge_safe.export.graphs.store import Stored, WeightStore
from edge_safe.export.packing import (
    Lattice,
    Packed,
    check_finite,
    dequantize,
    join_rows,
    lattice_matrix,
)
from edge_safe.export.quantization import MatrixFormat
from edge_safe.export.rounding import SLAB, pack_lattice, round_matrix


@dataclass(frozen=True, slots=True)
class Matrix:
    """One stored matrix of N rows (outputs, or words) and K columns (inputs, or widths).

    Attributes:
        rows: N.
        columns: K.
        format: How it is packed.
        values: Packed values; plain or whole rows, (K, N) for a linear layer and (N, K) for a
            table.
        scales: (N, blocks) float32, (N,) for whole rows, None when plain.
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
    """Stores the (out, in) weight of a linear layer in a format."""
    return _store(store, weight, form, is_table=False)


def store_lattice(store: WeightStore, lattice: Lattice, form: MatrixFormat) -> Matrix:
    """Stores a linear layer whose (out, in) weight was rounded before; nothing is lost."""
    rows, blocks, block = lattice.values.shape
    columns = blocks * block
    step = max(1, SLAB // columns)
    packed, energy, error = [], 0.0, 0.0
    for first in range(0, rows, step):
        chosen = slice(first, first + step)
        part = Lattice(lattice.values[chosen], lattice.scales[chosen], lattice.zeros[chosen])
        packed.append(pack_lattice(part, form))
        plain = lattice_matrix(part, columns)
        energy += _squares(plain)
        error += _squares(plain - dequantize(packed[-1], form, columns))
    return _stored(store, join_rows(packed), (rows, columns), form, False, error, energy)


def store_table(store: WeightStore, weight: FloatArray, form: MatrixFormat) -> Matrix:
    """Stores a (words, width) embedding, to be looked up and multiplied with.

    Raises:
        ExportError: The format cannot be looked up row by row.
    """
    if form.blocked and (form.offsets or weight.shape[1] % form.block):
        raise ExportError(
            f"An embedding of width {weight.shape[1]} cannot be packed in blocks of {form.block}"
            f"{' with offsets' if form.offsets else ''}. Use precision fp32, or --embedding fp32."
        )
    return _store(store, weight, form, is_table=True)


def _store(store: WeightStore, weight: FloatArray, form: MatrixFormat, *, is_table: bool) -> Matrix:
    """Stores a matrix a slab of rows at a time, so that little stands in memory beside it."""
    rows, columns = weight.shape
    step = max(1, SLAB // columns)
    slabs = [weight[row : row + step] for row in range(0, rows, step)]
    energy = sum(_squares(slab) for slab in slabs)
    if form.bits >= 16:
        check_finite(weight)
        with np.errstate(over="ignore"):
            plain = weight.astype(_float_type(form), copy=False)
        error = sum(_squares(a - b) for a, b in zip(slabs, _slabs_of(plain, step), strict=True))
        if not np.isfinite(error):
            raise ExportError(
                "A weight is beyond what float16 can hold (65504). Use precision bf16 or fp32."
            )
        values = store.add(plain if is_table else plain.T)
        return Matrix(rows, columns, form, values, None, None, is_table, error, energy)
    if form.whole:
        return _store_rows(store, weight, form, energy)
    packed, error = [], 0.0
    for slab in slabs:
        packed.append(pack_lattice(round_matrix(slab, form), form))
        error += _squares(slab - dequantize(packed[-1], form, columns))
    return _stored(store, join_rows(packed), (rows, columns), form, is_table, error, energy)


def _store_rows(
    store: WeightStore, weight: FloatArray, form: MatrixFormat, energy: float
) -> Matrix:
    """Stores a linear layer (N, K) as whole numbers with a scale per row."""
    check_finite(weight)
    top = 2 ** (form.bits - 1) - 1
    scales = np.maximum(np.abs(weight).max(axis=1) / top, np.finfo(np.float32).tiny)
    values = np.rint(weight / scales[:, None]).astype(np.int8)
    error = _squares(weight - values * scales[:, None])
    rows, columns = weight.shape
    stored, step = store.add(values.T), store.add(scales.astype(np.float32))
    return Matrix(rows, columns, form, stored, step, None, False, error, energy)


def _stored(
    store: WeightStore,
    packed: Packed,
    shape: tuple[int, int],
    form: MatrixFormat,
    is_table: bool,
    error: float,
    energy: float,
) -> Matrix:
    zeros = None if packed.zero_points is None else store.add(packed.zero_points)
    values, scales = store.add(packed.values), store.add(packed.scales)
    return Matrix(*shape, form, values, scales, zeros, is_table, error, energy)


def _float_type(form: MatrixFormat) -> np.dtype[np.generic]:
    if form.bits == 32:
        return np.dtype(np.float32)
    return np.dtype(ml_dtypes.bfloat16 if form.brain else np.float16)


def _slabs_of(stored: np.ndarray[Any, Any], step: int) -> list[FloatArray]:
    rows = range(0, len(stored), step)
    return [stored[row : row + step].astype(np.float32, copy=False) for row in rows]


def _squares(values: FloatArray) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def linear(g: GraphBuilder, x: str, matrix: Matrix, name: str, bias: Stored | None = None) -> str:
    """Multiplies (..., K) by a matrix into (..., N).

    A plain table takes (M, K) only, a matrix with offsets (B, S, K) only.
    """
    added = [] if bias is None else [g.weight(f"{name}.bias", bias)]
    weight = f"{name}.weight"
    if matrix.scales is None:
        values = _as_float(g, g.weight(weight, matrix.values), matrix)
        if matrix.is_table:
            return g.op("Gemm", [x, values, *added], scope=name, transB=1)
        product = g.op("MatMul", [x, values], scope=name)
        return g.op("Add", [product, *added], scope=name) if added else product
    if matrix.format.whole:
        product = _product_of_rows(g, x, g.weight(weight, matrix.values), matrix.scales, name)
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


# What inputs of 8 bits are rounded to: 1 .. 255 around 128, which stands for 0.
_LEVELS, _MIDDLE = 127.0, 128


def _product_of_rows(g: GraphBuilder, x: str, weight: str, scales: Stored, name: str) -> str:
    """Rounds every position of x by a scale of its own, and multiplies in whole numbers.

    So no position depends on another one, as with one scale for all of them it would. A NaN may
    come out as a number, since it need not be the largest of its position.
    """

    def rounded() -> str:
        scope = f"{x}/rounded"
        largest = g.op(
            "ReduceMax",
            [g.op("Abs", [x], scope=scope), g.constant([-1])],
            scope=scope,
            keepdims=1,
        )
        # Nothing but zeros stays that.
        largest = g.op("Add", [largest, g.floats(1e-30)], scope=scope)
        step = g.op("Div", [largest, g.floats(_LEVELS)], scope=scope, outputs=[f"{scope}/step"])
        share = g.op("Div", [x, step], scope=scope)
        middle = g.constant(_MIDDLE, np.uint8)
        return g.op("QuantizeLinear", [share, g.floats(1.0), middle], scope=scope)

    values = g.once(f"{x}/rounded", rounded)
    product = g.contrib(
        "MatMulIntegerToFloat",
        [
            values,
            weight,
            g.floats(1.0),
            g.weight(f"{name}.weight_scales", scales),
            g.constant(_MIDDLE, np.uint8),
        ],
        scope=name,
    )
    return g.op("Mul", [product, f"{x}/rounded/step"], scope=name)


def look_up(g: GraphBuilder, ids: str, table: Matrix, name: str) -> str:
    """Reads rows of a table: (...) int64 -> (..., K)."""
    weight = f"{name}.table"
    if table.scales is None:
        found = g.op("Gather", [g.weight(weight, table.values), ids], scope=name, axis=0)
        return _as_float(g, found, table)
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


def _as_float(g: GraphBuilder, values: str, matrix: Matrix) -> str:
    """Casts what is stored in 16 bits; of a weight ONNX Runtime does so as it opens the graph."""
    if matrix.format.bits == 32:
        return values
    cast = f"{values}/float"
    return g.once(cast, lambda: g.op("Cast", [values], scope=cast, to=FLOAT))


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
        shape = (matrix.zero_points.length,)
        # onnxruntime 1.23 computes wrong products where a branch takes them from outside.
        names.append(g.weight(f"{name}_zeros", matrix.zero_points, shape, own=True))
    return names
