"""How a sound becomes what a conformer takes: frames of log-mel features, a window at a time.

The encoder halves the frames several times, then attends within windows of its states. Each window
is encoded by itself and brings the frames that its first state also reaches. The numbers equal
those of transformers' ``Phi4MultimodalFeatureExtractor`` for the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edge_safe.errors import MediaError
from edge_safe.runtime.audio_io import SAMPLE_RATE
from edge_safe.runtime.audio_windows import Count, Seconds, Window
from edge_safe.runtime.kaldi_mel import kaldi_mel

FEATURES, STATES, BESIDE_PICTURES = "input_features", "states", "beside_pictures"

Hertz = Annotated[float, Meta(ge=0.0, le=SAMPLE_RATE / 2)]


class Frames(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How samples at 16 kHz become frames, and these windows.

    Attributes:
        feature_size: Mel bins.
        n_fft: Samples of one spectrum.
        win_length: Samples of a frame.
        hop_length: Samples between two frames.
        preemphasis: Share of the sample before that is taken off each.
        min_frequency: Where the mel bins begin, Hz.
        max_frequency: Where they end, Hz.
        frames_per_token: Frames that one state of the encoder stands for, and with it one
            embedding.
        window_tokens: States that see each other.
        max_seconds: The longest sound that is accepted.
    """

    feature_size: Count
    n_fft: Count
    win_length: Count
    hop_length: Count
    preemphasis: Annotated[float, Meta(ge=0.0, le=1.0)]
    min_frequency: Hertz
    max_frequency: Hertz
    frames_per_token: Count
    window_tokens: Count
    max_seconds: Seconds


def frames_problem(frames: Frames) -> str | None:
    """What the types cannot say of the parameters, None where they fit."""
    if frames.win_length > frames.n_fft:
        return f"frames of {frames.win_length} samples for spectra of {frames.n_fft}"
    if frames.min_frequency >= frames.max_frequency:
        return f"mel bins from {frames.min_frequency} to {frames.max_frequency} Hz"
    return None


def frame_tokens(samples: int, frames: Frames) -> int:
    """Embeddings of a sound of so many samples.

    Raises:
        MediaError: It is shorter than a frame.
    """
    if samples < frames.win_length:
        raise MediaError(
            f"The sound lasts {1000 * samples / SAMPLE_RATE:.0f} ms, too short for this model to "
            "hear anything in it. Give a longer one."
        )
    count = (samples - frames.win_length) // frames.hop_length + 1
    return -(-count // frames.frames_per_token)


def cut_frames(
    samples: NDArray[np.float32], frames: Frames, beside_pictures: bool
) -> Iterator[Window]:
    """The windows of a sound (n,) at 16 kHz.

    Args:
        samples: No longer than ``max_seconds``.
        frames: How they are cut.
        beside_pictures: Whether its turn has pictures, as the encoder then projects otherwise.

    Yields:
        With feeds ``input_features`` (1, frames, bins) float32, ``states`` (2,) int64: how many
        states in front belong to the window before, and how many a window has, silence behind the
        sound included; and ``beside_pictures`` (1,) int64.

    Raises:
        MediaError: See ``frame_tokens``.
    """
    tokens = frame_tokens(len(samples), frames)
    step, most = frames.frames_per_token, frames.window_tokens
    features = frame_features(samples, frames)
    for first in range(0, tokens, most):
        last = min(first + most, tokens)
        # The convolutions in front of the first state reach back into the frames of one before.
        margin = int(first > 0)
        part = features[(first - margin) * step : last * step]
        feeds: dict[str, NDArray[np.generic]] = {
            FEATURES: np.ascontiguousarray(part[None]),
            STATES: np.array([margin, min(most, tokens)], np.int64),
            BESIDE_PICTURES: np.array([beside_pictures], np.int64),
        }
        yield Window(feeds, last - first)


def frame_features(samples: NDArray[np.float32], frames: Frames) -> NDArray[np.float32]:
    """(frames, bins) log-mel features of a sound."""
    return kaldi_mel(
        samples,
        sample_rate=SAMPLE_RATE,
        bins=frames.feature_size,
        n_fft=frames.n_fft,
        window=frames.win_length,
        hop=frames.hop_length,
        preemphasis=frames.preemphasis,
        lowest=frames.min_frequency,
        highest=frames.max_frequency,
    )
