"""Compares an engine with the graph it was built from, on the device that will use it.

A builder may choose other types for a graph's values than the graph says, and a verdict that moved
unseen would be worse than none. The inputs are made up: what counts is that both compute the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from edge_safe.errors import ProviderError
from edge_safe.runtime.engines.plan import EnginePlan
from edge_safe.runtime.gate import EARLY_PRESENT
from edge_safe.runtime.manifest import Graph, Tensor
from edge_safe.runtime.session import Array

# Largest difference, relative to the largest value of an output; what float16 leaves of pebble's
# caches is 0.002, quantized weights are the same on both sides.
TOLERANCE = 0.03

OUTLYING = 1000.0
_STATES = ("inputs_embeds", "hidden_states", "gate_states.", "gate_past", EARLY_PRESENT)

_DTYPES = {"float32": np.float32, "float16": np.float16, "int64": np.int64, "int32": np.int32}


class Runs(Protocol):
    """What runs a graph on arrays."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""


def require_agreement(name: str, graph: Graph, plan: EnginePlan, engine: Runs, host: Runs) -> None:
    """Runs both on the shapes that the engine is to be fastest for.

    Args:
        name: Of the graph, for messages.
        graph: Its inputs and outputs.
        plan: The shapes.
        engine: What was built.
        host: The graph on the CPU.

    Raises:
        ProviderError: They differ, or the engine gives what is no number where the graph does not.
    """
    for number, outlying in itertools.product(range(len(plan.profiles)), (False, True)):
        feeds = made_up(graph, plan, number, outlying=outlying)
        found, wanted = engine.run(feeds), host.run(feeds)
        for output in graph.outputs:
            difference = _difference(found[output.name], wanted[output.name])
            if not difference <= TOLERANCE:
                raise ProviderError(
                    f"The engine of {name} differs from its graph by {difference:.3g} of the "
                    f"largest value of {output.name} (allowed: {TOLERANCE}), so it is not used. "
                    "Export the bundle with --precision fp32, or choose another --provider."
                )


def made_up(
    graph: Graph, plan: EnginePlan, profile: int, *, outlying: bool = False
) -> dict[str, Array]:
    """Inputs of a profile's likeliest shapes, the same at every call.

    Masks are 1, positions count up, caches are empty, all other numbers are random.

    Args:
        graph: The graph.
        plan: The shapes.
        profile: Number of the profile.
        outlying: Whether a few numbers of the first position are beyond what float16 can square, as
            those of language models are.
    """
    shapes = plan.profiles[profile].shapes
    chance = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for tensor in graph.inputs:
        fixed = [size for size in tensor.shape if isinstance(size, int)]
        if len(fixed) == len(tensor.shape):
            values = np.array(shapes[tensor.name].opt) if tensor.name in shapes else None
            feeds[tensor.name] = _fill(tensor, tuple(fixed), chance, values)
        else:
            feeds[tensor.name] = _fill(tensor, shapes[tensor.name].opt, chance, None)
        if outlying and tensor.name.startswith(_STATES):
            feeds[tensor.name][..., :1, :3] *= OUTLYING
    return feeds


def _fill(
    tensor: Tensor, shape: tuple[int, ...], chance: np.random.Generator, values: Array | None
) -> Array:
    dtype = _DTYPES[tensor.dtype]
    if values is not None:
        return values.reshape(shape).astype(dtype)
    if tensor.name in ("position_ids", "attention_end"):
        return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
    if tensor.name == "attention_mask":
        return np.ones(shape, dtype)
    if tensor.name.startswith("past_key_values."):
        return np.zeros(shape, dtype)
    if dtype in (np.int64, np.int32):
        return np.ones(shape, dtype)
    return chance.normal(size=shape).astype(dtype)


def _difference(found: Array, wanted: Array) -> float:
    """Largest difference relative to the largest magnitude; infinite where only one is finite."""
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    if found.shape != wanted.shape or not np.array_equal(np.isfinite(found), np.isfinite(wanted)):
        return float("inf")
    finite = np.isfinite(wanted)
    if not finite.any():
        # Nothing was compared.
        return float("inf")
    gap = np.abs(found[finite] - wanted[finite]).max()
    return float(gap / max(np.abs(wanted[finite]).max(), 1e-6))
