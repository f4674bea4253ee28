"""Line finding against the torch side's own version, which stands on scipy.ndimage."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from PIL import Image, ImageDraw

from edge_safe.errors import MediaError
from edge_safe.runtime import text_lines

reference = pytest.importorskip("edge_safe.models.pebble.text_lines", reason="needs scipy")

CONFIG = msgspec.convert(msgspec.structs.asdict(reference.TextLineConfig()), text_lines.TextLines)


def blobs(seed: int) -> np.ndarray:
    """A probability map with rotated bars, specks and touching corners."""
    rng = np.random.default_rng(seed)
    canvas = Image.new("L", (320, 256), 0)
    for _ in range(8):
        bar = Image.new("L", (int(rng.integers(20, 120)), int(rng.integers(3, 22))), 255)
        turned = bar.rotate(float(rng.uniform(-40, 40)), expand=True)
        place = (int(rng.integers(0, 260)), int(rng.integers(0, 220)))
        canvas.paste(Image.new("L", turned.size, 255), place, turned)
    probability = np.asarray(canvas, np.float32) / 255 * 0.9
    noise = (rng.random(probability.shape) > 0.998) * 0.4
    return np.maximum(probability, noise).astype(np.float32)


@pytest.mark.parametrize("seed", range(20))
def test_boxes_agree_with_the_torch_side(seed: int) -> None:
    probability = blobs(seed)
    ours = text_lines.find_boxes(probability, (640, 500), CONFIG)
    theirs = reference.find_boxes(probability, (640, 500), reference.TextLineConfig())
    expected = [np.array([box.center, box.along, box.down]) for box in theirs]
    assert len(ours) == len(expected)
    np.testing.assert_allclose(np.array(ours), np.array(expected), atol=1e-4)


def test_cut_lines_are_the_same_pixels() -> None:
    rng = np.random.default_rng(3)
    picture = Image.fromarray(rng.integers(0, 255, (300, 400, 3)).astype(np.uint8)).resize(
        (640, 500)
    )
    probability = blobs(3)
    ours = text_lines.find_boxes(probability, picture.size, CONFIG)
    theirs = reference.find_boxes(probability, picture.size, reference.TextLineConfig())
    for mine, other in zip(ours, theirs, strict=True):
        cut = text_lines.cut_line(picture, mine, CONFIG)
        expected = reference.cut_line(picture, other, reference.TextLineConfig())
        assert cut.size == expected.size
        difference = np.abs(np.asarray(cut, int) - np.asarray(expected, int))
        assert difference.max() <= 1
        pixels, widths = reference.line_pixels([expected], reference.TextLineConfig())
        assert text_lines.line_pixels(cut, CONFIG).shape == pixels[..., : widths[0]].shape


def test_the_detector_sees_the_same_pixels() -> None:
    picture = Image.new("RGB", (1500, 70), (250, 240, 10))
    ImageDraw.Draw(picture).text((30, 20), "the shop opens at nine", fill=(10, 20, 30))
    ours = text_lines.detector_input(picture, CONFIG)
    np.testing.assert_array_equal(
        ours, reference.detector_input(picture, reference.TextLineConfig())
    )


def test_a_map_without_text_has_no_boxes() -> None:
    assert text_lines.find_boxes(np.zeros((64, 64), np.float32), (64, 64), CONFIG) == []


def test_a_map_full_of_text_is_one_box() -> None:
    boxes = text_lines.find_boxes(np.ones((64, 96), np.float32), (96, 64), CONFIG)
    assert len(boxes) == 1


def test_rows_are_read_from_left_to_right() -> None:
    probability = np.zeros((96, 256), np.float32)
    for top, left in ((60, 140), (60, 10), (10, 130), (12, 10)):
        probability[top : top + 14, left : left + 90] = 1.0
    boxes = text_lines.find_boxes(probability, (256, 96), CONFIG)
    assert [(round(box[0, 1] / 10), round(box[0, 0] / 10)) for box in boxes] == [
        (2, 6),
        (2, 18),
        (7, 6),
        (7, 18),
    ]


def test_more_lines_than_are_read_is_an_error() -> None:
    probability = np.zeros((1600, 64), np.float32)
    for top in range(4, 1400, 20):
        probability[top : top + 8, 8:56] = 0.9
    with pytest.raises(MediaError, match="lines of text, more than"):
        text_lines.find_boxes(probability, (64, 1600), CONFIG)
