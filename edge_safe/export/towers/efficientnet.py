"""The object encoder, with batch normalization folded into its convolutions."""

from __future__ import annotations

import torch

from edge_safe.export.families.base import float_array
from edge_safe.export.graphs.builder import FLOAT, GraphBuilder
from edge_safe.export.graphs.store import WeightStore
from edge_safe.models.pebble.efficientnet_lite import Block, EfficientNetLite, SameConv

NAME = "vision_encoder"


def efficientnet_graph(
    encoder: EfficientNetLite, store: WeightStore, side: int, cells: int
) -> GraphBuilder:
    """pixel_values (1, 3, side, side) -> vision_states (1, cells, c), row by row.

    Args:
        encoder: The torch module.
        store: Takes the weights.
        side: Pixels of a side.
        cells: Cells of the grid that comes out.
    """
    g = GraphBuilder(NAME)
    x = g.input("pixel_values", FLOAT, [1, 3, side, side])
    channels = encoder.head.convolution.out_channels
    g.output("vision_states", FLOAT, [1, cells, channels])
    x = _relu6(g, _convolution(g, x, encoder.stem, "stem", store), "stem")
    for index, block in enumerate(encoder.blocks):
        if isinstance(block, Block):
            x = _block(g, x, block, f"blocks.{index}", store)
    x = _relu6(g, _convolution(g, x, encoder.head, "head", store), "head")
    flat = g.op("Reshape", [x, g.constant([0, 0, -1])], scope="states")
    g.op("Transpose", [flat], scope="states", outputs=["vision_states"], perm=[0, 2, 1])
    return g


def _block(g: GraphBuilder, x: str, block: Block, name: str, store: WeightStore) -> str:
    hidden = x
    if block.expand is not None:
        wide = _convolution(g, hidden, block.expand, f"{name}.expand", store)
        hidden = _relu6(g, wide, f"{name}.expand")
    mixed = _convolution(g, hidden, block.depthwise, f"{name}.depthwise", store)
    hidden = _relu6(g, mixed, f"{name}.depthwise")
    narrow = _convolution(g, hidden, block.project, f"{name}.project", store)
    return g.op("Add", [narrow, x], scope=name) if block.residual else narrow


def _convolution(g: GraphBuilder, x: str, layer: SameConv, name: str, store: WeightStore) -> str:
    convolution, normal = layer.convolution, layer.norm
    mean, variance = normal.running_mean, normal.running_var
    if mean is None or variance is None:
        raise ValueError("the object encoder's normalization has no statistics")
    factor = normal.weight.double() / torch.sqrt(variance.double() + normal.eps)
    weight = convolution.weight.double() * factor[:, None, None, None]
    bias = normal.bias.double() - mean.double() * factor
    return g.op(
        "Conv",
        [
            x,
            g.weight(f"{name}.weight", store.add(float_array(weight))),
            g.weight(f"{name}.bias", store.add(float_array(bias))),
        ],
        scope=name,
        # TensorFlow's SAME: what cannot be halved goes below and to the right.
        auto_pad="SAME_UPPER",
        strides=[layer.stride, layer.stride],
        kernel_shape=[layer.kernel, layer.kernel],
        group=convolution.groups,
    )


def _relu6(g: GraphBuilder, x: str, name: str) -> str:
    return g.op("Clip", [x, g.floats(0.0), g.floats(6.0)], scope=name)
