"""The picture and the sound that are encoded where nobody gave others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SOUND_RATE = 16000


def sign() -> NDArray[np.uint8]:
    """A picture (480, 640, 3) of a sign with three lines of text."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (640, 480), (196, 214, 226))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((60, 80, 580, 400), fill=(252, 250, 240), outline=(60, 60, 60), width=6)
    font = ImageFont.load_default(44)
    for line, text in enumerate(("THE OLD HARBOUR", "open from nine to five", "closed on Mondays")):
        pen.text((90, 120 + 90 * line), text, fill=(20, 20, 20), font=font)
    return np.asarray(picture, np.uint8)


def hum() -> tuple[NDArray[np.float32], int]:
    """Three seconds of a low hum, and its rate in Hz."""
    seconds = np.arange(3 * _SOUND_RATE, dtype=np.float32) / _SOUND_RATE
    tone = sum(np.sin(2 * np.pi * 110 * k * seconds) / k for k in range(1, 9))
    return (0.1 * np.asarray(tone)).astype(np.float32), _SOUND_RATE
