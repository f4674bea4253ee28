"""Rows of a table that was stored in blocks: kept in floating point."""

from __future__ import annotations

import numpy as np
import onnx

from edge_safe.export.graphs.builder import FLOAT
from edge_safe.export.packing import Packed, dequantize
from edge_safe.export.quantization import MatrixFormat
from edge_safe.export.tensorrt.lowering import Lowering, attributes


def lower(low: Lowering, node: onnx.NodeProto) -> None:
    """Emits the look-up, float32."""
    found, scope, name = attributes(node), node.name, node.input[0]
    bits, block = int(found["bits"]), int(found["block_size"])
    scales = low.source.array(node.input[2])
    rows, blocks = scales.shape
    values = low.source.array(name).reshape(rows, blocks, -1)
    zeros = low.source.array(node.input[3]).reshape(rows, -1) if len(node.input) > 3 else None
    form = MatrixFormat(bits, block, symmetric=zeros is None)
    plain = dequantize(Packed(values, scales, zeros), form, blocks * block)
    table = low.weight(f"{name}.rows", plain.astype(np.float16 if low.half else np.float32))
    inputs = [table, low.value(node.input[1])]
    if not low.half:
        low.g.op("Gather", inputs, scope=scope, outputs=list(node.output), axis=0)
        return
    picked = low.g.op("Gather", inputs, scope=scope, axis=0)
    low.g.op("Cast", [picked], scope=scope, outputs=list(node.output), to=FLOAT)
