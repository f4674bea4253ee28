"""The study the paper lacks, in one command.

    python -m benchmarks.study models/pebble/recipe.toml --data DATA --measure dev.jsonl
        --out docs/pictures --docs docs/study.md

Heads are trained by the recipe on hidden states of the checkpoint's language model; states that
training left in the cache are used again where they agree with it. Each question writes a JSON file
and a picture below --out. A question answered before with the same settings is not asked again, and
a stopped one goes on where it stopped. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.study import (
    amount,
    choices,
    combination,
    context_length,
    exit_layer,
    quantization,
    readouts,
    transfer,
)
from benchmarks.study.lab import Lab
from benchmarks.study.options import read_arguments, settings_of
from benchmarks.study.report import insert, markdown, new_figure, save
from edge_safe.errors import EdgeSafeError, UsageError

QUESTIONS: dict[str, ModuleType] = {
    module.NAME: module
    for module in (
        readouts,
        combination,
        exit_layer,
        quantization,
        context_length,
        transfer,
        choices,
        amount,
    )
}
SECONDS_BETWEEN_LINES = 20.0


class Lines:
    """Says now and then on stderr how far a job is."""

    def __init__(self) -> None:
        self._said = 0.0

    def __call__(self, job: str, done: int, total: int) -> None:
        """See ``progress.Progress``."""
        now = time.monotonic()
        if now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            print(f"{job}: {done} of {total}", file=sys.stderr, flush=True)


def main() -> None:
    """Answers the questions that are missing and shows all of them."""
    options, more = read_arguments(__doc__, list(QUESTIONS))
    lab: Lab | None = None
    shown: dict[str, Any] = {}
    for name in more.questions:
        path = more.out / f"study_{name}.json"
        fixed = settings_of(options, QUESTIONS[name].SETTINGS)
        result = _known(path, fixed)
        if result is None or more.again:
            print(f"{name} ...", file=sys.stderr, flush=True)
            lab = lab or Lab(options, Lines())
            start = time.monotonic()
            try:
                found = QUESTIONS[name].answer(lab)
            except UsageError as problem:
                print(f"{name}: {problem}", file=sys.stderr)
                continue
            seconds = round(time.monotonic() - start, 1)
            result = {"question": name, "seconds": seconds, "settings": fixed, "found": found}
            _write(path, result)
        shown[name] = result["found"]
        _show(name, result["found"], more.out, more.docs)
    print(json.dumps({"study": options.recipe.name, **shown}))


def _show(name: str, found: dict[str, Any], out: Path, docs: Path | None) -> None:
    question = QUESTIONS[name]
    table = markdown(question.rows(found))
    print(f"\n{question.TITLE}\n\n{table}\n")
    figure = new_figure()
    question.draw(found, figure)
    picture = out / f"study_{name}.png"
    save(figure, picture)
    if docs is not None:
        link = Path(os.path.relpath(picture, docs.parent)).as_posix()
        insert(docs, name, f"\n{table}\n\n![{question.TITLE}]({link})\n")


def _known(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """A result of the same settings."""
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result if result["settings"] == settings else None


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    try:
        main()
    except EdgeSafeError as error:
        sys.exit(f"error: {error}")
