"""Engines of TensorRT for RTX, built ahead of time and without a GPU.

The builder reads a graph of standard operators and writes one file for every GPU named. The rest of
the compilation is done on that GPU when the engine is loaded, so a file that was built here has not
been run. What the record says of memory are the builder's own figures: an engine can be opened, and
asked, only where there is a GPU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from edge_safe.errors import ExportError
from edge_safe.export.tensorrt.capabilities import (
    CAPABILITIES,
    USUAL,
    Capability,
    capability_named,
    check_types,
)
from edge_safe.export.tensorrt.rtx_callbacks import (
    Log,
    make_logger,
    make_monitor,
    make_writer,
    undisturbed,
)
from edge_safe.export.tensorrt.rtx_layers import computing, matrices_of, operands_of

__all__ = [
    "CAPABILITIES",
    "USUAL",
    "EngineRecord",
    "Profile",
    "Shape",
    "build_engine",
    "capability_named",
]

Shape = tuple[int, ...]

# How many of a parser's complaints are spelled out.
SHOWN = 8


@dataclass(frozen=True, slots=True)
class Profile:
    """Shapes that an engine is made ready for.

    A length whose least value is also its greatest makes the builder keep a second copy of fp16 and
    fp32 weights for this profile alone (measured: twice the file). Give decoding 1 to 2, not 1.

    Attributes:
        shapes: Least, likeliest and greatest shape of every input that has a free dimension.
        values: Least, likeliest and greatest numbers in inputs of a fixed shape that hold whole
            numbers; asked for where they set the shape of something else, else left aside.
    """

    shapes: Mapping[str, tuple[Shape, Shape, Shape]]
    values: Mapping[str, tuple[Shape, Shape, Shape]] = field(default_factory=dict)


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
        profiles: Least, likeliest and greatest shape by input, for each profile; of inputs that set
            shapes, these numbers.
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
    with undisturbed() as halted:
        record = _built(trt, graph, out, rows, profiles, progress, halted)
    progress(1.0)
    return record


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
    log = Log()
    builder = trt.Builder(make_logger(log))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    # The parser holds what the network's weights point to, so it has to live as long.
    if not parser.parse_from_file(str(graph)):
        raise ExportError(_complaints(parser, graph, trt.__version__))
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    for row in rows:
        check_types(layers, row, graph)
    # A graph without free dimensions needs no profile; one with them is told which are missing.
    for number, profile in enumerate(profiles or [Profile({})]):
        _check_profile(network, profile, number, graph)
    profiles = [_needed(network, profile) for profile in profiles]
    config = _configuration(trt, builder, rows, profiles)
    part = out.with_name(f".{out.name}.part")
    try:
        with part.open("wb") as file:
            config.progress_monitor = make_monitor(progress, halted)
            writer = make_writer(file, halted)
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
    operands = operands_of(layers)
    return EngineRecord(
        graph=graph.name,
        engine=out.name,
        capabilities=[row.name for row in rows],
        bytes=size,
        seconds=round(time.perf_counter() - start, 3),
        layers=computing(layers, operands),
        matrices=matrices_of(operands),
        weight_bytes=log.weights[0] if len(log.weights) == 1 else None,
        activation_bytes=log.activations if len(log.activations) == max(len(profiles), 1) else None,
        profiles=[
            {
                name: [list(shape) for shape in three]
                for name, three in {**profile.shapes, **profile.values}.items()
            }
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


def _check_profile(network: Any, profile: Profile, number: int, graph: Path) -> None:
    """The builder ignores unknown names and explains an order of sizes by a missing driver."""
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    inputs = {tensor.name: tuple(tensor.shape) for tensor in tensors}
    where = f"Profile {number} of {graph.name}"
    for name in (*profile.shapes, *profile.values):
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


def _needed(network: Any, profile: Profile) -> Profile:
    """A profile without the numbers that set no shape, which the builder would not take."""
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    setting = {tensor.name for tensor in tensors if tensor.is_shape_tensor}
    kept = {name: three for name, three in profile.values.items() if name in setting}
    return Profile(profile.shapes, kept)


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
        for name, (least, likeliest, greatest) in profile.values.items():
            shapes.set_shape_input(name, least, likeliest, greatest)
        config.add_optimization_profile(shapes)
    return config
