"""One cell: export a checkpoint, ask the bundle through the public API, compare with torch."""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers.utils import logging

from benchmarks.families.cells import VARIANTS, Bundle, Cell, Way
from benchmarks.families.reference import Reference, Said, checkpoint_of
from benchmarks.families.requests import AUDIO, IMAGE, IMAGES, TEXT, TOKENS, WAYS, requests
from edge_safe import Decision, Policy, SafeModel, Verdict
from edge_safe.errors import EdgeSafeError, ExportError, GateError, MediaError
from edge_safe.export import export_bundle
from edge_safe.export.footprint import peak_memory_mb
from edge_safe.export.quantization import PRECISIONS
from edge_safe.runtime.calibration import Modality
from tests.export.audio_families import RATE
from tests.export.every_family import Turn

FloatArray = npt.NDArray[np.float64]

ALLOW = Policy(thresholds={"gate": 1.0, "final": 1.0})
# Whose calibration a verdict is.
MODALITIES: dict[str, Modality] = {TEXT: "text", IMAGE: "image", IMAGES: "image", AUDIO: "audio"}
# Rows of the file that precisions look at.
CALIBRATION_ROWS = 12

logging.disable_progress_bar()
logging.set_verbosity_error()


def measure(family: str, precision: str, folder: Path, reference: Reference) -> Cell:
    """Exports and asks; whatever this package raises becomes the cell's reason."""
    before = peak_memory_mb()
    row, cache = VARIANTS[precision]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out = Path(scratch) / "bundle"
        start = time.process_time()
        try:
            report = export_bundle(
                checkpoint_of(folder),
                out,
                precision=row,
                kv_cache=cache,
                calibration=_calibration(Path(scratch)) if PRECISIONS[row].scaled else None,
                # Random weights lose by rounding what acceptance would not let pass.
                allow_unaccepted=True,
            )
        except ExportError as error:
            # A row that takes only what this checkpoint is not refuses it; others must not.
            reason = str(error).replace(f"{folder}/", "")
            return Cell(family, precision, reason, failed=not PRECISIONS[row].imported)
        seconds = time.process_time() - start
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        ways: dict[str, Way | str] = {}
        failed = False
        for way in WAYS:
            try:
                ways[way] = ask(out, way, reference.get(way))
            except EdgeSafeError as error:
                ways[way] = str(error)
                failed |= way in reference or not isinstance(error, MediaError)
    found = Bundle(round(seconds, 2), report.peak_memory_mb, before, size, ways)
    return Cell(family, precision, found, failed, round(time.process_time(), 2))


def ask(bundle: Path, way: str, said: Said | None) -> Way | str:
    """Asks a bundle the requests of one way in.

    Raises:
        EdgeSafeError: The bundle does not take such requests, or could not decide on one.
    """
    model = SafeModel.load(bundle, threads=1, policy=ALLOW, accept_failed=True)
    turns = requests(way)
    if said is None:
        model.assess(turns[0].text, **_media(turns[0]))
        return "The bundle takes it, but there is nothing of torch to compare it with."
    odds, texts = [], []
    for number, turn in enumerate(turns):
        if number < len(said.texts):
            reply = model.generate(turn.text, **_media(turn), max_tokens=TOKENS)
            texts.append(reply.text)
            verdict = reply.verdict
        else:
            verdict = model.assess(turn.text, **_media(turn))
        odds.append(log_odds(model, verdict, MODALITIES[way]))
    return compare(np.array(odds), np.array(said.log_odds), texts, said.texts)


def _media(turn: Turn) -> dict[str, Any]:
    audio = None if turn.sound is None else (turn.sound, RATE)
    return {"images": turn.images, "audio": audio}


def log_odds(model: SafeModel, verdict: Verdict, modality: Modality) -> float:
    """The log-odds behind a verdict, whatever calibration the bundle has.

    Raises:
        GateError: The bundle could not decide.
    """
    if verdict.decision is Decision.ERROR:
        raise GateError(f"The bundle could not decide: {verdict.reason}.")
    fitted = model.manifest.safety.stages[verdict.stage].of(modality)
    share = min(max(verdict.p_unsafe, 1e-300), 1 - 1e-16)
    return (math.log(share) - math.log1p(-share) - fitted.bias) / fitted.scale


def compare(
    odds: FloatArray, torch_odds: FloatArray, texts: list[str | None], torch_texts: list[str]
) -> Way:
    """A bundle's (n,) log-odds and its first texts beside torch's."""
    # Random weights know no threshold; the hardest is the one that splits the requests in half.
    middle = float(np.median(torch_odds))
    p, torch_p = (1 / (1 + np.exp(middle - values)) for values in (odds, torch_odds))
    return Way(
        asked=len(odds),
        difference=float(np.abs(odds - torch_odds).max()),
        agreement=float(((p >= 0.5) == (torch_p >= 0.5)).mean()),
        change=float(np.abs(p - torch_p).max()),
        answered=len(torch_texts),
        same=sum(a == b for a, b in zip(texts, torch_texts, strict=True)),
    )


def _calibration(folder: Path) -> Path:
    """Texts to look at, as a file of labelled rows; the labels mean nothing."""
    path = folder / "rows.jsonl"
    rows = [
        {"prompt": f"Tell me a story about {n} boats.", "label": ("safe", "unsafe")[n % 2]}
        for n in range(CALIBRATION_ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
