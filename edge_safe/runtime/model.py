"""A loaded bundle: the object most programs use.

What computes is imported where it is used, first of all by ``load``: meanwhile the weights are
hashed.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from edge_safe.errors import PromptError, UsageError
from edge_safe.runtime.cores import available_cores
from edge_safe.runtime.heap import give_back_unused, keep_heap_small
from edge_safe.runtime.manifest import Manifest, load_manifest
from edge_safe.runtime.policy import Policy, check_policy, load_policy
from edge_safe.runtime.rtx_provider import PROVIDER as AHEAD_OF_TIME
from edge_safe.runtime.verified_files import VerifiedFiles, require_accepted

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from edge_safe.runtime.batch import Assessment, AssessRequest
    from edge_safe.runtime.chat import Chat
    from edge_safe.runtime.deadline import Deadline
    from edge_safe.runtime.engine import Engine
    from edge_safe.runtime.media import AudioInput, ImageInput
    from edge_safe.runtime.prompt import ChatMessage
    from edge_safe.runtime.reply import Reply
    from edge_safe.runtime.request import Event, Prompt, Requests
    from edge_safe.runtime.sampler import Sampling, SamplingSettings
    from edge_safe.runtime.scheduler import Scheduler
    from edge_safe.runtime.session import Array
    from edge_safe.runtime.state import State
    from edge_safe.runtime.verdict import Verdict

# Programs may import onnxruntime by themselves between this import and a load.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

CACHE_MB = 64.0


class SafeModel:
    """A bundle that judges every prompt before it answers. Safe to share between threads.

    Open one with ``SafeModel.load``.
    """

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._free: list[State] = []
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        folder: str | PathLike[str],
        *,
        provider: str | None = None,
        threads: int | None = None,
        policy: Policy | str | PathLike[str] | None = None,
        untrained_towers: bool = False,
        accept_failed: bool = False,
        profile_folder: str | PathLike[str] | None = None,
        prefix_cache_mb: float = CACHE_MB,
        media_cache_mb: float = CACHE_MB,
    ) -> SafeModel:
        """Opens a bundle.

        Args:
            folder: The bundle.
            provider: ``cpu``, ``cuda``, ``tensorrt`` or ``tensorrt-rtx``; None takes what the
                bundle's target names.
            threads: Threads inside one operator; None lets ONNX Runtime choose.
            policy: A policy or the path of a policy file; None takes the bundle's.
            untrained_towers: Also uses towers whose projector was never trained. Their
                embeddings mean nothing yet, and the gate cannot judge what comes through them.
            accept_failed: Opens a bundle that failed its acceptance test all the same.
            profile_folder: Where ONNX Runtime writes a profile of every graph it opens.
            prefix_cache_mb: Memory, in MB of 2**20 bytes, for what prompts have in common at
                their beginning, the system text say, so that it is computed once; 0 keeps nothing.
            media_cache_mb: The same for pictures and sounds, which are then encoded once.

        Raises:
            BundleError: The folder is no bundle, or lacks a file.
            IntegrityError: A file is not the one the manifest names.
            SchemaError: The manifest is of a newer schema, or malformed.
            PolicyError: The policy is malformed or asks for a stage the bundle does not have.
            ProviderError: The provider cannot run.
            UsageError: A cache's size is negative or no number.
        """
        for name, size in (("prefix", prefix_cache_mb), ("media", media_cache_mb)):
            if not 0 <= size < math.inf:
                raise UsageError(f"{name}_cache_mb is {size}; give 0 or more.")
        files = VerifiedFiles(Path(folder), load_manifest(Path(folder)))
        require_accepted(files, accept_failed)
        if policy is None:
            policy = files.manifest.safety.policy
        elif not isinstance(policy, Policy):
            policy = load_policy(Path(policy))
        policy = check_policy(policy)
        # An engine that came with the bundle takes the place of the graphs and their weights.
        engines = (provider or files.manifest.target) == AHEAD_OF_TIME
        # Before there is another thread, which would get a heap of its own.
        keep_heap_small()
        with files.hashing(() if engines else ("decoder",)):
            from edge_safe.runtime.loading import load_requests

            requests = load_requests(
                files,
                provider,
                threads,
                policy,
                accept_failed,
                None if profile_folder is None else Path(profile_folder),
                untrained_towers=untrained_towers,
                prefix_cache_bytes=int(prefix_cache_mb * 2**20),
                media_cache_bytes=int(media_cache_mb * 2**20),
            )
        return cls(requests)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self._requests.bundle.manifest

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._requests.policy

    @property
    def engine(self) -> Engine:
        """The graphs and the order they run in, for measurements below the level of requests."""
        return self._requests.engine

    def with_policy(self, policy: Policy) -> SafeModel:
        """The same loaded bundle under another policy; no graph is opened twice.

        Raises:
            PolicyError: The policy is malformed or asks for a stage the bundle does not have.
        """
        self.engine.stages(check_policy(policy))
        return SafeModel(self._requests.with_policy(policy))

    def prompt_ids(
        self, prompt: str | Sequence[ChatMessage], *, system: str | None = None
    ) -> Array:
        """The (T,) int64 ids of a prompt of text, the chat template's own included.

        Raises:
            PromptError: The prompt is malformed, or longer than any context.
        """
        from edge_safe.runtime.prompt import read_messages, token_ids

        return token_ids(self._requests.builder.build(read_messages(prompt, system)))

    def run_counts(self) -> dict[str, int]:
        """How often each graph of the bundle was run since it was loaded."""
        return self._requests.bundle.run_counts()

    def end_profiles(self) -> dict[str, Path]:
        """Ends profiling; returns ONNX Runtime's profile of each graph that was opened."""
        return self._requests.bundle.end_profiles()

    def generate(
        self,
        prompt: str | Sequence[ChatMessage],
        *,
        images: Sequence[ImageInput] = (),
        audio: AudioInput | None = None,
        system: str | None = None,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
        **sampling: Unpack[SamplingSettings],
    ) -> Reply:
        """Judges a prompt and, if it is allowed, answers it.

        Args:
            prompt: The user's text, or messages ``{"role", "content"}``. A last message of role
                ``assistant`` is an answer that was begun; it is judged with the prompt.
            images: Pictures that belong to the last user message.
            audio: A sound that belongs to it.
            system: A system text.
            timeout: Seconds until the decision is ``error``, or an answer is cut off.
            cancel: The same at once when set, from any thread.
            **sampling: The fields of ``Sampling``.

        Raises:
            PromptError: The prompt is empty, malformed or too long.
            MediaError: A picture or sound cannot be used.
            UsageError: A sampling setting is out of range.
        """
        from edge_safe.runtime.request import last_reply

        events = self.stream(
            prompt,
            images=images,
            audio=audio,
            system=system,
            timeout=timeout,
            cancel=cancel,
            **sampling,
        )
        return last_reply(events)

    def stream(
        self,
        prompt: str | Sequence[ChatMessage],
        *,
        images: Sequence[ImageInput] = (),
        audio: AudioInput | None = None,
        system: str | None = None,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
        **sampling: Unpack[SamplingSettings],
    ) -> Iterator[Event]:
        """Like ``generate``, but yields the verdict, then text as it comes, then the reply."""
        from edge_safe.runtime.sampler import Sampling

        settings = Sampling(**sampling)
        return self._stream(prompt, images, audio, system, settings, timeout, cancel)

    def assess(
        self,
        prompt: str | Sequence[ChatMessage],
        *,
        images: Sequence[ImageInput] = (),
        audio: AudioInput | None = None,
        system: str | None = None,
        timeout: float | None = None,
    ) -> Verdict:
        """Judges a prompt and decodes nothing.

        Raises:
            PromptError: The prompt is empty, malformed or too long.
            MediaError: A picture or sound cannot be used.
        """
        from edge_safe.runtime.deadline import Deadline

        state = self._take()
        try:
            with Deadline(timeout) as deadline:
                _, judged, _ = self._requests.judge(
                    lambda limit: self._encode(prompt, images, audio, system, limit),
                    state,
                    deadline,
                )
                return judged.verdict
        finally:
            self._give_back(state)

    def assess_many(
        self,
        requests: Iterable[AssessRequest],
        *,
        workers: int | None = None,
        timeout: float | None = None,
    ) -> Iterator[Assessment]:
        """Judges many requests and decodes nothing; the fastest way to many verdicts.

        Prompts of like length are judged in one run, and several runs go on side by side; a model
        that was loaded with ``threads=1`` makes the most of that. Verdicts are those of ``assess``
        up to rounding.

        Args:
            requests: Read a few hundred ahead, so that they may be many.
            workers: Threads; None takes one a core on the CPU, and one elsewhere.
            timeout: Seconds of work on one request: reading it, the run it is judged in, and one
                of its own where that fails; without a verdict by then the decision is ``error``.
                What a request waits for others does not count.

        Yields:
            The assessments in the requests' order. A request that cannot be read gets the decision
            ``error`` at stage ``input``; it does not end the others.
        """
        from edge_safe.runtime.batch import Batches

        if workers is None:
            workers = available_cores() if self._requests.bundle.provider == "cpu" else 1
        batches = Batches(
            self._requests,
            lambda r, limit: self._encode(r.prompt, r.images, r.audio, r.system, limit),
            self._judge_alone,
            max(1, workers),
            timeout,
        )
        return batches.assess(requests)

    def _judge_alone(self, prompt: Prompt, deadline: Deadline) -> Verdict:
        """Judges a prompt that was encoded already."""
        state = self._take()
        try:
            _, judged, _ = self._requests.judge(lambda _: prompt, state, deadline)
            return judged.verdict
        finally:
            self._give_back(state)

    def chat(self, system: str | None = None) -> Chat:
        """Begins a conversation whose earlier turns are not computed again."""
        from edge_safe.runtime.chat import Chat

        return Chat(self._requests, system)

    def scheduler(self, memory_mb: int = 256) -> Scheduler:
        """For several conversations at once: fair turns, bounded memory, a deadline for each.

        Args:
            memory_mb: What keys and values of all of them may take, in MB of 2**20 bytes.

        Raises:
            UsageError: That is no memory at all.
        """
        from edge_safe.runtime.scheduler import Scheduler

        if memory_mb < 1:
            raise UsageError(f"memory_mb is {memory_mb}; give at least 1")
        return Scheduler(self._requests, memory_mb)

    def load_chat(self, path: str | PathLike[str]) -> Chat:
        """Goes on with a conversation that ``Chat.save`` put into a file.

        Raises:
            BundleError: There is no such file, or it was made with another bundle.
            IntegrityError: It is damaged or half-written.
        """
        from edge_safe.runtime.chat import Chat

        return Chat(self._requests, None, path)

    def _stream(
        self,
        prompt: str | Sequence[ChatMessage],
        images: Sequence[ImageInput],
        audio: AudioInput | None,
        system: str | None,
        sampling: Sampling,
        timeout: float | None,
        cancel: threading.Event | None,
    ) -> Iterator[Event]:
        """The generator behind ``stream``."""
        from edge_safe.runtime.answer import Answer
        from edge_safe.runtime.deadline import Deadline
        from edge_safe.runtime.request import shown

        state = self._take()
        try:
            with Deadline(timeout, cancel) as deadline:
                steps = self._requests.steps(
                    lambda limit: self._encode(prompt, images, audio, system, limit),
                    state,
                    sampling,
                    Answer(),
                    deadline,
                )
                yield from shown(steps)
        finally:
            self._give_back(state)

    def _encode(
        self,
        prompt: str | Sequence[ChatMessage],
        images: Sequence[ImageInput],
        audio: AudioInput | None,
        system: str | None,
        deadline: Deadline,
    ) -> Prompt:
        """Template, tokens, towers and embeddings."""
        from edge_safe.runtime.prompt import check_not_empty, positions, read_messages

        messages = read_messages(prompt, system)
        users = [index for index, message in enumerate(messages) if message.role == "user"]
        if not users:
            raise PromptError("The prompt has no message of role 'user'.")
        last = users[-1]
        messages[last] = self._requests.attach_media(messages[last], images, audio, deadline)
        for index in users:
            check_not_empty(messages[index])
        arrays = self._requests.builder.build(messages)
        self._requests.check_room(positions(arrays))
        begun = messages[-1].role == "assistant"
        question = self._requests.builder.build(messages[:-1]) if begun else None
        return self._requests.prompt(arrays, messages, question)

    def _take(self) -> State:
        """Caches that no other request uses."""
        with self._lock:
            if self._free:
                return self._free.pop()
        return self._requests.engine.new_state()

    def _give_back(self, state: State) -> None:
        """Empties caches and keeps one set of them for the next request."""
        state.clear()
        with self._lock:
            if not self._free:
                self._free.append(state)
        give_back_unused()
