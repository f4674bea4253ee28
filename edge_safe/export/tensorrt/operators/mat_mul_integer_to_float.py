"""A product with a matrix of int8, a scale per output; its inputs are not rounded any more.

On the CPU each position is rounded to 8 bits by a scale of its own. TensorRT rounds by scales that
are known beforehand or not at all, and on a GPU with few positions the weights are what costs.
"""

from __future__ import annotations

import onnx

from edge_safe.errors import ExportError
from edge_safe.export.tensorrt.lowering import Lowering


def lower(low: Lowering, node: onnx.NodeProto) -> None:
    """Emits the product of what was rounded with the weight behind DequantizeLinear.

    Raises:
        ExportError: What is multiplied is no rounded value of our own making.
    """
    x = _before_rounding(low, node)
    name = node.input[1]
    weight = low.value(name)
    scales = low.weight(node.input[3], low.steps(low.source.array(node.input[3])))
    dequantized = low.g.once(
        f"{name}/rows",
        lambda: low.g.op("DequantizeLinear", [weight, scales], scope=f"{name}/rows", axis=1),
    )
    low.product(low.value(x), dequantized, node.name, list(node.output))
    low.leave_unscaled(node.output[0])


def _before_rounding(low: Lowering, node: onnx.NodeProto) -> str:
    """What was divided by its scale and rounded."""
    rounded = low.producer(node.input[0])
    divided = None if rounded is None else low.producer(rounded.input[0])
    if (
        rounded is None
        or divided is None
        or (rounded.op_type, divided.op_type)
        != (
            "QuantizeLinear",
            "Div",
        )
    ):
        raise ExportError(f"{node.name} multiplies something else than values it has rounded.")
    return str(divided.input[0])
