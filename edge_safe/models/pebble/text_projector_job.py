"""The recipe's ``[text_projector]``: texts, fonts and steps into a trained text projector."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge_safe.errors import DataError
from edge_safe.models.data import read_json_lines
from edge_safe.models.pebble import parts
from edge_safe.models.pebble.character_decoder import CharacterDecoder
from edge_safe.models.pebble.composed_job import respelled, speak_up, train_spelling
from edge_safe.models.pebble.line_states import (
    LineStates,
    cached_shards,
    cut_into_lines,
    joined,
)
from edge_safe.models.pebble.modeling_pebble import PebbleForConditionalGeneration
from edge_safe.models.pebble.projector_training import settings_of, train_resumably
from edge_safe.models.pebble.projectors import SequenceProjector
from edge_safe.models.pebble.spelling import Spelling
from edge_safe.models.pebble.text_projector_training import (
    ProjectorTraining,
    train_text_projector,
    word_piece_accuracy,
)
from edge_safe.models.progress import Progress
from edge_safe.models.recipe import TextProjectorSection
from edge_safe.rendering.fonts import FONT_FOLDERS, find_fonts

_HELD_LINES = 512


def run_job(
    model: PebbleForConditionalGeneration,
    tokenizer: Tokenizer,
    section: TextProjectorSection,
    data: Path,
    cache: Path,
    work: Path,
    progress: Progress,
) -> float:
    """Trains the text projector of a pebble in place and marks it trained.

    Rendered lines are cached in ``cache``, the state of training in ``work``; a killed run goes on
    from both.

    Returns:
        Share of word pieces read right on held-out lines, in fonts that training never saw.

    Raises:
        DataError: A file of texts is missing, or no font is left for one of the splits.
    """
    rng = np.random.default_rng(section.seed)
    lines = list(cut_into_lines(_texts(section, data), rng))
    rng.shuffle(lines)
    fonts, held_fonts = _split_fonts(section)

    def recognize(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            states: NDArray[np.float32] = model.text_recognizer(torch.from_numpy(pixels)).numpy()
        return states

    def render(chosen: list[str], faces: list[Path]) -> LineStates:
        shards = []
        for shard in cached_shards(cache, chosen, faces, tokenizer, recognize, section.seed):
            shards.append(shard)
            progress("rendered lines", min(len(chosen), 1024 * len(shards)), len(chosen))
        return joined(shards)

    held = min(_HELD_LINES, len(lines) // 10)
    if not held:
        raise DataError(f"[text_projector] found {len(lines)} lines of text; give more files.")
    validation = render(lines[-held:], held_fonts)
    train = render(lines[:-held][: section.lines], fonts)
    embedding = model.language_model.model.embed_tokens.weight.detach()
    # With a spelling of its own, the projector starts as one that has none.
    config = dataclasses.replace(model.text_projector.config, pieces=0)
    projector = SequenceProjector(config) if section.composed else model.text_projector
    projector.requires_grad_(True)
    train_resumably(
        lambda start: train_text_projector(
            projector,
            embedding,
            train,
            settings_of(section, ProjectorTraining),
            lambda step, loss: progress("text projector", step + 1, section.steps),
            start,
        ),
        work / "text_projector.pt",
    )
    model.config.modalities["text_lines"]["trained"] = True
    if section.composed is None:
        model.text_projector.requires_grad_(False).eval()
        return word_piece_accuracy(model.text_projector, embedding, validation, held)
    named = parts.read_parts(model.config.parts)["text_recognizer"]
    decoder = CharacterDecoder.read(parts.fetch({"recognizer": named})["recognizer"]).ascii_only()
    texts = list(_texts(section, data))
    model.text_projector = train_spelling(
        projector, train, texts, tokenizer, decoder, section.composed, work, progress
    )
    model.config.text_projector |= {"pieces": len(model.text_projector.piece_ids), "candidates": 1}
    spelling = Spelling(tokenizer, section.composed.rows)
    spelled = respelled(validation, tokenizer, spelling)
    return speak_up(model.text_projector, embedding, spelled, spelling)


def _texts(section: TextProjectorSection, data: Path) -> Iterator[str]:
    for name in section.texts:
        for _, line in read_json_lines(data / name):
            yield from (str(line[field]) for field in ("prompt", "chosen") if field in line)


def _split_fonts(section: TextProjectorSection) -> tuple[list[Path], list[Path]]:
    """Fonts for training and held-out ones, by the beginning of their file's name."""
    folders = tuple(Path(f) for f in section.font_folders) or FONT_FOLDERS
    fonts = [f for f in find_fonts(folders) if not any(w in f.name for w in section.skip_fonts)]
    held = [f for f in fonts if f.name.startswith(tuple(section.held_fonts))]
    train = [f for f in fonts if f not in held]
    if not held or not train:
        raise DataError(
            f"[text_projector] has {len(train)} fonts for training and {len(held)} held out "
            f"(names that begin with {', '.join(section.held_fonts)}). Install more fonts, or "
            "change held_fonts."
        )
    return train, held
