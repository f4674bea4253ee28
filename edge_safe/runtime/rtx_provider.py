"""ONNX Runtime's provider for TensorRT for RTX: a plugin, and what it opens in place of a graph.

NVIDIA publishes the provider as a Python package beside the ordinary onnxruntime. It is given a
context model: a graph of one node that names the engine's file beside it. Sources:
github.com/NVIDIA/TensorRT-RTX-EP-ABI (src/onnx_ctx_model_helper.cc, docs/integration-guide.md), and
onnxruntime.ai, "EP Context Design". It does not import onnxruntime; ``session.py`` hands it over.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import platform
import threading
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from edge_safe.errors import BundleError, ProviderError
from edge_safe.runtime.jetson import this_jetson
from edge_safe.runtime.libraries import advice, how_to_get
from edge_safe.runtime.wire_format import read_fields

PROVIDER = "tensorrt-rtx"

NAME = "NvTensorRTRTXExecutionProvider"

PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"

# What the plugin's package says it needs (its README, 0.5.0).
OLDEST = (1, 24)

# What version 0.5.0 says: 8.6, 8.9, and 12.0 or newer.
CAPABILITIES = "8.6, 8.9, 12.0 or newer (GeForce RTX 30, 40, 50)"

_CONTEXT_ENDING = "_ctx.onnx"

# Numbers of fields in onnx.proto.
_GRAPH, _NODE = 7, 1
_OPERATOR, _DOMAIN, _ATTRIBUTE = 4, 7, 5
_NAME, _WHOLE_NUMBER, _TEXT = 1, 3, 4

_registering = threading.Lock()
_registered: set[str] = set()


def context_file(graph_file: str) -> str:
    """Name of the context model of a graph: ``decoder_ctx.onnx`` of ``decoder.onnx``."""
    return graph_file.removesuffix(".onnx") + _CONTEXT_ENDING


def context_engine(model: bytes) -> str:
    """Name of the engine's file in a context model, as written in it.

    Args:
        model: The serialized ModelProto.

    Raises:
        BundleError: It is anything but one node that names a file.
    """
    try:
        return _engine(memoryview(model))
    except (IndexError, UnicodeDecodeError) as error:
        raise BundleError(f"A context model is not a well-formed ONNX file: {error}.") from error


def require(ort: Any) -> None:
    """Checks that the plugin is installed, beside an onnxruntime that takes it.

    Args:
        ort: The onnxruntime module.

    Raises:
        ProviderError: It is not.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise ProviderError(
            f"Provider '{PROVIDER}' ({NAME}) is a plugin that is not installed: "
            f"{how_to_get(PROVIDER, this_jetson(), platform.machine())}. Or choose another "
            "--provider."
        )
    if tuple(map(int, ort.__version__.split(".")[:2])) < OLDEST:
        raise ProviderError(
            f"Provider '{PROVIDER}' needs onnxruntime {'.'.join(map(str, OLDEST))} or newer, and "
            f"this is {ort.__version__}: pip install --upgrade onnxruntime, with Python 3.11 or "
            "newer. Or choose another --provider."
        )


def gpu_device(ort: Any) -> Any:
    """The first GPU that the plugin runs on, as ONNX Runtime describes it; registers the plugin.

    Args:
        ort: The onnxruntime module.

    Raises:
        ProviderError: The plugin is not installed or does not load, or it finds no GPU for itself.
    """
    require(ort)
    with _registering:
        if NAME not in _registered:
            _register(ort)
            _registered.add(NAME)
    for device in ort.get_ep_devices():
        if device.ep_name == NAME:
            return device
    raise ProviderError(
        f"Provider '{PROVIDER}' found no GPU for itself: {_why_no_gpu()} Or choose another "
        "--provider."
    )


def _register(ort: Any) -> None:
    """Loads the plugin and what comes with it, and hands it to ONNX Runtime.

    Raises:
        ProviderError: A library is missing.
    """
    try:
        _load_cuda_runtime()
        path = importlib.import_module(PACKAGE).get_library_path()
        ort.register_execution_provider_library(NAME, path)
    except Exception as error:
        raise ProviderError(
            f"Provider '{PROVIDER}' does not load: {advice(PROVIDER, str(error))} Or choose "
            "another --provider."
        ) from error


def _load_cuda_runtime() -> None:
    """Loads the plugin's own CUDA runtime, which its package (0.5.0) brings and does not load."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob("libcudart.so.*")):
            # One that does not load is named when the plugin is.
            with suppress(OSError):
                ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


def _why_no_gpu() -> str:
    """No GPU at all, or one of the wrong kind; a sentence."""
    # It imports the session, which imports this.
    from edge_safe.runtime.engines.device import first_gpu

    gpu = first_gpu()
    if gpu is None:
        return advice(PROVIDER, "no CUDA-capable device")
    return (
        f"{gpu.name} has compute capability {gpu.compute_capability}, and TensorRT for RTX runs on "
        f"{CAPABILITIES}. Use --provider cuda or tensorrt, with a bundle for it."
    )


def _engine(model: memoryview) -> str:
    nodes = [
        node
        for graph in _messages(model, _GRAPH)
        for number, node in read_fields(graph)
        if number == _NODE and not isinstance(node, int)
    ]
    if len(nodes) != 1 or (_text(nodes[0], _DOMAIN), _text(nodes[0], _OPERATOR)) != (
        "com.microsoft",
        "EPContext",
    ):
        raise BundleError(
            "A context model is not a single reference to an engine. Export the bundle again."
        )
    attributes = {_text(own, _NAME): own for own in _messages(nodes[0], _ATTRIBUTE)}
    mode, place = attributes.get("embed_mode"), attributes.get("ep_cache_context")
    beside = mode is not None and 1 not in {
        value for number, value in read_fields(mode) if number == _WHOLE_NUMBER
    }
    name = _text(place, _TEXT) if place is not None else ""
    if not beside or not name or PurePosixPath(name).name != name:
        raise BundleError(
            "A context model does not name an engine's file beside it. Export the bundle again."
        )
    return name


def _messages(data: memoryview, wanted: int) -> list[memoryview]:
    return [v for number, v in read_fields(data) if number == wanted and not isinstance(v, int)]


def _text(data: memoryview, wanted: int) -> str:
    return next((bytes(value).decode("utf-8") for value in _messages(data, wanted)), "")
