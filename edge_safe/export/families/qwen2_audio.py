"""Qwen 2 Audio (``model_type: qwen2_audio``): a Whisper encoder, pooled by two, and one matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask

from edge_safe.errors import ExportError
from edge_safe.export.audio_language import AudioFamily, open_audio, whisper_windows
from edge_safe.export.families.base import Opened, Tower
from edge_safe.export.towers.audio_encoder import audio_tower
from edge_safe.export.towers.modules import Layers
from edge_safe.export.towers.whisper import pooled
from edge_safe.runtime.audio_windows import STRIDE, Windows

ENCODER = "qwen2_audio_encoder"
POOLED = 2


def open_checkpoint(folder: Path) -> Opened:
    """Opens a Qwen 2 Audio checkpoint; see ``open_audio``."""
    return open_audio(folder, FAMILY)


def _describe(config: Any, folder: Path) -> Windows:
    if config.audio_config.model_type != ENCODER:
        raise ExportError(
            f"The audio encoder is a {config.audio_config.model_type!r}; possible: {ENCODER}."
        )
    return whisper_windows(config.audio_config, folder, "sound", POOLED)


def _project(model: Any, layers: Layers, x: str) -> str:
    """Means of two states, normalized, into the width of the language model."""
    x = pooled(layers, x, POOLED)
    x = layers.layer_norm(x, model.model.audio_tower.layer_norm, "layer_norm")
    return layers.linear(x, model.model.multi_modal_projector.linear, "projector")


def _features(model: Any, input_features: Tensor, frames: int) -> Tensor:
    """As the model's forward, which hides the states of silence behind the sound."""
    tower, steps = model.model.audio_tower, -(-frames // STRIDE)
    count = input_features.shape[-1] // STRIDE
    mask = create_bidirectional_mask(
        config=tower.config,
        inputs_embeds=torch.zeros(1, count, 1),
        attention_mask=(torch.arange(count) < steps).long()[None],
    )
    states = tower(input_features, attention_mask=mask, return_dict=True).last_hidden_state
    features: Tensor = model.model.multi_modal_projector(states)
    return features[:, : steps // POOLED]


def _tower(model: Any, windows: Windows) -> Tower:
    width = model.config.text_config.hidden_size
    return audio_tower(
        model, windows, width, _project, _features, model.model.audio_tower.embed_positions.weight
    )


FAMILY = AudioFamily(_describe, _tower)
