"""A product with a matrix in blocks of 4 or 8 bits.

TensorRT wants the middle of the range to stand for 0 (no zero points), scales that are not negative
and whole blocks. What comes otherwise (the gate's own matrix, embeddings that a decoder also
multiplies with, odd widths) and what an older release does not read keeps its rounded values in
floating point.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from edge_safe.export.packing import ByteArray, FloatArray, Packed, dequantize, unpack_values
from edge_safe.export.quantization import MatrixFormat
from edge_safe.export.tensorrt.lowering import Lowering, attributes

# Opset from which on weights may come in blocks.
BLOCKS = 21


def lower(low: Lowering, node: onnx.NodeProto) -> None:
    """Emits the product and its bias."""
    found, scope = attributes(node), node.name
    columns, rows, bits, block = (int(found[n]) for n in ("K", "N", "bits", "block_size"))
    blocks = -(-columns // block)
    values = low.source.array(node.input[1]).reshape(rows, blocks, -1)
    scales = low.source.array(node.input[2]).reshape(rows, blocks)
    zeros = node.input[3] if len(node.input) > 3 else ""
    name = node.input[1]
    whole = not zeros and columns % block == 0 and bool((scales >= 0).all())
    if whole and low.release.opset >= BLOCKS:
        weight = _in_blocks(low, name, unpack_values(values, bits, block), scales, bits)
    else:
        points = low.source.array(zeros).reshape(rows, -1) if zeros else None
        form = MatrixFormat(bits, block, symmetric=points is None)
        plain = dequantize(Packed(values, scales, points), form, columns)
        # As a table stands, which a look-up may share.
        table = low.weight(f"{name}.rows", plain.astype(np.float16 if low.half else np.float32))
        weight = low.g.once(
            f"{name}/columns",
            lambda: low.g.op("Transpose", [table], scope=f"{name}/columns", perm=[1, 0]),
        )
    bias = node.input[5] if len(node.input) > 5 else ""
    x = low.value(node.input[0])
    made = low.product(x, weight, scope, None if bias else list(node.output))
    if bias:
        low.g.op("Add", [made, low.value(bias)], scope=scope, outputs=list(node.output))


def _in_blocks(low: Lowering, name: str, values: ByteArray, scales: FloatArray, bits: int) -> str:
    """(K, N) weight behind DequantizeLinear.

    Args:
        low: The graph.
        name: Of the weight.
        values: (N, blocks, block), the middle of the range for 0.
        scales: (N, blocks).
        bits: 4 or 8.
    """

    def make() -> str:
        flat = values.reshape(len(values), -1)
        signed = np.ascontiguousarray((flat.astype(np.int16) - 2 ** (bits - 1)).T.astype(np.int8))
        if bits == 4:
            pairs = (signed & 15).astype(np.uint8).reshape(-1, 2)
            proto = low.store.add(pairs[:, 0] | pairs[:, 1] << 4).proto(name, signed.shape)
            proto.data_type = TensorProto.INT4
            weight = low.g.initializer(proto)
        else:
            weight = low.weight(name, signed)
        steps = low.steps(scales)
        if bits == 8 and steps.shape[1] == 1:
            # The builder of TensorRT for RTX 1.7.1 falls over a single block of int8.
            inputs = [weight, low.weight(f"{name}_scales", steps[:, 0])]
            return low.g.op("DequantizeLinear", inputs, scope=f"{name}/blocks", axis=1)
        inputs = [weight, low.weight(f"{name}_scales", np.ascontiguousarray(steps.T))]
        return low.g.op(
            "DequantizeLinear",
            inputs,
            scope=f"{name}/blocks",
            axis=0,
            block_size=values.shape[2],
        )

    return low.g.once(f"{name}/blocks", make)
