"""A random safety-token checkpoint of a published model's shape, with pebble's tokenizer.

Its words mean nothing and its verdicts are chance: only the time it takes is of interest.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edge_safe.errors import UsageError
from edge_safe.models.control_tokens import ControlTokens
from edge_safe.models.pebble import PebbleTokenizer
from edge_safe.models.safety_file import Calibration, EarlyExit, describe, stage_name, write_safety
from edge_safe.models.safety_head import SafetyConfig, SafetyModule

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHAPES_FILE = Path(__file__).with_name("shapes.toml")


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes by transformers' names; where the gate reads, and what ends clear cases below."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    exit_layer: int
    early_layer: int


def read_shapes() -> dict[str, Shape]:
    """The shapes there are, by name."""
    table = tomllib.loads(SHAPES_FILE.read_text(encoding="utf-8"))
    return msgspec.convert(table, dict[str, Shape])


def write_random(shape: Shape, words: Path, folder: Path) -> None:
    """Writes the checkpoint.

    Args:
        shape: Its sizes.
        words: pebble's checkpoint, whose tokenizer and control tokens it takes.
        folder: Where to write.

    Raises:
        UsageError: The vocabulary does not hold the tokenizer's.
    """
    tokenizer = PebbleTokenizer.from_pretrained(words)
    if len(tokenizer) > shape.vocab_size:
        raise UsageError(
            f"The shape's vocabulary of {shape.vocab_size} is too small for the {len(tokenizer)} "
            f"words of {words}."
        )
    fields = {
        key: value
        for key, value in msgspec.to_builtins(shape).items()
        if key not in ("model_type", "exit_layer", "early_layer", "rope_theta")
    }
    config = AutoConfig.for_model(
        shape.model_type,
        **fields,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # All words are as likely as each other then, rounded or not: what random weights prefer by a
    # hair is no answer that acceptance could test.
    model.get_input_embeddings().weight.data *= 0.01
    # Layers add little, so that what rounding does to them does not grow from one to the next and
    # the bundle's verdicts stay those of torch.
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.01
        layer.mlp.down_proj.weight.data *= 0.01
    layers = (shape.early_layer, shape.exit_layer)
    safety_config = SafetyConfig(shape.hidden_size, layers)
    safety = SafetyModule(safety_config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    safe, unsafe = tokenizer.convert_tokens_to_ids(["<|safe|>", "<|unsafe|>"])
    chance = Calibration(1.0, 0.0, 0.5, "nothing, random weights", 0, 0.5, 0.5, 0.5)
    stages = {stage_name(layer): chance for layer in (*layers, None)}
    tokens = ControlTokens("<|safe|>", "<|unsafe|>", safe, unsafe)
    early = EarlyExit(shape.early_layer, chance, chance)
    file = describe(safety_config, tokens, shape.exit_layer, stages, early)
    write_safety(folder, safety, file)
