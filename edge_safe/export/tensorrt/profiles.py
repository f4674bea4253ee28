"""For which shapes the engines of a bundle are built, and which graphs get none.

Language graphs have two profiles: prompts, a chunk at a time, and single tokens. Those of towers
reach from the smallest input that the tower was compared with torch on to several times the
largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from edge_safe.errors import ExportError
from edge_safe.runtime.bundle import ON_THE_HOST
from edge_safe.runtime.cache import STEP
from edge_safe.runtime.engines.plan import EnginePlan, Profile, Range
from edge_safe.runtime.manifest import LANGUAGE, Graph, Manifest, Tensor
from edge_safe.runtime.prefill import CHUNK

# Operators that no release reads, or whose outputs have a size that only the data tells.
UNREAD = {"Compress", "DFT", "NonZero", "Unique"}

# How far beyond the largest case of a tower its engine reaches, and what no case is below.
GROWTH = 4

# Columns of the gate beyond the context, for turns that were refused. A conversation with more of
# them is answered no more: the gate fails closed.
REFUSED = 2048

# Numbers of a grid, and how many an input may hold that sizes are looked for in.
GRID, MOST_VALUES = 3, 8

# Prompts are read from here on without loss of speed for shorter ones.
LIKELY = 256

Feeds = Mapping[str, npt.NDArray[np.generic]]


def why_no_engine(path: Path) -> str | None:
    """What keeps a graph from becoming an engine; None where nothing is known to."""
    model = onnx.load(str(path), load_external_data=False)
    unread = sorted({node.op_type for node in model.graph.node} & UNREAD)
    return f"TensorRT does not read {', '.join(unread)}" if unread else None


def language_plan(graph: Graph, manifest: Manifest) -> EnginePlan:
    """Profiles of a graph of the language model."""
    context = manifest.model.context_length
    chunk = context if manifest.model.bidirectional != "none" else min(CHUNK, context)
    likely, room = min(LIKELY, chunk), min(STEP, context)
    prompts = {
        "batch": (1, 1, 1),
        "sequence": (1, likely, chunk),
        "total": (1, likely, context),
        "capacity": (room, room, context),
        # Refused turns leave the model's caches and stay in the gate's columns.
        "gate_past": (0, 0, context + REFUSED),
        "gate_total": (1, likely, context + REFUSED + chunk),
    }
    # Were least and greatest the same, a builder would keep the weights once more, rewritten.
    tokens = prompts | {"sequence": (1, 1, 2), "gate_past": (0, 0, 1), "gate_total": (1, 1, 3)}
    profiles = [
        Profile(
            {
                tensor.name: Range(*(tuple(_sizes(tensor.shape, sizes, n)) for n in range(3)))
                for tensor in graph.inputs
                if any(isinstance(size, str) for size in tensor.shape)
            }
        )
        for sizes in (prompts, tokens)
    ]
    return EnginePlan(tuple(profiles), fp16=graph.precision != "fp32")


def tower_plan(graph: Graph, cases: Iterable[Feeds]) -> EnginePlan:
    """The profile of a tower, from inputs that it was compared with torch on.

    Of an input of a fixed size that holds whole numbers the values are given: they may say what
    size something else has. Where they are a picture's grid, as many patches go with each range as
    the grid has places: a builder refuses two that contradict each other.
    """
    seen = list(cases)
    grid = _grid(graph, seen)
    ranges = {}
    for tensor in graph.inputs:
        if _is_free(tensor):
            sizes = np.array([feeds[tensor.name].shape for feeds in seen])
            free = np.array([isinstance(size, str) for size in tensor.shape])
            growth = np.where(free, GROWTH, 1)
        elif _holds_values(tensor):
            sizes = np.array([feeds[tensor.name].reshape(-1) for feeds in seen])
            growth = np.full(sizes.shape[1], GROWTH)
        else:
            continue
        if tensor.name == grid:
            growth = np.array([1, math.isqrt(GROWTH), math.isqrt(GROWTH)])
        largest = sizes.max(axis=0)
        ranges[tensor.name] = np.array([sizes.min(axis=0), largest, largest * growth])
    if grid is not None:
        for tensor in graph.inputs:
            for axis in _patches(tensor, grid, seen):
                ranges[tensor.name][:, axis] = ranges[grid].prod(axis=1)
    shapes = {name: Range(*(tuple(map(int, row)) for row in own)) for name, own in ranges.items()}
    return EnginePlan((Profile(shapes),), fp16=graph.precision != "fp32")


def _is_free(tensor: Tensor) -> bool:
    return any(isinstance(size, str) for size in tensor.shape)


def _holds_values(tensor: Tensor) -> bool:
    """Whether an input's numbers may be sizes of something."""
    return (
        tensor.dtype == "int64"
        and not _is_free(tensor)
        and math.prod(map(int, tensor.shape)) <= MOST_VALUES
    )


def _grid(graph: Graph, cases: list[Feeds]) -> str | None:
    """The input that says into how many (frames, rows, columns) of patches a picture is cut."""
    for tensor in graph.inputs:
        if (
            _holds_values(tensor)
            and math.prod(map(int, tensor.shape)) == GRID
            and any(_patches(other, tensor.name, cases) for other in graph.inputs)
        ):
            return tensor.name
    return None


def _patches(tensor: Tensor, grid: str, cases: list[Feeds]) -> list[int]:
    """Free axes of an input that in every case are as long as a grid has places."""
    return [
        axis
        for axis, size in enumerate(tensor.shape)
        if isinstance(size, str)
        and all(feeds[tensor.name].shape[axis] == feeds[grid].prod() for feeds in cases)
    ]


def plan_engines(
    folder: Path, manifest: Manifest, cases: Mapping[str, Iterable[Feeds]]
) -> tuple[dict[str, EnginePlan], dict[str, str]]:
    """Plans the engines of a bundle.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        cases: Inputs of each tower.

    Returns:
        The plans by graph, and of every other graph why it runs on the CPU.

    Raises:
        ExportError: TensorRT does not read a graph of the language model.
    """
    plans, left = {}, dict.fromkeys(ON_THE_HOST, "it looks up rows, which is the host's work")
    for name, graph in manifest.graphs.items():
        if name in left:
            continue
        reason = why_no_engine(folder / graph.file)
        if reason is not None and name in LANGUAGE:
            raise ExportError(f"No engine can be built of {name}: {reason}.")
        if reason is not None:
            left[name] = reason
        elif name in LANGUAGE:
            plans[name] = language_plan(graph, manifest)
        else:
            plans[name] = tower_plan(graph, cases[name])
    return plans, left


def _sizes(
    shape: list[int | str], sizes: Mapping[str, tuple[int, int, int]], which: int
) -> Iterable[int]:
    return (size if isinstance(size, int) else sizes[size][which] for size in shape)
