"""`build`: engines made on the device."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edge_safe.runtime.engines.key import Device, EngineKey
from edge_safe.runtime.engines.store import EngineStore
from edge_safe.runtime.manifest import MANIFEST_FILE

DEVICE = Device("1.23.2", "10.3.0", "540.4.0", "Orin", "8.7")

# Engines are built nowhere but where there is a GPU.
without_gpu = pytest.mark.skipif(
    shutil.which("nvidia-smi") is not None, reason="this machine may have TensorRT"
)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the engines, not there yet."""
    monkeypatch.setenv("EDGE_SAFE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


@pytest.fixture
def planned(own_bundle: Path) -> Path:
    """A bundle that plans an engine of its gate."""
    manifest = json.loads((own_bundle / MANIFEST_FILE).read_text())
    shapes = {}
    for tensor in manifest["graphs"]["gate"]["inputs"]:
        if any(isinstance(size, str) for size in tensor["shape"]):
            low, high = (
                [size if isinstance(size, int) else value for size in tensor["shape"]]
                for value in (1, 64)
            )
            shapes[tensor["name"]] = {"min": low, "opt": low, "max": high}
    manifest["engines"] = {"gate": {"profiles": [{"shapes": shapes}], "fp16": True}}
    (own_bundle / MANIFEST_FILE).write_text(json.dumps(manifest))
    return own_bundle


def keep(engines: Path, graph: str) -> Path:
    """Puts an engine of another machine into the store."""
    key = EngineKey(graph, {f"{graph}.onnx": "a" * 64}, {}, DEVICE)
    return EngineStore(engines).obtain(
        key, lambda folder, _: (folder / "x.engine").write_bytes(b"engine"), lambda *_: None
    )


def test_a_bundle_that_plans_no_engines_says_so(cli, engines: Path, tiny_bundle: Path) -> None:
    result = cli("build", tiny_bundle)
    assert result.code == 1
    assert "plans no engines" in result.err


@without_gpu
def test_without_tensorrt_it_ends_in_one_error(cli, engines: Path, planned: Path) -> None:
    result = cli("build", planned, "--json")
    assert result.code == 1
    assert result.document["error"]["type"] == "ProviderError"
    assert "tensorrt" in result.document["error"]["message"].lower()
    assert len(result.err.strip().splitlines()) == 1
    assert not engines.exists()


@without_gpu
def test_a_dry_run_says_what_would_be_built_and_why_it_cannot(
    cli, engines: Path, planned: Path
) -> None:
    result = cli("build", planned, "--dry-run", "--json")
    assert result.code == 1
    (row,) = result.document["engines"]
    assert (row["graph"], row["state"], row["key"]) == ("gate", "to build", None)
    assert row["plan"]["fp16"] is True
    weights = planned / "gate.onnx"
    assert row["memory_needed_mb"] * 2**20 >= 4 * weights.stat().st_size
    assert result.document["memory_available_mb"] > 0
    assert "tensorrt" in result.document["problem"].lower()
    assert not engines.exists()


@without_gpu
def test_a_dry_run_shows_the_profiles_in_words(cli, engines: Path, planned: Path) -> None:
    result = cli("build", planned, "--dry-run")
    assert "gate: to build" in result.out
    assert "inputs_embeds" in result.out
    assert "memory free" in result.out


def test_a_damaged_bundle_is_found_before_anything_is_built(
    cli, engines: Path, planned: Path
) -> None:
    with (planned / "gate.onnx").open("ab") as stream:
        stream.write(b" ")
    result = cli("build", planned, "--json")
    assert result.code == 1
    assert result.document["error"]["type"] == "IntegrityError"
    assert not engines.exists()


def test_no_engines_are_listed_where_there_are_none(cli, engines: Path) -> None:
    result = cli("build", "--list", "--json")
    assert result.code == 0
    assert result.document == {"folder": str(engines), "engines": []}


def test_the_list_tells_good_engines_from_damaged_ones(cli, engines: Path) -> None:
    keep(engines, "decoder")
    (keep(engines, "gate") / "x.engine").write_bytes(b"engin")
    rows = {
        row["engine"].split("-")[0]: row
        for row in cli("build", "--list", "--json").document["engines"]
    }
    assert rows["decoder"]["fault"] is None
    assert rows["decoder"]["device"]["gpu"] == "Orin"
    assert rows["gate"]["state"] == "damaged"
    assert "x.engine" in rows["gate"]["fault"]


@without_gpu
def test_clean_removes_what_is_damaged_or_unfinished_and_nothing_else(cli, engines: Path) -> None:
    good = keep(engines, "decoder")
    damaged = keep(engines, "gate")
    (damaged / "x.engine").unlink()
    (engines / f".{good.name}.unfinished-0").mkdir()
    result = cli("build", "--clean", "--json")
    assert result.code == 0
    assert result.document == {"removed": [damaged.name], "unfinished": 1}
    assert list(engines.iterdir()) == [good]


@pytest.mark.parametrize(
    "options", [["--list", "--clean"], ["bundle", "--list"], ["--dry-run"], ["--list", "--dry-run"]]
)
def test_what_does_not_go_together_is_wrong_usage(cli, engines: Path, options: list[str]) -> None:
    assert cli("build", *options).code == 2
