"""What each precision's lattice does to answers, beside llama.cpp's Q4_0.

    python benchmarks/answer_rounding.py CHECKPOINT --data preferences.jsonl [--exit-layer 16] \
        [--precision int4 int4-fast] [--embedding int4]

CHECKPOINT is a folder of transformers with a chat template (benchmarks/peers/setup.py leaves that
of pebble's language model in its folder), the data has rows {"prompt", "chosen"}. The weights of
the layers, of lm_head and of the embedding are rounded and given back in float32, everything else
stays as it is: what decodes is compared, no kernel and no activation. Q4_0 is llama.cpp's own
rounding of a block of 32, with embedding and lm_head in 8 bits. Over the first tokens of each
answer: mean KL divergence of the next token from fp32's, perplexity of the answer against fp32's,
share of the same likeliest token. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from edge_safe.export.packing import dequantize
from edge_safe.export.quantization import (
    INT8,
    PRECISIONS,
    MatrixFormat,
    precision_named,
)
from edge_safe.export.rounding import quantize

Q4_0 = "llama.cpp Q4_0"
BLOCK = 32

Round = Callable[[torch.Tensor], torch.Tensor]


def as_q4_0(weight: torch.Tensor) -> torch.Tensor:
    """Rounds (N, K) as llama.cpp does: the furthest value of a block / -8 is its step."""
    grouped = weight.reshape(len(weight), -1, BLOCK)
    furthest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    step = furthest / -8
    inverse = torch.where(step == 0, torch.zeros_like(step), 1 / step)
    values = torch.clamp(torch.floor(grouped * inverse + 8.5), 0, 15) - 8
    return (values * step.half().float()).reshape(weight.shape)


def in_format(form: MatrixFormat) -> Round:
    """Rounds (N, K) as the exporter does."""

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        matrix = weight.numpy()
        return torch.from_numpy(dequantize(quantize(matrix, form), form, matrix.shape[1]))

    return rounded


def methods(
    name: str, exit_layer: int | None, embedding: str | None
) -> tuple[Callable[[int], Round], Round, Round]:
    """How a row rounds the matrices of each layer, lm_head and embedding, where it decodes."""
    if name == Q4_0:
        return (lambda _: as_q4_0), in_format(INT8), in_format(INT8)
    row = precision_named(name, embedding)
    of_layer = functools.partial(row.of_layer, exit_layer=exit_layer)
    return (lambda index: in_format(of_layer(index))), in_format(row.head), in_format(row.embedding)


def read_answers(
    data: Path, tokenizer: PreTrainedTokenizerBase, rows: int, tokens: int
) -> list[tuple[list[int], int]]:
    """Ids of prompt and answer, and how many are the prompt's; the same rows at every call."""
    with data.open(encoding="utf-8") as stream:
        found = [json.loads(line) for line in stream]
    random.Random(0).shuffle(found)
    answers = []
    for row in [row for row in found if len(row["chosen"]) > 150][:rows]:
        turn = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        answer = tokenizer(row["chosen"])["input_ids"][:tokens]
        answers.append(([*prompt, *answer], len(prompt)))
    return answers


@torch.no_grad()
def log_shares(model: PreTrainedModel, answers: list[tuple[list[int], int]]) -> list[torch.Tensor]:
    """Per answer (n, V) log probabilities of its tokens."""
    return [
        torch.log_softmax(model(torch.tensor([ids])).logits[0, start - 1 : -1], -1)
        for ids, start in answers
    ]


def surprise(shares: list[torch.Tensor], answers: list[tuple[list[int], int]]) -> float:
    """Mean negative log probability of the answers' tokens."""
    found = [
        -own[torch.arange(len(own)), torch.tensor(ids[start:])]
        for own, (ids, start) in zip(shares, answers, strict=True)
    ]
    return float(torch.cat(found).mean())


def main() -> None:
    """Compares the rows that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--exit-layer", type=int, default=16)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--embedding", choices=["int8", "int4"], help="in place of the rows' own")
    known = [name for name, row in PRECISIONS.items() if row.weights.blocked]
    parser.add_argument("--precision", nargs="+", choices=known, default=["int4", "int4-fast"])
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    answers = read_answers(options.data, tokenizer, options.rows, options.tokens)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    table, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    # Each is rounded in its own format, so the two are no longer one.
    model.lm_head.weight = torch.nn.Parameter(head.clone())
    model.get_input_embeddings().weight = torch.nn.Parameter(table.clone())
    exact = log_shares(model, answers)
    figures = {}
    for name in track([*options.precision, Q4_0], description="rounding"):
        of_layer, of_head, of_table = methods(name, options.exit_layer, options.embedding)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".layers." in key and parameter.dim() == 2:
                    index = int(key.split(".layers.")[1].split(".")[0])
                    parameter.copy_(of_layer(index)(weights[key]))
            model.lm_head.weight.copy_(of_head(head))
            model.get_input_embeddings().weight.copy_(of_table(table))
        found = log_shares(model, answers)
        pairs = list(zip(exact, found, strict=True))
        kl = torch.cat([(one.exp() * (one - other)).sum(-1) for one, other in pairs])
        alike = torch.cat([one.argmax(-1) == other.argmax(-1) for one, other in pairs])
        figures[name] = {
            "kl": round(float(kl.mean()), 4),
            "perplexity": round(math.exp(surprise(found, answers) - surprise(exact, answers)), 4),
            "same_token": round(float(np.mean(alike.numpy())), 4),
        }
        print(name, figures[name])
    print(json.dumps({"benchmark": "answer_rounding", "answers": len(answers), "rows": figures}))


if __name__ == "__main__":
    main()
