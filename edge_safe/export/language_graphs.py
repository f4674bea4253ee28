"""Runs the exported language graphs on plain arrays, one call per chunk.

Slower and simpler than the runtime's engine on purpose: parity has to see every output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_safe.export.activations import CacheReach
from edge_safe.export.cache_format import CacheFormat, cache_scales
from edge_safe.export.graphs.spec import DecoderSpec
from edge_safe.runtime.gate import EARLY_VERDICT
from edge_safe.runtime.manifest import CAPACITY, LATE
from edge_safe.runtime.prefill import (
    ATTENTION_END,
    DEEPSTACK,
    EARLY_BOUND,
    PREFILL,
    STATES,
    Span,
)
from edge_safe.runtime.session import Session

Array = npt.NDArray[Any]

CACHE_TYPES = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}


@dataclass(frozen=True, slots=True)
class Cache:
    """What earlier chunks left.

    Attributes:
        layers: (B, kv_heads, P, head_dim) keys and values of every layer.
        gate: (B, K, G, d) states of the layers that it reads, None without a gate.
    """

    layers: tuple[tuple[Array, Array], ...]
    gate: Array | None


@dataclass(frozen=True, slots=True)
class ChunkOutput:
    """What one chunk gave.

    Attributes:
        hidden_states: (B, S, d) states entering the exit layer, None without a gate.
        gate_verdict: (B, 2), None without a gate.
        early_verdict: (B, 2) of the early exit, None without one.
        final_verdict: (B, 2).
        logits: (B, V) at slot T.
        cache: Everything up to this chunk.
    """

    hidden_states: Array | None
    gate_verdict: Array | None
    early_verdict: Array | None
    final_verdict: Array
    logits: Array
    cache: Cache


class LanguageGraphs:
    """The embedding, gate and decoder graphs of a bundle folder."""

    def __init__(
        self,
        folder: Path,
        spec: DecoderSpec,
        exit_layer: int | None,
        gate_layers: Sequence[int],
        cache_format: CacheFormat = "fp32",
        reaches: Sequence[CacheReach] = (),
    ) -> None:
        self._cache = cache_format
        self._reaches = reaches
        self.spec = spec
        self.exit_layer = exit_layer
        self._gate_layers = gate_layers
        self._embed = Session(folder / "embed_tokens.onnx", threads=1)
        gated = exit_layer is not None
        self._gate = Session(folder / "gate.onnx", threads=1) if gated else None
        self._late = _opened(folder / f"gate{LATE}.onnx")
        self._decoder = Session(folder / "decoder.onnx", threads=1)
        self._prefill_gate, self._prefill_decoder = self._gate, self._decoder
        if (folder / f"decoder{PREFILL}.onnx").exists():
            if gated:
                self._prefill_gate = Session(folder / f"gate{PREFILL}.onnx", threads=1)
            self._prefill_decoder = Session(folder / f"decoder{PREFILL}.onnx", threads=1)

    def embed(self, ids: Array) -> Array:
        """(B, S) int64 -> (B, S, d)."""
        return self._embed.run({"input_ids": ids})["inputs_embeds"]

    def empty(self, batch: int) -> Cache:
        """Nothing seen yet."""
        spec = self.spec
        nothing = np.zeros((batch, spec.kv_heads, 0, spec.head_dim), CACHE_TYPES[self._cache])
        shape = (batch, len(self._gate_layers), 0, spec.hidden_size)
        gate = np.zeros(shape, np.float32) if self._gate else None
        return Cache(tuple((nothing, nothing) for _ in range(spec.layers)), gate)

    def cached(self, cache: Cache) -> tuple[tuple[Array, Array], ...]:
        """Keys and values of every layer as the numbers they stand for."""
        if self._cache != "int8":
            return cache.layers
        found = []
        for pair, reach in zip(cache.layers, self._reaches, strict=True):
            scales = [s.reshape(1, -1, 1, self.spec.head_dim) for s in cache_scales(reach)]
            found.append((pair[0] * scales[0], pair[1] * scales[1]))
        return tuple(found)

    def run(
        self,
        embeds: Array,
        mask: Array,
        cache: Cache,
        places: Array | None = None,
        deepstack: Array | None = None,
        span: Span | None = None,
    ) -> ChunkOutput:
        """Runs one chunk.

        Args:
            embeds: (B, S, d).
            mask: (B, P + S), right-padded.
            cache: Of the chunks before.
            places: (3, B, S) for M-RoPE; None where they are counted one by one.
            deepstack: (D, B, S, d) features for deeper layers, None for nothing.
            span: Positions of the chunk that stand for a picture.
        """
        past = mask.shape[1] - embeds.shape[1]
        # A padded row of a decoding batch continues at its own length.
        start = np.minimum(mask.sum(1) - embeds.shape[1], past).clip(min=0)
        steps = np.arange(embeds.shape[1], dtype=np.int64)[None]
        positions = steps + (start[:, None] if past else 0)
        counted = np.broadcast_to(positions, embeds.shape[:2]).astype(np.int64)
        positions = counted
        if self.spec.position_axes > 1:
            positions = np.stack([counted] * 3) if places is None else places
        if deepstack is None:
            deepstack = np.zeros((self.spec.deepstack, *embeds.shape), np.float32)
        common = {"attention_mask": mask, "position_ids": positions, DEEPSTACK: deepstack}
        if self.spec.bidirectional != "none":
            common[ATTENTION_END] = self._ends(mask, counted, span)
        # Nothing ends early here: parity has to see every output.
        common[EARLY_BOUND] = np.full(len(embeds), np.inf, np.float32)
        states, verdict, early, gate_cache, presents = embeds, None, None, None, []
        decoding = embeds.shape[1] == 1
        gate = self._gate if decoding else self._prefill_gate
        decoder = self._decoder if decoding else self._prefill_decoder
        if gate is not None and self.exit_layer is not None and cache.gate is not None:
            layers = range(self.exit_layer)
            feeds = {"inputs_embeds": embeds, "gate_past": cache.gate, **common}
            feeds |= _past_for(gate, cache, layers, mask)
            found = _run(gate, feeds)
            if self._late is not None:
                found |= _run(self._late, feeds | found)
            states, verdict = found["hidden_states"], found["verdict_logits"]
            early = found.get(EARLY_VERDICT)
            gate_cache = found["gate_present"]
            if gate_cache.shape[2] == cache.gate.shape[2]:
                # A single position leaves its states by names of their own.
                left = [found[name] for name in gate.outputs if name.startswith(STATES)]
                new = np.stack([*left, states], axis=1)
                gate_cache = np.concatenate([gate_cache, new], axis=2)
            presents += _present(found, layers)
        layers = range(self.exit_layer or 0, self.spec.layers)
        source = "inputs_embeds" if gate is None else "hidden_states"
        feeds = {source: states, **common}
        found = _run(decoder, feeds | _past_for(decoder, cache, layers, mask))
        presents += _present(found, layers)
        grown = Cache(tuple(presents), gate_cache)
        if "logits" in found:
            logits = found["logits"]
        else:
            logits = self._slot_logits(feeds, source, _past(grown, layers))
        return ChunkOutput(
            None if gate is None else states,
            verdict,
            early,
            found["verdict_logits"],
            logits[:, 0],
            grown,
        )

    def _slot_logits(
        self, feeds: dict[str, Array], source: str, present: dict[str, Array]
    ) -> Array:
        """(B, 1, V) logits at the last real position, by the decoder for single tokens."""
        mask, rows = feeds["attention_mask"], feeds[source]
        ends = mask.sum(1) - (mask.shape[1] - rows.shape[1]) - 1
        batch = np.arange(len(rows))
        own = {
            source: rows[batch, ends][:, None],
            "position_ids": feeds["position_ids"][..., batch, ends][..., None],
            DEEPSTACK: feeds[DEEPSTACK][:, batch, ends][:, :, None],
        }
        if ATTENTION_END in feeds:
            own[ATTENTION_END] = feeds[ATTENTION_END][batch, ends][:, None]
        # The kernel writes a row's position where the row ends, over what stands there.
        past = {name: np.ascontiguousarray(value[:, :, :-1]) for name, value in present.items()}
        return _run(self._decoder, {**feeds, **own, **past})["logits"]

    def _ends(self, mask: Array, places: Array, span: Span | None) -> Array:
        """(B, S) last place that each new position sees."""
        ends = places.copy()
        if span is not None:
            ends[:, span[0] : span[1]] = ends[:, span[1] - 1 :][:, :1]
        if self.spec.bidirectional == "prompt" and mask.shape[1] == places.shape[1]:
            # All of the prompt sees its last position; slot T stands behind that.
            last = mask.sum(1, keepdims=True) - 2
            ends = np.maximum(ends, last)
        return ends


def _opened(path: Path) -> Session | None:
    """A graph that not every bundle has."""
    return Session(path, threads=1) if path.exists() else None


def _run(session: Session, feeds: dict[str, Array]) -> dict[str, Array]:
    """Runs a graph on those of the feeds that it takes."""
    return session.run({name: feeds[name] for name in session.inputs})


def _past_for(session: Session, cache: Cache, layers: range, mask: Array) -> dict[str, Array]:
    """Keys and values, with places for new positions where the graph takes them all at once."""
    past = _past(cache, layers)
    if session.shape(f"past_key_values.{layers.start}.key")[2] != CAPACITY:
        return past
    count = mask.shape[1]
    return {
        name: np.pad(value, [(0, 0), (0, 0), (0, count - value.shape[2]), (0, 0)])
        for name, value in past.items()
    }


def _past(cache: Cache, layers: range) -> dict[str, Array]:
    feeds = {}
    for index in layers:
        for slot, part in enumerate(("key", "value")):
            feeds[f"past_key_values.{index}.{part}"] = cache.layers[index][slot]
    return feeds


def _present(found: dict[str, Array], layers: range) -> list[tuple[Array, Array]]:
    return [(found[f"present.{i}.key"], found[f"present.{i}.value"]) for i in layers]
