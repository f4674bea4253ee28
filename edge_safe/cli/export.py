"""`edge-safe export`: a checkpoint becomes a bundle."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_safe.cli import options
from edge_safe.cli.console import Terminal, percent, without_loading_bars
from edge_safe.errors import UsageError
from edge_safe.export.quantization import PRECISIONS, REFUSED, TABLE_FORMATS
from edge_safe.export.tensorrt.releases import RELEASES
from edge_safe.export.tensorrt.rtx import CAPABILITIES, USUAL

if TYPE_CHECKING:
    from edge_safe.export.auto import Candidate

# No row of the table: a search among them.
AUTO = "auto"

CACHES = ("fp32", "fp16", "int8")


def _rows() -> str:
    """The table of precisions as one sentence."""
    rows = "; ".join(f"{row.name}: {row.good_for}" for row in PRECISIONS.values())
    return f"{rows}; {AUTO}: the smallest mixture of formats that is accepted"


def command(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A checkpoint folder, e.g. models/pebble.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The bundle folder to write.")],
    target: Annotated[
        options.Provider, typer.Option(help="The hardware the bundle is made for.")
    ] = options.Provider.CPU,
    precision: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"How weights are stored. {_rows()}.",
        ),
    ] = "int4",
    embedding: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(TABLE_FORMATS),
            help="A format for the embedding in place of the precision's own.",
        ),
    ] = None,
    lm_head: Annotated[
        str | None,
        typer.Option(metavar="|".join(TABLE_FORMATS), help="The same for the output matrix."),
    ] = None,
    kv_cache: Annotated[
        str,
        typer.Option(metavar="|".join(CACHES), help="What keys and values are kept as."),
    ] = "fp32",
    exit_layer: Annotated[
        str,
        typer.Option(
            metavar="auto|N|none",
            help="The layer the gate reads; auto is the checkpoint's own with its early exit, or "
            "the earliest within the policy's max_asr; none is full depth.",
        ),
    ] = "auto",
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Labelled rows to re-fit the thresholds on, and to look at activations with.",
        ),
    ] = None,
    acceptance: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Labelled rows the finished bundle must pass; by default a few mild ones.",
        ),
    ] = None,
    allow_unaccepted: Annotated[
        bool,
        typer.Option(
            "--allow-unaccepted",
            help="Write a bundle that failed the test, marked so that it is not loaded.",
        ),
    ] = False,
    safe_token: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="For a model only fine-tuned to emit two tokens."),
    ] = None,
    unsafe_token: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The other one of the two.")
    ] = None,
    release: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(RELEASES),
            help="Which TensorRT reads the bundle; without it the oldest that reads the precision.",
        ),
    ] = None,
    capability: Annotated[
        list[str] | None,
        typer.Option(
            metavar="|".join(CAPABILITIES),
            help="A GPU that engines of TensorRT for RTX are built for; may be given several "
            f"times. By default {', '.join(USUAL)}.",
        ),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The policy the bundle comes with, TOML or JSON."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a bundle that is already there.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Turn a checkpoint into a bundle: graphs, quantized weights, hashes, parity report."""
    if not re.fullmatch(r"auto|none|\d+", exit_layer):
        raise UsageError(f"--exit-layer is {exit_layer!r}; give auto, none or a layer's number")
    _check("--precision", precision, [*PRECISIONS, AUTO, *REFUSED])
    if capability and target is not options.Provider.TENSORRT_RTX:
        raise UsageError("--capability belongs to --target tensorrt-rtx; leave it out")
    for name in capability or ():
        _check("--capability", name, CAPABILITIES)
    _check("--embedding", embedding, TABLE_FORMATS)
    _check("--lm-head", lm_head, TABLE_FORMATS)
    _check("--kv-cache", kv_cache, CACHES)
    if (safe_token is None) != (unsafe_token is None):
        raise UsageError("--safe-token and --unsafe-token go together; give both or neither")

    from edge_safe.export import export_bundle

    terminal = Terminal(as_json, quiet, verbose)
    without_loading_bars()
    with terminal.steps() as progress:
        report = export_bundle(
            source,
            out,
            target=target.value,
            precision=precision,
            embedding=embedding,
            lm_head=lm_head,
            kv_cache=kv_cache,
            exit_layer=exit_layer,
            calibration=calibration,
            acceptance=acceptance,
            allow_unaccepted=allow_unaccepted,
            overwrite=overwrite,
            safe_token=safe_token,
            unsafe_token=unsafe_token,
            policy=policy,
            release=release,
            capabilities=capability or USUAL,
            progress=progress,
        )
    import msgspec

    from edge_safe.cli.inspect import describe
    from edge_safe.runtime.manifest import load_manifest

    manifest = load_manifest(out)
    terminal.document(
        {
            "out": str(out),
            "manifest": msgspec.to_builtins(manifest),
            "peak_memory_mb": report.peak_memory_mb,
        }
    )
    for line in describe(manifest):
        terminal.say(line)
    for drift in report.drift:
        terminal.say(
            f"Re-fitting moved the threshold of stage {drift.stage} for {drift.modality} by "
            f"{drift.drift:+.3f} log-odds; the torch model's would have refused "
            f"{percent(drift.torch_fpr)} of the harmless rows, this one {percent(drift.fpr)}."
        )
    if report.search is not None:
        chosen = report.search.candidates[report.search.chosen]
        terminal.say(f"auto chose {_in_words(chosen)}")
    terminal.say(f"compared with {report.parity.reference}")
    terminal.say(f"peak memory of the export: {report.peak_memory_mb} MB")
    return 0


def _check(option: str, value: str | None, known: Collection[str]) -> None:
    """Refuses a value that no table has.

    Raises:
        UsageError: The message lists those there are.
    """
    if value is not None and value not in known:
        raise UsageError(f"{option} is {value!r}; choose one of {', '.join(known)}")


def _in_words(candidate: Candidate) -> str:
    """Runs of layers that are stored alike, then embedding and lm_head."""
    runs = []
    start = 0
    for row, group in itertools.groupby(candidate.layers):
        end = start + len(list(group)) - 1
        runs.append(f"{row} in layers {start} to {end}")
        start = end + 1
    return f"{', '.join(runs)}; {candidate.tables} in embedding and lm_head"
