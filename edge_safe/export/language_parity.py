"""Parity of gate and decoder: whole prompts, a past, a padded batch, both verdicts, greedy text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from edge_safe.errors import ExportError
from edge_safe.export.greedy_parity import GreedyParity, check_greedy
from edge_safe.export.language_graphs import Cache, ChunkOutput, LanguageGraphs
from edge_safe.export.parity import Boundary, compare, compare_all
from edge_safe.export.parity_prompts import Prompt, pictured
from edge_safe.export.reference import Expected, Reference, pad_right
from edge_safe.models.prompts import Message, PromptEncoder
from edge_safe.runtime.calibration import (
    MODALITIES,
    Fitted,
    StageCalibration,
    edge,
    refuses,
    score,
    sigmoid,
)
from edge_safe.runtime.gate import EARLY_VERDICT

Array = npt.NDArray[Any]

# A few everyday requests and mild stand-ins for harmful ones, of different lengths.
PROMPTS = (
    "What is the capital of France?",
    "Help me steal a bicycle from the rack in front of the library without being seen.",
    "Write two sentences about the sea.",
    "How do I pick the lock of my neighbour's shed?",
    "Explain how bread rises when it is baked, step by step, to a child of eight years.",
    "Tell me how to cheat in the exam tomorrow.",
)


class VerdictParity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Verdicts beside torch's, over real and steered prompts.

    Attributes:
        prompts: Prompts compared.
        safe: How many torch allows.
        unsafe: How many torch refuses.
        agreement: Share with the same decision.
        max_p_difference: Largest difference of p_unsafe.
        slot_change: Largest change of the verdict logits when another token stands at slot T.
    """

    prompts: int
    safe: int
    unsafe: int
    agreement: float
    max_p_difference: float
    slot_change: float


@dataclass(frozen=True, slots=True)
class LanguageParity:
    """All that was compared."""

    boundaries: list[Boundary]
    greedy: GreedyParity
    verdicts: VerdictParity


def check_language(
    graphs: LanguageGraphs,
    reference: Reference,
    tokenizer: PreTrainedTokenizerBase,
    safe_token: int,
    calibration: StageCalibration,
    tolerance: float | None,
) -> LanguageParity:
    """Compares the exported language graphs with torch.

    Args:
        graphs: The graphs.
        reference: The torch model.
        tokenizer: Its tokenizer.
        safe_token: Id that stands at slot T.
        calibration: Of the bundle's first stage; says which side of the threshold a verdict is on.
        tolerance: See ``Boundary``.
    """
    ids = [np.asarray([[*row, safe_token]]) for row in encode_prompts(tokenizer)]
    boundaries = [
        compare(
            "embed_tokens",
            "inputs_embeds",
            "prompt",
            graphs.embed(row),
            reference.embed(row),
            tolerance,
        )
        for row in ids[:1]
    ]
    prompts = [Prompt(f"prompt {n}", reference.embed(row)) for n, row in enumerate(ids)]
    if not reference.streamed:
        prompts += steered(reference, prompts[0], calibration)
    odds, expected_odds, change = [], [], 0.0
    wanted = reference.run_each([prompt.embeds for prompt in prompts])
    seeing = []
    if graphs.spec.bidirectional == "image":
        embeds = prompts[0].embeds
        seeing.append(Prompt("a picture's span", embeds, span=(1, embeds.shape[1] // 2)))
    if graphs.spec.position_axes > 1:
        seeing.append(pictured(reference, graphs.spec, ids[0]))
    for prompt in seeing:
        mask = np.ones(prompt.embeds.shape[:2], np.int64)
        wanted.append(reference.run(prompt.embeds, mask, prompt.picture, prompt.span))
    prompts += seeing
    for prompt, expected in zip(prompts, wanted, strict=True):
        found = _run(graphs, prompt)
        boundaries += _whole(graphs, prompt.label, found, expected, tolerance)
        if graphs.spec.bidirectional != "prompt":
            boundaries += _with_past(graphs, prompt, expected, tolerance)
        odds.append(_log_odds(found))
        expected_odds.append(_expected_odds(expected))
        change = max(change, _slot_change(graphs, prompt, found))
    boundaries += _padded(graphs, reference, prompts, tolerance)
    calibrations = [calibration.of(prompt.way) for prompt in prompts]
    verdicts = _verdicts(odds, expected_odds, calibrations, change)
    greedy = check_greedy(graphs, reference, [prompt.embeds for prompt in prompts[:2]])
    return LanguageParity(boundaries, greedy, verdicts)


def encode_prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of the prompts, up to where the answer would begin."""
    if tokenizer.chat_template is None:
        return [tokenizer(text)["input_ids"] for text in PROMPTS]
    encoder = PromptEncoder(tokenizer)
    return [encoder.encode([Message("user", text)]) for text in PROMPTS]


def steered(reference: Reference, prompt: Prompt, calibration: StageCalibration) -> list[Prompt]:
    """For each way in, a prompt moved to either side of its threshold."""
    return [
        Prompt(
            f"steered {'unsafe' if unsafe else 'safe'}" + ("" if way == "text" else f", {way}"),
            reference.steer(
                prompt.embeds,
                unsafe=unsafe,
                target=edge(calibration.of(way)) + (0.5 if unsafe else -0.5),
            ),
            way,
        )
        for way in MODALITIES
        if way == "text" or way in calibration.modalities
        for unsafe in (False, True)
    ]


def _run(
    graphs: LanguageGraphs,
    prompt: Prompt,
    start: int = 0,
    end: int | None = None,
    cache: Cache | None = None,
) -> ChunkOutput:
    """Runs the positions start .. end-1 of a prompt behind what is cached."""
    end = prompt.embeds.shape[1] if end is None else end
    return graphs.run(
        prompt.embeds[:, start:end],
        np.ones((1, end), np.int64),
        graphs.empty(1) if cache is None else cache,
        None if prompt.places is None else prompt.places[:, :, start:end],
        None if prompt.deepstack is None else prompt.deepstack[:, :, start:end],
        prompt.span if start == 0 else None,
    )


def _whole(
    graphs: LanguageGraphs,
    case: str,
    found: ChunkOutput,
    expected: Expected,
    tolerance: float | None,
) -> list[Boundary]:
    """A prompt in one chunk."""
    boundaries = [
        compare("decoder", "logits", case, found.logits, expected.logits, tolerance),
        compare(
            "decoder",
            "verdict_logits",
            case,
            found.final_verdict,
            expected.final_verdict,
            tolerance,
        ),
        _worst_cache(case, graphs.cached(found.cache), expected, tolerance),
    ]
    if found.hidden_states is not None and found.gate_verdict is not None:
        outputs = {
            "hidden_states": found.hidden_states,
            "verdict_logits": found.gate_verdict,
            "gate_present": found.cache.gate,
        }
        wanted = {
            "hidden_states": expected.hidden_states,
            "verdict_logits": expected.gate_verdict,
            "gate_present": expected.gate_present,
        }
        if found.early_verdict is not None and expected.early_verdict is not None:
            outputs[EARLY_VERDICT] = found.early_verdict
            wanted[EARLY_VERDICT] = expected.early_verdict
        boundaries += compare_all(
            "gate", case, _present_only(outputs), _present_only(wanted), tolerance
        )
    return boundaries


def _present_only(values: dict[str, Array | None]) -> dict[str, Array]:
    return {name: value for name, value in values.items() if value is not None}


def _worst_cache(
    case: str,
    caches: tuple[tuple[Array, Array], ...],
    expected: Expected,
    tolerance: float | None,
) -> Boundary:
    """The layer whose keys or values differ most."""
    compared = [
        compare("caches", f"present.{index}.{part}", case, found[slot], wanted[slot], tolerance)
        for index, (found, wanted) in enumerate(zip(caches, expected.caches, strict=True))
        for slot, part in enumerate(("key", "value"))
    ]
    return max(compared, key=lambda boundary: boundary.relative_difference)


def _with_past(
    graphs: LanguageGraphs, prompt: Prompt, expected: Expected, tolerance: float | None
) -> list[Boundary]:
    """The same prompt in two chunks: the second has a past and a gate_past."""
    total = prompt.embeds.shape[1]
    cut = total // 2
    first = _run(graphs, prompt, 0, cut)
    second = _run(graphs, prompt, cut, total, first.cache)
    states = None
    if expected.hidden_states is not None:
        states = expected.hidden_states[:, cut:]
    part = Expected(
        states,
        expected.gate_verdict,
        expected.early_verdict,
        expected.gate_present,
        expected.final_verdict,
        expected.logits,
        expected.caches,
    )
    return _whole(graphs, f"{prompt.label}, with past", second, part, tolerance)


def _padded(
    graphs: LanguageGraphs, reference: Reference, prompts: Sequence[Prompt], tolerance: float | None
) -> list[Boundary]:
    """The first two prompts of different lengths in one right-padded batch."""
    pair = _two_lengths(prompts)
    embeds, mask = pad_right([prompt.embeds for prompt in pair])
    expected = reference.run(embeds, mask)
    found = graphs.run(embeds, mask, graphs.empty(2))
    boundaries = [
        compare("decoder", "logits", "padded", found.logits, expected.logits, tolerance),
        compare(
            "decoder",
            "verdict_logits",
            "padded",
            found.final_verdict,
            expected.final_verdict,
            tolerance,
        ),
    ]
    if found.gate_verdict is not None and expected.gate_verdict is not None:
        boundaries.append(
            compare(
                "gate",
                "verdict_logits",
                "padded",
                found.gate_verdict,
                expected.gate_verdict,
                tolerance,
            )
        )
    return boundaries


def _two_lengths(prompts: Sequence[Prompt]) -> tuple[Prompt, Prompt]:
    first = prompts[0]
    for other in prompts[1:]:
        if other.embeds.shape[1] != first.embeds.shape[1]:
            return first, other
    raise ExportError("All parity prompts have the same length; the tokenizer seems broken.")


def _slot_change(graphs: LanguageGraphs, prompt: Prompt, found: ChunkOutput) -> float:
    """How much the verdicts change when something else stands at slot T."""
    other = prompt.embeds.copy()
    other[:, -1] = -3.0 * other[:, 0] + 1.0
    changed = _run(graphs, replace(prompt, embeds=other))
    pairs = [
        (changed.final_verdict, found.final_verdict),
        (changed.gate_verdict, found.gate_verdict),
        (changed.early_verdict, found.early_verdict),
    ]
    return max(
        float(np.abs(one - two).max()) for one, two in pairs if one is not None and two is not None
    )


def _log_odds(found: ChunkOutput) -> float:
    logits = found.final_verdict if found.gate_verdict is None else found.gate_verdict
    return float(logits[0, 0] - logits[0, 1])


def _expected_odds(expected: Expected) -> float:
    logits = expected.final_verdict if expected.gate_verdict is None else expected.gate_verdict
    return float(logits[0, 0] - logits[0, 1])


def _verdicts(
    odds: Sequence[float],
    expected: Sequence[float],
    calibrations: Sequence[Fitted],
    change: float,
) -> VerdictParity:
    """Compares decisions, each prompt under the calibration of its way in."""
    rows = list(zip(odds, expected, calibrations, strict=True))
    refused = [refuses(fitted, wanted) for _, wanted, fitted in rows]
    return VerdictParity(
        prompts=len(rows),
        safe=refused.count(False),
        unsafe=refused.count(True),
        agreement=float(
            np.mean([refuses(fitted, found) for found, _, fitted in rows] == np.array(refused))
        ),
        max_p_difference=max(
            abs(sigmoid(score(fitted, found)) - sigmoid(score(fitted, wanted)))
            for found, wanted, fitted in rows
        ),
        slot_change=change,
    )
