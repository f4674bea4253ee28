"""What the layers of a parsed network compute in.

Types are kept as the graph has them, so what the network says is what runs.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

# What the builder calls types, where this project has shorter names.
_TYPES = {"FLOAT": "fp32", "HALF": "fp16"}

# Layers that hand on what they are given; quantized weights are looked for behind them.
_HANDING_ON = {"SHUFFLE", "CAST", "IDENTITY", "SQUEEZE", "UNSQUEEZE"}

_MULTIPLYING = {"MATRIX_MULTIPLY", "EINSUM", "CONVOLUTION", "DECONVOLUTION"}


def _type(tensor: Any) -> str:
    name = str(tensor.dtype.name)
    return _TYPES.get(name, name.lower())


def operands_of(layers: list[Any]) -> list[list[str]]:
    """Types that each layer multiplies; empty for those that multiply no matrices."""
    producers = {
        layer.get_output(index).name: layer
        for layer in layers
        for index in range(layer.num_outputs)
    }

    def kept(tensor: Any) -> str:
        layer = producers.get(tensor.name)
        while layer is not None and layer.type.name in _HANDING_ON:
            layer = producers.get(layer.get_input(0).name)
        if layer is not None and layer.type.name == "DEQUANTIZE":
            return _type(layer.get_input(0))
        return _type(tensor)

    found: list[list[str]] = []
    for layer in layers:
        if layer.type.name not in _MULTIPLYING:
            found.append([])
            continue
        inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
        types = [kept(tensor) for tensor in inputs if tensor is not None]
        # A convolution's own kernel is no input; it has the type of what comes out.
        found.append(types if len(types) > 1 else [*types, _type(layer.get_output(0))])
    return found


def matrices_of(operands: list[list[str]]) -> dict[str, int]:
    """How many products there are by the types they multiply."""
    return dict(Counter(" x ".join(types) for types in operands if types))


def computing(layers: list[Any], operands: list[list[str]]) -> dict[str, int]:
    """How many layers compute something, by type."""
    counted: Counter[str] = Counter()
    for layer, types in zip(layers, operands, strict=True):
        # Constants and the parser's own helpers stand for no node of the graph, and have no origin.
        if layer.metadata and layer.num_outputs and not layer.type.name.endswith("QUANTIZE"):
            counted["int8" if set(types) == {"int8"} else _type(layer.get_output(0))] += 1
    return dict(counted)
