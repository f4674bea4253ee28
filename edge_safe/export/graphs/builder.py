"""A small builder of ONNX graphs whose weights stand in the shared file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper
from onnx.external_data_helper import load_external_data_for_tensor

from edge_safe.export.graphs.store import Stored

CONTRIB = "com.microsoft"
# The newest pair that onnxruntime 1.23 (the last one of Python 3.10) reads as well.
OPSET = 21
IR_VERSION = 10

Shape = Sequence[int | str]


class GraphBuilder:
    """Collects nodes, inputs, outputs and initializers of one graph.

    Values are plain names. ``op`` names a node after the scope it stands in, so a profile of the
    running graph reads like the model.
    """

    def __init__(self, name: str, opset: int = OPSET, *, contrib: bool = True) -> None:
        self.name = name
        self.opset = opset
        self._contrib = contrib
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._counts: dict[str, int] = {}
        self._made: dict[str, str] = {}
        self._own: dict[str, onnx.TensorProto] | None = None  # of the branch under way

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs so far."""
        return [value.name for value in self._inputs]

    def input(self, name: str, dtype: int, shape: Shape) -> str:
        """Declares a graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, name: str, dtype: int, shape: Shape) -> str:
        """Declares a graph output; a node has to give this name to its result."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def weight(
        self,
        name: str,
        stored: Stored,
        shape: Sequence[int] | None = None,
        *,
        own: bool = False,
    ) -> str:
        """Refers to a tensor in the weights file.

        Args:
            name: Its name.
            stored: Where it stands.
            shape: What it is viewed with, if not with its own.
            own: Whether a branch needs one of its own: a small tensor, which then stands in the
                graph's file, since onnxruntime does not open branches with weights outside of it
                where the weights file has several hard links.
        """
        if own and self._own is not None:
            self._own[name] = stored.proto(name, shape)
        elif name not in self._initializers:
            self._initializers[name] = stored.proto(name, shape)
        return name

    def initializer(self, tensor: onnx.TensorProto) -> str:
        """Adds a tensor that stands in the graph's own file."""
        self._initializers.setdefault(tensor.name, tensor)
        return tensor.name

    def keep_used(self) -> None:
        """Takes out nodes and weights whose results reach no output."""
        self._nodes = used_nodes(self._nodes, [value.name for value in self._outputs])
        read = {name for node in self._nodes for name in node.input}
        self._initializers = {n: t for n, t in self._initializers.items() if n in read}

    def constant(self, value: npt.ArrayLike, dtype: type[np.generic] = np.int64) -> str:
        """An inline constant, made once per value."""
        array = np.asarray(value, dtype=dtype)
        name = f"const/{array.dtype}/{array.tolist()}"
        if name not in self._initializers:
            self._initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def floats(self, value: npt.ArrayLike) -> str:
        """An inline float32 constant."""
        return self.constant(value, np.float32)

    def once(self, key: str, make: Callable[[], str]) -> str:
        """The value made for a key, so that equal nodes are emitted once."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def choose(
        self,
        condition: str,
        then: Callable[[], Sequence[str]],
        otherwise: Callable[[], Sequence[str]],
        *,
        scope: str,
        outputs: Sequence[str],
        dtypes: Sequence[int] | None = None,
    ) -> None:
        """Adds an If; both sides see everything emitted so far.

        Args:
            condition: A bool.
            then: Emits the nodes that run when it holds, and returns the values they make.
            otherwise: The same for when it does not.
            scope: Place in the model.
            outputs: Names of the values outside; a side may give its own values these names.
            dtypes: Their types, float32 without.
        """
        kinds = [TensorProto.FLOAT] * len(outputs) if dtypes is None else dtypes
        named = dict(zip(outputs, kinds, strict=True))
        self.op(
            "If",
            [condition],
            scope=scope,
            outputs=outputs,
            then_branch=self._branch(f"{scope}/then", then, named),
            else_branch=self._branch(f"{scope}/else", otherwise, named),
        )

    def _branch(
        self, name: str, emit: Callable[[], Sequence[str]], outside: Mapping[str, int]
    ) -> onnx.GraphProto:
        """Emits into a graph of its own. Initializers stay outside, where it sees them.

        A name is given once, so what is called like a value outside gets another one in here.
        """
        nodes, made, own = self._nodes, dict(self._made), self._own
        self._own = {}
        self._nodes = []

        inner = {value: f"{name}/{value}" for value in outside}
        try:
            results = [
                helper.make_tensor_value_info(inner.get(value, value), kind, None)
                for value, kind in zip(emit(), outside.values(), strict=True)
            ]
            _rename(self._nodes, inner)
            weights = list(self._own.values())
            return helper.make_graph(self._nodes, name, [], results, initializer=weights)
        finally:
            self._nodes, self._made, self._own = nodes, made, own

    def op(
        self,
        kind: str,
        inputs: Sequence[str],
        *,
        scope: str,
        outputs: Sequence[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Adds a node and returns its first output.

        Args:
            kind: Operator.
            inputs: Names; an empty string leaves an optional input out.
            scope: Place in the model, the prefix of the node's name.
            outputs: Names of the outputs; without them one output is named after the node.
            domain: Operator domain.
            **attributes: Attributes of the node.
        """
        base = f"{scope}/{kind}"
        count = self._counts.get(base, 0)
        self._counts[base] = count + 1
        name = base if count == 0 else f"{base}_{count}"
        made = [name] if outputs is None else list(outputs)
        self._nodes.append(
            helper.make_node(kind, list(inputs), made, name=name, domain=domain, **attributes)
        )
        return made[0]

    def contrib(
        self,
        kind: str,
        inputs: Sequence[str],
        *,
        scope: str,
        outputs: Sequence[str] | None = None,
        **attributes: Any,
    ) -> str:
        """Adds a node of ONNX Runtime's own operator set."""
        return self.op(kind, inputs, scope=scope, outputs=outputs, domain=CONTRIB, **attributes)

    def model(self) -> onnx.ModelProto:
        """The finished model."""
        graph = helper.make_graph(
            self._nodes,
            self.name,
            self._inputs,
            self._outputs,
            initializer=list(self._initializers.values()),
        )
        domains = [("", self.opset), (CONTRIB, 1)] if self._contrib else [("", self.opset)]
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in domains],
            ir_version=IR_VERSION,
            producer_name="edge-safe",
        )

    def save(self, path: Path) -> None:
        """Writes the model; its weights are in the weights file already."""
        model = self.model()
        _take_in(model.graph, path.parent, outermost=True)
        path.write_bytes(model.SerializeToString())


def used_nodes(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes whose results reach an output, in their order; none of them has branches."""
    wanted = set(outputs)
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    return kept[::-1]


def _take_in(graph: onnx.GraphProto, folder: Path, *, outermost: bool) -> None:
    """Puts the weights that belong to branches into the graph's own file."""
    if not outermost:
        for tensor in graph.initializer:
            load_external_data_for_tensor(tensor, str(folder))
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _take_in(attribute.g, folder, outermost=False)


def _rename(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> None:
    """Gives values other names, in the branches of nodes too."""
    for node in nodes:
        node.input[:] = [names.get(value, value) for value in node.input]
        node.output[:] = [names.get(value, value) for value in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g.node, names)
                for result in attribute.g.output:
                    result.name = names.get(result.name, result.name)


FLOAT = int(TensorProto.FLOAT)
INT64 = int(TensorProto.INT64)
INT32 = int(TensorProto.INT32)
INT8 = int(TensorProto.INT8)
BOOL = int(TensorProto.BOOL)
FLOAT16 = int(TensorProto.FLOAT16)
