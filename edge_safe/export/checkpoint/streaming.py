"""A torch model that holds no weights: each module reads its own before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import attach_align_device_hook
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from edge_safe.errors import CheckpointError
from edge_safe.export.checkpoint.reader import CheckpointReader, Float32Weights


def streaming_model(folder: Path, config: Any, reader: CheckpointReader) -> PreTrainedModel:
    """Builds a model in fp32 whose modules read their weights as they run and drop them after.

    Slower than a model that is held, but its memory is that of its largest matrix.

    Args:
        folder: The folder of the model's configuration.
        config: That configuration.
        reader: Gives the weights.

    Raises:
        CheckpointError: transformers refuses the configuration.
    """
    if hasattr(config, "quantization_config"):
        # The weights arrive unpacked.
        del config.quantization_config
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"Cannot build the model of {folder}: {error}") from error
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    weights = Float32Weights(reader, [name for name, _ in model.named_parameters()])
    attach_align_device_hook(
        model, execution_device=torch.device("cpu"), offload=True, weights_map=weights
    )
    model.train(False)
    return model.requires_grad_(False)
