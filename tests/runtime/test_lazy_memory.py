"""Zeroed memory that the system gives page by page."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from edge_safe.runtime.lazy_memory import lazy_zeros

MB = 2**20


def resident() -> int:
    """Bytes of this process that are in memory."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS:")
    )
    return int(line.split()[1]) * 1024


def test_arrays_are_zero_aligned_and_apart() -> None:
    first, second = lazy_zeros(2, (1, 3, 5, 7), np.dtype(np.float32))
    assert first.shape == second.shape == (1, 3, 5, 7)
    assert not first.any()
    assert not second.any()
    first[:] = 1
    assert not second.any()
    for array in (first, second):
        assert array.flags.writeable
        assert array.flags.c_contiguous
        assert array.ctypes.data % 64 == 0


def test_memory_is_taken_where_it_is_written_and_given_back() -> None:
    gc.collect()
    before = resident()
    (array,) = lazy_zeros(1, (64 * MB,), np.dtype(np.uint8))
    assert resident() - before < 8 * MB
    array[: 32 * MB] = 1
    assert 28 * MB < resident() - before < 40 * MB
    del array
    assert resident() - before < 8 * MB


def test_arrays_of_no_size_are_arrays() -> None:
    assert [array.shape for array in lazy_zeros(2, (1, 0, 4), np.dtype(np.float32))] == [
        (1, 0, 4),
        (1, 0, 4),
    ]


def test_too_much_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="no room for"):
        lazy_zeros(1, (2**55,), np.dtype(np.uint8))
