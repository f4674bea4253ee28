"""Text-only Llama checkpoints (``model_type: llama``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from edge_safe.errors import ExportError
from edge_safe.export.families.base import Opened, float_array
from edge_safe.export.graphs.spec import DecoderSpec, FloatArray, Rope, TensorSource
from edge_safe.models.base_model import load_base

# Scalings whose frequencies do not change with the length of the sequence.
STATIC_ROPE = {"default", "linear", "llama3", "yarn"}


def open_checkpoint(folder: Path) -> Opened:
    """Opens a Llama checkpoint in fp32.

    Raises:
        CheckpointError: It cannot be opened.
        ExportError: It uses something that the graphs cannot express.
    """
    base = load_base(folder, torch.float32)
    spec = llama_spec(base.model)
    return Opened(spec, tensors_of(base.model), base.model, base.tokenizer)


def llama_spec(model: PreTrainedModel) -> DecoderSpec:
    """Describes a LlamaForCausalLM.

    Raises:
        ExportError: Its rotary scaling or activation has no counterpart in the graphs.
    """
    config: Any = model.config
    rotary: Any = model.get_submodule("model.rotary_emb")
    if rotary.rope_type not in STATIC_ROPE:
        raise ExportError(
            f"Rotary scaling {rotary.rope_type!r} changes with the length of the prompt, which "
            f"the graphs cannot express; they can: {', '.join(sorted(STATIC_ROPE))}."
        )
    if config.hidden_act != "silu":
        raise ExportError(f"A Llama with activation {config.hidden_act!r} is not known; use silu.")
    return DecoderSpec(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        eps=config.rms_norm_eps,
        rope=Rope(
            rotary.inv_freq.detach().double().numpy().astype(np.float64),
            float(rotary.attention_scaling),
        ),
        tied=bool(config.tie_word_embeddings),
        qkv_bias=bool(config.attention_bias),
        output_bias=bool(config.attention_bias),
        mlp_bias=bool(config.mlp_bias),
    )


def tensors_of(model: PreTrainedModel) -> TensorSource:
    """The weights of a model by name, as float32, one at a time."""
    state = model.state_dict()

    def tensor(name: str) -> FloatArray:
        if name not in state:
            raise ExportError(f"The checkpoint has no tensor {name}.")
        return float_array(state[name])

    return tensor
