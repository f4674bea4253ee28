"""An ordinary checkpoint as a GGUF file in float32, without a vocabulary: peers are given ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from edge_safe.errors import CheckpointError

# By Hugging Face model_type: architecture, and whether rotary pairs stand side by side there.
ARCHITECTURES = {
    "llama": (gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, False),
}


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """Writes the file.

    Raises:
        CheckpointError: There is no writer for this family.
    """
    config: Any = model.config
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"No GGUF writer for model type {config.model_type}; it can {known}.")
    architecture, paired = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if there is None:
            raise CheckpointError(f"GGUF has no name for the tensor {name}.")
        array = tensor.detach().to(torch.float32).numpy()
        if paired and name.endswith(("q_proj.weight", "k_proj.weight")):
            array = _side_by_side(array, width)
        writer.add_tensor(there, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _side_by_side(weight: np.ndarray, width: int) -> np.ndarray:
    """Rows of each head so that the two halves of a rotary pair stand beside each other."""
    heads = weight.reshape(-1, 2, width // 2, weight.shape[1])
    return heads.swapaxes(1, 2).reshape(weight.shape)
