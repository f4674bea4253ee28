"""Locks between processes: files that the kernel unlocks when their holder ends, however it ends.

A lock's file is removed by whoever holds it. So one that has waited looks whether the file it
locked still stands at its path, and starts over if not.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edge_safe.errors import BundleError

# Seconds between two attempts.
_PAUSE = 0.1


@contextmanager
def locked(path: Path, patience: float, waiting: Callable[[str], None]) -> Iterator[None]:
    """Holds a lock, for which it waits.

    Args:
        path: File of the lock, in a folder that is there.
        patience: Seconds to wait.
        waiting: Told who holds the lock, whenever that changes.

    Raises:
        BundleError: Somebody else held it all that time.
        OSError: The file cannot be written.
    """
    until = time.monotonic() + patience
    holder = None
    handle = _take(path)
    while handle is None:
        if (now := _holder(path)) != holder:
            holder = now
            waiting(holder)
        if time.monotonic() > until:
            raise BundleError(
                f"After {patience:.0f} seconds, {holder} still holds {path}. Wait until it is "
                "done, or end it, and try again."
            )
        time.sleep(_PAUSE)
        handle = _take(path)
    with _holding(handle, path):
        yield


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Holds a lock if nobody else does; gives whether it is held.

    Raises:
        OSError: The file cannot be written.
    """
    handle = _take(path)
    if handle is None:
        yield False
    else:
        with _holding(handle, path):
            yield True


def _take(path: Path) -> int | None:
    """Locks the file that stands at a path and writes this process's id into it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), path.stat()):
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


@contextmanager
def _holding(handle: int, path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        # First the file, so that nobody locks one that is about to go; a child that was forked
        # meanwhile has the handle too, and must not hold the lock on.
        path.unlink(missing_ok=True)
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _holder(path: Path) -> str:
    """Who holds the lock, in words."""
    number = ""
    with suppress(OSError):
        number = path.read_text(encoding="ascii", errors="replace")
    return f"process {number}" if number.isdecimal() else "another process"
