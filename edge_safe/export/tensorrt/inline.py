"""Takes branches out of a graph: of every If its first side stays, the one for prompts.

TensorRT runs both sides of a condition through different kernels and restricts their shapes. The
first sides of our own conditions are right for any number of positions, the others only save work
on the CPU.
"""

from __future__ import annotations

import onnx
from onnx import helper

from edge_safe.errors import ExportError

# Scopes of the conditions whose first side computes what the second does, and more.
KNOWN = ("gate", "early", "tail")
KNOWN_ENDING = ".spans"


def inline(graph: onnx.GraphProto) -> None:
    """Replaces every If by the nodes of its first side.

    Raises:
        ExportError: A condition is none of those whose first side stands for both.
    """
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "If":
            nodes.append(node)
            continue
        scope = node.name.rsplit("/", 1)[0]
        if scope not in KNOWN and not scope.endswith(KNOWN_ENDING):
            raise ExportError(
                f"TensorRT's graphs have no conditions, and {node.name} of graph {graph.name} is "
                "none that can be left out."
            )
        branch = next(part.g for part in node.attribute if part.name == "then_branch")
        inline(branch)
        nodes.extend(branch.node)
        graph.initializer.extend(branch.initializer)
        nodes.extend(
            helper.make_node("Identity", [inner.name], [outer], name=f"{outer}/inlined")
            for inner, outer in zip(branch.output, node.output, strict=True)
        )
    del graph.node[:]
    graph.node.extend(nodes)
