"""pebble assembled from the real parts, which have to be in the cache or a folder of wheels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoTokenizer

from edge_safe.models.pebble import PebbleForConditionalGeneration, PebbleProcessor
from tests.models.pebble.conftest import draw
from tests.models.pebble.tiny import REPOSITORY

pytestmark = [pytest.mark.parts, pytest.mark.slow]
PEBBLE = REPOSITORY / "models" / "pebble"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pebble")
    for name in ("config.json", "chat_template.jinja", "preprocessor_config.json"):
        shutil.copy(PEBBLE / name, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["modalities"] = {name: {"trained": False} for name in config["modalities"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def real(untrained: Path) -> PebbleForConditionalGeneration:
    return PebbleForConditionalGeneration.from_pretrained(untrained)


def test_the_language_model_answers(real: PebbleForConditionalGeneration, untrained: Path) -> None:
    processor = PebbleProcessor.from_pretrained(untrained)
    inputs = processor("What is the capital of France?")
    answer = real.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in processor.decode(answer[0, inputs["input_ids"].shape[1] :])


def test_the_lines_of_a_picture_are_found(
    real: PebbleForConditionalGeneration, untrained: Path
) -> None:
    processor = PebbleProcessor.from_pretrained(untrained)
    picture = draw("What does the sign say?\nNo smoking", turn=5)
    inputs = processor.text_lines([picture], real.text_detector)
    assert inputs["line_images"].tolist() == [0, 0]
    assert int(inputs["line_widths"][0]) > int(inputs["line_widths"][1])


def test_the_small_form_brings_back_what_was_trained(
    real: PebbleForConditionalGeneration, tmp_path: Path
) -> None:
    changed = PebbleForConditionalGeneration(real.config)
    changed.load_state_dict(real.state_dict())
    changed.name_or_path = real.name_or_path
    changed.config.modalities = real.config.modalities | {"text_lines": {"trained": True}}
    model = changed.language_model.model
    with torch.no_grad():
        model.embed_tokens.weight[15] += 1.0
        query = model.layers[3].self_attn.q_proj.weight
        query += 0.01 * torch.randn(len(query), 8) @ torch.randn(8, query.shape[1])
        changed.text_projector.emission.bias += 0.5
    changed.save_trained(tmp_path)
    with safe_open(tmp_path / "pebble.safetensors", "pt") as file:
        stored = set(file.keys())
    assert {key for key in stored if key.startswith("language_model.")} == {
        "language_model.model.embed_tokens.weight.rows",
        "language_model.model.embed_tokens.weight.values",
        "language_model.model.layers.3.self_attn.q_proj.weight.up",
        "language_model.model.layers.3.self_attn.q_proj.weight.down",
    }
    assert not any(key.startswith("audio_decoder.") for key in stored)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.config.trained("text_lines")
    expected = changed.state_dict()
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids("<|safe|>") == 15
