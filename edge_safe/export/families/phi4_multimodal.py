"""Phi-4-multimodal (``model_type: phi4_multimodal``): Phi-3's decoder, which sees and hears.

A SigLIP over crops, whose features stand in lines, and a conformer with two projectors: one for
sound alone, one for sound beside pictures. transformers asks for pictures of the whole
conversation; here the turn decides, so that a second turn never changes what is cached of the
first.

Published weights come with LoRA adapters for pictures and for sound in folders of their own, of
which one or the other has to be switched on for each prompt. That is refused; one of them merged
into the weights is a model like any other.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import Phi4MultimodalFeatureExtractor

from edge_safe.errors import ExportError
from edge_safe.export.audio_language import read_extractor, sound_place
from edge_safe.export.checkpoint.adapter import CONFIG as ADAPTER_FILE
from edge_safe.export.decoder_config import read_config, tensors_of
from edge_safe.export.families import phi3
from edge_safe.export.families.base import Opened
from edge_safe.export.image_processors import CROP_TOKENS, crops_and_whole
from edge_safe.export.image_prompts import (
    TEMPLATE_FILE,
    placeholder_of,
    read_tokenizer,
    whole_template,
)
from edge_safe.export.towers.conformer import SILU, WINDOW, conformer_tower
from edge_safe.export.towers.crops import crop_tower
from edge_safe.export.towers.modules import ACTIVATIONS
from edge_safe.export.towers.vision_transformer import check_vision
from edge_safe.models.base_model import load_base
from edge_safe.runtime.audio_frames import Frames, frames_problem
from edge_safe.runtime.audio_io import SAMPLE_RATE
from edge_safe.runtime.families.placeholders import ImageProcessor
from edge_safe.runtime.hearing import AudioProcessor
from edge_safe.runtime.image_tokens import CropLines

TOWERS = ("phi4_multimodal_vision",)
ENCODER = "phi4_multimodal_audio"
# Sections of config.json in the authors' own format, whose adapters are part of the weights.
OWN_ADAPTERS = ("vision_lora", "speech_lora")
# Where the feature extractor's mel bins begin and end if its file does not say it.
LOWEST_HERTZ, HIGHEST_HERTZ = 0.0, 7690.0
# What its authors name as the longest sound it understands.
MAX_SECONDS = 30 * 60


def open_checkpoint(folder: Path) -> Opened:
    """Opens a Phi-4-multimodal checkpoint in fp32.

    Raises:
        CheckpointError: It cannot be opened.
        ExportError: It uses something that the graphs or the runtime cannot express.
    """
    config = read_config(folder)
    _check_adapters(config, folder)
    spec = replace(phi3.phi3_spec(config), tied=bool(config.tie_word_embeddings))
    depth = _check_tower(config.vision_config)
    pixels = crops_and_whole(folder, config.vision_config)
    frames = _frames(config.audio_config, folder, spec.context_length)
    tokenizer = read_tokenizer(folder)
    layout = CropLines(CROP_TOKENS)
    image = ImageProcessor(
        placeholder=placeholder_of(tokenizer, config.vision_config.image_token_id, layout),
        pixels=pixels,
        layout=layout,
    )
    placeholder, part = sound_place(folder, tokenizer, config.audio_config.audio_token_id)
    audio = AudioProcessor(placeholder=placeholder, part=part, frames=frames)
    whole_template(folder, tokenizer)
    template = whole_template(folder, tokenizer, part)
    model: Any = load_base(folder, torch.float32).model
    extended = model.model.embed_tokens_extend
    # The fused attention of transformers takes a picture without any white for a text and lets no
    # patch see a later one: its module says is_causal, and a mask that hides nothing is dropped.
    extended.image_embed.img_processor.set_attn_implementation("eager")
    return Opened(
        spec=spec,
        tensor=phi3.TEXT.tensors(tensors_of(model), spec),
        language=model,
        tokenizer=tokenizer,
        modalities={"image": True, "audio": True},
        processors={"image": msgspec.to_builtins(image), "audio": msgspec.to_builtins(audio)},
        towers=[
            crop_tower(extended.image_embed, depth, CROP_TOKENS),
            conformer_tower(extended.audio_embed, frames),
        ],
        files={TEMPLATE_FILE: template.encode()},
    )


def _check_adapters(config: Any, folder: Path) -> None:
    """Refuses adapters that are switched from prompt to prompt.

    Raises:
        ExportError: There are some.
    """
    found = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_FILE}"))
    found += [name for name in OWN_ADAPTERS if getattr(config, name, None) is not None]
    if found:
        raise ExportError(
            f"{folder} has LoRA adapters beside its weights ({', '.join(found)}), one for prompts "
            "with pictures and one for prompts with sound. A bundle has one set of weights, whose "
            "gate judges all prompts, so they cannot be switched from prompt to prompt. Merge the "
            "one you need (peft's merge_and_unload), save that model to a folder without "
            "adapters, train its gate there, and export it."
        )


def _check_tower(vision: Any) -> int:
    """Makes sure that the tower can be emitted; the number of layers behind which states are taken.

    Raises:
        ExportError: It cannot.
    """
    check_vision(vision, TOWERS)
    count = vision.num_hidden_layers + 1
    # transformers records no states when it is told of layer 0.
    if not -count <= vision.feature_layer < count or vision.feature_layer == 0:
        raise ExportError(
            f"feature_layer is {vision.feature_layer}; the vision tower has {count - 1} layers."
        )
    return int(vision.feature_layer % count)


def _frames(audio: Any, folder: Path, context_length: int) -> Frames:
    """The frames that the audio encoder takes.

    Raises:
        ExportError: The runtime cannot prepare sound this way, the encoder takes other frames
            than the feature extractor gives, or it cannot be emitted.
    """
    if audio.model_type != ENCODER:
        raise ExportError(f"The audio encoder is a {audio.model_type!r}; possible: {ENCODER}.")
    for name in ("activation", "conv_activation", "conv_glu_type", "nemo_activation"):
        possible = sorted({*ACTIVATIONS, *SILU})
        if getattr(audio, name) not in possible:
            raise ExportError(
                f"The audio encoder's {name} {getattr(audio, name)!r} has no counterpart in the "
                f"towers' graphs; they can: {', '.join(possible)}."
            )
    if audio.time_reduction & (audio.time_reduction - 1) or audio.downsample_rate != 1:
        raise ExportError(
            f"The audio encoder's time_reduction is {audio.time_reduction} and its downsample_rate "
            f"{audio.downsample_rate}; a power of two and 1 are needed, as in transformers."
        )
    if audio.bias_symmetric and audio.bias_max_distance < WINDOW:
        raise ExportError(
            f"The audio encoder's bias is symmetric up to a distance of {audio.bias_max_distance}; "
            f"transformers has none for the {WINDOW} states that see each other."
        )
    needed = {
        "sampling_rate": SAMPLE_RATE,
        "audio_downsample_rate": 1,
        "audio_feat_stride": 1,
        "audio_compression_rate": audio.time_reduction,
        "feature_size": audio.input_size,
    }
    extractor = read_extractor(folder, Phi4MultimodalFeatureExtractor, needed)
    # The extractor itself forgets where its mel bins begin and end.
    own, _ = Phi4MultimodalFeatureExtractor.get_feature_extractor_dict(folder)
    seconds = context_length * audio.time_reduction * extractor.hop_length // SAMPLE_RATE
    frames = Frames(
        feature_size=extractor.feature_size,
        n_fft=extractor.n_fft,
        win_length=extractor.win_length,
        hop_length=extractor.hop_length,
        preemphasis=float(extractor.preemphasis),
        min_frequency=float(own.get("mel_min_frequency", LOWEST_HERTZ)),
        max_frequency=float(own.get("mel_max_frequency", HIGHEST_HERTZ)),
        frames_per_token=audio.time_reduction,
        window_tokens=WINDOW,
        max_seconds=min(max(seconds, 1), MAX_SECONDS),
    )
    wrong = frames_problem(frames)
    if wrong is not None:
        raise ExportError(f"The feature extractor has {wrong}.")
    return frames
