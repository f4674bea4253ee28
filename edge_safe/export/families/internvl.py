"""InternVL (``model_type: internvl``): tiles of a grid and a thumbnail through InternViT.

InternViT scales what each part of a layer adds; patches are shuffled into channels as in Idefics 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edge_safe.errors import ExportError
from edge_safe.export.families.base import Opened, Tower
from edge_safe.export.image_processors import grid_and_thumbnail, read_image_processor
from edge_safe.export.image_prompts import marker_of, read_tokenizer
from edge_safe.export.towers.modules import Layers
from edge_safe.export.towers.squares import square_tower
from edge_safe.export.towers.vision_transformer import (
    check_activation,
    patches,
    shuffled,
    with_class,
)
from edge_safe.export.vision_language import Pictures, VisionFamily, open_vision
from edge_safe.runtime.image_tokens import Enclosed


def open_checkpoint(folder: Path) -> Opened:
    """Opens an InternVL checkpoint; see ``open_vision``."""
    return open_vision(folder, FAMILY)


def _describe(config: Any, folder: Path) -> Pictures:
    vision = config.vision_config
    if vision.model_type != "internvl_vision":
        raise ExportError(
            f"The vision tower is a {vision.model_type!r}; it has to be 'internvl_vision'."
        )
    check_activation(vision.hidden_act)
    check_activation(config.projector_hidden_act)
    side, patch = _square(vision, "image_size"), _square(vision, "patch_size")
    factor = _factor(config)
    if side // patch % factor:
        raise ExportError(
            f"A tile has {side // patch} x {side // patch} patches, no multiple of {factor}, "
            "which downsample_ratio asks for."
        )
    _depth(config)
    if config.vision_feature_select_strategy != "default":
        raise ExportError(
            f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}; it has "
            "to be 'default', as the class embedding's state is no part of a square."
        )
    tokenizer = read_tokenizer(folder)
    return Pictures(
        pixels=grid_and_thumbnail(read_image_processor(folder), side),
        layout=Enclosed(
            (side // patch // factor) ** 2,
            marker_of(tokenizer, "start_image_token"),
            marker_of(tokenizer, "end_image_token"),
        ),
    )


def _square(vision: Any, name: str) -> int:
    """A length that has to be the same in both directions."""
    height, width = getattr(vision, name)
    if height != width:
        raise ExportError(
            f"The vision tower's {name} is {height} x {width}; its tiles have to be squares."
        )
    return int(height)


def _factor(config: Any) -> int:
    """Neighbours in each direction that become one state."""
    factor = round(1 / config.downsample_ratio)
    if factor < 1 or 1 / factor != config.downsample_ratio:
        raise ExportError(
            f"downsample_ratio is {config.downsample_ratio}; one divided by a whole number is "
            "needed."
        )
    return int(factor)


def _depth(config: Any) -> int:
    """Number of layers behind which states are taken; negative indices count from the end.

    Raises:
        ExportError: There are not so many layers, or several are asked for.
    """
    wanted, count = config.vision_feature_layer, config.vision_config.num_hidden_layers + 1
    if not isinstance(wanted, int) or not -count <= wanted < count:
        raise ExportError(
            f"vision_feature_layer is {wanted}; one number is needed, and the vision tower has "
            f"{count - 1} layers."
        )
    return int(wanted % count)


def _emit(model: Any, layers: Layers, x: str) -> str:
    config, g, tower = model.config, layers.g, model.model.vision_tower
    embeddings = tower.embeddings
    x = patches(layers, x, embeddings.patch_embeddings.projection)
    x = with_class(layers, x, embeddings.cls_token[0, 0])
    if embeddings.position_embeddings is not None:
        positions = layers.stored("positions", embeddings.position_embeddings[0])
        x = layers.add(x, positions, "positions")
    for index, layer in enumerate(tower.encoder.layer[: _depth(config)]):
        x = _layer(layers, x, layer, f"layers.{index}", tower.config)
    # Only the index -1 takes what stands behind the last norm.
    if config.vision_feature_layer == -1 and isinstance(tower.layernorm, nn.LayerNorm):
        x = layers.layer_norm(x, tower.layernorm, "post_norm")
    ends = [g.constant([1]), g.constant([2**31 - 1]), g.constant([1])]
    x = g.op("Slice", [x, *ends], scope="states")
    side = _square(tower.config, "image_size") // _square(tower.config, "patch_size")
    x = shuffled(layers, x, side, tower.config.hidden_size, _factor(config))
    projector = model.model.multi_modal_projector
    x = layers.layer_norm(x, projector.layer_norm, "projector.norm")
    x = layers.linear(x, projector.linear_1, "projector.up")
    x = layers.activation(x, config.projector_hidden_act, "projector.up")
    return layers.linear(x, projector.linear_2, "projector.down")


def _layer(layers: Layers, x: str, layer: Any, name: str, config: Any) -> str:
    """A pre-norm layer whose parts are scaled channel by channel."""
    g, attention = layers.g, layer.attention
    normed = _norm(layers, x, layer.layernorm_before, f"{name}.attention_norm")
    parts = [
        layers.linear(normed, getattr(attention, f"{part}_proj"), f"{name}.{part}")
        for part in "qkv"
    ]
    if config.use_qk_norm:
        for slot, norm in enumerate((attention.q_norm, attention.k_norm)):
            parts[slot] = _norm(layers, parts[slot], norm, f"{name}.{'qk'[slot]}_norm")
    mixed = g.contrib(
        "MultiHeadAttention",
        parts,
        scope=f"{name}.attention",
        num_heads=config.num_attention_heads,
        scale=float(attention.scale),
    )
    out = layers.linear(mixed, attention.projection_layer, f"{name}.out")
    scale = layers.stored(f"{name}.attention_scale", layer.lambda_1)
    x = layers.add(x, g.op("Mul", [out, scale], scope=f"{name}.out"), f"{name}.attention")
    normed = _norm(layers, x, layer.layernorm_after, f"{name}.mlp_norm")
    up = layers.linear(normed, layer.mlp.fc1, f"{name}.up")
    down = layers.linear(
        layers.activation(up, config.hidden_act, f"{name}.up"), layer.mlp.fc2, f"{name}.down"
    )
    scale = layers.stored(f"{name}.mlp_scale", layer.lambda_2)
    return layers.add(x, g.op("Mul", [down, scale], scope=f"{name}.down"), f"{name}.mlp")


def _norm(layers: Layers, x: str, norm: Any, name: str) -> str:
    if isinstance(norm, nn.LayerNorm):
        return layers.layer_norm(x, norm, name)
    return layers.rms_norm(x, norm.weight, norm.variance_epsilon, name)


def _features(model: Any, pixel_values: Tensor) -> Tensor:
    found: Tensor = model.get_image_features(pixel_values, return_dict=True).pooler_output
    return found


def _tower(model: Any, pictures: Pictures) -> Tower:
    side, width = (
        _square(model.config.vision_config, "image_size"),
        model.config.text_config.hidden_size,
    )
    return square_tower(model, side, pictures.layout.tokens, width, _emit, _features)


FAMILY = VisionFamily(_describe, "model.language_model.", _tower)
