"""The device install: the built wheel with one extra, in an environment of its own, runs a bundle.

Installs through pip, so it needs an index or a folder of wheels. `.ci/run` sets REQUIRE_PYTHON310,
which makes a missing Python 3.10 a failure instead of a skip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.conftest import write_bundle

ROOT = Path(__file__).parents[2]
# Prints log-odds of two prompts behind an early exit.
ODDS = """
import math, sys
from edge_safe import Policy, SafeModel
model = SafeModel.load(sys.argv[1], policy=Policy(thresholds={"gate": 0.5}))
for prompt in ("Tell me of the tide.", "A rope."):
    p_unsafe = model.assess(prompt).p_unsafe
    print(math.log(p_unsafe / (1 - p_unsafe)))
"""
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")

pytestmark = pytest.mark.slow


def check(*command: object, cwd: Path) -> str:
    """Runs a command and returns its output; what it printed is shown if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that nothing is left in the working tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "edge_safe", source / "edge_safe", ignore=ignored)
    check(sys.executable, *PIP, "wheel", "--no-deps", "-w", folder, source, cwd=folder)
    return next(folder.glob("*.whl"))


def python310() -> Iterator[str]:
    """Interpreters that may be Python 3.10."""
    if "PYTHON310" in os.environ:
        yield os.environ["PYTHON310"]
    yield "python3.10"
    if shutil.which("pyenv"):
        root = check("pyenv", "root", cwd=ROOT).strip()
        yield from map(str, Path(root).glob("versions/3.10*/bin/python"))


def is_310(python: str) -> bool:
    """Whether a command is a Python 3.10 that runs."""
    if shutil.which(python) is None:
        return False
    code = "import sys; sys.exit(sys.version_info[:2] != (3, 10))"
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0


def runs_a_bundle(python: str, wheel: Path, bundle: Path, folder: Path, *pins: str) -> str:
    """Installs the wheel into a new environment and runs a bundle there."""
    environment = folder / "environment"
    check(python, "-m", "venv", environment, cwd=folder)
    own = environment / "bin" / "python"
    check(own, *PIP, "install", f"{wheel}[cpu]", *pins, cwd=folder)
    check(environment / "bin" / "edge-safe", "verify", bundle, cwd=folder)
    check(environment / "bin" / "edge-safe", "doctor", cwd=folder)
    shutil.copy(ROOT / ".ci" / "device_check.py", folder)
    return check(own, folder / "device_check.py", bundle, cwd=folder)


def test_the_device_install_runs_a_bundle(wheel: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    assert "tokens answered" in runs_a_bundle(sys.executable, wheel, tiny_bundle, tmp_path)


def test_the_device_install_runs_on_the_versions_of_jetpack_6(
    wheel: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    python = next(filter(is_310, python310()), None)
    if python is None:
        message = "no Python 3.10 found: install one, or name it in PYTHON310"
        if "REQUIRE_PYTHON310" in os.environ:
            pytest.fail(message)
        pytest.skip(message)
    pins = ("onnxruntime==1.23.2", "numpy==2.2.6")
    printed = runs_a_bundle(python, wheel, tiny_bundle, tmp_path, *pins)
    assert "Python 3.10" in printed
    assert "onnxruntime 1.23.2, numpy 2.2.6" in printed
    # Of zero points that a branch takes from outside this version makes wrong products.
    rounded = write_bundle(tmp_path / "rounded", early=lambda head: head, precision="int4")
    own = tmp_path / "environment" / "bin" / "python"
    found = [float(line) for line in check(own, "-c", ODDS, rounded, cwd=tmp_path).split()]
    expected = [
        float(line) for line in check(sys.executable, "-c", ODDS, rounded, cwd=ROOT).split()
    ]
    assert found == pytest.approx(expected, abs=0.5)
