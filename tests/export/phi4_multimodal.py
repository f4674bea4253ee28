"""A tiny random Phi-4-multimodal, its files, and what transformers makes of its prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    PreTrainedModel,
)

from edge_safe.models.safety_model import SafetyTokenModel
from edge_safe.runtime.image_io import read_image
from edge_safe.runtime.image_steps import FillCrops, Pixels, PixelValues, pixel_values
from tests.conftest import VOCABULARY
from tests.export.families import SIZES

IMAGE, AUDIO = "<|image|>", "<|audio|>"
SPECIAL = (IMAGE, AUDIO)
# 32 x 32 patches, as transformers' processor counts 256 features whatever a crop has.
SIDE, PATCH = 64, 2
RATE = 16_000

# As the one beside the weights in transformers' format; it takes texts or parts.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{{ '<|safe|>' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|image|>' }}"
    "{% elif part['type'] == 'audio' %}{{ '<|audio|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": SIDE, "crop_size": SIDE, "patch_size": PATCH, "image_token_id": VOCABULARY,
}  # fmt: skip
ENCODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_blocks": 2, "num_attention_heads": 2,
    "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 16,
    "audio_token_id": VOCABULARY + 1,
}  # fmt: skip
TEXT = SIZES | {
    "vocab_size": VOCABULARY + len(SPECIAL),
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 2048,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
    },
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
    "short_factor": [1.0 + n / 8 for n in range(8)], "long_factor": [2.0 + n for n in range(8)],
    "original_max_position_embeddings": 2048,
}  # fmt: skip


def phi4_multimodal(**changes: Any) -> PreTrainedModel:
    """Untied; half of each head turns; heads of 32 for queries, one for keys."""
    own: dict[str, Any] = {
        "vision_config": VISION, "audio_config": ENCODER, "tie_word_embeddings": False,
    }  # fmt: skip
    model = Phi4MultimodalForCausalLM(Phi4MultimodalConfig(**TEXT | own | changes))
    # Against hundreds of features words would be too quiet for answers of more than one.
    model.get_input_embeddings().weight.data *= 4
    return model


class Files:
    """One file for pictures and sound, as published; the image processor needs torchvision."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes

    def save_pretrained(self, folder: Path) -> None:
        Phi4MultimodalFeatureExtractor().save_pretrained(folder)
        path = folder / "preprocessor_config.json"
        pictures = {
            "image_processor_type": "Phi4MultimodalImageProcessorFast",
            "size": {"height": SIDE, "width": SIDE},
            "patch_size": PATCH,
            "dynamic_hd": 36,
        }
        path.write_text(json.dumps(json.loads(path.read_text()) | pictures | self.changes))


def crops_of(image: Any, side: int = SIDE, patch: int = PATCH, most: int = 36) -> PixelValues:
    """The runtime's pixel values, which ``test_image_processors`` compares with transformers'."""
    half = (0.5, 0.5, 0.5)
    pixels = Pixels(
        steps=[FillCrops(side, patch, most)],
        rescale_factor=1 / 255,
        image_mean=half,
        image_std=half,
    )
    return pixel_values(read_image(image), pixels)


class Processor:
    """What transformers makes of a conversation.

    Its own processor needs torchvision; with that ``test_phi4_multimodal`` compares its ids. Here
    features are counted by its formula, from the mask alone.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def apply_chat_template(self, messages: Any, **_: Any) -> dict[str, Any]:
        """Of a conversation with pictures alone."""
        images = [p["image"] for m in messages for p in m["content"] if p["type"] == "image"]
        return {"input_ids": self.ids(messages), **pictures(images)}

    def ids(self, messages: Any) -> torch.Tensor:
        """(1, T), placeholders for every feature; ``sound`` of a part are samples at 16 kHz."""
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        written = ""
        for part in [part for message in messages for part in message["content"]]:
            if part["type"] == "text":
                continue
            mark = {"image": IMAGE, "audio": AUDIO}[part["type"]]
            if part["type"] == "image":
                features = count(whole_mask(crops_of(part["image"])))
            else:
                features = int(heard(part["sound"])["audio_embed_sizes"][0])
            before, _, text = text.partition(mark)
            written += before + mark * features
        found: torch.Tensor = self.tokenizer(
            written + text, add_special_tokens=False, return_tensors="pt"
        )["input_ids"]
        return found


def whole_mask(picture: PixelValues) -> np.ndarray:
    """(rows, columns) of the patches of all crops."""
    assert picture.mask is not None
    shape = (picture.rows, picture.columns, *picture.mask.shape[1:])
    return np.block([list(row) for row in picture.mask[1:].reshape(shape)])


def count(mask: np.ndarray) -> int:
    """Features of a picture with the mask (rows, columns) of its crops."""
    seen = mask[::2, ::2]
    return int(256 + 1 + seen.sum() + seen[:, 0].sum() + 16)


def pictures(images: Sequence[Image.Image]) -> dict[str, Any]:
    """Pixel values, masks and sizes as transformers stacks them, filled up to as many crops."""
    if not images:
        return {}
    found = [crops_of(image) for image in images]
    most = max(len(picture.values) for picture in found)
    values = np.zeros((len(found), most, 3, SIDE, SIDE), np.float32)
    masks = np.ones((len(found), most, SIDE // PATCH, SIDE // PATCH), np.float32)
    for number, picture in enumerate(found):
        values[number, : len(picture.values)] = picture.values
        masks[number, : len(picture.values)] = picture.mask
    sizes = [[picture.rows * SIDE, picture.columns * SIDE] for picture in found]
    return {
        "image_pixel_values": torch.from_numpy(values),
        "image_attention_mask": torch.from_numpy(masks),
        "image_sizes": torch.tensor(sizes),
    }


def heard(sound: np.ndarray) -> dict[str, Any]:
    """One sound as transformers prepares it."""
    extractor = Phi4MultimodalFeatureExtractor()
    return dict(extractor([sound], sampling_rate=RATE, return_tensors="pt"))


def opened(folder: Path) -> SafetyTokenModel:
    """The model in torch, its tower's patches seeing all others.

    With transformers' fused attention those of a picture without white see the ones before alone.
    """
    torch_model = SafetyTokenModel.from_pretrained(folder)
    model: Any = torch_model.model
    model.model.embed_tokens_extend.image_embed.img_processor.set_attn_implementation("eager")
    return torch_model
