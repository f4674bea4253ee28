"""Makes the TensorRT engine of a graph, through ONNX Runtime, where it is not there already.

ONNX Runtime writes the engine together with a small graph, ``engine.onnx``, that holds nothing but
a reference to it (an EP context model). Opened in place of the bundle's graph, it never builds
again: a shape that no profile covers is an error, and the weights are not read twice.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from edge_safe.errors import ProviderError
from edge_safe.runtime.engines import memory
from edge_safe.runtime.engines.agreement import require_agreement
from edge_safe.runtime.engines.device import first_gpu, free_on_card
from edge_safe.runtime.engines.key import Device, EngineKey
from edge_safe.runtime.engines.lock import locked
from edge_safe.runtime.engines.plan import EnginePlan, provider_options
from edge_safe.runtime.engines.store import PATIENCE, EngineStore, Report
from edge_safe.runtime.external_data import external_files
from edge_safe.runtime.manifest import Graph
from edge_safe.runtime.session import Session

if TYPE_CHECKING:
    from edge_safe.runtime.bundle import Bundle

PROVIDER = "tensorrt"

CONTEXT_FILE = "engine.onnx"

_CACHE_VARIABLE = "EDGE_SAFE_CACHE"

_ONE_AT_A_TIME = ".building.lock"


@dataclass(frozen=True, slots=True)
class EngineSource:
    """A graph that an engine is built of; its files were checked.

    Attributes:
        graph: Its name in the bundle.
        path: The ``.onnx`` file.
        files: Hex sha256 of that file and of its weight files, by name.
        plan: Shapes and precision.
        entry: What the manifest says of the graph.
        need: Memory that it takes.
    """

    graph: str
    path: Path
    files: dict[str, str]
    plan: EnginePlan
    entry: Graph
    need: memory.Need

    def key(self, device: Device) -> EngineKey:
        """What its engine on a device depends on."""
        return EngineKey(self.graph, self.files, provider_options(self.plan), device)


def engine_source(bundle: Bundle, graph: str, plan: EnginePlan) -> EngineSource:
    """Checks a graph of a bundle and says what its engine is built of.

    Raises:
        BundleError: The bundle has no such graph, or the plan does not fit it.
        IntegrityError: One of its files is not the one the manifest names.
    """
    path = bundle.check_graph(graph)
    entry = bundle.manifest.graphs[graph]
    model = path.read_bytes()
    parent = PurePosixPath(entry.file).parent
    names = [entry.file, *(str(parent / name) for name in external_files(model))]
    return EngineSource(
        graph,
        path,
        {name: bundle.manifest.files[name].sha256 for name in names},
        plan,
        entry,
        memory.Need(memory.weight_bytes(model), memory.input_bytes(entry.inputs, plan)),
    )


def obtain_engine(store: EngineStore, source: EngineSource, device: Device, report: Report) -> Path:
    """The file to open with provider ``tensorrt`` in place of a graph; built where needed.

    Raises:
        BundleError: There is too little memory, or the store cannot be written.
        ProviderError: TensorRT cannot build it.
    """
    key = source.key(device)

    def waiting(holder: str) -> None:
        report(f"waiting for {holder}, which builds another engine", 0.0)

    def build(folder: Path, report: Report) -> None:
        # One after the other, whichever process: each takes all the memory, and TensorRT times
        # what it builds.
        with locked(store.folder / _ONE_AT_A_TIME, PATIENCE, waiting):
            gpu = first_gpu()
            memory.require(source.need, memory.available(), free_on_card(gpu) if gpu else None)
            _reuse_timings(store, device, folder)
            build_engine(source, key.options, folder, report)

    return store.obtain(key, build, report) / CONTEXT_FILE


def build_engine(
    source: EngineSource, options: Mapping[str, str], folder: Path, report: Report
) -> None:
    """Builds the engine of a graph, opens it, and compares it with the graph on the CPU.

    It is opened because a full disk cuts one short in silence.

    Args:
        source: The graph.
        options: What the provider is told.
        folder: Where to write.
        report: Told the steps.

    Raises:
        ProviderError: TensorRT did not start, cannot build or open the engine, or the engine does
            not compute what the graph does.
    """
    path = source.path
    step = f"building the engine of {path.name}"
    report(step, 0.0)
    places = {
        "trt_engine_cache_enable": "1",
        "trt_dump_ep_context_model": "1",
        "trt_ep_context_file_path": str(folder / CONTEXT_FILE),
        # 0: the engine stands beside the graph, whose file could not be larger than 2 GB.
        "trt_ep_context_embed_mode": "0",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }
    names = _names(Session(path, PROVIDER, options={**options, **places}))
    report(step, 1.0)
    context = folder / CONTEXT_FILE
    engine = Session(context, PROVIDER) if context.is_file() else None
    if engine is None or _names(engine) != names:
        raise ProviderError(
            f"TensorRT did not take all of {path.name}, so its engine cannot stand in for it. "
            "Export the bundle with --target tensorrt, whose graphs hold TensorRT's operators "
            "alone."
        )
    report(f"comparing the engine of {path.name} with its graph", 1.0)
    require_agreement(path.name, source.entry, source.plan, engine, Session(path))


def _names(session: Session) -> tuple[set[str], set[str]]:
    """Names of inputs and outputs."""
    return set(session.inputs), set(session.outputs)


def engines_folder() -> Path:
    """Where engines are kept: below ``$EDGE_SAFE_CACHE``, or else the user's cache."""
    chosen = os.environ.get(_CACHE_VARIABLE)
    if chosen:
        return Path(chosen) / "engines"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edge-safe" / "engines"


def _reuse_timings(store: EngineStore, device: Device, folder: Path) -> None:
    """Copies what TensorRT has measured on this device for another engine; it builds faster then.

    Each engine starts with the timings of another, so that the largest file holds the most.
    """
    timings = [
        path
        for engine in store.engines()
        if engine.fault is None and engine.record and engine.record.key.device == device
        for path in engine.folder.glob("*.timing")
    ]
    if timings:
        best = max(timings, key=lambda path: path.stat().st_size)
        shutil.copyfile(best, folder / best.name)
