"""How many words pebble's text projector reads right, beside the recognizer's own decoder.

    python benchmarks/reading.py models/pebble --data train_safe_noncommercial.jsonl --lines 600

Cuts the prompts into lines, draws each in a font that training never saw, and lets both read the
same states: the projector, whose word pieces go into prompts, and the character decoder that the
recognizer was published with, which pebble leaves out. Needs the export extra. A word is right
where it stands in the longest common sequence of words. The last line is one JSON object:

- words, lines: how much was drawn
- right, right_decoder: share of the words that each reads right
- relative: their ratio, and interval: its 95 % bootstrap interval over lines
- exact, exact_decoder: share of the lines without any mistake
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edge_safe.evaluation.rows import read_rows
from edge_safe.models.pebble import parts
from edge_safe.models.pebble.character_decoder import CharacterDecoder
from edge_safe.models.pebble.line_states import cut_into_lines, pixel_values
from edge_safe.models.pebble.modeling_pebble import PebbleForConditionalGeneration
from edge_safe.models.pebble.rendering import random_style, render_line
from edge_safe.models.pebble.tokenization_pebble import PebbleTokenizer
from edge_safe.rendering.fonts import find_fonts

HELD_FONTS = ("ComicNeue", "Caladea", "LiberationSerif", "Hack")


@dataclass(frozen=True, slots=True)
class Score:
    """One line read by one reader."""

    words: int
    right: int
    exact: bool


def score(wanted: str, read: str) -> Score:
    """Compares two lines word by word."""
    reference, words = wanted.split(), read.split()
    previous = [0] * (len(words) + 1)
    for word in reference:
        current = [0]
        for j, other in enumerate(words):
            same = previous[j] + 1 if word == other else 0
            current.append(max(previous[j + 1], current[j], same))
        previous = current
    return Score(len(reference), previous[-1], reference == words)


def interval(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of two sums over lines."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(ours), size=(1000, len(ours)))
    low, high = np.quantile(ours[drawn].sum(1) / theirs[drawn].sum(1), (0.025, 0.975))
    return float(low), float(high)


def main(argv: list[str] | None = None) -> int:
    """Reads, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="rows with prompts, as for eval")
    parser.add_argument("--lines", type=int, default=600)
    parser.add_argument("--held-fonts", nargs="+", default=HELD_FONTS)
    parser.add_argument("--show", type=int, default=0, help="mistakes to print")
    options = parser.parse_args(argv)

    model = PebbleForConditionalGeneration.from_pretrained(options.checkpoint)
    tokenizer = PebbleTokenizer.from_pretrained(options.checkpoint)
    named = parts.read_parts(model.config.parts)["text_recognizer"]
    decoder = CharacterDecoder.read(parts.fetch({"recognizer": named})["recognizer"])
    fonts = [f for f in find_fonts() if f.name.startswith(tuple(options.held_fonts))]
    rng = np.random.default_rng(0)
    lines = list(
        cut_into_lines((row.prompt for row in read_rows(options.data, labelled=False)), rng)
    )
    chosen = [lines[int(i)] for i in rng.choice(len(lines), options.lines, replace=False)]
    ours: list[Score] = []
    theirs: list[Score] = []
    for line in chosen:
        drawn = render_line(line, random_style(rng, fonts), rng)
        pixels = torch.from_numpy(pixel_values([drawn.pixels]))
        width = torch.tensor([pixels.shape[3]])
        with torch.no_grad():
            states, lengths = model.read_lines(pixels, width)
            pieces = model.read_states(states, lengths)[0]
        read = str(tokenizer.decode(pieces))
        ours.append(score(line, read))
        theirs.append(score(line, decoder.spikes(states[0].numpy())[0]))
        if ours[-1].right < ours[-1].words and options.show > 0:
            options.show -= 1
            print(f"{line!r} read as {read!r}")
    right = np.array([s.right for s in ours])
    right_decoder = np.array([s.right for s in theirs])
    words = sum(s.words for s in ours)
    report = {
        "lines": len(chosen),
        "words": words,
        "right": right.sum() / words,
        "right_decoder": right_decoder.sum() / words,
        "relative": right.sum() / right_decoder.sum(),
        "interval": interval(right, right_decoder),
        "exact": sum(s.exact for s in ours) / len(ours),
        "exact_decoder": sum(s.exact for s in theirs) / len(theirs),
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
