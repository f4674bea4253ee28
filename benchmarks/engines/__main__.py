"""The table of engines, in one command.

    python -m benchmarks.engines --out build/engines --page docs/engines.md [--family NAME ...]

Every family's tiny checkpoint is exported for TensorRT for RTX in every precision it reads, with
engines built here, and pebble itself; see the page. No GPU is needed, and none is used. Each
finished cell is a line of cells.jsonl below --out, in a folder named after the code it was measured
on; a stopped run goes on from there, and other code starts anew. Needs the dev and the tensorrt-rtx
extras. The last line is one JSON object; the exit code is 1 if something failed, or fp32 is not
what torch and the bundle for the CPU say.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.engines.cells import Built, Cell, Cells, fingerprint, missing, read_cells, rows
from benchmarks.engines.measure import EXACT, measure
from benchmarks.engines.page import unbuilt, write_page
from benchmarks.families.__main__ import CELLS, TOLERANCE, machine
from benchmarks.families.apart import CrashedError, call_apart, prepare
from benchmarks.families.cells import add_cell
from benchmarks.families.reference import write_reference
from edge_safe.export.families.base import family_names


def main() -> int:
    """Measures what is missing, writes the page, says how it went."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="what is kept between runs")
    parser.add_argument("--page", type=Path, help="the page to write")
    parser.add_argument("--family", action="append", choices=list(rows()), metavar="NAME")
    options = parser.parse_args()
    folder = options.out / fingerprint()
    prepare("benchmarks.engines.measure")
    todo = missing(read_cells(folder / CELLS), options.family or list(rows()))
    fill(folder, todo)
    cells = read_cells(folder / CELLS)
    if options.page is not None:
        write_page(options.page, cells, machine())
    result = summary(cells)
    print(
        json.dumps(result | {"done_now": len(todo), "seconds": round(time.perf_counter() - start)})
    )
    return int(bool(result["failed"] or result["unlike"] or result["unbuilt"]))


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
        for name, precision in todo:
            progress.update(task, description=f"{name}, {precision}")
            place = folder / name.replace("/", "_").replace(", ", "_").replace(" ", "_")
            add_cell(folder / CELLS, measured(name, precision, place))
            progress.advance(task)


def measured(name: str, precision: str, folder: Path) -> Cell:
    """One cell, made in processes of its own; a builder that crashes becomes a reason."""
    start = time.perf_counter()
    try:
        reference = None
        if name in family_names():
            reference = call_apart(write_reference, name, folder)
            if reference is None:
                return Cell(name, precision, f"Nobody has written a tiny checkpoint of {name}.")
        cell = call_apart(measure, name, precision, folder, reference)
    except CrashedError as error:
        cell = Cell(name, precision, f"{name}: {error}", failed=True)
    return msgspec.structs.replace(cell, seconds=round(time.perf_counter() - start, 2))


def summary(cells: Cells) -> dict[str, object]:
    """Counts, what failed, and the worst of fp32."""
    built = {key: cell.found for key, cell in cells.items() if isinstance(cell.found, Built)}
    exact = {key[0]: found for key, found in built.items() if key[1] == EXACT}
    return {
        "cells": len(cells),
        "engines": sum(len(found.engines) for found in built.values()),
        "failed": [", ".join(key) for key, cell in cells.items() if cell.failed],
        "unbuilt": [", ".join((*key, graph)) for key in built for graph in unbuilt(built[key])],
        "largest_fp32_difference": max(
            (found.difference for found in exact.values()), default=None
        ),
        "unlike": [
            f"{name}, {way}"
            for name, found in exact.items()
            for ways in (found.torch, found.cpu)
            for way, beside in ways.items()
            if not beside.difference <= TOLERANCE or beside.same < beside.answered
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
