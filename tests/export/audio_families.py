"""A tiny random checkpoint of every audio-language family, with its feature extractor's file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    VoxtralProcessor,
)

from tests.conftest import VOCABULARY, write_checkpoint
from tests.export.extractors import RATE, WINDOW, write_extractor
from tests.export.families import EXIT_LAYER, SIZES
from tests.export.vision_families import (
    OMNI_ENCODER,
    OMNI_SPECIAL,
    OMNI_TEMPLATE,
    VISION_FAMILIES,
    mrope,
    omni_processor,
    qwen2_5_omni,
    write_vision_family,
)

QWEN_ENCODER = {
    "model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_ffn_dim": 48, "encoder_layers": 2,
    "encoder_attention_heads": 2, "num_mel_bins": 128, "max_source_positions": 50 * WINDOW,
}  # fmt: skip
VOXTRAL_ENCODER = {
    "model_type": "voxtral_encoder", "hidden_size": 32, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_mel_bins": 128,
    "max_source_positions": 50 * WINDOW,
}  # fmt: skip

QWEN_SPECIAL = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
VOXTRAL_SPECIAL = ("[AUDIO]", "[BEGIN_AUDIO]", "[INST]", "[/INST]", "<s>")


@dataclass(frozen=True)
class Tiny:
    """One family: how its model is made, its special tokens, template and inputs.

    Attributes:
        make: Makes the model.
        special: Special tokens; the first one is the placeholder.
        template: The chat template.
        inputs: What transformers makes of a rendered prompt and its sounds, given the folder.
        part: Type of a sound in the template.
    """

    make: Callable[..., PreTrainedModel]
    special: tuple[str, ...]
    template: str
    inputs: Callable[[Path, str, Sequence[np.ndarray]], dict[str, Any]]
    part: str = "audio"


def sizes(special: tuple[str, ...]) -> dict[str, Any]:
    return SIZES | {"vocab_size": VOCABULARY + len(special), "max_position_embeddings": 1024}


def qwen2_audio(**changes: Any) -> PreTrainedModel:
    """States are pooled by two, a matrix projects."""
    own = {
        "audio_config": QWEN_ENCODER,
        "text_config": Qwen2Config(**sizes(QWEN_SPECIAL), tie_word_embeddings=False),
        "audio_token_index": VOCABULARY,
    }
    return Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(**own | changes))


def qwen2_audio_template() -> str:
    """The processor's own, with the safe token in front of answers."""
    turn = "<|im_start|>{{ message['role'] }}\n"
    own: str = Qwen2AudioProcessor.default_chat_template.fget(None)  # type: ignore[attr-defined]
    assert turn in own
    return own.replace(turn, turn + "{% if message['role'] == 'assistant' %}<|safe|>{% endif %}")


def qwen2_audio_inputs(folder: Path, text: str, sounds: Sequence[np.ndarray]) -> dict[str, Any]:
    processor = Qwen2AudioProcessor(
        AutoFeatureExtractor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    )
    heard = {"audio": list(sounds), "sampling_rate": RATE} if len(sounds) else {}
    return dict(processor(text=[text], return_tensors="pt", **heard))


def voxtral(**changes: Any) -> PreTrainedModel:
    """Four states are joined, an MLP projects."""
    own = {
        "audio_config": VOXTRAL_ENCODER,
        "text_config": LlamaConfig(**sizes(VOXTRAL_SPECIAL), tie_word_embeddings=False),
        "audio_token_id": VOCABULARY,
    }
    return VoxtralForConditionalGeneration(VoxtralConfig(**own | changes))


# In the manner of those that mistral-common writes, which leave [BEGIN_AUDIO] to the processor.
VOXTRAL_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST]' }}{% else %}{{ '<|safe|>' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] in ['input_audio', 'audio_url'] %}{{ '[AUDIO]' }}"
    "{% else %}{{ raise_exception('unknown part ' + part['type']) }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'user' %}{{ '[/INST]' }}{% else %}{{ '<|im_end|>' }}{% endif %}"
    "{% endfor %}"
)


def voxtral_inputs(folder: Path, text: str, sounds: Sequence[np.ndarray]) -> dict[str, Any]:
    """As VoxtralProcessor prepares sounds; it writes ids itself with mistral-common alone.

    There ``test_voxtral_tokens`` compares ids with it.
    """
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    processor = VoxtralProcessor(extractor, AutoTokenizer.from_pretrained(folder))
    kwargs = processor._merge_kwargs()["audio_kwargs"]
    frames = 100 * extractor.chunk_length
    kwargs |= {"pad_to_multiple_of": extractor.n_samples, "max_source_positions": frames}
    parts = text.split("[AUDIO]")
    features = []
    written = parts[0]
    for sound, behind in zip(sounds, parts[1:], strict=True):
        features.append(processor._retrieve_input_features([sound], **kwargs))
        written += "[BEGIN_AUDIO]" + "[AUDIO]" * (len(features[-1]) * frames // 8) + behind
    ids = processor.tokenizer(written, add_special_tokens=False, return_tensors="pt")
    heard = {"input_features": torch.cat(features)} if features else {}
    return {"input_ids": ids["input_ids"], **heard}


def omni_inputs(
    folder: Path, text: str, sounds: Sequence[np.ndarray], pictures: Sequence[Any] = ()
) -> dict[str, Any]:
    """Its pictures are taken as well."""
    processor = omni_processor(
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
        AutoTokenizer.from_pretrained(folder),
        AutoFeatureExtractor.from_pretrained(folder),
    )
    media = {"audio": list(sounds)} if len(sounds) else {}
    if pictures:
        media["images"] = list(pictures)
    return dict(processor(text=[text], return_tensors="pt", **media))


AUDIO_FAMILIES: dict[str, Tiny] = {
    "qwen2_5_omni": Tiny(qwen2_5_omni, OMNI_SPECIAL, OMNI_TEMPLATE, omni_inputs),
    "qwen2_audio": Tiny(qwen2_audio, QWEN_SPECIAL, qwen2_audio_template(), qwen2_audio_inputs),
    "voxtral": Tiny(voxtral, VOXTRAL_SPECIAL, VOXTRAL_TEMPLATE, voxtral_inputs, part="input_audio"),
}

# Other shapes of the same families: windows of 30 s, another language model, another activation.
LLAMA = LlamaConfig(**sizes(QWEN_SPECIAL), tie_word_embeddings=False)
# VoxtralConfig fills what is missing with its own language model's, width of heads included.
MISTRAL = MistralConfig(
    **sizes(VOXTRAL_SPECIAL), tie_word_embeddings=False, head_dim=16, sliding_window=300
)
WHOLE = {"max_source_positions": 1500, "activation_function": "relu"}
OTHERWISE: dict[str, dict[str, Any]] = {
    "qwen2_5_omni": {
        "audio_config": OMNI_ENCODER
        | {"n_window": 70, "activation_function": "relu"}
        | {"max_source_positions": 70},
        "text_config": sizes(OMNI_SPECIAL)
        | mrope(4, 2, 2)
        | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3},
        "tie_word_embeddings": True,
    },
    "qwen2_audio": {"audio_config": QWEN_ENCODER | WHOLE, "text_config": LLAMA},
    "voxtral": {
        "audio_config": VOXTRAL_ENCODER | WHOLE,
        "text_config": MISTRAL,
        "projector_hidden_act": "relu",
    },
}


def write_audio_family(
    folder: Path, family: str, extractor: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """Writes the tiny checkpoint of a family; what it hears differs from time to time."""
    if family in VISION_FAMILIES:
        write_vision_family(folder, family, **changes)
        write_extractor(folder, **extractor or {})
        return folder
    tiny = AUDIO_FAMILIES[family]

    def make() -> PreTrainedModel:
        model = tiny.make(**changes)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn(parameter.shape)
            elif "audio_tower" in name or "projector" in name:
                parameter.data = torch.randn(parameter.shape) * (
                    0.5 if "position" in name else parameter[0].numel() ** -0.5
                )
        return model

    write_checkpoint(folder, make, (1, EXIT_LAYER), template=tiny.template, special=tiny.special)
    write_extractor(folder, **extractor or {})
    return folder


def write_processors(folder: Path, family: str, **changes: Any) -> None:
    """The files of a family's processors, the feature extractor's with changes."""
    if family in VISION_FAMILIES:
        VISION_FAMILIES[family].image_processor().save_pretrained(folder)
    write_extractor(folder, **changes)
