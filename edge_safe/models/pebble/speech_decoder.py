"""Writes down speech: Whisper's decoder over the encoder's states of a sound's own length.

The layers are those of ``transformers.WhisperDecoder`` with its names, so its weights fit. Here
padded states can be masked, which training in batches needs, and the attention to the states can
be prepared once for a whole recording.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import WhisperConfig

KeyValue = tuple[Tensor, Tensor]
"""Keys and values, each (B, heads, positions, head_dim)."""


TRAINED = "encoder_attn"
"""Part of the names of the weights that pebble trains; all others are Whisper's own."""


@dataclass(frozen=True, slots=True)
class Transcription:
    """How a recording is written down: control tokens of Whisper's vocabulary, and limits.

    Attributes:
        prompt_ids: What every transcript begins with.
        end_id: Ends it; all words have smaller ids.
        no_speech_id: Likely behind the first token of the prompt where nothing is said.
        no_speech_threshold: Probability of it above which nothing was said.
        tokens_per_second: So many tokens of words are read from a second of sound at most, since
            nobody speaks faster and a decoder may go round in circles ...
        extra_tokens: ... and so many beside these.
    """

    prompt_ids: Sequence[int] = (50257, 50362)
    end_id: int = 50256
    no_speech_id: int = 50361
    no_speech_threshold: float = 0.6
    tokens_per_second: float = 6.0
    extra_tokens: int = 8

    def most_tokens(self, seconds: float) -> int:
        """How many tokens of words a sound may have."""
        return int(self.tokens_per_second * seconds + self.extra_tokens)


class Attention(nn.Module):
    """Multi-head attention; keys have no bias, as in Whisper."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def keys_values(self, states: Tensor) -> KeyValue:
        """What is attended to, from (B, T, d) states."""
        return self._split(self.k_proj(states)), self._split(self.v_proj(states))

    def forward(self, x: Tensor, kv: KeyValue, mask: Tensor | None) -> Tensor:
        """Attends from (B, S, d) over prepared keys and values.

        Args:
            x: (B, S, d).
            kv: Each (B, heads, T, head_dim).
            mask: (B or 1, 1, S or 1, T) bool, True where a position may look; None for all.
        """
        mixed = functional.scaled_dot_product_attention(
            self._split(self.q_proj(x)), *kv, attn_mask=mask
        )
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        parted: Tensor = x.unflatten(-1, (self.heads, -1))
        return parted.transpose(1, 2)


class Layer(nn.Module):
    """Self-attention, attention to the recording, two linear layers."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        width, heads = config.d_model, config.decoder_attention_heads
        self.self_attn = Attention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.encoder_attn = Attention(width, heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.decoder_ffn_dim)
        self.fc2 = nn.Linear(config.decoder_ffn_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(
        self,
        x: Tensor,
        past: KeyValue | None,
        mask: Tensor | None,
        heard: KeyValue,
        own: Tensor | None,
    ) -> tuple[Tensor, KeyValue]:
        """(B, S, d) and the keys and values of the positions so far -> both anew."""
        normed = self.self_attn_layer_norm(x)
        kv = self.self_attn.keys_values(normed)
        if past is not None:
            kv = (torch.cat([past[0], kv[0]], 2), torch.cat([past[1], kv[1]], 2))
        x = x + self.self_attn(normed, kv, mask)
        x = x + self.encoder_attn(self.encoder_attn_layer_norm(x), heard, own)
        hidden = functional.gelu(self.fc1(self.final_layer_norm(x)))
        return x + self.fc2(hidden), kv


class SpeechDecoder(nn.Module):
    """Whisper's decoder with its tied head."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_positions = nn.Embedding(config.max_target_positions, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.decoder_layers))
        self.layer_norm = nn.LayerNorm(config.d_model)

    def trained_weights(self) -> dict[str, Tensor]:
        """The weights that pebble trains, by their names in the state dict."""
        return {name: value for name, value in self.state_dict().items() if TRAINED in name}

    def listen(self, states: Tensor) -> list[KeyValue]:
        """Keys and values of every layer's attention to (B, T, d) states."""
        return [cast(Layer, layer).encoder_attn.keys_values(states) for layer in self.layers]

    def hidden(
        self,
        ids: Tensor,
        heard: list[KeyValue],
        past: list[KeyValue] | None = None,
        own: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """What ``forward`` gives, in front of the head.

        Returns:
            states: (B, S, d).
            present: Keys and values of all positions so far.
        """
        start = 0 if past is None else past[0][0].shape[2]
        count = ids.shape[1]
        places = torch.arange(start, start + count, device=ids.device)
        x = self.embed_tokens(ids) + self.embed_positions(places)
        mask = None
        if past is None:
            mask = torch.ones(count, count, dtype=torch.bool, device=ids.device).tril()[None, None]
        seen = None if own is None else own[:, None, None]
        present: list[KeyValue] = []
        for index, layer in enumerate(self.layers):
            before = None if past is None else past[index]
            x, kv = layer(x, before, mask, heard[index], seen)
            present.append(kv)
        return self.layer_norm(x), present

    def head(self, states: Tensor) -> Tensor:
        """(..., d) -> (..., V) logits."""
        return functional.linear(states, self.embed_tokens.weight)

    def forward(
        self,
        ids: Tensor,
        heard: list[KeyValue],
        past: list[KeyValue] | None = None,
        own: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Logits of the token behind each of these.

        Args:
            ids: (B, S) Whisper's tokens; with a past a single one, S = 1.
            heard: See ``listen``.
            past: Keys and values of the positions before, layer by layer.
            own: (B, T) bool, True at states of the recording and False at padding.

        Returns:
            logits: (B, S, V).
            present: Keys and values of all positions so far.
        """
        states, present = self.hidden(ids, heard, past, own)
        return self.head(states), present

    def write_down(self, states: Tensor, seconds: float, settings: Transcription) -> list[int]:
        """Writes one recording down, the likeliest token at each step.

        Args:
            states: (1, T, d) of the sound alone.
            seconds: Its length.
            settings: Control tokens and limits.

        Returns:
            Whisper's tokens, without control tokens; none where nothing was said.
        """
        room = self.embed_positions.num_embeddings - len(settings.prompt_ids)
        most = min(settings.most_tokens(seconds), room)
        with torch.no_grad():
            heard = self.listen(states)
            ids = torch.tensor([list(settings.prompt_ids)], device=states.device)
            logits, past = self(ids, heard)
            silence = float(logits[0, 0].float().softmax(-1)[settings.no_speech_id])
            if silence > settings.no_speech_threshold:
                return []
            written: list[int] = []
            while len(written) < most:
                token = int(logits[0, -1, : settings.end_id + 1].argmax())
                if token == settings.end_id:
                    break
                written.append(token)
                if len(written) < most:
                    logits, past = self(ids.new_tensor([[token]]), heard, past)
        return written
