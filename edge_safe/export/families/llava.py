"""LLaVA 1.5 and its like (``model_type: llava``): a square through CLIP or SigLIP and an MLP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge_safe.errors import ExportError
from edge_safe.export.families.base import Opened, Tower
from edge_safe.export.image_processors import one_square, read_image_processor
from edge_safe.export.towers.modules import Layers
from edge_safe.export.towers.squares import square_tower
from edge_safe.export.towers.vision_transformer import (
    check_activation,
    check_vision,
    square_states,
)
from edge_safe.export.vision_language import Pictures, VisionFamily, open_vision
from edge_safe.runtime.image_tokens import Plain

TOWERS = ("clip_vision_model", "siglip_vision_model")


def open_checkpoint(folder: Path) -> Opened:
    """Opens a LLaVA checkpoint; see ``open_vision``."""
    return open_vision(folder, FAMILY)


def _describe(config: Any, folder: Path) -> Pictures:
    vision = config.vision_config
    check_vision(vision, TOWERS)
    check_activation(config.projector_hidden_act)
    depths(config)
    states = (vision.image_size // vision.patch_size) ** 2
    states += vision.model_type == "clip_vision_model"
    return Pictures(
        pixels=one_square(read_image_processor(folder), vision.image_size),
        layout=Plain(states - skipped(config)),
    )


def depths(config: Any) -> list[int]:
    """Numbers of layers behind which states are taken; negative indices count from the end.

    Raises:
        ExportError: There are not so many layers.
    """
    wanted = config.vision_feature_layer
    count = config.vision_config.num_hidden_layers + 1
    indices = [wanted] if isinstance(wanted, int) else list(wanted)
    if not indices or not all(-count <= index < count for index in indices):
        raise ExportError(
            f"vision_feature_layer is {wanted}; the vision tower has {count - 1} layers."
        )
    return [index % count for index in indices]


def skipped(config: Any) -> int:
    """How many states are left out in front: the class embedding's, or none."""
    return int(config.vision_feature_select_strategy == "default")


def emit(model: Any, layers: Layers, x: str) -> str:
    """Tower and projector, (tiles, 3, side, side) -> (tiles, tokens, d)."""
    config, g = model.config, layers.g
    states = square_states(layers, x, model.model.vision_tower, depths(config))
    x = states[0] if len(states) == 1 else g.op("Concat", states, scope="states", axis=-1)
    if skipped(config):
        ends = [g.constant([1]), g.constant([2**31 - 1]), g.constant([1])]
        x = g.op("Slice", [x, *ends], scope="states")
    projector = model.model.multi_modal_projector
    x = layers.linear(x, projector.linear_1, "projector.up")
    x = layers.activation(x, config.projector_hidden_act, "projector.up")
    return layers.linear(x, projector.linear_2, "projector.down")


def _features(model: Any, pixel_values: Tensor) -> Tensor:
    return torch.stack(list(model.get_image_features(pixel_values, return_dict=True).pooler_output))


def _tower(model: Any, pictures: Pictures) -> Tower:
    side, width = model.config.vision_config.image_size, model.config.text_config.hidden_size
    return square_tower(model, side, pictures.layout.tokens, width, emit, _features)


FAMILY = VisionFamily(_describe, "model.language_model.", _tower)
