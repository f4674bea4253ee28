"""Tiny pebbles and pictures of text."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

from edge_safe.models.pebble import PebbleForConditionalGeneration, PebbleProcessor
from tests.models.pebble.tiny import build_tiny_pebble


@pytest.fixture(scope="session")
def tiny_pebble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_pebble(tmp_path_factory.mktemp("pebble") / "tiny")


@pytest.fixture(scope="session")
def model(tiny_pebble: Path) -> PebbleForConditionalGeneration:
    opened = PebbleForConditionalGeneration.from_pretrained(tiny_pebble)
    opened.train(False)
    return opened


@pytest.fixture(scope="session")
def processor(tiny_pebble: Path) -> PebbleProcessor:
    return PebbleProcessor.from_pretrained(tiny_pebble)


@pytest.fixture
def sign() -> Image.Image:
    return draw("What does\nthe sign say?")


def draw(text: str, size: int = 28, turn: float = 0.0) -> Image.Image:
    """Black text on white."""
    font = ImageFont.load_default(size)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    box = measure.multiline_textbbox((0, 0), text, font, spacing=20)
    image = Image.new("RGB", (int(box[2]) + 40, int(box[3]) + 40), "white")
    ImageDraw.Draw(image).multiline_text((20, 20), text, "black", font, spacing=20)
    return image.rotate(turn, Image.Resampling.BICUBIC, expand=True, fillcolor="white")
