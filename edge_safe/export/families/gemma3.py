"""Gemma 3 with pictures (``model_type: gemma3``): a square through SigLIP, pooled.

The positions of one picture see each other, in layers with a window those within it.
"""

from __future__ import annotations

from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edge_safe.errors import ExportError
from edge_safe.export.families.base import Opened, Tower
from edge_safe.export.graphs.spec import DecoderSpec
from edge_safe.export.image_processors import one_square, read_image_processor
from edge_safe.export.image_prompts import marker_of, read_tokenizer
from edge_safe.export.towers.modules import Layers
from edge_safe.export.towers.squares import square_tower
from edge_safe.export.towers.vision_transformer import check_vision, pooled, square_states
from edge_safe.export.vision_language import Pictures, VisionFamily, open_vision
from edge_safe.runtime.image_tokens import Enclosed

TOWERS = ("siglip_vision_model",)


def open_checkpoint(folder: Path) -> Opened:
    """Opens a Gemma 3 checkpoint; see ``open_vision``."""
    return open_vision(folder, FAMILY)


def _describe(config: Any, folder: Path) -> Pictures:
    vision = config.vision_config
    check_vision(vision, TOWERS)
    if config.text_config.final_logit_softcapping is not None:
        raise ExportError(
            f"final_logit_softcapping is {config.text_config.final_logit_softcapping}, which "
            "transformers leaves out of this family; it has to be null."
        )
    patches, tokens = vision.image_size // vision.patch_size, config.mm_tokens_per_image
    side = isqrt(tokens)
    if side**2 != tokens or patches % side:
        raise ExportError(
            f"{patches} x {patches} patches cannot be pooled to {tokens} features "
            "(mm_tokens_per_image) in whole squares."
        )
    processor = read_image_processor(folder)
    if processor.do_pan_and_scan:
        raise ExportError(
            "The image processor has do_pan_and_scan on, which Gemma3Processor overrides and the "
            "runtime does not do. Take it out of preprocessor_config.json."
        )
    tokenizer = read_tokenizer(folder)
    begin = marker_of(tokenizer, "boi_token")
    return Pictures(
        pixels=one_square(processor, vision.image_size),
        layout=Enclosed(tokens, f"\n\n{begin}", f"{marker_of(tokenizer, 'eoi_token')}\n\n"),
        # The template writes the first marker; the processor puts the rest behind it.
        placeholder=config.boi_token_index,
    )


def _sees_its_picture(spec: DecoderSpec) -> DecoderSpec:
    return replace(spec, bidirectional="image")


def _emit(model: Any, layers: Layers, x: str) -> str:
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    (x,) = square_states(layers, x, tower, [tower.config.num_hidden_layers])
    x = layers.layer_norm(x, tower.post_layernorm, "post_norm")
    x = pooled(layers, x, projector.patches_per_image, projector.kernel_size)
    norm = projector.mm_soft_emb_norm
    # Gemma stores what is added to 1.
    x = layers.rms_norm(x, 1.0 + norm.weight, norm.eps, "projector.norm")
    weight = projector.mm_input_projection_weight
    linear = nn.Linear(weight.shape[0], weight.shape[1], bias=False)
    linear.weight = nn.Parameter(weight.T, requires_grad=False)
    return layers.linear(x, linear, "projector")


def _features(model: Any, pixel_values: Tensor) -> Tensor:
    found: Tensor = model.get_image_features(pixel_values, return_dict=True).pooler_output
    return found


def _tower(model: Any, pictures: Pictures) -> Tower:
    side, width = model.config.vision_config.image_size, model.config.text_config.hidden_size
    return square_tower(model, side, pictures.layout.tokens, width, _emit, _features)


FAMILY = VisionFamily(_describe, "model.language_model.", _tower, adapt=_sees_its_picture)
