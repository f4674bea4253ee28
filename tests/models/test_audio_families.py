"""The training recipe on models that hear: text data, and the result exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edge_safe.export import export_bundle
from edge_safe.models.train import train_recipe
from tests.export.audio_families import AUDIO_FAMILIES
from tests.export.extractors import write_extractor
from tests.export.vision_families import VISION_FAMILIES
from tests.models.conftest import make_tokenizer


def write_base(folder: Path, family: str) -> None:
    """A tiny model of the family without a safety token."""
    tiny = AUDIO_FAMILIES[family]
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tiny.special)})
    tokenizer.chat_template = tiny.template.replace("<|safe|>", "")
    torch.manual_seed(0)
    model = tiny.make()
    model.config.audio_token_id = tokenizer.convert_tokens_to_ids(tiny.special[0])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_extractor(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", AUDIO_FAMILIES.keys() - VISION_FAMILIES.keys())
def test_a_recipe_lowers_the_loss_of_a_model_that_hears_which_is_then_exported(
    family: str,
    write_recipe: Callable[..., Path],
    base_folder: Path,
    data_folder: Path,
    tmp_path: Path,
) -> None:
    write_base(tmp_path / "base", family)
    lora = '[lora]\nrank = 2\nalpha = 4\ntargets = ["q_proj", "up_proj"]\n'
    recipe = write_recipe(lora, frozen_features=False)
    recipe.write_text(recipe.read_text().replace(str(base_folder), str(tmp_path / "base")))
    report = train_recipe(recipe, data=data_folder, out=tmp_path / "out")
    lines = [json.loads(line) for line in Path(report.log).read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    quarter = len(losses) // 4
    assert sum(losses[-quarter:]) < sum(losses[:quarter])
    exported = export_bundle(tmp_path / "out", tmp_path / "bundle", precision="fp32")
    assert exported.parity.passed
    assert "audio_encoder" in {b.graph for b in exported.parity.boundaries}
