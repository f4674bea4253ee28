"""What weights are kept as for TensorRT, as a table.

Its 4-bit weights have no zero points, and its 8-bit ones a scale per output. Products are made in
float16 everywhere but in ``fp32``; norms, softmax and the gate's verdict stay in float32.
"""

from __future__ import annotations

from edge_safe.errors import ExportError
from edge_safe.export.quantization import HALF, INT8, PLAIN, ROWS, MatrixFormat, Precision

# 8 bits in blocks, for releases that read weights in blocks.
BLOCKS = MatrixFormat(8, 64, symmetric=True, positive=True)

# The smallest first: what ``auto`` tries. Towers are small, and 8 bits a row were too few for
# them: states of pebble's audio encoder moved by half of their range.
PRECISIONS = {
    row.name: row
    for row in (
        Precision(
            "int4",
            "4 bits, a scale per 64 weights, above the gate; 8 bits below it and in lm_head",
            MatrixFormat(4, 64, symmetric=True, positive=True),
            INT8,
            HALF,
            lm_head=BLOCKS,
            below_gate=BLOCKS,
        ),
        Precision("int8", "8 bits, a scale per output", ROWS, INT8, HALF, lm_head=ROWS),
        Precision("fp16", "half precision", HALF, HALF, HALF),
        Precision("fp32", "reference: agrees with torch within 1e-4", PLAIN, PLAIN, PLAIN),
    )
}


def tensorrt_precision(name: str) -> Precision:
    """Finds a row of the table.

    Raises:
        ExportError: There is no such row; the message lists those there are.
    """
    if name not in PRECISIONS:
        raise ExportError(
            f"TensorRT reads no precision {name!r}. Choose one of: {', '.join(PRECISIONS)}."
        )
    return PRECISIONS[name]
