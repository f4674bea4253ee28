"""The scripts that measure still run and print what they promise; the figures mean nothing here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.test_pebble import PROCESSORS, with_towers

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def result(script: str, *arguments: object) -> dict[str, Any]:
    """The JSON object in the last line of a script's output."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_fidelity_to_the_base_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"id": i, "prompt": f"Tell me story {i}.", "label": "safe"} for i in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--data", data, "--base", tiny_checkpoint, "--tokens", 8)
    measured = result("base_fidelity.py", tiny_checkpoint, *arguments)
    assert measured["prompts"] == 3
    assert 0 <= measured["agreement"] <= 1
    assert measured["kl"] >= 0
    assert measured["perplexity_ratio"] == pytest.approx(
        measured["perplexity_gated"] / measured["perplexity_base"], rel=1e-3
    )


def test_many_requests_beside_one_by_one(tiny_bundle: Path) -> None:
    measured = result("many_requests.py", tiny_bundle, "--requests", 24, "--rounds", 3)
    assert measured["requests"] == 24
    assert measured["agreement"] == 1
    assert measured["max_p_difference"] < 1e-5
    assert measured["many"] > 0
    assert measured["one_by_one"] > 0


def test_many_requests_of_a_files_lengths(tiny_bundle: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"id": i, "prompt": "Tell me a story. " * (i + 1)} for i in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured = result(
        "many_requests.py", tiny_bundle, "--requests", 8, "--rounds", 2, "--data", data
    )
    assert measured["requests"] == 8
    assert measured["agreement"] == 1


def test_pictures_of_one_turn_beside_one_by_one(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = with_towers(tiny_bundle, tmp_path / "bundle", set(PROCESSORS))
    measured = result("overlap.py", bundle, "--pictures", 2, "--rounds", 3, "--side", 320)
    assert (measured["pictures"], measured["rounds"]) == (2, 3)
    assert measured["together_ms"] > 0
    assert measured["one_by_one_ms"] > 0
    lower, upper = measured["spread"]["ratio"]
    assert lower <= measured["ratio"] <= upper


def test_all_ways_of_running_a_float32_bundle_agree(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = with_towers(tiny_bundle, tmp_path / "bundle", set(PROCESSORS))
    measured = result("ways_agree.py", bundle, "--requests", 8)[str(bundle)]
    ways = {"chunked", "together", "one_thread", "prefix", "second_turn", "restored", "picture"}
    assert set(measured) == ways
    for found in measured.values():
        assert found["requests"] > 0
        assert found["agreement"] == 1
        assert found["max_p_difference"] < 1e-5
