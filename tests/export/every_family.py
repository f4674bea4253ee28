"""The tiny checkpoint of any family, and what torch takes for one turn of a user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from edge_safe.models.pebble import PebbleProcessor
from edge_safe.models.prompts import Message, PromptEncoder, template_parts
from edge_safe.models.safety_model import SafetyTokenModel
from tests.conftest import write_llama
from tests.export import phi4_multimodal
from tests.export.audio_families import AUDIO_FAMILIES, RATE, write_audio_family
from tests.export.families import FAMILIES, write_family
from tests.export.vision_families import (
    VISION_FAMILIES,
    hugging_face_processor,
    write_vision_family,
)
from tests.models.pebble.tiny import build_tiny_pebble

PEBBLE_INPUTS = ("text_lines", "objects", "speech")


@dataclass(frozen=True, slots=True)
class Turn:
    """What a user asks: words, pictures in front of them, or a sound at ``RATE``."""

    text: str
    images: Sequence[Image.Image] = ()
    sound: np.ndarray | None = None


# Inputs of the torch model, from its folder, the opened model and a turn.
MakeInputs = Callable[[Path, SafetyTokenModel, Turn], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class TinyFamily:
    """One family.

    Attributes:
        write: Writes its checkpoint into a folder that is not there yet.
        inputs: What torch takes for a turn, made by transformers and the family's own processor.
        sees: Whether there are inputs for pictures.
        hears: Whether there are inputs for sound.
        open: Opens the checkpoint in torch.
    """

    write: Callable[[Path], object]
    inputs: MakeInputs
    sees: bool = False
    hears: bool = False
    open: Callable[[Path], SafetyTokenModel] = SafetyTokenModel.from_pretrained


def tiny_family(family: str) -> TinyFamily | None:
    """A family by its model_type; None where nobody has written a tiny checkpoint of it."""
    sees, hears = family in VISION_FAMILIES, family in AUDIO_FAMILIES
    if family == "pebble":
        return TinyFamily(
            lambda folder: build_tiny_pebble(folder, PEBBLE_INPUTS), _pebble_inputs, True, True
        )
    if family == "llama":
        return TinyFamily(write_llama, _text_inputs)
    if family in FAMILIES:
        return TinyFamily(lambda folder: write_family(folder, family), _text_inputs)
    if family == "phi4_multimodal":
        return TinyFamily(
            lambda folder: write_vision_family(folder, family),
            _phi4_inputs,
            sees=True,
            hears=True,
            open=phi4_multimodal.opened,
        )
    if not sees and not hears:
        return None
    write = write_vision_family if sees else write_audio_family

    def inputs(folder: Path, model: SafetyTokenModel, turn: Turn) -> dict[str, Any]:
        heard = turn.sound is not None or not sees
        return (_audio_inputs if heard else _vision_inputs)(family, folder, model, turn)

    return TinyFamily(lambda folder: write(folder, family), inputs, sees, hears)


def _text_inputs(folder: Path, model: SafetyTokenModel, turn: Turn) -> dict[str, Any]:
    ids = PromptEncoder(model.tokenizer).encode([Message("user", turn.text)])
    return {"input_ids": torch.tensor([ids])}


def _vision_inputs(
    family: str, folder: Path, model: SafetyTokenModel, turn: Turn
) -> dict[str, Any]:
    pictures = [{"type": "image", "image": image} for image in turn.images]
    content = [*pictures, *template_parts(turn.text)]
    inputs = hugging_face_processor(folder, family).apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    return dict(inputs)


def _audio_inputs(family: str, folder: Path, model: SafetyTokenModel, turn: Turn) -> dict[str, Any]:
    tiny = AUDIO_FAMILIES[family]
    sounds = [] if turn.sound is None else [turn.sound]
    heard = [{"type": tiny.part, tiny.part: "sound.wav"} for _ in sounds]
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": [*heard, *template_parts(turn.text)]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    return tiny.inputs(folder, str(text), sounds)


def _phi4_inputs(folder: Path, model: SafetyTokenModel, turn: Turn) -> dict[str, Any]:
    given = phi4_multimodal.pictures(turn.images)
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in turn.images]
    if turn.sound is not None:
        given |= phi4_multimodal.heard(turn.sound)
        parts.append({"type": "audio", "sound": turn.sound})
    content = [*parts, *template_parts(turn.text)]
    ids = phi4_multimodal.Processor(model.tokenizer).ids([{"role": "user", "content": content}])
    return {"input_ids": ids, **given}


def _pebble_inputs(folder: Path, model: SafetyTokenModel, turn: Turn) -> dict[str, Any]:
    pebble: Any = model.model
    inputs = PebbleProcessor.from_pretrained(folder)(
        turn.text,
        images=turn.images,
        audio=None if turn.sound is None else (turn.sound, RATE),
        detector=pebble.text_detector,
    )
    if not turn.images and turn.sound is None:
        return dict(inputs)
    # The gate wants the positions of the merged prompt.
    merged = pebble.merge(**inputs)
    return {"inputs_embeds": merged.inputs_embeds, "attention_mask": merged.attention_mask}
