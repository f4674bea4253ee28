"""What an export needs of the machine: memory it has used, room its bundle will take."""

from __future__ import annotations

import resource
import shutil
import sys
from pathlib import Path

from edge_safe.errors import ExportError
from edge_safe.export.graphs.spec import DecoderSpec
from edge_safe.export.quantization import MatrixFormat, Precision


def peak_memory_mb() -> int:
    """Largest resident memory of this process so far, in MB (2**20 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KB, macOS in bytes.
    return peak // 2**20 if sys.platform == "darwin" else peak // 2**10


def least_bytes(spec: DecoderSpec, precision: Precision, exit_layer: int | None) -> int:
    """Bytes that the language model's matrices will take at least.

    Args:
        spec: The decoder.
        precision: How matrices are packed.
        exit_layer: Layer of the gate.
    """
    layers = sum(
        matrix_bytes(spec.layer_parameters, precision.of_layer(index, exit_layer))
        for index in range(spec.layers)
    )
    if precision.prefill is not None:
        layers += spec.layers * matrix_bytes(spec.layer_parameters, precision.prefill)
    tables = [precision.embedding]
    if not spec.tied or precision.head != precision.embedding:
        tables.append(precision.head)
    return layers + sum(matrix_bytes(spec.table_parameters, form) for form in tables)


def check_room(folder: Path, needed: int) -> None:
    """Refuses a disk on which the bundle cannot have room.

    Raises:
        ExportError: It says how much is free and how much is needed.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"The disk has {free / 2**20:.0f} MB free at {folder}, the bundle needs at "
            f"least {needed / 2**20:.0f} MB; nothing was written. Free some space, or choose a "
            "folder on another disk."
        )


def matrix_bytes(weights: int, form: MatrixFormat) -> int:
    """Bytes that so many weights take at least in a format."""
    if not form.blocked:
        return weights * form.bits // 8
    # Scales are float32, one a block; offsets are one more column a block.
    per_block = 4 + (0 if form.symmetric else form.bits / 8)
    columns = weights * (1 + 1 / form.block) if form.offsets else weights
    return int(columns * (form.bits / 8 + per_block / form.block))
