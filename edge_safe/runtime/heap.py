"""How the C library hands out small pieces of memory."""

from __future__ import annotations

import ctypes
import sys

# glibc's <malloc.h>.
_M_ARENA_MAX = -8


def share_one_heap() -> None:
    """Lets all threads of this process share one heap, where the C library is glibc.

    By itself glibc gives threads heaps of their own, up to eight a core, and what one thread frees
    stays there: 10 to 20 MB after the graphs of a 135M model were opened by several threads. Large
    pieces come from ONNX Runtime's arena anyway.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_ARENA_MAX, 1)
