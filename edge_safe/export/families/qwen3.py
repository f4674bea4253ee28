"""Qwen 3 (``model_type: qwen3``): queries and keys are normalized head by head."""

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
    windowed,
)
from edge_safe.export.families.base import Opened
from edge_safe.export.graphs.spec import DecoderSpec


def open_checkpoint(folder: Path) -> Opened:
    """Opens a Qwen 3 checkpoint; see ``open_text``."""
    return open_text(folder, TEXT)


def qwen3_spec(config: Any) -> DecoderSpec:
    """Describes a Qwen3ForCausalLM.

    Raises:
        ExportError: It uses something that the graphs cannot express.
    """
    return replace(
        decoder_spec(config, config.hidden_act, [static_rope(config)]),
        qkv_bias=bool(config.attention_bias),
        output_bias=bool(config.attention_bias),
        qk_norm=True,
        attention=windowed(layer_windows(config)),
    )


TEXT = TextFamily(qwen3_spec)
