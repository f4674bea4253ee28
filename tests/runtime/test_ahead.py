"""The next item is prepared while the present one is worked on: in order, one ahead, no more."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest

from edge_safe.runtime.ahead import ahead


def helpers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


def test_items_come_in_their_order() -> None:
    assert list(ahead(lambda number: number * 10, range(20))) == list(range(0, 200, 10))


def test_the_next_item_is_prepared_while_the_present_one_is_worked_on() -> None:
    done = [threading.Event() for _ in range(2)]
    items = ahead(lambda number: done[number].set(), range(2))
    next(items)
    assert done[1].wait(10)


def test_no_more_than_the_next_item_is_prepared() -> None:
    begun: list[int] = []
    items = ahead(begun.append, range(5))
    for taken in range(1, 4):
        next(items)
        for helper in helpers():
            helper.join()
        assert begun == list(range(taken + 1))


def test_an_item_that_was_worked_on_is_given_back() -> None:
    made: list[weakref.ref[np.ndarray]] = []

    def prepare(number: int) -> np.ndarray:
        made.append(weakref.ref(array := np.full(8, number)))
        return array

    most = 0
    for _ in ahead(prepare, range(6)):
        gc.collect()
        most = max(most, sum(one() is not None for one in made))
    assert most <= 2


def test_an_error_surfaces_where_its_item_would_come() -> None:
    items = ahead(lambda number: 1 // number, [1, -1, 0, 2])
    assert [next(items), next(items)] == [1, -1]
    with pytest.raises(ZeroDivisionError):
        next(items)


def test_the_thread_ends_when_nobody_asks_any_more() -> None:
    items = ahead(lambda number: number, range(3))
    next(items)
    items.close()
    for helper in helpers():
        helper.join(10)
    assert not helpers()


@pytest.mark.parametrize("count", [0, 1])
def test_without_a_next_item_there_is_no_thread(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading.Thread, "start", None)
    assert len(list(ahead(lambda number: number, range(count)))) == count
