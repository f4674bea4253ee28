"""Writes a folder beside its place and puts it there in one step, or not at all.

It knows nothing of what the folder holds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edge_safe.errors import ExportError

# errno of a disk, or of a quota, that is full.
FULL = {errno.ENOSPC, errno.EDQUOT}
# What stands in the temporary folder: its lock, the folder being written, the one it replaces.
LOCK = ".lock"
NEW, OLD = "new", "old"
# Seconds after which a temporary folder without a lock is surely abandoned.
SETTLED = 60.0


@contextmanager
def staged(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Gives a temporary folder beside ``out`` that takes its place when the block ends well.

    What exports that were killed left behind is removed first; if one was killed in the moment of
    replacing a folder, the old one goes back to its place. A folder that is there is replaced only
    with ``overwrite``, and only after success; upon failure it stays.

    Args:
        out: The folder to write.
        overwrite: Whether one that is there may be replaced.

    Raises:
        ExportError: ``out`` is there already, the folder cannot be written, or the disk is full.
            Nothing half-written is left, nor is it by whatever else ends the block.
    """
    # Only the parent is resolved: a link at ``out`` has to be seen as what it is.
    out = out.parent.resolve() / out.name
    prefix = f".{out.name}.exporting-"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out, prefix)
        check_free(out, overwrite=overwrite)
        with _work_folder(out.parent, prefix) as work:
            (work / NEW).mkdir()
            yield work / NEW
            _publish(work, out, overwrite=overwrite)
    except OSError as error:
        raise ExportError(_explain(error, out)) from error


def check_free(out: Path, *, overwrite: bool) -> None:
    """Refuses a place that is taken.

    Raises:
        ExportError: Something is there, and it is no folder or may not be replaced.
    """
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise ExportError(f"{out} is there already and is no folder. Choose another one.")
    if not overwrite and any(out.iterdir()):
        raise ExportError(
            f"{out} is there already. Choose another folder, or ask for --overwrite to replace it."
        )


@contextmanager
def _work_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A temporary folder that is locked for as long as this process lives, publishing included."""
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as name,
        (Path(name) / LOCK).open("wb") as file,
    ):
        fcntl.flock(file, fcntl.LOCK_EX)
        yield Path(name)


def _remove_stale(out: Path, prefix: str) -> None:
    """Removes temporary folders whose writer no longer lives; ``out`` comes back out of them."""
    for work in out.parent.glob(f"{prefix}*"):
        # Gone meanwhile, written at this moment, somebody else's.
        with suppress(FileNotFoundError, BlockingIOError, PermissionError), _abandoned(work):
            if (work / OLD).is_dir() and not os.path.lexists(out):
                (work / OLD).rename(out)
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _abandoned(work: Path) -> Iterator[None]:
    """Takes the lock that a dead process left; of a living one it is a ``BlockingIOError``."""
    try:
        # For writing, as locks on network drives ask for it.
        file = (work / LOCK).open("r+b")
    except FileNotFoundError:
        # The moment between making and locking a folder is short; this one was left in it.
        if time.time() - work.stat().st_mtime < SETTLED:
            raise
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _publish(work: Path, out: Path, *, overwrite: bool) -> None:
    """Flushes everything to disk and renames the folder to its place."""
    new, old = work / NEW, work / OLD
    new.chmod(0o777 & ~_umask())
    for path in new.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(new)
    check_free(out, overwrite=overwrite)
    if not out.exists():
        new.rename(out)
    else:
        out.rename(old)
        try:
            new.rename(out)
        except BaseException:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(out.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    # There is no way to read it without setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _explain(error: OSError, out: Path) -> str:
    """One line about a file system error."""
    if error.errno in FULL:
        free = shutil.disk_usage(_existing(out)).free // 2**20
        return (
            f"The disk is full ({free} MB free near {out}); nothing half-written is left. "
            "Free some space, or choose a folder on another disk."
        )
    return f"Cannot write {out}: {error}. Nothing half-written is left."


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
