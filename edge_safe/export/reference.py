"""The torch side of parity: the same boundaries that the graphs have, from the fp32 model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from edge_safe.export.families.base import float_array
from edge_safe.export.graphs.safety import TokenRows
from edge_safe.models.safety_head import SafetyModule
from edge_safe.runtime.manifest import Bidirectional
from edge_safe.runtime.prefill import Span

Array = npt.NDArray[Any]

STEERING_STEPS = 60
# It ends where so many steps brought less than this share of what is missing.
STEERING_PATIENCE, STEERING_LEAST = 8, 0.01
# Prompts that a streamed model judges at once.
STREAMED_BATCH = 32


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture in a prompt, of a model whose positions are on a grid there.

    Attributes:
        ids: (1, S) ids of the prompt, the placeholder once for each feature.
        height: Rows of features.
        width: Columns of features.
        features: (height * width, d).
        deepstack: (D, height * width, d).
    """

    ids: Array
    height: int
    width: int
    features: Array
    deepstack: Array


@dataclass(frozen=True, slots=True)
class Expected:
    """What torch makes of right-padded prompts that end in slot T.

    Attributes:
        hidden_states: (B, S, d) entering the exit layer, None without a gate.
        gate_verdict: (B, 2), None without a gate.
        early_verdict: (B, 2) of the early exit, None without one.
        gate_present: (B, K, S, d) states entering the layers that heads read, the early exit's
            first; None without a gate.
        final_verdict: (B, 2).
        logits: (B, V) at slot T.
        caches: (B, kv_heads, S, head_dim) keys and values of every layer.
    """

    hidden_states: Array | None
    gate_verdict: Array | None
    early_verdict: Array | None
    gate_present: Array | None
    final_verdict: Array
    logits: Array
    caches: tuple[tuple[Array, Array], ...]


@dataclass(frozen=True, slots=True)
class LogOdds:
    """What torch's stages say of n prompts, unsafe - safe.

    Attributes:
        first: (n,) of the gate, or of ``final`` without one.
        early: (n,) of the early exit, None without one.
    """

    first: Array
    early: Array | None


class Reference:
    """A torch model with its safety module.

    Args:
        model: The language model, fp32.
        module: The safety module, None for a model that was only fine-tuned to emit two tokens.
        final: The ``final`` stage's rows.
        exit_layer: Layer of the gate, None without one.
        streamed: Whether the model reads its weights anew at every run, so that runs are few.
        bidirectional: Which positions see each other.
        early_layer: Layer of the early exit, None without one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        module: SafetyModule | None,
        final: TokenRows,
        exit_layer: int | None,
        streamed: bool = False,
        bidirectional: Bidirectional = "none",
        early_layer: int | None = None,
    ) -> None:
        self.streamed = streamed
        self._model: Any = model
        self._module = module
        self._final = torch.from_numpy(final.rows)
        self._layer = exit_layer
        self._bidirectional = bidirectional
        self._early = early_layer

    @property
    def image_token(self) -> int:
        """Id of the placeholder of pictures."""
        return int(self._model.config.image_token_id)

    @property
    def image_start(self) -> int:
        """Id of what stands in front of a picture on a grid."""
        return int(self._model.config.vision_start_token_id)

    @torch.no_grad()
    def embed(self, ids: Array) -> Array:
        """(B, S) int64 -> (B, S, d)."""
        return float_array(self._model.get_input_embeddings()(torch.from_numpy(ids)))

    @torch.no_grad()
    def run(
        self,
        embeds: Array,
        mask: Array,
        picture: Picture | None = None,
        span: Span | None = None,
    ) -> Expected:
        """Runs prompts (B, S, d) with their mask (B, S) at once.

        With a picture the model finds embeddings, places and deeper features itself. The
        positions of a span see each other.
        """
        inputs = {"inputs_embeds": torch.from_numpy(embeds)}
        if picture is not None:
            inputs = self._pictured(picture)
        try:
            seen, output = self._forward(inputs, torch.from_numpy(mask), span)
        finally:
            if picture is not None:
                # It remembers them for the next call that brings embeddings alone.
                self._model.model.rope_deltas = None
        states = output.hidden_states
        slot = torch.from_numpy(mask).sum(1) - 1
        rows = torch.arange(len(mask))
        hidden = verdict = early = present = None
        if self._layer is not None and self._module is not None:
            hidden = states[self._layer]
            verdict = float_array(self._module.read(self._layer, states, seen).verdict_logits)
            layers = self._module.layers_at(self._layer)
            if self._early is not None:
                early = float_array(self._module.read(self._early, states, seen).verdict_logits)
                layers = (*self._module.layers_at(self._early), *layers)
            # A layer that both read is there once.
            present = float_array(torch.stack([states[k] for k in dict.fromkeys(layers)], dim=1))
        caches = tuple(
            (float_array(layer.keys), float_array(layer.values))
            for layer in output.past_key_values.layers
        )
        return Expected(
            None if hidden is None else float_array(hidden),
            verdict,
            early,
            present,
            float_array(self._read_final(states[-1], seen)),
            float_array(output.logits[rows, slot]),
            caches,
        )

    def run_each(self, prompts: Sequence[Array]) -> list[Expected]:
        """Runs prompts (1, S, d) of any length; a streamed model runs them as one batch."""
        if not self.streamed:
            return [self.run(embeds, np.ones(embeds.shape[:2], np.int64)) for embeds in prompts]
        embeds, mask = pad_right(prompts)
        together = self.run(embeds, mask)
        return [_row(together, row, prompt.shape[1]) for row, prompt in enumerate(prompts)]

    @torch.no_grad()
    def follow(self, embeds: Array, tokens: Sequence[int]) -> Array:
        """The (n, V) logits that each of n tokens behind a prompt (1, S, d) is taken from."""
        text = self.embed(np.array([tokens[:-1]], np.int64))
        whole = torch.from_numpy(np.concatenate([embeds, text], axis=1))
        logits = self._model(inputs_embeds=whole, use_cache=False).logits
        return float_array(logits[0, embeds.shape[1] - 1 :])

    @torch.no_grad()
    def greedy(self, embeds: Array, steps: int) -> tuple[list[int], Array]:
        """Continues one prompt (1, S, d) greedily.

        Returns:
            ``steps`` tokens, and the (steps, V) logits each was taken from.
        """
        cache = DynamicCache()
        inputs: dict[str, Tensor] = {"inputs_embeds": torch.from_numpy(embeds)}
        inputs |= self._token_types(torch.ones(embeds.shape[:2], dtype=torch.int64), None)
        tokens, logits = [], []
        for _ in range(steps):
            row = self._model(**inputs, past_key_values=cache, use_cache=True).logits[0, -1]
            tokens.append(int(row.argmax()))
            logits.append(float_array(row))
            inputs = {"input_ids": torch.tensor([[tokens[-1]]])}
        return tokens, np.stack(logits)

    @torch.no_grad()
    def log_odds(self, prompts: Sequence[Array]) -> LogOdds:
        """What the first stage and the early exit say of prompts (1, S, d) with slot T."""
        size = STREAMED_BATCH if self.streamed else 1
        found = [np.zeros((0, 2), np.float32)]
        for first in range(0, len(prompts), size):
            embeds, mask = pad_right(prompts[first : first + size])
            odds = self._log_odds(torch.from_numpy(embeds), torch.from_numpy(mask))
            found.append(float_array(odds))
        both = np.concatenate(found)
        return LogOdds(both[:, 0], None if self._early is None else both[:, 1])

    def steer(self, embeds: Array, *, unsafe: bool, target: float) -> Array:
        """Moves a prompt's embeddings until its verdict is on the wanted side.

        For models of which no prompt at hand gives both verdicts: the graphs must agree with
        torch on either side of the threshold, whatever brings them there.

        Args:
            embeds: (1, S, d) prompt that ends in slot T.
            unsafe: The side.
            target: Log-odds, unsafe - safe, at which to stop.

        Returns:
            (1, S, d); the side may not have been reached.
        """
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        moved = torch.from_numpy(embeds).clone()
        length = float(moved.norm())
        sign = 1.0 if unsafe else -1.0
        reached: list[float] = []
        for _ in range(STEERING_STEPS):
            with torch.enable_grad():
                moved.requires_grad_(True)
                odds = self._log_odds(moved, mask)[:, 0]
                (gradient,) = torch.autograd.grad(odds.sum(), moved)
            reached.append(sign * float(odds.detach()))
            missing = sign * target - reached[-1]
            if missing < 0:
                break
            # A head that nobody trained may not be moved by anything.
            gained = reached[-1] - reached[-STEERING_PATIENCE:][0]
            if len(reached) >= STEERING_PATIENCE and gained < STEERING_LEAST * missing:
                break
            step = sign * gradient * (0.05 * length / gradient.norm().clamp_min(1e-12))
            moved = moved.detach() + step
        return float_array(moved)

    def _pictured(self, picture: Picture) -> dict[str, Any]:
        """What the model's forward takes of a prompt with a picture its tower has seen."""
        config, ids = self._model.config, torch.from_numpy(picture.ids)
        merge = config.vision_config.spatial_merge_size
        seen = SimpleNamespace(
            pooler_output=[torch.from_numpy(picture.features)],
            deepstack_features=[[torch.from_numpy(depth)] for depth in picture.deepstack],
        )
        return {
            "input_ids": ids,
            "mm_token_type_ids": (ids == config.image_token_id).int(),
            "image_grid_thw": torch.tensor([[1, picture.height * merge, picture.width * merge]]),
            "mm_encoder_outputs": {"image": seen},
        }

    def _log_odds(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """(B, 2) unsafe - safe of the first stage there is, and of the early exit or that again."""
        seen = _before_slot(mask)
        # Without lm_head, which costs more than the rest of a short prompt.
        types = self._token_types(mask, None)
        # Only the model around the decoder knows of positions that see each other.
        decoder = self._model.model if types else self._model.get_decoder()
        output = decoder(
            inputs_embeds=embeds,
            attention_mask=mask,
            use_cache=False,
            output_hidden_states=True,
            **types,
        )
        if self._layer is not None and self._module is not None:
            layers = (self._layer, self._layer if self._early is None else self._early)
            both = [self._module.read(k, output.hidden_states, seen) for k in layers]
            logits = [readout.verdict_logits for readout in both]
        else:
            logits = [self._read_final(output.hidden_states[-1], seen)] * 2
        return torch.stack([pair[:, 0] - pair[:, 1] for pair in logits], dim=1)

    def _token_types(self, mask: Tensor, span: Span | None) -> dict[str, Tensor]:
        """What tells transformers which positions see each other; nothing where none do."""
        types = torch.zeros_like(mask)
        if self._bidirectional == "image" and span is not None:
            types[:, span[0] : span[1]] = 1
        elif self._bidirectional == "prompt":
            # Slot T is where the suffix begins.
            types = (torch.arange(mask.shape[1])[None] >= mask.sum(1, keepdim=True) - 1).long()
        else:
            return {}
        return {"token_type_ids": types}

    def _forward(
        self, inputs: dict[str, Any], mask: Tensor, span: Span | None = None
    ) -> tuple[Tensor, Any]:
        """Runs the model; also gives the (B, S) bool mask of what the gate may see."""
        output = self._model(
            **inputs,
            attention_mask=mask,
            use_cache=True,
            # The model's own choice would forget the keys outside a layer's window.
            past_key_values=DynamicCache(),
            output_hidden_states=True,
            **self._token_types(mask, span),
        )
        return _before_slot(mask), output

    def _read_final(self, states: Tensor, seen: Tensor) -> Tensor:
        """(B, 2) logits of the ``final`` stage."""
        if self._module is not None:
            return self._module.read_final(states, seen).verdict_logits
        last = states[torch.arange(len(states)), seen.sum(1) - 1]
        logits: Tensor = last @ self._final.T
        return logits


def pad_right(prompts: Sequence[Array]) -> tuple[Array, Array]:
    """Prompts (1, S, d) as one batch (B, S, d) with its mask (B, S)."""
    longest = max(prompt.shape[1] for prompt in prompts)
    embeds = np.zeros((len(prompts), longest, prompts[0].shape[2]), np.float32)
    mask = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        embeds[row, : prompt.shape[1]] = prompt[0]
        mask[row, : prompt.shape[1]] = 1
    return embeds, mask


def _row(batch: Expected, row: int, length: int) -> Expected:
    """One prompt of a padded batch as if it had been run alone."""

    def cut(value: Array | None, axis: int) -> Array | None:
        if value is None:
            return None
        return np.take(value[row : row + 1], range(length), axis=axis)

    def whole(value: Array | None) -> Array | None:
        return None if value is None else value[row : row + 1]

    def kept(value: Array) -> Array:
        return value[row : row + 1, :, :length]

    return Expected(
        cut(batch.hidden_states, 1),
        whole(batch.gate_verdict),
        whole(batch.early_verdict),
        cut(batch.gate_present, 2),
        batch.final_verdict[row : row + 1],
        batch.logits[row : row + 1],
        tuple((kept(keys), kept(values)) for keys, values in batch.caches),
    )


def _before_slot(mask: Tensor) -> Tensor:
    """(B, S) bool: what the gate may see."""
    steps = torch.arange(mask.shape[1])[None]
    return steps < mask.sum(1, keepdim=True) - 1
