"""Precisions as a table of rows, and the packing of one matrix.

A matrix (N, K) is cut along K into blocks; each block of each row has its own scale and, when
asymmetric, its own zero point: weight = (value - zero) * scale. The bytes are laid out as ONNX
Runtime's MatMulNBits and GatherBlockQuantized read them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_safe.errors import ExportError

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class MatrixFormat:
    """How one kind of matrix is packed.

    Attributes:
        bits: 4, 8, or 32 for plain float32.
        block: Columns that share a scale.
        symmetric: Whether the zero point is the middle of the range and not stored.
        accuracy_level: Of MatMulNBits; 4 multiplies in int8, 0 in the input's own type.
        offsets: Whether what whole zero points cannot express is kept, see ``quantize``.
    """

    bits: int
    block: int = 32
    symmetric: bool = False
    accuracy_level: int = 4
    offsets: bool = False


PLAIN = MatrixFormat(bits=32)


@dataclass(frozen=True, slots=True)
class Precision:
    """One row of the table.

    Attributes:
        name: What ``--precision`` says.
        weights: Matrices of the decoder's layers.
        embedding: The embedding, and lm_head where it is tied or of its own.
        towers: Linear layers of towers and projectors.
    """

    name: str
    weights: MatrixFormat
    embedding: MatrixFormat
    towers: MatrixFormat


# Mean KL divergence of the next token from the fp32 model's, on answers of a 135M Llama whose
# weights came from a 4-bit GGUF file: int4 0.004; without offsets 0.315; with a 4-bit embedding
# 0.071; int8 0.004; ONNX Runtime's dynamic int8 in its place 0.161, since one scale for all
# activations of a tensor does not survive the outliers in front of the MLP's last product.
PRECISIONS = {
    row.name: row
    for row in (
        Precision("fp32", weights=PLAIN, embedding=PLAIN, towers=PLAIN),
        Precision(
            "int8", weights=MatrixFormat(8), embedding=MatrixFormat(8), towers=MatrixFormat(8)
        ),
        Precision(
            "int4",
            weights=MatrixFormat(4, offsets=True),
            embedding=MatrixFormat(8),
            towers=MatrixFormat(8),
        ),
    )
}


def precision_named(name: str) -> Precision:
    """Finds a row of the table.

    Raises:
        ExportError: There is no such row; the message lists those there are.
    """
    if name not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise ExportError(f"There is no precision {name!r}. Choose one of: {known}.")
    return PRECISIONS[name]


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantized matrix.

    Attributes:
        values: (N, blocks, block * bits / 8) uint8; at 4 bits the even column is the low half.
        scales: (N, blocks) float32.
        zero_points: (N, ceil(blocks * bits / 8)) uint8, or None when symmetric.
    """

    values: ByteArray
    scales: FloatArray
    zero_points: ByteArray | None


def quantize(weight: FloatArray, form: MatrixFormat) -> Packed:
    """Rounds a matrix (N, K) to packed values.

    With ``offsets`` the result has more columns than the matrix. Its first K columns carry each
    block's own lattice, low + step * (0 .. 2^bits - 1), shifted by less than a step onto whole
    zero points; the shifts of all blocks follow as further columns, one per block. Multiplied
    with ``[x, sums of x over its blocks]`` this gives (lattice) x. Weights that lie on such a
    lattice already, as those of 4-bit GGUF files with minima do, come back almost exactly, where
    whole zero points alone lose as much as rounding the original weights once more.

    Raises:
        ExportError: The matrix holds a NaN or an infinity, or its width does not fit.
    """
    if not np.isfinite(weight).all():
        raise ExportError("A weight matrix holds NaN or infinity. Check the checkpoint.")
    if not form.offsets:
        return _quantize(weight, form)
    rows, columns = weight.shape
    if columns % form.block:
        raise ExportError(
            f"A matrix has {columns} columns, no multiple of the block size {form.block}."
        )
    top = 2**form.bits - 1
    grouped = weight.reshape(rows, -1, form.block)
    low, high = grouped.min(-1), grouped.max(-1)
    steps = (high - low) / top
    flat = steps == 0
    safe = np.where(flat, 1, steps)
    zeros = np.clip(np.rint(np.where(flat, 0, -low / safe)), 0, top)
    values = np.where(flat[..., None], 0, np.rint((grouped - low[..., None]) / safe[..., None]))
    further = _quantize(low + zeros * steps, form)
    packed = _pack(values.astype(np.uint8), form.bits)
    all_zeros = [zeros.astype(np.uint8), _unpack_zeros(further, form)]
    return Packed(
        np.concatenate([packed, further.values], axis=1),
        np.concatenate([steps.astype(np.float32), further.scales], axis=1),
        _pack(np.concatenate(all_zeros, axis=1), form.bits),
    )


def _quantize(weight: FloatArray, form: MatrixFormat) -> Packed:
    """Rounds to the nearest value, with whole zero points or none."""
    rows, columns = weight.shape
    blocks = -(-columns // form.block)
    padded = np.zeros((rows, blocks * form.block), dtype=np.float32)
    padded[:, :columns] = weight
    grouped = padded.reshape(rows, blocks, form.block)
    top = 2**form.bits - 1
    if form.symmetric:
        furthest = np.abs(grouped).argmax(-1, keepdims=True)
        middle = 2 ** (form.bits - 1)
        scales = np.take_along_axis(grouped, furthest, axis=-1)[..., 0] / -middle
        zeros = np.full((rows, blocks), middle, dtype=np.float32)
    else:
        low = np.minimum(grouped.min(-1), 0)
        scales = (np.maximum(grouped.max(-1), 0) - low) / top
        zeros = np.rint(np.divide(-low, scales, out=np.zeros_like(low), where=scales != 0))
    reach = np.where(scales == 0, 1, scales)[..., None]
    values = np.clip(np.rint(grouped / reach + zeros[..., None]), 0, top).astype(np.uint8)
    packed_zeros = None if form.symmetric else _pack(zeros.astype(np.uint8), form.bits)
    return Packed(_pack(values, form.bits), scales.astype(np.float32), packed_zeros)


def dequantize(packed: Packed, form: MatrixFormat, columns: int) -> FloatArray:
    """The (N, K) float32 matrix that the kernels compute with."""
    rows = len(packed.scales)
    values = _unpack(packed.values, form.bits, form.block).astype(np.float32)
    zeros = _unpack_zeros(packed, form).astype(np.float32)
    plain = ((values - zeros[..., None]) * packed.scales[..., None]).reshape(rows, -1)
    if form.offsets:
        shifts = plain[:, columns : columns + columns // form.block]
        plain[:, :columns] += np.repeat(shifts, form.block, axis=1)
    return np.ascontiguousarray(plain[:, :columns], dtype=np.float32)


def _unpack_zeros(packed: Packed, form: MatrixFormat) -> ByteArray:
    """(N, blocks) zero points."""
    if packed.zero_points is None:
        return np.full(packed.scales.shape, 2 ** (form.bits - 1), dtype=np.uint8)
    return _unpack(packed.zero_points, form.bits, packed.scales.shape[1])


def _pack(values: ByteArray, bits: int) -> ByteArray:
    """Packs the last axis; at 4 bits two values share a byte, an odd end is filled with 0."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    high: ByteArray = np.left_shift(values[..., 1::2], 4, dtype=np.uint8)
    return values[..., 0::2] | high


def _unpack(packed: ByteArray, bits: int, count: int) -> ByteArray:
    """The first ``count`` values of the last axis."""
    if bits == 8:
        return packed[..., :count]
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)[..., :count]
