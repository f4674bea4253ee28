"""RMSNorm of a sum, and the sum itself."""

from __future__ import annotations

import onnx

from edge_safe.export.tensorrt.lowering import Lowering, attributes
from edge_safe.export.tensorrt.operators.simplified_layer_normalization import normalize


def lower(low: Lowering, node: onnx.NodeProto) -> None:
    """Emits the sum and its norm; the outputs are normed, two that nobody takes, sum."""
    x, residual, weight = (low.value(name) for name in node.input)
    total = low.g.op("Add", [x, residual], scope=node.name, outputs=[node.output[3]])
    normalize(low, total, weight, attributes(node)["epsilon"], node.name, node.output[0])
