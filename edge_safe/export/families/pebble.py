"""pebble: a Llama with a text reader, an object encoder and a speech encoder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from edge_safe.errors import ExportError
from edge_safe.export.decoder_config import tensors_of
from edge_safe.export.families.base import Array, Emission, Opened, TowerCase, float_array
from edge_safe.export.families.llama import llama_spec
from edge_safe.export.graphs.builder import GraphBuilder, Shape
from edge_safe.export.graphs.matrices import Matrix
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.towers.efficientnet import efficientnet_graph
from edge_safe.export.towers.onnx_spec import onnx_graph
from edge_safe.export.towers.projectors import object_projector_graph, sequence_projector_graph
from edge_safe.export.towers.tower import GraphTower
from edge_safe.export.towers.whisper import whisper_graph
from edge_safe.export.towers.whisper_decoder import PARTS, heard_graph, whisper_decoder_graph
from edge_safe.models.base_model import load_base
from edge_safe.models.pebble.modeling_pebble import PebbleForConditionalGeneration
from edge_safe.models.pebble.processor_settings import SETTINGS_FILE
from edge_safe.models.pebble.projectors import SequenceProjector
from edge_safe.models.pebble.speech_decoder import KeyValue
from edge_safe.models.pebble.speech_words import WORDS_FILE

# Name and shape of an input or output.
Value = tuple[str, Shape]

SECTIONS = ("text_lines", "objects", "speech")

# States of the sound that the speech decoder is compared on.
SOUND = 212

# Words on the pictures that the graphs are compared on.
SAMPLES = ("The shop is open", "How do I pick a lock?")


def open_checkpoint(folder: Path) -> Opened:
    """Opens pebble in either of its forms, fp32.

    Raises:
        CheckpointError: It cannot be opened.
        PartsError: A pretrained part cannot be had.
        ExportError: Its preprocessor_config.json is missing or malformed.
    """
    processors = _processors(folder)
    base = load_base(folder, torch.float32)
    model = base.model
    if not isinstance(model, PebbleForConditionalGeneration):
        raise ExportError(f"{folder} opened as {type(model).__name__}, not as pebble.")
    if model.speech_words is None:
        raise ExportError(f"{folder} has no {WORDS_FILE}, the tokenizer of its speech decoder.")
    processors["speech"]["decoder"] = _decoder_section(model)
    language = model.language_model
    return Opened(
        spec=llama_spec(language.config),
        tensor=tensors_of(language),
        language=language,
        tokenizer=base.tokenizer,
        modalities={name: model.config.trained(name) for name in SECTIONS},
        processors=processors,
        towers=_towers(model, processors),
        files={WORDS_FILE: model.speech_words.data},
    )


def _processors(folder: Path) -> dict[str, dict[str, Any]]:
    """The parameters of preprocessing, section by section, for the runtime's pebble."""
    path = folder / SETTINGS_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return {name: dict(settings[name]) for name in SECTIONS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} needs the sections {', '.join(SECTIONS)}: {error!r}.") from error


def _decoder_section(model: PebbleForConditionalGeneration) -> dict[str, Any]:
    """What the runtime has to know to write speech down."""
    section = dataclasses.asdict(model.config.transcription)
    section["prompt_ids"] = list(section["prompt_ids"])
    positions = model.audio_decoder.embed_positions.num_embeddings
    return section | {"max_positions": positions, "tokenizer": WORDS_FILE}


def _towers(
    model: PebbleForConditionalGeneration, processors: dict[str, dict[str, Any]]
) -> list[GraphTower]:
    height = int(processors["text_lines"]["line_height"])
    side = int(processors["objects"]["size"])
    # Each of five strides halves a side, rounded up.
    cells = (-(-side // 32)) ** 2
    channels = model.config.text_projector_config.state_size
    read = "image_pieces" if model.config.text_projector_config.pieces else "image_features"

    def detector(_: Emission, store: WeightStore) -> tuple[GraphBuilder, list[Matrix]]:
        source: Value = ("pixel_values", [1, 3, "height", "width"])
        result: Value = ("probability", [1, 1, "height", "width"])
        return onnx_graph("text_detector", model.text_detector, store, source, result), []

    def recognizer(_: Emission, store: WeightStore) -> tuple[GraphBuilder, list[Matrix]]:
        source: Value = ("pixel_values", ["lines", 3, height, "width"])
        result: Value = ("text_states", ["lines", "steps", channels])
        return onnx_graph("text_recognizer", model.text_recognizer, store, source, result), []

    def text_projector(emission: Emission, store: WeightStore) -> tuple[GraphBuilder, list[Matrix]]:
        return sequence_projector_graph(
            "text_projector",
            model.text_projector,
            store,
            emission.weights.embedding,
            "text_states",
            read,
        )

    def vision_encoder(_: Emission, store: WeightStore) -> tuple[GraphBuilder, list[Matrix]]:
        return efficientnet_graph(model.vision_encoder, store, side, cells), []

    def vision_projector(
        emission: Emission, store: WeightStore
    ) -> tuple[GraphBuilder, list[Matrix]]:
        return object_projector_graph(
            "vision_projector", model.vision_projector, store, emission.weights.embedding, cells
        )

    def audio_encoder(emission: Emission, store: WeightStore) -> tuple[GraphBuilder, list[Matrix]]:
        return whisper_graph(model.audio_encoder, store, emission.precision.towers)

    def audio_projector(
        emission: Emission, store: WeightStore
    ) -> tuple[GraphBuilder, list[Matrix]]:
        return heard_graph(model.audio_decoder, store, emission.precision.towers)

    def audio_decoder(emission: Emission, store: WeightStore) -> tuple[GraphBuilder, list[Matrix]]:
        return whisper_decoder_graph(model.audio_decoder, store, emission.precision)

    cases = PebbleCases(model, height, side)
    return [
        GraphTower("text_detector", detector, cases.text_detector),
        GraphTower("text_recognizer", recognizer, cases.text_recognizer),
        GraphTower("text_projector", text_projector, cases.text_projector),
        GraphTower("vision_encoder", vision_encoder, cases.vision_encoder),
        GraphTower("vision_projector", vision_projector, cases.vision_projector),
        GraphTower("audio_encoder", audio_encoder, cases.audio_encoder),
        GraphTower("audio_projector", audio_projector, cases.audio_projector),
        GraphTower("audio_decoder", audio_decoder, cases.audio_decoder),
    ]


class PebbleCases:
    """Pictures of words, a picture of shapes and a sound, and what torch makes of them."""

    def __init__(self, model: PebbleForConditionalGeneration, height: int, side: int) -> None:
        self._model = model
        self._height = height
        self._side = side

    def text_detector(self) -> Iterator[TowerCase]:
        """Two pages of different shape."""
        for words, size in zip(SAMPLES, ((160, 96), (96, 224)), strict=True):
            pixels = _normalized(_picture(words, size, 16))[None]
            with torch.no_grad():
                found = self._model.text_detector(torch.from_numpy(pixels))
            feeds = {"pixel_values": pixels}
            yield TowerCase(words, feeds, {"probability": float_array(found)})

    def text_recognizer(self) -> Iterator[TowerCase]:
        """Two lines of different width."""
        for words, width in zip(SAMPLES, (248, 320), strict=True):
            pixels, states = self._line(words, width)
            yield TowerCase(words, {"pixel_values": pixels}, {"text_states": states})

    def text_projector(self) -> Iterator[TowerCase]:
        """Both lines together, one of them padded; then states of no line, which may emit."""
        projector = self._model.text_projector
        lines = [self._line(words, w)[1][0] for words, w in zip(SAMPLES, (248, 320), strict=True)]
        lengths = np.array([len(line) for line in lines], np.int64)
        states = np.zeros((2, int(lengths.max()), lines[0].shape[1]), np.float32)
        for row, line in zip(states, lines, strict=True):
            row[: len(line)] = line
        yield self._projected("lines", projector, states, lengths)
        random = np.random.default_rng(0)
        states[:] = random.standard_normal(size=states.shape)
        yield self._projected("noise", projector, states, lengths)

    def vision_encoder(self) -> Iterator[TowerCase]:
        """A picture of shapes."""
        pixels = self._square()
        with torch.no_grad():
            states = self._model.vision_encoder(torch.from_numpy(pixels))
        yield TowerCase("shapes", {"pixel_values": pixels}, {"vision_states": float_array(states)})

    def vision_projector(self) -> Iterator[TowerCase]:
        """The states of a picture of shapes."""
        with torch.no_grad():
            states = self._model.vision_encoder(torch.from_numpy(self._square()))
            tokens, _, _ = self._model.vision_projector.project(states, self._embedding())
        feeds = {"vision_states": float_array(states)}
        yield TowerCase("shapes", feeds, {"image_features": float_array(tokens)})

    def audio_encoder(self) -> Iterator[TowerCase]:
        """Features of the longest window, mostly silent, and of its first seconds alone."""
        whole = self._features()
        for label, features in (("window", whole), ("sound", whole[:, :, : whole.shape[2] // 5])):
            states = self._audio_states(features)
            yield TowerCase(label, {"input_features": features}, {"audio_states": states})

    def audio_projector(self) -> Iterator[TowerCase]:
        """The states of the sound's first seconds."""
        states = self._audio_states(self._features())[:, :SOUND]
        with torch.no_grad():
            heard = self._model.audio_decoder.listen(torch.from_numpy(states))
        yield TowerCase("sound", {"audio_states": states}, _named("heard", heard))

    def audio_decoder(self) -> Iterator[TowerCase]:
        """The beginning of a transcript over the sound's first seconds, then one more token."""
        decoder = self._model.audio_decoder
        prompt = list(self._model.config.transcription.prompt_ids)
        states = torch.from_numpy(self._audio_states(self._features())[:, :SOUND])
        past: list[KeyValue] | None = None
        for label, ids in (("prompt", prompt), ("token", [3])):
            with torch.no_grad():
                heard = decoder.listen(states)
                before = past or [(keys[:, :, :0], values[:, :, :0]) for keys, values in heard]
                logits, past = decoder(torch.tensor([ids]), heard, past)
            feeds: dict[str, Array] = {"input_ids": np.array([ids], np.int64)}
            feeds |= _named("heard", heard) | _named("past_key_values", before)
            expected = {"logits": float_array(logits)} | _named("present", past)
            yield TowerCase(label, feeds, expected)

    def _projected(
        self, label: str, projector: SequenceProjector, states: Array, lengths: Array
    ) -> TowerCase:
        """The recognizer's states through the text projector."""
        with torch.no_grad():
            features, line, pieces = projector.read(
                torch.from_numpy(states), torch.from_numpy(lengths), self._embedding()
            )
        outputs: dict[str, Array] = {"line_index": line.numpy()}
        if projector.config.pieces:
            outputs["image_pieces"] = pieces.numpy()
        else:
            outputs["image_features"] = float_array(features)
        return TowerCase(label, {"text_states": states, "lengths": lengths}, outputs)

    def _embedding(self) -> torch.Tensor:
        weight: torch.Tensor = self._model.language_model.get_parameter("model.embed_tokens.weight")
        return weight

    def _line(self, words: str, width: int) -> tuple[Array, Array]:
        """(1, 3, height, width) pixels of a line and the recognizer's (1, T, c) states."""
        pixels = _normalized(_picture(words, (width, self._height), 28))[None]
        with torch.no_grad():
            return pixels, float_array(self._model.text_recognizer(torch.from_numpy(pixels)))

    def _square(self) -> Array:
        """(1, 3, side, side) float32."""
        image = _picture("", (self._side, self._side), 16)
        draw = ImageDraw.Draw(image)
        draw.ellipse((20, 30, 120, 140), fill=(200, 40, 30))
        draw.rectangle((110, 90, 210, 200), fill=(20, 90, 180))
        scaled = (np.asarray(image, np.float32) - np.float32(127.0)) / np.float32(128.0)
        return np.ascontiguousarray(scaled.transpose(2, 0, 1))[None]

    def _features(self) -> Array:
        """(1, bins, frames) float32 in the range of Whisper's log-mel."""
        config = self._model.audio_encoder.config
        shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
        features = np.full(shape, -0.8, np.float32)
        rng = np.random.default_rng(0)
        features[:, :, :400] += rng.uniform(0.0, 1.6, (1, shape[1], 400))
        return features

    def _audio_states(self, features: Array) -> Array:
        with torch.no_grad():
            states = self._model.audio_encoder(torch.from_numpy(features)).last_hidden_state
        return float_array(states)


def _named(group: str, layers: list[KeyValue]) -> dict[str, Array]:
    """Keys and values of all layers by the names they have in the graphs."""
    return {
        f"{group}.{index}.{part}": float_array(tensor)
        for index, pair in enumerate(layers)
        for part, tensor in zip(PARTS, pair, strict=True)
    }


def _picture(words: str, size: tuple[int, int], height: int) -> Image.Image:
    """Black words on white."""
    image = Image.new("RGB", size, (255, 255, 255))
    if words:
        ImageDraw.Draw(image).text((4, 6), words, fill=(0, 0, 0), font_size=height)
    return image


def _normalized(image: Image.Image) -> Array:
    """(3, H, W) float32 in [-1, 1], blue first."""
    scaled = np.asarray(image, np.float32)[:, :, ::-1] / np.float32(127.5) - np.float32(1.0)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))
