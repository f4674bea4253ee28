"""Memory that arrays left behind, kept for the next ones.

What a prompt needs once comes from the system page by page, each zeroed first, and goes back when
it is let go.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque

import numpy as np

from edge_safe.runtime.lazy_memory import private_pages
from edge_safe.runtime.session import Array

_PIECE = 2**20
"""Bytes that sizes are rounded up to; the system gives no memory to what nobody writes."""


class SpareMemory:
    """Hands out arrays in memory that earlier ones, of which no view is left, had. Thread-safe.

    Args:
        limit: Bytes that an array may leave behind; what is larger goes back to the system.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # One is enough: requests follow each other.
        self._spare: deque[mmap.mmap] = deque(maxlen=1)

    def empty(self, shape: tuple[int, ...]) -> Array:
        """An uninitialized float32 array.

        Raises:
            MemoryError: The system has no room for it.
        """
        size = 4 * math.prod(shape)
        if not _PIECE <= size <= self._limit:
            return np.empty(shape, np.float32)
        pages = self._pages(-(-size // _PIECE) * _PIECE)
        # Views of an array hold that array, so it lives as long as the last of them.
        whole = np.frombuffer(pages, np.uint8)
        weakref.finalize(whole, self._spare.append, pages).atexit = False
        return whole[:size].view(np.float32).reshape(shape)

    def _pages(self, size: int) -> mmap.mmap:
        """New pages, or spare ones that are in memory no further than ``size`` bytes."""
        try:
            pages = self._spare.pop()
        except IndexError:
            return private_pages(size)
        if len(pages) == size:
            return pages
        if len(pages) > size and hasattr(mmap, "MADV_DONTNEED"):
            # Nobody counts what stands behind the array, so it goes back.
            try:
                pages.madvise(mmap.MADV_DONTNEED, size, len(pages) - size)
            except OSError:
                # A process that locks its memory keeps all of it.
                return private_pages(size)
            return pages
        return private_pages(size)
