"""GPUs that TensorRT for RTX compiles for, as a table, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_safe.errors import ExportError


@dataclass(frozen=True, slots=True)
class Capability:
    """One row of the table.

    Attributes:
        name: What ``--capability`` says, and the builder.
        gpus: GPUs that have it, for example.
        refuses: What cannot be compiled for it.
    """

    name: str
    gpus: str
    refuses: tuple[str, ...] = ()


PRODUCTS = "fp32 matrix products"
INT4 = "int4 weights"
BF16 = "bf16 values"

# Names: tensorrt-rtx 1.7.1's own; GPUs: developer.nvidia.com/cuda-gpus. What Turing refuses is what
# the builder of 1.7.1 says when it is asked for it.
CAPABILITIES = {
    row.name: row
    for row in (
        Capability("SM75", "GeForce RTX 20, T4", (PRODUCTS, INT4, BF16)),
        Capability("SM80", "A100, A30"),
        Capability("SM86", "GeForce RTX 30, RTX A6000, A10"),
        Capability("SM89", "GeForce RTX 40, L4, L40"),
        Capability("SM120", "GeForce RTX 50, RTX PRO Blackwell"),
        Capability("SM121", "GB10 (DGX Spark)"),
    )
}

# GeForce RTX 30, 40 and 50.
USUAL = ("SM86", "SM89", "SM120")


def capability_named(name: str) -> Capability:
    """Finds a compute capability.

    Raises:
        ExportError: TensorRT for RTX does not know it.
    """
    if name not in CAPABILITIES:
        known = ", ".join(f"{row.name} ({row.gpus})" for row in CAPABILITIES.values())
        raise ExportError(
            f"TensorRT for RTX builds no engine for {name!r}; it builds for: {known}. "
            f"For Orin (SM87) export with --target tensorrt; its engine is built on the device."
        )
    return CAPABILITIES[name]


def check_types(layers: list[Any], capability: Capability, graph: Path) -> None:
    """Refuses what cannot be compiled for a capability.

    Args:
        layers: Of the parsed network.
        capability: The row.
        graph: The ONNX file, for the message.

    Raises:
        ExportError: A layer has what the row refuses.
    """
    for kind in capability.refuses:
        names = [layer.name for layer in layers if kind in _kinds(layer)]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ExportError(
                f"{capability.name} ({capability.gpus}) cannot run {kind}, which {graph.name} has "
                f"({names[0]}{more}). Leave {capability.name} out."
            )


def _kinds(layer: Any) -> Iterator[str]:
    """What a layer has that a capability may refuse."""
    types = {layer.get_output(index).dtype.name for index in range(layer.num_outputs)}
    if layer.type.name in ("MATRIX_MULTIPLY", "EINSUM") and "FLOAT" in types:
        yield PRODUCTS
    if "INT4" in types:
        yield INT4
    if "BF16" in types:
        yield BF16
