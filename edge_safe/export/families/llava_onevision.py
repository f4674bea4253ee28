"""LLaVA-OneVision (``model_type: llava_onevision``): the whole picture, then a grid in its shape.

A picture alone in its turn is cut into tiles; of several each is one padded square. transformers
asks for pictures of the whole conversation; here the turn decides, so that a second turn never
changes what is cached of the first.
"""

from __future__ import annotations

import re
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge_safe.errors import ExportError
from edge_safe.export.families import llava
from edge_safe.export.families.base import Opened, Tower
from edge_safe.export.image_processors import (
    grid_in_any_resolution,
    padded_square,
    read_image_processor,
)
from edge_safe.export.towers.modules import Layers
from edge_safe.export.towers.squares import square_tower
from edge_safe.export.towers.vision_transformer import check_activation, check_vision
from edge_safe.export.vision_language import Pictures, VisionFamily, open_vision
from edge_safe.runtime.image_tokens import AnyResolution, rows_of_tile


def open_checkpoint(folder: Path) -> Opened:
    """Opens a LLaVA-OneVision checkpoint; see ``open_vision``."""
    return open_vision(folder, FAMILY)


def _describe(config: Any, folder: Path) -> Pictures:
    vision = config.vision_config
    check_vision(vision, llava.TOWERS)
    check_activation(config.projector_hidden_act)
    llava.depths(config)
    tokens = (vision.image_size // vision.patch_size) ** 2
    classes = int(vision.model_type == "clip_vision_model")
    if llava.skipped(config) != classes:
        raise ExportError(
            f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}, which "
            f"leaves {tokens + classes - llava.skipped(config)} features of a "
            f"{vision.model_type!r}; a tile needs {isqrt(tokens)} x {isqrt(tokens)}."
        )
    most = re.fullmatch(r"anyres_max_(\d+)", config.vision_aspect_ratio)
    if most is None:
        raise ExportError(
            f"vision_aspect_ratio is {config.vision_aspect_ratio!r}; 'anyres_max_N' is needed."
        )
    processor = read_image_processor(folder)
    pinpoints = [[list(p) for p in part.image_grid_pinpoints] for part in (config, processor)]
    if pinpoints[0] != pinpoints[1]:
        raise ExportError(
            "The image processor's image_grid_pinpoints are not those of config.json, so that "
            "tiles would not fit the features."
        )
    return Pictures(
        pixels=grid_in_any_resolution(processor, vision.image_size),
        layout=AnyResolution(tokens, int(most[1])),
        pixels_of_several=padded_square(processor, vision.image_size),
    )


def _emit(model: Any, layers: Layers, x: str) -> str:
    """LLaVA's features, and the line break behind those of each tile."""
    g, newline = layers.g, model.model.image_newline
    x = llava.emit(model, layers, x)
    tiles = g.op("Shape", [x], scope="line_break", start=0, end=1)
    shape = g.op("Concat", [tiles, g.constant([1, len(newline)])], scope="line_break", axis=0)
    row = g.op("Expand", [layers.stored("line_break", newline), shape], scope="line_break")
    return g.op("Concat", [x, row], scope="line_break", axis=1)


def _features(model: Any, pixel_values: Tensor) -> Tensor:
    """What torch makes of pictures that are several: each one tile with its line break."""
    count = len(pixel_values)
    found = model.get_image_features(
        pixel_values,
        image_sizes=torch.ones(count, 2, dtype=torch.int64),
        batch_num_images=torch.tensor([max(count, 2)]),
        return_dict=True,
    )
    return torch.stack(list(found.pooler_output))


def _tower(model: Any, pictures: Pictures) -> Tower:
    side, width = model.config.vision_config.image_size, model.config.text_config.hidden_size
    return square_tower(model, side, rows_of_tile(pictures.layout), width, _emit, _features)


FAMILY = VisionFamily(_describe, "model.language_model.", _tower)
