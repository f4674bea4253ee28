"""Whisper tiny.en as it comes, encoder and decoder: what pebble's hearing is measured against.

The decoder's weights stand in the same file as the encoder's; pebble's own starts from them.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from edge_safe.errors import PartsError
from edge_safe.models.pebble.ctranslate2_file import (
    Variables,
    read_variables,
    whisper_encoder_weights,
)

RATE = 16_000
START, END, NO_TIMES = "<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>"
MOST_TOKENS = 120


class WhisperTranscriber:
    """Writes down recordings, greedily.

    Args:
        file: The part's ``model.bin``.
        tokenizer: The ``tokenizer.json`` of the same wheel.
        config: Shapes of encoder and decoder.

    Raises:
        PartsError: A file is missing or not what it should be.
    """

    def __init__(self, file: Path, tokenizer: Path, config: WhisperConfig) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        variables = read_variables(file)
        start, end = (self._id(token) for token in (START, END))
        whole = WhisperConfig.from_dict(
            config.to_dict()
            | {
                "bos_token_id": end,
                "eos_token_id": end,
                "pad_token_id": end,
                "decoder_start_token_id": start,
            }
        )
        self._model = WhisperForConditionalGeneration(whole).eval().requires_grad_(False)
        weights = {f"model.encoder.{k}": v for k, v in whisper_encoder_weights(variables).items()}
        decoder = whisper_decoder_weights(variables)
        weights |= {f"model.decoder.{k}": v for k, v in decoder.items()}
        weights["proj_out.weight"] = decoder["embed_tokens.weight"]
        self._model.load_state_dict(weights)
        self._prompt = [start, self._id(NO_TIMES)]
        self._end = end
        self._extract = WhisperFeatureExtractor(feature_size=config.num_mel_bins)

    def transcribe(self, samples: NDArray[np.float32]) -> str:
        """Text of a recording at 16 kHz of at most 30 s, in Whisper's own window."""
        features = self._extract(samples, sampling_rate=RATE, return_tensors="pt").input_features
        with torch.no_grad():
            states = self._model.model.encoder(features)
            ids, past, new = list(self._prompt), None, list(self._prompt)
            while len(ids) < MOST_TOKENS:
                out = self._model(
                    encoder_outputs=states,
                    decoder_input_ids=torch.tensor([new]),
                    past_key_values=past,
                    use_cache=True,
                )
                past = out.past_key_values
                # Only words: what comes behind the end of text are Whisper's control tokens.
                new = [int(out.logits[0, -1, : self._end + 1].argmax())]
                if new[0] == self._end:
                    break
                ids += new
        return str(self._tokenizer.decode(ids[len(self._prompt) :]))

    def _id(self, token: str) -> int:
        found: int | None = self._tokenizer.token_to_id(token)
        if found is None:
            raise PartsError(f"Whisper's tokenizer.json lacks {token}.")
        return found


def whisper_decoder_weights(variables: Variables) -> dict[str, Tensor]:
    """Renames a Whisper decoder's variables into ``transformers.WhisperDecoder``'s state dict.

    Raises:
        PartsError: A variable is missing.
    """

    def take(name: str) -> Tensor:
        if f"decoder/{name}" not in variables:
            raise PartsError(f"The CTranslate2 model has no variable 'decoder/{name}'.")
        return torch.from_numpy(np.array(variables[f"decoder/{name}"], np.float32))

    weights = {
        "embed_tokens.weight": take("embeddings/weight"),
        "embed_positions.weight": take("position_encodings/encodings"),
        "layer_norm.weight": take("layer_norm/gamma"),
        "layer_norm.bias": take("layer_norm/beta"),
    }
    numbers = {m.group(1) for m in map(re.compile(r"decoder/layer_(\d+)/").match, variables) if m}
    packs = (
        ("self_attn", "self_attention", (("qkv", 0), ("o", 1))),
        ("encoder_attn", "attention", (("q", 0), ("kv", 1), ("o", 2))),
    )
    for number in numbers:
        ours, theirs = f"layers.{number}", f"layer_{number}"
        for name, source, linears in packs:
            norm = f"{theirs}/{source}/layer_norm"
            weights[f"{ours}.{name}_layer_norm.weight"] = take(f"{norm}/gamma")
            weights[f"{ours}.{name}_layer_norm.bias"] = take(f"{norm}/beta")
            for parts, index in linears:
                for kind in ("weight", "bias"):
                    packed = take(f"{theirs}/{source}/linear_{index}/{kind}").chunk(len(parts))
                    for part, piece in zip(parts, packed, strict=True):
                        if (part, kind) != ("k", "bias"):  # Whisper's key has no bias
                            target = "out_proj" if part == "o" else f"{part}_proj"
                            weights[f"{ours}.{name}.{target}.{kind}"] = piece.clone()
        weights[f"{ours}.final_layer_norm.weight"] = take(f"{theirs}/ffn/layer_norm/gamma")
        weights[f"{ours}.final_layer_norm.bias"] = take(f"{theirs}/ffn/layer_norm/beta")
        for index, name in enumerate(("fc1", "fc2")):
            for kind in ("weight", "bias"):
                weights[f"{ours}.{name}.{kind}"] = take(f"{theirs}/ffn/linear_{index}/{kind}")
    return weights
