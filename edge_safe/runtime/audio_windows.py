"""How a sound becomes what an audio encoder takes: windows of Whisper's log-mel features.

Three kinds of encoders are served. One hears a single window and only the frames of the sound in
it, one whole windows, silence included, and one a sound chunk by chunk, each by itself. The numbers
equal those of transformers' feature extractor for the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edge_safe.errors import MediaError
from edge_safe.runtime.audio_io import SAMPLE_RATE
from edge_safe.runtime.log_mel import log_mel

Count = Annotated[int, Meta(ge=1, le=4096)]
Seconds = Annotated[int, Meta(ge=1, le=3600)]

# Frames that one state of the encoder stands for: its second convolution takes every other one.
STRIDE = 2


class Windows(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How samples at 16 kHz become windows.

    Attributes:
        kind: ``sound``: one window, of which the encoder takes the frames of the sound alone.
            ``whole``: as many whole windows as the sound fills, with silence behind it.
            ``chunks``: the frames of the sound alone, cut into chunks; the last one is shorter.
        feature_size: Mel bins.
        n_fft: Samples of one spectrum.
        hop_length: Samples between two frames.
        chunk_length: Seconds of a window, or of the longest sound that is cut into chunks.
        states_per_token: States of the encoder that make one embedding.
        max_seconds: The longest sound that is accepted.
        chunk_frames: Frames of a chunk, of the kind ``chunks`` alone.
    """

    kind: Literal["sound", "whole", "chunks"]
    feature_size: Count
    n_fft: Count
    hop_length: Count
    chunk_length: Seconds
    states_per_token: Count
    max_seconds: Seconds
    chunk_frames: Count | None = None

    @property
    def frames(self) -> int:
        """Frames of a whole window."""
        return self.chunk_length * SAMPLE_RATE // self.hop_length


@dataclass(frozen=True, slots=True)
class Window:
    """What the encoder takes at once.

    Attributes:
        feeds: ``input_features`` (1, bins, frames) float32, and for ``sound`` ``steps`` (1,) int64,
            how many states the sound has; frames behind them are the convolutions' margin. A
            chunk has no margin: its encoder hears zeros beyond it.
        tokens: Embeddings that it gives.
    """

    feeds: dict[str, NDArray[np.generic]]
    tokens: int


def problem(windows: Windows) -> str | None:
    """What the types cannot say of the parameters, None where they fit."""
    if windows.kind != "whole" and windows.max_seconds > windows.chunk_length:
        return f"one window of {windows.chunk_length} s for sounds of {windows.max_seconds} s"
    if (windows.kind == "chunks") != (windows.chunk_frames is not None):
        return f"windows of the kind '{windows.kind}' with chunk_frames {windows.chunk_frames}"
    if windows.n_fft // 2 >= windows.chunk_length * SAMPLE_RATE:
        return f"spectra of {windows.n_fft} samples in windows of {windows.chunk_length} s"
    frames = windows.chunk_frames or windows.frames
    if frames % (STRIDE * windows.states_per_token):
        return f"{frames} frames, no multiple of {STRIDE * windows.states_per_token}"
    return None


def token_count(samples: int, windows: Windows) -> int:
    """Embeddings of a sound of so many samples.

    Raises:
        MediaError: It is too short to give one.
    """
    if windows.kind == "whole":
        count = -(-samples // (windows.chunk_length * SAMPLE_RATE))
        return count * (windows.frames // STRIDE // windows.states_per_token)
    tokens = _steps(samples, windows) // windows.states_per_token
    if not tokens:
        raise MediaError(
            f"The sound lasts {1000 * samples / SAMPLE_RATE:.0f} ms, too short for this model to "
            "hear anything in it. Give a longer one."
        )
    return tokens


def cut(samples: NDArray[np.float32], windows: Windows) -> Iterator[Window]:
    """The windows of a sound (n,) at 16 kHz that is no longer than ``max_seconds``.

    Raises:
        MediaError: See ``token_count``.
    """
    tokens = token_count(len(samples), windows)
    features = mel_features(samples, windows)
    if windows.kind == "sound":
        steps = _steps(len(samples), windows)
        # The last state's convolutions reach one frame beyond its own two.
        frames = min(STRIDE * (steps + 1), windows.frames)
        heard = np.ascontiguousarray(features[:, :, :frames])
        yield Window({"input_features": heard, "steps": np.array([steps], np.int64)}, tokens)
    elif windows.chunk_frames is not None:
        heard = features[:, :, : _frames(len(samples), windows)]
        yield from _chunks(heard, windows.chunk_frames, windows.states_per_token)
    else:
        count = features.shape[-1] // windows.frames
        for part in np.split(features, count, axis=-1):
            yield Window({"input_features": np.ascontiguousarray(part)}, tokens // count)


def mel_features(samples: NDArray[np.float32], windows: Windows) -> NDArray[np.float32]:
    """(1, bins, frames) log-mel features of a sound, padded to whole windows.

    A sound that is cut into chunks is padded by a second or two: silence behind that changes none
    of its own frames.
    """
    seconds = windows.chunk_length
    if windows.kind == "whole":
        seconds *= -(-len(samples) // (windows.chunk_length * SAMPLE_RATE))
    elif windows.kind == "chunks":
        seconds = min(seconds, len(samples) // SAMPLE_RATE + 2)
    return log_mel(
        samples,
        seconds=seconds,
        sample_rate=SAMPLE_RATE,
        bins=windows.feature_size,
        window=windows.n_fft,
        hop=windows.hop_length,
    )


def _chunks(features: NDArray[np.float32], length: int, states_per_token: int) -> Iterator[Window]:
    """Chunks of a sound's features (1, bins, frames)."""
    for first in range(0, features.shape[-1], length):
        chunk = np.ascontiguousarray(features[:, :, first : first + length])
        tokens = -(-chunk.shape[-1] // STRIDE) // states_per_token
        # The rest of a sound may be too short for an embedding; no other chunk hears it.
        if tokens:
            yield Window({"input_features": chunk}, tokens)


def _steps(samples: int, windows: Windows) -> int:
    """States of the encoder over a sound of so many samples."""
    return -(-_frames(samples, windows) // STRIDE)


def _frames(samples: int, windows: Windows) -> int:
    """Frames that a sound of so many samples has a share in."""
    return -(-samples // windows.hop_length)
