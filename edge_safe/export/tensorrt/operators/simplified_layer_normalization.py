"""x / sqrt(mean(x²) + eps) * weight, over the last axis."""

from __future__ import annotations

import onnx

from edge_safe.export.tensorrt.lowering import Lowering, attributes


def lower(low: Lowering, node: onnx.NodeProto) -> None:
    """Emits the norm."""
    x, weight = (low.value(name) for name in node.input)
    normalize(low, x, weight, attributes(node)["epsilon"], node.name, node.output[0])


def normalize(low: Lowering, x: str, weight: str, eps: float, scope: str, output: str) -> None:
    """RMSNorm of x in its own type (float32 everywhere but in products)."""
    g = low.g
    # A power, since TensorRT's provider keeps those in front of a mean in float32 when it is told.
    square = g.op("Pow", [x, g.floats(2.0)], scope=scope)
    mean = g.op("ReduceMean", [square, g.constant([-1])], scope=scope, keepdims=1)
    root = g.op("Sqrt", [g.op("Add", [mean, g.floats(eps)], scope=scope)], scope=scope)
    share = g.op("Div", [x, root], scope=scope)
    g.op("Mul", [share, weight], scope=scope, outputs=[output])
