"""Attention of towers: all heads alike, with a mask, a bias or a cache where they have one."""

from __future__ import annotations

import numpy as np
import onnx

from edge_safe.errors import ExportError
from edge_safe.export.graphs.spans import HIDDEN
from edge_safe.export.tensorrt.lowering import Lowering, attributes

_INPUTS = ("query", "key", "value", "projection_bias", "mask", "bias", "past_key", "past_value")


def lower(low: Lowering, node: onnx.NodeProto) -> None:
    """Emits the attention.

    Raises:
        ExportError: It has a bias of its projections, which our own graphs never have.
    """
    g, scope, found = low.g, node.name, attributes(node)
    given = {name: low.value(value) for name, value in zip(_INPUTS, node.input, strict=False)}
    if given.get("projection_bias"):
        raise ExportError(f"{node.name} has a bias of its projections, which is not lowered.")
    heads = int(found["num_heads"])
    query, key, value = (
        _parted(low, given[part], heads, node.input[slot], scope)
        for slot, part in enumerate(("query", "key", "value"))
    )
    if given.get("past_key"):
        key, value = (
            g.op("Concat", [given[f"past_{part}"], new], scope=scope, outputs=[output], axis=2)
            for part, new, output in zip(
                ("key", "value"), (key, value), node.output[1:3], strict=True
            )
        )
    if "scale" in found:
        query = g.op("Mul", [query, g.floats(found["scale"])], scope=scope)
    else:
        width = g.op("Shape", [query], scope=f"{scope}/width", start=3, end=4)
        width = g.op("Cast", [width], scope=f"{scope}/width", to=1)
        root = g.op("Sqrt", [width], scope=f"{scope}/width")
        query = g.op("Div", [query, root], scope=scope)
    columns = g.op("Transpose", [key], scope=scope, perm=[0, 1, 3, 2])
    score = low.product(query, low.typed(columns, scope), f"{scope}/score")
    if given.get("bias"):
        score = g.op("Add", [score, given["bias"]], scope=scope)
    if given.get("mask"):
        # (B, T) int32, 0 where nobody looks.
        seen = g.op("Greater", [given["mask"], g.constant(0, np.int32)], scope=scope)
        seen = g.op("Unsqueeze", [seen, g.constant([1, 2])], scope=scope)
        score = g.op("Where", [seen, score, g.floats(HIDDEN)], scope=scope)
    if found.get("unidirectional", 0):
        score = g.op("Where", [_earlier(low, score, scope), score, g.floats(HIDDEN)], scope=scope)
    share = g.op("Softmax", [score], scope=scope, axis=-1)
    mixed = low.product(share, low.typed(value, scope), f"{scope}/mixed")
    mixed = g.op("Transpose", [mixed], scope=scope, perm=[0, 2, 1, 3])
    g.op("Reshape", [mixed, g.constant([0, 0, -1])], scope=scope, outputs=[node.output[0]])


def _parted(low: Lowering, x: str, heads: int, name: str, scope: str) -> str:
    """(B, S, c) -> (B, heads, S, D); keys and values of a cache come so."""
    if low.rank(name) == 4:
        return x
    parted = low.g.op("Reshape", [x, low.g.constant([0, 0, heads, -1])], scope=scope)
    return low.g.op("Transpose", [parted], scope=scope, perm=[0, 2, 1, 3])


def _earlier(low: Lowering, score: str, scope: str) -> str:
    """(S, T) bool: whether a key stands no later than a query, the last of both together."""
    g, scope = low.g, f"{scope}/earlier"

    def count(axis: int) -> str:
        size = g.op("Shape", [score], scope=scope, start=axis, end=axis + 1)
        return g.op("Squeeze", [size, g.constant([0])], scope=scope)

    queries, keys = count(2), count(3)
    zero, one = g.constant(0), g.constant(1)
    first = g.op("Sub", [keys, queries], scope=scope)
    query = g.op("Add", [g.op("Range", [zero, queries, one], scope=scope), first], scope=scope)
    query = g.op("Unsqueeze", [query, g.constant([1])], scope=scope)
    key = g.op("Range", [zero, keys, one], scope=scope)
    return g.op("LessOrEqual", [key, query], scope=scope)
