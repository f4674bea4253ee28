"""A product with a weight that is stored in 16 bits is made in 16 bits."""

from __future__ import annotations

import onnx

from edge_safe.export.tensorrt.lowering import Lowering


def lower(low: Lowering, node: onnx.NodeProto) -> None:
    """Emits the product."""
    weight = low.half_weight(node.input[1])
    if weight is None or not low.half:
        low.copy(node)
        return
    x, scope = low.value(node.input[0]), node.name
    low.product(x, low.value(weight), scope, outputs=list(node.output))
