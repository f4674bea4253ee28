"""Rotary embedding of heads, halves rotated, as rows of two tables tell."""

from __future__ import annotations

import onnx

from edge_safe.errors import ExportError
from edge_safe.export.tensorrt.lowering import Lowering, attributes


def lower(low: Lowering, node: onnx.NodeProto) -> None:
    """Emits the rotation of x (B, S, heads * D) by rows (B, S) of tables (rows, D / 2)."""
    x, rows, cosine, sine = (low.value(name) for name in node.input)
    found = attributes(node)
    if found.get("interleaved", 0):
        raise ExportError(f"{node.name} interleaves what it rotates, which is not lowered.")
    g, scope = low.g, node.name
    heads = g.op("Reshape", [x, g.constant([0, 0, found["num_heads"], -1])], scope=scope)
    turned = turn(low, heads, (rows, cosine, sine), scope)
    shape = g.op("Shape", [x], scope=scope)
    g.op("Reshape", [turned, shape], scope=scope, outputs=[node.output[0]])


def turn(
    low: Lowering,
    x: str,
    tables: tuple[str, str, str],
    scope: str,
    widths: tuple[int, int] | None = None,
) -> str:
    """Rotates heads (B, S, heads, D).

    Args:
        low: The graph.
        x: The heads, float32.
        tables: Rows (B, S), cosine and sine, each (rows, R / 2).
        scope: Place in the model.
        widths: R and D where only the first R of a head's D values are turned.

    Returns:
        (B, S, heads, D).
    """
    g, (rows, cosine, sine) = low.g, tables

    def picked(table: str) -> str:
        """(B, S, 1, R / 2), made once for all layers."""

        def pick() -> str:
            found = g.op("Gather", [table, rows], scope=f"{table}/rows", axis=0)
            return g.op("Unsqueeze", [found, g.constant([2])], scope=f"{table}/rows")

        return g.once(f"{table}/rows.{rows}", pick)

    def times(a: str, b: str) -> str:
        return g.op("Mul", [a, b], scope=scope)

    cos, sin = picked(cosine), picked(sine)
    parts = [f"{scope}/left", f"{scope}/right"]
    rest = []
    if widths is None or widths[0] == widths[1]:
        g.op("Split", [x], scope=scope, outputs=parts, axis=3, num_outputs=2)
    else:
        rest = [f"{scope}/rest"]
        sizes = g.constant([widths[0] // 2, widths[0] // 2, widths[1] - widths[0]])
        g.op("Split", [x, sizes], scope=scope, outputs=parts + rest, axis=3)
    left, right = parts
    first = g.op("Sub", [times(left, cos), times(right, sin)], scope=scope)
    second = g.op("Add", [times(right, cos), times(left, sin)], scope=scope)
    return g.op("Concat", [first, second, *rest], scope=scope, axis=3)
