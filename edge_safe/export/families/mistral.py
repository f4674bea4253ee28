"""Mistral 7B and its like (``model_type: mistral``): one sliding window for all layers, or none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_safe.export.decoder_config import (
    TextFamily,
    decoder_spec,
    open_text,
    static_rope,
    uniform_windows,
    windowed,
)
from edge_safe.export.families.base import Opened
from edge_safe.export.graphs.spec import DecoderSpec


def open_checkpoint(folder: Path) -> Opened:
    """Opens a Mistral checkpoint; see ``open_text``."""
    return open_text(folder, TEXT)


def mistral_spec(config: Any) -> DecoderSpec:
    """Describes a MistralForCausalLM.

    Raises:
        ExportError: It uses something that the graphs cannot express.
    """
    return replace(
        decoder_spec(config, config.hidden_act, [static_rope(config)]),
        attention=windowed(uniform_windows(config)),
    )


TEXT = TextFamily(mistral_spec)
