"""How near benign answers through the gated template stay to the base model's.

    python benchmarks/base_fidelity.py models/pebble --data dev.jsonl --rows 200

Takes the first rows labelled safe. The base model answers each greedily; then both models read the
same answers, the gated one after its safe token, and are compared token by token. Needs the export
extra. The last line is one JSON object:

- agreement: share of answer tokens that both models think likeliest
- identical: share of prompts for which the gated model decodes the very same answer
- kl: mean KL(base || gated) of an answer token, in nats
- perplexity_base, perplexity_gated, perplexity_ratio: of the base model's answers
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from edge_safe.errors import CheckpointError
from edge_safe.evaluation.rows import read_rows
from edge_safe.models.prompts import Message, PromptEncoder
from edge_safe.models.safety_model import SafetyTokenModel


@dataclass(slots=True)
class Totals:
    """Sums over answer tokens, and over prompts."""

    tokens: int = 0
    agree: int = 0
    kl: float = 0.0
    nll_base: float = 0.0
    nll_gated: float = 0.0
    prompts: int = 0
    identical: int = 0


def open_base(checkpoint: Path, base: Path | None) -> PreTrainedModel:
    """The model as it was before the safety token was added."""
    if base is None:
        from edge_safe.models.pebble.assembly import base_language_model
        from edge_safe.models.pebble.configuration_pebble import PebbleConfig

        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        if config.get("model_type") != "pebble":
            raise CheckpointError("name the base model's folder with --base")
        base = base_language_model(PebbleConfig.from_pretrained(checkpoint))
    model: PreTrainedModel = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model.requires_grad_(False)


def greedy(model: PreTrainedModel, ids: list[int], length: int, masked: list[int]) -> list[int]:
    """The likeliest answer, ended by the end token or by its length."""
    end = model.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end])
    answer: list[int] = []
    cache = None
    step = torch.tensor([ids])
    while len(answer) < length:
        output = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        logits = output.logits[0, -1]
        logits[masked] = -torch.inf
        answer.append(int(logits.argmax()))
        if answer[-1] in ends:
            break
        step = torch.tensor([answer[-1:]])
    return answer


def log_probabilities(
    model: PreTrainedModel, before: list[int], answer: list[int], masked: list[int]
) -> Tensor:
    """Log-probabilities (answer tokens, V) of what stands after ``before``."""
    ids = torch.tensor([before + answer[:-1]])
    logits = model(input_ids=ids, logits_to_keep=len(answer)).logits[0]
    logits[:, masked] = -torch.inf
    return logits.float().log_softmax(-1)


def compare(totals: Totals, base: Tensor, gated: Tensor, answer: list[int]) -> None:
    """Adds one answer, read by both models."""
    targets = torch.tensor(answer)[:, None]
    totals.tokens += len(answer)
    totals.agree += int((base.argmax(-1) == gated.argmax(-1)).sum())
    totals.kl += float(((base - gated) * base.exp()).nan_to_num(0.0).sum())
    totals.nll_base -= float(base.gather(1, targets).sum())
    totals.nll_gated -= float(gated.gather(1, targets).sum())


@torch.no_grad()
def main() -> None:
    """Prints one line of progress every ten prompts, then the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="labelled rows")
    parser.add_argument("--base", type=Path, help="the base model, where it is not pebble's")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=48, help="longest answer")
    options = parser.parse_args()

    gated = SafetyTokenModel.from_pretrained(options.checkpoint)
    base = open_base(options.checkpoint, options.base)
    tokens = gated.file.tokens
    masked = list(tokens.ids)
    encoder = PromptEncoder(gated.tokenizer, max_tokens=512)
    rows = [row for row in read_rows(options.data, labelled=True) if not row.unsafe]
    totals = Totals()
    for row in rows[: options.rows]:
        prompt = encoder.encode([Message("user", row.prompt)])
        opened = [*prompt, tokens.safe_id]
        answer = greedy(base, prompt, options.tokens, masked)
        compare(
            totals,
            log_probabilities(base, prompt, answer, masked),
            log_probabilities(gated.model, opened, answer, masked),
            answer,
        )
        totals.prompts += 1
        totals.identical += greedy(gated.model, opened, options.tokens, masked) == answer
        if totals.prompts % 10 == 0:
            print(f"{totals.prompts} prompts", file=sys.stderr)
    n = max(totals.tokens, 1)
    result = {
        "prompts": totals.prompts,
        "answer_tokens": totals.tokens,
        "agreement": totals.agree / n,
        "identical": totals.identical / max(totals.prompts, 1),
        "kl": totals.kl / n,
        "perplexity_base": math.exp(totals.nll_base / n),
        "perplexity_gated": math.exp(totals.nll_gated / n),
        "perplexity_ratio": math.exp((totals.nll_gated - totals.nll_base) / n),
    }
    print(json.dumps({name: round(value, 5) for name, value in result.items()}))


if __name__ == "__main__":
    main()
