"""Fits the constants of `edge-safe plan` and prints every figure beside its prediction.

python benchmarks/fit_plan.py              prints the tables
python benchmarks/fit_plan.py docs/plan.md writes the sections of the page anew
"""

from __future__ import annotations

import sys
from pathlib import Path

from edge_safe.evaluation.planning import page


def main(arguments: list[str]) -> int:
    """Prints, or writes; returns the exit code."""
    if arguments:
        path = Path(arguments[0])
        text = page.refresh(path.read_text(encoding="utf-8"))
        scratch = path.with_name(f".{path.name}.part")
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
        return 0
    for title, table in (
        ("constants", page.summary_table()),
        ("fitted", page.fitted_table()),
        ("held out", page.held_out_table()),
        ("neither", page.apart_table()),
    ):
        sys.stdout.write(f"{title}\n\n{table}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
