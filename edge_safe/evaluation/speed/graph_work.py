"""What one token costs by the graphs themselves: bytes of weights read and multiplications made.

Reads just enough of the ONNX files (field numbers from onnx.proto, IR version 10) to see
initializers and the nodes that multiply by them; a device has no onnx package. A weight counts
where it stands as such, packed, or behind operators that only unpack or turn it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from edge_safe.runtime.bundle import Bundle
from edge_safe.runtime.prefill import PREFILL
from edge_safe.runtime.wire_format import read_fields, read_packed

_GRAPH, _NODE, _INITIALIZER = 7, 1, 5
INTEGER = {"MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
"""Products of 8-bit activations with 8-bit weights."""

_MULTIPLYING = {"MatMul", "Gemm"} | INTEGER
_UNPACKING = {
    "DequantizeLinear",
    "Transpose",
    "Reshape",
    "Cast",
    "Identity",
    "Squeeze",
    "Unsqueeze",
}
_SMALL = 256
# Of MatMulNBits' attribute accuracy_level: ONNX Runtime's operator documentation, com.microsoft.
_INT8_LEVEL = 4


@dataclass(slots=True)
class Work:
    """What one position costs.

    Attributes:
        weight_bytes: Bytes of the weights that are multiplied with, scales and offsets included.
        multiplications: Weights they stand for: one multiplication and one addition each.
        head_multiplications: Those of them that only the last position needs (lm_head).
        integer_multiplications: Those of ``INTEGER`` operators.
        rounded_multiplications: Those by activations in 8 bits: these, and products with packed
            weights whose accuracy level says so.
        rounded_head_multiplications: Those of them that only the last position needs.
    """

    weight_bytes: int = 0
    multiplications: int = 0
    head_multiplications: int = 0
    integer_multiplications: int = 0
    rounded_multiplications: int = 0
    rounded_head_multiplications: int = 0


@dataclass(slots=True)
class Node:
    """A node: its operator, inputs and outputs, its attributes of whole numbers, its branches."""

    operator: str = ""
    inputs: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    lists: dict[str, list[int]] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    branches: dict[str, memoryview] = field(default_factory=dict)


@dataclass(slots=True)
class Tensor:
    """A tensor that does not change from run to run.

    Attributes:
        name: Its name.
        shape: Its shape; of one that was reshaped, the shape before.
        sources: Initializers it is made of, with their bytes.
        raw: The bytes of a small one that stands in the graph's own file.
    """

    name: str = ""
    shape: list[int] = field(default_factory=list)
    sources: dict[str, int] = field(default_factory=dict)
    raw: bytes = b""


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
        tensors, nodes = read_graph(bundle.read(graphs[name].file))
        for node in nodes:
            count = weights_of(node, tensors)
            work.multiplications += count
            work.integer_multiplications += count if node.operator in INTEGER else 0
            rounded = count if _rounds(node) else 0
            work.rounded_multiplications += rounded
            if count and bundle.manifest.model.vocab_size in (
                node.numbers.get("N"),
                *_shape(node, tensors),
            ):
                work.head_multiplications += count
                work.rounded_head_multiplications += rounded
            if count:
                work.weight_bytes += read_bytes(node, tensors, counted)
    if ending and all(t.name != "logits" for t in graphs[f"decoder{ending}"].outputs):
        # Slot T's logits come from the graph for single tokens.
        step = work_of(bundle)
        work.head_multiplications += step.head_multiplications
        work.multiplications += step.head_multiplications
        work.rounded_head_multiplications += step.rounded_head_multiplications
        work.rounded_multiplications += step.rounded_head_multiplications
    return work


def _rounds(node: Node) -> bool:
    """Whether a node's products are made of 8-bit activations."""
    packed = node.operator == "MatMulNBits" and node.numbers.get("accuracy_level") == _INT8_LEVEL
    return packed or node.operator in INTEGER


def weights_of(node: Node, tensors: dict[str, Tensor]) -> int:
    """Weights that a node multiplies each position by."""
    if node.operator == "MatMulNBits":
        return node.numbers.get("N", 0) * node.numbers.get("K", 0)
    if node.operator in _MULTIPLYING:
        return math.prod(_shape(node, tensors) or [0])
    return 0


def read_bytes(node: Node, tensors: dict[str, Tensor], counted: set[str]) -> int:
    """Bytes of a node's weights that were not ``counted`` yet; notes them there."""
    sources: dict[str, int] = {}
    for name in node.inputs:
        if name in tensors:
            sources |= tensors[name].sources
    new = {name: length for name, length in sources.items() if name not in counted}
    counted.update(new)
    return sum(new.values())


def _shape(node: Node, tensors: dict[str, Tensor]) -> list[int]:
    """Shape of a node's weight matrix; empty where it multiplies by no weight."""
    if len(node.inputs) < 2 or node.inputs[1] not in tensors:
        return []
    return tensors[node.inputs[1]].shape


def read_graph(model: bytes) -> tuple[dict[str, Tensor], list[Node]]:
    """Constant tensors and nodes of a serialized ModelProto.

    Nodes inside branches are left out, but for those behind an early exit: an If that leaves
    caches, whose second branch goes on.
    """
    found = _Graph()
    for number, value in read_fields(memoryview(model)):
        if number == _GRAPH and not isinstance(value, int):
            found.read(value)
    found.follow()
    return found.tensors, found.nodes


@dataclass(slots=True)
class _Graph:
    """What was found of a graph so far."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)

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

    def follow(self) -> None:
        """Takes up what comes out of nodes that unpack or turn constant tensors."""
        for node in self.nodes:
            if node.operator in _UNPACKING and node.inputs and node.inputs[0] in self.tensors:
                shape = self.tensors[node.inputs[0]].shape
                if node.operator == "Transpose" and len(shape) == 2:
                    shape = shape[::-1]
                parts = self._sources(node.inputs)
                for name in node.outputs[:1]:
                    self.tensors[name] = Tensor(name, shape, parts)

    def _sources(self, names: Iterable[str]) -> dict[str, int]:
        """Initializers behind several tensors."""
        sources: dict[str, int] = {}
        for name in names:
            if name in self.tensors:
                sources |= self.tensors[name].sources
        return sources


def _node(data: memoryview) -> Node:
    """NodeProto: input 1, output 2, op_type 4, attribute 5 (name 1, i 3, g 6, ints 8)."""
    node = Node()
    for number, value in read_fields(data):
        if isinstance(value, int):
            continue
        if number == 1:
            node.inputs.append(bytes(value).decode())
        elif number == 4:
            node.operator = bytes(value).decode()
        elif number == 5:
            _attribute(node, value)
        elif number == 2:
            node.outputs.append(bytes(value).decode())
    return node


def _attribute(node: Node, data: memoryview) -> None:
    """Takes up an AttributeProto; its fields may stand in any order."""
    fields = dict(read_fields(data))
    name, whole, branch = (fields.get(number) for number in (1, 3, 6))
    if not isinstance(name, memoryview):
        return
    if isinstance(whole, int):
        node.numbers[bytes(name).decode()] = whole
    if isinstance(branch, memoryview):
        node.branches[bytes(name).decode()] = branch
    several = [
        number
        for field, value in read_fields(data)
        if field == 8
        for number in ([value] if isinstance(value, int) else read_packed(value))
    ]
    if several:
        node.lists[bytes(name).decode()] = several


def _tensor(data: memoryview) -> Tensor:
    """TensorProto: dims 1, name 8, raw_data 9, external_data 13 (key 1, value 2)."""
    tensor, length = Tensor(), 0
    for number, value in read_fields(data):
        if isinstance(value, int):
            if number == 1:
                tensor.shape.append(value)
        elif number == 1:
            tensor.shape.extend(read_packed(value))
        elif number == 8:
            tensor.name = bytes(value).decode()
        elif number == 9:
            length = len(value)
            tensor.raw = bytes(value) if length <= _SMALL else b""
        elif number == 13:
            entry = {n: bytes(text) for n, text in read_fields(value) if not isinstance(text, int)}
            if entry.get(1) == b"length":
                length = int(entry[2])
    tensor.sources = {tensor.name: length}
    return tensor
