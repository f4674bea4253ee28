"""`edge-safe bench`: the document, the tables, and the peers. Times are looked at, never judged."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_safe.cli.bench import show
from edge_safe.cli.console import Terminal
from edge_safe.cli.main import call
from edge_safe.runtime.manifest import MANIFEST_FILE, Acceptance, dump_manifest, load_manifest
from tests.cli.conftest import Cli

ROOT = Path(__file__).parents[2]
CONTRACT = (
    "prompt_tokens",
    "load_ms",
    "encode_ms",
    "prefill_ms",
    "verdict_ms",
    "refusal_ms",
    "first_token_ms",
    "decode_ms_per_token",
    "gate_cost_ratio",
    "peak_memory_mb",
)


@pytest.fixture(scope="module")
def document(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `bench --json` prints of the tiny bundle, whose context has 512 tokens."""
    out = tmp_path_factory.mktemp("bench") / "out.json"
    arguments = ["bench", str(tiny_bundle), "--prompt-tokens", "64", "80", "4096"]
    with out.open("w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        code = call([*arguments, "--runs", "2", "--threads", "1", "--quiet", "--json"])
    assert code == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("key", CONTRACT)
def test_every_figure_of_the_contract_is_a_positive_number(
    document: dict[str, Any], key: str
) -> None:
    assert math.isfinite(document[key])
    assert document[key] > 0


@pytest.mark.parametrize("key", CONTRACT[1:])
def test_every_figure_has_its_quartiles_beside_it(document: dict[str, Any], key: str) -> None:
    lower, upper = document["spread"][key]
    assert 0 < lower <= document[key] <= upper


def test_lengths_that_fit_are_measured_and_the_others_named(document: dict[str, Any]) -> None:
    assert [entry["prompt_tokens"] for entry in document["lengths"]] == [64, 80]
    (skipped,) = document["skipped"]
    assert skipped["prompt_tokens"] == 4096
    assert "512" in skipped["reason"]


def test_the_verdict_comes_before_the_first_token(document: dict[str, Any]) -> None:
    for entry in document["lengths"]:
        assert entry["encode_ms"] < entry["verdict_ms"] < entry["first_token_ms"]


def test_what_bounds_decoding_is_said(document: dict[str, Any]) -> None:
    (decode,) = document["limits"]["decode"]
    assert decode["bound"] in ("memory", "compute")
    assert decode["share_reached"] > 0


def test_the_machine_is_described(document: dict[str, Any]) -> None:
    machine = document["machine"]
    assert machine["cores"] >= 1
    assert {"edge-safe", "onnxruntime", "numpy"} <= set(machine["versions"])


def test_people_get_tables(document: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    show(Terminal(), document)
    printed = capsys.readouterr().out
    assert "refusal" in printed
    assert "4096 tokens were not measured" in printed
    assert f"{document['decode_ms_per_token']:.1f}" in printed


def test_the_page_is_made_of_the_document(document: dict[str, Any], tmp_path: Path) -> None:
    result, page = tmp_path / "result.json", tmp_path / "page.md"
    result.write_text(json.dumps(document))
    script = ROOT / "docs" / "generate_performance.py"
    subprocess.run([sys.executable, script, page, result], check=True)
    text = page.read_text(encoding="utf-8")
    assert document["machine"]["cpu"] in text
    assert f"| 80 | {document['lengths'][1]['encode_ms']:.1f} (" in text


def test_a_picture_is_drawn(document: dict[str, Any], tmp_path: Path) -> None:
    from edge_safe.evaluation.speed.plot import plot_speed

    plot_speed(tmp_path / "speed.png", document)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_no_length_that_fits_is_wrong_usage(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("bench", tiny_bundle, "--prompt-tokens", 4096, "--runs", 1, "--json")
    assert result.code == 2
    assert "510" in result.document["error"]["message"]


@pytest.mark.parametrize("option", ["--runs", "--threads"])
def test_counts_below_one_are_wrong_usage(cli: Cli, tiny_bundle: Path, option: str) -> None:
    result = cli("bench", tiny_bundle, option, 0, "--json")
    assert result.code == 2
    assert option in result.document["error"]["message"]


def test_peers_that_were_not_set_up_are_an_error(
    cli: Cli, tiny_bundle: Path, tmp_path: Path
) -> None:
    result = cli("bench", tiny_bundle, "--peer", "x", "--peers-folder", tmp_path, "--json")
    assert result.code == 1
    assert result.document["error"]["type"] == "PeerError"
    assert "setup.py" in result.document["error"]["message"]


def test_a_bundle_that_failed_its_acceptance_test_is_measured_and_named(
    tiny_bundle: Path, tmp_path: Path, cli: Cli
) -> None:
    folder = tmp_path / "failed"
    shutil.copytree(tiny_bundle, folder)
    manifest = load_manifest(folder)
    failed = Acceptance(passed=False, data="rows", rows=2, reason="AUROC 0.2, torch 0.9")
    safety = msgspec.structs.replace(manifest.safety, acceptance=failed)
    (folder / MANIFEST_FILE).write_bytes(
        dump_manifest(msgspec.structs.replace(manifest, safety=safety))
    )
    found = cli("bench", folder, "64", "--runs", 1, "--threads", 1, "--json")
    assert found.code == 0
    assert any("failed its acceptance test" in note for note in found.document["notes"])
