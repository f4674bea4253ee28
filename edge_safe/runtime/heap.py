"""How the C library hands out small pieces of memory."""

from __future__ import annotations

import os

# glibc's <malloc.h>.
_M_ARENA_MAX = -8


def share_one_heap() -> None:
    """Lets all threads of this process share one heap, where the C library is glibc.

    By itself glibc gives threads heaps of their own, up to eight a core, and what one thread frees
    stays there: 10 to 20 MB after the graphs of a 135M model were opened by several threads. Large
    pieces come from ONNX Runtime's arena anyway. ``MALLOC_ARENA_MAX`` in the environment goes
    before.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return
    try:
        import ctypes

        library = ctypes.CDLL(None)
    except (ImportError, OSError, TypeError):
        # A trimmed Python, a static build, or no dlopen of the program itself: nothing is lost.
        return
    if hasattr(library, "mallopt"):
        library.mallopt(_M_ARENA_MAX, 1)
