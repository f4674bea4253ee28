"""The bytes of a quantized matrix, as MatMulNBits and GatherBlockQuantized read them.

A matrix (N, K) is cut along K into blocks; each block of each row has its own scale and, when
asymmetric, its own zero point: weight = (value - zero) * scale. How values, scales and zeros are
found is no business of this file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_safe.errors import ExportError
from edge_safe.export.quantization import MatrixFormat

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Lattice:
    """A rounded matrix before it is packed: weight = (value - zero) * scale.

    Attributes:
        values: (N, blocks, block) uint8.
        scales: (N, blocks) float32.
        zeros: (N, blocks) float32; whole and in the range of the values unless the format keeps
            offsets.
    """

    values: ByteArray
    scales: FloatArray
    zeros: FloatArray


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


def pack(lattice: Lattice, form: MatrixFormat) -> Packed:
    """Packs a lattice whose zeros are whole."""
    zeros = None if form.symmetric else pack_values(lattice.zeros.astype(np.uint8), form.bits)
    return Packed(pack_values(lattice.values, form.bits), lattice.scales, zeros)


def pack_with_offsets(lattice: Lattice, shifts: Lattice, form: MatrixFormat) -> Packed:
    """Packs a lattice of whole zeros and what its blocks are shifted by.

    The result has more columns than the matrix: the shifts of all blocks follow, one column per
    block. Multiplied with ``[x, sums of x over its blocks]`` this gives (lattice + shifts) x.

    Args:
        lattice: (N, K) with whole zeros.
        shifts: (N, blocks) the rounded shifts, cut into blocks themselves.
        form: The format, asymmetric.
    """
    zeros = np.concatenate([lattice.zeros, shifts.zeros], axis=1).astype(np.uint8)
    return Packed(
        np.concatenate([pack_values(part.values, form.bits) for part in (lattice, shifts)], axis=1),
        np.concatenate([lattice.scales, shifts.scales], axis=1),
        pack_values(zeros, form.bits),
    )


def join_rows(parts: list[Packed]) -> Packed:
    """One matrix of slabs of its rows."""
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    return Packed(
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate(zeros) if zeros else None,
    )


def dequantize(packed: Packed, form: MatrixFormat, columns: int) -> FloatArray:
    """The (N, K) float32 matrix that the kernels compute with."""
    rows = len(packed.scales)
    values = unpack_values(packed.values, form.bits, form.block).astype(np.float32)
    zeros = _unpack_zeros(packed, form).astype(np.float32)
    plain = ((values - zeros[..., None]) * packed.scales[..., None]).reshape(rows, -1)
    if form.offsets:
        shifts = plain[:, columns : columns + columns // form.block]
        plain[:, :columns] += np.repeat(shifts, form.block, axis=1)
    return np.ascontiguousarray(plain[:, :columns], dtype=np.float32)


def lattice_matrix(lattice: Lattice, columns: int) -> FloatArray:
    """The (N, K) float32 matrix that a lattice stands for."""
    plain = (lattice.values - lattice.zeros[..., None]) * lattice.scales[..., None]
    flat = plain.reshape(len(plain), -1)[:, :columns]
    return np.ascontiguousarray(flat, dtype=np.float32)


def pack_values(values: ByteArray, bits: int) -> ByteArray:
    """Packs the last axis; at 4 bits two values share a byte, an odd end is filled with 0."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    high: ByteArray = np.left_shift(values[..., 1::2], 4, dtype=np.uint8)
    return values[..., 0::2] | high


def unpack_values(packed: ByteArray, bits: int, count: int) -> ByteArray:
    """The first ``count`` values of the last axis."""
    if bits == 8:
        return packed[..., :count]
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)[..., :count]


def check_finite(weight: npt.NDArray[np.floating]) -> None:
    """Refuses what no format can hold.

    Raises:
        ExportError: The matrix holds a NaN or an infinity.
    """
    if not np.isfinite(weight).all():
        raise ExportError("A weight matrix holds NaN or infinity. Check the checkpoint.")


def _unpack_zeros(packed: Packed, form: MatrixFormat) -> ByteArray:
    """(N, blocks) zero points."""
    if packed.zero_points is None:
        return np.full(packed.scales.shape, 2 ** (form.bits - 1), dtype=np.uint8)
    return unpack_values(packed.zero_points, form.bits, packed.scales.shape[1])
