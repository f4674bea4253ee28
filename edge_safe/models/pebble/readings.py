"""What a pebble reads in training pictures and hears in training recordings, as word-piece ids.

Its projectors give rows of the tied embedding and its speech decoder gives words, so a picture or a
recording stands in a prompt as a few ids, and everything that trains on ids trains on media too.
One medium a file is kept on disk, so that a killed run goes on. Of a picture these are the states
of the towers, which are never trained: another state of the projectors reads them anew at little
cost. Of a recording it is what was heard, since writing it down takes longest; a decoder trained
otherwise has files of its own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel

from edge_safe.errors import DataError, MediaError
from edge_safe.models.data import Example
from edge_safe.models.media import Medium, Picture, Recording
from edge_safe.models.pebble.modeling_pebble import PebbleForConditionalGeneration
from edge_safe.models.pebble.processing_pebble import PebbleProcessor, object_pixels
from edge_safe.models.progress import Progress
from edge_safe.rendering.fonts import ANY_FONT, FontChoice
from edge_safe.rendering.pictures import TEXTLESS_KINDS, render_request, render_textless
from edge_safe.rendering.sound import SPEECHLESS_SOUNDS, add_noise, speechless
from edge_safe.rendering.speech import speak

Ids = tuple[int, ...]

# Stands alone in the file of a picture that the processor refuses.
_REFUSED = "refused"
LONGEST_SOUND = 29  # seconds; longer ones are cut


class Readings:
    """Readings of one state of a pebble.

    Args:
        model: Its towers and projectors are run, its language model is not.
        processor: Prepares pictures and sounds for it.
        cache: Folder of the files.
        fonts: Which fonts pictures are drawn with.
    """

    def __init__(
        self,
        model: PebbleForConditionalGeneration,
        processor: PebbleProcessor,
        cache: Path,
        fonts: FontChoice = ANY_FONT,
    ) -> None:
        self._model = model
        self._processor = processor
        self._cache = cache
        self._fonts = fonts
        self._known: dict[Medium, Ids | None] = {}
        self._ear = _fingerprint(model)

    def compute(self, media: Sequence[Medium], progress: Progress) -> None:
        """Looks at and listens to all media that have no file yet.

        Raises:
            PartsError: A voice's synthesizer is not installed.
        """
        self._cache.mkdir(parents=True, exist_ok=True)
        missing = [m for m in dict.fromkeys(media) if not self._path(m).exists()]
        for number, medium in enumerate(missing, 1):
            path = self._path(medium)
            temporary = path.with_suffix(f".{os.getpid()}.npz")
            np.savez(temporary, **self._states(medium))
            temporary.replace(path)
            progress("readings", number, len(missing))

    def __call__(self, medium: Medium) -> Ids:
        """Ids of one medium; empty where nothing was read or heard.

        Raises:
            DataError: It was not looked at or listened to, or the model does not take it.
        """
        ids = self._read(medium)
        if ids is None:
            raise DataError(f"The model does not take {medium}.")
        return ids

    def takes(self, example: Example) -> bool:
        """Whether the model takes all media of an example.

        It refuses a picture with more lines of text than it reads, for which the gate can never be
        asked.

        Raises:
            DataError: One of them was not looked at or listened to.
        """
        media = (message.medium for prompt in example.prompts for message in prompt)
        return all(medium is None or self._read(medium) is not None for medium in media)

    def _read(self, medium: Medium) -> Ids | None:
        if medium not in self._known:
            path = self._path(medium)
            if not path.exists():
                raise DataError(f"{path} is missing: what a {medium} holds was not read.")
            with np.load(path) as stored:
                states = {name: torch.from_numpy(stored[name]) for name in stored.files}
            with torch.no_grad():
                self._known[medium] = None if _REFUSED in states else self._ids(states)
        return self._known[medium]

    def _path(self, medium: Medium) -> Path:
        key = f"{medium!r} {self._fonts!r} {self._processor.settings!r}"
        if isinstance(medium, Recording):
            key += f" {self._ear}"
        return self._cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"

    def _states(self, medium: Medium) -> dict[str, Any]:
        """What was heard, or the states of every tower that looks at a picture."""
        model = self._model
        with torch.no_grad():
            if isinstance(medium, Recording):
                data = self._processor.log_mel([_sound(medium)])
                written = model.write_down(data["input_features"], data["audio_lengths"])[0]
                return {"written": np.array(written, np.int64)}
            picture = _draw(medium, self._fonts).convert("RGB")
            pixels = object_pixels([picture], self._processor.settings.objects)
            found = {"vision_states": _half(model.vision_encoder(pixels))}
            try:
                lines = self._processor.text_lines([picture], model.text_detector)
            except MediaError:
                return {_REFUSED: np.array(True)}
            if len(lines["line_widths"]):
                states, counts = model.read_lines(lines["line_pixel_values"], lines["line_widths"])
                found["text_states"] = _half(states)
                found["text_lengths"] = counts.numpy()
            return found

    def _ids(self, states: Mapping[str, Tensor]) -> Ids:
        """What the model makes of a file's contents, in the order of the prompt."""
        model, ids = self._model, []
        if "written" in states:
            ids += model.typed_words(states["written"].tolist())
        if "text_states" in states:
            for line in model.read_states(states["text_states"].float(), states["text_lengths"]):
                ids += line
        if "vision_states" in states and model.config.trained("objects"):
            ids += model.name_states(states["vision_states"].float())
        return tuple(ids)


def read_media(
    model: PreTrainedModel,
    source: Path,
    examples: Iterable[Example],
    fonts: FontChoice,
    cache: Path,
    accelerator: Accelerator,
    progress: Progress,
) -> Readings | None:
    """Reads the pictures and hears the recordings that examples hold.

    Args:
        model: Reads and hears, if it is a pebble.
        source: The folder it was opened from.
        examples: Whose media.
        fonts: Which fonts pictures are drawn with.
        cache: Folder of the readings.
        accelerator: All its processes call this.
        progress: Told how far it is.

    Returns:
        The readings; None where there are no media or the model is none that reads.
    """
    media = [
        message.medium
        for example in examples
        for prompt in example.prompts
        for message in prompt
        if message.medium is not None
    ]
    if not media or not isinstance(model, PebbleForConditionalGeneration):
        return None
    processor = PebbleProcessor.from_pretrained(source)
    readings = None
    # The first process reads; the others then find everything in the file.
    for turn in (True, False):
        if accelerator.is_main_process == turn:
            readings = Readings(model, processor, cache, fonts)
            readings.compute(media, progress)
        accelerator.wait_for_everyone()
    return readings


def _fingerprint(model: PebbleForConditionalGeneration) -> str:
    """Tells speech decoders apart by what was trained of them and how they write down."""
    digest = hashlib.sha256(repr(model.config.transcription).encode())
    for name, weight in sorted(model.audio_decoder.trained_weights().items()):
        digest.update(name.encode())
        # At the precision that they are stored with, so that writing and reading change nothing.
        digest.update(weight.detach().half().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _half(states: Tensor) -> NDArray[np.float16]:
    array: NDArray[np.float16] = states.half().cpu().numpy()
    return array


def _draw(medium: Picture, fonts: FontChoice) -> Image:
    if medium.style in TEXTLESS_KINDS:
        return render_textless(medium.style, medium.seed)
    return render_request(medium.text, medium.style, medium.seed, fonts=fonts).picture


def _sound(medium: Recording) -> tuple[NDArray[np.float32], int]:
    if medium.voice in SPEECHLESS_SOUNDS:
        return speechless(medium.voice, 1.0 + medium.seed % 5, medium.seed)
    sound, rate = speak(medium.text, medium.voice, 0, medium.speed, medium.pitch)
    if medium.snr_db is not None:
        sound = add_noise(sound, rate, medium.snr_db, medium.seed)
    return sound[: LONGEST_SOUND * rate], rate
