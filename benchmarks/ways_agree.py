"""Whether all ways of running one bundle give the same verdicts, and by how much they differ.

    python benchmarks/ways_agree.py BUNDLE... [--requests 400] [--data prompts.jsonl] [--threads 2]

Every request is judged plainly: alone, in one run, with nothing kept. Then in other ways:

- chunked: in pieces of 64 positions
- prefix: behind a system text that earlier requests had, whose states were kept
- together: by ``assess_many``, several in one run
- one_thread: on one thread
- second_turn: as a conversation's second turn, its first one kept, against the same after the
  conversation gave up what it kept
- restored: the same second turn, after the conversation went through a file, against it kept
- picture: beside a picture whose embeddings were kept, against the same encoded anew

Requests are made-up words, half of them short, the others up to 400, or else the prompts of a
file; all share a system text of 40 words. The last line is one JSON object, by bundle and way:

- requests: how many were compared
- agreement: share of the same decisions
- other_stage: how many were decided at another stage
- max_p_difference: largest change of p_unsafe, of those that were decided at the same stage
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from many_requests import made_up, made_up_text
from rich.console import Console
from rich.progress import track

from edge_safe import SafeModel
from edge_safe.evaluation.rows import read_rows
from edge_safe.evaluation.speed.requests import allowing, load_forgetful
from edge_safe.evaluation.speed.sample_media import sign
from edge_safe.runtime import prefill
from edge_safe.runtime.batch import AssessRequest
from edge_safe.runtime.chat import Chat
from edge_safe.runtime.verdict import Verdict

PIECE = 64
SYSTEM_WORDS = 40
FIRST_TURN = "Good morning. What can you do?"
# Every so many requests one is asked as a second turn, or beside a picture: these take longer.
SPARSE = 4


@contextmanager
def pieces(size: int) -> Iterator[None]:
    """Prompts are read in pieces of this size meanwhile; a bundle has no such setting."""
    before = prefill.chunks.__defaults__
    prefill.chunks.__defaults__ = (size, ())
    try:
        yield
    finally:
        prefill.chunks.__defaults__ = before


def told(name: str, requests: list[str]) -> Iterable[str]:
    """The requests, with a bar."""
    return track(requests, name, console=Console(stderr=True))


def alone(model: SafeModel, name: str, requests: list[str], system: str) -> list[Verdict]:
    """Judges each by itself."""
    return [model.assess(request, system=system) for request in told(name, requests)]


def pictured(model: SafeModel, name: str, requests: list[str]) -> list[Verdict]:
    """Judges each beside the same picture."""
    return [model.assess(request, images=[sign()]) for request in told(name, requests)]


def conversations(
    model: SafeModel, requests: list[str], system: str
) -> tuple[list[Verdict], list[Verdict], list[Verdict]]:
    """Verdicts of second turns: kept, after release, after a file."""
    model = allowing(model)
    kept, anew, restored = [], [], []

    def begun() -> Chat:
        chat = model.chat(system)
        chat.send(FIRST_TURN, max_tokens=8)
        return chat

    def second(chat: Chat, request: str) -> Verdict:
        return chat.send(request, max_tokens=1).verdict

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "chat")
        for request in told("second turn", requests):
            kept.append(second(begun(), request))
            forgetful = begun()
            forgetful.release()
            anew.append(second(forgetful, request))
            begun().save(path)
            restored.append(second(model.load_chat(path), request))
    return kept, anew, restored


def compared(ours: list[Verdict], plain: list[Verdict]) -> dict[str, Any]:
    """How far one way is from the plain one."""
    pairs = list(zip(ours, plain, strict=True))
    changes = [abs(a.p_unsafe - b.p_unsafe) for a, b in pairs if a.stage == b.stage]
    return {
        "requests": len(pairs),
        "agreement": sum(a.decision is b.decision for a, b in pairs) / len(pairs),
        "other_stage": len(pairs) - len(changes),
        "max_p_difference": max(changes, default=None),
    }


def measure(bundle: Path, requests: list[str], system: str, threads: int) -> dict[str, Any]:
    """All ways of one bundle."""
    model = load_forgetful(bundle, threads=threads)
    few = requests[::SPARSE]
    with pieces(model.manifest.model.context_length):
        plain = alone(model, "plain", requests, system)
    with pieces(PIECE):
        found = {"chunked": compared(alone(model, "chunked", requests, system), plain)}
    many = [AssessRequest(request, system=system) for request in requests]
    together = [one.verdict for one in model.assess_many(many)]
    found["together"] = compared(together, plain)
    kept, anew, restored = conversations(model, few, system)
    found["second_turn"], found["restored"] = compared(kept, anew), compared(restored, kept)
    single = load_forgetful(bundle, threads=1)
    found["one_thread"] = compared(alone(single, "one thread", requests, system), plain)
    keeping = SafeModel.load(bundle, threads=threads, accept_failed=True)
    found["prefix"] = compared(alone(keeping, "prefix", requests, system), plain)
    if model.manifest.processors:
        encoded = pictured(model, "picture anew", few)
        found["picture"] = compared(pictured(keeping, "picture kept", few), encoded)
    return found


def main() -> None:
    """Prints a line for each bundle, and all of them as JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--data", type=Path, help="JSON lines with a field 'prompt'")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.requests < 1:
        parser.error(f"--requests is {options.requests}; give 1 or more")
    system = made_up_text(random.Random(1), SYSTEM_WORDS)
    found = {}
    for bundle in options.bundles:
        if options.data is None:
            context = load_forgetful(bundle).manifest.model.context_length
            texts = [str(one.prompt) for one in made_up(options.requests, context)]
        else:
            rows = list(read_rows(options.data, labelled=False))
            random.Random(0).shuffle(rows)
            texts = [row.prompt for row in rows[: options.requests]]
        found[str(bundle)] = one = measure(bundle, texts, system, options.threads)
        sys.stdout.write(f"{bundle}: {one}\n")
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
