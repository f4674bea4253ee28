"""A tiny random checkpoint of every vision-language family, with its processor's own files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    WhisperFeatureExtractor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from edge_safe.models.safety_model import SafetyTokenModel
from tests.conftest import VOCABULARY, write_checkpoint
from tests.export import phi4_multimodal
from tests.export.extractors import write_extractor
from tests.export.families import EXIT_LAYER, FULL, SIZES, SLIDING, WINDOW

IMAGE = "<image>"
TILE_MARKERS = tuple(f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4))

# As llava-hf's: pictures first, each on a line of its own, then the texts.
LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% if message['role'] == 'assistant' %}{{ '<|safe|>' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)

# As SmolVLM's: a picture that stands first takes the space behind the role away.
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|safe|>' }}{% endif %}"
    "{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# As InternVL 3's: pictures in front of the words, each on a line of its own.
INTERNVL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{{ '<|safe|>' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# As Gemma 3's, whose template writes the first marker of a picture.
GEMMA3_TEMPLATE = (
    "{{ '<|endoftext|>' }}"
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{{ '<|safe|>' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)

# As LLaVA-OneVision's: pictures behind the role, the words on a line of their own.
ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{{ '\n' }}{% if message['role'] == 'assistant' %}{{ '<|safe|>' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# As Qwen-VL's: texts or parts; a picture between two markers, where it stands among the parts.
QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{{ '<|safe|>' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Tiny:
    """One family: how its model is made, its special tokens, its template and its processor.

    ``first`` is what its tokenizer puts in front of a text; ``named`` are special tokens by the
    names the processor has for them. ``cases`` are the inputs that its tower is compared on.
    ``finish`` writes what else its checkpoints have.
    """

    make: Callable[..., PreTrainedModel]
    special: tuple[str, ...]
    template: str | None
    image_processor: Callable[[], Any]
    processor: Callable[[Any, Any], Any]
    first: str | None = None
    named: tuple[tuple[str, str], ...] = ()
    cases: frozenset[str] = frozenset({"1 tiles", "3 tiles"})
    finish: Callable[[Path], None] | None = None


def sizes(special: tuple[str, ...]) -> dict[str, Any]:
    return SIZES | {"vocab_size": VOCABULARY + len(special), "max_position_embeddings": 1024}


CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
CLIP |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 7}
SIGLIP = CLIP | {"hidden_act": "gelu_pytorch_tanh"}
LLAVA_SPECIAL = (IMAGE,)
IDEFICS_SPECIAL = (
    IMAGE, "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *TILE_MARKERS,
)  # fmt: skip


def llava(**changes: Any) -> PreTrainedModel:
    """CLIP's states before its last layer, without the class embedding's."""
    own = {
        "vision_config": CLIPVisionConfig(**CLIP),
        "text_config": LlamaConfig(**sizes(LLAVA_SPECIAL)),
        "image_token_index": VOCABULARY,
    }
    return LlavaForConditionalGeneration(LlavaConfig(**own | changes))


INTERNVL_SPECIAL = ("<IMG_CONTEXT>", "<img>", "</img>", "<video>")
INTERNVL_NAMED = (
    ("context_image_token", "<IMG_CONTEXT>"),
    ("start_image_token", "<img>"),
    ("end_image_token", "</img>"),
    ("video_token", "<video>"),
)


def idefics3(**changes: Any) -> PreTrainedModel:
    """Tiles of 32 pixels become 4 features each."""
    vision = CLIP | {"image_size": 32, "patch_size": 8}
    own = {
        "vision_config": vision,
        "text_config": LlamaConfig(**sizes(IDEFICS_SPECIAL)),
        "image_token_id": VOCABULARY,
        "scale_factor": 2,
    }
    return Idefics3ForConditionalGeneration(Idefics3Config(**own | changes))


def smolvlm(**changes: Any) -> PreTrainedModel:
    """Like Idefics 3, tied."""
    vision = CLIP | {"image_size": 32, "patch_size": 8}
    own = {
        "vision_config": vision,
        "text_config": LlamaConfig(**sizes(IDEFICS_SPECIAL), tie_word_embeddings=True),
        "image_token_id": VOCABULARY,
        "scale_factor": 2,
        "tie_word_embeddings": True,
    }
    return SmolVLMForConditionalGeneration(SmolVLMConfig(**own | changes))


INTERN_VISION = CLIP | {"image_size": (28, 28), "patch_size": (7, 7), "attention_bias": True}


def internvl(**changes: Any) -> PreTrainedModel:
    """Tiles of 28 pixels become 4 features each; biases, no norms of queries and keys."""
    own = {
        "vision_config": INTERN_VISION,
        "text_config": Qwen2Config(**sizes(INTERNVL_SPECIAL)),
        "image_token_id": VOCABULARY,
        "tie_word_embeddings": False,
    }
    return InternVLForConditionalGeneration(InternVLConfig(**own | changes))


GEMMA3_SPECIAL = ("<image_soft_token>", "<start_of_image>", "<end_of_image>")
GEMMA3_NAMED = (
    ("image_token", "<image_soft_token>"),
    ("boi_token", "<start_of_image>"),
    ("eoi_token", "<end_of_image>"),
)
GEMMA3_TEXT = {
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": WINDOW,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "rope_parameters": {
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def gemma3(**changes: Any) -> PreTrainedModel:
    """A picture has 16 features, more than a window holds; the rows of the embedding are small."""
    own = {
        "vision_config": SiglipVisionConfig(**SIGLIP | {"image_size": 32, "patch_size": 4}),
        "text_config": Gemma3TextConfig(**sizes(GEMMA3_SPECIAL) | GEMMA3_TEXT),
        "image_token_index": VOCABULARY,
        "boi_token_index": VOCABULARY + 1,
        "eoi_token_index": VOCABULARY + 2,
        "mm_tokens_per_image": 16,
    }
    model = Gemma3ForConditionalGeneration(Gemma3Config(**own | changes))
    model.get_input_embeddings().weight.data *= 0.2
    return model


ONEVISION_SPECIAL = (IMAGE, "<video>")
# Height and width of the grids, in pixels; tiles of 28.
PINPOINTS = [[28 * r, 28 * c] for r, c in ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1), (3, 3))]


def llava_onevision(**changes: Any) -> PreTrainedModel:
    """Tiles of 28 pixels become 16 features each; maps of more than 2 tiles are made smaller."""
    own = {
        "vision_config": SiglipVisionConfig(**SIGLIP),
        "text_config": Qwen2Config(**sizes(ONEVISION_SPECIAL)),
        "image_token_index": VOCABULARY,
        "video_token_index": VOCABULARY + 1,
        "image_grid_pinpoints": PINPOINTS,
        "vision_aspect_ratio": "anyres_max_2",
    }
    return LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**own | changes))


def paligemma(**changes: Any) -> PreTrainedModel:
    """A picture has 16 features; the rows of the embedding are small."""
    text = sizes(LLAVA_SPECIAL) | {"head_dim": 32, "num_key_value_heads": 1}
    own = {
        "vision_config": SiglipVisionConfig(**SIGLIP),
        "text_config": GemmaConfig(**text),
        "image_token_index": VOCABULARY,
        "projection_dim": 64,
        # Tied, and with so much of a picture in front, it would repeat one word.
        "tie_word_embeddings": False,
    }
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig(**own | changes))
    model.get_input_embeddings().weight.data *= 0.2
    return model


QWEN_IMAGE = "<|image_pad|>"
QWEN_SPECIAL = (QWEN_IMAGE, "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
QWEN_IDS = {
    "image_token_id": VOCABULARY,
    "vision_start_token_id": VOCABULARY + 1,
    "vision_end_token_id": VOCABULARY + 2,
    "video_token_id": VOCABULARY + 3,
}
PATCHES = {"depth": 3, "num_heads": 2, "patch_size": 7}


def mrope(*sections: int, **more: Any) -> dict[str, Any]:
    """How many frequencies of a head turn by time, by row and by column."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"rope_parameters": rope | more}


def qwen2_vl(**changes: Any) -> PreTrainedModel:
    """Untied; a window in the last layers of the language model."""
    own: dict[str, Any] = {
        "vision_config": PATCHES | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        "text_config": sizes(QWEN_SPECIAL)
        | mrope(2, 3, 3)
        | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3},
    }
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(**QWEN_IDS | own | changes))


def qwen2_5_vl(**changes: Any) -> PreTrainedModel:
    """Tied; windows of 2 x 2 cells in the tower's first and last layer."""
    own: dict[str, Any] = {
        "vision_config": PATCHES
        | {"hidden_size": 32, "intermediate_size": 40, "out_hidden_size": 64}
        | {"window_size": 28, "fullatt_block_indexes": [1]},
        "text_config": sizes(QWEN_SPECIAL) | mrope(4, 2, 2),
        "tie_word_embeddings": True,
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**QWEN_IDS | own | changes))


def qwen3_vl(**changes: Any) -> PreTrainedModel:
    """Untied; heads wider than their share; one depth on either side of the gate."""
    own: dict[str, Any] = {
        "vision_config": PATCHES
        | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
        | {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2]},
        "text_config": sizes(QWEN_SPECIAL)
        | mrope(6, 5, 5, mrope_interleaved=True)
        | {"head_dim": 32},
    }
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**QWEN_IDS | own | changes))


OMNI_SPECIAL = (
    "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>",
    "<|IMAGE|>", "<|vision_bos|>", "<|vision_eos|>", "<|VIDEO|>",
)  # fmt: skip
OMNI_NAMED = (
    ("audio_token", "<|AUDIO|>"),
    ("audio_bos_token", "<|audio_bos|>"),
    ("audio_eos_token", "<|audio_eos|>"),
    ("image_token", "<|IMAGE|>"),
    ("vision_bos_token", "<|vision_bos|>"),
    ("vision_eos_token", "<|vision_eos|>"),
    ("video_token", "<|VIDEO|>"),
)
OMNI_IDS = {
    "audio_token_index": VOCABULARY,
    "audio_start_token_id": VOCABULARY + 1,
    "audio_end_token_id": VOCABULARY + 2,
    "image_token_index": VOCABULARY + 3,
    "vision_start_token_id": VOCABULARY + 4,
    "vision_end_token_id": VOCABULARY + 5,
    "video_token_index": VOCABULARY + 6,
}
# Chunks of 0.4 s.
OMNI_ENCODER = {
    "d_model": 32, "encoder_ffn_dim": 48, "encoder_layers": 2, "encoder_attention_heads": 2,
    "n_window": 20, "max_source_positions": 30, "output_dim": 64,
}  # fmt: skip

# As Qwen2.5-Omni's: a sound between markers of its own.
OMNI_TEMPLATE = (
    QWEN_TEMPLATE.replace("<|vision_start|>", "<|vision_bos|>")
    .replace(QWEN_IMAGE, "<|IMAGE|>")
    .replace("<|vision_end|>", "<|vision_eos|>")
    .replace(
        "{% elif 'text' in part %}",
        "{% elif part['type'] == 'audio' or 'audio' in part or 'audio_url' in part %}"
        "{{ '<|audio_bos|><|AUDIO|><|audio_eos|>' }}"
        "{% elif 'text' in part %}",
    )
)


def qwen2_5_omni(**changes: Any) -> PreTrainedModel:
    """The part that answers; untied; windows as ``qwen2_5_vl``; its answers name no media."""
    own: dict[str, Any] = {
        "vision_config": PATCHES
        | {"hidden_size": 32, "intermediate_size": 40, "out_hidden_size": 64}
        | {"window_size": 28, "fullatt_block_indexes": [1]},
        "audio_config": OMNI_ENCODER,
        "text_config": sizes(OMNI_SPECIAL) | mrope(2, 3, 3),
    }
    config = Qwen2_5OmniThinkerConfig(**OMNI_IDS | own | changes)
    model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    if not config.tie_word_embeddings:
        # A placeholder in an answer would be one medium too many in the next turn.
        model.lm_head.weight.data[VOCABULARY:] = 0.0
    return model


def with_voice(folder: Path) -> None:
    """Makes of the part that answers the whole model, as it is published."""
    write_extractor(folder)
    weights = load_file(folder / "model.safetensors")
    whole = {f"thinker.{name}": tensor for name, tensor in weights.items()}
    for part in ("talker.model.norm", "token2wav.code2wav_dit_model.norm"):
        whole[f"{part}.weight"] = torch.full((64,), torch.nan)
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    config = {"model_type": "qwen2_5_omni", "thinker_config": json.loads(path.read_text())}
    path.write_text(json.dumps(config))


class QwenPictures(Qwen2VLProcessor):
    """Qwen2-VL's processor without its part for videos, which needs a package more."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str) -> None:
        self.image_token, self.video_token = QWEN_IMAGE, "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def qwen_processor(images: Any, tokenizer: Any) -> Any:
    """All of Qwen-VL's families write pictures as the first one does."""
    return QwenPictures(images, tokenizer, tokenizer.chat_template)


def llava_processor(images: Any, tokenizer: Any) -> Any:
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def idefics_processor(images: Any, tokenizer: Any) -> Any:
    """SmolVLM's own needs a package for videos; for pictures it is Idefics 3's word for word."""
    return Idefics3Processor(
        images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
    )


class PicturesOnly(ProcessorMixin):
    """A processor without its part for videos, which needs a package of its own."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        if name == "video_processor":
            return None
        return super().check_argument_for_proper_class(name, argument)


class InternVLPictures(PicturesOnly, InternVLProcessor):
    pass


def internvl_processor(images: Any, tokenizer: Any) -> Any:
    return InternVLPictures(
        images, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template
    )


class OmniWithoutVideos(PicturesOnly, Qwen2_5OmniProcessor):
    pass


def omni_processor(images: Any, tokenizer: Any, extractor: Any = None) -> Any:
    return OmniWithoutVideos(
        images,
        None,
        extractor or WhisperFeatureExtractor(feature_size=128),
        tokenizer,
        tokenizer.chat_template,
    )


def gemma3_processor(images: Any, tokenizer: Any) -> Any:
    return Gemma3Processor(
        images, tokenizer, image_seq_length=16, chat_template=tokenizer.chat_template
    )


class PaliGemmaChat(PaliGemmaProcessor):
    """The processor for messages: pictures, then words; without pictures what is left of both."""

    def apply_chat_template(self, messages: Any, **_: Any) -> Any:
        (message,) = messages
        pictures = [p["image"] for p in message["content"] if p["type"] == "image"]
        (text,) = [p["text"] for p in message["content"] if p["type"] == "text"]
        if pictures:
            return self(
                images=[pictures], text="<image>" * len(pictures) + text, return_tensors="pt"
            )
        return self.tokenizer(
            f"{self.tokenizer.bos_token}{text}\n", add_special_tokens=False, return_tensors="pt"
        )


def paligemma_processor(images: Any, tokenizer: Any) -> Any:
    images.image_seq_length = 16
    # Tokens for places and shapes are no part of the tiny vocabulary.
    tokenizer.add_tokens = lambda tokens: None
    return PaliGemmaChat(images, tokenizer)


class TurnImages(LlavaOnevisionImageProcessorPil):
    """Told of the pictures in each turn, takes each turn for a conversation of its own.

    transformers pads every picture of a conversation with several, whichever turn it is in.
    """

    turns: tuple[int, ...] = ()

    def preprocess(self, images: Any, **options: Any) -> Any:
        if len(self.turns) > 1:
            rest = [image for conversation in images for image in conversation]
            images = [[rest.pop(0) for _ in range(count)] for count in self.turns]
        return super().preprocess(images, **options)


class OneVisionPictures(PicturesOnly, LlavaOnevisionProcessor):
    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        counts = [sum(p["type"] == "image" for p in m["content"]) for m in messages]
        self.image_processor.turns = tuple(filter(None, counts))
        return super().apply_chat_template(messages, **options)


def onevision_processor(images: Any, tokenizer: Any) -> Any:
    images.__class__ = TurnImages
    return OneVisionPictures(
        images,
        tokenizer,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        chat_template=tokenizer.chat_template,
    )


TILES = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}}
SQUARE = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
CELLS_OF_14 = {"patch_size": 7, "size": {"shortest_edge": 28 * 28, "longest_edge": 70 * 70}}
PATCH_CASES = frozenset({"1 x 1 cells", "5 x 9 cells", "8 x 3 cells"})
VISION_FAMILIES: dict[str, Tiny] = {
    "gemma3": Tiny(
        gemma3,
        GEMMA3_SPECIAL,
        GEMMA3_TEMPLATE,
        lambda: Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
        gemma3_processor,
        named=GEMMA3_NAMED,
    ),
    "idefics3": Tiny(
        idefics3,
        IDEFICS_SPECIAL,
        SMOLVLM_TEMPLATE,
        lambda: Idefics3ImageProcessorPil(**TILES),
        idefics_processor,
    ),
    "internvl": Tiny(
        internvl,
        INTERNVL_SPECIAL,
        INTERNVL_TEMPLATE,
        lambda: GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, max_patches=6),
        internvl_processor,
        named=INTERNVL_NAMED,
    ),
    "llava": Tiny(
        llava,
        LLAVA_SPECIAL,
        LLAVA_TEMPLATE,
        lambda: LlavaImageProcessorPil(**SQUARE),
        llava_processor,
        first="<|endoftext|>",
    ),
    "llava_onevision": Tiny(
        llava_onevision,
        ONEVISION_SPECIAL,
        ONEVISION_TEMPLATE,
        lambda: LlavaOnevisionImageProcessorPil(
            size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS
        ),
        onevision_processor,
    ),
    "paligemma": Tiny(
        paligemma,
        LLAVA_SPECIAL,
        None,
        lambda: SiglipImageProcessorPil(size={"height": 28, "width": 28}),
        paligemma_processor,
        first="<|endoftext|>",
        named=(("image_token", IMAGE),),
    ),
    "phi4_multimodal": Tiny(
        phi4_multimodal.phi4_multimodal,
        phi4_multimodal.SPECIAL,
        phi4_multimodal.TEMPLATE,
        phi4_multimodal.Files,
        lambda _, tokenizer: phi4_multimodal.Processor(tokenizer),
        cases=frozenset({"1 tiles", "3 tiles", "a corner"}),
    ),
    "qwen2_5_omni": Tiny(
        qwen2_5_omni,
        OMNI_SPECIAL,
        OMNI_TEMPLATE,
        lambda: Qwen2VLImageProcessorPil(**CELLS_OF_14),
        omni_processor,
        named=OMNI_NAMED,
        cases=PATCH_CASES,
        finish=with_voice,
    ),
    "qwen2_5_vl": Tiny(
        qwen2_5_vl,
        QWEN_SPECIAL,
        QWEN_TEMPLATE,
        lambda: Qwen2VLImageProcessorPil(**CELLS_OF_14),
        qwen_processor,
        cases=PATCH_CASES,
    ),
    "qwen2_vl": Tiny(
        qwen2_vl,
        QWEN_SPECIAL,
        QWEN_TEMPLATE,
        lambda: Qwen2VLImageProcessorPil(**CELLS_OF_14),
        qwen_processor,
        cases=PATCH_CASES,
    ),
    "qwen3_vl": Tiny(
        qwen3_vl,
        QWEN_SPECIAL,
        QWEN_TEMPLATE,
        lambda: Qwen2VLImageProcessorPil(**CELLS_OF_14),
        qwen_processor,
        cases=PATCH_CASES,
    ),
    "smolvlm": Tiny(
        smolvlm,
        IDEFICS_SPECIAL,
        SMOLVLM_TEMPLATE,
        lambda: SmolVLMImageProcessorPil(**TILES),
        idefics_processor,
    ),
}

# Other shapes of the same families, and what has to be told to the image processor of each.
OTHERWISE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llava with siglip, several layers": (
        "llava",
        {
            "vision_config": SiglipVisionConfig(**SIGLIP),
            "vision_feature_layer": [-2, 1, -1],
            "vision_feature_select_strategy": "full",
            "projector_hidden_act": "gelu_pytorch_tanh",
        },
        {},
    ),
    "llava with a padded picture and qwen2": (
        "llava",
        {"text_config": Qwen2Config(**sizes(LLAVA_SPECIAL)), "multimodal_projector_bias": False},
        {"do_pad": True},
    ),
    "internvl with other norms": (
        "internvl",
        {
            "vision_config": INTERN_VISION
            | {"norm_type": "rms_norm", "use_qk_norm": True, "use_mean_pooling": False},
            "text_config": LlamaConfig(**sizes(INTERNVL_SPECIAL)),
        },
        {},
    ),
    "internvl from an earlier layer": (
        "internvl",
        {
            "vision_config": INTERN_VISION | {"use_absolute_position_embeddings": False},
            "vision_feature_layer": -2,
            "downsample_ratio": 0.25,
            "text_config": Qwen3Config(**sizes(INTERNVL_SPECIAL), head_dim=32),
            "projector_hidden_act": "gelu_pytorch_tanh",
        },
        {},
    ),
    "gemma3 with few features, untied": (
        "gemma3",
        {
            "mm_tokens_per_image": 4,
            "tie_word_embeddings": False,
        },
        {},
    ),
    "llava_onevision with clip and maps as they are": (
        "llava_onevision",
        {
            "vision_config": CLIPVisionConfig(**CLIP),
            "vision_feature_select_strategy": "default",
            "vision_feature_layer": [-2, 1],
            "vision_aspect_ratio": "anyres_max_9",
            "text_config": LlamaConfig(**sizes(ONEVISION_SPECIAL)),
        },
        {},
    ),
    "qwen2_vl with gelu and yarn": (
        "qwen2_vl",
        {
            "vision_config": PATCHES
            | {"embed_dim": 48, "hidden_size": 64, "hidden_act": "gelu_pytorch_tanh"},
            "text_config": sizes(QWEN_SPECIAL)
            | mrope(2, 3, 3, rope_type="yarn", factor=4.0, original_max_position_embeddings=256),
        },
        {},
    ),
    "qwen2_5_vl with cells of 3 x 3 patches": (
        "qwen2_5_vl",
        {
            "vision_config": PATCHES
            | {"hidden_size": 32, "intermediate_size": 40, "out_hidden_size": 64}
            | {"window_size": 70, "fullatt_block_indexes": [], "spatial_merge_size": 3}
        },
        {"merge_size": 3},
    ),
    "qwen3_vl with features behind the gate": (
        "qwen3_vl",
        {
            "vision_config": PATCHES
            | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
            | {"num_position_embeddings": 16, "deepstack_visual_indexes": [2, 0, 1]},
            "text_config": sizes(QWEN_SPECIAL)
            | mrope(3, 3, 2)
            | {"attention_bias": True, "head_dim": 16},
        },
        {},
    ),
    "idefics3 without tiles": ("idefics3", {"scale_factor": 4}, {"do_image_splitting": False}),
}


TOWER_PARTS = (
    "vision", "visual", "projector", "connector", "audio_tower", "embed_tokens_extend",
)  # fmt: skip


def write_vision_family(
    folder: Path, family: str, pictures: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """Writes the tiny checkpoint of a family; what it sees differs from place to place."""
    tiny = VISION_FAMILIES[family]

    def make() -> PreTrainedModel:
        model = tiny.make(**changes)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn(parameter.shape)
            elif any(part in name for part in TOWER_PARTS):
                parameter.data = torch.randn(parameter.shape) * (
                    0.5 if "position" in name else parameter[0].numel() ** -0.5
                )
        return model

    write_checkpoint(folder, make, (1, EXIT_LAYER), template=tiny.template, special=tiny.special)
    images = tiny.image_processor()
    images.save_pretrained(folder)
    if pictures:
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | pictures))
    if tiny.named:
        path = folder / "tokenizer_config.json"
        named = {"model_specific_special_tokens": dict(tiny.named)}
        path.write_text(json.dumps(json.loads(path.read_text()) | named))
    if tiny.first is not None:
        add_first_token(folder, tiny.first)
    if tiny.finish is not None:
        tiny.finish(folder)
    return folder


def add_first_token(folder: Path, token: str) -> None:
    """Lets the tokenizer put a token in front of every text, as Llama's does."""
    from tokenizers import Tokenizer, processors

    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.token_to_id(token))]
    )
    tokenizer.save(str(path))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": token}))


def torch_of(folder: Path, family: str) -> SafetyTokenModel:
    """The checkpoint in torch, as its authors mean it to see."""
    if family == "phi4_multimodal":
        return phi4_multimodal.opened(folder)
    return SafetyTokenModel.from_pretrained(folder)


def image_id_of(torch_model: SafetyTokenModel) -> int:
    """Id of what stands for one feature of a picture."""
    config: Any = torch_model.model.config
    inside = config.vision_config if config.model_type == "phi4_multimodal" else config
    return int(inside.image_token_id)


def hugging_face_processor(folder: Path, family: str) -> Any:
    """The checkpoint's own processor."""
    from transformers import AutoImageProcessor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = None
    if family != "phi4_multimodal":
        images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return VISION_FAMILIES[family].processor(images, tokenizer)
