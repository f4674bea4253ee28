"""The recipe's ``[speech_decoder]``: texts, voices and steps into a trained speech decoder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge_safe.errors import CheckpointError, DataError
from edge_safe.models.data import read_json_lines
from edge_safe.models.harmless.reader import kinds, part_of, read_kind, variations
from edge_safe.models.pebble.modeling_pebble import PebbleForConditionalGeneration
from edge_safe.models.pebble.processing_pebble import PebbleProcessor
from edge_safe.models.pebble.projector_training import settings_of, train_resumably
from edge_safe.models.pebble.speech_decoder_training import (
    SpeechTraining,
    train_speech_decoder,
    words_right,
)
from edge_safe.models.pebble.speech_encoder import STATES_PER_SECOND
from edge_safe.models.pebble.speech_states import (
    RATE,
    Utterance,
    cached_shards,
    random_utterance,
    with_transcripts,
)
from edge_safe.models.pebble.spoken_text import (
    common_words,
    heard,
    letter_by_letter,
    random_words,
    speakable,
)
from edge_safe.models.progress import Progress
from edge_safe.models.recipe import SpeechDecoderSection
from edge_safe.rendering.sound import Samples
from edge_safe.rendering.speech import HELD_OUT_SYNTHESIZER, installed_voices

HELD_SHARE = 0.04
"""Of the prompts, chosen by hash: they are never spoken in training."""

MOST_WORDS = 30

_VALIDATION = 200
_PER_TEMPLATE = 3


def run_job(
    model: PebbleForConditionalGeneration,
    processor: PebbleProcessor,
    tokenizer: Tokenizer,
    section: SpeechDecoderSection,
    data: Path,
    cache: Path,
    work: Path,
    progress: Progress,
) -> float:
    """Trains the speech decoder of a pebble in place and marks it trained.

    What the encoder made of the recordings is cached in ``cache``, the state of training in
    ``work``; a killed run goes on from both.

    Returns:
        Share of words heard right in held-out texts, by the synthesizers that training heard.

    Raises:
        DataError: A file of texts is missing, or a synthesizer's voices are not installed.
        CheckpointError: The model was opened without the tokenizer of its speech decoder.
    """
    words = model.speech_words
    if words is None:
        raise CheckpointError("This pebble was opened without the tokenizer of its speech decoder.")
    rng = np.random.default_rng(section.seed)
    train, held = training_texts(section.texts, data)
    utterances = choose_utterances(train, tokenizer, section, rng)

    def listen(sounds: list[Samples]) -> list[NDArray[np.float32]]:
        return [encoder_states(model, processor, sound) for sound in sounds]

    shards = []
    for shard in cached_shards(cache, utterances, listen):
        shards.append(shard)
        done = sum(len(s.asked) for s in shards)
        progress("recordings", min(done, len(utterances)), len(utterances))
    settings = model.config.transcription
    spoken = with_transcripts(shards, [words.ids(u.text) for u in utterances], settings)
    train_resumably(
        lambda start: train_speech_decoder(
            model.audio_decoder,
            spoken,
            settings,
            settings_of(section, SpeechTraining),
            lambda step, loss: progress("speech decoder", step + 1, section.steps),
            start,
        ),
        work / "speech_decoder.pt",
    )
    model.audio_decoder.requires_grad_(False).eval()
    model.config.modalities["speech"]["trained"] = True

    chosen = [held[i] for i in rng.permutation(len(held))[:_VALIDATION]]
    tests = [random_utterance(text, False, _voices(section)[0], rng) for text in chosen]
    said, understood = [], []
    for shard in cached_shards(cache, tests, listen):
        for row, place in enumerate(shard.asked):
            states = shard.states[shard.offsets[row] : shard.offsets[row + 1]]
            inputs = torch.from_numpy(states.astype(np.float32))[None]
            seconds = len(states) / STATES_PER_SECOND
            text = words.text(model.audio_decoder.write_down(inputs, seconds, settings))
            said.append(heard(tests[int(place)].text))
            understood.append(heard(speakable(text) or text))
    return words_right(said, understood)


def training_texts(files: Sequence[str], data: Path) -> tuple[list[str], list[str]]:
    """Speakable texts to train on and held-out ones.

    From the files' prompts of at most 30 words, and for training the harmless prompts' training
    part.

    Raises:
        DataError: A file is missing, or one of the sides has no text.
    """
    train: list[str] = []
    held: list[str] = []
    for prompt in _prompts(files, data):
        text = speakable(prompt)
        if text and heard(text) and len(text.split()) <= MOST_WORDS:
            (held if is_held(prompt) else train).append(text)
    for kind in kinds():
        for template in read_kind(kind):
            if part_of(template.id) == "train":
                for prompt in variations(template, _PER_TEMPLATE, 0):
                    text = speakable(prompt)
                    if text and heard(text) and len(text.split()) <= MOST_WORDS:
                        train.append(text)
    if not train or not held:
        raise DataError(
            f"[speech_decoder] found {len(train)} texts to train on and {len(held)} held out in "
            f"{', '.join(files)}; give more files."
        )
    return train, held


def is_held(prompt: str) -> bool:
    """Whether a prompt is kept out of the speech decoder's training."""
    place = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16)
    return place % 100 < 100 * HELD_SHARE


def choose_utterances(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    section: SpeechDecoderSection,
    rng: np.random.Generator,
) -> list[Utterance]:
    """Draws what is spoken by whom: prompts, words at random, prompts spelled letter by letter.

    Raises:
        DataError: A synthesizer that training needs is not installed.
    """
    many, few = _voices(section)
    words = common_words(tokenizer)
    order = rng.permutation(len(texts))
    chosen: list[Utterance] = []
    taken = 0
    while len(chosen) < section.recordings:
        voices = few if rng.random() < section.slow_share else many
        kind = rng.random()
        text, letters = texts[int(order[taken % len(texts)])], False
        if kind < section.random_share:
            text = random_words(words, rng)
        else:
            taken += 1
            if kind < section.random_share + section.letter_share:
                text, letters = letter_by_letter(text), True
        if text:
            chosen.append(random_utterance(text, letters, voices, rng))
    return chosen


def encoder_states(
    model: PebbleForConditionalGeneration, processor: PebbleProcessor, samples: Samples
) -> NDArray[np.float32]:
    """The encoder's (T, c) states of a recording at 16 kHz."""
    inputs = processor.log_mel([(samples, RATE)])
    lengths = inputs["audio_lengths"]
    with torch.no_grad():
        states = model.audio_encoder.hear(inputs["input_features"], lengths)
    heard_states: NDArray[np.float32] = states[0, : int(lengths[0])].float().numpy()
    return heard_states


def _voices(section: SpeechDecoderSection) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Voices of the synthesizers that training hears: the fast one's, the slow one's."""
    if HELD_OUT_SYNTHESIZER in (section.synthesizer, section.slow_synthesizer):
        raise DataError(f"{HELD_OUT_SYNTHESIZER} is held out and cannot be trained on.")
    found = installed_voices(section.synthesizer), installed_voices(section.slow_synthesizer)
    for name, voices in zip((section.synthesizer, section.slow_synthesizer), found, strict=True):
        if not voices:
            raise DataError(f"[speech_decoder] needs voices of {name}, which is not installed.")
    return found


def _prompts(files: Sequence[str], data: Path) -> Iterator[str]:
    for name in files:
        for _, line in read_json_lines(data / name):
            if "prompt" in line:
                yield str(line["prompt"])
