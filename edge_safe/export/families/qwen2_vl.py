"""Qwen2-VL (``model_type: qwen2_vl``): patches of pictures of any size, M-RoPE over Qwen 2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_safe.errors import ExportError
from edge_safe.export.decoder_config import TextFamily
from edge_safe.export.families.base import Opened, Tower
from edge_safe.export.families.qwen2 import qwen2_spec
from edge_safe.export.graphs.spec import DecoderSpec, Rope
from edge_safe.export.image_processors import patches_of_any_size, read_image_processor
from edge_safe.export.towers.modules import Layers
from edge_safe.export.towers.patches import (
    Places,
    attend,
    check_patches,
    embed_patches,
    merged,
    patch_tower,
    turn_patches,
)
from edge_safe.export.towers.vision_transformer import check_activation
from edge_safe.export.vision_language import Pictures, VisionFamily, open_vision
from edge_safe.runtime.image_tokens import Grid

AXES = 3
# Frequencies for time, row and column where the configuration says nothing.
SECTIONS = (16, 24, 24)


def open_checkpoint(folder: Path) -> Opened:
    """Opens a Qwen2-VL checkpoint; see ``open_vision``."""
    return open_vision(folder, FAMILY)


def mrope_spec(config: Any) -> DecoderSpec:
    """Describes the language model of Qwen2-VL and Qwen2.5-VL.

    Raises:
        ExportError: It uses something that the graphs cannot express.
    """
    spec = qwen2_spec(config)
    rope = spec.ropes[0]
    axes = [
        axis
        for axis, count in enumerate(mrope_sections(config, rope, SECTIONS))
        for _ in range(count)
    ]
    return replace(spec, ropes=(replace(rope, axes=tuple(axes)),))


def mrope_sections(config: Any, rope: Rope, default: tuple[int, ...]) -> list[int]:
    """How many frequencies follow time, row and column.

    Raises:
        ExportError: They are not all of them.
    """
    sections = list(config.rope_parameters.get("mrope_section") or default)
    count = len(rope.inverse_frequencies)
    if len(sections) != AXES or sum(sections) != count or min(sections) < 0:
        raise ExportError(
            f"mrope_section is {sections}; it has to be three numbers whose sum is {count}, half "
            "the width of a head."
        )
    return sections


def _describe(config: Any, folder: Path) -> Pictures:
    vision = config.vision_config
    check_patches(vision, "qwen2_vl_vision", vision.embed_dim, config.text_config.hidden_size)
    check_activation(vision.hidden_act)
    pixels = patches_of_any_size(read_image_processor(folder), vision)
    return Pictures(pixels=pixels, layout=Grid())


def _emit(model: Any, layers: Layers, x: str, places: Places) -> tuple[str, list[str]]:
    tower, config = model.model.visual, model.config.vision_config
    x = embed_patches(layers, x, tower.patch_embed.proj)
    turning = turn_patches(layers, places, tower.rotary_pos_emb.inv_freq)
    for index, block in enumerate(tower.blocks):
        name = f"layers.{index}"
        normed = layers.layer_norm(x, block.norm1, f"{name}.attention_norm")
        mixed = attend(layers, normed, block.attn, turning, None, f"{name}.attention")
        x = layers.add(x, mixed, f"{name}.attention")
        normed = layers.layer_norm(x, block.norm2, f"{name}.mlp_norm")
        up = layers.linear(normed, block.mlp.fc1, f"{name}.up")
        up = layers.activation(up, config.hidden_act, f"{name}.up")
        x = layers.add(x, layers.linear(up, block.mlp.fc2, f"{name}.down"), f"{name}.mlp")
    x = layers.layer_norm(x, tower.merger.ln_q, "merger.norm")
    return merge_cells(layers, x, tower.merger.mlp, config.embed_dim, places), []


def merge_cells(layers: Layers, x: str, mlp: Any, width: int, places: Places) -> str:
    """The merger of Qwen2-VL and Qwen2.5-VL behind its norm: (n, c) -> (cells, d)."""
    x = merged(layers, x, width, places, "merger")
    x = layers.gelu(layers.linear(x, mlp[0], "merger.up"), "merger.up")
    return layers.linear(x, mlp[2], "merger.down")


def _tower(model: Any, pictures: Pictures) -> Tower:
    return patch_tower(model, _emit)


FAMILY = VisionFamily(_describe, "model.language_model.", _tower, text=TextFamily(mrope_spec))
