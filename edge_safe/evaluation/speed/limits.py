"""What bounds a bundle on this machine: memory bandwidth or multiplications, and the share reached.

The roofline model (Williams, Waterman & Patterson, 2009): work cannot take less time than reading
its bytes at the measured bandwidth, nor than its operations at the measured peak.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_safe.evaluation.speed.graph_work import Work
from edge_safe.runtime.manifest import Manifest

_READ_BYTES = 256 << 20
_MATRIX = 1536
_REPEATS = 8


@dataclass(frozen=True, slots=True)
class Peak:
    """What this machine can do at most.

    Attributes:
        bytes_per_second: Reading from memory, all threads together.
        operations_per_second: Additions and multiplications of a float32 matrix product, by
            numpy's BLAS. Integer kernels may do more.
    """

    bytes_per_second: float
    operations_per_second: float


def measure_peak(threads: int) -> Peak:
    """Measures both, the best of several repeats, which takes a few seconds."""
    return Peak(_bandwidth(threads), _matrix_rate(threads))


def _bandwidth(threads: int) -> float:
    """Bytes read a second: the largest value of arrays that no cache holds, one a thread."""
    # Written once: untouched zeros would all be one and the same page.
    parts = [np.ones(_READ_BYTES // threads // 4, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        seconds = _best(lambda: list(pool.map(np.max, parts)))
    return sum(part.nbytes for part in parts) / seconds


def _matrix_rate(threads: int) -> float:
    """Operations a second of a square float32 product, split by rows over the threads."""
    left = np.ones((_MATRIX, _MATRIX), np.float32)
    rows = np.array_split(left, threads)
    with ThreadPoolExecutor(threads) as pool:
        # BLAS may have threads of its own; whichever way is faster is the machine's rate.
        whole = _best(lambda: left @ left)
        split = _best(lambda: list(pool.map(lambda part: part @ left, rows)))
        seconds = min(whole, split)
    return 2.0 * _MATRIX**3 / seconds


def _best(action: Callable[[], object]) -> float:
    """Shortest time of several runs, in seconds."""
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def bound(count_bytes: float, operations: float, peak: Peak, measured_ms: float) -> dict[str, Any]:
    """The least time that the work can take here, what sets it, and the share reached."""
    reading = count_bytes / peak.bytes_per_second * 1000.0
    computing = operations / peak.operations_per_second * 1000.0
    least = max(reading, computing)
    return {
        "bytes": int(count_bytes),
        "operations": int(operations),
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
    operations = 2.0 * work.multiplications + _attention_operations(manifest, past)
    return bound(work.weight_bytes + kept, operations, peak, measured_ms)


def prefill_bound(
    manifest: Manifest, work: Work, peak: Peak, tokens: int, measured_ms: float
) -> dict[str, Any]:
    """The prefill of a prompt; lm_head multiplies one position alone."""
    body = work.multiplications - work.head_multiplications
    operations = 2.0 * (body * tokens + work.head_multiplications)
    # A position looks at those before it: half of them on average.
    operations += _attention_operations(manifest, tokens / 2) * tokens
    return bound(work.weight_bytes + cache_bytes(manifest, tokens), operations, peak, measured_ms)


def cache_bytes(manifest: Manifest, positions: int) -> int:
    """Bytes of keys and values of that many positions."""
    first = manifest.graphs["gate" if "gate" in manifest.graphs else "decoder"]
    kinds = [t.dtype for t in first.inputs if t.name.startswith("past_key_values.")]
    width = np.dtype(kinds[0]).itemsize if kinds else 4
    model = manifest.model
    return 2 * model.layers * model.kv_heads * model.head_dim * width * positions


def _attention_operations(manifest: Manifest, past: float) -> float:
    """Scores and weighted sums of one position; the heads together are taken as d wide."""
    return 4.0 * manifest.model.layers * manifest.model.hidden_size * past
