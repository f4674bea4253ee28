"""Writes a graph that came as ONNX back as ONNX, cut and renamed."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_safe.export.families.base import float_array
from edge_safe.export.graphs.builder import FLOAT, GraphBuilder, Shape
from edge_safe.export.graphs.store import WeightStore
from edge_safe.models.onnx_graph import NEWEST_OPSET, OnnxGraph


def onnx_graph(
    name: str,
    module: OnnxGraph,
    store: WeightStore,
    source: tuple[str, Shape],
    result: tuple[str, Shape],
) -> GraphBuilder:
    """Emits an interpreted graph with the nodes of its origin.

    Args:
        name: Name of the graph.
        module: The graph as torch runs it.
        store: Takes the weights.
        source: Name and shape of the input.
        result: Name and shape of the output.
    """
    spec = module.spec
    g = GraphBuilder(name, opset=NEWEST_OPSET)
    renamed = {spec.source: g.input(source[0], FLOAT, source[1]), spec.result: result[0], "": ""}
    g.output(result[0], FLOAT, result[1])
    for weight in spec.weights:
        renamed[weight] = g.weight(weight, store.add(float_array(getattr(module, weight))))
    for number, node in enumerate(spec.nodes):
        inputs = [
            _constant(g, spec.constants[value], real=node.op == "Resize")
            if value in spec.constants
            else renamed.get(value, value)
            for value in node.inputs
        ]
        output = renamed.get(node.output, node.output)
        g.op(node.op, inputs, scope=f"{name}/{number}", outputs=[output], **node.attributes)
    return g


def _constant(g: GraphBuilder, value: Any, *, real: bool) -> str:
    """A shape or axis, or the scales of a Resize, which are real numbers."""
    return g.constant(value, np.float32 if real else np.int64)
