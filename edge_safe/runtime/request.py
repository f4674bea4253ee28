"""The life of one request, shared by single prompts and chats: encode, judge, then answer."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np

from edge_safe.errors import GateError, PromptError
from edge_safe.runtime.answer import Answer
from edge_safe.runtime.bundle import Bundle
from edge_safe.runtime.calibration import Modality, way_in
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.engine import Engine, Judged, failed, mendable
from edge_safe.runtime.families.base import Family
from edge_safe.runtime.inputs import Inputs, join
from edge_safe.runtime.manifest import Bidirectional
from edge_safe.runtime.media import AudioInput, ImageInput
from edge_safe.runtime.policy import Policy
from edge_safe.runtime.prefill import Span
from edge_safe.runtime.prompt import (
    Message,
    PromptBuilder,
    leading_ids,
    positions,
    token_ids,
)
from edge_safe.runtime.reply import Reply, Timing, Usage
from edge_safe.runtime.sampler import Sampling
from edge_safe.runtime.session import Array
from edge_safe.runtime.state import State
from edge_safe.runtime.tokens import Encoded, Tokens, Untrusted
from edge_safe.runtime.verdict import Decision, Verdict

Event = Verdict | str | Reply
"""What a stream yields: the verdict, pieces of the answer, and the reply as the last one."""

Steps = Generator[Event, None, None]
"""A stream with an empty piece for every token that has no text as yet.

Between two steps nothing is computed, so that others may.
"""


@dataclass(slots=True)
class Prompt:
    """A prompt that is ready for the gate.

    Attributes:
        embeds: Embeddings of its T positions.
        ids: (n,) those ids that it was made of.
        usage: Its positions.
        question: The same conversation without the answer that was begun, None where no
            answer was.
        modality: The way in of all that the gate will have seen.
        spans: Of the T positions, those that see each other.
        question_spans: Of the Q positions likewise.
        leading: (n,) ids of its first positions, up to a picture or sound.
        question_leading: Of the question likewise.
    """

    embeds: Inputs
    ids: Array
    usage: Usage
    question: Inputs | None = None
    modality: Modality = "text"
    spans: list[Span] = field(default_factory=list)
    question_spans: list[Span] = field(default_factory=list)
    leading: Array | None = None
    question_leading: Array | None = None


class Requests:
    """What every request of a loaded bundle needs. Safe to share between threads."""

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        tokens: Tokens,
        builder: PromptBuilder,
        family: Family,
        policy: Policy,
    ) -> None:
        self.bundle = bundle
        self.engine = engine
        self.builder = builder
        self.policy = policy
        self.context_length = bundle.manifest.model.context_length
        self._bidirectional = bundle.manifest.model.bidirectional
        self._tokens = tokens
        self._family = family

    def with_policy(self, policy: Policy) -> Requests:
        """The same under another policy, which was checked."""
        return Requests(self.bundle, self.engine, self._tokens, self.builder, self._family, policy)

    def attach_media(
        self,
        message: Message,
        images: Sequence[ImageInput],
        audio: AudioInput | None,
        deadline: Deadline,
    ) -> Message:
        """Puts the embeddings of pictures and sound at their places in a message.

        These are the chat template's own, or else in front of the text.

        Raises:
            MediaError: A picture or sound cannot be used.
            GateError: The request is over, or a tower failed.
        """
        media = self._family.media(images, audio, deadline)
        # A picture without a word in it came in as a picture all the same.
        if audio is not None or len(images):
            message = replace(message, modality="image" if audio is None else "audio")
        if media.placed:
            return replace(
                message,
                media=media.placed,
                image_tokens=media.image_tokens,
                audio_tokens=media.audio_tokens,
            )
        features = [array for array in media.features if len(array)]
        if not features:
            return message
        return replace(
            message,
            content=[*features, Untrusted("\n"), *message.content],
            image_tokens=media.image_tokens,
            audio_tokens=media.audio_tokens,
        )

    def prompt(
        self,
        arrays: Sequence[Encoded],
        messages: Sequence[Message],
        question: Sequence[Encoded] | None = None,
    ) -> Prompt:
        """Embeds what a prompt, and its question where an answer was begun, were built of."""
        usage = Usage(
            prompt_tokens=positions(arrays),
            image_tokens=sum(message.image_tokens for message in messages),
            audio_tokens=sum(message.audio_tokens for message in messages),
        )
        return Prompt(
            self._embed(arrays),
            token_ids(arrays),
            usage,
            None if question is None else self._embed(question),
            way_in(message.modality for message in messages),
            find_spans(arrays, self._bidirectional),
            find_spans(question or [], self._bidirectional),
            leading_ids(arrays),
            leading_ids(question or []),
        )

    def _embed(self, arrays: Sequence[Encoded]) -> Inputs:
        """Ids, embeddings and pictures as one run."""
        return join([self._inputs(array) for array in arrays])

    def _inputs(self, array: Encoded) -> Inputs:
        if isinstance(array, Inputs):
            return array
        if array.ndim == 2:
            return self.engine.place(array.astype(np.float32, copy=False))
        return self.engine.embed(array)

    def check_room(self, needed: int) -> None:
        """Makes sure that a prompt, slot T and one answer token fit the context.

        Raises:
            PromptError: They do not.
        """
        if needed + 2 > self.context_length:
            raise PromptError(
                f"The prompt has {needed} tokens; this model's context of {self.context_length} "
                f"takes at most {self.context_length - 2}. Shorten it."
            )

    def steps(
        self,
        encode: Callable[[Deadline], Prompt],
        state: State,
        sampling: Sampling,
        answer: Answer,
        deadline: Deadline,
    ) -> Steps:
        """Runs one request.

        Args:
            encode: Makes the prompt; what it raises on purpose reaches the caller.
            state: The caches; moved on by the prompt and the answer.
            sampling: How to answer.
            answer: Filled while decoding.
            deadline: Without a verdict by then the decision is ``error``; an answer that is under
                way is cut off.

        Yields:
            The verdict, a piece of text for every token, and the reply.
        """
        started = deadline.started
        prompt, judged, encoded = self.judge(encode, state, deadline)
        verdict = judged.verdict
        timing = Timing(
            encode_ms=(encoded - started) * 1000.0,
            verdict_ms=(time.perf_counter() - started) * 1000.0,
            first_token_ms=None,
            decode_tokens_per_second=None,
            total_ms=0.0,
        )
        yield verdict
        if verdict.decision is Decision.ALLOW and prompt is not None:
            yield from answer.decode(
                self.engine,
                self._tokens,
                self.bundle.manifest,
                judged,
                state,
                sampling,
                prompt.ids,
                deadline,
            )
        yield self._reply(verdict, prompt, answer, timing, started)

    def judge(
        self, encode: Callable[[Deadline], Prompt], state: State, deadline: Deadline
    ) -> tuple[Prompt | None, Judged, float]:
        """Encodes and judges; nothing that fails on the way can end in an answer.

        Where an answer was begun, the question alone is judged first: what somebody wrote into
        the model's mouth can make a verdict stricter, but never milder.

        Returns:
            The prompt, None where encoding broke; its verdict; when encoding ended.
        """
        try:
            deadline.check()
            prompt = encode(deadline)
        except Exception as error:
            if mendable(error):
                raise
            stage = self.engine.stages(self.policy)[0]
            return None, Judged(failed(error, stage, deadline)), time.perf_counter()
        encoded = time.perf_counter()
        if prompt.question is not None:
            before = state.lengths()
            judged = self._judge(
                prompt.question,
                prompt.modality,
                state,
                deadline,
                prompt.question_spans,
                prompt.question_leading,
            )
            if judged.verdict.decision is not Decision.ALLOW:
                return prompt, judged, encoded
            state.rewind(before)
        judged = self._judge(
            prompt.embeds, prompt.modality, state, deadline, prompt.spans, prompt.leading
        )
        return prompt, judged, encoded

    def _judge(
        self,
        embeds: Inputs,
        modality: Modality,
        state: State,
        deadline: Deadline,
        spans: Sequence[Span],
        leading: Array | None,
    ) -> Judged:
        return self.engine.judge(embeds, state, self.policy, deadline, modality, spans, leading)

    def _reply(
        self,
        verdict: Verdict,
        prompt: Prompt | None,
        answer: Answer,
        timing: Timing,
        started: float,
    ) -> Reply:
        """Sums a request up."""
        allowed = verdict.decision is Decision.ALLOW
        refused = verdict.decision is Decision.REFUSE
        usage = Usage() if prompt is None else prompt.usage
        first = answer.first_token
        return Reply(
            verdict=verdict,
            text=answer.text if allowed else None,
            refusal=self.policy.refusal() if refused else None,
            finish_reason=(
                answer.finish_reason if allowed else "content_filter" if refused else "error"
            ),
            usage=replace(usage, completion_tokens=len(answer.ids)),
            timing=replace(
                timing,
                first_token_ms=None if first is None else (first - started) * 1000.0,
                decode_tokens_per_second=answer.tokens_per_second,
                total_ms=(time.perf_counter() - started) * 1000.0,
            ),
        )


def shown(steps: Steps) -> Iterator[Event]:
    """What a caller sees of a request's steps."""
    with closing(steps):
        for step in steps:
            if step != "":
                yield step


def last_reply(events: Iterable[Event]) -> Reply:
    """Takes a stream to its end.

    Raises:
        GateError: It ended without a reply.
    """
    last = deque(events, maxlen=1)
    if not last or not isinstance(last[0], Reply):
        raise GateError("the request ended without a reply")
    return last[0]


def find_spans(arrays: Sequence[Encoded], bidirectional: Bidirectional) -> list[Span]:
    """New positions that see each other.

    Args:
        arrays: What a prompt was built of; each picture is one array of embeddings.
        bidirectional: What the language model's positions see.
    """
    total = positions(arrays)
    if bidirectional == "prompt":
        return [(0, total)] if total else []
    if bidirectional == "none":
        return []
    ends = list(itertools.accumulate(map(len, arrays)))
    return [
        (end - len(array), end)
        for array, end in zip(arrays, ends, strict=True)
        if isinstance(array, Inputs) or array.ndim == 2
    ]
