"""Memory that is taken from the system only where it is written."""

from __future__ import annotations

import math
import mmap
import sys

import numpy as np

from edge_safe.runtime.session import Array

# What ONNX Runtime aligns its own tensors to.
_ALIGNMENT = 64


def lazy_zeros(count: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> list[Array]:
    """Zeroed arrays of one shape, in pages of their own that nothing else shares.

    The C library hands out memory that was used before, and zeroes all of it; here a page comes
    zeroed from the system when it is first written, and goes back with the last of the arrays.

    Raises:
        MemoryError: The system has no room for them.
    """
    items = math.prod(shape)
    step = -(-items * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    if not count * step:
        return [np.zeros(shape, dtype) for _ in range(count)]
    pages = private_pages(count * step)
    return [np.frombuffer(pages, dtype, items, i * step).reshape(shape) for i in range(count)]


def private_pages(size: int) -> mmap.mmap:
    """Zeroed pages of this process alone, which come from the system as they are written.

    Raises:
        MemoryError: The system has no room for them.
    """
    try:
        if sys.platform == "win32":
            return mmap.mmap(-1, size)
        # Not shared with a process that is forked, as they would be by default.
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no room for {size} bytes: {error}") from error
