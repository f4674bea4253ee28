"""One request through the graphs: gate first, decoder only after ``allow``.

It sees embeddings and token ids. Words, pictures and policies' texts are the business of others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edge_safe.errors import BundleError, EdgeSafeError, GateError, PolicyError
from edge_safe.runtime.bundle import Bundle
from edge_safe.runtime.cache import GateColumns, KeyValueCache
from edge_safe.runtime.calibration import Modality
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.decoder import Decoder, Stepper
from edge_safe.runtime.early_exit import EarlyThreshold
from edge_safe.runtime.gate import Gate, judge
from edge_safe.runtime.inputs import Inputs, in_a_row, join
from edge_safe.runtime.manifest import LATE
from edge_safe.runtime.mapped import give_back
from edge_safe.runtime.policy import STAGES, Policy, Stage
from edge_safe.runtime.prefill import PREFILL, Span
from edge_safe.runtime.prefix import Prefix, PrefixCache
from edge_safe.runtime.session import Array, Session, open_sessions
from edge_safe.runtime.spare_memory import SpareMemory
from edge_safe.runtime.state import Owed, State
from edge_safe.runtime.verdict import Decision, Verdict

_SPARE_BYTES = 32 * 2**20
"""Of the gate's columns of a prompt, kept for the next one: those of 4,800 positions of pebble."""

_DTYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8}


@dataclass(slots=True)
class Judged:
    """A prompt the gate has seen.

    Attributes:
        verdict: The decision.
        states: What the decoder still has to read, None once it has or never may.
        logits: (1, 1, V) logits at slot T, where the decoder already ran for its verdict.
        ended_early: Whether the layers above the early exit did not run.
        spans: Of the prompt's positions, those that see each other.
        beginning: (n,) first ids of the prompt, to be kept once the decoder has read them.
    """

    verdict: Verdict
    states: Inputs | None = None
    logits: Array | None = None
    spans: Sequence[Span] = ()
    beginning: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    ended_early: bool = False


def failed(error: Exception, stage: str, deadline: Deadline) -> Verdict:
    """The verdict for a request that something kept from being judged."""
    reason = deadline.over or str(error) or type(error).__name__
    return Verdict(Decision.ERROR, math.nan, stage, reason=reason)


def mendable(error: Exception) -> bool:
    """Whether the caller can mend what went wrong, who is told then; all else is a verdict."""
    return isinstance(error, EdgeSafeError) and not isinstance(error, GateError)


class Engine:
    """The graphs of a bundle, and the rule in which order they run. Shared between threads.

    Args:
        bundle: The bundle.
        prefix_bytes: What is kept of beginnings that prompts share, at most.
    """

    def __init__(self, bundle: Bundle, prefix_bytes: int = 0) -> None:
        self._bundle = bundle
        self._manifest = bundle.manifest
        self._safe_token = bundle.manifest.safety.safe_token_id
        # Where all of a prompt sees all of it, a beginning depends on what follows.
        whole = bundle.manifest.model.bidirectional == "prompt"
        self._prefixes = PrefixCache(0 if whole else prefix_bytes)
        self._memory = SpareMemory(_SPARE_BYTES)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Hashes the language model's files while the body runs, and opens its graphs.

        They are opened as soon as their files are hashed, but not later than behind the body: both
        at once would take the memory of both. Engines are built behind it, since that takes minutes
        and the body may fail.

        Raises:
            BundleError: A graph is missing or cannot be opened.
            IntegrityError: A file is not the one the manifest names.
            ProviderError: The provider did not start.
        """
        bundle = self._bundle
        # What takes longest goes first: graphs for whole prompts, which have conditions.
        names = self._names()[::-1]
        for name in names:
            # Found here, since the body may let no other thread run Python for long.
            bundle.files_of(name)

        def check_and_open(name: str) -> Path:
            path = bundle.check_graph(name)
            if bundle.provider == "cpu":
                bundle.session(name)
            return path

        with ThreadPoolExecutor(2 * len(names)) as pool:
            checking = [pool.submit(check_and_open, name) for name in names]
            yield
            opened = list(pool.map(bundle.session, names))
            for one in checking:
                one.result()
        # Pages go by their addresses: nobody else may be about to unmap some of this folder.
        if open_sessions() == len(opened):
            give_back(bundle.folder)

    def new_state(self) -> State:
        """An empty sequence.

        Raises:
            BundleError: The manifest's caches are of a type that is not held here.
        """
        manifest = self._manifest
        if manifest.cache_dtype not in _DTYPES:
            raise BundleError(
                f"The bundle's KV cache is in {manifest.cache_dtype}; this version holds "
                f"{', '.join(_DTYPES)}. Export the bundle again."
            )
        attention = manifest.safety.attention
        device = self._bundle.session("decoder").device
        return State(
            KeyValueCache(manifest, np.dtype(_DTYPES[manifest.cache_dtype]), device),
            None
            if attention is None
            else GateColumns(len(attention.layers), manifest.model.hidden_size, self._memory),
        )

    def stages(self, policy: Policy) -> tuple[Stage, ...]:
        """The stages a policy asks, in their order.

        Raises:
            PolicyError: The bundle has no such stage.
        """
        known = [stage for stage in STAGES if stage in self._manifest.safety.stages]
        for stage in (*policy.stages, *policy.thresholds):
            if stage not in known:
                raise PolicyError(
                    f"The policy names stage '{stage}'; this bundle has: {', '.join(known)}."
                )
        return policy.stages or (known[0],)

    def embed(self, ids: Sequence[int] | Array) -> Inputs:
        """Word embeddings of token ids (n,)."""
        feed = np.asarray(ids, np.int64)[None]
        rows: Array = self._bundle.session("embed_tokens").run({"input_ids": feed})["inputs_embeds"]
        return self.place(np.asarray(rows[0], np.float32))

    def place(self, rows: Array) -> Inputs:
        """Embeddings (n, d) whose places are counted one by one."""
        model = self._manifest.model
        return in_a_row(rows, model.position_axes, model.deepstack)

    def judge(
        self,
        inputs: Inputs,
        state: State,
        policy: Policy,
        deadline: Deadline,
        modality: Modality = "text",
        spans: Sequence[Span] = (),
        leading: Array | None = None,
    ) -> Judged:
        """Puts the safe token at slot T, runs the stages and rolls back unless all allow.

        After ``allow`` call ``open`` next. After anything else the model's cache is as it was; of
        a refused prompt the gate's columns stay, without slot T; where it ended at the early exit
        ``settle`` brings them in.

        Args:
            inputs: Embeddings of the new part of the prompt, T positions.
            state: Moved on by this call.
            policy: Stages and thresholds.
            deadline: What ends it early.
            modality: The way in of all that the gate sees, past turns included.
            spans: Of the T new positions, those that see each other.
            leading: (n,) ids of the first of them, as far as they have ids.

        Returns:
            The verdict; ``Decision.ERROR`` for whatever kept the gate from deciding.
        """
        stages = self.stages(policy)
        try:
            deadline.check()
            self.settle(state, deadline)
            if state.columns is not None and state.columns.length < state.cache.length:
                raise GateError("the gate has seen less than the model")
        except GateError as error:
            return Judged(failed(error, stages[0], deadline))
        before = length, seen = state.lengths()
        if before != (0, 0) or leading is None:
            leading = np.zeros(0, np.int64)
        # T-1 has to be in the same run as slot T.
        leading = leading[: len(inputs) - 1]
        try:
            judged = self._judge(inputs, state, stages, policy, deadline, modality, spans, leading)
        except Exception as error:
            if mendable(error):
                state.rewind(before)
                raise
            judged = Judged(failed(error, stages[0], deadline))
        except BaseException:
            state.rewind(before)
            raise
        if judged.ended_early:
            state.rewind(before)
            state.owed = Owed(inputs, spans)
        elif judged.verdict.decision is Decision.REFUSE:
            state.rewind((length, seen + len(inputs)))
        elif judged.verdict.decision is Decision.ERROR:
            state.rewind(before)
        return judged

    def settle(self, state: State, deadline: Deadline) -> None:
        """Shows the gate the rest of a prompt that was refused at its early exit.

        So a refused prompt costs no more than the early exit where nothing follows it, and what
        follows is judged over all of it all the same.

        Raises:
            GateError: The request is over, or the run failed; it is still owed then.
        """
        owed, gate = state.owed, self._gate()
        if owed is None or gate is None or state.columns is None:
            return
        before = length, seen = state.lengths()
        whole = join([owed.inputs, self.embed([self._safe_token])])
        try:
            state.cache.reserve(length + len(whole))
            passage = gate.prefill(whole, state.cache, state.columns, deadline, owed.spans)
            if passage.ended_early:
                raise GateError("it was not read to its end")
        except BaseException as error:
            state.rewind(before)
            state.owed = owed
            if isinstance(error, EdgeSafeError) or not isinstance(error, Exception):
                raise
            raise GateError(f"a refused turn could not be read: {error}") from error
        state.rewind((length, seen + len(owed.inputs)))

    def judges_together(self, policy: Policy) -> bool:
        """Whether several prompts can be judged in one run: where the gate alone is asked.

        TensorRT's engines take one prompt at a time.
        """
        engines = self._bundle.provider.startswith("tensorrt")
        return self.stages(policy) == ("gate",) and not engines

    def judge_together(
        self, prompts: Sequence[tuple[Inputs, Modality]], policy: Policy, deadline: Deadline
    ) -> list[Verdict]:
        """Judges whole prompts in one run of the gate; nothing of them is kept.

        Args:
            prompts: Embeddings of T positions, and the way in.
            policy: One that asks the gate alone.
            deadline: What ends it early.

        Raises:
            GateError: The run failed. A prompt whose own logits are unusable is no such case: its
                verdict is ``Decision.ERROR``.
        """
        gate, state = self._gate(), self.new_state()
        if gate is None or state.columns is None or not self.judges_together(policy):
            raise GateError("prompts are judged together by the gate alone")
        slot = self.embed([self._safe_token])
        early = [self._early(("gate",), policy, modality) for _, modality in prompts]
        try:
            logits, early_logits = gate.judge_together(
                [join([inputs, slot]) for inputs, _ in prompts],
                state.cache.nothing(1 + max(len(inputs) for inputs, _ in prompts)),
                state.columns.empty(),
                [one.bound for one in early],
                deadline,
            )
        except Exception as error:
            raise GateError(f"prompts could not be judged together: {error}") from error
        deadline.check()
        if len(logits) != len(prompts):
            raise GateError(f"{len(prompts)} prompts got {len(logits)} verdicts")
        verdicts = []
        for row, (_, modality) in enumerate(prompts):
            own = slice(row, row + 1)
            try:
                verdict = early[row].verdict(None if early_logits is None else early_logits[own])
                if verdict is None:
                    verdict = self._verdict(logits[own], "gate", policy, modality)
                verdicts.append(verdict)
            except GateError as error:
                verdicts.append(failed(error, "gate", deadline))
        return verdicts

    def open(self, judged: Judged, state: State, deadline: Deadline) -> Array:
        """Runs the decoder over an allowed prompt, unless the verdict already needed it.

        Returns:
            (V,) logits of the first answer token.

        Raises:
            GateError: The prompt was not allowed, or the request is over.
        """
        logits = judged.logits
        if logits is None:
            if judged.states is None:
                raise GateError("the prompt was not allowed, it cannot be answered")
            decoder = self._decoder()
            logits, _ = decoder.prefill(judged.states, state.cache, deadline, judged.spans)
            if logits is None:
                logits = decoder.read_slot(judged.states, state.cache, deadline)
            state.cache.extend(len(judged.states), judged.states.span)
            judged.states, judged.logits = None, logits
            self._keep(judged.beginning, state, range(self._manifest.model.layers))
        row: Array = logits[0, 0]
        return row

    def stepper(self, state: State) -> Callable[[int], Array]:
        """A function that feeds one token and returns the (V,) logits behind it."""
        stepper = Stepper(
            self._bundle.session("embed_tokens"),
            self._gate(),
            self._decoder(),
            state.cache,
            state.columns,
            self._manifest.model,
        )
        return stepper.step

    def _judge(
        self,
        inputs: Inputs,
        state: State,
        stages: tuple[Stage, ...],
        policy: Policy,
        deadline: Deadline,
        modality: Modality,
        spans: Sequence[Span],
        leading: Array,
    ) -> Judged:
        """The stages one after the other; the first one that does not allow ends it."""
        state.cache.reserve(state.cache.length + len(inputs) + 1)
        prefix, count = self._prefixes.find(leading)
        if prefix is not None:
            prefix.load(count, state.cache, state.columns)
        states = join([inputs.behind(count), self.embed([self._safe_token])])
        spans = [(first - count, end - count) for first, end in spans]
        gate = self._gate()
        beginning = leading[: self._prefixes.worth_keeping(leading)]
        if gate is not None and state.columns is not None:
            early = self._early(stages, policy, modality)
            passage = gate.prefill(states, state.cache, state.columns, deadline, spans, early.bound)
            deadline.check()
            # Before anything is kept: what is no number must not come back.
            verdict = early.verdict(passage.early)
            if passage.ended_early:
                if verdict is None:
                    raise GateError("the early exit ended a prompt that its verdict lets pass")
                return Judged(verdict, ended_early=True)
            if verdict is not None:
                return Judged(verdict)
            if "gate" in stages:
                verdict = self._verdict(passage.logits, "gate", policy, modality)
            if prefix is None and len(beginning):
                self._keep(beginning, state, gate.layers, passage.states())
            if verdict is not None and verdict.decision is not Decision.ALLOW:
                return Judged(verdict)
            states = passage.states()
            if prefix is not None and prefix.states is not None:
                # Of the beginning the decoder has read nothing yet.
                state.cache.truncate(0)
                states = join([self.place(prefix.states[:count]), states])
                spans = [(first + count, end + count) for first, end in spans]
                self._keep(beginning, state, gate.layers, states)
                beginning = beginning if len(beginning) else leading[:count]
            if verdict is not None and stages[-1] == "gate":
                return Judged(verdict, states, spans=spans, beginning=beginning)
        decoder = self._decoder()
        logits, final = decoder.prefill(states, state.cache, deadline, spans)
        deadline.check()
        verdict = self._verdict(final, "final", policy, modality)
        self._keep(beginning, state, range(self._manifest.model.layers))
        if verdict.decision is Decision.ALLOW:
            if logits is None:
                logits = decoder.read_slot(states, state.cache, deadline)
            state.cache.extend(len(states), states.span)
        return Judged(verdict, None, logits)

    def _keep(
        self, beginning: Array, state: State, layers: range, states: Inputs | None = None
    ) -> None:
        """Keeps what the first layers have read of a prompt's beginning."""
        count = len(beginning)
        if count:
            columns = None if state.columns is None else state.columns.first(count)
            caches = state.cache.copy(range(layers.stop), count)
            rows = None if states is None else states.rows[:count].copy()
            self._prefixes.keep(Prefix(beginning, caches, columns, rows))

    def _verdict(self, logits: Array, stage: Stage, policy: Policy, modality: Modality) -> Verdict:
        """Judges one stage by the policy's threshold, or else by that of the way in."""
        calibration = self._manifest.safety.stages[stage].of(modality)
        threshold = policy.thresholds.get(stage, calibration.threshold)
        layer = self._manifest.safety.exit_layer if stage == "gate" else None
        return judge(logits, calibration, threshold, stage, layer)

    def _early(
        self, stages: tuple[Stage, ...], policy: Policy, modality: Modality
    ) -> EarlyThreshold:
        """What a policy asks of the early exit; see ``Policy.early_threshold``."""
        exit_there = self._manifest.safety.early
        if exit_there is None or "gate" not in stages:
            return EarlyThreshold()
        calibration = exit_there.calibration.of(modality)
        threshold = policy.early_threshold
        if threshold is None:
            if "gate" in policy.thresholds:
                return EarlyThreshold()
            threshold = calibration.threshold
        return EarlyThreshold(exit_there.layer, calibration, threshold)

    def _names(self) -> list[str]:
        """The language model's graphs."""
        names = ["decoder"] if self._manifest.safety.exit_layer is None else ["gate", "decoder"]
        names += [
            name + ending
            for name in names
            for ending in (PREFILL, LATE)
            if name + ending in self._manifest.graphs
        ]
        return ["embed_tokens", *names]

    def _gate(self) -> Gate | None:
        """The gate's graph, opened on first use."""
        layer = self._manifest.safety.exit_layer
        if layer is None:
            return None
        late = f"gate{LATE}"
        return Gate(
            self._bundle.session("gate"),
            layer,
            self._prefill_session("gate"),
            self._bundle.session(late) if late in self._manifest.graphs else None,
            own_columns=self._manifest.own_columns,
        )

    def _decoder(self) -> Decoder:
        """The decoder's graph, opened on first use."""
        model = self._manifest.model
        layers = range(self._manifest.safety.exit_layer or 0, model.layers)
        session, prefill = self._bundle.session("decoder"), self._prefill_session("decoder")
        return Decoder(session, layers, model.vocab_size, prefill)

    def _prefill_session(self, name: str) -> Session:
        """What prompts go through: a graph of its own, or the one for decoding."""
        own = name + PREFILL
        return self._bundle.session(own if own in self._manifest.graphs else name)
