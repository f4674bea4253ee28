"""Predicts a request to a bundle on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edge_safe.errors import UsageError
from edge_safe.evaluation.planning.bundle_work import BundleWork, bundle_work
from edge_safe.evaluation.planning.devices import Device, Mode
from edge_safe.evaluation.planning.fitting import WITHIN, checks, constants_of, group
from edge_safe.evaluation.planning.formulas import Constants, compute_seconds, seconds
from edge_safe.evaluation.planning.memory import memory_of
from edge_safe.evaluation.planning.pictures import Picture, require_picture
from edge_safe.evaluation.planning.published import PHASES, SMALLEST_BYTES, Phase
from edge_safe.evaluation.planning.step import Step
from edge_safe.runtime.bundle import Bundle

ANSWER = 256
"""Tokens that an answer may have where no context is given."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked.

    Attributes:
        prompt_tokens: Words, the template included.
        images: Pictures.
        image_tokens: Tokens of one picture; None takes what the bundle makes of 640 x 480.
        context: Tokens in the cache; None takes the prompt and an answer.
    """

    prompt_tokens: int
    images: int = 0
    image_tokens: int | None = None
    context: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A request, counted out for one bundle."""

    bundle: Bundle
    work: BundleWork
    picture: Picture | None
    images: int
    image_tokens: int
    prompt: int
    context: int


def make_plan(bundle: Bundle, request: Request) -> Plan:
    """Counts the work.

    Raises:
        UsageError: The request is impossible, or does not fit the bundle's context.
        BundleError: The bundle is damaged.
    """
    for name, value in (
        ("--prompt-tokens", request.prompt_tokens),
        ("--image-tokens", request.image_tokens),
        ("--context", request.context),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; give 1 or more.")
    if request.images < 0:
        raise UsageError(f"--images is {request.images}; give 0 or more.")
    if request.image_tokens is not None and not request.images:
        raise UsageError("--image-tokens says nothing without --images.")
    seen = require_picture(bundle) if request.images else None
    each = 0 if seen is None else (request.image_tokens or seen.tokens)
    prompt = request.prompt_tokens + request.images * each
    limit = bundle.manifest.model.context_length
    if prompt > limit:
        raise UsageError(f"The prompt has {prompt} tokens; this bundle's context holds {limit}.")
    context = min(prompt + ANSWER, limit) if request.context is None else request.context
    if not prompt <= context <= limit:
        raise UsageError(
            f"--context is {context}; give at least the prompt's {prompt} tokens and at most the "
            f"{limit} of this bundle."
        )
    return Plan(bundle, bundle_work(bundle), seen, request.images, each, prompt, context)


def predict(
    plan: Plan, device: Device, mode: Mode, measured: Constants | None = None
) -> dict[str, Any]:
    """The document of one device: memory in MB, times in ms.

    Args:
        plan: The request.
        device: Its row.
        mode: The power mode.
        measured: Constants of this very device; None takes those fitted to published figures.
    """
    constants = constants_of(device.kind) if measured is None else measured
    work, safety = plan.work, plan.work.manifest.safety

    def took(phase: Phase, step: Step) -> float:
        return 1000.0 * seconds(phase, step, mode, constants)

    encode = 0.0 if plan.picture is None else took("encode", plan.picture.step.times(plan.images))
    prefill = took("prefill", work.prefill(plan.prompt))
    decode = took("decode", work.decode(plan.context))
    late = encode + _until(took, work, plan.prompt, safety.exit_layer, prefill)
    early = None if safety.early is None else safety.early.layer
    refusal = late if early is None else encode + _until(took, work, plan.prompt, early, prefill)
    return {
        "device": device.name,
        "label": device.label,
        "kind": device.kind,
        "power_mode": mode.name,
        **_memory(plan, device),
        "encode_ms": encode,
        "prefill_ms": prefill,
        "first_token_ms": encode + prefill,
        "refusal_ms": refusal,
        "late_refusal_ms": late,
        "decode_ms_per_token": decode,
        "decode_tokens_per_second": 1000.0 / decode,
        "prefill_bound": _bound(work.prefill(plan.prompt), mode, constants),
        "at_best": measured is None
        and device.kind != "cpu"
        and work.decoding.weight_bytes < SMALLEST_BYTES,
        "constants": {phase: getattr(constants, phase) for phase in PHASES},
        "constants_from": "published figures" if measured is None else "bench",
        "held_out": {phase: _held_out(phase, device) for phase in PHASES},
    }


def _until(took: Any, work: BundleWork, prompt: int, layer: int | None, whole: float) -> float:
    """Time of a prompt until a layer's verdict; without a gate the whole prefill."""
    if layer is None:
        return whole
    reached: float = took("prefill", work.prefill(prompt, layer))
    return reached


def _memory(plan: Plan, device: Device) -> dict[str, Any]:
    """Whether it fits, and what holds how much."""
    graphs = () if plan.picture is None else plan.picture.graphs
    needed = memory_of(plan.bundle, device, plan.prompt, plan.context, graphs)
    available = device.memory_gb * 1e9 * device.usable
    return {
        "fits": needed.total <= available,
        "memory": {
            "weights_mb": needed.weights / 1e6,
            "cache_mb": needed.cache / 1e6,
            "activations_mb": needed.activations / 1e6,
            "base_mb": needed.base / 1e6,
            "total_mb": needed.total / 1e6,
            "available_mb": available / 1e6,
        },
    }


def _bound(step: Step, mode: Mode, constants: Constants) -> str:
    """What takes most of a prefill."""
    computing = compute_seconds(step, mode) / constants.prefill
    whole = seconds("prefill", step, mode, constants)
    return "compute" if computing >= whole / 2 else "memory"


def _held_out(phase: Phase, device: Device) -> dict[str, Any]:
    """How the constants did on published figures that they were not fitted to."""
    errors = [check.error for check in checks(phase, group(phase, device.kind)) if not check.fitted]
    return {
        "figures": len(errors),
        "within_35_percent": sum(abs(error) <= WITHIN for error in errors),
        "lowest_error": min(errors),
        "highest_error": max(errors),
    }
