"""Opens a model that is a text decoder with a vision tower, so that its family file is short.

A family says what it needs from ``config.json`` and the image processor, before a weight is read,
and how its tower becomes a graph; all the rest is the same for every one of them. One that hears
as well brings what an audio-language family has to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from edge_safe.export.audio_language import AudioFamily, audio_processor
from edge_safe.export.decoder_config import (
    TextFamily,
    of_language,
    read_config,
    tensors_of,
    text_family,
)
from edge_safe.export.families.base import Opened, Tower
from edge_safe.export.graphs.spec import DecoderSpec
from edge_safe.export.image_prompts import (
    TEMPLATE_FILE,
    placeholder_of,
    read_tokenizer,
    whole_template,
)
from edge_safe.models.base_model import load_base
from edge_safe.runtime.families.placeholders import ImageProcessor
from edge_safe.runtime.image_steps import Pixels
from edge_safe.runtime.image_tokens import Layout


@dataclass(frozen=True, slots=True)
class Pictures:
    """What a family says of pictures before weights are read.

    Attributes:
        pixels: From a picture to pixel values.
        layout: What stands in a picture's place in the prompt.
        pixels_of_several: The same for a turn with more than one picture, where it differs.
        placeholder: Id of what the template writes there; None for the configuration's
            ``image_token_id``.
        deepstack: Layers of the language model behind which features of pictures are added.
    """

    pixels: Pixels
    layout: Layout
    pixels_of_several: Pixels | None = None
    placeholder: int | None = None
    deepstack: int = 0


@dataclass(frozen=True, slots=True)
class VisionFamily:
    """One vision-language family.

    Attributes:
        describe: Reads the configuration and the checkpoint's folder; refuses with an
            ``ExportError`` what cannot be exported.
        language: Where the text model's weights are, ``model.language_model.`` say.
        tower: Makes ``vision_encoder`` of the torch model, ``towers.squares`` say.
        adapt: What the language model does otherwise than alone, ``bidirectional`` say.
        one_turn: The chat template for checkpoints without one, of a family whose prompts have
            no turns and whose processor adds no first token; None for all others.
        text: Its language model, where that is none of the text-only families.
        audio: What it needs for sound, where it hears as well.
    """

    describe: Callable[[Any, Path], Pictures]
    language: str
    tower: Callable[[Any, Pictures], Tower]
    adapt: Callable[[DecoderSpec], DecoderSpec] = lambda spec: spec
    one_turn: str | None = None
    text: TextFamily | None = None
    audio: AudioFamily | None = None


def open_vision(folder: Path, family: VisionFamily) -> Opened:
    """Opens a vision-language checkpoint in fp32.

    Raises:
        CheckpointError: It cannot be opened.
        ExportError: It uses something that the graphs or the runtime cannot express.
    """
    config = read_config(folder)
    text = family.text or text_family(config.text_config.model_type)
    spec = replace(text.spec_of(config.text_config), tied=bool(config.tie_word_embeddings))
    pictures = family.describe(config, folder)
    spec = replace(spec, deepstack=pictures.deepstack)
    windows = None if family.audio is None else family.audio.describe(config, folder)
    tokenizer = read_tokenizer(folder)
    token = config.image_token_id if pictures.placeholder is None else pictures.placeholder
    processor = ImageProcessor(
        placeholder=placeholder_of(tokenizer, token, pictures.layout),
        pixels=pictures.pixels,
        layout=pictures.layout,
        pixels_of_several=pictures.pixels_of_several,
    )
    template = whole_template(folder, tokenizer, one_turn=family.one_turn)
    processors = {"image": msgspec.to_builtins(processor)}
    if family.audio is not None and windows is not None:
        sound = audio_processor(folder, family.audio, tokenizer, config.audio_token_id, windows)
        processors["audio"] = msgspec.to_builtins(sound)
        template = whole_template(folder, tokenizer, sound.part)
    model = load_base(folder, torch.float32).model
    tensor = of_language(tensors_of(model), family.language)
    towers = [family.tower(model, pictures)]
    if family.audio is not None and windows is not None:
        towers.append(family.audio.tower(model, windows))
    return Opened(
        spec=family.adapt(spec),
        tensor=text.tensors(tensor, spec),
        language=model,
        tokenizer=tokenizer,
        modalities=dict.fromkeys(processors, True),
        processors=processors,
        towers=towers,
        files={TEMPLATE_FILE: template.encode()},
    )
