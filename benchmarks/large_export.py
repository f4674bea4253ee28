"""Exports a random checkpoint of two billion parameters and says what it took.

python benchmarks/large_export.py FOLDER [--precision int4] [--family qwen2]

FOLDER gets the checkpoint (bf16, sharded, about 4 GB) and the bundle; both are removed at the end
unless --keep is given. The weights are random, so nothing but time, memory and agreement with torch
is told by them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config

from edge_safe.export import export_bundle
from edge_safe.models.control_tokens import ControlTokens
from edge_safe.models.safety_file import Calibration, describe, write_safety
from edge_safe.models.safety_head import SafetyConfig, SafetyModule

# About that of Qwen 2.5 1.5B, with more layers; 2.0 billion parameters in all.
SIZES = {
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 38,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
}
CONFIGS: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config}
EXIT_LAYER = 18
SHARD_BYTES = 1 << 30
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|safe|>", "<|unsafe|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{{ '<|safe|>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_checkpoint(folder: Path, family: str, layers: int) -> int:
    """Writes shards one by one; returns the number of parameters."""
    folder.mkdir(parents=True)
    config = CONFIGS[family](**SIZES | {"num_hidden_layers": layers})
    config.architectures = ["LlamaForCausalLM" if family == "llama" else "Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    held = parameters = count = 0

    def flush() -> None:
        nonlocal held, count
        count += 1
        file = f"model-{count:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(shard, file))
        shard.clear()
        held = 0

    for name, shape in _shapes(family, layers):
        ones = name.endswith("norm.weight")
        tensor = torch.ones(shape) if ones else 0.02 * torch.randn(shape, generator=generator)
        shard[name] = tensor.bfloat16()
        parameters += tensor.numel()
        held += 2 * tensor.numel()
        if held >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_tokenizer(folder)
    _write_safety(folder, SIZES["hidden_size"])
    return parameters


def _shapes(family: str, layers: int) -> list[tuple[str, tuple[int, ...]]]:
    width, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    narrow = SIZES["num_key_value_heads"] * width // SIZES["num_attention_heads"]
    found: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (SIZES["vocab_size"], width))
    ]
    for index in range(layers):
        base = f"model.layers.{index}"
        for part, rows in (("q_proj", width), ("k_proj", narrow), ("v_proj", narrow)):
            found.append((f"{base}.self_attn.{part}.weight", (rows, width)))
            if family == "qwen2":
                found.append((f"{base}.self_attn.{part}.bias", (rows,)))
        found += [
            (f"{base}.self_attn.o_proj.weight", (width, width)),
            (f"{base}.mlp.gate_proj.weight", (inner, width)),
            (f"{base}.mlp.up_proj.weight", (inner, width)),
            (f"{base}.mlp.down_proj.weight", (width, inner)),
            (f"{base}.input_layernorm.weight", (width,)),
            (f"{base}.post_attention_layernorm.weight", (width,)),
        ]
    return [*found, ("model.norm.weight", (width,))]


def _write_tokenizer(folder: Path) -> None:
    """Single bytes and the markers are all that random weights need."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: index for index, word in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        bos_token="<|im_start|>",
        chat_template=TEMPLATE,
        additional_special_tokens=["<|safe|>", "<|unsafe|>"],
    ).save_pretrained(folder)


def _write_safety(folder: Path, width: int) -> None:
    config = SafetyConfig(width, (EXIT_LAYER,), attention_heads=4, attention_head_dim=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = SafetyModule(config)
        for parameter in module.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.05)
    nothing = Calibration(1.0, 0.0, 0.5, "nothing, random weights", 0, 0.5, 0.5, 0.5)
    stages = {f"gate.{EXIT_LAYER}": nothing, "final": nothing}
    tokens = ControlTokens("<|safe|>", "<|unsafe|>", 3, 4)
    write_safety(folder, module, describe(config, tokens, EXIT_LAYER, stages))


def main() -> None:
    """Writes, exports, reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--family", choices=list(CONFIGS), default="qwen2")
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    source, out = options.folder / "checkpoint", options.folder / "bundle"
    start = time.perf_counter()
    parameters = write_checkpoint(source, options.family, options.layers)
    print(
        f"{parameters / 1e9:.2f} billion parameters, written in {time.perf_counter() - start:.0f} s"
    )
    start = time.perf_counter()
    # Four bits do to random weights what acceptance must not let pass.
    report = export_bundle(source, out, precision=options.precision, allow_unaccepted=True)
    print(f"exported in {time.perf_counter() - start:.0f} s: {report.seconds}")
    print(f"bundle: {sum(report.sizes.values()) / 2**20:.0f} MB")
    print(f"peak memory: {report.peak_memory_mb} MB")
    parity = report.parity
    print(f"compared with: {parity.reference}")
    print(
        f"verdicts agree on {parity.verdicts.agreement:.1%} of {parity.verdicts.prompts}, p_unsafe "
        f"differs by at most {parity.verdicts.max_p_difference:.2g}; next token agrees at "
        f"{parity.greedy.agreement:.1%} of {parity.greedy.tokens} steps, KL {parity.greedy.kl:.2g}"
    )
    if not options.keep:
        shutil.rmtree(source)
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
