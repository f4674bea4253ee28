"""A tiny random checkpoint of every text-only family, with a safety module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from tests.conftest import END_ID, VOCABULARY, write_checkpoint

# Shorter than every prompt, so that something is hidden by it.
WINDOW = 7
EXIT_LAYER = 2

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": END_ID,
    "pad_token_id": END_ID,
    "initializer_range": 0.15,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def qwen2(**changes: Any) -> PreTrainedModel:
    """Untied, one layer on either side of the cut with a window."""
    own = {
        "tie_word_embeddings": False,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": [FULL, SLIDING, SLIDING, FULL],
    }
    return Qwen2ForCausalLM(Qwen2Config(**SIZES | own | changes))


def qwen3(**changes: Any) -> PreTrainedModel:
    """Tied; heads are wider than their share of the width."""
    own = {
        "tie_word_embeddings": True,
        "head_dim": 32,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    }
    return Qwen3ForCausalLM(Qwen3Config(**SIZES | own | changes))


def mistral(**changes: Any) -> PreTrainedModel:
    """Untied, a window in every layer."""
    own = {"tie_word_embeddings": False, "sliding_window": WINDOW}
    return MistralForCausalLM(MistralConfig(**SIZES | own | changes))


def smollm3(**changes: Any) -> PreTrainedModel:
    """Tied; the last layer has no rotary, and with it the decoder's last."""
    own = {"tie_word_embeddings": True, "no_rope_layers": [1, 0, 1, 0]}
    return SmolLM3ForCausalLM(SmolLM3Config(**SIZES | own | changes))


def gemma3_text(**changes: Any) -> PreTrainedModel:
    """Tied; local and global layers on either side of the cut.

    The rows of the embedding are small: it scales them, and with lm_head tied to it the model
    would repeat its last word for ever.
    """
    own = {
        "tie_word_embeddings": True,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
        },
    }
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES | own | changes))
    model.get_input_embeddings().weight.data *= 0.2
    return model


def gemma(**changes: Any) -> PreTrainedModel:
    """Untied, as its small rows scaled up would repeat the last word for ever; one key head."""
    own = {"tie_word_embeddings": False, "head_dim": 32, "num_key_value_heads": 1}
    model = GemmaForCausalLM(GemmaConfig(**SIZES | own | changes))
    model.get_input_embeddings().weight.data *= 0.2
    return model


def phi3(**changes: Any) -> PreTrainedModel:
    """Untied, a window in every layer, half of each head rotated."""
    own = {
        "tie_word_embeddings": False,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "sliding_window": WINDOW,
        "original_max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    }
    return Phi3ForCausalLM(Phi3Config(**SIZES | own | changes))


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "gemma": gemma,
    "gemma3_text": gemma3_text,
    "mistral": mistral,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "smollm3": smollm3,
}

# The same families otherwise: tied where the first is not, without windows, with biases.
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
OTHERWISE: dict[str, dict[str, Any]] = {
    "gemma": {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 4},
    "gemma3_text": {
        "tie_word_embeddings": False,
        "final_logit_softcapping": 4.0,
        "attention_bias": True,
    },
    "mistral": {"tie_word_embeddings": True, "sliding_window": None},
    "phi3": {
        "tie_word_embeddings": True,
        "sliding_window": None,
        "rope_parameters": PLAIN_ROPE,
    },
    "qwen2": {
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "layer_types": None,
    },
    "qwen3": {
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "attention_bias": True,
    },
    "smollm3": {
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
    },
}


def write_family(folder: Path, family: str, **changes: Any) -> Path:
    """Writes the tiny checkpoint of a family; biases and norms are random too."""

    def make() -> PreTrainedModel:
        model = FAMILIES[family](**changes)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn(parameter.shape)
        return model

    write_checkpoint(folder, make, (1, EXIT_LAYER))
    return folder
