"""Tests of how the C library hands out memory, in a process of its own."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

ALLOCATE = """
import ctypes, sys, threading
if sys.argv[1] == "shared":
    from edge_safe.runtime.heap import keep_heap_small
    keep_heap_small()
library = ctypes.CDLL(None)
library.malloc.argtypes, library.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
together = threading.Barrier(4)
def allocate():
    together.wait()
    for _ in range(100):
        library.malloc(2000)
threads = [threading.Thread(target=allocate) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
library.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
library.malloc_info(0, ctypes.c_void_p.in_dll(library, "stdout"))
library.fflush(None)
"""


def heaps(way: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", ALLOCATE, way], capture_output=True, text=True, check=True
    )
    return run.stdout.count("<heap nr=")


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_info"), reason="glibc alone"
)
def test_threads_share_one_heap() -> None:
    assert heaps("own") > 1
    assert heaps("shared") == 1


HOLES = """
import ctypes
from pathlib import Path
from edge_safe.runtime.heap import give_back_unused, keep_heap_small
keep_heap_small()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20
library = ctypes.CDLL(None)
library.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: pieces come from the heap
library.malloc.argtypes, library.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
pieces = []
for _ in range(80):
    piece = library.malloc(2**20)
    library.memset(piece, 1, 2**20)
    pieces.append(piece)
    library.malloc(4096)  # stays, so that what is freed leaves a hole
full = resident()
for piece in pieces[:20]:
    library.free(piece)
give_back_unused()
few = resident()
for piece in pieces[20:]:
    library.free(piece)
give_back_unused()
print(full - few, full - resident())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33"
)
def test_holes_are_given_back_once_there_are_many() -> None:
    run = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    few, many = map(int, run.stdout.split())
    assert few < 5
    assert 75 <= many <= 85


LARGE = """
import ctypes, sys
from edge_safe.runtime.heap import keep_heap_small
if sys.argv[1] == "small":
    keep_heap_small()
library = ctypes.CDLL(None)
library.malloc.argtypes, library.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
library.sbrk.argtypes, library.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]
library.free(library.malloc(2**24))  # as large as a layer's weights
before = library.sbrk(0)
library.malloc(2**22)
print(library.sbrk(0) - before)
"""


def grown(way: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", LARGE, way], capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33"
)
def test_large_pieces_stay_out_of_the_heap_whatever_was_freed_before() -> None:
    assert grown("own") > 2**21
    assert grown("small") == 0


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33"
)
def test_what_the_environment_says_of_the_heap_goes_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**25))
    assert grown("small") > 2**21
