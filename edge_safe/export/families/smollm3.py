"""SmolLM3 (``model_type: smollm3``): some layers, by default every fourth, have no rotary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_safe.export.decoder_config import (
    TextFamily,
    decoder_spec,
    layer_windows,
    open_text,
    static_rope,
)
from edge_safe.export.families.base import Opened
from edge_safe.export.graphs.spec import DecoderSpec, LayerAttention


def open_checkpoint(folder: Path) -> Opened:
    """Opens a SmolLM3 checkpoint; see ``open_text``."""
    return open_text(folder, TEXT)


def smollm3_spec(config: Any) -> DecoderSpec:
    """Describes a SmolLM3ForCausalLM.

    Raises:
        ExportError: It uses something that the graphs cannot express.
    """
    # The list may be longer than the model; 1 stands for a layer with rotary, 0 for one without.
    rotary = config.no_rope_layers[: config.num_hidden_layers]
    return replace(
        decoder_spec(config, config.hidden_act, [static_rope(config)]),
        qkv_bias=bool(config.attention_bias),
        output_bias=bool(config.attention_bias),
        mlp_bias=bool(config.mlp_bias),
        attention=tuple(
            LayerAttention(0 if turned else None, window)
            for turned, window in zip(rotary, layer_windows(config), strict=True)
        ),
    )


TEXT = TextFamily(smollm3_spec)
