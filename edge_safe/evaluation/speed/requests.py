"""The ways a request can take, timed: to the verdict, the refusal, the first token, the answer.

The verdict itself must not depend on luck: one policy's thresholds allow every request, the
other's refuse every one. The same work is done either way.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_safe.errors import GateError
from edge_safe.evaluation.speed.samples import Action
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.media import AudioInput, ImageInput
from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.policy import Policy
from edge_safe.runtime.reply import Reply
from edge_safe.runtime.sampler import Sampler, Sampling
from edge_safe.runtime.session import Array
from edge_safe.runtime.verdict import Decision

LATE = "late_refusal_ms"
"""A refusal by the gate, of a request that the early exit let pass."""

SECOND_TURN = "And what happened then?"


def load_forgetful(
    folder: Path, threads: int | None = None, provider: str | None = None
) -> SafeModel:
    """A loaded bundle that computes everything anew, or the second round would be another one.

    One that failed its acceptance test is as fast as any.
    """
    return SafeModel.load(
        folder,
        threads=threads,
        provider=provider,
        accept_failed=True,
        prefix_cache_mb=0,
        media_cache_mb=0,
    )


def allowing(model: SafeModel) -> SafeModel:
    """The model under a policy that allows whatever is not certain to be harmful."""
    return model.with_policy(_at(model, 1.0, 1.0))


def refusing(model: SafeModel) -> SafeModel:
    """The model under a policy that refuses everything, at the early exit if there is one."""
    return model.with_policy(_at(model, 0.0, 0.0))


def refusing_late(model: SafeModel) -> SafeModel:
    """The model under a policy that lets the early exit pass and refuses everything behind it."""
    return model.with_policy(_at(model, 0.0, 1.0))


def _at(model: SafeModel, threshold: float, early: float) -> Policy:
    stages = model.manifest.safety.stages
    return msgspec.structs.replace(
        model.policy, thresholds=dict.fromkeys(stages, threshold), early_threshold=early
    )


def _must_be(reply: Reply, decision: Decision) -> Reply:
    """The reply of a request that ended as it had to.

    Raises:
        GateError: It did not; its times would be those of another way.
    """
    if reply.verdict.decision is not decision:
        raise GateError(
            f"The request to be timed should end with {decision.value}, but the verdict is "
            f"{reply.verdict.decision.value} (p_unsafe {reply.verdict.p_unsafe}): "
            f"{reply.verdict.reason or 'this gate saturates on an ordinary prompt'}."
        )
    return reply


def allowed_request(model: SafeModel, prompt: str) -> Action:
    """An allowed request until its first token: encode, verdict, whole prefill, first token."""

    def action() -> dict[str, float]:
        timing = _must_be(model.generate(prompt, max_tokens=1), Decision.ALLOW).timing
        first = timing.first_token_ms or timing.total_ms
        return {
            "encode_ms": timing.encode_ms,
            "verdict_ms": timing.verdict_ms,
            "prefill_ms": first - timing.encode_ms,
            "first_token_ms": first,
        }

    return action


def refused_request(model: SafeModel, prompt: str, name: str = "refusal_ms") -> Action:
    """A refused request until its refusal is complete."""

    def action() -> dict[str, float]:
        return {name: _must_be(model.generate(prompt), Decision.REFUSE).timing.total_ms}

    return action


def media_request(
    model: SafeModel,
    name: str,
    prompt: str,
    images: Sequence[ImageInput] = (),
    audio: AudioInput | None = None,
) -> Action:
    """A refused request with a picture or sound: what encoding it takes."""

    def action() -> dict[str, float]:
        reply = _must_be(model.generate(prompt, images=images, audio=audio), Decision.REFUSE)
        return {name: reply.timing.encode_ms}

    return action


def second_turn(model: SafeModel, prompt: str) -> Action:
    """The second turn of a conversation until its first token, and the same with nothing kept."""

    def action() -> dict[str, float]:
        chat = model.chat()
        first = _must_be(chat.send(prompt, max_tokens=8), Decision.ALLOW)
        kept = _must_be(chat.send(SECOND_TURN, max_tokens=1), Decision.ALLOW)
        history = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": first.text or ""},
            {"role": "user", "content": SECOND_TURN},
        ]
        anew = _must_be(model.generate(history, max_tokens=1), Decision.ALLOW)
        return {
            "second_turn_ms": kept.timing.first_token_ms or kept.timing.total_ms,
            "second_turn_anew_ms": anew.timing.first_token_ms or anew.timing.total_ms,
        }

    return action


@dataclass(frozen=True, slots=True)
class AnswerTimes:
    """Wall time of one answer, in ms from its start.

    Attributes:
        verdict: When the verdict was there.
        first_token: When the first token was chosen.
        total: When the last one was.
        ids: Its tokens.
    """

    verdict: float
    first_token: float
    total: float
    ids: list[int]


class Answers:
    """Answers of exact length by one loaded model; its caches are used again.

    The end token is masked, so that no answer is shorter than another one.
    """

    def __init__(self, model: SafeModel) -> None:
        self._engine = model.engine
        self._manifest = model.manifest
        self._allow = allowing(model).policy
        self._refuse = refusing(model).policy
        self._state = model.engine.new_state()

    def refused(self, ids: Array) -> float:
        """Time until a prompt of ids (n,) is refused, in ms.

        Raises:
            GateError: The gate could not decide.
        """
        self._state.clear()
        start = time.perf_counter()
        with Deadline(None) as deadline:
            embeds = self._engine.embed(ids)
            judged = self._engine.judge(embeds, self._state, self._refuse, deadline)
        end = time.perf_counter()
        if judged.verdict.decision is not Decision.REFUSE:
            raise GateError(f"The gate could not refuse: {judged.verdict.reason}.")
        return (end - start) * 1000.0

    def run(self, ids: Array, tokens: int) -> AnswerTimes:
        """Answers a prompt of ids (n,) with exactly ``tokens`` tokens, taken greedily.

        Raises:
            GateError: The prompt was not allowed.
        """
        engine, state = self._engine, self._state
        state.clear()
        start = time.perf_counter()
        deadline = Deadline(None)
        judged = engine.judge(engine.embed(ids), state, self._allow, deadline)
        verdict = time.perf_counter()
        if judged.verdict.decision is not Decision.ALLOW:
            raise GateError(
                f"The answer to be timed was not allowed (p_unsafe {judged.verdict.p_unsafe}, "
                f"{judged.verdict.reason or 'certain to be harmful'})."
            )
        sampler = self._greedy(ids)
        chosen = [sampler.choose(engine.open(judged, state, deadline))]
        first = time.perf_counter()
        step = engine.stepper(state)
        for _ in range(tokens - 1):
            chosen.append(sampler.choose(step(chosen[-1])))
        end = time.perf_counter()
        return AnswerTimes(
            (verdict - start) * 1000.0, (first - start) * 1000.0, (end - start) * 1000.0, chosen
        )

    def whole(self, name: str, ids: Array, tokens: int) -> Action:
        """The time of a whole answer, under a name."""
        return lambda: {name: self.run(ids, tokens).total}

    def per_token(self, name: str, ids: Array, tokens: int) -> Action:
        """The time of each token behind the first one, with the prompt in the cache."""

        def action() -> dict[str, float]:
            times = self.run(ids, tokens)
            return {name: (times.total - times.first_token) / (tokens - 1)}

        return action

    def _greedy(self, ids: Array) -> Sampler:
        """Takes the likeliest token that is neither a control token nor the end."""
        safety, model = self._manifest.safety, self._manifest.model
        masked = {*safety.control_token_ids, safety.safe_token_id, safety.unsafe_token_id}
        masked |= set(model.eos_token_ids)
        return Sampler(Sampling(), sorted(masked), ids, model.vocab_size)
