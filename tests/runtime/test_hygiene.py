"""What may be imported, and when."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import edge_safe

PACKAGE = Path(edge_safe.__file__).parent


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after some code."""
    script = f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    return set(result.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = {"typer", "torch", "PIL", "onnxruntime", "tokenizers", "numpy", "jinja2"}
    assert not heavy & loaded_by("import edge_safe")


def test_the_model_s_name_alone_loads_nothing_that_computes() -> None:
    heavy = {"onnxruntime", "tokenizers", "numpy", "jinja2"}
    assert not heavy & loaded_by("from edge_safe import SafeModel")


def test_telemetry_is_off_for_a_program_that_imports_onnxruntime_before_it_loads() -> None:
    code = "import os\nfrom edge_safe import SafeModel\nprint(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent, env=environment
    )
    assert done.stdout.strip() == "1"


def test_the_runtime_loads_no_training_library() -> None:
    loaded = loaded_by("import edge_safe.runtime.loading")
    assert {"onnxruntime", "tokenizers"} <= loaded
    assert not {"torch", "transformers", "onnx", "typer", "scipy", "PIL"} & loaded


def test_a_request_loads_no_training_library(bundle_folder: Path) -> None:
    code = (
        "from edge_safe import SafeModel\n"
        f"SafeModel.load({str(bundle_folder)!r}).generate('hello', max_tokens=2)"
    )
    assert not {"torch", "transformers", "onnx", "typer", "scipy"} & loaded_by(code)


def test_telemetry_is_off_before_onnxruntime_loads() -> None:
    code = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'onnxruntime':\n"
        "            assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'\n"
        "sys.meta_path.insert(0, Watch())\n"
        "import edge_safe.runtime.session"
    )
    assert "onnxruntime" in loaded_by(code)


def test_one_module_imports_onnxruntime_and_one_its_quantizers() -> None:
    importers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if any(name.split(".")[0] == "onnxruntime" for name in names):
                importers.add(path.relative_to(PACKAGE).as_posix())
    assert importers == {"runtime/session.py", "export/library_rounding.py"}


@pytest.mark.parametrize("name", edge_safe.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(edge_safe, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Saef"):
        edge_safe.Saef  # noqa: B018
