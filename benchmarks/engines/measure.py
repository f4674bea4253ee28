"""One cell: export with engines, then the same graphs on the CPU beside torch and the CPU's own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from transformers.utils import logging

from benchmarks.engines.cells import EARLY, PEBBLE, Built, Cell, rows
from benchmarks.families.cells import REPOSITORY, Way
from benchmarks.families.measure import ALLOW, MODALITIES, compare, log_odds
from benchmarks.families.reference import Reference, Said, checkpoint_of
from benchmarks.families.requests import ANSWERED, AUDIO, IMAGE, TEXT, TOKENS, requests
from edge_safe import SafeModel
from edge_safe.errors import EdgeSafeError
from edge_safe.export import ExportReport, export_bundle
from edge_safe.export.footprint import peak_memory_mb
from edge_safe.models.safety_file import SAFETY_JSON, EarlyExit, read_safety_file
from tests.conftest import write_llama
from tests.export.audio_families import RATE

EXACT = "fp32"
TARGET = "tensorrt-rtx"

logging.disable_progress_bar()
logging.set_verbosity_error()


def measure(name: str, precision: str, folder: Path, reference: Reference | None) -> Cell:
    """Exports, builds and asks; whatever this package raises becomes the cell's reason.

    Args:
        name: A row of the table.
        precision: Its precision.
        folder: Of a family: where ``write_reference`` left its checkpoint.
        reference: What torch says; None where it was not asked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            found = _built(name, precision, folder, Path(scratch), reference or {})
        except EdgeSafeError as error:
            reason = str(error).replace(f"{scratch}/", "").replace(f"{folder}/", "")
            return Cell(name, precision, reason, failed=True)
    return Cell(name, precision, found)


def _built(name: str, precision: str, folder: Path, scratch: Path, reference: Reference) -> Built:
    checkpoint, ways = _source(name, folder, scratch, reference)
    bundle = scratch / "bundle"
    report = export_bundle(
        checkpoint,
        bundle,
        target=TARGET,
        precision=precision,
        capabilities=rows()[name].capabilities,
        # Random weights lose by rounding what acceptance would not let pass.
        allow_unaccepted=True,
    )
    if report.engines is None:
        raise ValueError("a bundle for TensorRT without a word on its engines")
    answers = asked(bundle, ways)
    beside = {}
    if precision == EXACT:
        plain = scratch / "cpu"
        export_bundle(checkpoint, plain, precision=precision, allow_unaccepted=True)
        beside = _compared(answers, asked(plain, ways))
    return Built(
        difference=worst(report),
        torch=_compared(answers, reference),
        cpu=beside,
        engines=report.engines.built,
        on_the_cpu=report.engines.on_the_cpu,
        export_seconds=round(sum(report.seconds.values()) - report.seconds["build engines"], 2),
        peak_mb=peak_memory_mb(),
    )


def _source(name: str, folder: Path, scratch: Path, reference: Reference) -> tuple[Path, list[str]]:
    """The checkpoint of a row, and the ways in that it is asked by."""
    if name == PEBBLE:
        return REPOSITORY / PEBBLE, [TEXT, IMAGE, AUDIO]
    if name == EARLY:
        return write_early(scratch / "early"), [TEXT]
    return checkpoint_of(folder), list(reference)


def write_early(folder: Path) -> Path:
    """The tiny llama, whose head at its first layer ends what it finds clear."""
    write_llama(folder)
    file = read_safety_file(folder)
    first, last = (file.calibration[f"gate.{layer}"] for layer in (1, 2))
    file = msgspec.structs.replace(file, early=EarlyExit(1, first, last))
    (folder / SAFETY_JSON).write_bytes(msgspec.json.encode(file))
    return folder


def worst(report: ExportReport) -> float:
    """Largest relative difference from torch of all outputs compared."""
    return max(boundary.relative_difference for boundary in report.parity.boundaries)


def asked(bundle: Path, ways: Iterable[str]) -> Reference:
    """What the graphs of a bundle say to the first requests of each way in, on the CPU."""
    model = SafeModel.load(bundle, provider="cpu", threads=1, policy=ALLOW, accept_failed=True)
    said = {}
    for way in ways:
        odds, texts = [], []
        for turn in requests(way)[:ANSWERED]:
            media: dict[str, Any] = {
                "images": turn.images,
                "audio": None if turn.sound is None else (turn.sound, RATE),
            }
            reply = model.generate(turn.text, **media, max_tokens=TOKENS)
            odds.append(log_odds(model, reply.verdict, MODALITIES[way]))
            texts.append(reply.text or "")
        said[way] = Said(odds, texts)
    return said


def _compared(found: Reference, expected: Mapping[str, Said]) -> dict[str, Way]:
    return {
        way: compare(
            np.array(said.log_odds),
            np.array(expected[way].log_odds[:ANSWERED]),
            list(said.texts),
            expected[way].texts,
        )
        for way, said in found.items()
        if way in expected
    }
