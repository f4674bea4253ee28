"""The model: merging media, decoding, both forms on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
)

from edge_safe.errors import CheckpointError
from edge_safe.models.onnx_graph import OnnxGraph
from edge_safe.models.pebble import PebbleForConditionalGeneration, PebbleProcessor
from edge_safe.models.safety_model import SafetyTokenModel
from tests.models.pebble.conftest import draw
from tests.models.pebble.tiny import STATES, write_recognizer

SOUND = (np.sin(np.arange(16000 * 2) / 9).astype(np.float32) * 0.3, 16000)


@pytest.fixture
def media(
    processor: PebbleProcessor, model: PebbleForConditionalGeneration, sign: Image.Image
) -> BatchFeature:
    return processor(
        "Answer.",
        images=[sign],
        audio=SOUND,
        detector=model.text_detector,
        untrained_towers=True,
    )


def test_merging_puts_lines_then_objects_then_sound_then_a_line_break(
    model: PebbleForConditionalGeneration, media: BatchFeature
) -> None:
    merged = model.merge(**media)
    ids = media["input_ids"][0]
    at = ids.tolist().index(model.config.image_token_id)
    embed = model.get_input_embeddings()
    lines, _ = model.embed_text_lines(media["line_pixel_values"], media["line_widths"])
    objects, _ = model.embed_objects(media["object_pixel_values"])
    speech, _ = model.embed_speech(media["input_features"], media["audio_lengths"])
    newline = torch.tensor([model.config.newline_token_id])
    expected = torch.cat(
        [embed(ids[:at]), lines, objects, speech, embed(newline), embed(ids[at + 3 :])]
    )
    torch.testing.assert_close(merged.inputs_embeds[0], expected, rtol=0, atol=1e-6)
    assert merged.image_tokens == [len(lines) + len(objects)]
    assert merged.audio_tokens == [len(speech)]
    assert len(lines) > 0
    assert len(objects) > 0
    assert len(speech) > 0


def test_media_without_any_embedding_leave_the_prompt_as_text_alone(
    model: PebbleForConditionalGeneration, processor: PebbleProcessor
) -> None:
    blank = Image.new("RGB", (200, 100), "white")
    seen = processor("Answer.", images=[blank], detector=model.text_detector)
    plain = processor("Answer.")
    merged = model.merge(**seen)
    expected = model.get_input_embeddings()(plain["input_ids"])
    torch.testing.assert_close(merged.inputs_embeds, expected, rtol=0, atol=0)


def test_a_batch_of_prompts_is_padded_on_the_right_and_gives_the_same_logits(
    model: PebbleForConditionalGeneration, processor: PebbleProcessor, sign: Image.Image
) -> None:
    long = processor("Answer.", images=[sign], detector=model.text_detector)
    short = processor("Hello")["input_ids"]
    width = long["input_ids"].shape[1]
    ids = torch.full((2, width), 2)
    mask = torch.zeros(2, width, dtype=torch.long)
    ids[0], mask[0] = long["input_ids"], 1
    ids[1, : short.shape[1]], mask[1, : short.shape[1]] = short, 1
    both = {**long, "input_ids": ids, "attention_mask": mask}
    together = model(**both).logits
    alone = model(**long).logits[0]
    torch.testing.assert_close(together[0, : len(alone)], alone, rtol=0, atol=1e-4)
    text = model(input_ids=short).logits[0]
    torch.testing.assert_close(together[1, : len(text)], text, rtol=0, atol=1e-4)


def test_labels_are_ignored_at_media(
    model: PebbleForConditionalGeneration, media: BatchFeature
) -> None:
    merged = model.merge(**media, labels=media["input_ids"])
    assert merged.labels is not None
    assert merged.labels.shape == merged.attention_mask.shape
    count = int((merged.labels[0] == -100).sum())
    assert count == merged.image_tokens[0] + merged.audio_tokens[0] + 1
    assert torch.isfinite(model(**media, labels=media["input_ids"]).loss)


def test_every_picture_keeps_its_own_lines(
    model: PebbleForConditionalGeneration, processor: PebbleProcessor
) -> None:
    first, second = draw("No smoking"), draw("To London\nplatform 3")
    detector = model.text_detector
    both = model.merge(**processor("x", images=[first, second], detector=detector))
    apart = [model.merge(**processor("x", images=[i], detector=detector)) for i in (first, second)]
    assert both.image_tokens[0] == sum(prompt.image_tokens[0] for prompt in apart)


def test_generate_decodes_with_a_picture_and_with_sound(
    model: PebbleForConditionalGeneration, media: BatchFeature
) -> None:
    prompt = media["input_ids"].shape[1]
    answer = model.generate(**media, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert answer.shape == (1, prompt + 5)
    merged = model.merge(**media)
    expected = []
    embeds = merged.inputs_embeds
    for _ in range(5):
        logits = model(inputs_embeds=embeds).logits[0, -1]
        logits[2] = -torch.inf
        expected.append(int(logits.argmax()))
        token = torch.tensor([[expected[-1]]])
        embeds = torch.cat([embeds, model.get_input_embeddings()(token)], 1)
    assert answer[0, prompt:].tolist() == expected


def test_generate_from_text_alone(
    model: PebbleForConditionalGeneration, processor: PebbleProcessor
) -> None:
    inputs = processor("Hello world")
    answer = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 3


def test_a_placeholder_that_was_decoded_is_a_token_like_any_other(
    model: PebbleForConditionalGeneration, processor: PebbleProcessor
) -> None:
    ids = processor("Hello world")["input_ids"]
    placeholder = torch.tensor([[model.config.image_token_id]])
    past = model(input_ids=ids, use_cache=True).past_key_values
    found = model(input_ids=placeholder, past_key_values=past).logits[0, -1]
    embeds = model.get_input_embeddings()(torch.cat([ids, placeholder], 1))
    torch.testing.assert_close(found, model(inputs_embeds=embeds).logits[0, -1])


def test_the_number_of_placeholders_must_fit(
    model: PebbleForConditionalGeneration, media: BatchFeature
) -> None:
    inputs = {**media, "input_ids": torch.tensor([[1, 5, 6]])}
    inputs.pop("attention_mask")
    with pytest.raises(CheckpointError, match="placeholders"):
        model.merge(**inputs)


def test_a_saved_model_opens_the_same_through_every_auto_class(
    model: PebbleForConditionalGeneration,
    processor: PebbleProcessor,
    media: BatchFeature,
    tmp_path: Path,
) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {
        "_name_or_path": ""
    }
    expected = model(**media).logits
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        opened = kind.from_pretrained(tmp_path)
        torch.testing.assert_close(opened(**media).logits, expected, rtol=0, atol=0)
        assert opened.get_output_embeddings().weight is opened.get_input_embeddings().weight
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.settings == processor.settings
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_ids_to_tokens([12, 13, 14, 15, 16]) == [
        "<|image|>",
        "<|audio|>",
        "<|media_end|>",
        "<|safe|>",
        "<|unsafe|>",
    ]


def test_the_safety_model_reads_merged_prompts(
    tiny_pebble: Path, media: BatchFeature, model: PebbleForConditionalGeneration
) -> None:
    gate = SafetyTokenModel.from_pretrained(tiny_pebble)
    merged = model.merge(**media)
    verdict = gate.assess(inputs_embeds=merged.inputs_embeds, attention_mask=merged.attention_mask)
    assert verdict.stage == "gate.2"
    assert 0 < float(verdict.p_unsafe) < 1


def test_the_character_decoder_plays_no_part(
    model: PebbleForConditionalGeneration, media: BatchFeature, tmp_path: Path
) -> None:
    whole, headless = tmp_path / "whole.onnx", tmp_path / "headless.onnx"
    write_recognizer(whole)
    write_recognizer(headless, with_head=False)
    zeroed = OnnxGraph.from_file(whole)
    with torch.no_grad():
        head = zeroed.spec.nodes[-2].inputs[1]
        zeroed.get_buffer(head).zero_()
    assert zeroed.get_buffer(head).shape == (12, 20)
    cut = OnnxGraph.from_file(whole, STATES)
    assert not any(buffer.shape == (12, 20) for buffer in cut.buffers())
    pixels = media["line_pixel_values"]
    states = OnnxGraph.from_file(headless)(pixels)
    assert torch.equal(cut(pixels), states)
    assert torch.equal(model.text_recognizer(pixels), states)

    before = model.merge(**media).inputs_embeds
    original = model.text_recognizer
    try:
        model.text_recognizer = OnnxGraph.from_file(headless)
        assert torch.equal(model.merge(**media).inputs_embeds, before)
    finally:
        model.text_recognizer = original


def test_a_line_is_read_the_same_beside_wider_ones(
    model: PebbleForConditionalGeneration, media: BatchFeature
) -> None:
    pixels, widths = media["line_pixel_values"], media["line_widths"]
    states, lengths = model.read_lines(pixels, widths)
    assert len(widths) == 2
    assert lengths.tolist() == (widths // 8).tolist()
    for i, width in enumerate(widths.tolist()):
        alone, _ = model.read_lines(pixels[i : i + 1, :, :, :width], widths[i : i + 1])
        torch.testing.assert_close(states[i, : lengths[i]], alone[0], rtol=0, atol=1e-6)


def test_the_harm_in_a_picture_reaches_the_gate_through_gradients(
    model: PebbleForConditionalGeneration, media: BatchFeature
) -> None:
    pixels = media["line_pixel_values"].clone().requires_grad_()
    features, _ = model.embed_text_lines(pixels, media["line_widths"])
    features.sum().backward()
    assert pixels.grad is not None
    assert float(pixels.grad.abs().sum()) > 0


def test_what_is_heard_gets_the_pieces_of_typed_words(
    model: PebbleForConditionalGeneration, media: BatchFeature, processor: PebbleProcessor
) -> None:
    ids = model.hear(media["input_features"], media["audio_lengths"])[0]
    text = processor.decode(ids)
    assert len(text) > 3
    assert text == text.strip()
    assert ids == processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    features, _ = model.embed_speech(media["input_features"], media["audio_lengths"])
    torch.testing.assert_close(features, model.get_input_embeddings()(torch.tensor(ids)))
