"""Provider tensorrt-rtx: what it opens, what is checked before, and how it fails."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edge_safe.errors import BundleError, IntegrityError, ProviderError
from edge_safe.runtime import manifest as m
from edge_safe.runtime import rtx_provider
from edge_safe.runtime.bundle import Bundle, open_bundle, require_engines
from edge_safe.runtime.digest import sha256_file
from edge_safe.runtime.engines.device import first_gpu
from edge_safe.runtime.engines.plan import EnginePlan, Profile
from edge_safe.runtime.libraries import advice, diagnose, how_to_get
from edge_safe.runtime.session import Session
from edge_safe.runtime.verified_files import VerifiedFiles

PLAN = EnginePlan((Profile({}),))
CONTEXT, ENGINE = "decoder_ctx.onnx", "decoder.engine"

plugin_here = importlib.util.find_spec(rtx_provider.PACKAGE) is not None
without_plugin = pytest.mark.skipif(plugin_here, reason="the plugin is installed")
with_plugin = pytest.mark.skipif(
    not plugin_here, reason="needs pip install 'edge-safe[tensorrt-rtx]'"
)


def _context(engine: str = ENGINE, nodes: int = 1, op: str = "EPContext", **changed: int) -> bytes:
    """A context model of one input and one output."""
    attributes = {"embed_mode": 0, "ep_cache_context": engine} | changed
    made = [
        helper.make_node(op, ["x"], [f"y{n}"], domain="com.microsoft", **attributes)
        for n in range(nodes)
    ]
    place = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    results = [helper.make_tensor_value_info(f"y{n}", TensorProto.FLOAT, [1]) for n in range(nodes)]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(made, "decoder", [place], results)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _described(folder: Path, *names: str) -> None:
    """Plans an engine of the decoder and lists files in the manifest."""
    manifest = m.load_manifest(folder)
    entries = {n: m.FileEntry(sha256_file(folder / n), (folder / n).stat().st_size) for n in names}
    manifest = msgspec.structs.replace(
        manifest, engines={"decoder": PLAN}, files=manifest.files | entries
    )
    (folder / m.MANIFEST_FILE).write_bytes(m.dump_manifest(manifest))


def _opened(folder: Path) -> Bundle:
    """The bundle as ``open_bundle`` gives it where the plugin is."""
    return Bundle(VerifiedFiles(folder, m.load_manifest(folder)), rtx_provider.PROVIDER)


@pytest.fixture
def rtx_bundle(own_bundle: Path) -> Path:
    """A bundle with an engine's file for its decoder (of bytes that no provider would accept)."""
    (own_bundle / ENGINE).write_bytes(bytes(range(256)) * 64)
    (own_bundle / CONTEXT).write_bytes(_context())
    _described(own_bundle, CONTEXT, ENGINE)
    return own_bundle


# --- which file is opened ---------------------------------------------------------------------


def test_the_context_model_stands_in_for_a_graph_with_an_engine(rtx_bundle: Path) -> None:
    assert _opened(rtx_bundle).check_graph("decoder") == rtx_bundle / CONTEXT


def test_a_graph_without_an_engine_is_opened_on_the_cpu(rtx_bundle: Path) -> None:
    bundle = _opened(rtx_bundle)
    assert bundle.check_graph("embed_tokens") == rtx_bundle / "embed_tokens.onnx"
    assert bundle.session("embed_tokens").away is False


def test_the_language_model_is_never_left_to_the_cpu(rtx_bundle: Path) -> None:
    manifest = m.load_manifest(rtx_bundle)
    assert list(manifest.engines) == ["decoder"]
    with pytest.raises(ProviderError, match="plans no engine of gate"):
        require_engines(rtx_bundle, manifest, "tensorrt-rtx")
    everywhere = msgspec.structs.replace(
        manifest, engines=dict.fromkeys(["gate", "decoder"], manifest.engines["decoder"])
    )
    require_engines(rtx_bundle, everywhere, "tensorrt-rtx")


def test_every_other_provider_opens_the_graph_itself(rtx_bundle: Path) -> None:
    bundle = open_bundle(rtx_bundle, provider="cpu")
    assert bundle.check_graph("decoder") == rtx_bundle / "decoder.onnx"
    assert "past_key_values.2.key" in bundle.session("decoder").inputs


# --- what is checked before the provider sees anything ----------------------------------------


@pytest.mark.parametrize("name", [CONTEXT, ENGINE])
def test_a_changed_byte_is_found_before_the_provider_is_asked(rtx_bundle: Path, name: str) -> None:
    data = bytearray((rtx_bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (rtx_bundle / name).write_bytes(data)
    # With no plugin, or no GPU, whatever asked the provider first would be a ProviderError.
    with pytest.raises(IntegrityError, match=re.escape(name)):
        _opened(rtx_bundle).session("decoder")


def test_a_missing_engine_is_found(rtx_bundle: Path) -> None:
    (rtx_bundle / ENGINE).unlink()
    with pytest.raises(BundleError, match=rf"{ENGINE} is missing"):
        _opened(rtx_bundle).session("decoder")


def test_an_engine_that_the_manifest_does_not_list_is_refused(own_bundle: Path) -> None:
    (own_bundle / ENGINE).write_bytes(b"engine")
    (own_bundle / CONTEXT).write_bytes(_context())
    _described(own_bundle, CONTEXT)
    with pytest.raises(IntegrityError, match="not listed"):
        _opened(own_bundle).session("decoder")


def test_a_bundle_without_context_models_is_told_apart(own_bundle: Path) -> None:
    _described(own_bundle)
    with pytest.raises(BundleError, match="--target tensorrt-rtx"):
        _opened(own_bundle).session("decoder")


@pytest.mark.parametrize("name", ["../decoder.engine", "/tmp/decoder.engine", "a/b.engine", ""])
def test_an_engine_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(BundleError, match="beside it"):
        rtx_provider.context_engine(_context(name))


@pytest.mark.parametrize("name", ["..", "a\\b.engine"])
def test_a_name_that_leaves_the_bundle_is_refused(own_bundle: Path, name: str) -> None:
    (own_bundle / CONTEXT).write_bytes(_context(name))
    _described(own_bundle, CONTEXT)
    with pytest.raises(IntegrityError):
        _opened(own_bundle).session("decoder")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (_context(embed_mode=1), "beside it"),
        (_context(nodes=2), "single reference"),
        (_context(op="Identity"), "single reference"),
        (_context()[:-40], "not a well-formed"),
        (b"", "single reference"),
    ],
)
def test_anything_but_one_reference_to_a_file_is_refused(model: bytes, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        rtx_provider.context_engine(model)


def test_a_graph_of_a_model_is_no_context_model(bundle_folder: Path) -> None:
    with pytest.raises(BundleError, match="single reference"):
        rtx_provider.context_engine((bundle_folder / "decoder.onnx").read_bytes())


def test_the_name_is_read_as_onnx_reads_it() -> None:
    model = _context("gate_late.engine")
    (node,) = onnx.load_from_string(model).graph.node
    read = {own.name: helper.get_attribute_value(own) for own in node.attribute}
    assert rtx_provider.context_engine(model).encode() == read["ep_cache_context"]


# --- the plugin -------------------------------------------------------------------------------


@without_plugin
def test_without_the_plugin_the_bundle_is_not_opened(rtx_bundle: Path) -> None:
    with pytest.raises(ProviderError, match=r"plugin that is not installed.*edge-safe\["):
        open_bundle(rtx_bundle, provider="tensorrt-rtx")


@without_plugin
def test_without_the_plugin_no_other_provider_stands_in(rtx_bundle: Path) -> None:
    with pytest.raises(ProviderError, match="plugin that is not installed"):
        _opened(rtx_bundle).session("decoder")


@with_plugin
@pytest.mark.skipif(first_gpu() is not None, reason="there is a GPU")
def test_with_the_plugin_and_no_gpu_the_driver_is_named(rtx_bundle: Path) -> None:
    bundle = _opened(rtx_bundle)
    with pytest.raises(ProviderError, match=r"libcuda\.so\.1|no GPU is to be seen"):
        bundle.session("decoder")


@with_plugin
@pytest.mark.skipif(first_gpu() is not None, reason="there is a GPU")
def test_a_second_try_fails_as_the_first_did(rtx_bundle: Path) -> None:
    messages = set()
    for _ in range(2):
        with pytest.raises(ProviderError) as caught:
            Session(rtx_bundle / CONTEXT, "tensorrt-rtx")
        messages.add(str(caught.value))
    assert len(messages) == 1


@pytest.mark.skipif(first_gpu() is not None, reason="there is a GPU")
def test_onnx_runtime_itself_prints_nothing(rtx_bundle: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from edge_safe.errors import ProviderError\n"
        "from edge_safe.runtime.session import Session\n"
        "try:\n"
        "    Session(Path(sys.argv[1]), 'tensorrt-rtx')\n"
        "except ProviderError:\n"
        "    raise SystemExit(7)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, rtx_bundle / CONTEXT],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")


def test_an_onnxruntime_too_old_for_plugins_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # Any installed package passes for the plugin here: the version is looked at behind it.
    monkeypatch.setattr(rtx_provider, "PACKAGE", "onnxruntime")
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    with pytest.raises(ProviderError, match=r"1\.24 or newer, and this is 1\.23\.2"):
        rtx_provider.require(onnxruntime)


# --- what the provider's own words mean -------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "what", "remedy"),
    [
        # As onnxruntime 1.32 and plugin 0.5.0 say it without a driver, and without its NVML.
        (
            "Failed to load library /v/libonnxruntime_providers_nv_tensorrt_rtx.so with error: "
            "libcuda.so.1: cannot open shared object file: No such file or directory",
            "libcuda.so.1 (NVIDIA's driver) is missing",
            "install NVIDIA's driver",
        ),
        (
            "Failed to load library /v/libonnxruntime_providers_nv_tensorrt_rtx.so with error: "
            "libnvidia-ml.so.1: cannot open shared object file: No such file or directory",
            "libnvidia-ml.so.1 (NVIDIA's driver, its part for tools) is missing",
            "install NVIDIA's driver",
        ),
        # The plugin's words.
        (
            "TensorRT EP could not deserialize engine from cache: /b/decoder.engine",
            "cannot read the engine",
            "--capability",
        ),
    ],
)
def test_its_failures_are_put_into_words(said: str, what: str, remedy: str) -> None:
    found = diagnose(said, None)
    assert found is not None
    assert what in found.what
    assert remedy in found.remedy
    assert found.remedy in advice("tensorrt-rtx", said)


def test_where_the_plugin_is_not_published_another_provider_is_named() -> None:
    assert "--provider cuda" in how_to_get("tensorrt-rtx", None, "aarch64")
