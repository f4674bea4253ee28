"""Runs the command line inside the test's process, and prepares bundles and policies."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge_safe.cli.main import call
from edge_safe.runtime.manifest import MANIFEST_FILE, load_manifest


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document on stdout."""
        return json.loads(self.out)


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs one command."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = call([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Result(code, printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def seeing_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pebble, all of whose towers count as trained."""
    from edge_safe.export import export_bundle
    from tests.models.pebble.tiny import build_tiny_pebble

    folder = tmp_path_factory.mktemp("seeing")
    checkpoint = build_tiny_pebble(folder / "checkpoint", ("text_lines", "objects", "speech"))
    export_bundle(checkpoint, folder / "bundle", precision="fp32")
    return folder / "bundle"


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def broken_gate(own_bundle: Path) -> Path:
    """A bundle whose weights are NaN, and whose manifest says that they should be."""
    weights = sorted(own_bundle.glob("*.onnx.data"))
    for path in weights:
        path.write_bytes(b"\xff" * path.stat().st_size)
    manifest = json.loads((own_bundle / MANIFEST_FILE).read_text())
    for path in weights:
        manifest["files"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (own_bundle / MANIFEST_FILE).write_text(json.dumps(manifest))
    return own_bundle


@pytest.fixture
def policy(tiny_bundle: Path, tmp_path: Path) -> Callable[[float], Path]:
    """Writes a policy with one threshold for all stages."""

    def write(threshold: float) -> Path:
        stages = load_manifest(tiny_bundle).safety.stages
        path = tmp_path / f"policy-{threshold}.json"
        path.write_text(json.dumps({"thresholds": dict.fromkeys(stages, threshold)}))
        return path

    return write


@pytest.fixture
def allow(policy: Callable[[float], Path]) -> Path:
    """A policy that lets nearly everything through."""
    return policy(1.0)


@pytest.fixture
def refuse(policy: Callable[[float], Path]) -> Path:
    """A policy that refuses everything."""
    return policy(0.0)


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes a JSON Lines file."""

    def write(*records: object, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write
