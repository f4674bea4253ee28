"""Phi-3 and Phi-4 (``model_type: phi3``): fused projections, perhaps a partial rotation.

With ``longrope`` the rotary embedding changes for a whole prompt once that is longer than
``original_max_position_embeddings``, so bundles have that many positions and no more.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_safe.export.decoder_config import (
    STATIC_ROPE,
    TextFamily,
    decoder_spec,
    open_text,
    static_rope,
    uniform_windows,
    windowed,
)
from edge_safe.export.families.base import Opened
from edge_safe.export.graphs.spec import DecoderSpec, FloatArray, TensorSource

LONGROPE = "longrope"


def open_checkpoint(folder: Path) -> Opened:
    """Opens a Phi-3 checkpoint; see ``open_text``."""
    return open_text(folder, TEXT)


def phi3_spec(config: Any) -> DecoderSpec:
    """Describes a Phi3ForCausalLM.

    Raises:
        ExportError: It uses something that the graphs cannot express.
    """
    rope = static_rope(config, partial=True, kinds=STATIC_ROPE | {LONGROPE})
    spec = decoder_spec(config, config.hidden_act, [rope])
    parameters = config.rope_parameters
    context = spec.context_length
    if parameters["rope_type"] == LONGROPE:
        context = min(context, int(parameters["original_max_position_embeddings"]))
    return replace(spec, attention=windowed(uniform_windows(config)), context_length=context)


def _unfused(tensor: TensorSource, spec: DecoderSpec) -> TensorSource:
    """The rows of the fused projections under the names that Llama's parts have."""
    query, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    # Part -> fused projection, first row, number of rows.
    parts = {
        "q_proj": ("qkv_proj", 0, query),
        "k_proj": ("qkv_proj", query, key),
        "v_proj": ("qkv_proj", query + key, key),
        "gate_proj": ("gate_up_proj", 0, spec.intermediate_size),
        "up_proj": ("gate_up_proj", spec.intermediate_size, spec.intermediate_size),
    }

    def part(name: str) -> FloatArray:
        *path, module, kind = name.split(".")
        if module not in parts:
            return tensor(name)
        fused, start, count = parts[module]
        return tensor(".".join([*path, fused, kind]))[start : start + count]

    return part


TEXT = TextFamily(phi3_spec, _unfused)
