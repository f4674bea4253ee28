"""x * sigmoid(alpha * x); with alpha 1 that is SiLU."""

from __future__ import annotations

import onnx

from edge_safe.export.tensorrt.lowering import Lowering, attributes


def lower(low: Lowering, node: onnx.NodeProto) -> None:
    """Emits the activation."""
    g, x, alpha = low.g, low.value(node.input[0]), attributes(node)["alpha"]
    scaled = x if alpha == 1 else g.op("Mul", [x, g.floats(alpha)], scope=node.name)
    share = g.op("Sigmoid", [scaled], scope=node.name)
    g.op("Mul", [x, share], scope=node.name, outputs=[node.output[0]])
