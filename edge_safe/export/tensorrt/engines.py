"""Adds engines to a finished bundle: built ones, or the plan that a device builds by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from pathlib import Path

import msgspec

from edge_safe.errors import ExportError
from edge_safe.export.bundle_files import hash_files, write_manifest
from edge_safe.export.clock import Clock
from edge_safe.export.families.base import Tower
from edge_safe.export.report import REPORT_FILE, Engines, ExportReport, write_report
from edge_safe.export.tensorrt.context_model import write_context_model
from edge_safe.export.tensorrt.profiles import plan_engines
from edge_safe.export.tensorrt.releases import Release
from edge_safe.export.tensorrt.rtx import EngineRecord, Profile, Shape, build_engine
from edge_safe.runtime.engines.plan import EnginePlan
from edge_safe.runtime.engines.plan import Profile as PlannedProfile
from edge_safe.runtime.manifest import LANGUAGE, Graph, load_manifest
from edge_safe.runtime.rtx_provider import PROVIDER as AHEAD_OF_TIME


def add_engines(
    folder: Path,
    towers: Iterable[Tower],
    release: Release,
    capabilities: Sequence[str],
    clock: Clock,
) -> ExportReport:
    """Plans the engines of a bundle, and builds them where its target's can be built here.

    A tower that TensorRT cannot build runs on the CPU, which manifest and report say; the language
    model's graphs have to be built.

    Args:
        folder: The bundle; its manifest and report are written anew.
        towers: Its towers.
        release: Who reads its graphs.
        capabilities: GPUs that engines are built for.
        clock: Tells progress.

    Raises:
        ExportError: A graph of the language model cannot be built, or the builder is missing.
    """
    manifest = load_manifest(folder)
    cases = {tower.name: [case.feeds for case in tower.cases()] for tower in towers}
    plans, left = plan_engines(folder, manifest, cases)
    built: list[EngineRecord] = []
    if release.target == AHEAD_OF_TIME:
        with clock.step("build engines") as share:
            for number, (name, plan) in enumerate(list(plans.items())):
                try:
                    built.append(_build(folder, manifest.graphs[name], plan, capabilities))
                    write_context_model(folder / manifest.graphs[name].file, built[-1])
                except ExportError as error:
                    if name in LANGUAGE:
                        raise
                    del plans[name]
                    left[name] = str(error)
                share((number + 1) / len(plans))
    report = msgspec.json.decode((folder / REPORT_FILE).read_bytes(), type=ExportReport)
    report = msgspec.structs.replace(
        report, engines=Engines(release.name, built, left), seconds=clock.seconds
    )
    write_report(folder, report)
    manifest = msgspec.structs.replace(manifest, release=release.name, engines=plans)
    write_manifest(folder, msgspec.structs.replace(manifest, files=hash_files(folder)))
    return report


def _build(
    folder: Path, graph: Graph, plan: EnginePlan, capabilities: Sequence[str]
) -> EngineRecord:
    free = {t.name for t in graph.inputs if any(isinstance(size, str) for size in t.shape)}

    def chosen(own: PlannedProfile, names: Set[str]) -> dict[str, tuple[Shape, Shape, Shape]]:
        return {name: (r.min, r.opt, r.max) for name, r in own.shapes.items() if name in names}

    profiles = [
        Profile(chosen(own, free), chosen(own, own.shapes.keys() - free)) for own in plan.profiles
    ]
    path = folder / graph.file
    return build_engine(
        path, path.with_suffix(".engine"), capabilities, profiles, lambda share: None
    )
