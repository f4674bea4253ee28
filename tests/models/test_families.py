"""The same code on other families: text models with particulars, and one that sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from edge_safe.errors import CheckpointError
from edge_safe.export import export_bundle
from edge_safe.export.families.paligemma import TEMPLATE as ONE_TURN_TEMPLATE
from edge_safe.models.base_model import BaseModel, check_layers, load_base
from edge_safe.models.control_tokens import ControlTokens
from edge_safe.models.lm_training import add_lora
from edge_safe.models.recipe import LoraSection
from edge_safe.models.safety_file import Calibration, describe
from edge_safe.models.safety_head import SafetyConfig, SafetyModule
from edge_safe.models.safety_model import SafetyTokenModel
from edge_safe.models.token_rows import TokenRows
from edge_safe.models.train import train_recipe
from tests.export.every_family import tiny_family
from tests.export.families import FAMILIES
from tests.export.vision_families import VISION_FAMILIES, write_vision_family
from tests.models.conftest import make_tokenizer

IMAGE = 9
TEXT = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def make_llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=16,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE,
        image_token_id=IMAGE, vision_feature_layer=-1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).requires_grad_(False)


def make_qwen() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**TEXT, tie_word_embeddings=False)).requires_grad_(False)


def wrap(model: PreTrainedModel, threshold: float = 0.5) -> SafetyTokenModel:
    model.train(False)
    safety = SafetyModule(SafetyConfig(32, (1, 2), 2, 4, 4)).requires_grad_(False)
    safety.head(2).token.rows.normal_()
    fitted = Calibration(1.0, 0.0, threshold, "nothing", 0, 0.5, 0.0, 0.0)
    tokens = ControlTokens("<|safe|>", "<|unsafe|>", 3, 4)
    file = describe(safety.config, tokens, 2, {"gate.2": fitted})
    return SafetyTokenModel(model, PreTrainedTokenizerFast, safety, file)  # type: ignore[arg-type]


@pytest.mark.parametrize(("threshold", "token"), [(0.0, 4), (2.0, 3)])
def test_a_model_that_sees_judges_picture_and_words(threshold: float, token: int) -> None:
    model = wrap(make_llava(), threshold)
    inputs = {
        "input_ids": torch.tensor([[5, *[IMAGE] * 4, 20, 21]]),
        "attention_mask": torch.ones(1, 7, dtype=torch.long),
    }
    pictures = [torch.zeros(1, 3, 16, 16), torch.randn(1, 3, 16, 16)]
    logits = [model.assess(**inputs, pixel_values=x).readout.verdict_logits for x in pictures]
    assert float((logits[0] - logits[1]).abs().max()) > 1e-2
    output = model.generate(**inputs, pixel_values=pictures[1], max_new_tokens=4)
    assert int(output[0, 7]) == token


def test_an_untied_text_model_judges_and_answers() -> None:
    model = wrap(make_qwen(), 2.0)
    output = model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3)
    assert int(output[0, 3]) == 3


def test_rows_of_a_scaled_embedding_are_merged_as_they_were_trained() -> None:
    model = FAMILIES["gemma3_text"]().train(False)
    ids = torch.tensor([[5, 3, 7, 8]])
    before = model(ids).logits
    rows = TokenRows(model, (3,))
    torch.testing.assert_close(model(ids).logits, before)
    rows.rows.data += 0.1
    trained = model(ids).logits
    rows.merge()
    others = torch.arange(before.shape[-1]) != 3  # lm_head is tied, its row changes as well
    assert float((trained - before).detach().abs().max()) > 1e-2
    torch.testing.assert_close(model(ids).logits[..., others], trained[..., others])


def lora_of(family: str) -> str:
    """The recipe's section, by the names that the family's matrices have."""
    fused = family in ("phi3", "phi4_multimodal")
    targets = ["qkv_proj", "gate_up_proj"] if fused else ["q_proj", "up_proj"]
    return f"[lora]\nrank = 2\nalpha = 4\ntargets = {json.dumps(targets)}\n"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_lowers_the_loss_of_a_family_that_is_then_exported(
    family: str,
    write_recipe: Callable[..., Path],
    base_folder: Path,
    data_folder: Path,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    vocabulary = {"vocab_size": 416, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    FAMILIES[family](**vocabulary).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    recipe = write_recipe(lora_of(family), frozen_features=False)
    recipe.write_text(recipe.read_text().replace(str(base_folder), str(tmp_path / "base")))
    report = train_recipe(recipe, data=data_folder, out=tmp_path / "out")
    lines = [json.loads(line) for line in Path(report.log).read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    quarter = len(losses) // 4
    assert sum(losses[-quarter:]) < sum(losses[:quarter])
    exported = export_bundle(tmp_path / "out", tmp_path / "bundle", precision="fp32")
    assert exported.parity.passed


@pytest.mark.slow
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_recipe_lowers_the_loss_of_a_family_that_sees(
    family: str,
    write_recipe: Callable[..., Path],
    base_folder: Path,
    data_folder: Path,
    tmp_path: Path,
) -> None:
    base = write_vision_family(tmp_path / "base", family)
    one_turn = VISION_FAMILIES[family].template is None
    if one_turn:
        (base / "chat_template.jinja").write_text(ONE_TURN_TEMPLATE)
    recipe = write_recipe(lora_of(family), frozen_features=False)
    text = recipe.read_text().replace(str(base_folder), str(base))
    if one_turn:
        start, end = text.index("[data.conversations]"), text.index("[optimizer]")
        text = text[:start] + text[end:]
    recipe.write_text(text)
    report = train_recipe(recipe, data=data_folder, out=tmp_path / "out")
    lines = [json.loads(line) for line in Path(report.log).read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    quarter = len(losses) // 4
    assert sum(losses[-quarter:]) < sum(losses[:quarter])
    exported = export_bundle(tmp_path / "out", tmp_path / "bundle", precision="fp32")
    assert exported.parity.passed
    towers = {b.graph for b in exported.parity.boundaries if b.graph.endswith("_encoder")}
    tiny = tiny_family(family)
    assert tiny is not None
    assert towers == {"vision_encoder"} | ({"audio_encoder"} if tiny.hears else set())


def test_adapters_stand_in_the_language_model_alone() -> None:
    model = add_lora(make_llava(), LoraSection(rank=2, alpha=4, targets=("q_proj",), layers=(0, 2)))
    adapted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert adapted
    assert all("language_model.layers." in name for name in adapted)
    assert not any("layers.1." in name for name in adapted)


@pytest.mark.parametrize("make", [make_llava, make_qwen])
def test_both_kinds_are_opened_from_a_folder(
    make: type[PreTrainedModel], tmp_path: Path, base: BaseModel
) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    opened = load_base(tmp_path, torch.float32).model
    assert type(opened) is type(model)
    assert not opened.training


def test_a_head_beyond_the_model_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="layer 1 to 2"):
        check_layers(make_qwen(), [1, 3])


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model folder"):
        load_base(tmp_path, torch.float32)


def test_starting_from_parts_is_for_pebble_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="from_parts is for pebble"):
        load_base(tmp_path, torch.float32, untrained=True)
