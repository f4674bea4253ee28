"""The provider that is asked for runs, or there is one error that says what it lacks."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_safe.errors import ProviderError
from edge_safe.runtime import session as ours
from edge_safe.runtime.bundle import open_bundle
from edge_safe.runtime.manifest import MANIFEST_FILE
from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.session import PROVIDERS, Session

DEVICES = ("cuda", "tensorrt")


def is_installed(package: str) -> bool:
    """Whether a distribution is there."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def sees_a_gpu() -> bool:
    """Whether NVIDIA's driver has a device here."""
    return Path("/dev/nvidia0").exists() or Path("/dev/nvgpu").exists()


plain_onnxruntime = pytest.mark.skipif(
    is_installed("onnxruntime-gpu"), reason="onnxruntime-gpu is installed"
)
without_gpu = pytest.mark.skipif(
    not is_installed("onnxruntime-gpu") or sees_a_gpu(),
    reason="needs onnxruntime-gpu on a machine without a GPU",
)


def said(error: Exception) -> str:
    """An error's message, which is one line."""
    words = str(error)
    assert "\n" not in words
    assert "Traceback" not in words
    return words


def save(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> Path:
    """A graph from x (3, 4) to y, float32."""
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def product(tmp_path: Path) -> Path:
    """One matrix product."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    return save(tmp_path / "product.onnx", [node], {"w": np.eye(4, dtype=np.float32)})


# --- onnxruntime without the provider ----------------------------------------


@plain_onnxruntime
@pytest.mark.parametrize("provider", DEVICES)
def test_a_provider_that_is_not_installed_says_how_to_get_it(
    bundle_folder: Path, provider: str
) -> None:
    with pytest.raises(ProviderError) as caught:
        SafeModel.load(bundle_folder, provider=provider, threads=1)
    words = said(caught.value)
    assert f"'{provider}' ({PROVIDERS[provider]}) is not in this onnxruntime" in words
    assert re.search(r": [^:]*onnxruntime[^:]*\. Or choose another --provider\.$", words)


@plain_onnxruntime
def test_a_bundle_for_a_provider_that_is_not_installed_does_not_load(own_bundle: Path) -> None:
    path = own_bundle / MANIFEST_FILE
    raw = json.loads(path.read_text())
    raw["target"] = "cuda"
    path.write_text(json.dumps(raw))
    with pytest.raises(ProviderError, match=r"'cuda'.* is not in this onnxruntime"):
        SafeModel.load(own_bundle, threads=1)
    # What it was exported for is no hindrance where the CPU is asked for.
    assert SafeModel.load(own_bundle, provider="cpu", threads=1).assess("Hello.").stage == "gate"


def test_a_provider_that_nobody_knows_lists_those_there_are(bundle_folder: Path) -> None:
    with pytest.raises(ProviderError, match="'rocm'; choose one of cpu, cuda, tensorrt"):
        open_bundle(bundle_folder, "rocm")


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, where nothing catches what it lets through."""
    command = [sys.executable, "-c", "from edge_safe.cli.main import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(sees_a_gpu(), reason="a GPU may answer")
@pytest.mark.parametrize("json_output", [False, True])
@pytest.mark.parametrize("provider", DEVICES)
def test_the_program_ends_with_one_line_and_no_answer(
    bundle_folder: Path, provider: str, json_output: bool
) -> None:
    words = ["run", str(bundle_folder), "Hello.", "--provider", provider]
    done = run_cli(*words, *(["--json"] if json_output else []))
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert provider in done.stderr
    assert "Traceback" not in done.stderr
    if json_output:
        document = json.loads(done.stdout)
        assert set(document) == {"error"}
        assert (document["error"]["type"], document["error"]["exit_code"]) == ("ProviderError", 1)
    else:
        assert done.stdout == ""


# --- onnxruntime with the provider, and nothing that it could run on ---------


@without_gpu
@pytest.mark.parametrize("provider", DEVICES)
def test_what_the_provider_lacks_is_named(product: Path, provider: str) -> None:
    with pytest.raises(ProviderError) as caught:
        Session(product, provider)
    words = said(caught.value)
    assert f"'{provider}'" in words
    assert "is missing" in words
    assert any(hint in words for hint in ("pip install", "driver", "apt install"))


@without_gpu
def test_the_cpu_does_not_answer_in_its_place(bundle_folder: Path) -> None:
    bundle = open_bundle(bundle_folder, "cuda", threads=1)
    with pytest.raises(ProviderError, match="'cuda'"):
        bundle.session("gate")
    # The look-up of words is the host's in any case.
    assert bundle.session("embed_tokens").device == "cpu"
    with pytest.raises(ProviderError, match="'cuda'"):
        SafeModel.load(bundle_folder, provider="cuda", threads=1)


# --- work that a provider leaves to the CPU ----------------------------------


def left_to_the_cpu(path: Path) -> list[str]:
    """What the check finds in a graph of which the CPU runs all."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(ours._ASSIGNMENT, "1")
    opened = ort.InferenceSession(str(path), options, providers=[PROVIDERS["cpu"]])
    if not hasattr(opened, "get_provider_graph_assignment_info"):
        pytest.skip("this onnxruntime does not say where nodes run")
    return ours._left_to_the_cpu(opened)


def test_a_product_that_the_cpu_runs_is_found(product: Path) -> None:
    assert left_to_the_cpu(product) == ["MatMul"]


def test_shapes_that_the_cpu_counts_are_not_work(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], name="shape"),
        helper.make_node("Reshape", ["x", "shape"], ["z"], name="reshape"),
        helper.make_node("Neg", ["z"], ["y"], name="neg"),
    ]
    assert left_to_the_cpu(save(tmp_path / "shapes.onnx", nodes, {})) == []


@pytest.mark.parametrize("graph", ["gate", "decoder"])
def test_every_graph_of_a_model_has_work_that_would_be_missed(
    bundle_folder: Path, graph: str
) -> None:
    found = left_to_the_cpu(bundle_folder / f"{graph}.onnx")
    assert {"GroupQueryAttention", "MatMul", "SkipSimplifiedLayerNormalization"} <= set(found)
    assert set(found) <= ours.HEAVY
