"""The table's cells: a checkpoint in a precision, its engines, and how its graphs compare."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from benchmarks.families import cells as families
from benchmarks.families.cells import Way
from edge_safe.export.families.base import family_names
from edge_safe.export.tensorrt.precisions import PRECISIONS
from edge_safe.export.tensorrt.rtx import USUAL, EngineRecord

# What measurements depend on beside that of the families' table.
OWN = ("measure.py",)

PEBBLE = "models/pebble"
EARLY = "llama, early exit"
# Tiny checkpoints are built for one GPU; what people run, for three.
ONE = ("SM89",)


class Row(msgspec.Struct, frozen=True):
    """A checkpoint of the table: in which precisions, and for whom its engines are built."""

    precisions: tuple[str, ...] = tuple(reversed(PRECISIONS))
    capabilities: tuple[str, ...] = ONE


def rows() -> dict[str, Row]:
    """Every row of the table by name: families, then what is none."""
    return {
        **{family: Row() for family in family_names()},
        EARLY: Row(),
        # The reference, and what an RTX card is best given.
        PEBBLE: Row(("fp32", "fp16"), USUAL),
    }


class Built(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A bundle with its engines.

    Attributes:
        difference: Largest relative difference of any output of any graph from torch.
        torch: Beside torch, by way in; nothing where torch was not asked.
        cpu: Beside the bundle for the CPU in fp32, by way in; in fp32 only.
        engines: What was built.
        on_the_cpu: Graphs without an engine, and why.
        export_seconds: Time of the export without the engines.
        peak_mb: Largest resident memory of the process, in MB of 2**20 bytes.
    """

    difference: float
    torch: dict[str, Way]
    cpu: dict[str, Way]
    engines: list[EngineRecord]
    on_the_cpu: dict[str, str]
    export_seconds: float
    peak_mb: int


class Cell(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint in a precision: what was built, or the reason why nothing was.

    Attributes:
        name: A row of ``rows``.
        precision: A row of TensorRT's table of precisions.
        found: What was built, or a reason.
        failed: Whether the reason is none that was to be expected.
        seconds: Time all of it took.
    """

    name: str
    precision: str
    found: Built | str
    failed: bool = False
    seconds: float = 0.0


Cells = dict[tuple[str, str], Cell]


def fingerprint() -> str:
    """Hash of the code that measurements depend on."""
    digest = hashlib.sha256(families.fingerprint().encode())
    for name in OWN:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:12]


def read_cells(path: Path) -> Cells:
    """Finished cells; a line cut off by a killed run is left out."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [msgspec.json.decode(line, type=Cell) for line in lines if line.endswith(b"\n")]
    return {(cell.name, cell.precision): cell for cell in whole}


def missing(cells: Cells, names: list[str]) -> list[tuple[str, str]]:
    """Cells still to be done; what failed is tried again."""
    known = rows()
    wanted = [(name, precision) for name in names for precision in known[name].precisions]
    return [key for key in wanted if key not in cells or cells[key].failed]
