"""Decodes one answer: choose, detokenize, stop, until it ends or nobody wants it any more."""

from __future__ import annotations

import time
from collections.abc import Iterator

from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.engine import Engine, Judged
from edge_safe.runtime.manifest import Manifest
from edge_safe.runtime.reply import FinishReason
from edge_safe.runtime.sampler import Sampler, Sampling
from edge_safe.runtime.session import Array
from edge_safe.runtime.state import State
from edge_safe.runtime.stream import Detokenizer, StopFilter
from edge_safe.runtime.tokens import Tokens


class Answer:
    """One answer while it is decoded and after.

    Attributes:
        opened: Whether the decoder has read the prompt before anybody cut it off.
        ids: Its tokens, without the one that ended it.
        fed: How many of them the caches hold; the last one is usually chosen but not yet read.
        text: What was handed out so far.
        finish_reason: Why it ended; ``cancelled`` until it did.
        first_token: ``time.perf_counter()`` when the first token was chosen.
        last_token: The same for the last one.
    """

    def __init__(self) -> None:
        self.opened = False
        self.ids: list[int] = []
        self.fed = 0
        self.text = ""
        self.finish_reason: FinishReason = "cancelled"
        self.first_token: float | None = None
        self.last_token: float | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Rate of the tokens behind the first one."""
        if self.first_token is None or self.last_token is None or len(self.ids) < 2:
            return None
        return (len(self.ids) - 1) / max(self.last_token - self.first_token, 1e-9)

    def decode(
        self,
        engine: Engine,
        tokens: Tokens,
        manifest: Manifest,
        judged: Judged,
        state: State,
        sampling: Sampling,
        prompt_ids: Array,
        deadline: Deadline,
    ) -> Iterator[str]:
        """Yields a piece of whole characters for every token, empty if it has none as yet.

        The deadline cuts it off; before the first token ``opened`` stays false then.
        """
        safety, model = manifest.safety, manifest.model
        masked = {*safety.control_token_ids, safety.safe_token_id, safety.unsafe_token_id}
        sampler = Sampler(sampling, sorted(masked), prompt_ids, model.vocab_size)
        characters, stops = Detokenizer(tokens.decode), StopFilter(sampling.stop)
        try:
            logits = engine.open(judged, state, deadline)
            deadline.check()
        except Exception:
            if deadline.over is None:
                raise
            return
        self.opened = True
        step = engine.stepper(state)
        while True:
            token = sampler.choose(logits)
            self._mark_time()
            if token in model.eos_token_ids:
                self.finish_reason = "stop"
                break
            self.ids.append(token)
            piece = stops.push(characters.push(token))
            if stops.stopped:
                self.finish_reason = "stop"
                yield self._give(piece)
                return
            yield self._give(piece)
            full = state.cache.length + 1 > model.context_length
            if full or len(self.ids) >= sampling.max_tokens:
                self.finish_reason = "length"
                break
            # Not midway: a run that can be ended takes some 30 microseconds more.
            if deadline.over is not None:
                break
            logits = step(token)
            self.fed += 1
        rest = stops.push(characters.flush())
        yield self._give(rest if stops.stopped else rest + stops.flush())

    def _give(self, piece: str) -> str:
        """Notes a piece that is handed out."""
        self.text += piece
        return piece

    def _mark_time(self) -> None:
        """Notes when tokens were chosen."""
        self.last_token = time.perf_counter()
        if self.first_token is None:
            self.first_token = self.last_token
