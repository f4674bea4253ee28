"""One picture of a bundle's speed: the ways of a request by prompt length, and the peers.

Needs matplotlib, which the device install does not have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_safe.errors import UsageError
from edge_safe.evaluation.plots import check_plotting

_WAYS = {
    "verdict_ms": "verdict",
    "refusal_ms": "refusal complete",
    "first_token_ms": "first token of an answer",
}
_BARS = {
    "first_token_ms": "first token, ms",
    "answer_ms": "whole answer, ms",
    "decode_ms_per_token": "decode, ms a token",
}


def plot_speed(path: Path, document: dict[str, Any]) -> None:
    """Draws the document of ``bench --json``.

    Args:
        path: Where to write; the ending names the format (.png, .svg, .pdf).
        document: See ``measure``.

    Raises:
        UsageError: If matplotlib is missing or does not know the ending.
        OSError: If the file cannot be written.
    """
    check_plotting()
    from matplotlib.figure import Figure

    peers = document["peers"]
    figure = Figure(figsize=(15.0, 4.4) if peers else (6.5, 4.4), layout="constrained")
    machine = document["machine"]
    figure.suptitle(
        f"{document['bundle']['name']} {document['bundle']['precision']}, {machine['cpu']}, "
        f"{document['threads'] or machine['cores']} threads"
    )
    axes = list(figure.subplots(1, 1 + len(_BARS) if peers else 1, squeeze=False)[0])
    lengths = [entry["prompt_tokens"] for entry in document["lengths"]]
    for key, label in _WAYS.items():
        middle = [entry[key] for entry in document["lengths"]]
        spread = [entry["spread"][key] for entry in document["lengths"]]
        axes[0].plot(lengths, middle, marker="o", label=label)
        low, high = zip(*spread, strict=True)
        axes[0].fill_between(lengths, low, high, alpha=0.2)
    axes[0].set(xlabel="prompt tokens", ylabel="ms", xscale="log", yscale="log")
    axes[0].legend()
    for axis, (key, title) in zip(axes[1:], _BARS.items(), strict=False):
        rows = [(name, peer) for name, peer in peers.items() if key in peer]
        axis.barh([name for name, _ in rows], [peer[key] for _, peer in rows])
        for place, (_, peer) in enumerate(rows):
            axis.plot(peer["spread"][key], [place, place], color="black")
        axis.invert_yaxis()
        axis.set(title=title)
    try:
        figure.savefig(path, dpi=120)
    except ValueError as problem:
        raise UsageError(f"cannot draw {path.name}: {problem}") from None
