"""What is asked in a process of its own, so that a library that crashes does not take us along.

    python -m edge_safe.cli.doctor.child look
    python -m edge_safe.cli.doctor.child start PROVIDER

Prints one line of JSON, behind whatever the libraries print.
"""

from __future__ import annotations

import base64
import ctypes
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from edge_safe.errors import ProviderError

# y = x·x + x for a 2 by 2 matrix, ONNX IR 8, opset 17: one operator that a library of CUDA computes
# and one that ONNX Runtime's own kernels do, so that a build without kernels for the GPU shows.
GRAPH = base64.b64decode(
    "CAgSADpUChEKAXgKAXgSAXMiBk1hdE11bAoOCgFzCgF4EgF5IgNBZGQSBXN0YXJ0WhMKAXgSDgoMCAESCAoCCAIKAggC"
    "YhMKAXkSDgoMCAESCAoCCAIKAggCQgQKABAR"
)
_NOTHING: dict[str, Any] = {"started": False, "reason": "", "loading": None, "names": {}}


def look() -> dict[str, Any]:
    """Says which of NVIDIA's libraries load, their versions, and what GPU there is."""
    from edge_safe.runtime.library_table import LIBRARIES, file_name
    from edge_safe.runtime.packaged_libraries import cuda_of_onnxruntime, load_packaged_libraries

    load_packaged_libraries("tensorrt")
    built_for = cuda_of_onnxruntime()
    libraries: dict[str, str | None] = {}
    for row in LIBRARIES:
        if "tensorrt" in row.providers:
            for cuda in row.suffixes if built_for is None else {built_for} & set(row.suffixes):
                name = file_name(row, cuda)
                libraries[name] = _loaded_version(name)
    return {
        "cuda": built_for,
        "libraries": libraries,
        "driver": _driver(),
        "gpu": _gpu(),
    }


def start(provider: str) -> dict[str, Any]:
    """Opens and runs a graph of two operators on a provider.

    Returns:
        ``started``; or else the ``reason`` in words, and in ``loading`` what the system's loader
        says of the provider's library; and ONNX Runtime's ``names`` of the providers that it has.
    """
    try:
        import numpy as np

        from edge_safe.runtime import session
    except ImportError as error:
        return _NOTHING | {"reason": f"onnxruntime does not load: {error}"}
    names: dict[str, str | None] = dict.fromkeys(session.PROVIDERS)
    for each in session.PROVIDERS:
        with suppress(ProviderError):
            names[each] = session.provider_name(each)
    found = _NOTHING | {"names": names}
    name = names[provider]
    if name is None:
        return found
    matrix = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "start.onnx"
        path.write_bytes(GRAPH)
        try:
            result = session.Session(path, provider).run({"x": matrix})["y"]
        except Exception as error:
            return found | {"reason": f"{error}", "loading": session.loading_error(name)}
    if not np.allclose(result, matrix @ matrix + matrix, atol=0.1):
        return found | {"reason": f"it computes {result.tolist()} for {matrix.tolist()}"}
    return found | {"started": True}


def _loaded_version(name: str) -> str | None:
    """Version of a shared library, empty if it tells none; None if it does not load."""
    try:
        library = ctypes.CDLL(name)
    except OSError:
        return None
    read = _VERSIONS.get(name.partition(".so")[0])
    try:
        return read(library) if read else ""
    except AttributeError:
        return ""  # a release that is told apart in another way


def _by_pointer(function: str) -> Callable[[ctypes.CDLL], str]:
    """For functions of CUDA, which write a version such as 13020 to where a pointer says."""

    def read(library: ctypes.CDLL) -> str:
        number = ctypes.c_int()
        getattr(library, function)(ctypes.byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    return read


def _by_result(function: str) -> Callable[[ctypes.CDLL], str]:
    """For functions that return a version such as 101602, or 8907 before it grew a digit."""

    def read(library: ctypes.CDLL) -> str:
        call = getattr(library, function)
        call.restype = ctypes.c_size_t
        number = int(call())
        unit = 10000 if number >= 10000 else 1000
        return f"{number // unit}.{number % unit // 100}.{number % 100}"

    return read


# Sources: the CUDA runtime's and driver's API references, cudnn_version.h, NvInferRuntime.h.
_VERSIONS = {
    "libcuda": _by_pointer("cuDriverGetVersion"),
    "libcudart": _by_pointer("cudaRuntimeGetVersion"),
    "libcudnn": _by_result("cudnnGetVersion"),
    "libnvinfer": _by_result("getInferLibVersion"),
}


def _driver() -> str | None:
    try:
        from edge_safe.runtime.engines.device import driver_version
    except ImportError:
        return None  # no onnxruntime; said elsewhere
    return driver_version()


def _gpu() -> dict[str, Any] | None:
    try:
        from edge_safe.runtime.engines.device import first_gpu
    except ImportError:
        return None
    gpu = first_gpu()
    return None if gpu is None else {"name": gpu.name, "capability": gpu.compute_capability}


if __name__ == "__main__":
    found = look() if sys.argv[1] == "look" else start(sys.argv[2])
    sys.stdout.write("\n" + json.dumps(found) + "\n")
