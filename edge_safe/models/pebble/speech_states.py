"""Training data of the speech decoder: recordings, the encoder's states, what was said.

The encoder is any callable from recordings to states. Shards are written one by one and reused, so
that a killed run goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_safe.errors import MediaError
from edge_safe.models.pebble.speech_decoder import Transcription
from edge_safe.models.pebble.speech_encoder import STATES_PER_SECOND
from edge_safe.rendering.sound import (
    NOISES,
    Samples,
    add_noise,
    resampled,
    reverberated,
    with_volume,
)
from edge_safe.rendering.speech import speak, spelled

Listener = Callable[[list[Samples]], list[NDArray[np.float32]]]
"""Recordings at 16 kHz into their encoder states (T, c), without those of the silence behind."""

RATE = 16_000

NARROW = 8_000

LONGEST = 15.0
"""Seconds; longer recordings are left out of training."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording to be made.

    Attributes:
        text: What is spoken, numbers in words.
        letters: Whether it is spelled letter by letter.
        voice: Name of a voice.
        speed: 1 is the voice's own.
        pitch: 1 is the voice's own.
        noise: Kind of noise, or "" for none.
        snr: Ratio of speech to noise in dB.
        room: Seconds of reverberation, 0 for none.
        narrow: Whether it comes through a line that ends at 4 kHz.
        peak: Loudest sample.
        margins: Seconds of silence before and behind.
        seed: Of noise and room.
    """

    text: str
    letters: bool
    voice: str
    speed: float
    pitch: float
    noise: str
    snr: float
    room: float
    narrow: bool
    peak: float
    margins: tuple[float, float]
    seed: int


def random_utterance(
    text: str, letters: bool, voices: Sequence[str], rng: np.random.Generator
) -> Utterance:
    """Draws voice, speed, pitch, noise, room, line and volume; a third has no noise."""
    clean = rng.random() < 0.33
    return Utterance(
        text=text,
        letters=letters,
        voice=str(rng.choice(np.asarray(voices))),
        speed=round(float(rng.uniform(0.8, 1.4 if not letters else 1.15)), 3),
        pitch=round(float(2 ** rng.uniform(-0.3, 0.3)), 3) if rng.random() < 0.7 else 1.0,
        noise="" if clean else str(rng.choice(NOISES)),
        snr=round(float(rng.uniform(10, 40)), 1),
        room=round(float(rng.uniform(0.1, 0.5)), 2) if rng.random() < 0.2 else 0.0,
        narrow=rng.random() < 0.15,
        peak=round(float(rng.uniform(0.1, 0.95)), 3),
        margins=(round(float(rng.uniform(0, 0.4)), 2), round(float(rng.uniform(0, 0.4)), 2)),
        seed=int(rng.integers(2**31)),
    )


def record(utterance: Utterance) -> Samples:
    """Makes a recording at 16 kHz.

    Raises:
        PartsError: The synthesizer is not installed.
        MediaError: It made no sound.
    """
    text = spelled(utterance.text) if utterance.letters else utterance.text
    spoken, rate = speak(text, utterance.voice, 0, utterance.speed, utterance.pitch)
    if utterance.narrow:
        spoken, rate = resampled(spoken, rate, NARROW), NARROW
    samples = resampled(spoken, rate, RATE)
    before, behind = (np.zeros(int(seconds * RATE), np.float32) for seconds in utterance.margins)
    samples = with_volume(np.concatenate([before, samples, behind]), utterance.peak)
    if utterance.room:
        samples = reverberated(samples, RATE, utterance.room, utterance.seed)
    if utterance.noise:
        samples = add_noise(samples, RATE, utterance.snr, utterance.seed, utterance.noise)
    return samples


@dataclass(frozen=True, slots=True)
class Heard:
    """What the encoder made of some utterances.

    Attributes:
        states: float16 (sum of T, c).
        offsets: int64 (recordings + 1,).
        asked: int64 (recordings,) place of each recording's utterance among all.
    """

    states: NDArray[np.float16]
    offsets: NDArray[np.int64]
    asked: NDArray[np.int64]


def hear(utterances: Sequence[Utterance], first: int, listen: Listener) -> Heard:
    """Records utterances and runs the encoder over them; what makes no sound is left out."""
    sounds: list[Samples] = []
    asked: list[int] = []
    for place, utterance in enumerate(utterances, first):
        try:
            samples = record(utterance)
        except MediaError:
            continue
        if len(samples) <= LONGEST * RATE:
            sounds.append(samples)
            asked.append(place)
    states = [row.astype(np.float16) for row in listen(sounds)]
    return Heard(
        np.concatenate(states),
        np.cumsum([0, *map(len, states)], dtype=np.int64),
        np.asarray(asked, np.int64),
    )


def cached_shards(
    folder: Path, utterances: Sequence[Utterance], listen: Listener, per_shard: int = 256
) -> Iterator[Heard]:
    """Yields what was heard shard by shard, recording only what the folder lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(utterances), per_shard):
        chosen = utterances[first : first + per_shard]
        words = json.dumps([first, [astuple(utterance) for utterance in chosen]])
        path = folder / f"speech-{hashlib.sha256(words.encode()).hexdigest()[:16]}.npz"
        if path.exists():
            with np.load(path) as stored:
                yield Heard(**{name: stored[name] for name in Heard.__slots__})
            continue
        shard = hear(chosen, first, listen)
        temporary = path.with_suffix(".partial.npz")
        np.savez(temporary, **{name: getattr(shard, name) for name in Heard.__slots__})
        temporary.replace(path)
        yield shard


@dataclass(frozen=True, slots=True)
class Spoken:
    """Recordings with what was said.

    Attributes:
        states: Of each recording, float16 (T, c).
        tokens: Of each, Whisper's tokens of its words.
    """

    states: list[NDArray[np.float16]]
    tokens: list[Sequence[int]]


def with_transcripts(
    shards: Sequence[Heard], tokens: Sequence[Sequence[int]], settings: Transcription
) -> Spoken:
    """Puts shards together with the transcript of every utterance.

    Recordings that the decoder would never write down to the end are left out.

    Args:
        shards: Of `cached_shards`.
        tokens: Whisper's tokens of every utterance.
        settings: How many of them a second may have.
    """
    spoken = Spoken([], [])
    for shard in shards:
        for row, place in enumerate(shard.asked):
            states = shard.states[shard.offsets[row] : shard.offsets[row + 1]]
            said = tokens[int(place)]
            if said and len(said) <= settings.most_tokens(len(states) / STATES_PER_SECOND):
                spoken.states.append(states)
                spoken.tokens.append(said)
    return spoken
