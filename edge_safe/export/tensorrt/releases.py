"""Releases of TensorRT as a table: what their parsers read, and so what is written for them."""

from __future__ import annotations

from dataclasses import dataclass

from edge_safe.errors import ExportError


@dataclass(frozen=True, slots=True)
class Release:
    """One row of the table.

    Attributes:
        name: What ``--release`` says.
        target: The target it belongs to.
        found_in: Where it comes from.
        opset: Newest ONNX operators that are written.
        precisions: What ``--precision`` may be.
        source: Where the opset is said.
    """

    name: str
    target: str
    found_in: str
    opset: int
    precisions: tuple[str, ...]
    source: str


# Weights in 4 bits are a type of opset 21. Of the newer operators (RMSNormalization, Attention,
# RotaryEmbedding of 23, TensorScatter of 24) none is written: the same graph then serves every row.
RELEASES = {
    row.name: row
    for row in (
        Release(
            "10.3",
            "tensorrt",
            "JetPack 6.1 and 6.2 (Orin)",
            20,
            ("fp32", "fp16", "int8"),
            "github.com/onnx/onnx-tensorrt, release/10.3-GA: ONNX 1.16, operators up to opset 20",
        ),
        Release(
            "10.16",
            "tensorrt",
            "JetPack 7.2 (Thor, Orin), servers",
            21,
            ("fp32", "fp16", "int8", "int4"),
            "github.com/onnx/onnx-tensorrt, docs/Changelog.md: opset 24 and more since 10.15",
        ),
        Release(
            "rtx-1.7",
            "tensorrt-rtx",
            "pip install 'edge-safe[tensorrt-rtx]'",
            21,
            ("fp32", "fp16", "int8", "int4"),
            "tensorrt-rtx 1.7.1: engines of opset 21 graphs were built with it",
        ),
    )
}


def release_for(target: str, precision: str, name: str | None = None) -> Release:
    """Finds the release that a bundle is written for.

    Args:
        target: ``tensorrt`` or ``tensorrt-rtx``.
        precision: What weights are kept as.
        name: A row; None for the oldest of the target's that reads the precision.

    Raises:
        ExportError: There is no such row, or none reads the precision.
    """
    rows = [row for row in RELEASES.values() if row.target == target]
    known = ", ".join(f"{row.name} ({row.found_in})" for row in rows)
    if name is not None and name not in {row.name for row in rows}:
        raise ExportError(f"Target {target!r} has no release {name!r}; there are: {known}.")
    for row in rows:
        if name in (None, row.name) and precision in row.precisions:
            return row
    chosen = [row for row in rows if name in (None, row.name)]
    read = ", ".join(dict.fromkeys(p for row in chosen for p in row.precisions))
    raise ExportError(
        f"Precision {precision!r} is not read by {target}"
        f"{'' if name is None else f' release {name}'}; choose one of: {read}."
    )
