"""Takes branches out of a graph: of an If its first side stays, or both and a choice behind them.

TensorRT runs both sides of a condition through different kernels and restricts their shapes. The
first sides of most of our own conditions are right for any number of positions, the others only
save work on the CPU. Where each side is right for one case only, both are computed.
"""

from __future__ import annotations

import onnx
from onnx import helper

from edge_safe.errors import ExportError

# Scopes of the conditions whose first side computes what the second does, and more.
KNOWN = ("gate", "gate.pool", "early", "early.pool", "tail")
KNOWN_ENDING = ".spans"

# Scopes of those whose sides give different values of one shape, neither of them costly.
EITHER = ("projector",)


def inline(graph: onnx.GraphProto) -> None:
    """Replaces every If by the nodes of its first side, or of both.

    Raises:
        ExportError: A condition is none of those that are known.
    """
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "If":
            nodes.append(node)
            continue
        scope = node.name.rsplit("/", 1)[0]
        if scope in EITHER:
            sides = [_side(graph, node, side, nodes) for side in ("then_branch", "else_branch")]
            nodes.extend(
                helper.make_node("Where", [node.input[0], *pair], [outer], name=f"{outer}/chosen")
                for pair, outer in zip(zip(*sides, strict=True), node.output, strict=True)
            )
            continue
        if scope not in KNOWN and not scope.endswith(KNOWN_ENDING):
            raise ExportError(
                f"TensorRT's graphs have no conditions, and {node.name} of graph {graph.name} is "
                "none that can be left out."
            )
        first = _side(graph, node, "then_branch", nodes)
        nodes.extend(
            helper.make_node("Identity", [inner], [outer], name=f"{outer}/inlined")
            for inner, outer in zip(first, node.output, strict=True)
        )
    del graph.node[:]
    graph.node.extend(nodes)


def _side(
    graph: onnx.GraphProto, node: onnx.NodeProto, side: str, nodes: list[onnx.NodeProto]
) -> list[str]:
    """Moves the nodes of one side of an If out of it; gives the names of its results."""
    branch = next(part.g for part in node.attribute if part.name == side)
    inline(branch)
    nodes.extend(branch.node)
    graph.initializer.extend(branch.initializer)
    return [value.name for value in branch.output]
