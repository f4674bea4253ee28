"""Worker: a bundle, and the guard pipelines that its gate stands in for.

All of them run on this project's runtime, so that they differ in what they compute and in nothing
else. A guard has the size of the model, and is read the same prompt without a template of its own,
which is kinder to it than a real one.

- gate: the bundle itself
- guard-logit: a guard reads the prompt and one logit decides; then the model reads it again
- guard-generate: the guard writes its verdict; then the model reads the prompt
- generate-then-check: the model answers; a guard reads prompt and answer, and only then is the
  answer shown
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from protocol import Handler, Times, serve

if TYPE_CHECKING:
    from edge_safe.evaluation.speed.requests import Answers

PIPELINES = ("gate", "guard-logit", "guard-generate", "generate-then-check")
VERDICT_TOKENS = 8
"""What a guard writes, such as "Safety: Unsafe" and a line with the kind of harm."""


def main() -> None:
    """Serves one bundle."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--pipeline", choices=PIPELINES, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

    def load() -> Handler:
        from edge_safe.evaluation.speed.requests import Answers, load_forgetful

        def opened() -> Answers:
            return Answers(load_forgetful(options.bundle, options.threads))

        if options.pipeline == "gate":
            return _gate(opened())
        return _guarded(options.pipeline, opened(), opened())

    serve(load, ("onnxruntime", "numpy"))


def _gate(answers: Answers) -> Handler:
    """The bundle itself."""
    import numpy as np

    def answer(ids: list[int], tokens: int, refuse: bool) -> Times:
        prompt = np.array(ids, np.int64)
        if refuse:
            took = answers.refused(prompt)
            return {"verdict_ms": took, "total_ms": took, "ids": []}
        times = answers.run(prompt, tokens)
        return {
            "verdict_ms": times.verdict,
            "first_token_ms": times.first_token,
            "total_ms": times.total,
            "ids": times.ids,
        }

    return answer


def _guarded(pipeline: str, guard: Answers, model: Answers) -> Handler:
    """A model and a guard of its size beside it."""
    import numpy as np

    def answer(ids: list[int], tokens: int, refuse: bool) -> Times:
        prompt = np.array(ids, np.int64)
        if pipeline == "generate-then-check":
            times = model.run(prompt, tokens)
            # Which words the guard reads does not change how long that takes.
            read = guard.run(np.concatenate([prompt, np.resize(prompt, tokens)]), 1).first_token
            shown = times.total + read
            return {
                "verdict_ms": shown,
                "first_token_ms": shown,
                "total_ms": shown,
                "ids": times.ids,
            }
        length = 1 if pipeline == "guard-logit" else VERDICT_TOKENS
        verdict = guard.run(prompt, length).total
        if refuse:
            return {"verdict_ms": verdict, "total_ms": verdict, "ids": []}
        times = model.run(prompt, tokens)
        return {
            "verdict_ms": verdict,
            "first_token_ms": verdict + times.first_token,
            "total_ms": verdict + times.total,
            "ids": times.ids,
        }

    return answer


if __name__ == "__main__":
    main()
