"""A product of rows with a weight that is stored in 16 bits is made in 16 bits."""

from __future__ import annotations

import onnx

from edge_safe.export.graphs.builder import FLOAT, FLOAT16
from edge_safe.export.tensorrt.lowering import Lowering, attributes


def lower(low: Lowering, node: onnx.NodeProto) -> None:
    """Emits the product; what is added to it stays in float32."""
    weight = low.half_weight(node.input[1])
    if weight is None or not low.half:
        low.copy(node)
        return
    g, scope = low.g, node.name
    x = low.cast(low.value(node.input[0]), FLOAT16, scope)
    made = g.op("Gemm", [x, low.value(weight)], scope=f"{scope}/half", **attributes(node))
    if len(node.input) > 2:
        made = g.op("Cast", [made], scope=scope, to=FLOAT)
        g.op("Add", [made, low.value(node.input[2])], scope=scope, outputs=list(node.output))
    else:
        g.op("Cast", [made], scope=scope, outputs=list(node.output), to=FLOAT)
