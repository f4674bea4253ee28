"""Qwen 2 and 2.5 (``model_type: qwen2``): biases of queries, keys and values."""

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
    """Opens a Qwen 2 checkpoint; see ``open_text``."""
    return open_text(folder, TEXT)


def qwen2_spec(config: Any) -> DecoderSpec:
    """Describes a Qwen2ForCausalLM.

    Raises:
        ExportError: It uses something that the graphs cannot express.
    """
    return replace(
        decoder_spec(config, config.hidden_act, [static_rope(config)]),
        qkv_bias=True,
        attention=windowed(layer_windows(config)),
    )


TEXT = TextFamily(qwen2_spec)
