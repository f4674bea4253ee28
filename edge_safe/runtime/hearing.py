"""Sound for families whose chat template marks its place: what is heard, as embeddings.

The manifest's ``processors.audio`` says how samples become windows, by Whisper's features or by
frames of their own; ``audio_encoder`` turns each window into embeddings. Nothing here knows a
model.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_safe.errors import GateError, SchemaError
from edge_safe.runtime.audio_frames import (
    BESIDE_PICTURES,
    Frames,
    cut_frames,
    frame_tokens,
    frames_problem,
)
from edge_safe.runtime.audio_io import read_audio
from edge_safe.runtime.audio_windows import Window, Windows, cut, problem, token_count
from edge_safe.runtime.bundle import Bundle
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.families.base import Media, Placed, Prepared
from edge_safe.runtime.image_tokens import Marker
from edge_safe.runtime.media import AudioInput
from edge_safe.runtime.tokens import Piece, Tokens, Trusted

AUDIO_ENCODER = "audio_encoder"

# Types that chat templates give to a sound.
Part = Literal["audio", "input_audio", "audio_url"]

FloatArray = NDArray[np.float32]


class AudioProcessor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Section ``audio`` of the manifest's ``processors``.

    Attributes:
        placeholder: What the chat template writes where a sound belongs; a special token.
        part: Type of a sound among the parts of a message, as the chat template knows it.
        windows: From samples to what the encoder takes, by Whisper's features.
        frames: The same by frames of their own; one of the two is given.
        before: What stands in front of the embeddings where the template does not write it.
    """

    placeholder: Marker
    part: Part = "audio"
    windows: Windows | None = None
    frames: Frames | None = None
    before: Marker | None = None


class Hearing:
    """Embeds sounds for one bundle. Shared between threads."""

    def __init__(self, bundle: Bundle, processor: AudioProcessor, how: Windows | Frames) -> None:
        self.placeholder = processor.placeholder
        self.part = processor.part
        self._bundle = bundle
        self._before = processor.before
        self._how = how

    def variant(self, images: int) -> str:
        """How a sound is encoded in a turn with so many pictures."""
        return BESIDE_PICTURES if images and isinstance(self._how, Frames) else ""

    def sound(self, audio: AudioInput, variant: str) -> Prepared:
        """Reads a sound and cuts it into windows.

        Raises:
            MediaError: It cannot be read, or is too long or too short.
        """
        how = self._how
        samples = read_audio(audio, how.max_seconds)
        count = len(samples)
        tokens = token_count(count, how) if isinstance(how, Windows) else frame_tokens(count, how)
        windows = list(self._cut(samples, beside_pictures=variant == BESIDE_PICTURES))
        return Prepared(tokens, partial(self._hear, windows, tokens))

    def _hear(self, windows: list[Window], tokens: int, deadline: Deadline | None) -> Media:
        """What stands in the place of a sound.

        Raises:
            GateError: The deadline passed, or the encoder gave no usable numbers.
        """
        heard = []
        for window in windows:
            if deadline is not None:
                deadline.check()
            heard.append(self._encode(window, deadline))
        pieces: list[Piece] = [np.concatenate(heard)]
        if self._before is not None:
            pieces.insert(0, Trusted(self._before))
        return Media(placed=[Placed(self.part, pieces)], audio_tokens=tokens)

    def _cut(self, samples: FloatArray, *, beside_pictures: bool) -> Iterator[Window]:
        if isinstance(self._how, Windows):
            return cut(samples, self._how)
        return cut_frames(samples, self._how, beside_pictures)

    def _encode(self, window: Window, deadline: Deadline | None) -> FloatArray:
        """One window as (tokens, d)."""
        session = self._bundle.session(AUDIO_ENCODER)
        abort = None if deadline is None else deadline.abort
        found = session.run(window.feeds, abort)["audio_features"]
        features: FloatArray = np.asarray(found, np.float32)
        expected = (1, window.tokens, self._bundle.manifest.model.hidden_size)
        if features.shape != expected:
            raise GateError(f"{AUDIO_ENCODER} gave features of {features.shape}, not {expected}")
        if not np.isfinite(features).all():
            raise GateError(f"{AUDIO_ENCODER} gave numbers that are not finite")
        window_features: FloatArray = features[0]
        return window_features


def open_hearing(bundle: Bundle, tokens: Tokens, processor: AudioProcessor) -> Hearing:
    """Checks the parameters of sound.

    Raises:
        SchemaError: They do not fit, or there is no encoder.
        BundleError: A placeholder or marker is a token that text could produce.
    """
    given = [how for how in (processor.windows, processor.frames) if how is not None]
    if len(given) != 1:
        raise SchemaError(
            f"The processors of {bundle.folder} need one of audio.windows and audio.frames."
        )
    (how,) = given
    wrong = problem(how) if isinstance(how, Windows) else frames_problem(how)
    if wrong is not None:
        raise SchemaError(f"The processors of {bundle.folder} have {wrong}.")
    if AUDIO_ENCODER not in bundle.manifest.graphs:
        raise SchemaError(f"{bundle.folder} prepares sound but has no graph '{AUDIO_ENCODER}'.")
    tokens.require_special(processor.placeholder)
    if processor.before is not None:
        tokens.require_special(processor.before)
    return Hearing(bundle, processor, how)
