"""The recipe's ``[text_projector.composed]``: a reader of rendered lines learns to spell."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from edge_safe.models.harmless import reader
from edge_safe.models.pebble.character_decoder import CharacterDecoder
from edge_safe.models.pebble.composed_lines import LineComposer
from edge_safe.models.pebble.composed_training import (
    ComposedTraining,
    LineSource,
    train_on_composed,
)
from edge_safe.models.pebble.line_states import LineStates
from edge_safe.models.pebble.line_texts import LineTexts
from edge_safe.models.pebble.projector_training import settings_of, train_resumably
from edge_safe.models.pebble.projectors import SequenceProjector
from edge_safe.models.pebble.spelling import Spelling
from edge_safe.models.pebble.text_projector_training import word_piece_accuracy
from edge_safe.models.progress import Progress
from edge_safe.models.recipe import ComposedSection

_VARIATIONS = 3
_SHIFTS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)


def spelling_projector(first: SequenceProjector, spelling: Spelling) -> SequenceProjector:
    """A projector like ``first`` that spells with its own pieces, told apart by their letters."""
    config = dataclasses.replace(first.config, pieces=len(spelling), candidates=1)
    projector = SequenceProjector(config)
    weights = projector.state_dict()
    weights |= {key: value for key, value in first.state_dict().items() if key in weights}
    weights["classes.weight"] = spelling.codes(config.width)
    weights["classes.bias"] = torch.zeros(len(spelling))
    weights["piece_ids"] = spelling.ids
    projector.load_state_dict(weights)
    return projector


def respelled(lines: LineStates, tokenizer: Tokenizer, spelling: Spelling) -> LineStates:
    """The same lines in the spelling's pieces, which end nowhere in particular."""
    texts = line_texts(lines, tokenizer)
    pieces = [np.asarray(spelling.encode(text), np.int64) for text in texts]
    joined = np.concatenate(pieces)
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    return LineStates(lines.states, lines.offsets, joined, np.zeros_like(joined), offsets)


def line_texts(lines: LineStates, tokenizer: Tokenizer) -> list[str]:
    """What each line says, without the space in front."""
    pieces = (lines.line(i)[1].tolist() for i in range(len(lines)))
    return [tokenizer.decode(ids).strip() for ids in pieces]


def harmless_texts() -> Iterator[str]:
    """Our own harmless prompts, those of templates that may be trained on."""
    for kind in reader.kinds():
        for template in reader.read_kind(kind):
            if reader.part_of(template.id) == "train":
                yield from reader.variations(template, _VARIATIONS, 0)


def train_spelling(
    first: SequenceProjector,
    lines: LineStates,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    decoder: CharacterDecoder,
    section: ComposedSection,
    work: Path,
    progress: Progress,
) -> SequenceProjector:
    """Goes on from a projector that was trained on rendered lines.

    Args:
        first: Where its layers start from; it is left as it is.
        lines: Rendered lines.
        texts: What composed lines may say.
        tokenizer: The language model's.
        decoder: Finds the characters of rendered lines.
        section: The recipe's.
        work: Folder of the state of training, from which a killed run goes on.
        progress: Told about every step.

    Returns:
        The trained projector.
    """
    spelling = Spelling(tokenizer, section.rows)
    projector = spelling_projector(first, spelling)
    projector.classes.requires_grad_(False)
    codes: Tensor = projector.classes.weight.detach()
    composer = LineComposer(lines, line_texts(lines, tokenizer), decoder)
    corpus = [*texts, *(harmless_texts() if section.harmless else ())]
    source = LineSource(composer, LineTexts(corpus, tokenizer), spelling)
    settings = settings_of(section, ComposedTraining)
    train_resumably(
        lambda start: train_on_composed(
            projector,
            codes,
            source,
            settings,
            lambda step, loss: progress("composed lines", step + 1, section.steps),
            start,
        ),
        work / "composed.pt",
    )
    return projector.requires_grad_(False).eval()


def speak_up(
    projector: SequenceProjector, embedding: Tensor, lines: LineStates, spelling: Spelling
) -> float:
    """Shifts the emission so that as little as can be is left out or said twice.

    Few states end a piece, so training leaves the logits of those that do too low, and all the more
    in fonts that it never saw.

    Args:
        projector: Its emission's bias is moved.
        embedding: (V, d) tied embedding of the language model.
        lines: Lines in held-out fonts, respelled.
        spelling: The projector's.

    Returns:
        Share of these lines' pieces that are then read right.
    """
    lines = dataclasses.replace(lines, pieces=spelling.ids.numpy()[lines.pieces])
    trained = projector.emission.bias.detach().clone()
    shares = []
    for shift in _SHIFTS:
        projector.emission.bias.copy_(trained + shift)
        shares.append(word_piece_accuracy(projector, embedding, lines, len(lines)))
    projector.emission.bias.copy_(trained + _SHIFTS[int(np.argmax(shares))])
    return max(shares)
