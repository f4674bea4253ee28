"""What bounds a bundle on this machine: memory bandwidth or multiplications, and the share reached.

The roofline model (Williams, Waterman & Patterson, 2009): work cannot take less time than reading
its bytes at the measured bandwidth, nor than its operations at the measured peak.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_safe.evaluation.speed.graph_work import Work, work_of
from edge_safe.evaluation.speed.integer_product import integer_product
from edge_safe.evaluation.speed.samples import quartiles
from edge_safe.runtime.bundle import Bundle
from edge_safe.runtime.manifest import Manifest
from edge_safe.runtime.session import Session

_READ_BYTES = 256 << 20
_MATRIX = 1536
_PRODUCT = 2.0 * _MATRIX**3
_REPEATS = 8


@dataclass(frozen=True, slots=True)
class Peak:
    """What this machine can do at most, the best of several repeats.

    Attributes:
        bytes_per_second: Reading from memory, all threads together.
        float_operations_per_second: Additions and multiplications of a float32 matrix product, by
            numpy's BLAS.
        integer_operations_per_second: The same of 8-bit values, by ONNX Runtime's own kernel.
        spread: Of each by its name, the lower and upper quartile of the repeats.
    """

    bytes_per_second: float
    float_operations_per_second: float
    integer_operations_per_second: float
    spread: dict[str, list[float]]


def limits_of(
    bundle: Bundle, threads: int, decode: Mapping[int, float], prefill: Mapping[int, float]
) -> dict[str, Any]:
    """What bounds decoding and prefill, for the document; nothing but of the CPU.

    Args:
        bundle: The bundle.
        threads: Threads inside one operator.
        decode: Milliseconds of a token, by positions in the cache.
        prefill: Milliseconds of a prompt, by its tokens.
    """
    if bundle.provider != "cpu":
        return {}
    step, reading = work_of(bundle), work_of(bundle, prefill=True)
    peak = measure_peak(threads)
    names = {
        "memory_gb_per_second": "bytes_per_second",
        "float_gop_per_second": "float_operations_per_second",
        "integer_gop_per_second": "integer_operations_per_second",
    }
    return {
        **{name: getattr(peak, own) / 1e9 for name, own in names.items()},
        "spread": {name: [x / 1e9 for x in peak.spread[own]] for name, own in names.items()},
        "decode": [
            {"past": past, **decode_bound(bundle.manifest, step, peak, past, took)}
            for past, took in decode.items()
        ],
        "prefill": [
            {"prompt_tokens": tokens, **prefill_bound(bundle.manifest, reading, peak, tokens, took)}
            for tokens, took in prefill.items()
        ],
    }


def measure_peak(threads: int) -> Peak:
    """Measures them, which takes a few seconds."""
    rates = {
        "bytes_per_second": _bandwidth(threads),
        "float_operations_per_second": _float_rate(threads),
        "integer_operations_per_second": _integer_rate(threads),
    }
    best = {name: max(found) for name, found in rates.items()}
    spread = {name: quartiles(found) for name, found in rates.items()}
    return Peak(**best, spread=spread)


def _bandwidth(threads: int) -> list[float]:
    """Bytes read a second: the largest value of arrays that no cache holds, one a thread."""
    # Written once: untouched zeros would all be one and the same page.
    parts = [np.ones(_READ_BYTES // threads // 4, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return _rates(sum(part.nbytes for part in parts), lambda: list(pool.map(np.max, parts)))


def _float_rate(threads: int) -> list[float]:
    """Operations a second of a square float32 product, split by rows over the threads."""
    left = np.ones((_MATRIX, _MATRIX), np.float32)
    rows = np.array_split(left, threads)
    with ThreadPoolExecutor(threads) as pool:
        # BLAS may have threads of its own; whichever way is faster is the machine's rate.
        whole = _rates(_PRODUCT, lambda: left @ left)
        split = _rates(_PRODUCT, lambda: list(pool.map(lambda part: part @ left, rows)))
    return max(whole, split, key=max)


def _integer_rate(threads: int) -> list[float]:
    """Operations a second of a square product of 8-bit values."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "integer_product.onnx")
        path.write_bytes(integer_product(_MATRIX))
        session = Session(path, threads=threads)
    left = {"left": np.ones((_MATRIX, _MATRIX), np.uint8)}
    return _rates(_PRODUCT, lambda: session.run(left))


def _rates(work: float, action: Callable[[], object]) -> list[float]:
    """Work a second of several runs, after one that is not counted."""
    action()
    rates = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        action()
        rates.append(work / (time.perf_counter() - start))
    return rates


def bound(
    count_bytes: float, floats: float, integers: float, peak: Peak, measured_ms: float
) -> dict[str, Any]:
    """The least time that the work can take here, what sets it, and the share reached.

    Args:
        count_bytes: Read from memory.
        floats: Operations of float32 kernels.
        integers: Operations of integer kernels.
        peak: What the machine can do.
        measured_ms: What the work took.
    """
    reading = count_bytes / peak.bytes_per_second * 1000.0
    seconds = floats / peak.float_operations_per_second
    computing = (seconds + integers / peak.integer_operations_per_second) * 1000.0
    least = max(reading, computing)
    return {
        "bytes": int(count_bytes),
        "operations": int(floats + integers),
        "integer_operations": int(integers),
        "memory_ms": reading,
        "compute_ms": computing,
        "bound": "memory" if reading >= computing else "compute",
        "share_reached": least / measured_ms,
    }


def decode_bound(
    manifest: Manifest, work: Work, peak: Peak, past: int, measured_ms: float
) -> dict[str, Any]:
    """One decoding step with ``past`` positions in the cache."""
    kept = cache_bytes(manifest, past)
    integers = 2.0 * work.rounded_multiplications
    floats = 2.0 * work.multiplications - integers + _attention_operations(manifest, past)
    return bound(work.weight_bytes + kept, floats, integers, peak, measured_ms)


def prefill_bound(
    manifest: Manifest, work: Work, peak: Peak, tokens: int, measured_ms: float
) -> dict[str, Any]:
    """The prefill of a prompt; lm_head multiplies one position alone."""
    body = work.multiplications - work.head_multiplications
    operations = 2.0 * (body * tokens + work.head_multiplications)
    rounded = work.rounded_multiplications - work.rounded_head_multiplications
    integers = 2.0 * (rounded * tokens + work.rounded_head_multiplications)
    # A position looks at those before it: half of them on average.
    floats = operations - integers + _attention_operations(manifest, tokens / 2) * tokens
    read = work.weight_bytes + cache_bytes(manifest, tokens)
    return bound(read, floats, integers, peak, measured_ms)


def cache_bytes(manifest: Manifest, positions: int) -> int:
    """Bytes of keys and values of that many positions."""
    width = np.dtype(manifest.cache_dtype).itemsize
    model = manifest.model
    return 2 * model.layers * model.kv_heads * model.head_dim * width * positions


def _attention_operations(manifest: Manifest, past: float) -> float:
    """Scores and weighted sums of one position; the heads together are taken as d wide."""
    return 4.0 * manifest.model.layers * manifest.model.hidden_size * past
