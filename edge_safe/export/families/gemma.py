"""Gemma (``model_type: gemma``): norms around 1, heads of their own width, a scaled embedding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_safe.errors import ExportError
from edge_safe.export.decoder_config import TextFamily, decoder_spec, open_text, static_rope
from edge_safe.export.families.base import Opened
from edge_safe.export.families.gemma3_text import norms_around_one
from edge_safe.export.graphs.spec import DecoderSpec


def open_checkpoint(folder: Path) -> Opened:
    """Opens a Gemma checkpoint; see ``open_text``."""
    return open_text(folder, TextFamily(_alone, norms_around_one))


def gemma_spec(config: Any) -> DecoderSpec:
    """Describes a GemmaForCausalLM.

    Raises:
        ExportError: It uses something that the graphs cannot express.
    """
    return replace(
        decoder_spec(config, config.hidden_act, [static_rope(config)]),
        qkv_bias=bool(config.attention_bias),
        output_bias=bool(config.attention_bias),
        embedding_scale=float(config.hidden_size**0.5),
    )


def _alone(config: Any) -> DecoderSpec:
    """The same where no other model says what its positions see."""
    if config.use_bidirectional_attention:
        raise ExportError(
            "use_bidirectional_attention is on, so positions see what stands behind them; a "
            "language model that decodes cannot be exported with it."
        )
    return gemma_spec(config)


TEXT = TextFamily(gemma_spec, norms_around_one)
