"""The files of a bundle folder, each compared with the manifest before it is believed.

It imports neither numpy nor ONNX Runtime, so that files are hashed while these are imported.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from edge_safe.errors import BundleError, IntegrityError
from edge_safe.runtime.digest import sha256_file
from edge_safe.runtime.external_data import external_files
from edge_safe.runtime.manifest import Manifest, confine


class VerifiedFiles:
    """Hashes a file once, when it is first asked for. Safe to share between threads."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._entries = manifest.files
        self._graphs: dict[str, frozenset[str]] = {}
        self._hashed: set[str] = set()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._hashing: dict[str, threading.Lock] = {}

    def path(self, name: str) -> Path:
        """Path of a file that was found to be the one the manifest names.

        Raises:
            IntegrityError: It is not listed, leaves the bundle, or differs in size or hash.
            BundleError: It is missing or unreadable.
        """
        path = self.sized(name)
        with self._lock:
            only_one = self._hashing.setdefault(name, threading.Lock())
        with only_one:
            if name not in self._hashed:
                self._compare_hash(name, path)
                self._hashed.add(name)
        return path

    def sized(self, name: str) -> Path:
        """Path of a file that has the size the manifest says, its contents not looked at yet.

        Raises:
            IntegrityError: It is not listed, leaves the bundle, or differs in size.
            BundleError: It is missing or unreadable.
        """
        path = confine(self.folder, name)
        entry = self._entries.get(name)
        if entry is None:
            raise IntegrityError(
                f"{name!r} is not listed in the manifest of {self.folder}. Do not use this bundle."
            )
        with _readable(path):
            size = path.stat().st_size
        if size != entry.size:
            raise IntegrityError(
                f"{path} has {size} bytes, the manifest says {entry.size}. Export the bundle "
                "again or copy it afresh."
            )
        return path

    def of_graph(self, graph: str) -> frozenset[str]:
        """Names of a graph's own file, which was checked, and of those its weights stand in.

        Raises:
            BundleError: The bundle has no such graph, or its file is missing or malformed.
            IntegrityError: See ``path``.
        """
        found = self._graphs.get(graph)
        if found is None:
            if graph not in self.manifest.graphs:
                known = ", ".join(self.manifest.graphs) or "none"
                raise BundleError(f"{self.folder} has no graph '{graph}'; it has: {known}.")
            name = self.manifest.graphs[graph].file
            parent = PurePosixPath(name).parent
            places = external_files(self.path(name).read_bytes())
            found = frozenset({name, *(str(parent / place) for place in places)})
            self._graphs[graph] = found
        return found

    @contextmanager
    def hashing(self, graphs: Iterable[str]) -> Iterator[None]:
        """Checks the files of graphs while the body runs; goes no further if that fails.

        What is wrong with one of them is said when somebody asks for it.
        """

        def check() -> None:
            for graph in graphs:
                for name in sorted(self.of_graph(graph)):
                    self.path(name)

        with ThreadPoolExecutor(1) as beside:
            # Its result is not asked for: an error here is found again, and said then.
            beside.submit(check)
            try:
                yield
            except BaseException:
                self._stopped.set()
                raise

    def _compare_hash(self, name: str, path: Path) -> None:
        """Compares a file's contents with its entry in the manifest."""
        expected = self._entries[name].sha256
        with _readable(path):
            digest = sha256_file(path, self._stopped.is_set)
        if digest != expected:
            raise IntegrityError(
                f"{path} is not the file the manifest names (sha256 {digest[:12]}…, expected "
                f"{expected[:12]}…). Export the bundle again or copy it afresh."
            )


def require_accepted(files: VerifiedFiles, accept_failed: bool) -> None:
    """Refuses a bundle that failed its acceptance test, unless that is wanted.

    Raises:
        BundleError: See above.
    """
    acceptance = files.manifest.safety.acceptance
    if acceptance is not None and not acceptance.passed and not accept_failed:
        raise BundleError(
            f"{files.folder} failed its acceptance test on {acceptance.data}"
            f"{': ' + acceptance.reason if acceptance.reason else ''}. Export it again with "
            "another precision, or load it with accept_failed=True to examine it."
        )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Says what a file that cannot be read means for the bundle."""
    try:
        yield
    except FileNotFoundError as error:
        raise BundleError(
            f"{path} is missing. Export the bundle again or copy it afresh."
        ) from error
    except OSError as error:
        raise BundleError(f"Cannot read {path}: {error}.") from error
