"""Idefics 3 (``model_type: idefics3``): tiles through a SigLIP, patches shuffled into channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from edge_safe.errors import ExportError
from edge_safe.export.families.base import Opened, Tower
from edge_safe.export.image_processors import read_image_processor, tiles_and_whole
from edge_safe.export.towers.modules import Layers
from edge_safe.export.towers.squares import square_tower
from edge_safe.export.towers.vision_transformer import check_vision, shuffled, square_states
from edge_safe.export.vision_language import Pictures, VisionFamily, open_vision
from edge_safe.runtime.image_tokens import TileRows

TOWERS = ("idefics3_vision", "smolvlm_vision")


def open_checkpoint(folder: Path) -> Opened:
    """Opens an Idefics 3 checkpoint; see ``open_vision``."""
    return open_vision(folder, FAMILY)


def _describe(config: Any, folder: Path) -> Pictures:
    vision = config.vision_config
    check_vision(vision, TOWERS)
    side = vision.image_size // vision.patch_size
    if side % config.scale_factor:
        raise ExportError(
            f"A tile has {side} x {side} patches, no multiple of scale_factor "
            f"{config.scale_factor}."
        )
    return Pictures(
        pixels=tiles_and_whole(read_image_processor(folder), vision.image_size),
        layout=TileRows(
            (side // config.scale_factor) ** 2, "<fake_token_around_image>", "<global-img>"
        ),
    )


def _emit(model: Any, layers: Layers, x: str) -> str:
    tower, connector = model.model.vision_model, model.model.connector
    (x,) = square_states(layers, x, tower, [tower.config.num_hidden_layers])
    x = layers.layer_norm(x, tower.post_layernorm, "post_norm")
    side = tower.config.image_size // tower.config.patch_size
    x = shuffled(layers, x, side, tower.config.hidden_size, connector.scale_factor)
    return layers.linear(x, connector.modality_projection.proj, "projector")


def _features(model: Any, pixel_values: Tensor) -> Tensor:
    found: Tensor = model.get_image_features(pixel_values[None], return_dict=True).pooler_output[0]
    return found.view(len(pixel_values), -1, found.shape[-1])


def _tower(model: Any, pictures: Pictures) -> Tower:
    side, width = model.config.vision_config.image_size, model.config.text_config.hidden_size
    return square_tower(model, side, pictures.layout.tokens, width, _emit, _features)


FAMILY = VisionFamily(_describe, "model.text_model.", _tower)
