"""Ways to round a weight matrix, as a table: what the kernels would compute with.

All are functions of the exporter, which takes k-quant and HQQ from ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from edge_safe.export.library_rounding import Found, hqq, k_quant
from edge_safe.export.packing import FloatArray, dequantize
from edge_safe.export.quantization import MatrixFormat
from edge_safe.export.rounding import quantize

BLOCK = 32

Method = Callable[[FloatArray, int], Found]


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


def by_library(weight: FloatArray, bits: int, method: Method) -> FloatArray:
    """k-quant or HQQ of ONNX Runtime's quantizers."""
    values, scales, zeros = method(weight.reshape(-1, BLOCK), bits)
    blocks = (values - zeros[:, None]) * scales[:, None]
    return np.ascontiguousarray(blocks.reshape(weight.shape), np.float32)


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
    Scheme("int4 k-quant", 4, partial(by_library, bits=4, method=k_quant)),
    Scheme("int4 HQQ", 4, partial(by_library, bits=4, method=hqq)),
    Scheme("3 bits with offsets", 3, _exported(3, offsets=True)),
    Scheme("3 bits asymmetric", 3, _exported(3)),
    Scheme("3 bits k-quant", 3, partial(by_library, bits=3, method=k_quant)),
    Scheme("3 bits HQQ", 3, partial(by_library, bits=3, method=hqq)),
    Scheme("2 bits with offsets", 2, _exported(2, offsets=True)),
    Scheme("2 bits asymmetric", 2, _exported(2)),
    Scheme("2 bits k-quant", 2, partial(by_library, bits=2, method=k_quant)),
    Scheme("2 bits HQQ", 2, partial(by_library, bits=2, method=hqq)),
)
