"""Weights as they come: shards, adapters, models too large to be held."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from edge_safe.errors import ExportError
from edge_safe.export import decoder_config, export_bundle
from edge_safe.export.checkpoint.reader import CheckpointReader
from edge_safe.export.checkpoint.shards import Shards
from edge_safe.export.families.llama import open_checkpoint
from edge_safe.export.report import STREAMED
from tests.conftest import SAFE_ID
from tests.export.families import write_family


@pytest.fixture
def sharded(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint in bf16, in several shards."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "sharded"))
    (folder / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def reader(folder: Path) -> CheckpointReader:
    return CheckpointReader(
        folder, AutoConfig.from_pretrained(decoder_config.weights_folder(folder))
    )


def test_shards_give_what_transformers_reads(sharded: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.float32)
    read = reader(sharded)
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(read.tensor(name), parameter.detach().numpy())


def test_a_missing_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ExportError, match=shard.name) as caught:
        export_bundle(sharded, tmp_path / "b")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "b").exists()


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ExportError, match=shard.name):
        Shards(sharded)


def test_a_tensor_that_is_not_in_its_shard_is_named(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(ExportError, match=r"model\.extra\.weight"):
        Shards(sharded)


def test_other_forms_of_weights_are_refused(sharded: Path) -> None:
    for path in [*sharded.glob("*.safetensors"), *sharded.glob("*.index.json")]:
        if path.name.startswith("model"):
            path.unlink()
    (sharded / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ExportError, match="safetensors alone"):
        Shards(sharded)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_a_model_too_large_to_be_held_is_read_layer_by_layer(
    family: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint if family == "llama" else write_family(tmp_path / family, family)
    monkeypatch.setattr(decoder_config, "HELD_BYTES", 0)
    report = export_bundle(source, tmp_path / "b", precision="fp32")
    assert report.parity.reference == STREAMED
    assert report.parity.passed
    assert report.parity.greedy.agreement == 1
    assert max(b.relative_difference for b in report.parity.boundaries) < 1e-4
    assert report.acceptance.max_p_difference < 1e-4
    assert report.peak_memory_mb > 50


def test_a_streamed_model_holds_no_weights(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_config, "HELD_BYTES", 0)
    model = open_checkpoint(tiny_checkpoint).language
    model(input_ids=torch.tensor([[5, SAFE_ID]]))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def adapter(base: Path, folder: Path, **options: Any) -> Path:
    """Writes a random adapter beside its base, and gives peft's own merged weights with it."""
    torch.manual_seed(3)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(**settings | options),
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    merged = model.merge_and_unload()
    save_file(
        {name: value.clone().contiguous() for name, value in merged.named_parameters()},
        folder / "expected.safetensors",
    )
    for name in ("safety.json", "safety.safetensors"):
        shutil.copyfile(base / name, folder / name)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"down_proj": 3}, "rank_pattern": {"q_proj": 2}},
    ],
    ids=str,
)
def test_an_adapter_is_merged_as_peft_does(
    options: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    assert_merged(tiny_checkpoint, adapter(tiny_checkpoint, tmp_path / "adapter", **options))


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens", "v_proj"]}],
    ids=str,
)
def test_an_adapter_may_change_an_embedding_of_its_own(
    options: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    untied = write_family(tmp_path / "untied", "mistral")
    assert_merged(untied, adapter(untied, tmp_path / "untied adapter", **options), least=0)
    with pytest.raises(ExportError, match="lm_head"):
        reader(adapter(tiny_checkpoint, tmp_path / "adapter", **options))


def assert_merged(base: Path, folder: Path, least: int = 4) -> None:
    """The reader's tensors are peft's, and some of them are not the base model's."""
    read = reader(folder)
    before = load_file(base / "model.safetensors")
    changed = 0
    for name, value in load_file(folder / "expected.safetensors").items():
        found = read.tensor(name)
        np.testing.assert_allclose(found, value.numpy(), rtol=1e-5, atol=1e-6)
        changed += not np.allclose(found, before[name].numpy())
    assert changed >= least


def test_an_adapter_folder_becomes_a_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = adapter(tiny_checkpoint, tmp_path / "adapter")
    report = export_bundle(folder, tmp_path / "b", precision="fp32")
    assert report.parity.passed
    assert (tmp_path / "b" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("option", "value"), [("use_dora", True), ("bias", "all"), ("fan_in_fan_out", True)]
)
def test_an_adapter_that_cannot_be_merged_is_refused(
    option: str, value: object, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = adapter(tiny_checkpoint, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {option: value}))
    with pytest.raises(ExportError, match=option):
        reader(folder)


def test_an_adapter_without_its_base_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = adapter(tiny_checkpoint, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    other = {"base_model_name_or_path": "somebody/else"}
    path.write_text(json.dumps(json.loads(path.read_text()) | other))
    with pytest.raises(ExportError, match="somebody/else"):
        export_bundle(folder, tmp_path / "b")


def test_an_adapter_of_another_model_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = adapter(tiny_checkpoint, tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    tensors = {k.replace("layers.3", "layers.9"): v for k, v in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(ExportError, match=r"layers\.9"):
        reader(folder)
