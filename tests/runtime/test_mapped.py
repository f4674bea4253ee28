"""Pages of weights that were packed elsewhere go back, and what reads them finds them again."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_safe.runtime.mapped import give_back
from edge_safe.runtime.model import SafeModel
from tests.runtime.conftest import allow_all

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def resident_kb(path: Path) -> int:
    """Pages of a file that this process holds, in KB."""
    found, own = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            own = line.endswith(str(path))
        elif own and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


def test_pages_go_and_come_back(tmp_path: Path) -> None:
    path = tmp_path.resolve() / "weights"
    numbers = np.arange(500_000, dtype=np.int64)
    numbers.tofile(path)
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
    assert int(np.frombuffer(view, np.int64).sum()) == int(numbers.sum())
    assert resident_kb(path) > 3000
    assert give_back(tmp_path) >= path.stat().st_size
    assert resident_kb(path) == 0
    assert int(np.frombuffer(view, np.int64).sum()) == int(numbers.sum())


def test_files_elsewhere_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    path = tmp_path.resolve() / "weights"
    np.arange(500_000).tofile(path)
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
    np.frombuffer(view, np.int64).sum()
    before = resident_kb(path)
    assert give_back(tmp_path / "here") == 0
    assert resident_kb(path) == before


def test_pages_that_were_written_to_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(100_000))
    with path.open("r+b") as file:
        view = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    view[5] = 7
    assert give_back(tmp_path) == 0
    assert view[5] == 7


def test_a_model_says_the_same_afterwards(bundle_folder: Path) -> None:
    model = SafeModel.load(bundle_folder, threads=1, policy=allow_all())
    before = model.generate("Tell me of boats.", max_tokens=8)
    give_back(bundle_folder)
    after = model.generate("Tell me of boats.", max_tokens=8)
    assert (after.text, after.verdict) == (before.text, before.verdict)
