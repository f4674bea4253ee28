"""Runs the prompt through the layers below the gate, and turns two logits into a verdict.

Whatever is not a clean pair of finite numbers is a ``GateError``, which becomes
``Decision.ERROR``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_safe.errors import GateError
from edge_safe.runtime.cache import GateColumns, KeyValueCache
from edge_safe.runtime.calibration import Fitted, edge, refuses, score, sigmoid
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.inputs import Inputs
from edge_safe.runtime.prefill import (
    ATTENTION_END,
    DEEPSTACK,
    EARLY_BOUND,
    STATES,
    Span,
    bind_part,
    chunks,
)
from edge_safe.runtime.session import Array, Session
from edge_safe.runtime.verdict import Decision, Verdict

EARLY_VERDICT = "early_verdict_logits"

# A prompt that the graph finds clear must be clear after the rounding of what follows, too.
_MARGIN = 1e-3


@dataclass(slots=True)
class Passage:
    """What new positions left behind on their way through the gate's graph.

    Attributes:
        states: Hidden states at the gate's layer; None where the run ended at the early exit.
        logits: (1, 2) verdict logits, NaN where it did.
        early: (1, 2) verdict logits of the early exit; None where the graph has none.
    """

    states: Inputs | None
    logits: Array
    early: Array | None


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
        early_bound: float = math.inf,
    ) -> Passage:
        """Reads new positions whose last one is slot T.

        The model's cache gets their keys and values, but ``cache.length`` stays as it is: the
        caller moves it on when every layer has seen the positions.

        Args:
            inputs: Embeddings of at least 2 positions; room for them was reserved in ``cache``.
            cache: The model's keys and values.
            columns: The new positions' columns are appended.
            deadline: Ends the run early.
            spans: New positions that see each other, without slot T.
            early_bound: Log-odds from which on the run ends at the early exit; of its last chunk
                there are no columns then.

        Raises:
            GateError: The deadline passed.
        """
        total, width = inputs.rows.shape
        early = np.empty((1, 2), np.float32) if EARLY_VERDICT in self._prefill.outputs else None
        bound = np.empty(1, np.float32)
        states = np.empty((total, width), np.float32)
        logits = np.empty((1, 2), np.float32)
        for start, end in chunks(total, spans=spans):
            deadline.check()
            hidden = np.empty((1, end - start, width), np.float32)
            single = end - start == 1
            past = columns.view()
            # A single position leaves its states in place of columns.
            new = 0 if single else end - start
            shape = (*past.shape[:3], columns.length + new, past.shape[4])
            left = states_left(self._prefill, width) if single else {}
            present = np.empty(shape, np.float32)
            logits[:] = np.nan
            binding = bind_part(self._prefill, "inputs_embeds", cache, inputs, start, end, spans)
            if early is not None:
                # Only the last chunk has seen the whole prompt.
                bound[:] = early_bound if end == total else math.inf
                early[:] = np.nan
                binding.input(EARLY_BOUND, bound)
                binding.output(EARLY_VERDICT, early)
            cache.bind(binding, self.layers)
            binding.input("gate_past", past)
            binding.output("gate_present", present)
            binding.output("hidden_states", hidden)
            binding.output("verdict_logits", logits)
            for name, value in left.items():
                binding.output(name, value)
            binding.run(deadline.abort)
            if early is not None and early[0, 0] - early[0, 1] >= bound[0]:
                return Passage(None, logits, early)
            states[start:end] = hidden[0]
            if single:
                columns.defer(left | {"hidden_states": hidden})
            else:
                columns.append(present[:, :, :, columns.length :])
        return Passage(inputs.with_rows(states), logits, early)

    def judge_together(
        self,
        prompts: Sequence[Inputs],
        past: Array,
        columns: Array,
        early_bounds: Sequence[float],
        deadline: Deadline,
    ) -> tuple[Array, Array | None]:
        """Judges whole prompts in one run, of which nothing is kept.

        Args:
            prompts: Embeddings of at least 2 positions each, slot T last; no spans.
            past: (1, kv_heads, 0, head_dim), an empty cache.
            columns: (1, 2, H, 0, dk), no columns.
            early_bounds: See ``prefill``, one a prompt; the run ends early if all are clear.
            deadline: Ends the run early.

        Returns:
            (B, 2) verdict logits of the gate, and those of the early exit if there is one.
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
            EARLY_BOUND: np.array(early_bounds, np.float32),
            DEEPSTACK: deepstack,
            ATTENTION_END: np.broadcast_to(np.arange(longest), (count, longest)),
        }
        session, empty = self._prefill, np.repeat(past, count, axis=0)
        taken = {name: feeds.get(name, empty) for name in session.inputs}
        wanted = [n for n in ("verdict_logits", EARLY_VERDICT) if n in session.outputs]
        found = session.run(taken, deadline.abort, wanted)
        return found["verdict_logits"], found.get(EARLY_VERDICT)


def states_left(session: Session, width: int) -> dict[str, Array]:
    """Room (1, 1, d) for the states that a run of one position leaves beside ``hidden_states``."""
    names = (name for name in session.outputs if name.startswith(STATES))
    return {name: np.empty((1, 1, width), np.float32) for name in names}


def early_bound(calibration: Fitted, threshold: float) -> float:
    """Log-odds from which on a prompt ends at the early exit; infinite where none surely would."""
    bound = edge(calibration, threshold) + _MARGIN
    return bound if refuses(calibration, bound, threshold) else math.inf


def judge(
    logits: Array, calibration: Fitted, threshold: float, stage: str, layer: int | None = None
) -> Verdict:
    """Turns a stage's logits into its verdict.

    Args:
        logits: (1, 2), unsafe first.
        calibration: What turns log-odds into p_unsafe.
        threshold: Refuse when p_unsafe >= threshold.
        stage: Name of the stage.
        layer: Where it reads, None at full depth.

    Raises:
        GateError: The logits have another shape or are not finite.
    """
    if logits.shape != (1, 2):
        raise GateError(f"stage '{stage}' gave verdict logits of shape {logits.shape}, not (1, 2)")
    unsafe, safe = float(logits[0, 0]), float(logits[0, 1])
    if not math.isfinite(unsafe - safe):
        raise GateError(f"stage '{stage}' gave verdict logits {unsafe}, {safe}")
    p_unsafe = sigmoid(score(calibration, unsafe - safe))
    decision = Decision.REFUSE if p_unsafe >= threshold else Decision.ALLOW
    return Verdict(decision, p_unsafe, stage, layer=layer)
