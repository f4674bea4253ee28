"""Nodes for the torch layers that several towers have."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from edge_safe.export.families.base import float_array
from edge_safe.export.graphs.builder import GraphBuilder
from edge_safe.export.graphs.layers import norm
from edge_safe.export.graphs.matrices import Matrix, linear, store_linear
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.quantization import MatrixFormat

# Name in transformers -> operator and its attributes.
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu": ("Gelu", {"approximate": "none"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "quick_gelu": ("QuickGelu", {"alpha": 1.702}),
    "relu": ("Relu", {}),
}
# Those that are ONNX Runtime's own.
CONTRIBUTED = {"QuickGelu"}


class Layers:
    """Emits torch layers into one graph; remembers the matrices it stored."""

    def __init__(self, g: GraphBuilder, store: WeightStore, form: MatrixFormat) -> None:
        self.g = g
        self.matrices: list[Matrix] = []
        self._store = store
        self._form = form

    def linear(self, x: str, layer: nn.Linear, name: str, scale: float = 1.0) -> str:
        """(..., in) -> (..., out), times ``scale``."""
        weight = float_array(layer.weight) * np.float32(scale)
        matrix = store_linear(self._store, weight, self._form)
        self.matrices.append(matrix)
        bias = None
        if layer.bias is not None:
            bias = self._store.add(float_array(layer.bias) * np.float32(scale))
        return linear(self.g, x, matrix, name, bias)

    def layer_norm(self, x: str, layer: nn.LayerNorm, name: str) -> str:
        """Layer normalization over the last axis."""
        parts = [
            self.g.weight(f"{name}.{part}", self._store.add(float_array(getattr(layer, part))))
            for part in ("weight", "bias")
        ]
        return self.g.op("LayerNormalization", [x, *parts], scope=name, axis=-1, epsilon=layer.eps)

    def rms_norm(self, x: str, layer: Any, name: str) -> str:
        """RMS normalization over the last axis, of transformers' classes."""
        weight = self._store.add(float_array(layer.weight))
        return norm(self.g, x, weight, name, layer.variance_epsilon)

    def convolution(self, x: str, layer: nn.Conv1d | nn.Conv2d, name: str) -> str:
        """A convolution with torch's own symmetric padding."""
        inputs = [x, self.g.weight(f"{name}.weight", self._store.add(float_array(layer.weight)))]
        if layer.bias is not None:
            inputs.append(self.g.weight(f"{name}.bias", self._store.add(float_array(layer.bias))))
        padding = (0,) * len(layer.kernel_size) if layer.padding == "valid" else layer.padding
        if isinstance(padding, str):
            raise ValueError(f"{name} has padding {layer.padding!r}, numbers are needed")
        return self.g.op(
            "Conv",
            inputs,
            scope=name,
            kernel_shape=list(layer.kernel_size),
            strides=list(layer.stride),
            pads=[*padding, *padding],
            group=layer.groups,
        )

    def gelu(self, x: str, name: str) -> str:
        """The exact GELU."""
        return self.activation(x, "gelu", name)

    def activation(self, x: str, kind: str, name: str) -> str:
        """An activation by the name that transformers gives it, a key of ``ACTIVATIONS``."""
        operator, attributes = ACTIVATIONS[kind]
        if operator in CONTRIBUTED:
            return self.g.contrib(operator, [x], scope=name, **attributes)
        return self.g.op(operator, [x], scope=name, **attributes)

    def turn(self, x: str, name: str) -> str:
        """(N, T, c) <-> (N, c, T)."""
        return self.g.op("Transpose", [x], scope=name, perm=[0, 2, 1])

    def add(self, a: str, b: str, name: str) -> str:
        """Sum."""
        return self.g.op("Add", [a, b], scope=name)

    def stored(self, name: str, array: object) -> str:
        """A parameter as it stands."""
        return self.g.weight(name, self._store.add(float_array(array)))
