"""The Python face in one page: `python examples/judge_then_answer.py BUNDLE "a question"`."""

from __future__ import annotations

import sys

from edge_safe import Decision, Reply, SafeModel, Verdict


def main(bundle: str, prompt: str) -> None:
    """Prints the verdict first, then the answer as it comes."""
    model = SafeModel.load(bundle)
    for event in model.stream(prompt, max_tokens=64):
        if isinstance(event, Verdict):
            print(f"[{event.decision.value}, p_unsafe {event.p_unsafe:.3f}]")
        elif isinstance(event, Reply):
            if event.verdict.decision is Decision.REFUSE:
                print(event.refusal)
            print(f"\n[{event.finish_reason}, {event.timing.total_ms:.0f} ms]")
        else:
            print(event, end="", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
