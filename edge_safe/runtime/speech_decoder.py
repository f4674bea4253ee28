"""Writes speech down: token after token over the encoder's states, the likeliest one each time.

It knows the two graphs of the decoder and nothing of the gate. What it gives are tokens of the
decoder's own vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from edge_safe.errors import GateError
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.session import Array, Session


class Transcription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a recording is written down.

    Attributes:
        prompt_ids: What every transcript begins with.
        end_id: Ends it; all words have smaller ids.
        no_speech_id: Likely behind the first token of the prompt where nothing is said.
        no_speech_threshold: Probability of it above which nothing was said.
        tokens_per_second: So many tokens are read from a second of sound at most ...
        extra_tokens: ... and so many beside these.
        max_positions: Positions that the decoder has.
        tokenizer: The bundle's file with the vocabulary.
    """

    prompt_ids: Sequence[int]
    end_id: int
    no_speech_id: int
    no_speech_threshold: float
    tokens_per_second: float
    extra_tokens: int
    max_positions: int
    tokenizer: str

    def most_tokens(self, seconds: float) -> int:
        """How many tokens a sound may have."""
        wanted = int(self.tokens_per_second * seconds + self.extra_tokens)
        return min(wanted, self.max_positions - len(self.prompt_ids))


class SpeechDecoder:
    """The graphs that turn states into keys and values, and tokens over them into logits."""

    def __init__(self, projector: Session, decoder: Session, settings: Transcription) -> None:
        self._projector = projector
        self._decoder = decoder
        self._settings = settings

    def write_down(self, states: Array, seconds: float, deadline: Deadline | None) -> list[int]:
        """Writes one recording down.

        Args:
            states: (1, T, c) float32 of the sound alone.
            seconds: Its length.
            deadline: Ends the run early; None never does.

        Returns:
            Tokens without control tokens; none where nothing was said.

        Raises:
            GateError: The deadline passed, or a graph gave something else than finite logits.
        """
        settings = self._settings
        heard = _run(self._projector, {"audio_states": states}, deadline)
        new = list(settings.prompt_ids)
        logits, past = self._step(new, heard, _empty_caches(heard), deadline)
        if _share(logits[0, 0], settings.no_speech_id) > settings.no_speech_threshold:
            return []
        most = settings.most_tokens(seconds)
        written: list[int] = []
        while len(written) < most:
            token = int(logits[0, -1, : settings.end_id + 1].argmax())
            if token == settings.end_id:
                break
            written.append(token)
            if len(written) < most:
                logits, past = self._step([token], heard, past, deadline)
        return written

    def _step(
        self,
        tokens: list[int],
        heard: Mapping[str, Array],
        past: Mapping[str, Array],
        deadline: Deadline | None,
    ) -> tuple[Array, dict[str, Array]]:
        """(1, S, V) logits of new tokens, and the caches with these."""
        feeds = {"input_ids": np.array([tokens], np.int64), **heard, **past}
        found = _run(self._decoder, feeds, deadline)
        logits = found.pop("logits", None)
        words = max(self._settings.end_id, self._settings.no_speech_id) + 1
        if logits is None or logits.ndim != 3 or logits.shape[:2] != (1, len(tokens)):
            raise GateError("the speech decoder gave no logits for its tokens")
        if logits.shape[2] < words or not np.isfinite(logits).all():
            raise GateError("the speech decoder's logits are not finite, or too few")
        return logits, {
            name.replace("present", "past_key_values", 1): value for name, value in found.items()
        }


def _run(
    session: Session, feeds: Mapping[str, Array], deadline: Deadline | None
) -> dict[str, Array]:
    """Runs a graph unless the time is over."""
    if deadline is None:
        return session.run(feeds)
    deadline.check()
    return session.run(feeds, deadline.abort)


def _empty_caches(heard: Mapping[str, Array]) -> dict[str, Array]:
    """Caches of no position: as many as the recording's keys and values, and of their widths.

    Raises:
        GateError: Those are none, or no keys and values.
    """
    caches = {
        name.replace("heard", "past_key_values", 1): value[:, :, :0]
        for name, value in heard.items()
        if name.startswith("heard.") and value.ndim == 4
    }
    if not caches or len(caches) != len(heard):
        raise GateError("the speech decoder's first graph gave no keys and values")
    return caches


def _share(logits: Array, token: int) -> float:
    """Probability of one token."""
    shares = np.exp(logits - logits.max(), dtype=np.float64)
    return float(shares[token] / shares.sum())
