"""The table of the families: nothing is empty, nothing is done twice, a crash is a reason."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from benchmarks.families.apart import CrashedError, call_apart
from benchmarks.families.cells import (
    VARIANTS,
    Bundle,
    Cell,
    Way,
    add_cell,
    missing,
    read_cells,
)
from benchmarks.families.measure import compare, log_odds
from benchmarks.families.page import LEFT_OUT, page, table
from benchmarks.families.requests import WAYS, requests
from edge_safe import SafeModel
from edge_safe.export.bundle_files import write_manifest
from edge_safe.runtime.manifest import load_manifest

ROOT = Path(__file__).parents[2]
MACHINE = {
    "cpu": "a processor", "cores": 2, "instruction_sets": ["AVX2"], "memory_mb": 4096,
    "system": "Linux", "python": "3.11", "versions": {"torch": "2"}, "load_average": 0.5,
}  # fmt: skip
EXACT = Way(asked=12, difference=2e-6, agreement=1.0, change=1e-7, answered=4, same=4)
DEAF = "This bundle has no tower for sound."


def cell(family: str, precision: str = "fp32", audio: Way | str = DEAF) -> Cell:
    ways: dict[str, Way | str] = dict.fromkeys(WAYS, EXACT) | {"audio": audio}
    return Cell(family, precision, Bundle(1.2, 500, 300, 2_000_000, ways), cpu_seconds=2.0)


def test_a_page_has_no_empty_cell() -> None:
    cells = {c.key: c for c in (cell("one"), Cell("two", "fp32", "It cannot be."))}
    text = page(cells, ["one", "two", "three"], MACHINE)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows
    assert not [row for row in rows if "" in (part.strip() for part in row.split("|")[1:-1])]
    reasons = text.partition("## Reasons")[2]
    assert [reason in reasons for reason in (DEAF, "It cannot be.", LEFT_OUT)] == [True] * 3


def test_a_reason_stands_on_a_page_once() -> None:
    cells = {c.key: c for c in (cell("one"), cell("two"))}
    text = page(cells, ["one", "two"], MACHINE)
    assert text.count(DEAF) == 1
    assert text.count(LEFT_OUT) == 1


def test_what_was_measured_stands_on_the_page() -> None:
    cells = {c.key: c for c in (cell("one", name, EXACT) for name in VARIANTS)}
    text = page(cells, ["one"], MACHINE)
    assert "| `one` | 2e-06, 4/4 | 2e-06, 4/4 | 2e-06, 4/4 | 2e-06, 4/4 |" in text
    assert "| 2.00 | 1.2 | 500 |" in text
    assert "None: everything was measured." in text
    assert all(f"### `{name}`" in text for name in VARIANTS)


def test_a_table_with_an_empty_cell_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty or a missing cell"):
        table(["a", "b"], [["1", ""]])
    with pytest.raises(ValueError, match="empty or a missing cell"):
        table(["a", "b"], [["1"]])


def test_finished_cells_are_not_done_again_and_failed_ones_are(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cells.jsonl"
    add_cell(path, cell("one"))
    add_cell(path, Cell("two", "fp32", "It crashed.", failed=True))
    todo = missing(read_cells(path), ["one", "two"], ["fp32", "int4"])
    assert todo == [("one", "int4"), ("two", "fp32"), ("two", "int4")]
    add_cell(path, cell("two"))
    assert missing(read_cells(path), ["one", "two"], ["fp32"]) == []


def test_a_line_that_a_killed_run_cut_off_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    add_cell(path, cell("one"))
    add_cell(path, cell("two"))
    path.write_bytes(path.read_bytes()[:-20])
    assert list(read_cells(path)) == [("one", "fp32")]
    add_cell(path, cell("two"))
    assert read_cells(path) == {c.key: c for c in (cell("one"), cell("two"))}


def test_verdicts_are_compared_where_torch_refuses_half() -> None:
    torch_odds = np.array([4.0, 5.0, 7.0, 8.0])
    found = compare(np.array([4.0, 6.5, 7.0, 9.0]), torch_odds, ["a", "b"], ["a", "c"])
    middle = 1 / (1 + np.exp([1.0, -0.5]))
    expected = Way(4, 1.5, 0.75, float(middle[1] - middle[0]), 2, 1)
    assert msgspec.structs.asdict(found) == pytest.approx(msgspec.structs.asdict(expected))


def test_log_odds_do_not_depend_on_a_bundle_s_calibration(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    manifest = load_manifest(copy)
    stages = {
        stage: msgspec.structs.replace(fitted, scale=0.02, bias=0.3)
        for stage, fitted in manifest.safety.stages.items()
    }
    safety = msgspec.structs.replace(manifest.safety, stages=stages)
    write_manifest(copy, msgspec.structs.replace(manifest, safety=safety))
    found = []
    for bundle in (tiny_bundle, copy):
        model = SafeModel.load(bundle, threads=1)
        found.append(log_odds(model, model.assess("Tell me a story."), "text"))
    assert found[1] == pytest.approx(found[0], abs=1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_requests_are_the_same_each_time_and_differ_from_each_other(way: str) -> None:
    first, second = requests(way), requests(way)
    assert [turn.text for turn in first] == [turn.text for turn in second]
    assert len({turn.text for turn in first}) == len(first)
    pictures = [image.tobytes() for turn in first for image in turn.images]
    assert pictures == [image.tobytes() for turn in second for image in turn.images]
    sounds = [turn.sound.tobytes() for turn in first if turn.sound is not None]
    assert len(set(sounds)) == len(sounds)
    assert all(len({image.size for image in turn.images}) == len(turn.images) for turn in first)


def test_a_result_comes_back_from_a_process_of_its_own() -> None:
    assert call_apart(os.getpid) != os.getpid()


def test_an_error_in_a_process_of_its_own_is_told() -> None:
    with pytest.raises(CrashedError, match=r"FileNotFoundError: .*/nowhere"):
        call_apart(os.listdir, "/nowhere")


def test_a_process_that_is_killed_is_told() -> None:
    with pytest.raises(CrashedError, match=f"exit code -{signal.SIGKILL.value}"):
        call_apart(signal.raise_signal, signal.SIGKILL)


@pytest.mark.slow
def test_the_command_measures_writes_the_page_and_is_done(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.families", "--out", str(tmp_path / "out")]
    command += ["--page", str(tmp_path / "page.md"), "--family", "voxtral"]
    command += ["--precision", "fp32", "--precision", "imported"]
    results = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    assert [result["done_now"] for result in results] == [2, 0]
    assert (results[0]["cells"], results[0]["bundles"]) == (2, 1)
    assert results[0]["largest_fp32_difference"] < 1e-4
    text = (tmp_path / "page.md").read_text()
    assert "checkpoint does not come in 4 bits" in text
    assert str(tmp_path) not in text
    assert "no tower for pictures" in text
