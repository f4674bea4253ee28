"""What one token costs by the graphs themselves: bytes of weights read and multiplications made.

Reads just enough of the ONNX files (field numbers from onnx.proto, IR version 10) to see
initializers and the nodes that multiply by them; a device has no onnx package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from edge_safe.runtime.bundle import Bundle
from edge_safe.runtime.prefill import PREFILL
from edge_safe.runtime.wire_format import read_fields, read_packed

_GRAPH, _NODE, _INITIALIZER = 7, 1, 5
_MULTIPLYING = {"MatMul", "Gemm", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}


@dataclass(slots=True)
class Work:
    """What one position costs.

    Attributes:
        weight_bytes: Bytes of the weights that are multiplied with, scales and offsets included.
        multiplications: Weights they stand for: one multiplication and one addition each.
        head_multiplications: Those of them that only the last position needs (lm_head).
    """

    weight_bytes: int = 0
    multiplications: int = 0
    head_multiplications: int = 0


@dataclass(slots=True)
class _Node:
    """A node: its operator, its inputs and outputs, its integer attributes, its branches."""

    operator: str = ""
    inputs: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    branches: dict[str, memoryview] = field(default_factory=dict)


@dataclass(slots=True)
class _Tensor:
    """An initializer: its name, its shape, and its bytes outside the graph's own file."""

    name: str = ""
    shape: list[int] = field(default_factory=list)
    length: int = 0


def work_of(bundle: Bundle, *, prefill: bool = False) -> Work:
    """The work of one position through gate and decoder together.

    Args:
        bundle: The bundle.
        prefill: Count the graphs that prompts go through, where they are others.
    """
    work = Work()
    counted: set[str] = set()
    graphs = bundle.manifest.graphs
    ending = PREFILL if prefill and f"decoder{PREFILL}" in graphs else ""
    for name in (f"gate{ending}", f"decoder{ending}"):
        if name not in graphs:
            continue
        data = memoryview(bundle.read(bundle.manifest.graphs[name].file))
        tensors, nodes = _graph(data)
        for node in nodes:
            count = _multiplications(node, tensors)
            work.multiplications += count
            if count and bundle.manifest.model.vocab_size in (
                node.numbers.get("N"),
                *_shape(node, tensors),
            ):
                work.head_multiplications += count
            if count:
                weights = {name for name in node.inputs if name in tensors} - counted
                work.weight_bytes += sum(tensors[weight].length for weight in weights)
                counted |= weights
    if ending and all(t.name != "logits" for t in graphs[f"decoder{ending}"].outputs):
        # Slot T's logits come from the graph for single tokens.
        head = work_of(bundle).head_multiplications
        work.head_multiplications += head
        work.multiplications += head
    return work


def _multiplications(node: _Node, tensors: dict[str, _Tensor]) -> int:
    """Weights that a node multiplies each position by."""
    if node.operator == "MatMulNBits":
        return node.numbers.get("N", 0) * node.numbers.get("K", 0)
    if node.operator in _MULTIPLYING:
        return math.prod(_shape(node, tensors) or [0])
    return 0


def _shape(node: _Node, tensors: dict[str, _Tensor]) -> list[int]:
    """Shape of a node's weight matrix; empty where it multiplies by no weight."""
    if len(node.inputs) < 2 or node.inputs[1] not in tensors:
        return []
    return tensors[node.inputs[1]].shape


def _graph(model: memoryview) -> tuple[dict[str, _Tensor], list[_Node]]:
    """Initializers and nodes of a ModelProto.

    Nodes inside branches are left out, but for those behind an early exit: an If that leaves
    caches, whose second branch goes on.
    """
    found = _Graph()
    for number, value in read_fields(model):
        if number == _GRAPH and not isinstance(value, int):
            found.read(value)
    return found.tensors, found.nodes


@dataclass(slots=True)
class _Graph:
    """What was found of a graph so far."""

    tensors: dict[str, _Tensor] = field(default_factory=dict)
    nodes: list[_Node] = field(default_factory=list)

    def read(self, graph: memoryview) -> None:
        """Takes up initializers and nodes of a GraphProto."""
        for number, part in read_fields(graph):
            if isinstance(part, int):
                continue
            if number == _NODE:
                node = _node(part)
                if node.operator == "If" and any(n.startswith("present.") for n in node.outputs):
                    self.read(node.branches["else_branch"])
                else:
                    self.nodes.append(node)
            elif number == _INITIALIZER:
                tensor = _tensor(part)
                self.tensors[tensor.name] = tensor


def _node(data: memoryview) -> _Node:
    """NodeProto: input 1, output 2, op_type 4, attribute 5 (name 1, i 3, g 6)."""
    node = _Node()
    for number, value in read_fields(data):
        if isinstance(value, int):
            continue
        if number == 1:
            node.inputs.append(bytes(value).decode())
        elif number == 4:
            node.operator = bytes(value).decode()
        elif number == 5:
            attribute = dict(read_fields(value))
            name, whole, branch = (attribute.get(field) for field in (1, 3, 6))
            if isinstance(name, memoryview) and isinstance(whole, int):
                node.numbers[bytes(name).decode()] = whole
            if isinstance(name, memoryview) and isinstance(branch, memoryview):
                node.branches[bytes(name).decode()] = branch
        elif number == 2:
            node.outputs.append(bytes(value).decode())
    return node


def _tensor(data: memoryview) -> _Tensor:
    """TensorProto: dims 1, name 8, raw_data 9, external_data 13 (key 1, value 2)."""
    tensor = _Tensor()
    for number, value in read_fields(data):
        if isinstance(value, int):
            if number == 1:
                tensor.shape.append(value)
        elif number == 1:
            tensor.shape.extend(read_packed(value))
        elif number == 8:
            tensor.name = bytes(value).decode()
        elif number == 9:
            tensor.length = len(value)
        elif number == 13:
            entry = {n: bytes(text) for n, text in read_fields(value) if not isinstance(text, int)}
            if entry.get(1) == b"length":
                tensor.length = int(entry[2])
    return tensor
