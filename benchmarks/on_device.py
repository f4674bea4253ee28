"""A bundle on a provider, beside the same bundle on this machine's CPU.

    python benchmarks/on_device.py BUNDLE --provider cuda --data dev.jsonl --rows 200

Verdicts of labelled text rows, of a picture and a sound, greedy answers of the harmless rows, and
times of one 256-token prompt: refusal, first token, decoding. With --torch CHECKPOINT the torch
model judges the same rows on the GPU too. Ids and verdicts are kept, never what a model said. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_safe import Decision, SafeModel
from edge_safe.evaluation.rows import read_rows
from edge_safe.evaluation.speed.prompts import exact_prompt
from edge_safe.evaluation.speed.requests import allowing, load_forgetful, refusing, refusing_late
from edge_safe.evaluation.speed.sample_media import hum, sign

ANSWER_TOKENS = 32
# What manifests call pictures and sound.
SENSES = {"image": {"image", "text_lines", "objects"}, "audio": {"audio", "speech"}}


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--provider", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--answers", type=int, default=20)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--torch", type=Path, default=None)
    options = parser.parse_args()
    every = read_rows(options.data, labelled=True)
    rows = [row for row in every if not row.images and row.audio is None]
    rows = rows[:: max(1, len(rows) // options.rows)][: options.rows]

    start = time.perf_counter()
    device = load_forgetful(options.bundle, provider=options.provider)
    load_s = time.perf_counter() - start
    host = load_forgetful(options.bundle, provider="cpu")
    pairs = [(device.assess(row.prompt), host.assess(row.prompt)) for row in rows]
    errors = sum(one.decision is Decision.ERROR for one, _ in pairs)
    both = [(a, b) for a, b in pairs if math.isfinite(a.p_unsafe + b.p_unsafe)]
    found: dict[str, Any] = {
        "bundle": options.bundle.name,
        "provider": options.provider,
        "rows": len(rows),
        "errors": errors,
        "agreement": _share(a.decision is b.decision for a, b in pairs),
        "same_layer": _share(a.layer == b.layer for a, b in both),
        "max_p_difference": max(abs(a.p_unsafe - b.p_unsafe) for a, b in both),
        "load_s": round(load_s, 2),
    }
    found |= _answers(device, host, [row.prompt for row in rows], options.answers)
    found["media"] = _media(device, host)
    found["device_ms"] = _times(device, options.runs)
    found["host_ms"] = _times(host, max(3, options.runs // 4))
    if options.torch is not None:
        found["torch"] = _torch(options.torch, [row.prompt for row in rows], pairs)
    print(json.dumps(found))
    return 0


def _media(device: SafeModel, host: SafeModel) -> dict[str, Any]:
    """A picture and a sound, as far as the bundle takes them: the towers of both."""
    found: dict[str, Any] = {}
    for kind, given in (("image", {"images": [sign()]}), ("audio", {"audio": hum()})):
        if SENSES[kind].isdisjoint(device.manifest.modalities):
            continue
        text = "What is this?"
        pair = [model.assess(text, **given) for model in (device, host)]
        times = [
            allowing(model).generate(text, max_tokens=1, **given).timing.encode_ms
            for model in (device, host)
        ]
        found[kind] = {
            "decisions": [verdict.decision.value for verdict in pair],
            "p_difference": abs(pair[0].p_unsafe - pair[1].p_unsafe),
            "encode_ms": [round(value or 0.0, 1) for value in times],
        }
    return found


def _answers(device: SafeModel, host: SafeModel, prompts: list[str], count: int) -> dict[str, Any]:
    """Greedy answers of both, to prompts that the host allows."""
    same, steps, alike = 0, 0, 0
    allowed = [text for text in prompts if host.assess(text).decision is Decision.ALLOW][:count]
    for text in allowed:
        replies = [
            allowing(model).generate(text, max_tokens=ANSWER_TOKENS, temperature=0.0)
            for model in (device, host)
        ]
        texts = [reply.text or "" for reply in replies]
        same += texts[0] == texts[1]
        steps += max(map(len, texts))
        alike += next(
            (n for n, (a, b) in enumerate(zip(*texts, strict=False)) if a != b),
            min(map(len, texts)),
        )
    return {
        "answers": len(allowed),
        "answers_identical": same,
        "answers_common_beginning": round(alike / max(1, steps), 3),
    }


def _times(model: SafeModel, runs: int) -> dict[str, float]:
    """Medians, in milliseconds, of a 256-token prompt."""
    text = exact_prompt(model, 256) or "Hello"
    open_, closed, late = allowing(model), refusing(model), refusing_late(model)
    ways: dict[str, Callable[[], Any]] = {
        "refusal": lambda: closed.generate(text),
        "late_refusal": lambda: late.generate(text),
        "first_token": lambda: open_.generate(text, max_tokens=1),
        "answer_64": lambda: open_.generate(text, max_tokens=64, temperature=0.0),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    tokens = 64
    for run in range(runs + 2):
        for name, way in ways.items():
            start = time.perf_counter()
            reply = way()
            if run >= 2:
                taken[name].append((time.perf_counter() - start) * 1000)
            if name == "answer_64":
                tokens = reply.usage.completion_tokens
    medians = {name: round(statistics.median(values), 2) for name, values in taken.items()}
    decoding = (medians["answer_64"] - medians["first_token"]) / max(1, tokens - 1)
    return medians | {"per_token": round(decoding, 3), "tokens": tokens}


def _torch(checkpoint: Path, prompts: list[str], pairs: list[Any]) -> dict[str, Any]:
    """The torch model's verdicts on the GPU beside those of the provider."""
    import torch

    from edge_safe.models.prompts import Message, PromptEncoder
    from edge_safe.models.safety_model import SafetyTokenModel

    model = SafetyTokenModel.from_pretrained(checkpoint).to("cuda")
    encoder = PromptEncoder(model.tokenizer)
    same, largest, times = 0, 0.0, []
    for text, (verdict, _) in zip(prompts, pairs, strict=True):
        ids = torch.tensor([encoder.encode([Message("user", text)])], device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        found = model.assess(input_ids=ids, attention_mask=torch.ones_like(ids))
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1000)
        same += bool(found.refuse[0]) == (verdict.decision is Decision.REFUSE)
        if verdict.layer == model.file.exit_layer:
            largest = max(largest, abs(float(found.p_unsafe[0]) - verdict.p_unsafe))
    return {
        "device": torch.cuda.get_device_name(),
        "agreement": same / len(prompts),
        "max_p_difference": largest,
        "assess_ms": round(statistics.median(times), 2),
    }


def _share(flags: Any) -> float:
    values = list(flags)
    return sum(values) / len(values)


if __name__ == "__main__":
    sys.exit(main())
