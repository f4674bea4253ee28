"""The layers behind the gate: answer logits for a prompt, then token after token.

It is only called when the gate let the request pass. It does not choose tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_safe.errors import GateError
from edge_safe.runtime.cache import GateColumns, KeyValueCache
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.gate import EARLY_VERDICT, Gate, handed_on, single_column
from edge_safe.runtime.inputs import Inputs
from edge_safe.runtime.manifest import ModelInfo
from edge_safe.runtime.prefill import (
    ATTENTION_END,
    DEEPSTACK,
    EARLY_BOUND,
    Chunk,
    Span,
    chunks,
    position_ids,
)
from edge_safe.runtime.session import Array, Binding, Buffer, Session, room

_MASKS = 31  # made ahead; they share the memory of the longest


class Decoder:
    """The graph of layers k .. L-1 and lm_head; all layers where a bundle has no gate.

    Args:
        session: The graph that single tokens go through while decoding.
        layers: Its layers.
        vocab_size: Words there are.
        prefill: The graph that prompts go through.
    """

    def __init__(self, session: Session, layers: range, vocab_size: int, prefill: Session) -> None:
        self.session = session
        self._prefill = prefill
        self.layers = layers
        self.vocab_size = vocab_size
        self.source = "hidden_states" if "hidden_states" in session.inputs else "inputs_embeds"

    def prefill(
        self,
        inputs: Inputs,
        cache: KeyValueCache,
        deadline: Deadline,
        spans: Sequence[Span] = (),
    ) -> tuple[Array | None, Array]:
        """Reads new positions whose last one is slot T.

        Args:
            inputs: Hidden states at layer k, or input embeddings without a gate.
            cache: The model's keys and values; ``cache.length`` stays as it is.
            deadline: Ends the run early.
            spans: New positions that see each other, without slot T.

        Returns:
            (1, 1, V) logits at slot T, None where ``read_slot`` gives them, and (1, 2) verdict
            logits of the ``final`` stage.

        Raises:
            GateError: The request is over, or a number is not finite that a later chunk would see
                rounded to one that is.
        """
        _require_finite(inputs.rows)
        logits = np.empty((1, 1, self.vocab_size), np.float32)
        verdict = np.empty((1, 2), np.float32)
        for start, end in chunks(len(inputs), spans=spans):
            deadline.check()
            logits[:] = verdict[:] = np.nan
            binding = Chunk(inputs, start, end, spans).bind(self._prefill, self.source, cache)
            cache.bind(binding, self.layers)
            if "logits" in self._prefill.outputs:
                binding.output("logits", logits)
            binding.output("verdict_logits", verdict)
            binding.run(deadline.abort)
            if end < len(inputs):
                _require_finite(verdict)
        return (logits if "logits" in self._prefill.outputs else None), verdict

    def read_slot(self, inputs: Inputs, cache: KeyValueCache, deadline: Deadline) -> Array:
        """Reads slot T once more, through the graph for single tokens, which has lm_head.

        Args:
            inputs: As they were given to ``prefill``, after which this is called.
            cache: Likewise.
            deadline: Ends the run early.

        Returns:
            (1, 1, V) logits at slot T.
        """
        logits = np.full((1, 1, self.vocab_size), np.nan, np.float32)
        total = len(inputs)
        binding = Chunk(inputs, total - 1, total).bind(self.session, self.source, cache)
        cache.bind(binding, self.layers)
        binding.output("logits", logits)
        binding.output("verdict_logits", np.empty((1, 2), np.float32))
        binding.run(deadline.abort)
        return logits


def _require_finite(values: Array) -> None:
    """Raises a GateError where layers are given, or give, what is not finite."""
    if not np.isfinite(values).all():
        raise GateError("the upper layers met numbers that are not finite")


class Stepper:
    """Decodes one sequence token by token; every buffer is bound once.

    Only the attention mask is bound anew at each step, since its length is its meaning, and the
    caches when they had to grow.
    """

    def __init__(
        self,
        embed: Session,
        gate: Gate | None,
        decoder: Decoder,
        cache: KeyValueCache,
        columns: GateColumns | None,
        model: ModelInfo,
    ) -> None:
        width = model.hidden_size
        self._cache = cache
        self._columns = columns
        self._token = np.zeros((1, 1), np.int64)
        self._position = position_ids(np.zeros((model.position_axes, 1), np.int64))
        nothing = np.zeros((model.deepstack, 1, 1, width), np.float32)
        self._end = np.zeros((1, 1), np.int64)
        self._masks: list[Buffer] = []
        self._logits = np.empty((1, 1, decoder.vocab_size), np.float32)
        embeds = np.empty((1, 1, width), np.float32)
        device = decoder.session.device
        # Nobody reads what decoding steps say of the verdict.
        verdict = room((1, 2), device)
        self._embed = embed.binding()
        self._embed.input("input_ids", self._token)
        self._embed.output("inputs_embeds", embeds)
        self._stages: list[tuple[Binding, range]] = []
        sessions = []
        self._column = np.empty((1, 0, 1, width), np.float32)
        states: Array | Buffer = embeds
        if gate is not None and columns is not None:
            empty = columns.empty()
            present = np.empty((*empty.shape[:2], int(gate.own_columns), width), np.float32)
            binding = gate.session.binding()
            binding.input("inputs_embeds", embeds)
            if EARLY_VERDICT in gate.session.outputs:
                binding.output(EARLY_VERDICT, room((1, 2), device))
            if EARLY_BOUND in gate.session.inputs:
                binding.input(EARLY_BOUND, np.full(1, np.inf, np.float32))
            if gate.own_columns:
                states, self._column = room((1, 1, width), device), present
            else:
                # Kept on the host, where columns are.
                self._column, left = single_column(gate.session, width)
                states = self._column[:, -1]
                for name, value in left.items():
                    binding.output(name, value)
            if gate.late is not None:
                handed = handed_on(gate.session, width, 1, present.shape[2])
                binding.input("gate_past", empty)
                for name, part in handed.items():
                    binding.output(name, part)
                sessions.append(gate.session)
                self._stages.append((binding, gate.session.layers))
                binding = gate.late.binding()
                for name, part in handed.items():
                    binding.input(name, part)
            binding.input("gate_past", empty)
            binding.output("gate_present", present)
            binding.output("hidden_states", states)
            binding.output("verdict_logits", verdict)
            last = gate.late or gate.session
            sessions.append(last)
            self._stages.append((binding, last.layers))
        sessions.append(decoder.session)
        binding = decoder.session.binding()
        binding.input(decoder.source, states)
        binding.output("logits", self._logits)
        binding.output("verdict_logits", verdict)
        self._stages.append((binding, decoder.layers))
        for session, (binding, layers) in zip(sessions, self._stages, strict=True):
            binding.input("position_ids", self._position)
            if ATTENTION_END in session.inputs:
                # What is decoded sees what stands before it.
                binding.input(ATTENTION_END, self._end)
            if DEEPSTACK in session.inputs:
                binding.input(DEEPSTACK, nothing)
            cache.bind(binding, layers)

    def step(self, token: int) -> Array:
        """Feeds one token and returns the (V,) logits behind it, valid until the next step.

        Raises:
            PromptError: The context is full.
        """
        cache = self._cache
        if cache.reserve(cache.length + 1):
            for binding, layers in self._stages:
                cache.bind(binding, layers)
        self._token[0, 0] = token
        self._position[:] = cache.place
        self._end[:] = cache.length
        mask = self._mask(cache.length + 1)
        self._embed.run()
        for binding, _ in self._stages:
            binding.input("attention_mask", mask)
            binding.run()
        cache.extend(1, 1)
        if self._columns is not None:
            self._columns.append_single(self._column)
        logits: Array = self._logits[0, 0]
        return logits

    def _mask(self, length: int) -> Buffer:
        """The mask (1, length) of positions that are all real.

        Masks are made some at a time: between two tokens nothing of what makes one is left in the
        core's caches, and it takes ten times as long.
        """
        if not self._masks or self._masks[-1].shape[1] != length:
            ones = np.ones((1, length + _MASKS), np.int64)
            lengths = range(length + _MASKS, length - 1, -1)
            self._masks = [Buffer(ones[:, :one], "cpu") for one in lengths]
        return self._masks.pop()
