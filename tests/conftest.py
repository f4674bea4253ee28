"""A tiny random safety-token checkpoint, and bundles that the real exporter makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|safe|>", "<|unsafe|>"]
SAFE_ID, UNSAFE_ID, END_ID = 3, 4, 2
# Words of the tokenizer, the special ones among them.
VOCABULARY = 420
# In the names of modules that see or hear.
TOWERS = ("vision", "visual", "audio", "embed_tokens_extend")

TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{{ '<|safe|>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = [
    "What does the sign say? It says that the shop opens at nine and closes at five.",
    "Tell me a story about a boat, a river and the people who live beside the water.",
    "How do I pick the lock of my neighbour's shed? I can't help with that request.",
    "Help me steal a bicycle from the rack in front of the library without being seen.",
    "Explain how bread rises when it is baked, step by step, to a child of eight years.",
    "system\nYou are a helpful AI assistant.\nuser\nassistant\n",
] * 4


def _tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer, trained here, with SmolLM2's markers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four Llama layers of width 64 with random heads at layers 1 and 2."""
    return write_llama(tmp_path_factory.mktemp("checkpoint") / "tiny")


def write_llama(folder: Path) -> Path:
    """Writes the checkpoint of ``tiny_checkpoint``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
        # Large enough that attention and MLP, not the input token alone, decide.
        initializer_range=0.15,
    )
    write_checkpoint(folder, lambda: LlamaForCausalLM(config))
    return folder


def write_checkpoint(
    folder: Path,
    make: Callable[[], PreTrainedModel],
    layers: tuple[int, ...] = (1, 2),
    *,
    template: str | None = TEMPLATE,
    special: tuple[str, ...] = (),
) -> None:
    """Writes a random model with the tiny tokenizer and random heads; the last one is the gate.

    Special tokens beyond the usual ones take the rows behind the vocabulary's.
    """
    import torch
    from transformers import PreTrainedTokenizerFast

    from edge_safe.models.control_tokens import ControlTokens
    from edge_safe.models.safety_file import Calibration, describe, write_safety
    from edge_safe.models.safety_head import SafetyConfig, SafetyModule

    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        bos_token="<|im_start|>",
        chat_template=template,
        additional_special_tokens=["<|safe|>", "<|unsafe|>", *special],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = make()
        round_layers(model)
        config = SafetyConfig(64, layers, attention_heads=4, attention_head_dim=8)
        safety = SafetyModule(config)
        for parameter in safety.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stages = [*(f"gate.{layer}" for layer in layers), "final"]
    calibration = {
        stage: Calibration(1.0, 0.0, 0.5, "nothing, random weights", 0, 0.5, 0.5, 0.5)
        for stage in stages
    }
    tokens = ControlTokens("<|safe|>", "<|unsafe|>", SAFE_ID, UNSAFE_ID)
    write_safety(folder, safety, describe(config, tokens, layers[-1], calibration))


def round_layers(model: PreTrainedModel) -> None:
    """Puts the layers' weights on 4-bit lattices, so that an int4 bundle of them is accepted.

    Random weights say much more than 4 bits hold; those of trained 4-bit files, pebble's too, lie
    on such lattices already. Towers stay as they are, some are too narrow for a block.
    """
    import torch

    from edge_safe.export.packing import lattice_matrix
    from edge_safe.export.quantization import INT4
    from edge_safe.export.rounding import round_matrix

    for name, module in model.named_modules():
        in_tower = any(tower in name for tower in TOWERS)
        if isinstance(module, torch.nn.Linear) and "layers" in name and not in_tower:
            weight = module.weight.detach().numpy()
            rounded = lattice_matrix(round_matrix(weight, INT4), weight.shape[1])
            module.weight.data = torch.from_numpy(rounded)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 bundle of ``tiny_checkpoint``."""
    return export(tiny_checkpoint, tmp_path_factory.mktemp("bundle") / "tiny", "fp32")


@pytest.fixture(scope="session")
def tiny_bundle_int4(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The int4 bundle of ``tiny_checkpoint``."""
    return export(tiny_checkpoint, tmp_path_factory.mktemp("bundle") / "tiny-int4", "int4")


def export(checkpoint: Path, out: Path, precision: str) -> Path:
    """Writes a bundle and returns its folder."""
    from edge_safe.export import export_bundle

    export_bundle(checkpoint, out, precision=precision)
    return out
