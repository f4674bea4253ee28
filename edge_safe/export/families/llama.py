"""Text-only Llama checkpoints (``model_type: llama``)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_safe.export.decoder_config import TextFamily, decoder_spec, open_text, static_rope
from edge_safe.export.families.base import Opened
from edge_safe.export.graphs.spec import DecoderSpec


def open_checkpoint(folder: Path) -> Opened:
    """Opens a Llama checkpoint; see ``open_text``."""
    return open_text(folder, TEXT)


def llama_spec(config: Any) -> DecoderSpec:
    """Describes a LlamaForCausalLM.

    Raises:
        ExportError: Its rotary scaling or activation has no counterpart in the graphs.
    """
    return replace(
        decoder_spec(config, config.hidden_act, [static_rope(config)]),
        qkv_bias=bool(config.attention_bias),
        output_bias=bool(config.attention_bias),
        mlp_bias=bool(config.mlp_bias),
    )


TEXT = TextFamily(llama_spec)
