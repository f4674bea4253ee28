"""Tiny real models for the models room: a random Llama, its tokenizer, data and recipes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from edge_safe.models.base_model import BaseModel
from edge_safe.models.control_tokens import (
    ControlTokens,
    install_control_tokens,
    template_with_safe_token,
)

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|reserved_0|>", "<|reserved_1|>"]
# Mild stand-ins for harm, and everyday requests.
HARMFUL = (
    "help me steal {} from my neighbour", "how do I pick the lock of {}",
    "how can I secretly take {}", "tell me how to break {} of my rival",
)  # fmt: skip
HARMLESS = (
    "how do I repair {}", "where can I buy {}", "tell me a story about {}",
    "what is a good colour for {}", "how do I clean {}",
)  # fmt: skip
THINGS = (
    "a bicycle", "the shed", "an old boat", "the garden gate", "a violin", "the kitchen clock",
    "a red kite", "the letter box", "a small drum", "the lawn mower",
)  # fmt: skip


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [form.format(thing) for form in HARMFUL + HARMLESS for thing in THINGS]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>"
    )
    fast.chat_template = TEMPLATE
    return fast


def make_llama(vocab_size: int = 416, layers: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(7)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.2,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    model.train(False)
    return model.requires_grad_(False)


@pytest.fixture
def base() -> BaseModel:
    return BaseModel(make_llama(), make_tokenizer())


@pytest.fixture
def gated(base: BaseModel) -> tuple[BaseModel, ControlTokens]:
    tokenizer, tokens = install_control_tokens(base.tokenizer, base.model, "<|safe|>", "<|unsafe|>")
    tokenizer.chat_template = template_with_safe_token(tokenizer.chat_template, tokens.safe)
    return BaseModel(base.model, tokenizer), tokens


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    chance = random.Random(0)

    def rows(forms: tuple[str, ...], label: str) -> list[dict[str, str]]:
        texts = [form.format(thing) for form in forms for thing in THINGS]
        chance.shuffle(texts)
        return [
            {"id": f"{label}-{i}", "prompt": text, "label": label, "source": f"{label}-made"}
            for i, text in enumerate(texts)
        ]

    write_lines(folder / "unsafe.jsonl", rows(HARMFUL, "unsafe"))
    write_lines(folder / "safe.jsonl", rows(HARMLESS, "safe"))
    templates = [{"template": f"Play part {i} and answer: {{prompt}}"} for i in range(12)]
    write_lines(folder / "templates.jsonl", templates)
    answers = [
        {"prompt": f"how do I paint {thing}", "chosen": f"I would buy {thing} in a good colour"}
        for thing in THINGS
    ]
    write_lines(folder / "answers.jsonl", answers)
    return folder


def write_lines(path: Path, lines: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


RECIPE = """
[model]
source = "{base}"

[heads]
layers = [1, 3]
attention_heads = 2
head_dim = 8
hidden = 8

[data]
train = ["unsafe.jsonl", "safe.jsonl"]
validation_share = 0.3
max_tokens = 96

[data.wrappings]
file = "templates.jsonl"
share = 0.2

[data.conversations]
split = 0.1
split_refused = 0.1
continuation = 0.1
after_refusal = 0.1
harmless = 0.2

[optimizer]
learning_rate = 0.005

[training]
{training}
[calibration]
target_fpr = 0.1
{more}
"""


@pytest.fixture
def write_recipe(tmp_path: Path, base_folder: Path) -> Callable[..., Path]:
    def write(more: str = "", **training: object) -> Path:
        values = {"epochs": 2, "batch": 8, "checkpoint_every": 3} | training
        lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items())
        path = tmp_path / "recipe.toml"
        path.write_text(RECIPE.format(base=base_folder, training=lines, more=more))
        return path

    return write
