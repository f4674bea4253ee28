"""Rounding one matrix to a lattice, by the method its format names, and packing it."""

from __future__ import annotations

import dataclasses

import numpy as np

from edge_safe.errors import ExportError
from edge_safe.export import library_rounding
from edge_safe.export.packing import (
    FloatArray,
    Lattice,
    Packed,
    check_finite,
    join_rows,
    pack,
    pack_with_offsets,
)
from edge_safe.export.quantization import MatrixFormat

# Weights rounded at once: what the methods need beside them stays below a few hundred MB.
SLAB = 1 << 22

LIBRARY = {"k_quant": library_rounding.k_quant, "hqq": library_rounding.hqq}


def quantize(weight: FloatArray, form: MatrixFormat) -> Packed:
    """Rounds a matrix (N, K) to packed values, a slab of rows at a time.

    With ``offsets`` each block's lattice may be shifted by what whole zero points cannot express;
    see ``pack_with_offsets``. Weights that lie on such a lattice already, as those of 4-bit GGUF
    files with minima do, come back almost exactly, where whole zero points alone lose as much as
    rounding the original weights once more.

    Raises:
        ExportError: The matrix holds a NaN or an infinity, or its width does not fit.
    """
    step = max(1, SLAB // max(1, weight.shape[1]))
    slabs = [weight[row : row + step] for row in range(0, len(weight), step)]
    return join_rows([pack_lattice(round_matrix(slab, form), form) for slab in slabs])


def round_matrix(weight: FloatArray, form: MatrixFormat) -> Lattice:
    """Rounds a matrix (N, K) by the method of its format.

    Raises:
        ExportError: See ``quantize``.
    """
    check_finite(weight)
    rows, columns = weight.shape
    if form.offsets and columns % form.block:
        raise ExportError(
            f"A matrix has {columns} columns, no multiple of the block size {form.block}."
        )
    if form.rounding in LIBRARY:
        blocks = _blocks(weight, form.block)
        found = LIBRARY[form.rounding](blocks.reshape(-1, form.block), form.bits)
        values, scales, zeros = found
        return Lattice(
            values.reshape(blocks.shape),
            scales.reshape(rows, -1),
            zeros.reshape(rows, -1),
        )
    return _nearest_shifted(weight, form) if form.offsets else _nearest(weight, form)


def pack_lattice(lattice: Lattice, form: MatrixFormat) -> Packed:
    """Packs a lattice; with ``offsets`` what its zeros lack in wholeness follows as shifts."""
    if not form.offsets:
        return pack(lattice, form)
    whole = np.clip(np.rint(lattice.zeros), 0, 2**form.bits - 1)
    shifts = (whole - lattice.zeros) * lattice.scales
    plain = dataclasses.replace(form, rounding="nearest", offsets=False)
    return pack_with_offsets(
        Lattice(lattice.values, lattice.scales, whole), _nearest(shifts, plain), form
    )


def _blocks(weight: FloatArray, block: int) -> FloatArray:
    """(N, blocks, block), the last block filled with zeros."""
    rows, columns = weight.shape
    count = -(-columns // block)
    padded = np.zeros((rows, count * block), dtype=np.float32)
    padded[:, :columns] = weight
    return padded.reshape(rows, count, block)


def _nearest_shifted(weight: FloatArray, form: MatrixFormat) -> Lattice:
    """Each block's own lattice, low + step * (0 .. 2^bits - 1)."""
    top = 2**form.bits - 1
    grouped = weight.reshape(len(weight), -1, form.block)
    low, high = grouped.min(-1), grouped.max(-1)
    steps = (high - low) / top
    flat = steps == 0
    # A block of one value is that value times 1, shifted by it.
    safe = np.where(flat, 1, steps)
    values = np.where(flat[..., None], 0, np.rint((grouped - low[..., None]) / safe[..., None]))
    return Lattice(
        values.astype(np.uint8), safe.astype(np.float32), (-low / safe).astype(np.float32)
    )


def _nearest(weight: FloatArray, form: MatrixFormat) -> Lattice:
    """Rounds to the nearest value, with whole zero points or none."""
    grouped = _blocks(weight, form.block)
    top = 2**form.bits - 1
    if form.symmetric and form.positive:
        # Below 0 the range has one value more.
        middle = 2 ** (form.bits - 1)
        scales = np.maximum(grouped.max(-1) / (middle - 1), grouped.min(-1) / -middle)
        zeros = np.full(scales.shape, middle, dtype=np.float32)
    elif form.symmetric:
        furthest = np.abs(grouped).argmax(-1, keepdims=True)
        middle = 2 ** (form.bits - 1)
        scales = np.take_along_axis(grouped, furthest, axis=-1)[..., 0] / -middle
        zeros = np.full(scales.shape, middle, dtype=np.float32)
    else:
        low = np.minimum(grouped.min(-1), 0)
        scales = (np.maximum(grouped.max(-1), 0) - low) / top
        zeros = np.rint(np.divide(-low, scales, out=np.zeros_like(low), where=scales != 0))
    reach = np.where(scales == 0, 1, scales)[..., None]
    values = np.clip(np.rint(grouped / reach + zeros[..., None]), 0, top).astype(np.uint8)
    return Lattice(values, scales.astype(np.float32), zeros.astype(np.float32))
