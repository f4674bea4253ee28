"""Pictures of one turn, of which the next one is read while towers run, beside one by one.

    python benchmarks/overlap.py BUNDLE [--pictures 4] [--rounds 7] [--side 1600] [--threads 2]

The same photographs of text, as JPEG files, go in as one request and as requests of one picture
each; the two take turns, and nothing is kept. Timed is what comes before the gate. The last line is
one JSON object: medians and quartiles in milliseconds, and the ratio pair by pair, which is below 1
where the overlap helps.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from pathlib import Path

from edge_safe.evaluation.speed.requests import load_forgetful, media_request, refusing
from edge_safe.evaluation.speed.samples import Action, quartiles

PROMPT = "What do these signs say?"
LINES = 6
TOGETHER, ONE_BY_ONE, RATIO = "together_ms", "one_by_one_ms", "ratio"


def photograph(number: int, side: int) -> bytes:
    """A JPEG file, ``side`` pixels wide, of some lines of text."""
    from PIL import Image, ImageDraw, ImageFont

    height = side * 3 // 4
    picture = Image.new("RGB", (side, height), (196, 214 - number % 50, 226))
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(height // 20)
    for line in range(LINES):
        text = f"Pier {number + 1}, line {line + 1}: open from nine to five"
        pen.text((side // 20, height * (line + 1) // (LINES + 2)), text, (20, 20, 20), font)
    file = io.BytesIO()
    picture.save(file, "JPEG")
    return file.getvalue()


def main() -> None:
    """Times both."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--side", type=int, default=1600, help="width of a picture in pixels")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    model = refusing(load_forgetful(options.bundle, threads=options.threads))
    pictures = [photograph(number, options.side) for number in range(options.pictures)]
    ways: dict[str, list[Action]] = {
        TOGETHER: [media_request(model, TOGETHER, PROMPT, pictures)],
        ONE_BY_ONE: [media_request(model, ONE_BY_ONE, PROMPT, [one]) for one in pictures],
    }
    times: dict[str, list[float]] = {TOGETHER: [], ONE_BY_ONE: [], RATIO: []}
    for round_ in range(options.rounds + 1):
        names = list(ways)[:: 1 if round_ % 2 else -1]
        took = {name: sum(action()[name] for action in ways[name]) for name in names}
        # The first round opens graphs.
        if round_:
            for name, milliseconds in took.items():
                times[name].append(milliseconds)
            times[RATIO].append(took[TOGETHER] / took[ONE_BY_ONE])
    print(
        json.dumps(
            {
                "pictures": options.pictures,
                "side": options.side,
                "rounds": options.rounds,
                **{name: statistics.median(values) for name, values in times.items()},
                "spread": {name: quartiles(values) for name, values in times.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
