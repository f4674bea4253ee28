"""What keys and values are kept as between positions.

GroupQueryAttention of onnxruntime 1.31 and 1.32 on the CPU takes a cache in float32, float16
(everything that enters the node is float16 then) and int8 with a fixed scale per channel. It also
takes 4 bits, two in a byte; the runtime's cache holds one value per element, so that is left out.
Older versions were not tried.
"""

from __future__ import annotations

from typing import Literal, cast, get_args

import numpy as np

from edge_safe.errors import ExportError
from edge_safe.export.activations import CacheReach
from edge_safe.export.graphs.spec import FloatArray

CacheFormat = Literal["fp32", "fp16", "int8"]

# Longer prompts reach further than those that were looked at; the rest is cut off.
HEADROOM = 1.25
TOP = 127


def cache_format_named(name: str) -> CacheFormat:
    """Checks a name.

    Raises:
        ExportError: There is no such format; the message lists those there are and why.
    """
    if name not in get_args(CacheFormat):
        raise ExportError(
            f"A KV cache in {name!r} is not possible: the attention kernel and the runtime's cache "
            f"take {', '.join(get_args(CacheFormat))} (bfloat16 has no kernel on the CPU, 4 bits "
            "have no place in the runtime's cache)."
        )
    return cast(CacheFormat, name)


def cache_scales(reach: CacheReach) -> tuple[FloatArray, FloatArray]:
    """(kv_heads * head_dim,) float32 scales of int8 keys and values."""

    def scales(largest: FloatArray) -> FloatArray:
        found: FloatArray = (np.maximum(largest, 1e-6) * HEADROOM / TOP).astype(np.float32)
        return found

    return scales(reach.keys), scales(reach.values)
