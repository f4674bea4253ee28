"""The one place that touches ONNX Runtime: open a graph, run it, count the runs.

Telemetry is switched off before the import. A provider that is asked for is the provider that
runs, or there is a ``ProviderError``: ONNX Runtime by itself falls back to the CPU in silence.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from platform import machine
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_safe.errors import BundleError, ProviderError
from edge_safe.runtime import rtx_provider
from edge_safe.runtime.heap import keep_heap_small
from edge_safe.runtime.jetson import this_jetson
from edge_safe.runtime.libraries import advice, how_to_get
from edge_safe.runtime.packaged_libraries import load_packaged_libraries

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as ort

Array = NDArray[Any]

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    rtx_provider.PROVIDER: rtx_provider.NAME,
}

# A plugin comes with an onnxruntime that cannot make buffers of CUDA's: it reads the host's.
DEVICES = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "cuda", rtx_provider.PROVIDER: "cpu"}

# What providers are told whatever the graph: fp32 means fp32, not TF32.
OPTIONS: dict[str, dict[str, str]] = {
    "cuda": {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"},
}

# What ONNX Runtime leaves to the CPU in a graph that runs elsewhere is to be shapes and conditions,
# never one of these.
HEAVY = {
    "Attention",
    "Conv",
    "Gemm",
    "GroupQueryAttention",
    "LSTM",
    "LayerNormalization",
    "MatMul",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "MultiHeadAttention",
    "ScatterElements",
    "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "Softmax",
}

PAST = "past_key_values."

WARNINGS_ONLY = 3
# Longer than a graph's threads wait for each other between two operators.
_SPIN_MICROSECONDS = "1000"

# Of ONNX Runtime's own log, which a message of ours replaces; and what it is by default.
NOTHING, WARNINGS = 4, 2

keep_heap_small()


@functools.cache
def share_one_arena() -> None:
    """Lets the graphs on the CPU take intermediate results from one arena of this process.

    Called under ``_counting``, since graphs are opened side by side.

    They run one after the other, so that what the last one has used serves the next. It is made
    when the first of them is opened, and goes before one that another library has made.
    """
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    ort.create_and_register_allocator(memory, None)


class Buffer:
    """Memory that a graph may read and write in place, on the provider's device."""

    __slots__ = ("_shared", "device", "shape", "value")

    def __init__(self, array: Array, device: str) -> None:
        """Takes over ``array``: shared on the CPU, copied to any other device."""
        array = np.ascontiguousarray(array)
        self.device = device
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


def version() -> str:
    """Version of the installed onnxruntime."""
    return str(ort.__version__)


def room(shape: tuple[int, ...], device: str) -> Array | Buffer:
    """Memory for float32 values that graphs hand to each other: on the device, if it is none."""
    return (
        np.empty(shape, np.float32)
        if device == "cpu"
        else Buffer(np.zeros(shape, np.float32), device)
    )


def on_host(value: Array | Buffer) -> Array:
    """What ``room`` holds, as an array."""
    return value.numpy() if isinstance(value, Buffer) else value


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
        away: Whether it computes elsewhere than in the host's memory.
    """

    def __init__(
        self,
        path: Path,
        provider: str = "cpu",
        threads: int | None = None,
        profile_prefix: str | None = None,
        options: Mapping[str, str] | None = None,
        *,
        optimized: bool = False,
    ) -> None:
        """Opens a graph.

        Args:
            path: The ``.onnx`` file.
            provider: A key of ``PROVIDERS``.
            threads: Threads inside one operator; None lets ONNX Runtime choose.
            profile_prefix: Writes ONNX Runtime's own profile to files that start so.
            options: What the provider is told, in ONNX Runtime's words.
            optimized: Whether there is nothing left for optimizers to do; see ``Graph``.

        Raises:
            ProviderError: The provider is unknown, not installed, did not start, or left work of
                the graph to the CPU.
            BundleError: The graph cannot be opened.
        """
        with _counting:
            _open.append(id(self))
        name = provider_name(provider)
        settings = _settings(provider, threads, profile_prefix)
        if provider == "cpu":
            try:
                if optimized:
                    # They would look for it all the same, some ten milliseconds long.
                    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
                self._session = ort.InferenceSession(str(path), settings, providers=[name])
            except Exception as error:
                raise BundleError(f"ONNX Runtime cannot open {path}: {error}") from error
        else:
            told = OPTIONS.get(provider, {}) | dict(options or {})
            self._session = _on_device(path, provider, settings, told)
        self._session.disable_fallback()
        self.device = DEVICES[provider]
        self.away = provider != "cpu"
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

    def shape(self, name: str) -> list[str | int | None]:
        """Shape of an input or output as the graph says it; a string where it may vary.

        Raises:
            BundleError: The graph has none of that name.
        """
        for node in (*self._session.get_inputs(), *self._session.get_outputs()):
            if node.name == name:
                return list(node.shape)
        raise BundleError(f"A graph has neither input nor output {name!r}; export it again.")

    @property
    def layers(self) -> range:
        """Decoder layers whose caches it takes."""
        taken = [int(name.split(".")[1]) for name in self.inputs if name.startswith(PAST)]
        return range(min(taken), max(taken) + 1) if taken else range(0)

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
        # Inputs that ONNX Runtime copies to the device as it binds them.
        self._copied: dict[str, ort.OrtValue] = {}

    def input(self, name: str, source: Array | Buffer) -> None:
        """Binds an input; the host's memory is read anew at every run."""
        value = _value(source)
        self._kept[name] = (source, value)
        there = isinstance(source, Buffer) and source.device != "cpu"
        if there or not self._session.away:
            self._binding.bind_ortvalue_input(name, value)
        else:
            self._copied[name] = value

    def output(self, name: str, target: Array | Buffer) -> None:
        """Binds an output to memory that is written in place."""
        value = _value(target)
        self._kept[name] = (target, value)
        self._binding.bind_ortvalue_output(name, value)

    def run(self, abort: Abort | None = None) -> None:
        """Runs the graph once on what is bound."""
        self._session.count()
        for name, value in self._copied.items():
            self._binding.bind_ortvalue_input(name, value)
        if self._session.away:
            self._binding.synchronize_inputs()
        self._inner.run_with_iobinding(self._binding, abort.options if abort else None)
        if self._session.away:
            self._binding.synchronize_outputs()


def _settings(provider: str, threads: int | None, profile_prefix: str | None) -> ort.SessionOptions:
    """How graphs are opened."""
    settings = ort.SessionOptions()
    # What the plugin would log is what its error says.
    settings.log_severity_level = NOTHING if provider == rtx_provider.PROVIDER else WARNINGS_ONLY
    # Two sessions of one request alternate; a spinning pool would starve the other one.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    # By itself a thread that never had work yet spins for tens of milliseconds, on the core where
    # the next graph is being opened. Versions that do not know it, 1.23 say, pass over it.
    settings.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_MICROSECONDS)
    # Every prompt and picture has its own shape; a plan per shape would only pile up memory.
    settings.enable_mem_pattern = False
    if provider == "cpu":
        with _counting:
            share_one_arena()
        settings.add_session_config_entry("session.use_env_allocators", "1")
        # Weights stay outside of it, so that they go when the graph does.
        settings.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        # Of products with weights behind DequantizeLinear, which are TensorRT's, it makes kernels
        # of its own; by default those round their inputs to 8 bits, which TensorRT does not.
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    else:
        settings.add_session_config_entry(_ASSIGNMENT, "1")
    if threads is not None:
        settings.intra_op_num_threads = threads
    if profile_prefix is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = profile_prefix
    return settings


def _on_device(
    path: Path, provider: str, settings: ort.SessionOptions, options: dict[str, str]
) -> ort.InferenceSession:
    """Opens a graph with a provider that is no fallback.

    Raises:
        ProviderError: It did not start, or leaves work of the graph to the CPU.
    """
    name = PROVIDERS[provider]
    load_packaged_libraries(provider)
    # What it would say in the log is what the error below says.
    ort.set_default_logger_severity(NOTHING)
    try:
        if provider == rtx_provider.PROVIDER:
            settings.add_provider_for_devices([rtx_provider.gpu_device(ort)], options)
            session = ort.InferenceSession(str(path), settings, enable_fallback=0)
        else:
            session = ort.InferenceSession(
                str(path), settings, providers=[(name, options)], enable_fallback=0
            )
    except ProviderError:
        raise
    except Exception as error:
        missing = loading_error(name)
        said = "" if missing else f" ONNX Runtime says: {_first_line(error)}"
        raise ProviderError(
            f"Provider '{provider}' cannot open {path.name}: "
            f"{advice(provider, missing or str(error))} Or choose another --provider.{said}"
        ) from error
    finally:
        ort.set_default_logger_severity(WARNINGS)
    running = session.get_providers()
    if not running or running[0] != name:
        words = loading_error(name) or ""
        raise ProviderError(
            f"Provider '{provider}' did not start for {path.name}, and the CPU does not stand in "
            f"for it: {advice(provider, words)} Or choose another --provider."
        )
    left = _left_to_the_cpu(session)
    if left:
        raise ProviderError(
            f"Provider '{provider}' leaves {', '.join(left)} of {path.name} to the CPU. Export the "
            f"bundle for it with --target {provider}, or choose another --provider."
        )
    return session


_ASSIGNMENT = "session.record_ep_graph_assignment_info"


def _left_to_the_cpu(session: ort.InferenceSession) -> list[str]:
    """Operators of a graph that the CPU would compute though they are work."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        # Before onnxruntime 1.24 it cannot be asked.
        return []
    return sorted(
        {
            node.op_type
            for part in session.get_provider_graph_assignment_info()
            if part.ep_name == PROVIDERS["cpu"]
            for node in part.get_nodes()
            if node.op_type in HEAVY
        }
    )


def loading_error(name: str) -> str | None:
    """Why a provider's library does not load; None where it does, or where there is none.

    Args:
        name: ONNX Runtime's name of it.
    """
    stem = name.removesuffix("ExecutionProvider").lower()
    library = Path(ort.__file__).parent / "capi" / f"libonnxruntime_providers_{stem}.so"
    if not library.is_file():
        return None
    try:
        shared = library.with_name("libonnxruntime_providers_shared.so")
        ctypes.CDLL(str(shared), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


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
    if provider == rtx_provider.PROVIDER:
        rtx_provider.require(ort)
        return name
    available = ort.get_available_providers()
    if name not in available:
        raise ProviderError(
            f"Provider '{provider}' ({name}) is not in this onnxruntime {ort.__version__}, which "
            f"has {', '.join(available)}: {how_to_get(provider, this_jetson(), machine())}. "
            "Or choose another --provider."
        )
    return name
