"""Prepares the next item in another thread while the present one is worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

Item = TypeVar("Item")
Ready = TypeVar("Ready")


def ahead(prepare: Callable[[Item], Ready], items: Sequence[Item]) -> Iterator[Ready]:
    """Prepared items in their order, at most one beyond the one that is worked on.

    What ``prepare`` raises surfaces where its item would come. A single item takes no thread.

    Args:
        prepare: Runs in one thread at a time, not always the caller's.
        items: What it is given.
    """
    coming: Future[Ready] | None = None
    for number, item in enumerate(items):
        ready = prepare(item) if coming is None else coming.result()
        if number + 1 < len(items):
            coming = _started(prepare, items[number + 1])
        yield ready


def _started(prepare: Callable[[Item], Ready], item: Item) -> Future[Ready]:
    """One preparation in a thread that ends with it, whether or not anybody asks for it."""
    future: Future[Ready] = Future()

    def work() -> None:
        try:
            future.set_result(prepare(item))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, name="ahead").start()
    return future
