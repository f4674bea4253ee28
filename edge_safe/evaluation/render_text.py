"""Prompts as pictures of their text: what a gate is measured on when harm comes as an image.

Fonts, sizes, wrapping and colours vary from row to row, and depend on nothing but the seed and
the fonts of the machine: Pillow's own, and whatever DejaVu or Liberation fonts it finds.
"""

from __future__ import annotations

import textwrap
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

FONT_FOLDERS = (Path("/usr/share/fonts"), Path("/usr/local/share/fonts"))
FONT_FAMILIES = ("DejaVuSans", "DejaVuSerif", "Liberation")
MAX_LINES = 28
SMALLEST, LARGEST = 14, 34


def render_text(text: str, seed: int) -> Image.Image:
    """Draws a text on a plain background.

    Args:
        text: What to draw; line breaks are kept.
        seed: Chooses font, size, width and colours. Equal seeds give equal pictures on one
            machine.

    Returns:
        An RGB picture, 320 to 960 pixels wide. Long texts get the smallest font, and the picture
        grows downwards.
    """
    generator = np.random.default_rng(seed)
    names = find_fonts()
    name = names[int(generator.integers(len(names)))]
    width = int(generator.integers(480, 961))
    size = int(generator.integers(18, LARGEST + 1))
    lines = _wrap(text, name, size, width)
    while len(lines) > MAX_LINES and (size > SMALLEST or width < 960):
        size, width = max(SMALLEST, size - 2), min(960, width + 120)
        lines = _wrap(text, name, size, width)
    dark = tuple(int(v) for v in generator.integers(0, 90, size=3))
    light = tuple(int(v) for v in generator.integers(200, 256, size=3))
    ink, paper = (dark, light) if generator.random() < 0.8 else (light, dark)
    font = _font(name, size)
    pitch = round(size * 1.35)
    margin = size
    picture = Image.new("RGB", (width, pitch * len(lines) + 2 * margin), paper)
    draw = ImageDraw.Draw(picture)
    for index, line in enumerate(lines):
        draw.text((margin, margin + index * pitch), line, fill=ink, font=font)
    return picture


@cache
def find_fonts() -> tuple[str, ...]:
    """Paths of usable upright fonts; the empty name stands for Pillow's own font."""
    found = [
        str(path)
        for folder in FONT_FOLDERS
        if folder.is_dir()
        for path in folder.rglob("*.ttf")
        if path.name.startswith(FONT_FAMILIES) and "ExtraLight" not in path.name
    ]
    return ("", *sorted(found))


def _font(name: str, size: int) -> Font:
    return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)


def _wrap(text: str, name: str, size: int, width: int) -> list[str]:
    sample = "the quick brown fox jumps over a lazy dog"
    per_character = _font(name, size).getlength(sample) / len(sample)
    columns = max(8, int((width - 2 * size) / per_character * 0.94))
    lines = [
        line
        for paragraph in text.splitlines()
        for line in textwrap.wrap(paragraph, columns, break_long_words=True)
    ]
    return lines or [""]
