"""Opens a model that is a text decoder with a vision tower, so that its family file is short.

A family says what it needs from ``config.json`` and the image processor, before a weight is read,
and how its tower becomes a graph; all the rest is the same for every one of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from edge_safe.errors import ExportError
from edge_safe.export.decoder_config import read_config, tensors_of, text_family
from edge_safe.export.families.base import Emission, Opened, TowerCase, float_array
from edge_safe.export.graphs.builder import FLOAT, GraphBuilder
from edge_safe.export.graphs.matrices import Matrix
from edge_safe.export.graphs.spec import FloatArray, TensorSource
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.towers.modules import Layers
from edge_safe.export.towers.tower import GraphTower
from edge_safe.models.base_model import load_base
from edge_safe.models.prompts import template_parts
from edge_safe.runtime.families.placeholders import VISION_ENCODER, ImageProcessor
from edge_safe.runtime.image_steps import Pixels
from edge_safe.runtime.image_tokens import Layout, markers

SOURCE, RESULT = "pixel_values", "image_features"

TEMPLATE_FILE = "chat_template.jinja"
# Where checkpoints of before 2025 have it.
OLD_TEMPLATE_FILE = "chat_template.json"

# Tiles of the inputs that the graph is compared on.
TILES = (1, 3)

EmitTower = Callable[[Any, Layers, str], str]


@dataclass(frozen=True, slots=True)
class Pictures:
    """What a family says of pictures before weights are read.

    Attributes:
        pixels: From a picture to pixel values.
        layout: What stands in a picture's place in the prompt.
        side: Height and width of a tile.
        image_token_id: Id of the placeholder.
    """

    pixels: Pixels
    layout: Layout
    side: int
    image_token_id: int


@dataclass(frozen=True, slots=True)
class VisionFamily:
    """One vision-language family.

    Attributes:
        describe: Reads the configuration and the checkpoint's folder; refuses with an
            ``ExportError`` what cannot be exported.
        language: Where the text model's weights are, ``model.language_model.`` say.
        emit: Emits the nodes from pixel values (tiles, 3, side, side) to features
            (tiles, tokens, d), given the torch model, the graph and the input's name; returns the
            output's name.
        features: What torch makes of pixel values, (tiles, tokens, d).
    """

    describe: Callable[[Any, Path], Pictures]
    language: str
    emit: EmitTower
    features: Callable[[Any, Tensor], Tensor]


def open_vision(folder: Path, family: VisionFamily) -> Opened:
    """Opens a vision-language checkpoint in fp32.

    Raises:
        CheckpointError: It cannot be opened.
        ExportError: It uses something that the graphs or the runtime cannot express.
    """
    config = read_config(folder)
    text = text_family(config.text_config.model_type)
    spec = replace(text.spec_of(config.text_config), tied=bool(config.tie_word_embeddings))
    pictures = family.describe(config, folder)
    base = load_base(folder, torch.float32)
    placeholder = _check_tokens(base.tokenizer, pictures)
    template = _chat_template(folder, base.tokenizer)
    processor = ImageProcessor(
        placeholder=placeholder, pixels=pictures.pixels, layout=pictures.layout
    )
    tensor = _of_language(tensors_of(base.model), family.language)
    return Opened(
        spec=spec,
        tensor=text.tensors(tensor, spec),
        language=base.model,
        tokenizer=base.tokenizer,
        modalities={"image": True},
        processors={"image": msgspec.to_builtins(processor)},
        towers=[_tower(base.model, family, pictures, spec.hidden_size)],
        files={TEMPLATE_FILE: template.encode()},
    )


def _of_language(tensor: TensorSource, prefix: str) -> TensorSource:
    """The text model's weights by the names they have in a text-only checkpoint."""

    def named(name: str) -> FloatArray:
        head, _, rest = name.partition(".")
        return tensor(prefix + rest if head == "model" else name)

    return named


def _tower(model: Any, family: VisionFamily, pictures: Pictures, width: int) -> GraphTower:
    side, tokens = pictures.side, pictures.layout.tokens

    def build(emission: Emission, store: WeightStore) -> tuple[GraphBuilder, list[Matrix]]:
        g = GraphBuilder(VISION_ENCODER)
        x = g.input(SOURCE, FLOAT, ["tiles", 3, side, side])
        g.output(RESULT, FLOAT, ["tiles", tokens, width])
        layers = Layers(g, store, emission.precision.towers)
        features = family.emit(model, layers, x)
        g.op("Identity", [features], scope="features", outputs=[RESULT])
        return g, layers.matrices

    def cases() -> Iterator[TowerCase]:
        random = np.random.default_rng(0)
        for tiles in TILES:
            values = random.uniform(-1.8, 1.8, (tiles, 3, side, side)).astype(np.float32)
            with torch.no_grad():
                expected = family.features(model, torch.from_numpy(values))
            yield TowerCase(f"{tiles} tiles", {SOURCE: values}, {RESULT: float_array(expected)})

    return GraphTower(VISION_ENCODER, build, cases)


def _check_tokens(tokenizer: PreTrainedTokenizerBase, pictures: Pictures) -> str:
    """The placeholder, after a look at it and the markers.

    Raises:
        ExportError: Text could produce one, or it swallows what stands beside it.
    """
    added = tokenizer.added_tokens_decoder
    token = added.get(pictures.image_token_id)
    if token is None or not token.special:
        raise ExportError(
            f"The placeholder of pictures (id {pictures.image_token_id}) is no special token of "
            "the tokenizer, so a user's text could produce it. Mark it as special in "
            "tokenizer.json."
        )
    if token.lstrip or token.rstrip:
        raise ExportError(
            f"The placeholder {token.content!r} swallows white space beside it (lstrip, rstrip), "
            "which prompts with pictures cannot follow."
        )
    ordinary = {entry.content for entry in added.values() if not entry.special}
    found = ordinary.intersection(markers(pictures.layout))
    if found:
        raise ExportError(
            f"The markers {sorted(found)} are tokens that are not special, so a user's text could "
            "produce them. Mark them as special in tokenizer.json."
        )
    return str(token.content)


def _chat_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template with the token that the processor puts in front of a prompt.

    The processor lets the tokenizer add its first token (``<s>``) unless the template wrote it;
    the runtime tokenizes without additions, so that the template has to write it.

    Raises:
        ExportError: There is no template, or the tokenizer adds something behind the text.
    """
    old = folder / OLD_TEMPLATE_FILE
    if tokenizer.chat_template is None and old.is_file():
        try:
            tokenizer.chat_template = json.loads(old.read_text(encoding="utf-8"))["chat_template"]
        except (ValueError, KeyError, TypeError) as error:
            raise ExportError(f"{old} holds no chat_template: {error!r}.") from error
    if not isinstance(tokenizer.chat_template, str):
        raise ExportError(
            f"{folder} has no chat template, so there is no place for a safety token. "
            f"Put {TEMPLATE_FILE} beside the model."
        )
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    first, behind = whole[: len(whole) - len(plain)], whole[len(whole) - len(plain) :]
    if behind != plain:
        raise ExportError("The tokenizer adds tokens behind a text, which no answer could follow.")
    start = "".join(tokenizer.convert_ids_to_tokens(first))
    probe: Any = [{"role": "user", "content": template_parts("a")}]
    rendered = tokenizer.apply_chat_template(probe, tokenize=False)
    if start and not str(rendered).startswith(start):
        tokenizer.chat_template = f"{{{{ {json.dumps(start)} }}}}{tokenizer.chat_template}"
    return tokenizer.chat_template
