"""Qwen2.5-VL (``model_type: qwen2_5_vl``): Qwen2-VL with windows and gated MLPs in its tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_safe.errors import ExportError
from edge_safe.export.decoder_config import TextFamily
from edge_safe.export.families.base import Opened, Tower
from edge_safe.export.families.qwen2_vl import merge_cells, mrope_spec
from edge_safe.export.image_processors import patches_of_any_size, read_image_processor
from edge_safe.export.towers.modules import Layers
from edge_safe.export.towers.patches import (
    Places,
    attend,
    check_patches,
    cut_windows,
    embed_patches,
    patch_tower,
    turn_patches,
)
from edge_safe.export.vision_language import Pictures, VisionFamily, open_vision
from edge_safe.runtime.image_tokens import Grid


def open_checkpoint(folder: Path) -> Opened:
    """Opens a Qwen2.5-VL checkpoint; see ``open_vision``."""
    return open_vision(folder, FAMILY)


def windowed_pictures(config: Any, folder: Path, kind: str = "qwen2_5_vl_vision") -> Pictures:
    """Describes pictures for a tower of this family.

    Args:
        config: The configuration, with ``vision_config`` and ``text_config``.
        folder: The checkpoint.
        kind: Model type of the tower.

    Raises:
        ExportError: It has something that the graphs do not.
    """
    vision = config.vision_config
    check_patches(vision, kind, vision.hidden_size, config.text_config.hidden_size)
    if vision.hidden_act != "silu":
        raise ExportError(
            f"Activation {vision.hidden_act!r} has no counterpart in this tower's graph; it can: "
            "silu."
        )
    if _window_cells(vision) < 1:
        raise ExportError(
            f"window_size {vision.window_size} holds no cell of {vision.spatial_merge_size} "
            f"patches of {vision.patch_size} pixels."
        )
    pixels = patches_of_any_size(read_image_processor(folder), vision)
    return Pictures(pixels=pixels, layout=Grid())


def _window_cells(vision: Any) -> int:
    """Side of a window in cells, as transformers rounds it."""
    return int(vision.window_size // vision.spatial_merge_size // vision.patch_size)


def _emit(model: Any, layers: Layers, x: str, places: Places) -> tuple[str, list[str]]:
    tower, config = model.model.visual, model.config.vision_config
    x = embed_patches(layers, x, tower.patch_embed.proj)
    turning = turn_patches(layers, places, tower.rotary_pos_emb.inv_freq)
    windows = cut_windows(layers, places, _window_cells(config), config.hidden_size)
    for index, block in enumerate(tower.blocks):
        name, full = f"layers.{index}", index in config.fullatt_block_indexes
        normed = layers.rms_norm(
            x, block.norm1.weight, block.norm1.variance_epsilon, f"{name}.attention_norm"
        )
        mixed = attend(
            layers, normed, block.attn, turning, None if full else windows, f"{name}.attention"
        )
        x = layers.add(x, mixed, f"{name}.attention")
        normed = layers.rms_norm(
            x, block.norm2.weight, block.norm2.variance_epsilon, f"{name}.mlp_norm"
        )
        x = layers.add(x, _gated(layers, normed, block.mlp, f"{name}.mlp"), f"{name}.mlp")
    x = layers.rms_norm(
        x, tower.merger.ln_q.weight, tower.merger.ln_q.variance_epsilon, "merger.norm"
    )
    return merge_cells(layers, x, tower.merger.mlp, config.hidden_size, places), []


def _gated(layers: Layers, x: str, mlp: Any, name: str) -> str:
    """down(SiLU(gate(x)) * up(x))."""
    gate = layers.linear(x, mlp.gate_proj, f"{name}.gate")
    # SiLU, x * sigmoid(x), in one node.
    gate = layers.g.contrib("QuickGelu", [gate], scope=name, alpha=1.0)
    up = layers.g.op("Mul", [gate, layers.linear(x, mlp.up_proj, f"{name}.up")], scope=name)
    return layers.linear(up, mlp.down_proj, f"{name}.down")


def windowed_tower(model: Any, pictures: Pictures) -> Tower:
    """The graph ``vision_encoder`` of a tower with windows."""
    return patch_tower(model, _emit)


FAMILY = VisionFamily(
    windowed_pictures, "model.language_model.", windowed_tower, text=TextFamily(mrope_spec)
)
