"""Causal attention of grouped heads over caches that are written in place.

A cache has places for more positions than it holds. New keys and values are put where their row
ends, as the kernel of that name does on the CPU, and places that hold nothing are masked: so the
shapes stay the same from token to token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from edge_safe.errors import ExportError
from edge_safe.export.graphs.attention import HALF_REACH
from edge_safe.export.graphs.builder import FLOAT, GraphBuilder
from edge_safe.export.graphs.spans import HIDDEN
from edge_safe.export.tensorrt.lowering import Lowering, attributes
from edge_safe.export.tensorrt.operators.rotary_embedding import turn

# Places of the kernel's inputs.
_CACHES, _TABLES, _BIAS = (3, 4), (7, 8, 9), 10
_NOT_LOWERED = ("softcap", "smooth_softmax", "rotary_interleaved")


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads of queries, heads of keys, and their width."""

    query: int
    key: int
    width: int


def lower(low: Lowering, node: onnx.NodeProto) -> None:
    """Emits the attention and both caches.

    Raises:
        ExportError: The cache is kept in whole numbers.
    """
    g, scope, found = low.g, node.name, attributes(node)
    caches = [node.input[slot] for slot in _CACHES]
    if "kv_cache_bit_width" in found:
        raise ExportError("TensorRT's graphs keep keys and values as fp32 or fp16, not as int8.")
    for name in _NOT_LOWERED:
        if found.get(name, 0):
            raise ExportError(f"{scope} has {name}, which is not lowered for TensorRT.")
    # What hides positions outside a window stands in the attribute as well.
    extra = [value for slot, value in enumerate(node.input) if slot > _BIAS and value]
    if extra or (len(node.input) > _BIAS and node.input[_BIAS] and window_of(found) <= 0):
        raise ExportError(f"{scope} has inputs that are not lowered for TensorRT.")
    width = _width(low, caches[0])
    shape = Shape(found["num_heads"], found["kv_num_heads"], width)
    query, key, value = _heads(low, node, shape)
    if found.get("do_rotary", 0):
        cosine, sine = (low.value(node.input[slot]) for slot in _TABLES[:2])
        rotary = 2 * low.source.tensor(node.input[_TABLES[0]]).dims[1]
        tables = (node.input[_TABLES[2]], cosine, sine)
        query, key = (
            turn(low, heads, tables, f"{scope}/{part}", (rotary, width))
            for heads, part in ((query, "query"), (key, "key"))
        )
    present = []
    for slot, new in enumerate((key, value)):
        part = g.op("Transpose", [new], scope=f"{scope}/new", perm=[0, 2, 1, 3])
        places = g.once(
            f"cache/places.{shape.key}.{width}", lambda: _write_places(g, shape.key, width)
        )
        inputs = [caches[slot], places, _kept(low, part, scope)]
        grown = node.output[1 + slot]
        present.append(g.op("ScatterElements", inputs, scope=scope, outputs=[grown], axis=2))
        if low.half:
            low.float_of(grown, g.op("Cast", [grown], scope=f"{scope}/float", to=FLOAT))
    mixed = _attend(low, query, present, shape, found, scope)
    g.op("Identity", [mixed], scope=scope, outputs=[node.output[0]])


def window_of(found: dict[str, Any]) -> int:
    """Positions that a position sees at most; -1 for all before it."""
    return int(found.get("local_window_size", -1))


def _width(low: Lowering, cache: str) -> int:
    """Width of a head."""
    value = next(value for value in low.source.graph.input if value.name == cache)
    return int(value.type.tensor_type.shape.dim[3].dim_value)


def _kept(low: Lowering, part: str, scope: str) -> str:
    """New keys or values in the cache's type; what is beyond its range is cut off."""
    if not low.half:
        return part
    low_end, high_end = low.g.floats(-HALF_REACH), low.g.floats(HALF_REACH)
    within = low.g.op("Clip", [part, low_end, high_end], scope=f"{scope}/new")
    return low.typed(within, scope)


def _heads(low: Lowering, node: onnx.NodeProto, shape: Shape) -> list[str]:
    """Queries, keys and values as float32 heads (B, S, heads, D), of one value or of three."""
    g, scope = low.g, f"{node.name}/heads"
    parts = [low.value(name) for name in node.input[:3]]
    if not parts[1]:
        names = [f"{scope}/{part}" for part in ("query", "key", "value")]
        sizes = [shape.query * shape.width, *[shape.key * shape.width] * 2]
        g.op("Split", [parts[0], g.constant(sizes)], scope=scope, outputs=names, axis=-1)
        parts = names
    return [
        g.op("Reshape", [part, g.constant([0, 0, heads, shape.width])], scope=scope)
        for part, heads in zip(parts, (shape.query, shape.key, shape.key), strict=True)
    ]


def _attend(
    low: Lowering,
    query: str,
    present: list[str],
    shape: Shape,
    found: dict[str, Any],
    scope: str,
) -> str:
    """(B, S, query heads * D) of queries (B, S, heads, D) over caches (B, key heads, C, D)."""
    g, group = low.g, shape.query // shape.key
    scaled = g.op("Mul", [query, g.floats(found["scale"])], scope=scope)
    split = g.constant([0, 0, shape.key, group, shape.width])
    rows = g.op("Reshape", [scaled, split], scope=scope)
    rows = g.op("Transpose", [rows], scope=scope, perm=[0, 2, 3, 1, 4])
    real = g.once("cache/real", lambda: _real(low))
    # What was forgotten may be no number, and 0 * NaN would reach the sum.
    values = g.op("Where", [real, present[1], _nothing(low)], scope=scope)
    keys, values = (
        g.op("Unsqueeze", [part, g.constant([2])], scope=scope) for part in (present[0], values)
    )
    columns = g.op("Transpose", [keys], scope=scope, perm=[0, 1, 2, 4, 3])
    score = low.product(rows, columns, f"{scope}/score")
    window = window_of(found)
    seen = g.once(f"cache/seen.{window}", lambda: _seen(g, window))
    score = g.op("Where", [seen, score, g.floats(HIDDEN)], scope=scope)
    share = g.op("Softmax", [score], scope=scope, axis=-1)
    mixed = low.product(share, values, f"{scope}/mixed")
    mixed = g.op("Transpose", [mixed], scope=scope, perm=[0, 3, 1, 2, 4])
    return g.op("Reshape", [mixed, g.constant([0, 0, shape.query * shape.width])], scope=scope)


def _first_new(g: GraphBuilder) -> str:
    """(B, 1) int64 place of each row's first new position; 0 where a row is shorter than they."""

    def make() -> str:
        scope = "cache/start"
        length = g.op("ReduceSum", ["attention_mask", g.constant([1])], scope=scope, keepdims=1)
        count = g.op("Shape", ["position_ids"], scope=scope, start=-1)
        start = g.op("Sub", [length, count], scope=scope)
        return g.op("Max", [start, g.constant(0)], scope=scope)

    return g.once("cache/start", make)


def _new_places(g: GraphBuilder) -> str:
    """(B, S) int64 place of each new position."""

    def make() -> str:
        scope = "cache/new"
        count = g.op("Shape", ["position_ids"], scope=scope, start=-1)
        count = g.op("Squeeze", [count, g.constant([0])], scope=scope)
        steps = g.op("Range", [g.constant(0), count, g.constant(1)], scope=scope)
        return g.op("Add", [_first_new(g), steps], scope=scope)

    return g.once("cache/new", make)


def _write_places(g: GraphBuilder, heads: int, width: int) -> str:
    """(B, heads, S, D) int64 place that each new value is written to."""
    scope = f"cache/places.{heads}.{width}"
    places = g.op("Unsqueeze", [_new_places(g), g.constant([1, 3])], scope=scope)
    return g.op("Expand", [places, g.constant([1, heads, 1, width])], scope=scope)


def _nothing(low: Lowering) -> str:
    """0 in the cache's type."""
    return low.g.constant(0.0, np.float16 if low.half else np.float32)


def _key_places(g: GraphBuilder) -> str:
    """(C,) int64 places of a cache."""

    def make() -> str:
        scope = "cache/keys"
        first = next(name for name in g.inputs if name.startswith("past_key_values."))
        size = g.op("Shape", [first], scope=scope, start=2, end=3)
        size = g.op("Squeeze", [size, g.constant([0])], scope=scope)
        return g.op("Range", [g.constant(0), size, g.constant(1)], scope=scope)

    return g.once("cache/keys", make)


def _real(low: Lowering) -> str:
    """(B, 1, C, 1) bool: which places hold something."""
    g, scope = low.g, "cache/real"
    length = g.op("ReduceSum", ["attention_mask", g.constant([1])], scope=scope, keepdims=1)
    held = g.op("Less", [_key_places(g), length], scope=scope)
    return g.op("Unsqueeze", [held, g.constant([1, 3])], scope=scope)


def _seen(g: GraphBuilder, window: int) -> str:
    """(B, 1, 1, S, C) bool: which places each new position sees."""
    scope, key = f"cache/seen.{window}", _key_places(g)
    own = g.op("Unsqueeze", [_new_places(g), g.constant([1, 2, 4])], scope=scope)
    seen = g.op("LessOrEqual", [key, own], scope=scope)
    if window > 0:
        near = g.op("Sub", [own, key], scope=scope)
        near = g.op("Less", [near, g.constant(window)], scope=scope)
        seen = g.op("And", [seen, near], scope=scope)
    return seen
