"""How the C library hands out memory, and when it gives unused memory back."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

# glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

_SETTINGS = {
    # By itself glibc gives threads heaps of their own, up to eight a core, and what one thread
    # frees stays there: 10 to 20 MB after the graphs of a 135M model were opened.
    "MALLOC_ARENA_MAX": (_M_ARENA_MAX, 1),
    # Larger pieces go back as they are freed. By itself glibc raises this limit to the largest
    # piece freed so far, here a layer's weights; then what a prompt takes and frees lies between
    # what stays: 16 to 26 MB of holes in the heap of a 135M model.
    "MALLOC_MMAP_THRESHOLD_": (_M_MMAP_THRESHOLD, 2 * 2**20),
    # What is freed at the heap's end stays for the next token; fixed by the one above, at 128 KB.
    "MALLOC_TRIM_THRESHOLD_": (_M_TRIM_THRESHOLD, 4 * 2**20),
}
"""What glibc is told, by the name it has in the environment, which goes before."""

_UNUSED_LIMIT = 32 * 2**20
"""Bytes that lie unused before they are given back: more than a request takes and frees."""


def keep_heap_small() -> None:
    """Keeps the heap of this process small and whole, where the C library is glibc."""
    library = _c_library()
    if library is not None and hasattr(library, "mallopt"):
        for name, (parameter, value) in _SETTINGS.items():
            if name not in os.environ:
                library.mallopt(parameter, value)


def give_back_unused() -> None:
    """Gives memory back to the system once much of the heap lies unused.

    Requests of many lengths leave holes between pieces that stay: after a thousand of them 155 of
    586 MB were such holes. Looking takes microseconds, giving back some ten milliseconds.
    """
    functions = _unused_and_trim()
    if functions is not None:
        unused, trim = functions
        if unused() > _UNUSED_LIMIT:
            trim()


class _Mallinfo2(ctypes.Structure):
    """glibc's ``struct mallinfo2``; ``fordblks`` are the free bytes of all heaps."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def _c_library() -> ctypes.CDLL | None:
    """The C library; None where a static build or a system without dlopen hides it."""
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None


@functools.cache
def _unused_and_trim() -> tuple[Callable[[], int], Callable[[], object]] | None:
    """How many bytes lie unused, and what gives them back; None before glibc 2.33 and elsewhere."""
    library = _c_library()
    if library is None or not (hasattr(library, "mallinfo2") and hasattr(library, "malloc_trim")):
        return None
    library.mallinfo2.restype = _Mallinfo2
    return (lambda: int(library.mallinfo2().fordblks)), (lambda: library.malloc_trim(0))
