"""Training data of the text projector: rendered lines, the recognizer's states, their word pieces.

The recognizer is any callable from pixel values to states, so that this module does not know which
graph it runs. Shards are written one by one and reused, so that a killed run goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge_safe.models.pebble.rendering import LINE_HEIGHT, random_style, render_line

Recognizer = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""(N, 3, 48, W) float32 in [-1, 1], channels in the recognizer's order -> (N, T, 120)."""

STRIDE = 8
"""Pixels of a line behind one of the recognizer's states."""

WIDEST = 1200
"""Pixels; wider lines are left out of training."""


@dataclass(frozen=True, slots=True)
class LineStates:
    """Many lines one after another.

    Attributes:
        states: float16 (sum of T, c) the recognizer's states of all lines.
        offsets: int64 (lines + 1,) where each line's states begin.
        pieces: int64 (sum of P,) word-piece ids of all lines.
        frames: int64 (sum of P,) the state, counted within its line, at which each piece ends.
        piece_offsets: int64 (lines + 1,).
    """

    states: NDArray[np.float16]
    offsets: NDArray[np.int64]
    pieces: NDArray[np.int64]
    frames: NDArray[np.int64]
    piece_offsets: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of lines."""
        return len(self.offsets) - 1

    def line(self, i: int) -> tuple[NDArray[np.float16], NDArray[np.int64], NDArray[np.int64]]:
        """States (T, c), word pieces (P,) and frames (P,) of one line."""
        steps = slice(self.offsets[i], self.offsets[i + 1])
        pieces = slice(self.piece_offsets[i], self.piece_offsets[i + 1])
        return self.states[steps], self.pieces[pieces], self.frames[pieces]


def joined(parts: Sequence[LineStates]) -> LineStates:
    """Puts several sets of lines into one."""

    def offsets(name: str) -> NDArray[np.int64]:
        lengths = [np.diff(getattr(part, name)) for part in parts]
        return np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)

    return LineStates(
        np.concatenate([part.states for part in parts]),
        offsets("offsets"),
        np.concatenate([part.pieces for part in parts]),
        np.concatenate([part.frames for part in parts]),
        offsets("piece_offsets"),
    )


def cut_into_lines(texts: Iterable[str], rng: np.random.Generator) -> Iterator[str]:
    """Cuts texts into lines of 1 to 9 words of printable ASCII, now and then in capitals."""
    for text in texts:
        words = re.sub(r"[^\x20-\x7e]+", " ", text).split()
        start = 0
        while start < len(words):
            count = int(rng.integers(1, 10))
            line = " ".join(words[start : start + count])[:64].strip()
            start += count
            if line:
                yield line.upper() if rng.random() < 0.08 else line


def piece_frames(
    tokenizer: Tokenizer, line: str, ends: NDArray[np.float32], steps: int
) -> tuple[list[int], list[int]]:
    """Word pieces of a line, read as the continuation of a sentence, and the states they end at.

    Two pieces never share a state: the later one moves on. Returns empty lists where they do not
    fit into the line's states.
    """
    encoding = tokenizer.encode(" " + line, add_special_tokens=False)
    frames: list[int] = []
    for _, end in encoding.offsets:
        frame = int(ends[max(0, end - 2)] / STRIDE)
        frames.append(max(min(frame, steps - 1), frames[-1] + 1 if frames else 0))
    if frames and frames[-1] >= steps:
        return [], []
    return encoding.ids, frames


def pixel_values(pixels: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Stacks RGB lines into (N, 3, 48, W) BGR in [-1, 1], padded with 0 on the right."""
    width = max(p.shape[1] for p in pixels)
    width = (width + STRIDE - 1) // STRIDE * STRIDE
    batch = np.zeros((len(pixels), 3, LINE_HEIGHT, width), np.float32)
    for row, image in zip(batch, pixels, strict=True):
        scaled = image[:, :, ::-1].astype(np.float32) / 255.0
        row[:, :, : image.shape[1]] = ((scaled - 0.5) / 0.5).transpose(2, 0, 1)
    return batch


def render_states(
    lines: list[str],
    fonts: list[Path],
    tokenizer: Tokenizer,
    recognizer: Recognizer,
    rng: np.random.Generator,
    batch_size: int = 8,
) -> LineStates:
    """Renders lines in random styles and runs the recognizer over them, widest last."""
    drawn = [(line, render_line(line, random_style(rng, fonts), rng)) for line in lines]
    drawn = [(line, r) for line, r in drawn if r.pixels.shape[1] <= WIDEST]
    drawn.sort(key=lambda item: item[1].pixels.shape[1])
    states: list[NDArray[np.float16]] = []
    pieces: list[list[int]] = []
    frames: list[list[int]] = []
    for start in range(0, len(drawn), batch_size):
        batch = drawn[start : start + batch_size]
        output = recognizer(pixel_values([r.pixels for _, r in batch]))
        for (line, rendered), row in zip(batch, output, strict=True):
            steps = min(len(row), -(-rendered.pixels.shape[1] // STRIDE))
            ids, ends = piece_frames(tokenizer, line, rendered.ends, steps)
            if ids:
                states.append(row[:steps].astype(np.float16))
                pieces.append(ids)
                frames.append(ends)
    return LineStates(
        np.concatenate(states),
        np.cumsum([0, *map(len, states)], dtype=np.int64),
        np.concatenate([np.asarray(p, np.int64) for p in pieces]),
        np.concatenate([np.asarray(f, np.int64) for f in frames]),
        np.cumsum([0, *map(len, pieces)], dtype=np.int64),
    )


def cached_shards(
    folder: Path,
    lines: list[str],
    fonts: list[Path],
    tokenizer: Tokenizer,
    recognizer: Recognizer,
    seed: int,
    lines_per_shard: int = 1024,
) -> Iterator[LineStates]:
    """Yields the states of all lines shard by shard, rendering only what the folder lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(
        json.dumps([lines, [font.name for font in fonts], seed]).encode()
    ).hexdigest()[:16]
    for number, start in enumerate(range(0, len(lines), lines_per_shard)):
        path = folder / f"lines-{key}-{number:04d}.npz"
        if path.exists():
            with np.load(path) as stored:
                yield LineStates(**{name: stored[name] for name in LineStates.__slots__})
            continue
        shard = render_states(
            lines[start : start + lines_per_shard],
            fonts,
            tokenizer,
            recognizer,
            np.random.default_rng([seed, number]),
        )
        temporary = path.with_suffix(".partial.npz")
        np.savez(temporary, **{name: getattr(shard, name) for name in LineStates.__slots__})
        temporary.replace(path)
        yield shard
