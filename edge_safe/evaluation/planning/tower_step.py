"""What one run of a tower costs, by its graph and the shapes of its inputs.

Followed from node to node is the number of elements, not the shape: it stays through whatever
turns or reshapes, and with a weight's own width it gives the positions that are multiplied. What
is sliced or gathered counts whole, so the result is rather too high.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edge_safe.evaluation.planning.step import Step
from edge_safe.evaluation.speed.graph_work import (
    INTEGER,
    Node,
    Tensor,
    read_bytes,
    read_graph,
    weights_of,
)

_ATTENTION = {"MultiHeadAttention", "Attention", "GroupQueryAttention"}
_POOLS = {"MaxPool", "AveragePool"}
_TO_ONE_POSITION = {"GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax"}
_SHAPES = {"Shape", "Size", "ConstantOfShape", "Range", "NonZero"}


@dataclass(frozen=True, slots=True)
class _Flow:
    """A value: its elements, of which ``width`` belong to a position; no element is one position.

    Scores of an attention also have the ``keys`` that each of their positions looks at.
    """

    elements: float
    width: float = 0.0
    keys: float = 0.0

    def positions(self, width: float) -> float:
        """Positions of that many elements."""
        return self.elements / width if self.elements else 1.0


@dataclass(slots=True)
class _Count:
    """What was found so far."""

    tensors: dict[str, Tensor]
    flows: dict[str, _Flow]
    counted: set[str] = field(default_factory=set)
    read: int = 0
    multiplications: float = 0.0
    integer: float = 0.0


def tower_step(model: bytes, inputs: Mapping[str, Sequence[int]]) -> Step:
    """Bytes and operations of one run.

    Args:
        model: A serialized ModelProto.
        inputs: Shapes of the graph's inputs; one that is left out counts nothing.
    """
    tensors, nodes = read_graph(model)
    flows = {
        name: _Flow(float(math.prod(shape)), float(shape[-1])) for name, shape in inputs.items()
    }
    count = _Count(tensors, flows)
    for node in nodes:
        found = _follow(node, count)
        if found is not None:
            count.flows |= dict.fromkeys(node.outputs, found)
    float_part = count.multiplications - count.integer
    return Step(float(count.read), 2.0 * float_part, 2.0 * count.integer)


def _follow(node: Node, count: _Count) -> _Flow | None:
    """Counts a node and says what comes out of it; nothing where no input changes."""
    given = [count.flows[name] for name in node.inputs if name in count.flows]
    if not given or node.operator in _SHAPES:
        return None
    if node.operator in _ATTENTION:
        return _attention(given, count)
    if node.operator in ("Conv", "ConvTranspose"):
        return _convolution(node, given[0], count)
    weights = weights_of(node, count.tensors)
    if weights:
        return _product(node, given[0], weights, count)
    if node.operator in ("MatMul", "Gemm", "Einsum") and len(given) > 1:
        return _dynamic_product(given[0], given[1], count)
    largest = max(given, key=lambda flow: flow.elements)
    match node.operator:
        case "Split":
            parts = len(node.outputs)
            return _Flow(largest.elements / parts, largest.width / parts)
        case "Concat":
            return _Flow(sum(flow.elements for flow in given), largest.width)
        case "Resize":
            return _Flow(largest.elements * _scale(node, count.tensors), largest.width)
        case operator if operator in _POOLS:
            return _Flow(largest.elements / math.prod(node.lists.get("strides", [1])))
        case operator if operator in _TO_ONE_POSITION:
            return _Flow(0.0)
    return largest


def _product(node: Node, given: _Flow, weights: int, count: _Count) -> _Flow:
    """A product with a weight matrix (K, N): K elements of a position become N."""
    shape = count.tensors[node.inputs[1]].shape
    if node.operator == "MatMulNBits":
        inner = node.numbers["K"]
    elif len(shape) == 2:
        inner = shape[1] if node.numbers.get("transB") else shape[0]
    else:
        inner = int(given.width) or shape[-2]
    positions, outer = given.positions(inner), weights / inner
    _add(node, positions * weights, count)
    return _Flow(positions * outer, outer)


def _convolution(node: Node, given: _Flow, count: _Count) -> _Flow | None:
    """Padding is taken to keep the size, so that a stride alone makes it smaller."""
    tensor = count.tensors.get(node.inputs[1])
    if tensor is None:
        return None
    shape, groups = tensor.shape, node.numbers.get("group", 1)
    stride = math.prod(node.lists.get("strides", [1]))
    if node.operator == "Conv":
        channels, positions = shape[0], given.positions(shape[1] * groups) / stride
        made = max(positions, 1.0)
        _add(node, made * math.prod(shape), count)
    else:
        positions = given.positions(shape[0])
        channels, made = shape[1] * groups, positions * stride
        _add(node, positions * math.prod(shape), count)
    return _Flow(made * channels, float(channels))


def _dynamic_product(left: _Flow, right: _Flow, count: _Count) -> _Flow:
    """The two products of an attention: queries by keys, then scores by values."""
    if left.keys:
        made = left.elements * right.width
        count.multiplications += made * left.keys
        return _Flow(made, right.width)
    width = max(left.width, 1.0)
    queries, keys = left.positions(width), right.positions(max(right.width, 1.0))
    count.multiplications += queries * keys * width
    return _Flow(queries, 1.0, keys)


def _attention(given: Sequence[_Flow], count: _Count) -> _Flow:
    """Both products in one node; all positions look at all."""
    queries, keys = given[0], given[min(1, len(given) - 1)]
    pairs = queries.positions(max(queries.width, 1.0)) * keys.positions(max(keys.width, 1.0))
    count.multiplications += 2.0 * pairs * queries.width
    return queries


def _add(node: Node, multiplications: float, count: _Count) -> None:
    """Takes up the multiplications of a node and the weights that it reads."""
    count.multiplications += multiplications
    count.integer += multiplications if node.operator in INTEGER else 0.0
    count.read += read_bytes(node, count.tensors, count.counted)


def _scale(node: Node, tensors: Mapping[str, Tensor]) -> float:
    """By how much a Resize multiplies the elements, where the graph says so."""
    name = node.inputs[2] if len(node.inputs) > 2 else ""
    raw = tensors[name].raw if name in tensors else b""
    return math.prod(struct.unpack(f"<{len(raw) // 4}f", raw)) if raw else 1.0
