"""pebble in torch: merges what the towers see, read and hear into the language model's prompt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
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
from edge_safe.models.pebble.respelling import Respelling
from edge_safe.models.pebble.speech_decoder import SpeechDecoder
from edge_safe.models.pebble.speech_encoder import STATES_PER_SECOND, SpeechEncoder
from edge_safe.models.pebble.speech_words import WORDS_FILE, SpeechWords

IGNORED_LABEL = -100


@dataclass(slots=True)
class MergedPrompt:
    """A batch of prompts with their media in place.

    Attributes:
        inputs_embeds: (B, S, d).
        attention_mask: (B, S) int64, 0 at padding.
        labels: (B, S) int64 with -100 at media and padding, or None.
        image_tokens: Embeddings of each prompt that stand for pictures.
        audio_tokens: Embeddings of each prompt that stand for sound.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    image_tokens: list[int]
    audio_tokens: list[int]


class PebbleForConditionalGeneration(PreTrainedModel, GenerationMixin):
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
        self.respelling: Respelling | None = None
        self.speech_words: SpeechWords | None = None
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

    def read_lines(self, line_pixel_values: Tensor, line_widths: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the recognizer over cut lines, each at its own width.

        The recognizer looks at the whole of its input, so a line padded to another's width would
        be read differently; lines of the same width go together.

        Args:
            line_pixel_values: (N, 3, 48, W) in [-1, 1], blue first, padded on the right.
            line_widths: (N,) int64 own width of each line, a multiple of 8.

        Returns:
            states: (N, T, c), padded on the right with zeros.
            lengths: (N,) int64.
        """
        widths = line_widths.tolist()
        rows: list[Tensor] = [line_pixel_values.new_zeros(0)] * len(widths)
        for width in sorted(set(widths)):
            same = [i for i, other in enumerate(widths) if other == width]
            states = self.text_recognizer(line_pixel_values[same, :, :, :width])
            for i, row in zip(same, states, strict=True):
                rows[i] = row
        lengths = torch.tensor([len(row) for row in rows], device=line_pixel_values.device)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths

    def embed_text_lines(
        self, line_pixel_values: Tensor, line_widths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cut lines -> (M, d) word-piece embeddings in reading order and (M,) their line."""
        states, lengths = self.read_lines(line_pixel_values, line_widths)
        if self.config.text_projector_config.pieces:
            return self._embed_pieces(self.read_states(states, lengths))
        features, line = self.text_projector.project(states, lengths, self._tied_embedding)
        return features, line

    def read_states(self, states: Tensor, lengths: Tensor) -> list[list[int]]:
        """Word-piece ids of each line, as ``hear`` gives those of recordings.

        Args:
            states: (N, T, c) of ``read_lines``.
            lengths: (N,).
        """
        _, line, pieces = self.text_projector.read(states, lengths, self._tied_embedding)
        return self._respelled(self.text_projector, line, pieces, len(states))

    def embed_objects(self, object_pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(I, 3, 224, 224) pictures -> (M, d) word pieces that name them, (M,) their picture."""
        states = self.vision_encoder(object_pixel_values)
        features, picture, _ = self.vision_projector.project(states, self._tied_embedding)
        return features, picture

    def name_states(self, states: Tensor) -> list[int]:
        """Word-piece ids that name what one picture's states (1, cells, c) show."""
        _, _, pieces = self.vision_projector.project(states, self._tied_embedding)
        ids: list[int] = pieces.tolist()
        return ids

    def embed_speech(self, input_features: Tensor, audio_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Embeds recordings.

        Args:
            input_features: (A, 80, frames) log-mel, as long as the longest one's window.
            audio_lengths: (A,) int64 encoder states (20 ms each) that are not padding.

        Returns:
            features: (M, d).
            recording: (M,) int64.
        """
        return self._embed_pieces(self.hear(input_features, audio_lengths))

    def hear(self, input_features: Tensor, audio_lengths: Tensor) -> list[list[int]]:
        """Word-piece ids of what was said in each recording; arguments as of ``embed_speech``.

        They are those of the typed words.

        Raises:
            CheckpointError: The model was opened without its tokenizers.
        """
        return [self.typed_words(ids) for ids in self.write_down(input_features, audio_lengths)]

    def write_down(self, input_features: Tensor, audio_lengths: Tensor) -> list[list[int]]:
        """Whisper's tokens of what was said in each recording; arguments as of ``embed_speech``."""
        states = self.audio_encoder.hear(input_features, audio_lengths)
        settings = self.config.transcription
        return [
            # The window's silence behind the sound is not attended to.
            self.audio_decoder.write_down(row[None, :length], length / STATES_PER_SECOND, settings)
            for row, length in zip(states, audio_lengths.tolist(), strict=True)
        ]

    def typed_words(self, heard: Sequence[int]) -> list[int]:
        """Word-piece ids that the text of Whisper's tokens has when it is typed.

        Raises:
            CheckpointError: The model was opened without its tokenizers.
        """
        if self.speech_words is None or self.respelling is None:
            raise CheckpointError(
                "This pebble was opened without its tokenizers, so it cannot say what it hears. "
                f"Put tokenizer.json and {WORDS_FILE} beside it and open it again."
            )
        return self.respelling.typed(self.speech_words.text(heard))

    def _respelled(
        self, projector: SequenceProjector, row: Tensor, pieces: Tensor, rows: int
    ) -> list[list[int]]:
        """(M,) pieces of the rows (M,) as ids of each row.

        Where the projector spells with pieces of its own, and the model knows its tokenizer, they
        become those of the typed words.
        """
        read = [pieces[row == i].tolist() for i in range(rows)]
        if self.respelling is None or not projector.config.pieces:
            return read
        return [self.respelling(ids) for ids in read]

    def _embed_pieces(self, read: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids of each row -> (M, d) embeddings and (M,) their row."""
        embedding = self._tied_embedding
        ids = torch.tensor([i for row in read for i in row], device=embedding.device)
        counts = torch.tensor([len(row) for row in read], device=embedding.device)
        rows = torch.arange(len(read), device=embedding.device).repeat_interleave(counts)
        return embedding[ids.long()], rows

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
        ids = self.config
        images = int((input_ids == ids.image_token_id).sum())
        recordings = int((input_ids == ids.audio_token_id).sum())
        seen = self._image_features(
            images, line_pixel_values, line_widths, line_images, object_pixel_values
        )
        heard = self._audio_features(recordings, input_features, audio_lengths)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        rows: list[Tensor] = []
        row_labels: list[Tensor] = []
        image_tokens: list[int] = []
        audio_tokens: list[int] = []
        for row in range(len(input_ids)):
            real = attention_mask[row].bool()
            merged, kept_labels, counts = self._merge_row(
                input_ids[row][real], None if labels is None else labels[row][real], seen, heard
            )
            rows.append(merged)
            if kept_labels is not None:
                row_labels.append(kept_labels)
            image_tokens.append(counts[0])
            audio_tokens.append(counts[1])
        side = "left" if pad_left else "right"
        pad = nn.utils.rnn.pad_sequence
        embeds = pad(rows, batch_first=True, padding_side=side)
        ones = [torch.ones(len(r), dtype=torch.long, device=embeds.device) for r in rows]
        mask = pad(ones, batch_first=True, padding_side=side)
        merged_labels = None
        if labels is not None:
            merged_labels = pad(
                row_labels, batch_first=True, padding_value=IGNORED_LABEL, padding_side=side
            )
        return MergedPrompt(embeds, mask, merged_labels, image_tokens, audio_tokens)

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
        if input_ids is not None and self._has_media(input_ids, media):
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

    @property
    def _tied_embedding(self) -> Tensor:
        weight = self.language_model.model.embed_tokens.weight
        return cast(Tensor, weight)

    def _has_media(self, input_ids: Tensor, media: Sequence[Tensor | None]) -> bool:
        ids = (
            self.config.image_token_id,
            self.config.audio_token_id,
            self.config.media_end_token_id,
        )
        return any(m is not None for m in media) or any(bool((input_ids == i).any()) for i in ids)

    def _image_features(
        self,
        images: int,
        line_pixel_values: Tensor | None,
        line_widths: Tensor | None,
        line_images: Tensor | None,
        object_pixel_values: Tensor | None,
    ) -> list[Tensor]:
        """Every picture's embeddings: its lines, then its objects."""
        seen: list[list[Tensor]] = [[] for _ in range(images)]
        if line_pixel_values is not None and len(line_pixel_values):
            if line_widths is None or line_images is None:
                raise CheckpointError("line_pixel_values need line_widths and line_images.")
            if int(line_images.max()) >= images:
                raise CheckpointError(
                    f"A line belongs to picture {int(line_images.max())}, but the prompt has "
                    f"{images} image placeholders."
                )
            features, line = self.embed_text_lines(line_pixel_values, line_widths)
            for image, found in enumerate(seen):
                found.append(features[line_images[line] == image])
        if object_pixel_values is not None:
            if len(object_pixel_values) != images:
                raise CheckpointError(
                    f"There are {len(object_pixel_values)} pictures for {images} placeholders."
                )
            features, picture = self.embed_objects(object_pixel_values)
            for image, found in enumerate(seen):
                found.append(features[picture == image])
        return [torch.cat(found) if found else self._nothing for found in seen]

    def _audio_features(
        self, recordings: int, input_features: Tensor | None, audio_lengths: Tensor | None
    ) -> list[Tensor]:
        """Every recording's embeddings."""
        given = 0 if input_features is None else len(input_features)
        if given != recordings:
            raise CheckpointError(f"There are {given} recordings for {recordings} placeholders.")
        if input_features is None or audio_lengths is None:
            return []
        features, recording = self.embed_speech(input_features, audio_lengths)
        return [features[recording == i] for i in range(recordings)]

    @property
    def _nothing(self) -> Tensor:
        return self._tied_embedding[:0]

    def _merge_row(
        self, ids: Tensor, labels: Tensor | None, seen: list[Tensor], heard: list[Tensor]
    ) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """One prompt without padding; takes its media off the front of both lists."""
        config = self.config
        embed = self.get_input_embeddings()
        pieces: list[Tensor] = []
        kept: list[Tensor] = []
        images = sounds = 0
        start = embeddings_of_turn = 0
        special = (config.image_token_id, config.audio_token_id, config.media_end_token_id)
        for position, token in enumerate(ids.tolist()):
            if token not in special:
                continue
            pieces.append(embed(ids[start:position]))
            if labels is not None:
                kept.append(labels[start:position])
            start = position + 1
            if token == config.media_end_token_id:
                newline = ids.new_tensor([config.newline_token_id])
                piece = embed(newline) if embeddings_of_turn else self._nothing
                embeddings_of_turn = 0
            else:
                is_image = token == config.image_token_id
                piece = (seen if is_image else heard).pop(0)
                images += len(piece) if is_image else 0
                sounds += 0 if is_image else len(piece)
                embeddings_of_turn += len(piece)
            pieces.append(piece)
            if labels is not None:
                kept.append(labels.new_full((len(piece),), IGNORED_LABEL))
        pieces.append(embed(ids[start:]))
        if labels is not None:
            kept.append(labels[start:])
        return torch.cat(pieces), torch.cat(kept) if labels is not None else None, (images, sounds)
