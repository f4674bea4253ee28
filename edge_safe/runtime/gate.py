"""Runs the prompt through the layers below the gate, and turns two logits into a verdict.

Whatever is not a clean pair of finite numbers is a ``GateError``, which becomes
``Decision.ERROR``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edge_safe.errors import GateError
from edge_safe.runtime.cache import GateColumns, KeyValueCache
from edge_safe.runtime.calibration import Fitted, score, sigmoid
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.inputs import Inputs
from edge_safe.runtime.prefill import ATTENTION_END, DEEPSTACK, Span, bind_part, chunks
from edge_safe.runtime.session import Array, Session
from edge_safe.runtime.verdict import Decision, Verdict


class Gate:
    """The graph of layers 0 .. k-1 with the safety head at layer k.

    Args:
        session: The graph that single tokens go through while decoding.
        exit_layer: Layer k.
        prefill: The graph that prompts go through.
    """

    def __init__(self, session: Session, exit_layer: int, prefill: Session) -> None:
        self.session = session
        self.layers = range(exit_layer)
        self._prefill = prefill

    def prefill(
        self,
        inputs: Inputs,
        cache: KeyValueCache,
        columns: GateColumns,
        deadline: Deadline,
        spans: Sequence[Span] = (),
    ) -> tuple[Inputs, Array]:
        """Reads new positions whose last one is slot T.

        The model's cache gets their keys and values, but ``cache.length`` stays as it is: the
        caller moves it on when every layer has seen the positions.

        Args:
            inputs: Embeddings of at least 2 positions; room for them was reserved in ``cache``.
            cache: The model's keys and values.
            columns: The new positions' columns are appended.
            deadline: Ends the run early.
            spans: New positions that see each other, without slot T.

        Returns:
            The hidden states at layer k and (1, 2) verdict logits.

        Raises:
            GateError: The deadline passed.
        """
        total, width = inputs.rows.shape
        states = np.empty((total, width), np.float32)
        logits = np.empty((1, 2), np.float32)
        for start, end in chunks(total, spans=spans):
            deadline.check()
            hidden = np.empty((1, end - start, width), np.float32)
            past = columns.view()
            shape = (*past.shape[:3], columns.length + end - start, past.shape[4])
            present = np.empty(shape, np.float32)
            logits[:] = np.nan
            binding = bind_part(self._prefill, "inputs_embeds", cache, inputs, start, end, spans)
            cache.bind(binding, self.layers)
            binding.input("gate_past", past)
            binding.output("gate_present", present)
            binding.output("hidden_states", hidden)
            binding.output("verdict_logits", logits)
            binding.run(deadline.abort)
            states[start:end] = hidden[0]
            columns.append(present[:, :, :, columns.length :])
        return inputs.with_rows(states), logits

    def judge_together(
        self, prompts: Sequence[Inputs], past: Array, columns: Array, deadline: Deadline
    ) -> Array:
        """(B, 2) verdict logits of whole prompts in one run, of which nothing is kept.

        Args:
            prompts: Embeddings of at least 2 positions each, slot T last; no spans.
            past: (1, kv_heads, 0, head_dim), an empty cache.
            columns: (1, 2, H, 0, dk), no columns.
            deadline: Ends the run early.
        """
        count, longest = len(prompts), max(map(len, prompts))
        width, axes = prompts[0].rows.shape[1], len(prompts[0].places)
        rows = np.zeros((count, longest, width), np.float32)
        mask = np.zeros((count, longest), np.int64)
        places = np.zeros((axes, count, longest), np.int64)
        deepstack = np.zeros((len(prompts[0].deepstack), count, longest, width), np.float32)
        for row, prompt in enumerate(prompts):
            end = len(prompt)
            rows[row, :end], mask[row, :end] = prompt.rows, 1
            places[:, row, :end], deepstack[:, row, :end] = prompt.places, prompt.deepstack
        feeds = {
            "inputs_embeds": rows,
            "attention_mask": mask,
            "position_ids": places[0] if axes == 1 else places,
            "gate_past": np.repeat(columns, count, axis=0),
            DEEPSTACK: deepstack,
            ATTENTION_END: np.broadcast_to(np.arange(longest), (count, longest)),
        }
        session, empty = self._prefill, np.repeat(past, count, axis=0)
        taken = {name: feeds.get(name, empty) for name in session.inputs}
        logits: Array = session.run(taken, deadline.abort, ["verdict_logits"])["verdict_logits"]
        return logits


def judge(logits: Array, calibration: Fitted, threshold: float, stage: str) -> Verdict:
    """Turns a stage's logits into its verdict.

    Args:
        logits: (1, 2), unsafe first.
        calibration: What turns log-odds into p_unsafe.
        threshold: Refuse when p_unsafe >= threshold.
        stage: Name of the stage.

    Raises:
        GateError: The logits have another shape or are not finite.
    """
    if logits.shape != (1, 2):
        raise GateError(f"stage '{stage}' gave verdict logits of shape {logits.shape}, not (1, 2)")
    unsafe, safe = float(logits[0, 0]), float(logits[0, 1])
    if not math.isfinite(unsafe - safe):
        raise GateError(f"stage '{stage}' gave verdict logits {unsafe}, {safe}")
    p_unsafe = sigmoid(score(calibration, unsafe - safe))
    refused = p_unsafe >= threshold
    return Verdict(Decision.REFUSE if refused else Decision.ALLOW, p_unsafe, stage)
