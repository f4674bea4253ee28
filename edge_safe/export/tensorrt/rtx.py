"""Engines of TensorRT for RTX, built ahead of time and without a GPU.

The builder reads a graph of standard operators and writes one file for every GPU named. The rest of
the compilation is done on that GPU when the engine is loaded, so a file that was built here has not
been run. What the record says of memory are the builder's own figures: an engine can be opened, and
asked, only where there is a GPU.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import msgspec

from edge_safe.errors import ExportError

Shape = tuple[int, ...]

# How many of a parser's complaints are spelled out.
SHOWN = 8


@dataclass(frozen=True, slots=True)
class Capability:
    """One row of the table.

    Attributes:
        name: What ``--capability`` says, and the builder.
        gpus: GPUs that have it, for example.
        refuses: What cannot be compiled for it.
    """

    name: str
    gpus: str
    refuses: tuple[str, ...] = ()


PRODUCTS = "fp32 matrix products"
INT4 = "int4 weights"
BF16 = "bf16 values"

# Names: tensorrt-rtx 1.7.1's own; GPUs: developer.nvidia.com/cuda-gpus. What Turing refuses is what
# the builder of 1.7.1 says when it is asked for it.
CAPABILITIES = {
    row.name: row
    for row in (
        Capability("SM75", "GeForce RTX 20, T4", (PRODUCTS, INT4, BF16)),
        Capability("SM80", "A100, A30"),
        Capability("SM86", "GeForce RTX 30, RTX A6000, A10"),
        Capability("SM89", "GeForce RTX 40, L4, L40"),
        Capability("SM120", "GeForce RTX 50, RTX PRO Blackwell"),
        Capability("SM121", "GB10 (DGX Spark)"),
    )
}

# GeForce RTX 30, 40 and 50.
USUAL = ("SM86", "SM89", "SM120")


def capability_named(name: str) -> Capability:
    """Finds a compute capability.

    Raises:
        ExportError: TensorRT for RTX does not know it.
    """
    if name not in CAPABILITIES:
        known = ", ".join(f"{row.name} ({row.gpus})" for row in CAPABILITIES.values())
        raise ExportError(
            f"TensorRT for RTX builds no engine for {name!r}; it builds for: {known}. "
            f"For Orin (SM87) export with --target tensorrt; its engine is built on the device."
        )
    return CAPABILITIES[name]


@dataclass(frozen=True, slots=True)
class Profile:
    """Shapes that an engine is made ready for.

    A length whose least value is also its greatest makes the builder keep a second copy of fp16 and
    fp32 weights for this profile alone (measured: twice the file). Give decoding 1 to 2, not 1.

    Attributes:
        shapes: Least, likeliest and greatest shape of every input that has a free dimension.
    """

    shapes: Mapping[str, tuple[Shape, Shape, Shape]]


class EngineRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was built; part of ``report.json``.

    Attributes:
        graph: Name of the ONNX file.
        engine: Name of the engine's file.
        capabilities: Whom it was built for.
        bytes: Size of the file.
        seconds: How long parsing, building and writing took.
        layers: Layers that compute something, by the type they compute in: int8 where all that a
            matrix product multiplies is int8, else the type of what comes out.
        matrices: Matrix products and convolutions by the types they multiply, as these are kept:
            ``fp16 x int4`` dequantizes int4 weights to multiply them in fp16.
        weight_bytes: Memory that the weights take on the GPU; None if the builder did not say.
        activation_bytes: Memory that a run takes beside them, for each profile; likewise.
        profiles: Least, likeliest and greatest shape by input, for each profile.
        tensorrt_version: Release of the builder; an engine is read by this release alone.
    """

    graph: str
    engine: str
    capabilities: list[str]
    bytes: int
    seconds: float
    layers: dict[str, int]
    matrices: dict[str, int]
    weight_bytes: int | None
    activation_bytes: list[int] | None
    profiles: list[dict[str, list[list[int]]]]
    tensorrt_version: str


def build_engine(
    graph: Path,
    out: Path,
    capabilities: Sequence[str],
    profiles: Sequence[Profile],
    progress: Callable[[float], None],
) -> EngineRecord:
    """Builds one engine; its file appears whole, or an older one stays as it was.

    Types are kept as the graph has them, and fp32 is computed as such (the builder would take TF32
    for it). The memory that the builder may plan with is not limited: it does not plan another way
    under a limit, it fails.

    Args:
        graph: A graph of standard operators; its weights may stand in files beside it.
        out: The engine's file.
        capabilities: Names of rows of ``CAPABILITIES``; one file serves them all.
        profiles: In the order in which the engine numbers them; none for a graph of fixed shapes.
        progress: Told the share done, which never falls.

    Raises:
        ExportError: The package is missing, a capability is unknown or refuses what the graph has,
            a profile does not fit, the graph cannot be read or built, or the file not written.
    """
    rows = [capability_named(name) for name in dict.fromkeys(capabilities)]
    if not rows:
        raise ExportError(f"Name at least one of {', '.join(CAPABILITIES)} to build {graph.name}.")
    trt = _package()
    with _undisturbed() as halted:
        record = _built(trt, graph, out, rows, profiles, progress, halted)
    progress(1.0)
    return record


@contextmanager
def _undisturbed() -> Iterator[list[BaseException]]:
    """Keeps garbage from being collected and Ctrl-C from being lost; gives what ended the work.

    The builder calls its logger under a lock that the end of any other builder waits for. A
    collection in that call which finds a builder, for example in the traceback of a build that
    failed, would wait for ever; so none is left in a traceback either. And an exception that is
    raised in a callback goes no further, while Ctrl-C is raised in whatever Python runs first.
    """
    halted: list[BaseException] = []
    collecting = gc.isenabled()
    gc.disable()
    handler = signal.getsignal(signal.SIGINT)
    handled = callable(handler) and threading.current_thread() is threading.main_thread()

    def hold(number: int, frame: FrameType | None) -> None:
        if callable(handler):
            try:
                handler(number, frame)
            except BaseException as error:
                halted.append(error)

    if handled:
        signal.signal(signal.SIGINT, hold)
    try:
        yield halted
        if halted:
            raise halted[0]
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        if handled:
            signal.signal(signal.SIGINT, handler)
        if collecting:
            gc.enable()


def _built(
    trt: Any,
    graph: Path,
    out: Path,
    rows: Sequence[Capability],
    profiles: Sequence[Profile],
    progress: Callable[[float], None],
    halted: list[BaseException],
) -> EngineRecord:
    start = time.perf_counter()
    log = _Log()
    builder = trt.Builder(_logger(log))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    # The parser holds what the network's weights point to, so it has to live as long.
    if not parser.parse_from_file(str(graph)):
        raise ExportError(_complaints(parser, graph, trt.__version__))
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    for row in rows:
        _check_types(layers, row, graph)
    # A graph without free dimensions needs no profile; one with them is told which are missing.
    for number, profile in enumerate(profiles or [Profile({})]):
        _check_profile(network, profile, number, graph)
    config = _configuration(trt, builder, rows, profiles)
    part = out.with_name(f".{out.name}.part")
    try:
        with part.open("wb") as file:
            config.progress_monitor = _monitor(progress, halted)
            writer = _writer(file, halted)
            built = builder.build_serialized_network_to_stream(network, config, writer)
            # A callback's exception ends in the builder, which takes what was lost for written.
            if halted:
                raise halted[0]
            if not built:
                names = ", ".join(row.name for row in rows)
                raise ExportError(
                    f"TensorRT for RTX {trt.__version__} could not build {graph.name} for {names}: "
                    f"{'; '.join(log.errors) or 'it gave no reason'}. Name fewer capabilities or "
                    f"choose another precision."
                )
            file.flush()
            os.fsync(file.fileno())
        size = part.stat().st_size
        part.replace(out)
    except OSError as error:
        raise ExportError(f"The engine {out} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    operands = _operands(layers)
    return EngineRecord(
        graph=graph.name,
        engine=out.name,
        capabilities=[row.name for row in rows],
        bytes=size,
        seconds=round(time.perf_counter() - start, 3),
        layers=_computing(layers, operands),
        matrices=_matrices(operands),
        weight_bytes=log.weights[0] if len(log.weights) == 1 else None,
        activation_bytes=log.activations if len(log.activations) == max(len(profiles), 1) else None,
        profiles=[
            {name: [list(shape) for shape in shapes] for name, shapes in profile.shapes.items()}
            for profile in profiles
        ],
        tensorrt_version=str(trt.__version__),
    )


def _package() -> Any:
    try:
        import tensorrt_rtx
    except (ImportError, OSError) as error:
        raise ExportError(
            f"Engines are built by TensorRT for RTX, which cannot be loaded here ({error}). "
            f"Run: pip install 'edge-safe[tensorrt-rtx]'"
        ) from error
    return tensorrt_rtx


def _complaints(parser: Any, graph: Path, version: str) -> str:
    """All that the parser found wrong, in one message."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    lines = []
    for error in errors[:SHOWN]:
        name = error.node_name() or f"(node {error.node()})"
        place = f"{error.node_operator()} {name}: " if error.node_operator() else ""
        lines.append(place + str(error.desc()).rstrip("."))
    if len(errors) > SHOWN:
        lines.append(f"and {len(errors) - SHOWN} more")
    return (
        f"TensorRT for RTX {version} cannot read {graph.name}: {'; '.join(lines)}. With "
        f"--target cuda ONNX Runtime runs the graph."
    )


def _check_types(layers: list[Any], capability: Capability, graph: Path) -> None:
    for kind in capability.refuses:
        names = [layer.name for layer in layers if kind in _kinds(layer)]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ExportError(
                f"{capability.name} ({capability.gpus}) cannot run {kind}, which {graph.name} has "
                f"({names[0]}{more}). Leave {capability.name} out."
            )


def _kinds(layer: Any) -> Iterator[str]:
    """What a layer has that a capability may refuse."""
    types = {layer.get_output(index).dtype.name for index in range(layer.num_outputs)}
    if layer.type.name in ("MATRIX_MULTIPLY", "EINSUM") and "FLOAT" in types:
        yield PRODUCTS
    if "INT4" in types:
        yield INT4
    if "BF16" in types:
        yield BF16


def _check_profile(network: Any, profile: Profile, number: int, graph: Path) -> None:
    """The builder ignores unknown names and explains an order of sizes by a missing driver."""
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    inputs = {tensor.name: tuple(tensor.shape) for tensor in tensors}
    where = f"Profile {number} of {graph.name}"
    for name in profile.shapes:
        if name not in inputs:
            raise ExportError(
                f"{where} names {name!r}, which is no input; inputs: {', '.join(inputs)}."
            )
    for name, shape in inputs.items():
        if name not in profile.shapes:
            if -1 in shape:
                raise ExportError(f"{where} lacks the input {name!r}, whose shape is {shape}.")
            continue
        given = profile.shapes[name]
        columns = list(zip(*given, strict=False))
        if (
            {len(row) for row in given} != {len(shape)}
            or any(not low <= likely <= high for low, likely, high in columns)
            or any(
                size != -1 and {size} != set(column)
                for size, column in zip(shape, columns, strict=True)
            )
        ):
            raise ExportError(
                f"{where} gives the input {name!r} the shapes {given}; needed are a least, a "
                f"likeliest and a greatest one, in this order, that fit {shape} (-1 is free)."
            )


def _configuration(
    trt: Any, builder: Any, capabilities: Sequence[Capability], profiles: Sequence[Profile]
) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.num_compute_capabilities = len(capabilities)
    for index, row in enumerate(capabilities):
        config.set_compute_capability(trt.ComputeCapability.__members__[row.name], index)
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for name, (least, likeliest, greatest) in profile.shapes.items():
            shapes.set_shape(name, least, likeliest, greatest)
        config.add_optimization_profile(shapes)
    return config


# What the builder calls types, where this project has shorter names.
_TYPES = {"FLOAT": "fp32", "HALF": "fp16"}

# Layers that hand on what they are given; quantized weights are looked for behind them.
_HANDING_ON = {"SHUFFLE", "CAST", "IDENTITY", "SQUEEZE", "UNSQUEEZE"}

_MULTIPLYING = {"MATRIX_MULTIPLY", "EINSUM", "CONVOLUTION", "DECONVOLUTION"}


def _type(tensor: Any) -> str:
    name = str(tensor.dtype.name)
    return _TYPES.get(name, name.lower())


def _operands(layers: list[Any]) -> list[list[str]]:
    """Types that each layer multiplies; empty for those that multiply no matrices."""
    producers = {
        layer.get_output(index).name: layer
        for layer in layers
        for index in range(layer.num_outputs)
    }

    def kept(tensor: Any) -> str:
        layer = producers.get(tensor.name)
        while layer is not None and layer.type.name in _HANDING_ON:
            layer = producers.get(layer.get_input(0).name)
        if layer is not None and layer.type.name == "DEQUANTIZE":
            return _type(layer.get_input(0))
        return _type(tensor)

    found: list[list[str]] = []
    for layer in layers:
        if layer.type.name not in _MULTIPLYING:
            found.append([])
            continue
        inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
        types = [kept(tensor) for tensor in inputs if tensor is not None]
        # A convolution's own kernel is no input; it has the type of what comes out.
        found.append(types if len(types) > 1 else [*types, _type(layer.get_output(0))])
    return found


def _matrices(operands: list[list[str]]) -> dict[str, int]:
    return dict(Counter(" x ".join(types) for types in operands if types))


def _computing(layers: list[Any], operands: list[list[str]]) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for layer, types in zip(layers, operands, strict=True):
        # Constants and the parser's own helpers stand for no node of the graph, and have no origin.
        if layer.metadata and layer.num_outputs and not layer.type.name.endswith("QUANTIZE"):
            counted["int8" if set(types) == {"int8"} else _type(layer.get_output(0))] += 1
    return dict(counted)


_MEMORY = re.compile(r"Total (Activation|Weights) Memory: (\d+) bytes")


@dataclass(slots=True)
class _Log:
    """What is kept of the builder's messages."""

    errors: list[str] = field(default_factory=list)
    activations: list[int] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)


def _logger(log: _Log) -> Any:
    import tensorrt_rtx as trt

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            # Where there is no GPU it also misses the driver, whatever the reason is.
            if severity == trt.ILogger.ERROR and "CUDA driver" not in message:
                log.errors.append(message)
            if found := _MEMORY.match(message):
                kept = log.activations if found[1] == "Activation" else log.weights
                kept.append(int(found[2]))

    return Logger()


def _monitor(progress: Callable[[float], None], halted: list[BaseException]) -> Any:
    """Tells the share done: phases have steps, and a step may be a phase of its own."""
    import tensorrt_rtx as trt

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[str | None, int]] = {}
            self.done: dict[str, int] = {}
            self.told = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name] = (parent, steps)
            self.done[name] = 0

        def phase_finish(self, name: str) -> None:
            pass

        def step_complete(self, name: str, step: int) -> bool:
            self.done[name] = step + 1
            share, phase = 0.0, name
            while phase in self.phases:
                parent, steps = self.phases[phase]
                share = (self.done[phase] + share) / max(steps, 1)
                phase = parent or ""
            self.told = max(self.told, min(share, 1.0))
            try:
                progress(self.told)
            except BaseException as error:  # raised again when the builder has ended
                halted.append(error)
            return not halted

    return Monitor()


def _writer(file: BinaryIO, halted: list[BaseException]) -> Any:
    """Writes as the builder hands over: a whole engine in memory would be one copy more."""
    import tensorrt_rtx as trt

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                return 0 if halted else file.write(data)
            except BaseException as error:  # the builder would go on
                halted.append(error)
                return 0

    return Writer()
