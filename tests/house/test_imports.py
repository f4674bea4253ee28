"""What may import what, and what an import may cost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "tokenizers", "PIL", "typer", "scipy")


def loaded_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*{{n.partition('.')[0] for n in sys.modules}})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import edge_safe").isdisjoint(HEAVY)


def test_the_command_line_loads_no_model_code_for_its_help() -> None:
    heavy = set(HEAVY) - {"typer"}
    assert loaded_after("import edge_safe.cli.main").isdisjoint(heavy)


def test_loading_the_runtime_needs_no_training_package() -> None:
    loaded = loaded_after("import edge_safe.runtime.loading")
    assert loaded.isdisjoint({"torch", "transformers", "onnx", "scipy", "typer", "rich"})


def test_metrics_need_numpy_alone() -> None:
    loaded = loaded_after("import edge_safe.evaluation.metrics")
    assert loaded.isdisjoint({*HEAVY, "matplotlib", "sklearn"})


def test_telemetry_is_off_before_onnxruntime_is_loaded() -> None:
    code = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'onnxruntime':\n"
        "            print(os.environ.get('ORT_DISABLE_TELEMETRY'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        "import edge_safe.runtime.session\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.split() == ["1"]


def test_the_arrows_of_the_design_hold() -> None:
    pytest.importorskip("importlinter", reason="a development tool")
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout
