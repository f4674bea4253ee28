"""Measures one bundle: every way a request can take, at several prompt lengths."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_safe.errors import BundleError, GateError, MediaError, UsageError
from edge_safe.evaluation.speed.gate_cost import PROCESSES_PER_RUN, measure_gate_cost
from edge_safe.evaluation.speed.limits import limits_of
from edge_safe.evaluation.speed.loading import measure_loading
from edge_safe.evaluation.speed.machine import describe_machine
from edge_safe.evaluation.speed.prompts import exact_prompt, plain_ids
from edge_safe.evaluation.speed.requests import (
    LATE,
    Answers,
    allowed_request,
    allowing,
    load_forgetful,
    media_request,
    refused_request,
    refusing,
    refusing_late,
    second_turn,
)
from edge_safe.evaluation.speed.sample_media import hum, sign
from edge_safe.evaluation.speed.samples import Action, Samples, interleave, quartiles
from edge_safe.runtime.bundle import open_bundle
from edge_safe.runtime.cores import available_cores
from edge_safe.runtime.manifest import load_manifest
from edge_safe.runtime.media import AudioInput, ImageInput
from edge_safe.runtime.model import SafeModel

REFERENCE = 256
"""The prompt length that the figures without one of their own are for, where it was measured."""

ANSWER_TOKENS = 64
LONG_CACHE = 2000
SHORT_CACHE = 8
DECODING = {
    SHORT_CACHE: "decode_ms_per_token",
    LONG_CACHE: "decode_long_cache_ms_per_token",
}
"""Names of what was measured, by positions in the cache."""

LOADS = 5
_LENGTHS_ROOM = 2  # slot T and one answer token

Tell = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure.

    Attributes:
        prompt_tokens: Prompt lengths, the template included.
        runs: Rounds of interleaved measurements, and processes for the gate's cost.
        threads: Threads inside one operator; None lets ONNX Runtime choose.
        provider: What to run on; None takes what the bundle's target names.
        image: A picture to encode; None draws a sign with three lines of text.
        audio: A sound to encode; None takes three seconds of a hum, in which nobody speaks.
    """

    prompt_tokens: tuple[int, ...]
    runs: int
    threads: int | None = None
    provider: str | None = None
    image: Path | None = None
    audio: Path | None = None


@dataclass(slots=True)
class Notes:
    """What a reader of the figures has to know."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        """Takes one line."""
        self.lines.append(line)


def measure(
    folder: Path, settings: Settings, ungated: Path | None, why_not: str, tell: Tell
) -> dict[str, Any]:
    """Measures a bundle.

    Args:
        folder: The bundle.
        settings: What to measure.
        ungated: The same model without its gate; None where there is none.
        why_not: Why there is none.
        tell: Told each step and the share of it that is done.

    Returns:
        The document that ``bench --json`` prints, without peers.

    Raises:
        UsageError: No length fits the context, or a setting is impossible.
        EdgeSafeError: The bundle cannot be loaded or run.
    """
    check(settings)
    notes = Notes(
        ["Thresholds of 1 and 0 force each request to be allowed or refused; the work is the same."]
    )
    fitting = _fitting(settings, load_manifest(folder).model.context_length)
    reference = REFERENCE if REFERENCE in fitting else fitting[0]
    # Before this process opens the bundle: pages that it has mapped could not be dropped.
    tell("load", 0.0)
    loads = min(LOADS, settings.runs)
    loading = measure_loading(folder, reference, settings.threads, settings.provider, loads)
    tell("load", 1.0)
    machine = describe_machine()
    model = load_forgetful(folder, settings.threads, settings.provider)
    acceptance = model.manifest.safety.acceptance
    if acceptance is not None and not acceptance.passed:
        notes.add("This bundle failed its acceptance test: it is fast, and not to be used.")
    lengths, skipped = measure_lengths(model, settings, tell)
    reference = next(
        (entry["prompt_tokens"] for entry in lengths if entry["prompt_tokens"] == reference),
        lengths[0]["prompt_tokens"],
    )
    at = next(entry for entry in lengths if entry["prompt_tokens"] == reference)
    other = interleave(
        _other_actions(model, reference, settings, notes),
        settings.runs,
        _steps(tell, "answers, media, turns", settings.runs),
    )
    if ungated is not None:
        try:
            # Answers with the gate, too, are then those of the processes that compare.
            other.values |= _gate_cost(folder, ungated, model, reference, settings, tell)
        except BundleError as error:
            why_not = str(error)
    if "gate_cost_ratio" not in other.values:
        notes.add(f"No gate_cost_ratio: {why_not}")
    tell("limits of this machine", 0.0)
    measured = other.medians()
    found = limits_of(
        open_bundle(folder, settings.provider, accept_failed=True),
        settings.threads or available_cores(),
        decode={past: measured[name] for past, name in DECODING.items() if name in measured},
        prefill={entry["prompt_tokens"]: entry["prefill_ms"] for entry in lengths},
    )
    tell("limits of this machine", 1.0)
    _say_more(notes, machine, loading, other)
    early = model.manifest.safety.early
    keys = ("encode_ms", "prefill_ms", "verdict_ms", "refusal_ms", "first_token_ms")
    medians = {**_renamed(loading.medians()), **other.medians()}
    spread = {**_renamed(loading.spread()), **other.spread()}
    return {
        "bundle": {
            "name": model.manifest.name,
            "precision": model.manifest.precision,
            "cache": model.manifest.cache_dtype,
            "exit_layer": model.manifest.safety.exit_layer,
            "early_layer": None if early is None else early.layer,
            "layers": model.manifest.model.layers,
            "bytes": sum(entry.size for entry in model.manifest.files.values()),
        },
        "machine": machine,
        "threads": settings.threads,
        "runs": settings.runs,
        "prompt_tokens": reference,
        "answer_tokens": ANSWER_TOKENS,
        "load_ms": medians["load_ms"],
        **{key: at[key] for key in keys},
        "refusal_ratio": at["refusal_ratio"],
        "gate_cost_ratio": None,
        "encode_image_ms": None,
        "encode_audio_ms": None,
        "decode_long_cache_ms_per_token": None,
        **medians,
        "lengths": lengths,
        "skipped": skipped,
        "limits": found,
        "notes": notes.lines,
        "spread": {**{key: at["spread"][key] for key in (*keys, "refusal_ratio")}, **spread},
        "peers": {},
    }


def check(settings: Settings) -> None:
    """Refuses settings that nothing can be measured with.

    Raises:
        UsageError: See above.
    """
    if settings.runs < 1:
        raise UsageError(f"--runs is {settings.runs}; give 1 or more.")
    if settings.threads is not None and settings.threads < 1:
        raise UsageError(f"--threads is {settings.threads}; give 1 or more.")
    if not settings.prompt_tokens or min(settings.prompt_tokens) < 1:
        raise UsageError(f"--prompt-tokens is {list(settings.prompt_tokens)}; give 1 or more.")


def _fitting(settings: Settings, context: int) -> list[int]:
    """The lengths that leave room in a context.

    Raises:
        UsageError: None does.
    """
    fitting = [tokens for tokens in settings.prompt_tokens if tokens + _LENGTHS_ROOM <= context]
    if not fitting:
        raise UsageError(
            f"None of the lengths {list(settings.prompt_tokens)} of --prompt-tokens fits: this "
            f"model's context of {context} takes at most {context - _LENGTHS_ROOM}."
        )
    return fitting


def measure_lengths(
    model: SafeModel, settings: Settings, tell: Tell
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Times an allowed and a refused request at every length that fits.

    Returns:
        One entry for each length; and the lengths left out, each with its reason.

    Raises:
        UsageError: None fits.
    """
    context = model.manifest.model.context_length
    allowed, refused, late = allowing(model), refusing(model), refusing_late(model)
    entries: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    for tokens in sorted(set(settings.prompt_tokens)):
        prompt = exact_prompt(model, tokens) if tokens + _LENGTHS_ROOM <= context else None
        if prompt is None:
            room = f"this model's context of {context} takes at most {context - _LENGTHS_ROOM}"
            fits = tokens + _LENGTHS_ROOM <= context
            reason = "the chat template leaves no room for a request" if fits else room
            skipped.append({"prompt_tokens": tokens, "reason": reason})
            continue
        ways = [allowed_request(allowed, prompt), refused_request(refused, prompt)]
        if model.manifest.safety.early is not None:
            ways.append(refused_request(late, prompt, LATE))
        samples = interleave(
            ways,
            settings.runs,
            _steps(tell, f"prompt of {tokens} tokens", settings.runs),
        )
        samples.divide("refusal_ratio", "refusal_ms", "first_token_ms")
        if LATE in samples.values:
            samples.divide("late_refusal_ratio", LATE, "first_token_ms")
        entries.append({"prompt_tokens": tokens, **samples.medians(), "spread": samples.spread()})
    if not entries:
        reasons = "; ".join(f"{entry['prompt_tokens']}: {entry['reason']}" for entry in skipped)
        raise UsageError(f"None of the lengths of --prompt-tokens can be measured. {reasons}.")
    return entries, skipped


def _gate_cost(
    folder: Path, ungated: Path, model: SafeModel, reference: int, settings: Settings, tell: Tell
) -> dict[str, list[float]]:
    """Whole answers with the gate and without it, a value from each process."""
    processes = PROCESSES_PER_RUN * settings.runs
    count = _answer_tokens(model, reference)
    found = Samples()
    for number in range(processes):
        tell("answers without the gate", number / processes)
        found.add(
            measure_gate_cost(
                folder, ungated, reference, count, settings.threads, settings.provider, number
            )
        )
    tell("answers without the gate", 1.0)
    return found.values


def _answer_tokens(model: SafeModel, reference: int) -> int:
    """Tokens of an answer behind a prompt of the reference length."""
    room = model.manifest.model.context_length - reference - _LENGTHS_ROOM
    return max(2, min(ANSWER_TOKENS, room))


def _other_actions(
    model: SafeModel, reference: int, settings: Settings, notes: Notes
) -> list[Action]:
    """What is measured at one length alone; what this bundle cannot do is noted."""
    answers = Answers(model)
    context = model.manifest.model.context_length
    room = context - reference - _LENGTHS_ROOM
    count = _answer_tokens(model, reference)
    short = plain_ids(model, SHORT_CACHE)
    actions = [answers.per_token("decode_ms_per_token", short, ANSWER_TOKENS)]
    if count < ANSWER_TOKENS:
        notes.add(f"Answers have {count} tokens: the context of {context} holds no more.")
    if context >= LONG_CACHE + ANSWER_TOKENS + _LENGTHS_ROOM:
        long = plain_ids(model, LONG_CACHE)
        actions.append(answers.per_token("decode_long_cache_ms_per_token", long, ANSWER_TOKENS))
    else:
        notes.add(f"No decoding behind {LONG_CACHE} tokens: the context holds {context}.")
    actions.append(answers.whole("gated_answer_ms", plain_ids(model, reference), count))
    prompt = exact_prompt(model, reference)
    if prompt is not None and room >= 3 * ANSWER_TOKENS:
        actions.append(second_turn(allowing(model), prompt))
    else:
        notes.add("No second turn: the context has no room for it.")
    return [*actions, *_media_actions(refusing(model), settings, notes)]


def _media_actions(model: SafeModel, settings: Settings, notes: Notes) -> list[Action]:
    """Encoding of a picture and of a sound, where the bundle has towers for them."""
    image: ImageInput = sign() if settings.image is None else settings.image
    audio: AudioInput = hum() if settings.audio is None else settings.audio
    actions = []
    for name, own, action in (
        ("image", settings.image, media_request(model, "encode_image_ms", "Well?", [image])),
        ("audio", settings.audio, media_request(model, "encode_audio_ms", "Well?", (), audio)),
    ):
        try:
            action()
        except (MediaError, GateError) as error:
            if own is not None:
                raise
            notes.add(f"No {name} encoding: {error}")
        else:
            actions.append(action)
            if own is None:
                drawn = "a drawn sign of 640 x 480" if name == "image" else "three seconds of a hum"
                notes.add(f"The {name} is {drawn}; --{name} takes your own.")
    return actions


def _say_more(notes: Notes, machine: dict[str, Any], loading: Samples, other: Samples) -> None:
    """Notes what weakens the figures."""
    if statistics.median(loading.values["read_mb"]) < 1:
        notes.add("Nothing was read from storage: load_ms is that of files already in memory.")
    if machine["load_average"] > 0.5:
        notes.add(
            f"Other programs were running (load average {machine['load_average']:.1f}); figures "
            "for a record want a quiet machine."
        )
    lower, upper = quartiles(other.values["decode_ms_per_token"])
    if upper > 1.2 * lower:
        notes.add("The times of decoding vary by more than 20 %; run again on a quieter machine.")


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """``load_ms_warm`` as ``load_warm_ms``: the unit stands last."""
    names = {
        name: f"{name[: -len(unit) - 5]}_warm{unit}"
        for name in values
        for unit in ("_ms", "_mb")
        if name.endswith(f"{unit}_warm")
    }
    return {names.get(name, name): value for name, value in values.items()}


def _steps(tell: Tell, step: str, rounds: int) -> Callable[[], None]:
    """Counts rounds of one step."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        tell(step, done / rounds)

    tell(step, 0.0)
    return count
