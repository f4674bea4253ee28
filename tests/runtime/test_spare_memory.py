"""Memory that is used again: never while anybody can still see it."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_safe.runtime.session import Array
from edge_safe.runtime.spare_memory import SpareMemory

LARGE = (3, 2**18)  # 3 MiB


def address(array: Array) -> int:
    """Where its first element stands."""
    return int(array.__array_interface__["data"][0])


def test_an_array_takes_the_memory_of_one_that_is_gone() -> None:
    memory = SpareMemory(2**24)
    first = memory.empty(LARGE)
    where = address(first)
    del first
    assert address(memory.empty((2, 2**18))) == where


@pytest.mark.parametrize(
    "view",
    [lambda a: a[1:], lambda a: a.reshape(-1)[5:9], lambda a: a.view(np.uint8).T, memoryview],
)
def test_memory_that_somebody_still_sees_is_left_alone(view: Callable[[Array], object]) -> None:
    memory = SpareMemory(2**24)
    first = memory.empty(LARGE)
    first[:] = 7
    kept = view(first)
    before = np.asarray(kept).copy()
    del first
    second = memory.empty(LARGE)
    second[:] = 9
    assert np.array_equal(np.asarray(kept), before)


def test_a_larger_array_gets_memory_of_its_own() -> None:
    memory = SpareMemory(2**24)
    small = memory.empty((1, 2**18))
    del small
    large = memory.empty(LARGE)
    large[:] = 1
    assert large.shape == LARGE
    assert large.dtype == np.float32


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_what_a_smaller_array_leaves_over_goes_back() -> None:
    def resident() -> int:
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * mmap.PAGESIZE

    memory = SpareMemory(2**28)
    large = memory.empty((2**26,))
    large[:] = 1
    del large
    before = resident()
    small = memory.empty((2**20,))
    small[:] = 2
    assert before - resident() > 200 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="locks memory as Linux does")
def test_memory_that_is_locked_does_not_fail_a_smaller_array() -> None:
    memory = SpareMemory(2**24)
    large = memory.empty((2**20,))
    lock = ctypes.CDLL(None).mlock
    if lock(ctypes.c_void_p(address(large)), ctypes.c_size_t(large.nbytes)):
        pytest.skip("this process may not lock 4 MiB")
    del large
    small = memory.empty((2**18,))
    small[:] = 3
    assert (small == 3).all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 5), (2, 2**23)])
def test_what_is_small_or_beyond_the_limit_is_not_kept(shape: tuple[int, ...]) -> None:
    memory = SpareMemory(2**24)
    array = memory.empty(shape)
    assert array.shape == shape
    del array
    assert not memory._spare


def test_threads_never_share_an_array() -> None:
    memory = SpareMemory(2**24)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            array = memory.empty((1, 2**18))
            array[:] = number
            if not (array == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
