"""Turns a graph of ONNX Runtime's own operators into one of standard operators.

The walk and what it keeps in mind; each operator is lowered by the file in ``operators`` that bears
its name. A release of TensorRT reads the result, and so does ONNX Runtime's CPU provider, which is
how it is compared with torch.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from onnx import helper

from edge_safe.errors import ExportError
from edge_safe.export.graphs.builder import FLOAT, FLOAT16, GraphBuilder, used_nodes
from edge_safe.export.graphs.store import Stored, WeightStore
from edge_safe.export.tensorrt.inline import inline
from edge_safe.export.tensorrt.releases import Release
from edge_safe.export.tensorrt.source import Array, Source
from edge_safe.runtime.manifest import CAPACITY

OPERATORS = "edge_safe.export.tensorrt.operators"


class Lowering:
    """One graph on its way.

    Attributes:
        g: What is emitted.
        source: What is read.
        store: The weights file of what is emitted.
        release: Who is to read it.
        half: Whether products are made in float16, and caches kept in it.
    """

    def __init__(self, source: Source, store: WeightStore, release: Release, half: bool) -> None:
        opset = min(source.opset, release.opset)
        self.g = GraphBuilder(source.graph.name, opset=opset, contrib=False)
        self.source = source
        self.store = store
        self.release = release
        self.half = half
        # Weights in 16 bits behind the cast that made float32 of them.
        self._halves: dict[str, str] = {}
        # Values that the graph divided by a scale which lowering left out, see ``unscaled``.
        self._unscaled: set[str] = set()
        # Caches that left in float16, as float32 for whoever else reads them.
        self._as_float: dict[str, str] = {}
        self._caches = _caches(source.graph)
        self._producers = {name: node for node in source.graph.node for name in node.output}

    def run(self) -> GraphBuilder:
        """Lowers every node.

        Raises:
            ExportError: An operator has no lowering.
        """
        graph = self.source.graph
        for value in graph.input:
            self.g.input(value.name, *self._declared(value))
        for value in graph.output:
            self.g.output(value.name, *self._declared(value))
        for node in graph.node:
            self._lower(node)
        self.g.keep_used()
        return self.g

    def value(self, name: str) -> str:
        """A value to be read by a node that is emitted; weights are stored on the way."""
        if name in self._as_float:
            return self._as_float[name]
        if name in self._halves:
            # Somebody else than a product reads it: the cast is needed after all.
            stored = self.value(self._halves[name])
            return self.g.once(name, lambda: self.cast(stored, FLOAT, name))
        if not name or not self.source.has(name):
            return name
        if self.source.is_small(name):
            return self.g.initializer(self.source.tensor(name))
        return self.weight(name, self.source.array(name))

    def weight(self, name: str, array: Array) -> str:
        """Stores a weight."""
        return self.g.weight(name, self.store.add(array))

    def stored(self, name: str, stored: Stored) -> str:
        """Refers to what was stored."""
        return self.g.weight(name, stored)

    def producer(self, name: str) -> onnx.NodeProto | None:
        """The node of the source that makes a value."""
        return self._producers.get(name)

    def cast(self, value: str, dtype: int, scope: str) -> str:
        """Another type of a value; each is made once."""
        key = f"{value}/as.{dtype}"
        return self.g.once(key, lambda: self.g.op("Cast", [value], scope=f"{scope}/cast", to=dtype))

    def typed(self, value: str, scope: str) -> str:
        """A float32 value in the type that products are made in."""
        return self.cast(value, FLOAT16, scope) if self.half else value

    def steps(self, scales: Array) -> Array:
        """Scales of whole numbers in the type of products; TensorRT wants them above 0."""
        kind = np.float16 if self.half else np.float32
        return np.maximum(scales, np.finfo(kind).tiny).astype(kind)

    def float_of(self, name: str, value: str) -> None:
        """Notes what readers of a value in the source are to be given."""
        self._as_float[name] = value

    def rank(self, name: str) -> int:
        """Number of axes of an input of the graph, 3 of what is computed in it."""
        for value in self.source.graph.input:
            if value.name == name:
                return len(value.type.tensor_type.shape.dim)
        return 3

    def product(self, x: str, weight: str, scope: str, outputs: list[str] | None = None) -> str:
        """``x`` (float32) times what is in the type of products; the result is float32."""
        if not self.half:
            return self.g.op("MatMul", [x, weight], scope=scope, outputs=outputs)
        made = self.g.op("MatMul", [self.typed(x, scope), weight], scope=f"{scope}/half")
        return self.g.op("Cast", [made], scope=scope, outputs=outputs, to=FLOAT)

    def half_weight(self, name: str) -> str | None:
        """The weight in 16 bits that a value was cast from, as it was stored."""
        return self._halves.get(name)

    def leave_unscaled(self, name: str) -> None:
        """Notes that a value already has the scale that the source multiplies it by next."""
        self._unscaled.add(name)

    def _declared(self, value: onnx.ValueInfoProto) -> tuple[int, list[int | str]]:
        """Type and shape of an input or output; a cache has as many places as it is given."""
        kind = value.type.tensor_type
        shape: list[int | str] = [d.dim_param or int(d.dim_value) for d in kind.shape.dim]
        if value.name not in self._caches:
            return int(kind.elem_type), shape
        shape[2] = CAPACITY
        return FLOAT16 if self.half else int(kind.elem_type), shape

    def _lower(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Cast" and self._is_half(node.input[0]):
            self._halves[node.output[0]] = node.input[0]
        elif node.op_type == "Mul" and self._unscaled.intersection(node.input):
            kept = next(name for name in node.input if name in self._unscaled)
            self.g.op("Identity", [kept], scope=node.name, outputs=list(node.output))
        elif (module := _lowering_of(node.op_type)) is not None:
            module.lower(self, node)
        elif node.domain:
            raise ExportError(
                f"Operator {node.op_type} of graph {self.g.name} has no form that TensorRT reads."
            )
        else:
            self.copy(node)

    def _is_half(self, name: str) -> bool:
        """Whether a value is a weight in float16."""
        return self.source.has(name) and self.source.dtype(name) == FLOAT16

    def copy(self, node: onnx.NodeProto) -> None:
        """Emits a node as it is."""
        attributes = {part.name: helper.get_attribute_value(part) for part in node.attribute}
        self.g.op(
            node.op_type,
            [self.value(name) for name in node.input],
            scope=node.name.rsplit("/", 1)[0],
            outputs=list(node.output),
            **attributes,
        )


def _caches(graph: onnx.GraphProto) -> set[str]:
    """Inputs and outputs of a graph that decoder layers keep keys and values in."""
    kernels = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    return {name for node in kernels for name in (*node.input[3:5], *node.output[1:3])}


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Attributes of a node by name."""
    return {part.name: helper.get_attribute_value(part) for part in node.attribute}


def lower_graph(path: Path, out: Path, store: WeightStore, release: Release, *, half: bool) -> None:
    """Reads a graph file and writes it in standard operators.

    Args:
        path: The graph.
        out: Where to write it, beside the file of ``store``.
        store: Takes its weights.
        release: Who is to read it.
        half: Whether products are made in float16.

    Raises:
        ExportError: An operator has no lowering.
    """
    source = Source(path)
    inline(source.graph)
    source.index()
    used = used_nodes(source.graph.node, [value.name for value in source.graph.output])
    del source.graph.node[:]
    source.graph.node.extend(used)
    Lowering(source, store, release, half).run().save(out)


def _lowering_of(operator: str) -> ModuleType | None:
    """The module that lowers an operator, named as it is: ``QuickGelu`` in ``quick_gelu``."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", operator).lower()
    try:
        return importlib.import_module(f"{OPERATORS}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{OPERATORS}.{name}":
            raise
        return None
