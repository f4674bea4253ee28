"""`edge-safe bench`: how fast a bundle is on this machine, and beside others."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from edge_safe.cli import options
from edge_safe.cli.console import Terminal, number, percent

LENGTHS = (64, 256, 1024, 4096)
_ROWS = {
    "load_ms": "load, its files not in memory, ms",
    "load_warm_ms": "load, its files in memory, ms",
    "first_verdict_ms": "start to first verdict, files not in memory, ms",
    "first_verdict_warm_ms": "start to first verdict, files in memory, ms",
    "encode_image_ms": "encode a picture, ms",
    "encode_audio_ms": "encode a sound, ms",
    "decode_ms_per_token": "decode, empty cache, ms a token",
    "decode_long_cache_ms_per_token": "decode, 2,000 tokens in the cache, ms a token",
    "second_turn_ms": "second turn to first token, ms",
    "second_turn_anew_ms": "the same with nothing kept, ms",
    "gated_answer_ms": "allowed answer of 64 tokens, ms",
    "ungated_answer_ms": "the same without a gate, ms",
    "gate_cost_ratio": "gated / ungated",
    "peak_memory_mb": "peak memory of a text request, MB",
}
_WAYS = {
    "encode_ms": "encode",
    "verdict_ms": "verdict",
    "refusal_ms": "refusal",
    "late_refusal_ms": "refusal at the gate",
    "prefill_ms": "prefill",
    "first_token_ms": "first token",
    "refusal_ratio": "refusal / first",
}


def command(
    bundle: options.Bundle,
    more_lengths: Annotated[
        list[int] | None,
        typer.Argument(metavar="[N]...", help="Further lengths for --prompt-tokens."),
    ] = None,
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option(
            "--prompt-tokens",
            metavar="N [N]...",
            help="Prompt lengths, the template included; 64 256 1024 4096 if none is given.",
        ),
    ] = None,
    runs: Annotated[int, typer.Option(metavar="N", help="Rounds, in which all take turns.")] = 10,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Threads inside one operator.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option("--image", metavar="F", help="A picture to encode.")
    ] = None,
    audio: Annotated[
        Path | None, typer.Option("--audio", metavar="F", help="A recording to encode.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option("--peer", metavar="NAME", help="Run a peer side by side; may be repeated."),
    ] = None,
    peers_folder: Annotated[
        Path | None,
        typer.Option(
            "--peers-folder",
            metavar="DIR",
            help="Where benchmarks/peers/setup.py put them; by default in the cache.",
            envvar="EDGE_SAFE_PEERS",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="F.png", help="Draw a picture.")
    ] = None,
    provider: options.RunOn = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Measure how fast a bundle is on this machine: medians in milliseconds, with quartiles.

    Needs about three times the bundle's memory. A gate's cost is measured against the same model
    without its gate, which takes the onnx package.
    """
    from edge_safe.evaluation.plots import check_plotting
    from edge_safe.evaluation.speed.measure import Settings, measure
    from edge_safe.evaluation.speed.peers import choose, read_peers
    from edge_safe.evaluation.speed.plot import plot_speed

    terminal = Terminal(as_json, quiet, verbose)
    if plot is not None:
        check_plotting()
    folder = peers_folder or _default_peers()
    chosen = choose(read_peers(folder), peer, folder) if peer else {}
    lengths = (*(prompt_tokens or ()), *(more_lengths or ())) or LENGTHS
    settings = Settings(lengths, runs, threads, options.name_of(provider), image, audio)
    with without_gate(bundle) as (ungated, why_not), terminal.steps() as tell:
        document = measure(bundle, settings, ungated, why_not, tell)
        if chosen:
            document["peers"] = _peers(bundle, ungated, chosen, document, settings, tell)
    if plot is not None:
        plot_speed(plot, document)
    terminal.document(document)
    show(terminal, document)
    return 0


@contextmanager
def without_gate(bundle: Path) -> Iterator[tuple[Path | None, str]]:
    """The same model without its gate for as long as it is needed, or why there is none."""
    from edge_safe.runtime.manifest import load_manifest

    if load_manifest(bundle).safety.exit_layer is None:
        yield None, "this bundle has no early exit, its verdict is part of the decoder"
    elif importlib.util.find_spec("onnx") is None:
        yield None, "leaving the gate out needs onnx: pip install 'edge-safe[export]'"
    else:
        from edge_safe.export.ungated import write_ungated

        # Beside the bundle, so that its weights can be linked instead of copied.
        where = bundle.resolve().parent
        try:
            scratch = tempfile.TemporaryDirectory(dir=where, prefix=".ungated-")
        except OSError:
            scratch = tempfile.TemporaryDirectory(prefix="ungated-")
        with scratch as name:
            yield write_ungated(bundle, Path(name) / "bundle"), ""


def _default_peers() -> Path:
    from edge_safe.models.cache import cache_folder

    return cache_folder() / "peers"


def _peers(
    bundle: Path,
    ungated: Path | None,
    chosen: dict[str, Any],
    document: dict[str, Any],
    settings: Any,
    tell: Any,
) -> dict[str, Any]:
    """Runs the peers at the length that the figures are for."""
    from edge_safe.errors import PeerError
    from edge_safe.evaluation.speed.peers import compare
    from edge_safe.evaluation.speed.prompts import exact_prompt
    from edge_safe.runtime.cores import available_cores
    from edge_safe.runtime.model import SafeModel

    needing = [name for name, peer in chosen.items() if "{ungated}" in " ".join(peer.command)]
    if ungated is None and needing:
        raise PeerError(
            f"Peer '{needing[0]}' runs the model without its gate, which cannot be made here: "
            f"{document['notes'][-1]}"
        )
    model = SafeModel.load(bundle, provider=settings.provider, accept_failed=True)
    prompt = exact_prompt(model, document["prompt_tokens"]) or ""
    ids, safe = model.prompt_ids(prompt).tolist(), model.manifest.safety.safe_token_id
    del model  # its memory is not to stand in the peers' way
    rounds = 0

    def done() -> None:
        nonlocal rounds
        rounds += 1
        tell("peers", rounds / settings.runs)

    tell("peers", 0.0)
    places = {
        "bundle": str(bundle),
        "ungated": str(ungated),
        "threads": str(settings.threads or available_cores()),
    }
    return compare(chosen, places, ids, safe, document["answer_tokens"], settings.runs, done)


def show(terminal: Terminal, document: dict[str, Any]) -> None:
    """Prints the document as tables."""
    machine = document["machine"]
    terminal.say(
        f"{document['bundle']['name']}, {document['bundle']['precision']}, on {machine['cpu']}, "
        f"{document['threads'] or machine['cores']} threads, {document['runs']} rounds; medians, "
        "quartiles in brackets"
    )
    lengths = Table(title="Requests in words, by prompt tokens", title_justify="left")
    lengths.add_column("prompt")
    ways = {key: name for key, name in _WAYS.items() if key in document["lengths"][0]}
    for heading in ways.values():
        lengths.add_column(heading, justify="right")
    for entry in document["lengths"]:
        cells = (_cell(entry, key) for key in ways)
        lengths.add_row(str(entry["prompt_tokens"]), *cells)
    terminal.show(lengths)
    for entry in document["skipped"]:
        terminal.say(f"{entry['prompt_tokens']} tokens were not measured: {entry['reason']}")
    rest = Table(title=f"At {document['prompt_tokens']} tokens", title_justify="left")
    rest.add_column("")
    rest.add_column("median", justify="right")
    for key, label in _ROWS.items():
        if document.get(key) is not None:
            rest.add_row(label, _cell(document, key))
    terminal.show(rest)
    if document["limits"]:
        terminal.show(_limits(document["limits"]))
    if document["peers"]:
        terminal.show(_peer_table(document["peers"]))
    for note in document["notes"]:
        terminal.say(f"- {note}")


def _limits(limits: dict[str, Any]) -> Table:
    """What bounds decoding and prefill."""
    table = Table(
        title=f"What bounds it: {limits['memory_gb_per_second']:.1f} GB/s read, "
        f"{limits['float_gop_per_second']:.0f} / {limits['integer_gop_per_second']:.0f} "
        "billion operations a second of a float32 / 8-bit product",
        title_justify="left",
    )
    for heading in (
        "",
        "MB read",
        "10⁹ operations",
        "by memory, ms",
        "by compute, ms",
        "bound",
        "reached",
    ):
        table.add_column(heading, justify="left" if heading in ("", "bound") else "right")
    rows = [(f"decode behind {entry['past']}", entry) for entry in limits["decode"]]
    rows += [(f"prefill of {entry['prompt_tokens']}", entry) for entry in limits["prefill"]]
    for name, entry in rows:
        table.add_row(
            name,
            f"{entry['bytes'] / 1e6:.1f}",
            f"{entry['operations'] / 1e9:.2f}",
            number(entry["memory_ms"], 2),
            number(entry["compute_ms"], 2),
            entry["bound"],
            percent(entry["share_reached"]),
        )
    return table


def _peer_table(peers: dict[str, Any]) -> Table:
    """Each peer's figures, and in brackets ours in relation to them."""
    table = Table(title="Peers, interleaved (ours / theirs)", title_justify="left")
    keys = ("first_token_ms", "answer_ms", "decode_ms_per_token", "refusal_ms")
    for heading in ("", "first token", "answer", "decode a token", "refusal", "peak MB"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, peer in peers.items():
        cells = []
        for key in keys:
            ratio = peer["ratio"].get(key)
            share = "" if ratio is None else f" ({ratio:.2f})"
            cells.append(number(peer.get(key), 1) + share)
        table.add_row(name, *cells, number(peer["peak_memory_mb"], 0))
    return table


def _cell(values: dict[str, Any], key: str) -> str:
    """A median with its quartiles."""
    digits = 3 if key.endswith("ratio") else 0 if key.endswith("mb") else 1
    lower, upper = values["spread"][key]
    return f"{values[key]:.{digits}f} ({lower:.{digits}f}-{upper:.{digits}f})"
