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
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from edge_safe.errors import ExportError

# errno of a disk, or of a quota, that is full.
FULL = {errno.ENOSPC, errno.EDQUOT}
LOCK = ".lock"
# Seconds after which a folder without a lock is surely abandoned.
SETTLED = 60.0


@contextmanager
def staged(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Gives a temporary folder beside ``out`` that takes its place when the block ends well.

    Temporary folders left behind by an export that was killed are removed first. A folder that is
    there is replaced only with ``overwrite``, and only after success; upon failure it stays.

    Args:
        out: The folder to write.
        overwrite: Whether one that is there may be replaced.

    Raises:
        ExportError: ``out`` is there already, the folder cannot be written, the disk is full, or
            the block was interrupted from the keyboard. Nothing half-written is left.
    """
    # Only the parent is resolved: a link at ``out`` has to be seen as what it is.
    out = out.parent.resolve() / out.name
    check_free(out, overwrite=overwrite)
    prefix = f".{out.name}.exporting-"
    folder = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out.parent, prefix)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
        with _locked(folder):
            yield folder
        _publish(folder, out, overwrite=overwrite)
    except OSError as error:
        raise ExportError(_explain(error, out)) from error
    except KeyboardInterrupt as error:
        raise ExportError(
            f"The export was interrupted; {out} is as it was and nothing half-written is left."
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


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
def _locked(folder: Path) -> Iterator[None]:
    """Marks a folder as being written for as long as this process lives."""
    path = folder / LOCK
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        path.unlink()


def _remove_stale(parent: Path, prefix: str) -> None:
    """Removes temporary folders whose writer no longer lives."""
    for folder in parent.glob(f"{prefix}*"):
        try:
            with (folder / LOCK).open("rb") as file:
                _try_lock(file)
        except FileNotFoundError:
            # The moment between making and locking a folder is short; this one was left in it.
            if time.time() - folder.stat().st_mtime < SETTLED:
                continue
        except BlockingIOError:
            continue
        shutil.rmtree(folder, ignore_errors=True)


def _try_lock(file: IO[bytes]) -> None:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _publish(folder: Path, out: Path, *, overwrite: bool) -> None:
    """Flushes everything to disk and renames the folder to its place."""
    folder.chmod(0o777 & ~_umask())
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(folder)
    check_free(out, overwrite=overwrite)
    if not out.exists():
        folder.rename(out)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.replaced-", dir=out.parent))
        old = aside / out.name
        out.rename(old)
        try:
            folder.rename(out)
        except BaseException:
            old.rename(out)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
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
