"""pebble in torch: opens and saves it, and runs its language model over prompts with media."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from edge_safe.errors import CheckpointError
from edge_safe.models.onnx_graph import GraphSpec, OnnxGraph
from edge_safe.models.pebble import assembly
from edge_safe.models.pebble.configuration_pebble import PebbleConfig
from edge_safe.models.pebble.efficientnet_lite import EfficientNetLite
from edge_safe.models.pebble.object_projector import ObjectProjector
from edge_safe.models.pebble.projectors import SequenceProjector
from edge_safe.models.pebble.prompt_merging import (
    MergedPrompt,
    audio_features,
    image_features,
    merge_prompts,
)
from edge_safe.models.pebble.respelling import Respelling
from edge_safe.models.pebble.speech_decoder import SpeechDecoder
from edge_safe.models.pebble.speech_encoder import SpeechEncoder
from edge_safe.models.pebble.speech_words import SpeechWords
from edge_safe.models.pebble.towers import Towers


class PebbleForConditionalGeneration(Towers, PreTrainedModel, GenerationMixin):
    """A language model with a text reader, an object encoder and a speech encoder.

    One id of ``input_ids`` stands for each picture and each recording; how many embeddings take
    its place is known only when the towers have run, so the prompt grows while it is merged.
    """

    config_class = PebbleConfig
    config: PebbleConfig
    base_model_prefix = ""
    input_modalities = ["text", "image", "audio"]  # noqa: RUF012 - as transformers has it
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["LlamaDecoderLayer", "WhisperEncoderLayer"]  # noqa: RUF012 - as transformers has it

    def __init__(self, config: PebbleConfig) -> None:
        super().__init__(config)
        if config.text_detector is None or config.text_recognizer is None:
            raise CheckpointError(
                "This configuration of pebble is the small form, without the towers' graphs. Open "
                "it with PebbleForConditionalGeneration.from_pretrained(folder)."
            )
        self.language_model = LlamaForCausalLM(config.text_config)
        self.text_detector = OnnxGraph(GraphSpec.from_dict(config.text_detector))
        self.text_recognizer = OnnxGraph(GraphSpec.from_dict(config.text_recognizer))
        self.text_projector = SequenceProjector(config.text_projector_config)
        vision = config.vision_config
        self.vision_encoder = EfficientNetLite(vision["stem"], config.vision_stages, vision["head"])
        self.vision_projector = ObjectProjector(config.vision_projector_config)
        self.audio_encoder = SpeechEncoder(config.audio_config)
        self.audio_decoder = SpeechDecoder(config.audio_config)
        self.respelling = None
        self.speech_words = None
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        wheels: Path | None = None,
        untrained: bool = False,
        **kwargs: Any,
    ) -> PebbleForConditionalGeneration:
        """Opens a folder in either form.

        Args:
            pretrained_model_name_or_path: The folder.
            *args: Passed on to transformers (full form).
            wheels: Folder of wheels to take the parts from (small form).
            untrained: Leave out what was trained here and start from the parts (small form).
            **kwargs: Passed on to transformers; the small form looks at ``config``, ``dtype`` and
                ``torch_dtype`` alone.

        Raises:
            PartsError: A part cannot be had.
            CheckpointError: ``pebble.safetensors`` does not fit.
        """
        config = kwargs.get("config") or PebbleConfig.from_pretrained(pretrained_model_name_or_path)
        if not config.is_small_form:
            opened: PebbleForConditionalGeneration = super().from_pretrained(
                pretrained_model_name_or_path, *args, **kwargs
            )
            opened.respelling = Respelling.beside(Path(pretrained_model_name_or_path))
            opened.speech_words = SpeechWords.beside(Path(pretrained_model_name_or_path))
            return opened
        folder = Path(pretrained_model_name_or_path)
        parts = assembly.collect(config, wheels)
        model = cls(assembly.full_config(config, parts))
        model.name_or_path = str(folder)
        assembly.fill(model, parts)
        model.respelling = Respelling.beside(parts.language_model)
        model.speech_words = SpeechWords(parts.audio_tokenizer.read_bytes())
        if untrained:
            for modality in model.config.modalities.values():
                modality["trained"] = False
        else:
            assembly.load_trained(model, parts, folder)
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype") or torch.float32
        if isinstance(dtype, str):
            dtype = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        nn.Module.to(model, dtype=dtype)
        model.train(False)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]
        """Writes the full form; the tokenizer of the speech decoder stands beside the weights."""
        super().save_pretrained(save_directory, **kwargs)
        if self.speech_words is not None:
            self.speech_words.save(Path(save_directory))

    def save_trained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes the small form: what was trained here, and which parts the rest comes from.

        Raises:
            CheckpointError: The model was not assembled from parts.
        """
        assembly.save_trained(self, Path(save_directory))

    def get_input_embeddings(self) -> nn.Module:
        """The language model's embedding."""
        embedding: nn.Module = self.language_model.get_input_embeddings()
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head, tied to its embedding."""
        head: nn.Module = self.language_model.get_output_embeddings()
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the language model's head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self, modality: str | None = None) -> nn.Module:
        """The language model without its head, or the encoder of a modality."""
        if modality == "audio":
            return self.audio_encoder
        if modality == "image":
            return self.vision_encoder
        decoder: nn.Module = self.language_model.model
        return decoder

    def merge(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        line_pixel_values: Tensor | None = None,
        line_widths: Tensor | None = None,
        line_images: Tensor | None = None,
        object_pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        pad_left: bool = False,
    ) -> MergedPrompt:
        """Puts the media's embeddings where their placeholders stand.

        Args:
            input_ids: (B, T) with one id per picture and recording.
            attention_mask: (B, T), 1 at real positions.
            labels: (B, T).
            line_pixel_values: (N, 3, 48, W), see ``read_lines``.
            line_widths: (N,).
            line_images: (N,) picture, counted over the batch, that each line was cut from.
            object_pixel_values: (I, 3, 224, 224) for every picture, or None to leave objects out.
            input_features: (A, 80, frames).
            audio_lengths: (A,).
            pad_left: Aligns prompts at their ends, as decoding a batch wants it.

        Raises:
            CheckpointError: The number of placeholders is not that of the media.
        """
        images = int((input_ids == self.config.image_token_id).sum())
        recordings = int((input_ids == self.config.audio_token_id).sum())
        seen = image_features(
            self, images, line_pixel_values, line_widths, line_images, object_pixel_values
        )
        heard = audio_features(self, recordings, input_features, audio_lengths)
        return merge_prompts(self, input_ids, attention_mask, labels, seen, heard, pad_left)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        line_pixel_values: Tensor | None = None,
        line_widths: Tensor | None = None,
        line_images: Tensor | None = None,
        object_pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Runs the language model over a batch of prompts.

        With media the output has the positions of the merged prompt (see ``merge``); call
        ``merge`` first to know them.

        Returns:
            The language model's output: ``loss`` with labels, ``logits``, ``hidden_states`` ...
        """
        media = (line_pixel_values, object_pixel_values, input_features)
        # A placeholder that was decoded stands for nothing; it is embedded like any other token.
        decoded = past_key_values is not None and past_key_values.get_seq_length() > 0
        prompted = not decoded or any(m is not None for m in media)
        if input_ids is not None and prompted and self._has_media(input_ids, media):
            prompt = self.merge(
                input_ids,
                attention_mask,
                labels,
                line_pixel_values,
                line_widths,
                line_images,
                object_pixel_values,
                input_features,
                audio_lengths,
            )
            input_ids, inputs_embeds = None, prompt.inputs_embeds
            attention_mask, labels = prompt.attention_mask, prompt.labels
        output: CausalLMOutputWithPast = self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **kwargs,
        )
        return output

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self, inputs: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Decodes; takes ``merge``'s media beside transformers' own arguments.

        Returns:
            As in transformers. With media and a plain tensor result, the ids of the prompt as
            given, one per picture and recording, stand in front of the new ones.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        names = (
            "line_pixel_values",
            "line_widths",
            "line_images",
            "object_pixel_values",
            "input_features",
            "audio_lengths",
        )
        media = {name: kwargs.pop(name, None) for name in names}
        if input_ids is None or not self._has_media(input_ids, tuple(media.values())):
            return GenerationMixin.generate(cast(Any, self), input_ids, **kwargs)
        mask = kwargs.pop("attention_mask", None)
        prompt = self.merge(input_ids, mask, pad_left=True, **media)
        output = GenerationMixin.generate(
            cast(Any, self),
            inputs_embeds=prompt.inputs_embeds,
            attention_mask=prompt.attention_mask,
            **kwargs,
        )
        return torch.cat([input_ids, output], 1) if isinstance(output, Tensor) else output

    def _has_media(self, input_ids: Tensor, media: Sequence[Tensor | None]) -> bool:
        ids = (
            self.config.image_token_id,
            self.config.audio_token_id,
            self.config.media_end_token_id,
        )
        return any(m is not None for m in media) or any(bool((input_ids == i).any()) for i in ids)
