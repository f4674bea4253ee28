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
    Chunk,
    Span,
    chunks,
)
from edge_safe.runtime.session import Array, Buffer, Session, on_host, room
from edge_safe.runtime.verdict import Decision, Verdict

EARLY_VERDICT = "early_verdict_logits"
EARLY_PRESENT = "early_present"

# A prompt that the graph finds clear must be clear after the rounding of what follows, too.
_MARGIN = 1e-3


@dataclass(slots=True)
class Passage:
    """What new positions left behind on their way through the gate's graph.

    Attributes:
        inputs: The positions.
        hidden: Hidden states at the gate's layer, (1, n, d) of each chunk, on the device; none
            where the run ended at the early exit.
        logits: (1, 2) verdict logits, NaN where it did.
        early: (1, 2) verdict logits of the early exit; None where the graph has none.
    """

    inputs: Inputs
    hidden: list[Array | Buffer]
    logits: Array
    early: Array | None

    @property
    def ended_early(self) -> bool:
        """Whether the layers up to the gate did not run."""
        return not self.hidden

    def states(self) -> Inputs:
        """The positions with their hidden states, which are copied to the host."""
        rows = [on_host(chunk)[0] for chunk in self.hidden]
        return self.inputs.with_rows(rows[0] if len(rows) == 1 else np.concatenate(rows))


class Gate:
    """The graph of layers 0 .. k-1 with the safety head at layer k.

    Args:
        session: The graph that single tokens go through while decoding.
        exit_layer: Layer k.
        prefill: The graph that prompts go through.
        late: Where that one ends at the early exit: the graph behind it, which ends at layer k.
        own_columns: Whether ``gate_present`` holds single positions too.
    """

    def __init__(
        self,
        session: Session,
        exit_layer: int,
        prefill: Session,
        late: Session | None = None,
        *,
        own_columns: bool = False,
    ) -> None:
        self.session = session
        self.late = late
        self.layers = range(exit_layer)
        self.own_columns = own_columns
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
            GateError: The request is over.
        """
        total = len(inputs)
        states: list[Array | Buffer] = []
        verdicts = Verdicts(EARLY_VERDICT in self._prefill.outputs)
        for start, end in chunks(total, spans=spans):
            deadline.check()
            # Only the last chunk has seen the whole prompt.
            bound = early_bound if end == total else math.inf
            chunk = Chunk(inputs, start, end, spans)
            hidden = self._run_chunk(chunk, cache, columns, deadline, verdicts, bound)
            if hidden is None:
                return Passage(inputs, [], verdicts.late, verdicts.early)
            states.append(hidden)
        return Passage(inputs, states, verdicts.late, verdicts.early)

    def _run_chunk(
        self,
        chunk: Chunk,
        cache: KeyValueCache,
        columns: GateColumns,
        deadline: Deadline,
        verdicts: Verdicts,
        bound: float,
    ) -> Array | Buffer | None:
        """Reads one chunk; gives its (1, n, d) states, None where it ended at the early exit."""
        count, width = len(chunk), chunk.inputs.rows.shape[1]
        past = columns.view()
        # A single position may leave its states apart from the others.
        apart = count == 1 and not self.own_columns
        new = 0 if apart else count
        # It holds the columns of the past as well, and takes their place.
        present: Array | Buffer = columns.room(new)
        if self._prefill.device != "cpu":
            present = room(present.shape, self._prefill.device)
        verdicts.forget()
        binding = chunk.bind(self._prefill, "inputs_embeds", cache)
        binding.input("gate_past", past)
        if verdicts.early is not None:
            binding.output(EARLY_VERDICT, verdicts.early)
        if self.late is not None:
            # The early exit is the end of this graph: what is clear goes no further.
            handed = handed_on(self._prefill, width, count, present.shape[2])
            for name, value in handed.items():
                binding.output(name, value)
            cache.bind(binding, self._prefill.layers)
            binding.run(deadline.abort)
            if verdicts.clear(bound):
                return None
            binding = chunk.bind(self.late, None, cache)
            binding.input("gate_past", past)
            for name, value in handed.items():
                binding.input(name, value)
        elif verdicts.early is not None:
            binding.input(EARLY_BOUND, np.full(1, bound, np.float32))
        hidden = room((1, count, width), self._prefill.device)
        outputs: dict[str, Array | Buffer] = {
            "hidden_states": hidden,
            "gate_present": present,
            "verdict_logits": verdicts.late,
        }
        if apart:
            column, left = single_column(self._prefill, width)
            for name, value in left.items():
                binding.output(name, value)
        for name, value in outputs.items():
            binding.output(name, value)
        cache.bind(binding, (self.late or self._prefill).layers)
        binding.run(deadline.abort)
        if verdicts.clear(bound):
            return None
        if apart:
            column[0, -1] = on_host(hidden)[0]
            columns.append_single(column)
        else:
            columns.take(on_host(present))
        return hidden

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
            past: (1, kv_heads, C, head_dim), an empty cache; C is 0, or the longest prompt where
                graphs take all places of a cache at once.
            columns: (1, K, 0, d), no columns.
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
        empty = np.repeat(past, count, axis=0)
        wanted = ["verdict_logits", EARLY_VERDICT]
        if self.late is None:
            found = _run_on(self._prefill, feeds, empty, deadline, wanted)
            return found["verdict_logits"], found.get(EARLY_VERDICT)
        handed = [n for n in self._prefill.outputs if not n.startswith("present.")]
        first = _run_on(self._prefill, feeds, empty, deadline, handed)
        early = first[EARLY_VERDICT]
        if (early[:, 0] - early[:, 1] >= feeds[EARLY_BOUND]).all():
            return np.full_like(early, np.nan), early
        found = _run_on(self.late, feeds | first, empty, deadline, wanted)
        return found["verdict_logits"], early


class Verdicts:
    """What a prompt's chunks are judged by; the last one's stays.

    Attributes:
        late: (1, 2) verdict logits at the gate's layer, NaN where a run did not get there.
        early: (1, 2) of the early exit; None without one.
    """

    def __init__(self, has_early: bool) -> None:
        self.late = np.full((1, 2), np.nan, np.float32)
        self.early = np.full((1, 2), np.nan, np.float32) if has_early else None

    def forget(self) -> None:
        """Makes room for the next chunk's."""
        self.late[:] = np.nan
        if self.early is not None:
            self.early[:] = np.nan

    def clear(self, bound: float) -> bool:
        """Whether the early exit's log-odds reach a bound; those of NaN never do."""
        # Without a bound nothing is clear, whatever the logits are.
        return (
            self.early is not None
            and math.isfinite(bound)
            and bool(self.early[0, 0] - self.early[0, 1] >= np.float32(bound))
        )


def _run_on(
    session: Session,
    feeds: dict[str, Array],
    cache: Array,
    deadline: Deadline,
    wanted: Sequence[str],
) -> dict[str, Array]:
    """Runs a graph on those of the feeds that it takes, every cache being the same."""
    taken = {
        name: cache if name.startswith("past_key_values.") else feeds[name]
        for name in session.inputs
    }
    return session.run(taken, deadline.abort, [n for n in wanted if n in session.outputs])


def single_column(session: Session, width: int) -> tuple[Array, dict[str, Array]]:
    """Room (1, K, 1, d) for the column of one position, and its parts by a graph's outputs.

    Of the layer that the graph ends at, the last one, there is no part: ``hidden_states`` may
    belong on a device.
    """
    names = [name for name in session.outputs if name.startswith(STATES)]
    column = np.empty((1, len(names) + 1, 1, width), np.float32)
    return column, {name: column[:, row] for row, name in enumerate(names)}


def handed_on(session: Session, width: int, count: int, seen: int) -> dict[str, Array | Buffer]:
    """Room for what the graph that ends at the early exit hands on, where it was computed.

    Args:
        session: The graph.
        width: Of a state, d.
        count: New positions n.
        seen: Positions, the new ones included.
    """
    names = [name for name in session.outputs if name.startswith(STATES)]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (1, count, width))
    shapes[EARLY_PRESENT] = (1, _number(session.shape(EARLY_PRESENT)[1]), seen, width)
    return {name: room(shape, session.device) for name, shape in shapes.items()}


def _number(size: str | int | None) -> int:
    if not isinstance(size, int):
        raise GateError(f"a graph's early exit says {size!r} of its number of layers")
    return size


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
