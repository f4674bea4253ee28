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
    """

    bits: int
    block: int = 32
    symmetric: bool = False
    accuracy_level: int = 4


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


PRECISIONS = {
    row.name: row
    for row in (
        Precision("fp32", weights=PLAIN, embedding=PLAIN, towers=PLAIN),
        Precision(
            "int8", weights=MatrixFormat(8), embedding=MatrixFormat(8), towers=MatrixFormat(8)
        ),
        Precision(
            "int4", weights=MatrixFormat(4), embedding=MatrixFormat(4), towers=MatrixFormat(8)
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
    """Rounds a matrix (N, K) to the nearest packed values.

    Raises:
        ExportError: The matrix holds a NaN or an infinity.
    """
    if not np.isfinite(weight).all():
        raise ExportError("A weight matrix holds NaN or infinity. Check the checkpoint.")
    rows, columns = weight.shape
    blocks = -(-columns // form.block)
    padded = np.zeros((rows, blocks * form.block), dtype=np.float32)
    padded[:, :columns] = weight
    grouped = padded.reshape(rows, blocks, form.block)
    top = 2**form.bits - 1
    if form.symmetric:
        extreme = np.take_along_axis(
            grouped, np.abs(grouped).argmax(-1, keepdims=True), axis=-1
        )[..., 0]
        middle = 2 ** (form.bits - 1)
        scales = extreme / -middle
        zeros = np.full((rows, blocks), middle, dtype=np.float32)
    else:
        low = np.minimum(grouped.min(-1), 0)
        high = np.maximum(grouped.max(-1), 0)
        scales = (high - low) / top
        zeros = np.rint(np.divide(-low, scales, out=np.zeros_like(low), where=scales != 0))
    reach = np.where(scales == 0, 1, scales)[..., None]
    values = np.clip(np.rint(grouped / reach + zeros[..., None]), 0, top).astype(np.uint8)
    packed_zeros = None if form.symmetric else _pack(zeros.astype(np.uint8), form.bits)
    packed = Packed(_pack(values, form.bits), scales.astype(np.float32), packed_zeros)
    return packed


def dequantize(packed: Packed, form: MatrixFormat, columns: int) -> FloatArray:
    """The (N, K) float32 matrix that the kernels compute with."""
    rows, blocks = packed.scales.shape
    values = _unpack(packed.values, form.bits, form.block).astype(np.float32)
    if packed.zero_points is None:
        zeros = np.full((rows, blocks), 2 ** (form.bits - 1), dtype=np.float32)
    else:
        zeros = _unpack(packed.zero_points, form.bits, blocks).astype(np.float32)
    plain = (values - zeros[..., None]) * packed.scales[..., None]
    return np.ascontiguousarray(plain.reshape(rows, -1)[:, :columns], dtype=np.float32)


def _pack(values: ByteArray, bits: int) -> ByteArray:
    """Packs the last axis; at 4 bits two values share a byte, an odd end is filled with 0."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    return values[..., 0::2] | (values[..., 1::2] << 4)


def _unpack(packed: ByteArray, bits: int, count: int) -> ByteArray:
    """The first ``count`` values of the last axis."""
    if bits == 8:
        return packed[..., :count]
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)[..., :count]
