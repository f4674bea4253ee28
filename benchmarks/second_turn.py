"""The second turn of a conversation whose first one showed a picture.

    python benchmarks/second_turn.py BUNDLE [--runs 10] [--threads 2]

Nothing is kept between conversations, so every first turn encodes its picture. The two turns take
turns; both are timed to their first token. The last line is one JSON object: medians and quartiles
in milliseconds, the ratio pair by pair, and how often the picture's graphs ran in second turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from edge_safe.evaluation.speed.requests import allowing, load_forgetful
from edge_safe.evaluation.speed.sample_media import sign
from edge_safe.evaluation.speed.samples import quartiles
from edge_safe.runtime.bundle import ON_THE_HOST
from edge_safe.runtime.verdict import Decision

LANGUAGE = {"gate", "gate_late", "gate_prefill", "decoder", "decoder_prefill"}


def main() -> None:
    """Times both turns."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    model = allowing(load_forgetful(options.bundle, threads=options.threads))
    picture = sign()
    times: dict[str, list[float]] = {"first": [], "second": [], "ratio": []}
    encoded = 0
    for run in range(options.runs + 1):
        chat = model.chat()
        replies = [chat.send("What do you see in it?", images=[picture], max_tokens=16)]
        before = model.run_counts()
        replies.append(chat.send("And what could it be used for?", max_tokens=16))
        after = model.run_counts()
        encoded += sum(
            after[name] - before[name] for name in after if name not in {*LANGUAGE, *ON_THE_HOST}
        )
        if any(reply.verdict.decision is not Decision.ALLOW for reply in replies):
            raise SystemExit("a turn was not answered, so that there is nothing to time")
        if run:
            first, second = (reply.timing.first_token_ms or 0.0 for reply in replies)
            times["first"].append(first)
            times["second"].append(second)
            times["ratio"].append(second / first)
    print(
        json.dumps(
            {
                "runs": options.runs,
                **{name: statistics.median(values) for name, values in times.items()},
                "spread": {name: quartiles(values) for name, values in times.items()},
                "picture_encoded_again": encoded,
            }
        )
    )


if __name__ == "__main__":
    main()
