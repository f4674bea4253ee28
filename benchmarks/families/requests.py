"""What every family is asked: words, one picture, two pictures of different sizes, a sound."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from edge_safe.export.acceptance_rows import acceptance_rows
from tests.export.audio_families import RATE
from tests.export.every_family import Turn

TEXT, IMAGE, IMAGES, AUDIO = WAYS = ("text", "one image", "two images", "audio")
# Requests with media for each way in. Text takes the package's own mild rows.
WITH_MEDIA = 12
# Of each way in so many are answered too; the others are judged alone.
ANSWERED = 4
# Tokens of an answer.
TOKENS = 16
# Width and height; none so long that a family refuses it. Every other one is a square, so that two
# of them fit the tiny context of a family that cuts long pictures into many crops.
SIZES = (
    (96, 96), (120, 60), (28, 28), (50, 110), (75, 75), (90, 40),
    (64, 64), (64, 100), (84, 84), (130, 70), (110, 110), (40, 80),
)  # fmt: skip


def requests(way: str) -> list[Turn]:
    """The turns of one way in; half of their words are mild stand-ins for harmful ones."""
    texts = [row.prompt for row in acceptance_rows(None).rows]
    if way == TEXT:
        return [Turn(text) for text in texts]
    spread = texts[:: len(texts) // WITH_MEDIA][:WITH_MEDIA]
    if way == AUDIO:
        return [Turn(text, sound=_sound(number)) for number, text in enumerate(spread)]
    return [
        Turn(text, [_picture(number + beside) for beside in range(1 if way == IMAGE else 2)])
        for number, text in enumerate(spread)
    ]


def _picture(number: int) -> Image.Image:
    """Coloured patches with a written word on them."""
    width, height = SIZES[number % len(SIZES)]
    random = np.random.default_rng(number)
    coarse = random.integers(0, 256, (height // 7 + 1, width // 7 + 1, 3), np.uint8)
    image = Image.fromarray(np.repeat(np.repeat(coarse, 7, 0), 7, 1)[:height, :width])
    draw = ImageDraw.Draw(image)
    draw.rectangle((2, 2, width - 3, min(22, height - 3)), fill="white")
    draw.text((5, 5), f"Shop {number}", fill="black", font_size=13)
    return image


def _sound(number: int) -> np.ndarray:
    """A gliding tone with noise, between 0.3 and 1.9 s."""
    random = np.random.default_rng(number)
    time = np.arange(int((0.3 + 1.6 * number / WITH_MEDIA) * RATE)) / RATE
    tone = 0.4 * np.sin(2 * np.pi * (180 + 20 * number + 150 * np.sin(3 * time)) * time)
    samples: np.ndarray = (tone + random.normal(0, 0.02, len(time))).astype(np.float32)
    return samples
