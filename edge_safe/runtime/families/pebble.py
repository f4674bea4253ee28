"""pebble: lines of text and objects in pictures, and speech.

A picture gives the word-piece embeddings of its text lines, then its object tokens; a sound is
written down and gives those of the words. A tower whose projector was not trained is left out of
pictures, and a bundle that cannot hear says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_safe.errors import MediaError, SchemaError
from edge_safe.runtime.audio_io import read_audio
from edge_safe.runtime.bundle import Bundle
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.families.base import Media, Prepared
from edge_safe.runtime.image_io import read_image
from edge_safe.runtime.log_mel import log_mel
from edge_safe.runtime.media import AudioInput, ImageInput, Kind
from edge_safe.runtime.session import Array
from edge_safe.runtime.speech_decoder import SpeechDecoder, Transcription
from edge_safe.runtime.text_lines import (
    TextLines,
    cut_line,
    detector_input,
    find_boxes,
    line_pixels,
)
from edge_safe.runtime.tokens import Tokens

if TYPE_CHECKING:
    from PIL.Image import Image

FloatArray = NDArray[np.float32]

SILENCE = 0.5
"""Seconds of silence that the speech encoder's window has behind the sound, where there is room."""


class Objects(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Section ``objects``: (pixel - mean) / scale of the picture, squeezed to size x size."""

    size: int
    mean: float
    scale: float


class Speech(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Section ``speech``: Whisper's log-mel features.

    Attributes:
        sampling_rate: Hz that the encoder hears.
        feature_size: Mel bands.
        hop_length: Samples between two frames.
        n_fft: Samples of one frame.
        chunk_length: Seconds of the encoder's longest window.
        samples_per_state: Samples behind one of the encoder's states.
        decoder: How the states are written down.
    """

    sampling_rate: int
    feature_size: int
    hop_length: int
    n_fft: int
    chunk_length: int
    samples_per_state: int
    decoder: Transcription


class Processors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The manifest's ``processors``; a section is absent where its tower is."""

    text_lines: TextLines | None = None
    objects: Objects | None = None
    speech: Speech | None = None


class Pebble:
    """Embeds media for pebble. Shared between threads."""

    def __init__(self, bundle: Bundle, tokens: Tokens, processors: Processors) -> None:
        self.placeholders: Mapping[str, str] = {}
        self._bundle = bundle
        self._tokens = tokens
        self._processors = processors
        self._width = bundle.manifest.model.hidden_size

    def variant(self, kind: Kind, images: int) -> str:
        """See ``Towers.variant``: every medium is encoded by itself."""
        if kind == "image":
            self._require("text_lines", "objects")
        else:
            self._require("speech")
        return ""

    def image(self, source: ImageInput, variant: str) -> Prepared:
        """See ``Towers.image``."""
        from PIL.Image import fromarray

        pixels = read_image(source)
        image = fromarray(pixels)
        lines, objects = self._processors.text_lines, self._processors.objects
        towers: list[Callable[[Deadline | None], FloatArray]] = []
        if lines is not None:
            towers.append(partial(self._read, image, detector_input(image, lines), lines))
        if objects is not None:
            towers.append(partial(self._look, image_square(pixels, objects)))

        def encode(deadline: Deadline | None) -> Media:
            features = [tower(deadline) for tower in towers]
            return Media(features, image_tokens=sum(map(len, features)))

        return Prepared(0, encode)

    def sound(self, source: AudioInput, variant: str) -> Prepared:
        """See ``Towers.sound``."""
        config = self._processors.speech
        if config is None:
            raise MediaError("This bundle has no speech tower.")
        samples = read_audio(source)
        length = -(-len(samples) // config.samples_per_state)
        features = log_mel(
            samples,
            seconds=window_seconds(length, config),
            sample_rate=config.sampling_rate,
            bins=config.feature_size,
            window=config.n_fft,
            hop=config.hop_length,
        )

        def encode(deadline: Deadline | None) -> Media:
            heard = self._hear(features, length, config, deadline)
            return Media([heard], audio_tokens=len(heard))

        return Prepared(0, encode)

    def _require(self, *sections: str) -> None:
        """Makes sure that at least one of these towers may be used.

        Raises:
            MediaError: None of them may.
        """
        if all(getattr(self._processors, section) is None for section in sections):
            kind = "speech decoder" if "speech" in sections else "picture projector"
            what = "sound" if "speech" in sections else "pictures"
            raise MediaError(
                f"This bundle's {kind} has not been trained, so the gate cannot judge "
                f"{what}. Use a bundle where it is, or ask in words."
            )

    def _look(self, square: FloatArray, deadline: Deadline | None) -> FloatArray:
        """(n, d) embeddings of the objects of a picture."""
        states = self._run("vision_encoder", deadline, pixel_values=square)["vision_states"]
        found = self._run("vision_projector", deadline, vision_states=states)
        return np.asarray(found["image_features"], np.float32)

    def _read(
        self, image: Image, page: FloatArray, config: TextLines, deadline: Deadline | None
    ) -> FloatArray:
        """(n, d) embeddings of the word pieces of all lines of a picture."""
        found = self._run("text_detector", deadline, pixel_values=page)["probability"]
        boxes = find_boxes(found[0, 0], image.size, config)
        if not boxes:
            return np.zeros((0, self._width), np.float32)
        # One line at a time: the recognizer looks along the whole width, padding would show.
        # Cutting the next one meanwhile gains nothing where the recognizer has all cores.
        lines = [
            self._run("text_recognizer", deadline, pixel_values=line_pixels(line, config))[
                "text_states"
            ][0]
            for line in (cut_line(image, box, config) for box in boxes)
        ]
        lengths = np.array([len(line) for line in lines], np.int64)
        states = np.zeros((len(lines), int(lengths.max()), lines[0].shape[1]), np.float32)
        for row, line in zip(states, lines, strict=True):
            row[: len(line)] = line
        read = self._run("text_projector", deadline, text_states=states, lengths=lengths)
        if "image_features" in read:
            return np.asarray(read["image_features"], np.float32)
        # Line by line, as a line is what was spelled in one go.
        pieces, line = read["image_pieces"], read["line_index"]
        return np.concatenate(
            [
                self._embed(self._tokens.respelled(pieces[line == number].tolist()), deadline)
                for number in range(len(lines))
            ]
        )

    def _hear(
        self, features: FloatArray, length: int, config: Speech, deadline: Deadline | None
    ) -> FloatArray:
        """(m, d) embeddings of what was said.

        Args:
            features: Log-mel features.
            length: States of the sound itself.
            config: The parameters.
            deadline: Ends it early.
        """
        states = self._run("audio_encoder", deadline, input_features=features)["audio_states"]
        decoder = SpeechDecoder(
            self._bundle.session("audio_projector"),
            self._bundle.session("audio_decoder"),
            config.decoder,
        )
        # The silence behind the sound is not attended to.
        own = np.ascontiguousarray(states[:, :length])
        seconds = own.shape[1] * config.samples_per_state / config.sampling_rate
        written = decoder.write_down(own, seconds, deadline)
        return self._embed(self._tokens.typed(self._speech_words.decode(written).strip()), deadline)

    @cached_property
    def _speech_words(self) -> Tokens:
        """The speech decoder's vocabulary, read on first use; text is made of it, never prompts."""
        if self._processors.speech is None:
            raise MediaError("This bundle has no speech tower.")
        return Tokens(self._bundle.read(self._processors.speech.decoder.tokenizer), ())

    def _embed(self, ids: NDArray[np.int64], deadline: Deadline | None) -> FloatArray:
        """(n,) ids -> (n, d)."""
        if not len(ids):
            return np.zeros((0, self._width), np.float32)
        found = self._run("embed_tokens", deadline, input_ids=ids[None])
        return np.asarray(found["inputs_embeds"][0], np.float32)

    def _run(
        self, graph: str, deadline: Deadline | None, **feeds: NDArray[np.generic]
    ) -> dict[str, Array]:
        """Runs a tower's graph, which is opened on first use, unless the time is over.

        Raises:
            GateError: It is.
        """
        if deadline is not None:
            deadline.check()
        abort = None if deadline is None else deadline.abort
        return self._bundle.session(graph).run(feeds, abort)


def window_seconds(states: int, config: Speech) -> int:
    """Whole seconds that a sound and the silence behind it fill, at most the longest window."""
    a_second = config.sampling_rate // config.samples_per_state
    return min(config.chunk_length, math.ceil(states / a_second + SILENCE))


def image_square(pixels: NDArray[np.uint8], config: Objects) -> FloatArray:
    """(H, W, 3) uint8 into (1, 3, size, size) float32, red first."""
    from PIL.Image import Resampling, fromarray

    small = fromarray(pixels).resize((config.size, config.size), Resampling.BICUBIC)
    scaled = (np.asarray(small, np.float32) - np.float32(config.mean)) / np.float32(config.scale)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))[None]


def open_towers(bundle: Bundle, tokens: Tokens, untrained_towers: bool) -> Pebble:
    """Reads the processors' parameters and leaves out what was not trained.

    Raises:
        SchemaError: The parameters do not fit.
    """
    manifest = bundle.manifest
    try:
        processors = msgspec.convert(manifest.processors, Processors)
    except msgspec.ValidationError as error:
        raise SchemaError(
            f"The processors of {bundle.folder} do not fit pebble: {error}."
        ) from error
    usable = {
        name: getattr(processors, name)
        for name in Processors.__struct_fields__
        if name in manifest.modalities and (manifest.modalities[name].trained or untrained_towers)
    }
    return Pebble(bundle, tokens, Processors(**usable))
