"""Opens a bundle folder: every file is checked against the manifest before it is used.

A file is hashed before it is opened, so towers that a request does not need cost nothing. It
knows files and graphs; what flows through the graphs is the business of other modules.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from edge_safe.errors import BundleError, ProviderError
from edge_safe.runtime.cores import available_cores
from edge_safe.runtime.manifest import LANGUAGE, Manifest, load_manifest
from edge_safe.runtime.rtx_provider import PROVIDER as AHEAD_OF_TIME
from edge_safe.runtime.rtx_provider import context_engine, context_file
from edge_safe.runtime.session import Session, provider_name
from edge_safe.runtime.verified_files import VerifiedFiles, require_accepted

logger = logging.getLogger(__name__)

ON_THE_HOST = ("embed_tokens",)
"""Graphs that run on the CPU whatever the provider: words and media are joined there."""


class Bundle:
    """A bundle whose manifest was read and whose files are verified as they are opened.

    Safe to share between threads.
    """

    def __init__(
        self,
        files: VerifiedFiles,
        provider: str,
        threads: int | None = None,
        profile_folder: Path | None = None,
    ) -> None:
        """See ``open_bundle``."""
        self.folder = files.folder
        self.manifest = files.manifest
        self.provider = provider
        self._threads = threads
        self._profile_folder = profile_folder
        self._verified = files
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        self._opening: dict[str, threading.Lock] = {}
        # More at a time only get into each other's way.
        self._packing = threading.Semaphore(available_cores())

    def file(self, name: str) -> Path:
        """Path of a file that was found to be the one the manifest names.

        Raises:
            IntegrityError: It is not listed, leaves the bundle, or differs in size or hash.
            BundleError: It is missing or unreadable.
        """
        return self._verified.path(name)

    def has(self, name: str) -> bool:
        """Whether the manifest lists a file."""
        return name in self.manifest.files

    def read(self, name: str) -> bytes:
        """Contents of a file, checked as they are read.

        Raises:
            IntegrityError: See ``file``.
            BundleError: See ``file``.
        """
        return self.file(name).read_bytes()

    def session(self, graph: str) -> Session:
        """Opens a graph on first use; its weight files are checked meanwhile.

        It is not given away before all of them are found to be the ones the manifest names.

        Raises:
            BundleError: The bundle has no such graph, or it cannot be opened.
            IntegrityError: One of its files is not the one the manifest names.
            ProviderError: The provider did not start.
        """
        session = self._sessions.get(graph)
        if session is None:
            with self._lock:
                # Different ones are opened side by side.
                only_one = self._opening.setdefault(graph, threading.Lock())
            with only_one:
                session = self._sessions.get(graph)
                if session is None:
                    session = self._open(graph)
                    with self._lock:
                        self._sessions[graph] = session
        return session

    def check_graph(self, graph: str) -> Path:
        """Checks a graph and every weight file it points to; gives the graph's path.

        Where an engine that came with the bundle runs in its place, these are the engine and the
        context model that names it.

        Raises:
            BundleError: The bundle has no such graph, or no such engine.
            IntegrityError: See ``file``.
        """
        for name in sorted(self.files_of(graph)):
            self.file(name)
        return self._path_of(graph)

    def files_of(self, graph: str) -> frozenset[str]:
        """Names of what a graph is opened from, of which those that name others were checked.

        Raises:
            BundleError: See ``check_graph``.
            IntegrityError: See ``file``.
        """
        if self._provider_of(graph) == AHEAD_OF_TIME and graph in self.manifest.graphs:
            return self._context_files(graph)
        return self._verified.of_graph(graph)

    def run_counts(self) -> dict[str, int]:
        """How often each graph was run; graphs that were never opened count 0."""
        with self._lock:
            opened = {name: session.runs for name, session in self._sessions.items()}
        return {name: opened.get(name, 0) for name in self.manifest.graphs}

    def end_profiles(self) -> dict[str, Path]:
        """Ends profiling; returns ONNX Runtime's profile of each opened graph."""
        with self._lock:
            return {name: session.end_profile() for name, session in self._sessions.items()}

    def verify(self) -> None:
        """Checks every file of the manifest, and that every graph's weights are listed.

        Raises:
            IntegrityError: See ``file``.
            BundleError: See ``file``.
        """
        for name in self.manifest.files:
            self.file(name)
        for graph in self.manifest.graphs:
            self.check_graph(graph)

    def _open(self, graph: str) -> Session:
        """Checks a graph and its weights and hands it to ONNX Runtime."""
        profile = None
        if self._profile_folder is not None:
            profile = str(self._profile_folder / graph)
        provider = self._provider_of(graph)
        if provider == "tensorrt":
            self.check_graph(graph)
            return Session(self._engine_of(graph), provider, self._threads, profile)
        if provider == AHEAD_OF_TIME:
            session = Session(self.check_graph(graph), provider, self._threads, profile)
            self._compare(graph, session)
            return session
        for name in self.files_of(graph):
            self._verified.sized(name)
        # ONNX Runtime parses the graph alone, which was checked by now. Of the weights, which are
        # nothing but numbers, it packs what another thread hashes.
        with ThreadPoolExecutor(1) as beside:
            checking = beside.submit(self.check_graph, graph)
            try:
                with self._packing:
                    session = Session(
                        self._path_of(graph),
                        provider,
                        self._threads,
                        profile,
                        optimized=self.manifest.graphs[graph].optimized,
                    )
            finally:
                # What is wrong with a file explains what ONNX Runtime may have said of it.
                checking.result()
        return session

    def _compare(self, graph: str, engine: Session) -> None:
        """Compares an engine that came with the bundle with its graph, once on this device.

        Raises:
            ProviderError: They do not compute the same.
        """
        from edge_safe.runtime.engines.agreed import once_on_this_device
        from edge_safe.runtime.engines.agreement import require_agreement

        entry, plan = self.manifest.graphs[graph], self.manifest.engines[graph]
        names = sorted(self._verified.of_graph(graph) | self._context_files(graph))
        for name in names:
            self.file(name)

        def compare() -> None:
            logger.warning("comparing the engine of %s with its graph, once on this device", graph)
            host = Session(self.file(entry.file), "cpu", self._threads)
            require_agreement(graph, entry, plan, engine, host)

        files = {name: self.manifest.files[name].sha256 for name in names}
        once_on_this_device(files, compare)
        engine.runs = 0

    def _path_of(self, graph: str) -> Path:
        """What is handed to ONNX Runtime."""
        name = self.manifest.graphs[graph].file
        if self._provider_of(graph) == AHEAD_OF_TIME:
            name = context_file(name)
        return self.file(name)

    def _context_files(self, graph: str) -> frozenset[str]:
        """A graph's context model, checked, and the engine it names."""
        name = context_file(self.manifest.graphs[graph].file)
        if not self.has(name):
            raise BundleError(
                f"{self.folder} has no {name}, which names an engine built ahead of time. Export "
                f"it with --target {AHEAD_OF_TIME}, or choose another --provider."
            )
        return frozenset({name, str(PurePosixPath(name).parent / context_engine(self.read(name)))})

    def _engine_of(self, graph: str) -> Path:
        """The engine of a graph, built now where this machine has none yet."""
        # Other providers never need them.
        from edge_safe.runtime.engines.builder import engine_source, engines_folder, obtain_engine
        from edge_safe.runtime.engines.device import this_device
        from edge_safe.runtime.engines.store import EngineStore

        source = engine_source(self, graph, self.manifest.engines[graph])
        store = EngineStore(engines_folder())
        return obtain_engine(store, source, this_device(), _tell)

    def _provider_of(self, graph: str) -> str:
        """What runs a graph: of graphs that TensorRT does not read the manifest plans no engine."""
        if graph in ON_THE_HOST:
            return "cpu"
        beside = self.provider.startswith("tensorrt") and graph not in self.manifest.engines
        return "cpu" if beside else self.provider


def _tell(step: str, share: float) -> None:
    """Says why a load takes minutes: the first one on a device builds what later ones find."""
    if share == 0:
        logger.warning("%s, once on this device (edge-safe build does it beforehand)", step)


def open_bundle(
    folder: Path | VerifiedFiles,
    provider: str | None = None,
    threads: int | None = None,
    accept_failed: bool = False,
    profile_folder: Path | None = None,
) -> Bundle:
    """Makes ready to open a bundle's graphs, its manifest being read where it was not yet.

    Args:
        folder: The bundle, or its files where some of them were hashed already.
        provider: ``cpu``, ``cuda``, ``tensorrt`` or ``tensorrt-rtx``; None takes the target's.
        threads: Threads inside one operator; None lets ONNX Runtime choose.
        accept_failed: Opens a bundle that failed its acceptance test all the same.
        profile_folder: Where ONNX Runtime writes a profile of every graph; None writes none.

    Raises:
        BundleError: The folder is no bundle, or the bundle failed its acceptance test.
        SchemaError: The manifest does not follow a schema that this version reads.
        IntegrityError: A path of the manifest would leave the folder.
        ProviderError: The provider is not there.
    """
    files = folder
    if isinstance(files, Path):
        files = VerifiedFiles(files, load_manifest(files))
    manifest = files.manifest
    require_accepted(files, accept_failed)
    chosen = provider or manifest.target
    provider_name(chosen)
    if chosen.startswith("tensorrt"):
        require_engines(files.folder, manifest, chosen)
    return Bundle(files, chosen, threads, profile_folder)


def require_engines(folder: Path, manifest: Manifest, provider: str) -> None:
    """Refuses a bundle whose language model a provider that runs engines would leave to the CPU.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        provider: ``tensorrt`` or ``tensorrt-rtx``.

    Raises:
        ProviderError: It was exported for something else, or plans no engine of such a graph.
    """
    again = f"Export it with --target {provider}, or choose another --provider."
    if not manifest.engines:
        raise ProviderError(
            f"{folder} was exported for {manifest.target}, which TensorRT does not read. {again}"
        )
    if {provider, manifest.target} == {"tensorrt", AHEAD_OF_TIME}:
        raise ProviderError(
            f"{folder} was exported for {manifest.target}, whose graphs and engines are not "
            f"those of {provider}. {again}"
        )
    without = [n for n in LANGUAGE if n in manifest.graphs and n not in manifest.engines]
    if without:
        # Graphs that TensorRT does not read run on the CPU, but never these.
        raise ProviderError(f"{folder} plans no engine of {', '.join(without)}. {again}")
