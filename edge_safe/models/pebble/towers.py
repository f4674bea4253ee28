"""What pebble reads in lines of text, names in pictures and hears in recordings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from edge_safe.errors import CheckpointError
from edge_safe.models.onnx_graph import OnnxGraph
from edge_safe.models.pebble.configuration_pebble import PebbleConfig
from edge_safe.models.pebble.efficientnet_lite import EfficientNetLite
from edge_safe.models.pebble.object_projector import ObjectProjector
from edge_safe.models.pebble.projectors import SequenceProjector
from edge_safe.models.pebble.respelling import Respelling
from edge_safe.models.pebble.speech_decoder import SpeechDecoder
from edge_safe.models.pebble.speech_encoder import STATES_PER_SECOND, SpeechEncoder
from edge_safe.models.pebble.speech_words import WORDS_FILE, SpeechWords


class Towers:
    """The half of pebble that perceives; the model itself has the modules named here.

    Attributes:
        language_model: Whose tied embedding all that is perceived is made of.
        respelling: Turns pieces that were spelled into those of typed words; None where the
            model was opened without its tokenizer.
        speech_words: The speech decoder's tokenizer, None likewise.
    """

    config: PebbleConfig
    language_model: LlamaForCausalLM
    text_recognizer: OnnxGraph
    text_projector: SequenceProjector
    vision_encoder: EfficientNetLite
    vision_projector: ObjectProjector
    audio_encoder: SpeechEncoder
    audio_decoder: SpeechDecoder
    respelling: Respelling | None
    speech_words: SpeechWords | None

    @property
    def tied_embedding(self) -> Tensor:
        """(V, d) of the language model, embedding and head alike."""
        weight = self.language_model.model.embed_tokens.weight
        return cast(Tensor, weight)

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
        features, line = self.text_projector.project(states, lengths, self.tied_embedding)
        return features, line

    def read_states(self, states: Tensor, lengths: Tensor) -> list[list[int]]:
        """Word-piece ids of each line, as ``hear`` gives those of recordings.

        Args:
            states: (N, T, c) of ``read_lines``.
            lengths: (N,).
        """
        _, line, pieces = self.text_projector.read(states, lengths, self.tied_embedding)
        return self._respelled(self.text_projector, line, pieces, len(states))

    def embed_objects(self, object_pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(I, 3, 224, 224) pictures -> (M, d) word pieces that name them, (M,) their picture."""
        states = self.vision_encoder(object_pixel_values)
        features, picture, _ = self.vision_projector.project(states, self.tied_embedding)
        return features, picture

    def name_states(self, states: Tensor) -> list[int]:
        """Word-piece ids that name what one picture's states (1, cells, c) show."""
        _, _, pieces = self.vision_projector.project(states, self.tied_embedding)
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
        embedding = self.tied_embedding
        ids = torch.tensor([i for row in read for i in row], device=embedding.device)
        counts = torch.tensor([len(row) for row in read], device=embedding.device)
        rows = torch.arange(len(read), device=embedding.device).repeat_interleave(counts)
        return embedding[ids.long()], rows
