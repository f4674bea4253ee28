"""Scaling of channels before they are rounded, for two ends.

The weights behind input channel c are multiplied by s_c and what makes the channel is divided by
it. The norm in front of attention and MLP, and the rows of the MLP's up projection in front of its
down projection, take the division, so nothing is added to the graphs. The output projection of the
attention is left as it is: its inputs are shared by query heads.

- Lin et al., AWQ, arXiv 2306.00978: channels that matter are made larger, s = (magnitude of the
  input) ** a, with the power a searched per group of layers.
- Xiao et al., SmoothQuant, arXiv 2211.10438: where inputs are rounded too, their outliers are moved
  into the weights, s = (magnitude of the input) ** 0.5 / (largest weight) ** 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edge_safe.export.activations import Activations, LayerInputs, magnitudes
from edge_safe.export.graphs.spec import DecoderSpec, FloatArray, TensorSource
from edge_safe.export.packing import dequantize
from edge_safe.export.quantization import MatrixFormat
from edge_safe.export.rounding import quantize

Choose = Callable[[Sequence[FloatArray], FloatArray], FloatArray]
"""From the (N, K) weights that share an input and the (K,) mean squares of that, (K,) scales."""

POWERS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
# Rows of each matrix that the search looks at.
SAMPLED_ROWS = 1024


def scaled_source(
    tensor: TensorSource, spec: DecoderSpec, seen: Activations, choose: Choose
) -> TensorSource:
    """The same model with its channels scaled; each layer's are chosen when it is first read.

    Args:
        tensor: The weights.
        spec: The decoder.
        seen: What enters its linear layers.
        choose: Finds the scales of one group.
    """
    known: dict[int, dict[str, FloatArray]] = {}

    def scaled(name: str) -> FloatArray:
        head, _, rest = name.partition("model.layers.")
        if head or not rest:
            return tensor(name)
        number, _, part = rest.partition(".")
        index = int(number)
        if index not in known:
            known.clear()
            known[index] = _factors(tensor, spec, seen.inputs[index], index, choose)
        weight = tensor(name)
        columns = known[index].get(f"{part}/columns")
        rows = known[index].get(f"{part}/rows")
        if columns is not None:
            weight = weight * columns[None]
        if rows is not None:
            weight = (weight.T * rows).T
        return np.ascontiguousarray(weight, dtype=np.float32)

    return scaled


def _factors(
    tensor: TensorSource, spec: DecoderSpec, seen: LayerInputs, index: int, choose: Choose
) -> dict[str, FloatArray]:
    """What rows and columns of one layer's tensors are multiplied with."""
    base = f"model.layers.{index}."
    mlp_norm = "pre_feedforward_layernorm" if spec.post_norms else "post_attention_layernorm"
    found: dict[str, FloatArray] = {}
    for squares, norm, parts in (
        (seen.attention, "input_layernorm", [f"self_attn.{p}_proj" for p in "qkv"]),
        (seen.mlp, mlp_norm, ["mlp.gate_proj", "mlp.up_proj"]),
        (seen.down, None, ["mlp.down_proj"]),
    ):
        scales = choose([tensor(f"{base}{part}.weight") for part in parts], squares)
        for part in parts:
            found[f"{part}.weight/columns"] = scales
        if norm is not None:
            found[f"{norm}.weight/rows"] = np.reciprocal(scales)
        else:
            found["mlp.up_proj.weight/rows"] = found["mlp.up_proj.bias/rows"] = np.reciprocal(
                scales
            )
    return found


def balanced(weights: Sequence[FloatArray], squares: FloatArray) -> FloatArray:
    """(K,) scales after which inputs and weights of all channels are about alike."""
    largest = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
    scales = np.sqrt(magnitudes(squares) / np.maximum(largest, 1e-6))
    return np.asarray(scales / np.exp(np.log(scales).mean()), dtype=np.float32)


def least_error(form: MatrixFormat) -> Choose:
    """Scales with the least error of the outputs, were the channels independent.

    Args:
        form: How the matrices will be packed.
    """

    def search(weights: Sequence[FloatArray], squares: FloatArray) -> FloatArray:
        sampled = [weight[:: -(-len(weight) // SAMPLED_ROWS)] for weight in weights]
        size = magnitudes(squares)
        best, scales = np.inf, np.ones_like(size)
        for power in POWERS:
            tried = size**power
            tried = (tried / np.sqrt(tried.max() * tried.min())).astype(np.float32)
            error = 0.0
            for weight in sampled:
                stretched = weight * tried
                rounded = dequantize(quantize(stretched, form), form, weight.shape[1])
                error += float((np.square((rounded - stretched) / tried) * squares).sum())
            if error < best:
                best, scales = error, tried
        return scales

    return search
