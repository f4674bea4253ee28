"""Voxtral (``model_type: voxtral``): Whisper's encoder over whole windows, states joined, an MLP.

Its tokenizer is wanted as ``tokenizer.json``. The file that Mistral publishes, ``tekken.json``, is
made one by transformers; the safety tokens take two of its unused special tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from edge_safe.errors import ExportError
from edge_safe.export.audio_language import AudioFamily, open_audio, whisper_windows
from edge_safe.export.families.base import Opened, Tower
from edge_safe.export.towers.audio_encoder import audio_tower
from edge_safe.export.towers.modules import Layers
from edge_safe.export.towers.vision_transformer import check_activation
from edge_safe.runtime.audio_windows import STRIDE, Windows

ENCODER = "voxtral_encoder"
# What its authors name as the longest sound it understands.
MAX_SECONDS = 40 * 60


def open_checkpoint(folder: Path) -> Opened:
    """Opens a Voxtral checkpoint; see ``open_audio``."""
    return open_audio(folder, FAMILY)


def _describe(config: Any, folder: Path) -> Windows:
    audio = config.audio_config
    if audio.model_type != ENCODER:
        raise ExportError(f"The audio encoder is a {audio.model_type!r}; possible: {ENCODER}.")
    check_activation(config.projector_hidden_act)
    joined, rest = divmod(audio.intermediate_size, audio.d_model)
    if rest or not joined:
        raise ExportError(
            f"The projector takes {audio.intermediate_size} numbers, no multiple of the encoder's "
            f"{audio.d_model}."
        )
    windows = whisper_windows(audio, folder, "whole", joined)
    if not (folder / "tokenizer.json").is_file():
        raise ExportError(
            f"{folder} has no tokenizer.json. transformers makes it of tekken.json: "
            "AutoTokenizer.from_pretrained(folder, mistral_format=False).save_pretrained(folder); "
            "then name bos_token and eos_token in tokenizer_config.json, and put the chat template "
            "beside it (chat_template.jinja), which mistral-common writes."
        )
    fitting = config.text_config.max_position_embeddings // (windows.frames // STRIDE // joined)
    longest = min(MAX_SECONDS, max(fitting, 1) * windows.chunk_length)
    return msgspec.structs.replace(windows, max_seconds=longest)


def _project(model: Any, layers: Layers, x: str) -> str:
    """States side by side, into the width of the language model."""
    g, config = layers.g, model.config
    x = layers.layer_norm(x, model.model.audio_tower.layer_norm, "layer_norm")
    shape = g.constant([0, -1, config.audio_config.intermediate_size])
    x = g.op("Reshape", [x, shape], scope="joined")
    projector = model.model.multi_modal_projector
    x = layers.linear(x, projector.linear_1, "projector.up")
    x = layers.activation(x, config.projector_hidden_act, "projector.up")
    return layers.linear(x, projector.linear_2, "projector.down")


def _features(model: Any, input_features: Tensor, frames: int) -> Tensor:
    features: Tensor = model.get_audio_features(input_features, return_dict=True).pooler_output
    return features[None]


def _tower(model: Any, windows: Windows) -> Tower:
    width = model.config.text_config.hidden_size
    return audio_tower(
        model, windows, width, _project, _features, model.model.audio_tower.embed_positions.weight
    )


FAMILY = AudioFamily(_describe, _tower, start="<s>", before="[BEGIN_AUDIO]")
