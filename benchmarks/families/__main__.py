"""The table of the families, in one command.

    python -m benchmarks.families --out build/families --page docs/families.md
        [--family NAME ...] [--precision NAME ...]

Every family that the export has is exported in every precision and asked in every way it takes,
beside torch; see the page. Each finished cell is a line of cells.jsonl below --out, in a folder
named after the code it was measured on; a stopped run goes on from there, and other code starts
anew. The page shows all finished cells. Needs the dev extra. The last line is one JSON object; the
exit code is 1 if something failed that should not, or fp32 is not what torch says.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.families.apart import CrashedError, call_apart, prepare
from benchmarks.families.cells import (
    VARIANTS,
    Bundle,
    Cell,
    Way,
    add_cell,
    fingerprint,
    missing,
    read_cells,
)
from benchmarks.families.measure import measure
from benchmarks.families.page import FP32, Cells, write_page
from benchmarks.families.reference import write_reference
from edge_safe.evaluation.speed.machine import describe_machine
from edge_safe.export.families.base import family_names

CELLS = "cells.jsonl"
# What "the same" means in fp32.
TOLERANCE = 1e-4


def main() -> int:
    """Measures what is missing, writes the page, says how it went."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = family_names()
    parser.add_argument("--out", type=Path, required=True, help="what is kept between runs")
    parser.add_argument("--page", type=Path, help="the page to write")
    parser.add_argument("--family", action="append", choices=names, metavar="NAME")
    parser.add_argument("--precision", action="append", choices=list(VARIANTS), metavar="NAME")
    options = parser.parse_args()
    folder = options.out / fingerprint()
    prepare("benchmarks.families.measure")
    todo = missing(
        read_cells(folder / CELLS), options.family or names, options.precision or VARIANTS
    )
    fill(folder, todo)
    cells = read_cells(folder / CELLS)
    if options.page is not None:
        write_page(options.page, cells, names, machine())
    result = summary(cells)
    print(
        json.dumps(result | {"done_now": len(todo), "seconds": round(time.perf_counter() - start)})
    )
    return int(bool(result["failed"] or result["unlike_torch"]))


def fill(folder: Path, todo: Sequence[tuple[str, str]]) -> None:
    """Measures cells one after the other."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(todo))
        for family, precision in todo:
            progress.update(task, description=f"{family}, {precision}")
            add_cell(folder / CELLS, measured(family, precision, folder / family))
            progress.advance(task)


def measured(family: str, precision: str, folder: Path) -> Cell:
    """One cell, made in processes of its own; one that crashes becomes a reason."""
    start = time.perf_counter()
    try:
        reference = call_apart(write_reference, family, folder)
        if reference is None:
            cell = Cell(family, precision, f"Nobody has written a tiny checkpoint of {family}.")
        else:
            cell = call_apart(measure, family, precision, folder, reference)
    except CrashedError as error:
        cell = Cell(family, precision, f"{family}: {error}", failed=True)
    return msgspec.structs.replace(cell, seconds=round(time.perf_counter() - start, 2))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    found = describe_machine()
    found["versions"] |= {name: metadata.version(name) for name in ("torch", "transformers")}
    return found


def summary(cells: Cells) -> dict[str, object]:
    """Counts, and the worst of fp32."""
    bundles = [cell for cell in cells.values() if isinstance(cell.found, Bundle)]
    exact = {
        f"{cell.family}, {name}": way
        for cell in bundles
        if cell.precision == FP32 and isinstance(cell.found, Bundle)
        for name, way in cell.found.ways.items()
        if isinstance(way, Way)
    }
    return {
        "cells": len(cells),
        "bundles": len(bundles),
        "failed": [f"{cell.family}, {cell.precision}" for cell in cells.values() if cell.failed],
        "largest_fp32_difference": max((way.difference for way in exact.values()), default=None),
        "unlike_torch": [
            name
            for name, way in exact.items()
            if not way.difference <= TOLERANCE or way.same < way.answered
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
