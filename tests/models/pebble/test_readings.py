"""Readings of training media: the ids that the whole model puts into its prompts."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from edge_safe.errors import DataError
from edge_safe.models.data import Example, user_turn
from edge_safe.models.media import Picture, Recording
from edge_safe.models.pebble.modeling_pebble import PebbleForConditionalGeneration
from edge_safe.models.pebble.processing_pebble import PebbleProcessor
from edge_safe.models.pebble.readings import Readings
from edge_safe.models.progress import silent
from edge_safe.rendering.pictures import render_request
from edge_safe.rendering.speech import installed_voices, speak

PICTURE = Picture("the shop is open", "sign", 3)


def test_a_picture_reads_as_the_model_reads_it(
    model: PebbleForConditionalGeneration, processor: PebbleProcessor, tmp_path: Path
) -> None:
    readings = Readings(model, processor, tmp_path)
    readings.compute([PICTURE, PICTURE], silent)
    drawn = render_request(PICTURE.text, PICTURE.style, PICTURE.seed).picture
    inputs = processor("hi", images=[drawn], detector=model.text_detector)
    with torch.no_grad():
        expected, _ = model.embed_text_lines(inputs["line_pixel_values"], inputs["line_widths"])
        embedding = model.get_input_embeddings()
        assert len(expected) > 0
        read = embedding(torch.tensor(readings(PICTURE)))
    assert len(list(tmp_path.glob("*.npz"))) == 1
    assert read.shape == expected.shape


def test_what_was_computed_is_not_computed_again(
    model: PebbleForConditionalGeneration, processor: PebbleProcessor, tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    for _ in range(2):
        Readings(model, processor, tmp_path).compute([PICTURE], lambda *a: told.append(a))
    assert told == [("readings", 1, 1)]


def test_a_sound_without_speech_and_a_picture_without_words_have_readings_too(
    model: PebbleForConditionalGeneration, processor: PebbleProcessor, tmp_path: Path
) -> None:
    readings = Readings(model, processor, tmp_path)
    media = [Picture("", "gradient", 0), Recording("", "tone", 2)]
    readings.compute(media, silent)
    assert all(isinstance(readings(medium), tuple) for medium in media)


@pytest.mark.skipif(not installed_voices("espeak-ng"), reason="espeak-ng is not installed")
def test_a_recording_reads_as_the_model_hears_it(
    model: PebbleForConditionalGeneration, processor: PebbleProcessor, tmp_path: Path
) -> None:
    recording = Recording("the shop is open", installed_voices("espeak-ng")[0], 0)
    readings = Readings(model, processor, tmp_path)
    readings.compute([recording], silent)
    data = processor.log_mel([speak(recording.text, recording.voice)])
    with torch.no_grad():
        heard = model.hear(data["input_features"], data["audio_lengths"])[0]
    assert len(heard) > 0
    assert list(readings(recording)) == heard


def test_a_decoder_trained_otherwise_does_not_read_what_another_heard(
    tiny_pebble: Path, processor: PebbleProcessor, tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    model = PebbleForConditionalGeneration.from_pretrained(tiny_pebble)
    media = [PICTURE, Recording("", "tone", 2)]
    Readings(model, processor, tmp_path).compute(media, silent)
    with torch.no_grad():
        model.audio_decoder.layers[0].encoder_attn.q_proj.weight += 0.1
    Readings(model, processor, tmp_path).compute(media, lambda *a: told.append(a))
    assert told == [("readings", 1, 1)]


def test_a_medium_that_was_not_read_is_an_error(
    model: PebbleForConditionalGeneration, processor: PebbleProcessor, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="was not read"):
        Readings(model, processor, tmp_path)(PICTURE)


def test_an_example_with_a_picture_that_the_processor_refuses_is_not_taken(
    model: PebbleForConditionalGeneration, tiny_pebble: Path, tmp_path: Path
) -> None:
    processor = PebbleProcessor.from_pretrained(tiny_pebble)
    settings = processor.settings
    processor.settings = msgspec.structs.replace(
        settings, text_lines=msgspec.structs.replace(settings.text_lines, most_lines=0)
    )
    readings = Readings(model, processor, tmp_path)
    wordless = Picture("", "gradient", 0)
    readings.compute([PICTURE, wordless], silent)
    written, plain = (Example("a", "signs", False, (user_turn("Hi", m),)) for m in (PICTURE, None))
    assert [readings.takes(example) for example in (written, plain)] == [False, True]
    with pytest.raises(DataError, match="does not take"):
        readings(PICTURE)
