"""Keeps what takes long to build: made once, published whole, checked before every use.

An engine is a folder ``GRAPH-KEY`` with its files and ``engine.json``, which says what it depends
on and what its files must be. What does not fit exactly counts as not there. The hashes find what
was cut short, damaged or mixed up; they do not hold off somebody who may write to the folder.

It does not know what builds an engine or what runs it.
"""

from __future__ import annotations

import os
import platform
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import msgspec

import edge_safe
from edge_safe.errors import BundleError
from edge_safe.runtime.digest import sha256_file
from edge_safe.runtime.engines.key import EngineKey
from edge_safe.runtime.engines.lock import held, locked
from edge_safe.runtime.manifest import FileEntry

RECORD_FILE = "engine.json"

Report = Callable[[str, float], None]
"""Told the name of a step and the share of it that is done."""

Build = Callable[[Path, Report], None]
"""Writes the files of an engine into an empty folder."""

# Seconds to wait for another process that builds the same engine.
PATIENCE = 3600.0

# Follows the name of an engine in that of a folder which is none yet, or none any more.
_UNFINISHED = ".unfinished-"


class EngineRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of ``engine.json``.

    Attributes:
        schema_version: Of this file, and of what a builder puts beside it.
        key: What the engine depends on, in full.
        files: Every other file of the folder.
        build_seconds: How long it took.
        created: When, in UTC.
        tools: Versions of what built it that are not in the key.
    """

    schema_version: Literal[1]
    key: EngineKey
    files: dict[str, FileEntry]
    build_seconds: float
    created: str
    tools: dict[str, str]


@dataclass(frozen=True, slots=True)
class StoredEngine:
    """A folder of the store, as it was found.

    Attributes:
        folder: Where.
        record: None where it cannot be read.
        fault: Why it is never loaded; None for one that is whole.
    """

    folder: Path
    record: EngineRecord | None
    fault: str | None


class EngineStore:
    """Engines in one folder. Safe to use from several threads and processes."""

    def __init__(self, folder: Path, patience: float = PATIENCE) -> None:
        """Takes the folder, which is made when the first engine is.

        Args:
            folder: Where engines are kept.
            patience: Seconds to wait for another process that builds the same engine.
        """
        self.folder = folder
        self._patience = patience

    def find(self, key: EngineKey) -> Path | None:
        """Folder of an engine that is whole and was made for this very key; writes nothing."""
        engine = examine(self.folder / key.name)
        whole = engine.fault is None and engine.record is not None and engine.record.key == key
        return engine.folder if whole else None

    def obtain(self, key: EngineKey, build: Build, report: Report) -> Path:
        """Folder of the engine, which is built if it is not there; by one process alone.

        Args:
            key: What the engine depends on.
            build: Called at most once; what it has written becomes the engine if it returns.
            report: Told what is going on.

        Raises:
            BundleError: The folder cannot be written, or another process builds for too long.
            EdgeSafeError: What ``build`` raises; nothing of its work is left.
        """
        found = self.find(key)
        if found is not None:
            return found
        try:
            self.folder.mkdir(parents=True, exist_ok=True)

            def waiting(holder: str) -> None:
                report(f"waiting for {holder}, which builds {key.name}", 0.0)

            with locked(self._lock(key.name), self._patience, waiting):
                return self.find(key) or self._build(key, build, report)
        except OSError as error:
            raise BundleError(
                f"Cannot keep an engine in {self.folder}: {error}. Let it be a folder that can be "
                "written and has room, or name another one with EDGE_SAFE_CACHE."
            ) from error

    def engines(self) -> list[StoredEngine]:
        """Every engine of the folder, examined, in the order of their names."""
        if not self.folder.is_dir():
            return []
        there = sorted(self.folder.iterdir())
        return [examine(path) for path in there if not path.name.startswith(".")]

    def remove(self, engine: StoredEngine) -> None:
        """Removes an engine, unless a process is building it anew.

        Raises:
            OSError: The folder cannot be written.
        """
        with held(self._lock(engine.folder.name)) as mine:
            if mine:
                self._discard(engine.folder)

    def remove_unfinished(self) -> int:
        """Removes what killed builds left behind; returns how many there were.

        A build holds the lock of its engine for as long as its process lives, so what belongs to
        a lock that can be had belongs to nobody.

        Raises:
            OSError: The folder cannot be written.
        """
        if not self.folder.is_dir():
            return 0
        left = [path for path in self.folder.iterdir() if _UNFINISHED in path.name]
        removed = 0
        for path in left:
            with held(self._lock(path.name[1:].rpartition(_UNFINISHED)[0])) as mine:
                if mine:
                    shutil.rmtree(path, ignore_errors=True)
                    removed += 1
        return removed

    def _lock(self, name: str) -> Path:
        """File of the lock of one engine."""
        return self.folder / f".{name}.lock"

    def _build(self, key: EngineKey, build: Build, report: Report) -> Path:
        """Builds beside the engine's place, then puts it there. Its lock is held."""
        for path in self.folder.glob(f".{key.name}{_UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        self.remove_unfinished()
        folder = self.folder / key.name
        with self._temporary(key.name) as work:
            began = time.monotonic()
            build(work, report)
            _write_record(work, key, time.monotonic() - began)
            self._discard(folder)
            work.rename(folder)
            _sync(self.folder)
        return folder

    @contextmanager
    def _temporary(self, name: str) -> Iterator[Path]:
        """A folder that goes when the block ends, unless it was renamed."""
        work = self.folder / f".{name}{_UNFINISHED}{uuid.uuid4().hex}"
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _discard(self, folder: Path) -> None:
        """Takes a folder away in one step and deletes it then, so that none is half there."""
        if os.path.lexists(folder):
            with self._temporary(folder.name) as aside:
                folder.rename(aside / folder.name)


def examine(folder: Path) -> StoredEngine:
    """Reads what a folder says it is and checks every one of its files."""
    try:
        data = (folder / RECORD_FILE).read_bytes()
        record = msgspec.json.decode(data, type=EngineRecord)
        return StoredEngine(folder, record, _fault(folder, record))
    except (OSError, msgspec.DecodeError) as error:
        return StoredEngine(folder, None, f"{RECORD_FILE}: {error}")


def _fault(folder: Path, record: EngineRecord) -> str | None:
    """What keeps a folder from being the engine that its record describes."""
    if folder.name != record.key.name:
        return f"its key belongs to {record.key.name}"
    there = {path.relative_to(folder).as_posix(): path for path in _contents(folder)}
    if other := there.keys() ^ {*record.files, RECORD_FILE}:
        return f"missing, or not of this engine: {', '.join(sorted(other))}"
    for name, entry in record.files.items():
        status = there[name].lstat()
        if not stat.S_ISREG(status.st_mode):
            return f"{name} is no plain file"
        if status.st_size != entry.size:
            return f"{name} has {status.st_size} bytes, not {entry.size}"
        if sha256_file(there[name]) != entry.sha256:
            return f"{name} was changed: its sha256 is another one"
    return None


def _write_record(folder: Path, key: EngineKey, seconds: float) -> None:
    """Describes what stands in a folder, and flushes all of it to disk."""
    paths = _contents(folder)
    record = EngineRecord(
        schema_version=1,
        key=key,
        files={
            path.relative_to(folder).as_posix(): FileEntry(sha256_file(path), path.stat().st_size)
            for path in paths
        },
        build_seconds=round(seconds, 3),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        tools={"edge-safe": edge_safe.__version__, "python": platform.python_version()},
    )
    text = msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"
    (folder / RECORD_FILE).write_bytes(text)
    for path in (*paths, folder / RECORD_FILE, folder):
        _sync(path)


def _contents(folder: Path) -> list[Path]:
    """Everything below a folder but folders, sorted; links are not followed."""
    return sorted(
        Path(parent, name)
        for parent, folders, files in os.walk(folder)
        for name in (*files, *(name for name in folders if Path(parent, name).is_symlink()))
    )


def _sync(path: Path) -> None:
    """Flushes a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
