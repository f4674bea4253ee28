"""Gemma 3's text model (``model_type: gemma3_text``).

Most layers see a window and rotate with a base of their own; norms stand before and behind
attention and MLP.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_safe.errors import ExportError
from edge_safe.export.decoder_config import (
    TextFamily,
    decoder_spec,
    layer_windows,
    open_text,
    scale_of,
    static_rope,
)
from edge_safe.export.families.base import Opened
from edge_safe.export.graphs.spec import DecoderSpec, FloatArray, LayerAttention, TensorSource


def open_checkpoint(folder: Path) -> Opened:
    """Opens a Gemma 3 text checkpoint; see ``open_text``."""
    return open_text(folder, TEXT)


def gemma3_spec(config: Any) -> DecoderSpec:
    """Describes a Gemma3ForCausalLM.

    Raises:
        ExportError: It uses something that the graphs cannot express.
    """
    if config.use_bidirectional_attention:
        raise ExportError(
            "use_bidirectional_attention is set: positions would see later ones, slot T too. "
            "Causal models can be exported."
        )
    if config.attn_logit_softcapping is not None:
        raise ExportError(
            f"attn_logit_softcapping is {config.attn_logit_softcapping}, which transformers leaves "
            "out of this family's attention, so there is nothing to compare with; it has to be "
            "null."
        )
    windows = layer_windows(config)
    kinds = sorted(set(config.layer_types))
    return replace(
        decoder_spec(
            config, config.hidden_activation, [static_rope(config, kind) for kind in kinds]
        ),
        qkv_bias=bool(config.attention_bias),
        output_bias=bool(config.attention_bias),
        qk_norm=True,
        post_norms=True,
        attention=tuple(
            LayerAttention(kinds.index(kind), window)
            for kind, window in zip(config.layer_types, windows, strict=True)
        ),
        attention_scale=scale_of(config.query_pre_attn_scalar),
        embedding_scale=float(config.hidden_size**0.5),
        logit_softcap=config.final_logit_softcapping,
    )


def norms_around_one(tensor: TensorSource, _: DecoderSpec) -> TensorSource:
    """Norm weights as the graphs take them: Gemma stores what is added to 1."""

    def shifted(name: str) -> FloatArray:
        value = tensor(name)
        return value + np.float32(1) if name.endswith("norm.weight") else value

    return shifted


TEXT = TextFamily(gemma3_spec, norms_around_one)
