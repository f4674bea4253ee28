"""`edge-safe build`: makes the engines of a bundle on the device that will run it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from edge_safe.cli import options
from edge_safe.cli.console import Terminal
from edge_safe.errors import BundleError, ProviderError, UsageError

if TYPE_CHECKING:
    from edge_safe.runtime.engines.builder import EngineSource
    from edge_safe.runtime.engines.key import Device
    from edge_safe.runtime.engines.store import EngineStore, StoredEngine

_MB = 2**20


def command(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="The bundle folder.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be built, and build nothing.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--list", help="Instead: list the engines that are kept; checks them.")
    ] = False,
    clean: Annotated[
        bool,
        typer.Option(
            "--clean",
            help="Instead: remove damaged engines, other devices', and what killed builds left.",
        ),
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Build the TensorRT engines of a bundle on this device, those that are not there yet."""
    from edge_safe.runtime.engines.builder import engines_folder
    from edge_safe.runtime.engines.store import EngineStore

    terminal = Terminal(as_json, quiet, verbose)
    store = EngineStore(engines_folder())
    if bundle is None or show or clean:
        if bundle is not None or dry_run or show == clean:
            raise UsageError("Give a bundle's folder, or --list, or --clean.")
        return _list(terminal, store) if show else _clean(terminal, store)
    sources = _sources(bundle)
    device, problem = _here()
    if dry_run:
        return _foretell(terminal, store, sources, device, problem)
    if device is None:
        raise ProviderError(problem)
    return _build(terminal, store, sources, device)


def _sources(folder: Path) -> list[EngineSource]:
    """The graphs of a bundle that have a plan for an engine."""
    from edge_safe.runtime.bundle import open_bundle
    from edge_safe.runtime.engines.builder import engine_source
    from edge_safe.runtime.rtx_provider import PROVIDER as AHEAD_OF_TIME

    bundle = open_bundle(folder, provider="cpu")
    if bundle.manifest.target == AHEAD_OF_TIME:
        raise BundleError(
            f"The engines of {folder} came with it. Run it as it is, or export it with --target "
            "tensorrt for TensorRT itself."
        )
    if not bundle.manifest.engines:
        raise BundleError(
            f"{folder} plans no engines: it was made for {bundle.manifest.target}. Export it with "
            "--target tensorrt, or run it as it is."
        )
    return [engine_source(bundle, graph, plan) for graph, plan in bundle.manifest.engines.items()]


def _here() -> tuple[Device | None, str | None]:
    """This device, or else what keeps engines from being built on it."""
    from edge_safe.runtime.engines.device import this_device

    try:
        return this_device(), None
    except ProviderError as error:
        return None, str(error)


def _build(
    terminal: Terminal, store: EngineStore, sources: list[EngineSource], device: Device
) -> int:
    """Builds what is missing, one engine after the other, since each takes all the memory."""
    from edge_safe.runtime.engines.builder import obtain_engine

    rows = []
    with terminal.steps() as tell:
        for source in sources:
            folder = store.find(source.key(device))
            state = "built" if folder is None else "already built"
            folder = folder or obtain_engine(store, source, device, tell).parent
            rows.append({"graph": source.graph, "state": state, "engine": str(folder)})
    terminal.document({"engines": rows})
    for row in rows:
        terminal.say(f"{row['graph']}: {row['state']}, {row['engine']}")
    return 0


def _foretell(
    terminal: Terminal,
    store: EngineStore,
    sources: list[EngineSource],
    device: Device | None,
    problem: str | None,
) -> int:
    """Says what a build would do."""
    import msgspec

    from edge_safe.runtime.engines import memory

    free = memory.available()
    rows: list[dict[str, Any]] = []
    for source in sources:
        key = source.key(device) if device else None
        there = key is not None and store.find(key) is not None
        rows.append(
            {
                "graph": source.graph,
                "state": "already built" if there else "to build",
                "key": key.digest if key else None,
                "plan": msgspec.to_builtins(source.plan),
                "memory_needed_mb": source.need.system // _MB,
            }
        )
    terminal.document(
        {
            "folder": str(store.folder),
            "device": msgspec.to_builtins(device),
            "problem": problem,
            "memory_available_mb": None if free is None else free // _MB,
            "engines": rows,
        }
    )
    for row in rows:
        terminal.say(f"{row['graph']}: {row['state']}, takes {row['memory_needed_mb']} MB")
        for profile in row["plan"]["profiles"]:
            for name, sizes in profile["shapes"].items():
                terminal.say(f"  {name}  {sizes['min']} to {sizes['max']}, best {sizes['opt']}")
    terminal.say(f"memory free: {'unknown' if free is None else f'{free // _MB} MB'}")
    terminal.say(f"kept in {store.folder}")
    if problem:
        terminal.warn(problem)
    return 1 if problem else 0


def _list(terminal: Terminal, store: EngineStore) -> int:
    """Lists what is kept."""
    device, _ = _here()
    rows = [_describe(engine, device) for engine in store.engines()]
    terminal.document({"folder": str(store.folder), "engines": rows})
    table = Table(box=None, pad_edge=False)
    for heading in ("engine", "state", "MB", "built in", "for"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("engine", "state", "mb", "seconds", "device")))
    terminal.show(table)
    terminal.say(f"{len(rows)} engines in {store.folder}")
    return 0


def _describe(engine: StoredEngine, device: Device | None) -> dict[str, Any]:
    """One engine, in words and numbers."""
    import msgspec

    record = engine.record
    return {
        "engine": engine.folder.name,
        "state": _state(engine, device),
        "fault": engine.fault,
        "mb": None if record is None else sum(e.size for e in record.files.values()) // _MB,
        "seconds": None if record is None else record.build_seconds,
        "device": None if record is None else msgspec.to_builtins(record.key.device),
    }


def _state(engine: StoredEngine, device: Device | None) -> str:
    if engine.record is None or engine.fault is not None:
        return "damaged"
    return "good" if device in (None, engine.record.key.device) else "another device's"


def _clean(terminal: Terminal, store: EngineStore) -> int:
    """Removes what nothing on this device will load again."""
    device, _ = _here()
    gone = [engine for engine in store.engines() if _state(engine, device) != "good"]
    for engine in gone:
        store.remove(engine)
    unfinished = store.remove_unfinished()
    names = [engine.folder.name for engine in gone]
    terminal.document({"removed": names, "unfinished": unfinished})
    for name in names:
        terminal.say(f"removed {name}")
    terminal.say(f"{len(names)} engines and {unfinished} unfinished builds removed")
    return 0
