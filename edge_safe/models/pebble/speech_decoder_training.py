"""Trains the speech decoder's attention to the encoder's states; all else of it stays Whisper's.

The decoder learned to listen to windows of 30 s and to people. Here windows are as long as their
sound, and many voices are made. Each token is predicted from the true ones before it (teacher
forcing). States are disturbed anew in every step, and some of the tokens before are wrong, so that
the sound is listened to rather than guessed from the words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from edge_safe.models.pebble.projector_training import train_projector
from edge_safe.models.pebble.speech_decoder import Layer, SpeechDecoder, Transcription
from edge_safe.models.pebble.speech_states import Spoken
from edge_safe.models.pebble.text_projector_training import batches, edit_distance

IGNORED = -100

SHORTEST_GAP, LONGEST_GAP = 2, 8
"""States of a stretch that is blanked out."""


@dataclass(frozen=True, slots=True)
class SpeechTraining:
    """How the attention is trained.

    Attributes:
        steps: Optimizer steps.
        recordings_per_step: Recordings of one step.
        learning_rate: Peak of a cosine schedule with a short linear start.
        weight_decay: AdamW's.
        gain: Standard deviation of the factor on each channel of a recording, around 1.
        noise: The same of what is added to each channel, relative to the states' own.
        gaps: Most stretches of a recording's states that are blanked out.
        wrong: Share of the tokens before that are replaced by random words.
        smoothing: Share of every target that goes to all tokens alike.
        seed: Seed of order and disturbances.
    """

    steps: int = 1700
    recordings_per_step: int = 32
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    gain: float = 0.1
    noise: float = 0.05
    gaps: int = 2
    wrong: float = 0.12
    smoothing: float = 0.05
    seed: int = 0


class SoundAttention(nn.Module):
    """The part of a decoder that is trained, with the names its weights have there."""

    def __init__(self, decoder: SpeechDecoder) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "encoder_attn": layer.encoder_attn,
                    "encoder_attn_layer_norm": layer.encoder_attn_layer_norm,
                }
            )
            for layer in (cast(Layer, module) for module in decoder.layers)
        )


@dataclass(frozen=True, slots=True)
class SpeechBatch:
    """Recordings padded to one length, and their transcripts.

    Attributes:
        states: (B, T, c) float32.
        own: (B, T) bool, False at padding.
        ids: (B, S) int64 tokens that go in: the prompt, then the words.
        targets: (B, S) int64 tokens that should come out, -100 where it does not matter.
    """

    states: Tensor
    own: Tensor
    ids: Tensor
    targets: Tensor


def collate(spoken: Spoken, rows: Sequence[int], settings: Transcription) -> SpeechBatch:
    """Pads the chosen recordings into one batch."""
    states = [torch.from_numpy(spoken.states[i].astype(np.float32)) for i in rows]
    prompt, end = list(settings.prompt_ids), settings.end_id
    words = [list(spoken.tokens[i]) for i in rows]
    ids = [torch.tensor([*prompt, *tokens]) for tokens in words]
    # The prompt's own tokens are given, not predicted.
    given = [IGNORED] * (len(prompt) - 1)
    targets = [torch.tensor([*given, *tokens, end]) for tokens in words]
    pad = nn.utils.rnn.pad_sequence
    return SpeechBatch(
        pad(states, batch_first=True),
        pad([torch.ones(len(row), dtype=torch.bool) for row in states], batch_first=True),
        pad(ids, batch_first=True, padding_value=end),
        pad(targets, batch_first=True, padding_value=IGNORED),
    )


def disturbed(
    batch: SpeechBatch, settings: SpeechTraining, words: int, rng: np.random.Generator
) -> SpeechBatch:
    """The batch with other gains, noise and gaps in its states and wrong tokens among its words.

    Args:
        batch: Left as it is.
        settings: How much of each.
        words: Tokens below this are words.
        rng: Draws them.
    """
    count, _, width = batch.states.shape

    def drawn(deviation: float) -> Tensor:
        return torch.from_numpy(rng.standard_normal((count, 1, width), np.float32)) * deviation

    spread = float(batch.states[batch.own].std())
    states = batch.states * (1 + drawn(settings.gain)) + drawn(settings.noise * spread)
    for row, length in zip(states, batch.own.sum(1).tolist(), strict=True):
        for _ in range(int(rng.integers(settings.gaps + 1))):
            wide = int(rng.integers(SHORTEST_GAP, LONGEST_GAP + 1))
            start = int(rng.integers(max(1, length - wide)))
            row[start : start + wide] = 0.0
    wrong = torch.from_numpy(rng.random(batch.ids.shape) < settings.wrong) & (batch.ids < words)
    others = torch.from_numpy(rng.integers(words, size=batch.ids.shape))
    return replace(batch, states=states, ids=torch.where(wrong, others, batch.ids))


def transcript_loss(decoder: SpeechDecoder, batch: SpeechBatch, smoothing: float) -> Tensor:
    """Cross-entropy per token of the transcripts."""
    hidden, _ = decoder.hidden(batch.ids, decoder.listen(batch.states), own=batch.own)
    kept = batch.targets != IGNORED
    # Logits are as wide as the vocabulary, so they are made where there is a target.
    logits = decoder.head(hidden[kept])
    return functional.cross_entropy(logits, batch.targets[kept], label_smoothing=smoothing)


def train_speech_decoder(
    decoder: SpeechDecoder,
    spoken: Spoken,
    transcription: Transcription,
    settings: SpeechTraining,
    on_step: Callable[[int, float], None],
    start: dict[str, object] | None = None,
) -> Iterator[dict[str, object]]:
    """Trains in place and yields a resumable state every 100 steps and at the end.

    Args:
        decoder: Its attention to the sound is trained in place.
        spoken: Recordings' states and Whisper's tokens of what was said.
        transcription: Whisper's control tokens.
        settings: Hyperparameters.
        on_step: Called with the step's number and its loss.
        start: A state yielded by an earlier run, to go on from.

    Returns:
        States for ``torch.save``: step, projector, optimizer.
    """
    decoder.requires_grad_(False)
    attention = SoundAttention(decoder).requires_grad_(True)
    lengths: NDArray[np.int64] = np.array([len(states) for states in spoken.states], np.int64)

    def losses(first: int) -> Iterator[Tensor]:
        rng = np.random.default_rng([settings.seed, first])
        for rows in batches(lengths, settings.recordings_per_step, rng):
            batch = collate(spoken, rows.tolist(), transcription)
            batch = disturbed(batch, settings, transcription.end_id, rng)
            yield transcript_loss(decoder, batch, settings.smoothing)

    return train_projector(attention, settings, losses, on_step, start)


def words_right(said: list[str], heard: list[str]) -> float:
    """1 - word error rate over all recordings; below 0 where more was made up than said."""
    known: dict[str, int] = {}

    def numbered(text: str) -> list[int]:
        return [known.setdefault(word, len(known)) for word in text.split()]

    wrong = sum(
        edit_distance(numbered(ours), numbered(theirs))
        for ours, theirs in zip(heard, said, strict=True)
    )
    return 1.0 - wrong / max(1, sum(len(text.split()) for text in said))
