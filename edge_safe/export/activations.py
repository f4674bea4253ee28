"""What flows through a torch model on some prompts, as far as quantization wants to know it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from edge_safe.export.graphs.spec import DecoderSpec, FloatArray
from edge_safe.models.base_model import decoder_layers, pad, token_types

# Prompts that are looked at, and how many are run at once.
PROMPTS = 128
BATCH = 16


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """Mean squares of what enters the linear layers of one decoder layer, per channel.

    Attributes:
        attention: (d,) of queries', keys' and values' projections.
        mlp: (d,) of the MLP's gate and up projections.
        down: (intermediate,) of its down projection.
    """

    attention: FloatArray
    mlp: FloatArray
    down: FloatArray


@dataclass(frozen=True, slots=True)
class CacheReach:
    """Largest magnitudes of one layer's cache, (kv_heads * head_dim,) each.

    Rotation turns a pair of a key's channels into each other, so both have the pair's length.
    """

    keys: FloatArray
    values: FloatArray


@dataclass(frozen=True, slots=True)
class Activations:
    """What was seen, layer by layer."""

    inputs: tuple[LayerInputs, ...]
    caches: tuple[CacheReach, ...]


@torch.no_grad()
def observe(
    model: PreTrainedModel, spec: DecoderSpec, prompts: Sequence[Sequence[int]]
) -> Activations:
    """Runs prompts through a model and looks at each layer.

    Args:
        model: The language model, held or streaming.
        spec: Its description.
        prompts: Ids; the first ``PROMPTS`` are run.
    """
    sums: dict[tuple[int, str], Tensor] = {}
    reaches: list[tuple[Tensor, Tensor]] = []
    count = 0
    embed: Any = model.get_input_embeddings()
    for first in range(0, min(PROMPTS, len(prompts)), BATCH):
        ids, mask = pad(prompts[first : min(PROMPTS, first + BATCH)], torch.device("cpu"))
        count += int(mask.sum())
        types = token_types(model, ids, [ids.shape[1]] * len(ids))
        # Only the model around the decoder knows of prompts that see themselves.
        decoder = cast(Any, model).model if types else model.get_decoder()
        with _watched(model, mask, sums):
            cache = decoder(
                inputs_embeds=embed(ids),
                attention_mask=mask.long(),
                use_cache=True,
                past_key_values=DynamicCache(),
                **types,
            ).past_key_values
        found = [(_reach(c.keys, mask, spec), _reach(c.values, mask)) for c in cache.layers]
        reaches = [
            (torch.maximum(a, c), torch.maximum(b, d))
            for (a, b), (c, d) in zip(reaches or found, found, strict=True)
        ]
    return Activations(
        tuple(
            LayerInputs(*((sums[index, part] / count).numpy() for part in PARTS))
            for index in range(spec.layers)
        ),
        tuple(CacheReach(a.numpy(), b.numpy()) for a, b in reaches),
    )


PARTS = ("self_attn", "mlp", "mlp.down_proj")


@contextmanager
def _watched(
    model: PreTrainedModel, mask: Tensor, sums: dict[tuple[int, str], Tensor]
) -> Iterator[None]:
    """Adds up the squares of what enters the parts of every layer at real positions."""

    def watch(index: int, part: str) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states: Tensor = args[0] if args else kwargs["hidden_states"]
            square = states[mask].float().square().sum(0)
            sums[index, part] = sums.get((index, part), torch.zeros_like(square)) + square

        return hook

    hooks = [
        layer.get_submodule(part).register_forward_pre_hook(watch(index, part), with_kwargs=True)
        for index, layer in enumerate(decoder_layers(model))
        for part in PARTS
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _reach(states: Tensor, mask: Tensor, spec: DecoderSpec | None = None) -> Tensor:
    """(kv_heads * head_dim,) largest magnitudes of (B, kv_heads, S, head_dim) states."""
    size = states.float().abs() * mask[:, None, :, None]
    if spec is not None and spec.ropes:
        half = max(len(rope.inverse_frequencies) for rope in spec.ropes)
        pair = torch.hypot(size[..., :half], size[..., half : 2 * half])
        size = torch.cat([pair, pair, size[..., 2 * half :]], dim=-1)
    return size.amax((0, 2)).reshape(-1)


def magnitudes(squares: npt.NDArray[np.float32]) -> FloatArray:
    """Root mean squares, never 0."""
    root: FloatArray = np.sqrt(np.maximum(squares, 1e-12)).astype(np.float32)
    return root
