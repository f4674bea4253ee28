"""Writes down speech: Whisper's decoder over the encoder's states of a sound's own length.

The layers are those of ``transformers.WhisperDecoder`` with its names, so its weights fit. Here
padded states can be masked, which training in batches needs, and the attention to the states can
be prepared once for a whole recording.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import WhisperConfig

KeyValue = tuple[Tensor, Tensor]
"""Keys and values, each (B, heads, positions, head_dim)."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Control tokens of Whisper's vocabulary.

    Attributes:
        ids: What every transcript begins with.
        end: Ends it; all words have smaller ids.
        no_speech: Likely at the first position where nothing is said.
    """

    ids: tuple[int, ...] = (50257, 50362)
    end: int = 50256
    no_speech: int = 50361


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
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


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

    def listen(self, states: Tensor) -> list[KeyValue]:
        """Keys and values of every layer's attention to (B, T, d) states."""
        return [layer.encoder_attn.keys_values(states) for layer in self.layers]  # type: ignore[union-attr,operator]

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
        return functional.linear(self.layer_norm(x), self.embed_tokens.weight), present
