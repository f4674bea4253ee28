"""k-quant and HQQ by ONNX Runtime's own quantizers, one matrix at a time.

They import onnxruntime, so this module goes through the runtime's session module first, which
turns telemetry off. Nothing else of onnxruntime is used here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

import edge_safe.runtime.session  # noqa: F401 - switches telemetry off before onnxruntime

FloatArray = npt.NDArray[np.float32]
Found = tuple[npt.NDArray[np.uint8], FloatArray, FloatArray]


def k_quant(blocks: FloatArray, bits: int) -> Found:
    """Searches scale and minimum of each block for the least weighted error.

    llama.cpp's ``make_qkx2_quants`` with whole zero points.

    Args:
        blocks: (n, block) float32.
        bits: Bits of a value.

    Returns:
        (n, block) values, (n,) scales and (n,) whole zeros.
    """
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    # A block of equal values divides by zero; the search keeps what it had.
    with np.errstate(divide="ignore", invalid="ignore"):
        values, scales, zeros = quant_tensor_k_quant_cpu(blocks, bits, blocks.shape[1])
    return (
        values.astype(np.uint8),
        scales[:, 0].astype(np.float32),
        zeros[:, 0].astype(np.float32),
    )


def hqq(blocks: FloatArray, bits: int) -> Found:
    """Half-quadratic quantization (Badri & Shaji, 2023): zeros, not whole, for the least p-norm.

    Args:
        blocks: (n, block) float32.
        bits: Bits of a value.

    Returns:
        (n, block) values, (n,) scales and (n,) zeros.
    """
    with _logging_as_it_was():
        from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantizer

    quantizer = HQQWeightOnlyQuantizer(None)
    values, scales, zeros = quantizer.quantize_internal(
        torch.from_numpy(blocks), bits=bits, group_size=blocks.shape[1], axis=1
    )
    return (
        values.numpy().astype(np.uint8),
        scales[:, 0].numpy().astype(np.float32),
        zeros[:, 0].numpy().astype(np.float32),
    )


@contextmanager
def _logging_as_it_was() -> Iterator[None]:
    """Undoes what importing the quantizers does to the root logger."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
