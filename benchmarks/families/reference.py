"""A family's tiny checkpoint, and what torch says to every request."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.families.requests import ANSWERED, AUDIO, IMAGE, IMAGES, TEXT, TOKENS, requests
from edge_safe.models.safety_file import SafetyFile
from edge_safe.models.safety_model import SafetyTokenModel
from tests.export.every_family import tiny_family

FILE = "reference.json"
# No p_unsafe reaches it.
NEVER = 2.0


class Said(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What torch says to the requests of one way in: log-odds of all, texts of the first few."""

    log_odds: list[float]
    texts: list[str]


Reference = dict[str, Said]


def write_reference(family: str, folder: Path) -> Reference | None:
    """Writes checkpoint and answers into a folder, unless they are there.

    Returns:
        What torch says by way in; None where there is no tiny checkpoint of the family.
    """
    if (folder / FILE).exists():
        return msgspec.json.decode((folder / FILE).read_bytes(), type=Reference)
    tiny = tiny_family(family)
    if tiny is None:
        return None
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    checkpoint = checkpoint_of(folder)
    tiny.write(checkpoint)
    model = never_refusing(tiny.open(checkpoint))
    ways = [TEXT, *([IMAGE, IMAGES] if tiny.sees else []), *([AUDIO] if tiny.hears else [])]
    said = {}
    for way in ways:
        prompts = [tiny.inputs(checkpoint, model, turn) for turn in requests(way)]
        said[way] = Said(
            [_log_odds(model, inputs) for inputs in prompts],
            [_answer(model, inputs) for inputs in prompts[:ANSWERED]],
        )
    part = folder / f"{FILE}.part"
    part.write_bytes(msgspec.json.encode(said))
    part.replace(folder / FILE)
    return said


def checkpoint_of(folder: Path) -> Path:
    """Where a family's checkpoint stands."""
    return folder / "checkpoint"


def never_refusing(model: SafetyTokenModel) -> SafetyTokenModel:
    """The same model with thresholds beyond reach, so that every request is answered."""
    stages = {
        stage: msgspec.structs.replace(fitted, threshold=NEVER)
        for stage, fitted in model.file.calibration.items()
    }
    file: SafetyFile = msgspec.structs.replace(model.file, calibration=stages)
    return SafetyTokenModel(model.model, model.tokenizer, model.safety, file)


def _log_odds(model: SafetyTokenModel, inputs: dict[str, Any]) -> float:
    unsafe, safe = model.assess(**inputs).readout.verdict_logits[0]
    return float(unsafe - safe)


def _answer(model: SafetyTokenModel, inputs: dict[str, Any]) -> str:
    """Greedy text behind the safe token."""
    ids = model.generate(**inputs, max_new_tokens=TOKENS + 1, do_sample=False)[0]
    # transformers gives the prompt back only where it was given as ids.
    start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return str(model.tokenizer.decode(ids[start + 1 :], skip_special_tokens=True))
