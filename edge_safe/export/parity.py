"""Comparing graphs with torch: what was compared, by how much it differs, what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edge_safe.errors import ExportError
from edge_safe.export.families.base import Tower
from edge_safe.runtime.session import Session

Array = npt.NDArray[Any]

# What fp32 may differ from torch. Hidden states of a Llama reach 20,000 at single positions, so
# the difference is counted in units of the tensor's largest value, but of at least 1.
FP32_TOLERANCE = 1e-4


class Boundary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One output of one graph on one input.

    Attributes:
        graph: The graph.
        output: Its output.
        case: What the input was.
        max_difference: Largest |graph - torch|.
        relative_difference: The same over the largest |torch|, or over 1 if that is more.
        tolerance: Largest relative difference allowed; None where it is only reported.
        passed: Whether it is within the tolerance.
    """

    graph: str
    output: str
    case: str
    max_difference: float
    relative_difference: float
    tolerance: float | None
    passed: bool


def compare(
    graph: str, output: str, case: str, found: Array, expected: Array, tolerance: float | None
) -> Boundary:
    """Compares an output with torch's.

    A different shape, or a number that is not finite, counts as an infinite difference.
    """
    if found.shape != expected.shape or not np.isfinite(found).all():
        largest = relative = float("inf")
    elif found.size == 0:
        largest = relative = 0.0
    else:
        largest = float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max())
        relative = largest / max(1.0, float(np.abs(expected).max()))
    limit = float("inf") if tolerance is None else tolerance
    passed = np.isfinite(largest) and relative <= limit
    return Boundary(graph, output, case, largest, relative, tolerance, bool(passed))


def compare_all(
    graph: str,
    case: str,
    found: Mapping[str, Array],
    expected: Mapping[str, Array],
    tolerance: float | None,
) -> list[Boundary]:
    """Compares the outputs that torch has, by name."""
    return [
        compare(graph, name, case, found[name], value, tolerance)
        for name, value in expected.items()
    ]


def check_towers(folder: Path, towers: Iterable[Tower], tolerance: float | None) -> list[Boundary]:
    """Runs every tower's graph on its cases."""
    boundaries = []
    for tower in towers:
        session = Session(folder / f"{tower.name}.onnx", threads=1)
        for case in tower.cases():
            found = session.run(case.feeds)
            boundaries += compare_all(tower.name, case.label, found, case.expected, tolerance)
    return boundaries


def require(boundaries: Iterable[Boundary]) -> None:
    """Fails the export where a graph is not what torch is.

    Raises:
        ExportError: A boundary did not pass; the message names the worst.
    """
    failed = [boundary for boundary in boundaries if not boundary.passed]
    if not failed:
        return
    worst = max(failed, key=lambda boundary: boundary.relative_difference)
    raise ExportError(
        f"{len(failed)} outputs differ from torch. Worst: {worst.graph} {worst.output} "
        f"({worst.case}) by {worst.relative_difference:.3g}, allowed {worst.tolerance}. "
        "This is a fault of the exporter or of the model's family file, not of your checkpoint."
    )
