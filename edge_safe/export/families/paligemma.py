"""PaliGemma (``model_type: paligemma``): a square through SigLIP, and a prompt that sees itself.

Pictures stand first, then the first token, the words and a line break. All of a prompt's positions
see each other; the answer sees what stands before it. There are no turns.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from edge_safe.errors import ExportError
from edge_safe.export.families.base import Opened, Tower
from edge_safe.export.graphs.spec import DecoderSpec
from edge_safe.export.image_processors import one_square, read_image_processor
from edge_safe.export.towers.modules import Layers
from edge_safe.export.towers.squares import square_tower
from edge_safe.export.towers.vision_transformer import check_vision, square_states
from edge_safe.export.vision_language import Pictures, VisionFamily, open_vision
from edge_safe.runtime.image_tokens import Plain

TOWERS = ("siglip_vision_model",)

# What PaliGemmaProcessor writes, for checkpoints without a chat template.
TEMPLATE = (
    "{% if messages | length != 1 or messages[0]['role'] != 'user' %}"
    "{{ raise_exception('PaliGemma answers one prompt: no turns, no system text') }}{% endif %}"
    "{% set parts = messages[0]['content'] %}"
    "{% for part in parts if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{{ bos_token }}"
    "{% for part in parts if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '\\n' }}"
)


def open_checkpoint(folder: Path) -> Opened:
    """Opens a PaliGemma checkpoint; see ``open_vision``."""
    return open_vision(folder, FAMILY)


def _describe(config: Any, folder: Path) -> Pictures:
    vision, width = config.vision_config, config.text_config.hidden_size
    check_vision(vision, TOWERS)
    if config.projection_dim != width:
        raise ExportError(
            f"projection_dim is {config.projection_dim}; the language model's width is {width}."
        )
    return Pictures(
        pixels=one_square(read_image_processor(folder), vision.image_size),
        layout=Plain((vision.image_size // vision.patch_size) ** 2),
    )


def _sees_its_prompt(spec: DecoderSpec) -> DecoderSpec:
    """PaliGemma counts its positions from 1."""
    ropes = tuple(replace(rope, first=1) for rope in spec.ropes)
    return replace(spec, bidirectional="prompt", ropes=ropes)


def _emit(model: Any, layers: Layers, x: str) -> str:
    tower = model.model.vision_tower
    (x,) = square_states(layers, x, tower, [tower.config.num_hidden_layers])
    x = layers.layer_norm(x, tower.post_layernorm, "post_norm")
    return layers.linear(x, model.model.multi_modal_projector.linear, "projector")


def _features(model: Any, pixel_values: Tensor) -> Tensor:
    found: Tensor = model.get_image_features(pixel_values, return_dict=True).pooler_output
    return found


def _tower(model: Any, pictures: Pictures) -> Tower:
    side, width = model.config.vision_config.image_size, model.config.text_config.hidden_size
    return square_tower(model, side, pictures.layout.tokens, width, _emit, _features)


FAMILY = VisionFamily(
    _describe, "model.language_model.", _tower, adapt=_sees_its_prompt, one_turn=TEMPLATE
)
