"""The one place that touches ONNX Runtime: open a graph, run it, count the runs.

Telemetry is switched off before the import. A provider that is asked for is the provider that
runs, or there is a ``ProviderError``: ONNX Runtime by itself falls back to the CPU in silence.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_safe.errors import BundleError, ProviderError
from edge_safe.runtime.heap import share_one_heap

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as ort

Array = NDArray[Any]

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}

INSTALL_HINTS = {
    "cpu": "install edge-safe[cpu]",
    "cuda": "install edge-safe[gpu] and the CUDA libraries it names",
    "tensorrt": "install edge-safe[gpu] and TensorRT (on Jetson: the JetPack wheel)",
    "tensorrt-rtx": "install edge-safe[tensorrt-rtx]",
}

DEVICES = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "cuda", "tensorrt-rtx": "cuda"}

WARNINGS_ONLY = 3

share_one_heap()


@functools.cache
def share_one_arena() -> None:
    """Lets the graphs on the CPU take intermediate results from one arena of this process.

    They run one after the other, so that what the last one has used serves the next. It is made
    when the first of them is opened, and goes before one that another library has made.
    """
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    ort.create_and_register_allocator(memory, None)


class Buffer:
    """Memory that a graph may read and write in place, on the provider's device."""

    __slots__ = ("_shared", "shape", "value")

    def __init__(self, array: Array, device: str) -> None:
        """Takes over ``array``: shared on the CPU, copied to any other device."""
        array = np.ascontiguousarray(array)
        self.shape = array.shape
        self.value = ort.OrtValue.ortvalue_from_numpy(array, device, 0)
        self._shared = array if device == "cpu" else None

    def numpy(self) -> Array:
        """The contents, copied to the host where the device is not the CPU."""
        if self._shared is not None:
            return self._shared
        array: Array = self.value.numpy()
        return array

    def write(self, array: Array) -> None:
        """Replaces the contents by an array of the same shape, which may be ``numpy()`` itself."""
        if self._shared is None:
            self.value.update_inplace(np.ascontiguousarray(array))
        elif array is not self._shared:
            self._shared[:] = array


class Abort:
    """Makes runs in progress end early, from any thread."""

    def __init__(self) -> None:
        self.options = ort.RunOptions()

    def fire(self) -> None:
        """Ends the runs that were started with this object; later ones fail at once."""
        self.options.terminate = True


_counting = threading.RLock()
_open: list[int] = []


def open_sessions() -> int:
    """How many graphs of this process are open, or being opened or closed."""
    with _counting:
        return len(_open)


class Session:
    """One opened graph.

    Attributes:
        runs: How often the graph was run.
        device: ``cpu`` or ``cuda``, where its large buffers belong.
    """

    def __init__(
        self,
        path: Path,
        provider: str = "cpu",
        threads: int | None = None,
        profile_prefix: str | None = None,
    ) -> None:
        """Opens a graph.

        Args:
            path: The ``.onnx`` file.
            provider: A key of ``PROVIDERS``.
            threads: Threads inside one operator; None lets ONNX Runtime choose.
            profile_prefix: Writes ONNX Runtime's own profile to files that start so.

        Raises:
            ProviderError: The provider is unknown, not installed, or did not start.
            BundleError: The graph cannot be opened.
        """
        with _counting:
            _open.append(id(self))
        name = provider_name(provider)
        options = ort.SessionOptions()
        options.log_severity_level = WARNINGS_ONLY
        # Two sessions of one request alternate; a spinning pool would starve the other one.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # Every prompt and picture has its own shape; a plan per shape would only pile up memory.
        options.enable_mem_pattern = False
        if provider == "cpu":
            share_one_arena()
            options.add_session_config_entry("session.use_env_allocators", "1")
            # Weights stay outside of it, so that they go when the graph does.
            options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        if profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile_prefix
        try:
            self._session = ort.InferenceSession(str(path), options, providers=[name])
        except Exception as error:
            if provider == "cpu":
                raise BundleError(f"ONNX Runtime cannot open {path}: {error}") from error
            raise ProviderError(
                f"Provider '{provider}' cannot open {path.name}: {error}. "
                f"To use it, {INSTALL_HINTS[provider]}; or choose another --provider."
            ) from error
        self._session.disable_fallback()
        running = self._session.get_providers()
        if not running or running[0] != name:
            raise ProviderError(
                f"Provider '{provider}' did not start for {path.name}; ONNX Runtime offers "
                f"{running}. To use it, {INSTALL_HINTS[provider]}; or choose another --provider."
            )
        self.device = DEVICES[provider]
        self.inputs = [node.name for node in self._session.get_inputs()]
        self.outputs = [node.name for node in self._session.get_outputs()]
        self.runs = 0
        self._lock = threading.Lock()

    def run(
        self,
        feeds: Mapping[str, Array],
        abort: Abort | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        """Runs the graph on host arrays and returns outputs by name, all unless some are named."""
        self.count()
        names = self.outputs if outputs is None else list(outputs)
        values = self._session.run(names, dict(feeds), abort.options if abort else None)
        return dict(zip(names, values, strict=True))

    def __del__(self) -> None:
        """Unmaps the weights before it counts as closed."""
        self.__dict__.pop("_session", None)
        with _counting:
            if id(self) in _open:
                _open.remove(id(self))

    def binding(self) -> Binding:
        """A set of bound buffers for repeated runs; one per thread."""
        return Binding(self, self._session)

    def count(self) -> None:
        """Counts one run."""
        with self._lock:
            self.runs += 1

    def end_profile(self) -> Path:
        """Ends profiling and returns the file that was written."""
        return Path(self._session.end_profiling())


class Binding:
    """Buffers bound to the inputs and outputs of a session."""

    def __init__(self, session: Session, inner: ort.InferenceSession) -> None:
        self._session = session
        self._inner = inner
        self._binding = inner.io_binding()
        self._kept: dict[str, object] = {}

    def input(self, name: str, source: Array | Buffer) -> None:
        """Binds an input; a host array is read anew at every run."""
        value = _value(source)
        self._kept[name] = (source, value)
        self._binding.bind_ortvalue_input(name, value)

    def output(self, name: str, target: Array | Buffer) -> None:
        """Binds an output to memory that is written in place."""
        value = _value(target)
        self._kept[name] = (target, value)
        self._binding.bind_ortvalue_output(name, value)

    def run(self, abort: Abort | None = None) -> None:
        """Runs the graph once on what is bound."""
        self._session.count()
        self._inner.run_with_iobinding(self._binding, abort.options if abort else None)


def _value(source: Array | Buffer) -> ort.OrtValue:
    """Wraps a host array without copying it, or hands out a buffer's value."""
    if isinstance(source, Buffer):
        return source.value
    if not source.flags.c_contiguous:
        raise ValueError("only contiguous arrays can be bound")
    return ort.OrtValue.ortvalue_from_numpy(source)


def provider_name(provider: str) -> str:
    """ONNX Runtime's name of a provider that is installed.

    Raises:
        ProviderError: It is unknown or this ONNX Runtime was built without it.
    """
    if provider not in PROVIDERS:
        raise ProviderError(f"Unknown provider '{provider}'; choose one of {', '.join(PROVIDERS)}.")
    name = PROVIDERS[provider]
    available = ort.get_available_providers()
    if name not in available:
        raise ProviderError(
            f"Provider '{provider}' ({name}) is not in this onnxruntime {ort.__version__}, which "
            f"has {', '.join(available)}. To use it, {INSTALL_HINTS[provider]}; or choose another "
            "--provider."
        )
    return name
