"""The table's cells: what is kept of each, and the file that makes a stopped run go on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import msgspec

from edge_safe.export.cache_format import CacheFormat
from edge_safe.export.quantization import PRECISIONS

REPOSITORY = Path(__file__).parents[2]
# What a measurement depends on.
CODE = (
    "edge_safe",
    "tests/conftest.py",
    "tests/export",
    "tests/models/pebble",
    "benchmarks/families/measure.py",
    "benchmarks/families/reference.py",
    "benchmarks/families/requests.py",
)


class Way(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way in of one bundle, beside torch.

    Attributes:
        asked: Requests judged by both.
        difference: Largest difference of the log-odds.
        agreement: Share with the same verdict, at the threshold that splits torch's in half.
        change: Largest change of p_unsafe, calibrated to that threshold.
        answered: Requests that both answered.
        same: How many of these with the same text.
    """

    asked: int
    difference: float
    agreement: float
    change: float
    answered: int
    same: int


class Bundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One export that came to an end.

    Attributes:
        cpu_seconds: Processor time it took, which other work on the machine does not change much.
        peak_mb: Largest resident memory of its process, in MB of 2**20 bytes.
        before_mb: The same before it began: Python, torch, transformers.
        size: Bytes of the bundle.
        ways: Per way in what was measured, or the reason why nothing was.
    """

    cpu_seconds: float
    peak_mb: int
    before_mb: int
    size: int
    ways: dict[str, Way | str]


class Cell(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A family in a precision: the bundle, or the reason why there is none.

    Attributes:
        family: The model_type.
        precision: See ``VARIANTS``.
        found: What was measured, or a reason.
        failed: Whether the reason, or one of the bundle's, is none that was to be expected.
        cpu_seconds: Processor time of exporting and asking.
        seconds: Time all of it took.
    """

    family: str
    precision: str
    found: Bundle | str
    failed: bool = False
    cpu_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from the others."""
        return self.family, self.precision


# Precision and KV cache by name: the whole table of precisions, then the other caches in fp32.
VARIANTS: dict[str, tuple[str, str]] = {name: (name, "fp32") for name in PRECISIONS} | {
    f"fp32, KV {cache}": ("fp32", cache) for cache in get_args(CacheFormat) if cache != "fp32"
}


def fingerprint() -> str:
    """Hash of the code that measurements depend on; cells of other code are no longer true."""
    digest = hashlib.sha256()
    for root in CODE:
        top = REPOSITORY / root
        for path in sorted(top.rglob("*.py")) if top.is_dir() else [top]:
            if not path.name.startswith("test_"):
                digest.update(f"{path.relative_to(REPOSITORY)}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def read_cells(path: Path) -> dict[tuple[str, str], Cell]:
    """Finished cells of a JSON Lines file; a line cut off by a killed run is left out."""
    if not path.exists():
        return {}
    cells = []
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            cells.append(msgspec.json.decode(line, type=Cell))
    return {cell.key: cell for cell in cells}


def add_cell(path: Path, cell: Cell) -> None:
    """Appends a line; one that a killed run cut off is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.read_bytes() if path.exists() else b""
    kept = whole[: whole.rfind(b"\n") + 1]
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(len(kept))
        file.seek(len(kept))
        file.write(msgspec.json.encode(cell) + b"\n")


def missing(
    cells: dict[tuple[str, str], Cell], families: Iterable[str], precisions: Iterable[str]
) -> list[tuple[str, str]]:
    """Cells still to be done, family by family; what failed is tried again."""
    precisions = list(precisions)
    return [
        (family, precision)
        for family in families
        for precision in precisions
        if (family, precision) not in cells or cells[family, precision].failed
    ]
