"""Ways to round a weight matrix, as a table: what the kernels would compute with.

The exporter's own schemes are its own functions. The other two are what ONNX Runtime offers for
its 4-bit kernels, written down again here because its quantizers want a whole graph; the tests
compare them with ONNX Runtime's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from edge_safe.export.packing import FloatArray, dequantize
from edge_safe.export.quantization import MatrixFormat
from edge_safe.export.rounding import quantize

BLOCK = 32

K_STEPS = 20
K_STRIDE = 0.1
HQQ_STEPS = 20
HQQ_NORM = 0.7
HQQ_BETA = 10.0
HQQ_GROWTH = 1.01


@dataclass(frozen=True, slots=True)
class Scheme:
    """One row of the table.

    Attributes:
        name: What the study calls it.
        bits: Bits of a weight, without what a block stores besides.
        rounded: (N, K) float32 -> the same shape; K is a multiple of ``BLOCK``.
    """

    name: str
    bits: int
    rounded: Callable[[FloatArray], FloatArray]

    def __call__(self, weight: FloatArray) -> FloatArray:
        """Rounds a matrix of any width; a last block that is not full is filled with its end."""
        width = weight.shape[1]
        padded = np.pad(weight, ((0, 0), (0, -width % BLOCK)), mode="edge")
        return np.ascontiguousarray(self.rounded(padded)[:, :width], np.float32)


def exported(weight: FloatArray, form: MatrixFormat) -> FloatArray:
    """The exporter's rounding."""
    return dequantize(quantize(weight, form), form, weight.shape[1])


def k_quant(weight: FloatArray, bits: int) -> FloatArray:
    """Searches scale and minimum of each block for the least weighted error; whole zero points.

    llama.cpp's ``make_qkx2_quants`` (ggml/src/ggml-quants.c), with the weights, steps and whole
    zero points of ONNX Runtime's quantizer.
    """
    x = weight.reshape(-1, BLOCK)
    top = np.float32(2**bits - 1)
    importance = np.sqrt((x**2).mean(1, keepdims=True)) + np.abs(x)
    least, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    scale = _inverse(_inverse(high - least) * top)
    values = np.clip(np.rint((x - least) / scale), 0, top)
    error = _total(importance * (scale * values + least - x) ** 2)
    sum_w, sum_x = _total(importance), _total(importance * x)
    for step in range(K_STEPS):
        # The least value found so far is the origin of the next try, as in the original.
        steps = np.float32(top - 1 + K_STRIDE * step)
        values = np.clip(np.rint(_inverse(high - least) * steps * (x - least)), 0, top)
        weighted = importance * values
        sum_l, sum_l2, sum_xl = _total(weighted), _total(weighted * values), _total(weighted * x)
        with np.errstate(divide="ignore", invalid="ignore"):
            determinant = sum_w * sum_l2 - sum_l**2
            new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
            new_least = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
            new_error = _total(importance * (new_scale * values + new_least - x) ** 2)
        better = new_error < error
        scale, least = np.where(better, new_scale, scale), np.where(better, new_least, least)
        error = np.where(better, new_error, error)
    zero = np.clip(np.rint(-least / scale), 0, top)
    values = np.clip(np.rint(x / scale + zero), 0, top)
    return _shaped((values - zero) * scale, weight)


def _total(values: FloatArray) -> FloatArray:
    """Sum of each block."""
    total: FloatArray = values.sum(1, keepdims=True)
    return total


def _inverse(values: FloatArray) -> FloatArray:
    """1 / x, and 1 where x is 0."""
    safe: FloatArray = np.where(values == 0, 1, values).astype(np.float32)
    return np.reciprocal(safe)


def _shaped(blocks: FloatArray, weight: FloatArray) -> FloatArray:
    """Blocks as the matrix they were cut from."""
    return np.ascontiguousarray(blocks.reshape(weight.shape), np.float32)


def hqq(weight: FloatArray, bits: int) -> FloatArray:
    """Half-quadratic quantization: zero points, not whole, for the least p-norm of the error.

    Badri & Shaji, mobiusml.github.io/hqq_blog, 2023, with ONNX Runtime's constants.
    """
    x = weight.reshape(-1, BLOCK).astype(np.float32)
    top = 2**bits - 1
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    scale = np.minimum(top / np.where(high == low, top, high - low), 2e4).astype(np.float32)
    zero = np.rint(-low * scale)
    beta, best = HQQ_BETA, 1e4
    for _ in range(HQQ_STEPS):
        values = np.clip(np.rint(x * scale + zero), 0, top)
        error = x - (values - zero) / scale
        size = np.abs(error)
        shrunk = np.maximum(size - (size + 1e-8) ** (HQQ_NORM - 1) / beta, 0)
        zero = (values - (x - np.sign(error) * shrunk) * scale).mean(1, keepdims=True)
        beta *= HQQ_GROWTH
        if not size.mean() < best:
            break
        best = float(size.mean())
    values = np.clip(np.rint(x * scale + zero), 0, top)
    return _shaped((values - zero) / scale, weight)


def _exported(
    bits: int, *, symmetric: bool = False, offsets: bool = False
) -> Callable[..., FloatArray]:
    form = MatrixFormat(bits, symmetric=symmetric, offsets=offsets)
    return partial(exported, form=form)


SCHEMES = (
    Scheme("int8", 8, _exported(8)),
    Scheme("int4 with offsets (this project's)", 4, _exported(4, offsets=True)),
    Scheme("int4 symmetric", 4, _exported(4, symmetric=True)),
    Scheme("int4 asymmetric", 4, _exported(4)),
    Scheme("int4 k-quant", 4, partial(k_quant, bits=4)),
    Scheme("int4 HQQ", 4, partial(hqq, bits=4)),
    Scheme("3 bits with offsets", 3, _exported(3, offsets=True)),
    Scheme("3 bits asymmetric", 3, _exported(3)),
    Scheme("3 bits k-quant", 3, partial(k_quant, bits=3)),
    Scheme("3 bits HQQ", 3, partial(hqq, bits=3)),
    Scheme("2 bits with offsets", 2, _exported(2, offsets=True)),
    Scheme("2 bits asymmetric", 2, _exported(2)),
    Scheme("2 bits k-quant", 2, partial(k_quant, bits=2)),
    Scheme("2 bits HQQ", 2, partial(hqq, bits=2)),
)
