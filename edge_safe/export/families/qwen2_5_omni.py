"""Qwen2.5-Omni (``model_type: qwen2_5_omni``): the part that reads, sees, hears and writes.

Pictures are Qwen2.5-VL's. An encoder of Whisper's kind hears a sound in chunks, each by itself.
A position of sound is one step in time, row and column (TMRoPE without a video), as of words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, ones

from edge_safe.errors import ExportError
from edge_safe.export.audio_language import AudioFamily, whisper_windows
from edge_safe.export.decoder_config import TextFamily
from edge_safe.export.families.base import Opened, Tower
from edge_safe.export.families.qwen2_5_vl import windowed_pictures, windowed_tower
from edge_safe.export.families.qwen2_vl import mrope_spec
from edge_safe.export.graphs.spec import DecoderSpec
from edge_safe.export.towers.audio_encoder import audio_tower
from edge_safe.export.towers.modules import Layers
from edge_safe.export.towers.whisper import pooled
from edge_safe.export.vision_language import Pictures, VisionFamily, open_vision
from edge_safe.runtime.audio_windows import STRIDE, Windows

LANGUAGE, VISION, AUDIO = (
    f"qwen2_5_omni_{part}" for part in ("text", "vision_encoder", "audio_encoder")
)
POOLED = 2


def open_checkpoint(folder: Path) -> Opened:
    """Opens a Qwen2.5-Omni checkpoint without the parts that speak; see ``open_vision``."""
    return open_vision(folder, FAMILY)


def _spec(config: Any) -> DecoderSpec:
    if config.model_type != LANGUAGE:
        raise ExportError(
            f"The language model inside is a {config.model_type!r}; possible: {LANGUAGE}."
        )
    return mrope_spec(config)


def _pictures(config: Any, folder: Path) -> Pictures:
    if getattr(config, "vision_start_token_id", None) is None:
        raise ExportError(
            "config.json names no vision_start_token_id, by which transformers finds the places of "
            "pictures. Name it in thinker_config."
        )
    return windowed_pictures(config, folder, VISION)


def _windows(config: Any, folder: Path) -> Windows:
    audio, width = config.audio_config, config.text_config.hidden_size
    if audio.model_type != AUDIO:
        raise ExportError(f"The audio encoder is a {audio.model_type!r}; possible: {AUDIO}.")
    if audio.output_dim != width:
        raise ExportError(
            f"The audio encoder gives features of width {audio.output_dim}; the language model "
            f"has {width}."
        )
    return whisper_windows(audio, folder, "chunks", POOLED, STRIDE * audio.n_window)


def _project(model: Any, layers: Layers, x: str) -> str:
    """Means of two states, normalized, in the width of the language model."""
    tower = model.model.audio_tower
    x = layers.layer_norm(pooled(layers, x, POOLED), tower.ln_post, "layer_norm")
    return layers.linear(x, tower.proj, "projector")


def _features(model: Any, input_features: Tensor, frames: int) -> Tensor:
    heard = input_features[:, :, :frames]
    mask = ones(1, heard.shape[-1]).long()
    features: Tensor = model.get_audio_features(heard, mask, return_dict=True).last_hidden_state
    return features[None]


def _audio_tower(model: Any, windows: Windows) -> Tower:
    width = model.config.text_config.hidden_size
    positions = model.model.audio_tower.positional_embedding.positional_embedding
    chunk = positions[: model.config.audio_config.n_window]
    return audio_tower(model, windows, width, _project, _features, chunk)


FAMILY = VisionFamily(
    _pictures,
    "model.language_model.",
    windowed_tower,
    text=TextFamily(_spec),
    audio=AudioFamily(_windows, _audio_tower),
)
