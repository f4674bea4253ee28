"""`edge-safe plan`: will a bundle fit a device, and how fast will it be there?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from edge_safe.cli import options
from edge_safe.cli.console import Terminal

NOTICE = "Predicted from bytes and operations; nothing was run. `edge-safe bench` measures."
SMALL = (
    "At best: this model is so small that starting kernels, not reading weights, sets a GPU's pace "
    "(docs/plan.md)."
)


def command(
    bundle: options.Bundle,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="NAME", help="One device; all of them if none is given."),
    ] = None,
    power_mode: Annotated[
        str | None,
        typer.Option("--power-mode", metavar="NAME", help="A power mode; the first if not given."),
    ] = None,
    prompt_tokens: Annotated[
        int,
        typer.Option(
            "--prompt-tokens", metavar="N", help="Words of the prompt, template included."
        ),
    ] = 256,
    images: Annotated[
        int, typer.Option("--images", metavar="N", help="Pictures of 640 x 480 in the prompt.")
    ] = 0,
    image_tokens: Annotated[
        int | None,
        typer.Option(
            "--image-tokens",
            metavar="N",
            help="Tokens of one picture; by default what the bundle makes of it.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            metavar="N",
            help="Tokens in the cache; by default the prompt and an answer of 256.",
        ),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            "--measured",
            metavar="FILE",
            help="What `bench --json` printed for this bundle on the device: its constants replace "
            "those fitted to published figures.",
        ),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Predict memory, encode, prefill, time to refusal and decode rate on a device.

    Nothing is run: bytes and operations of the graphs against a table of devices. docs/plan.md has
    the formulas, the sources, and how they did on published figures.
    """
    from edge_safe.errors import UsageError
    from edge_safe.evaluation.planning.devices import DEVICES, find_device
    from edge_safe.evaluation.planning.measured import measured_constants
    from edge_safe.evaluation.planning.prediction import Request, make_plan, predict
    from edge_safe.runtime.bundle import open_bundle

    terminal = Terminal(as_json, quiet, verbose)
    if device is None and (power_mode is not None or measured is not None):
        given = "--power-mode" if measured is None else "--measured"
        raise UsageError(f"{given} is of one device; name it with --device.")
    rows = [find_device(device, power_mode)] if device else [(d, d.modes[0]) for d in DEVICES]
    opened = open_bundle(bundle, provider="cpu", accept_failed=True)
    plan = make_plan(opened, Request(prompt_tokens, images, image_tokens, context))
    constants = None if measured is None else measured_constants(measured, opened, *rows[0])
    predictions = [predict(plan, row, mode, constants) for row, mode in rows]
    manifest = opened.manifest
    early = manifest.safety.early
    document = {
        "predicted": True,
        "bundle": {
            "name": manifest.name,
            "precision": manifest.precision,
            "target": manifest.target,
            "layers": manifest.model.layers,
            "exit_layer": manifest.safety.exit_layer,
            "early_layer": None if early is None else early.layer,
        },
        "request": {
            "prompt_tokens": plan.prompt,
            "images": plan.images,
            "image_tokens": plan.image_tokens,
            "context": plan.context,
        },
        "devices": predictions,
        "notes": list(_notes(manifest.target, predictions)),
    }
    terminal.document(document)
    show(terminal, document, one=device is not None)
    return 0


def _notes(target: str, predictions: list[dict[str, Any]]) -> Iterator[str]:
    """What a reader of the figures has to know."""
    yield NOTICE
    if any(entry["at_best"] for entry in predictions):
        yield SMALL
    if target == "cpu" and any(entry["kind"] != "cpu" for entry in predictions):
        yield "This bundle is for CPUs; a GPU wants an export for it, of the same precision."


def show(terminal: Terminal, document: dict[str, Any], *, one: bool) -> None:
    """Prints the document in words, of one device or of all."""
    about, asked = document["bundle"], document["request"]
    each = f"{asked['images']} x {asked['image_tokens']}"
    seen = f" ({each} of pictures)" if asked["images"] else ""
    prompt = f"a prompt of {asked['prompt_tokens']} tokens{seen}"
    terminal.say(
        f"{about['name']}, {about['precision']}: {prompt}, {asked['context']} in the cache"
    )
    if one:
        for line in _lines(document["devices"][0], about, asked):
            terminal.say(line)
    else:
        terminal.show(_overview(document["devices"]))
    for note in document["notes"]:
        terminal.say(f"- {note}")


def _lines(entry: dict[str, Any], about: dict[str, Any], asked: dict[str, Any]) -> Iterator[str]:
    """One device in words."""
    memory, least = entry["memory"], "at least " if entry["at_best"] else ""
    most = "at most " if entry["at_best"] else ""
    yield f"{entry['label']}, power mode {entry['power_mode']}"
    yield (
        f"  memory       {memory['total_mb']:.0f} of {memory['available_mb']:.0f} MB: "
        f"{'fits' if entry['fits'] else 'does NOT fit'} (weights {memory['weights_mb']:.0f}, "
        f"cache {memory['cache_mb']:.0f}, activations {memory['activations_mb']:.0f}, "
        f"runtime {memory['base_mb']:.0f})"
    )
    if asked["images"]:
        yield f"  encode       {least}{_ms(entry['encode_ms'])}"
    yield f"  prefill      {least}{_ms(entry['prefill_ms'])}, bound by {entry['prefill_bound']}"
    yield f"  first token  {least}{_ms(entry['first_token_ms'])}"
    if about["exit_layer"] is None:
        yield f"  refusal      {least}{_ms(entry['refusal_ms'])}, at full depth"
    else:
        layer = about["early_layer"] or about["exit_layer"]
        yield (
            f"  refusal      {least}{_ms(entry['refusal_ms'])}, at layer {layer} of "
            f"{about['layers']}"
        )
        if about["early_layer"] is not None:
            yield (
                f"  late refusal {least}{_ms(entry['late_refusal_ms'])}, at layer "
                f"{about['exit_layer']}"
            )
    yield f"  decode       {most}{entry['decode_tokens_per_second']:.1f} tokens a second"
    if entry["constants_from"] == "bench":
        yield "  constants    measured on this device"
        return
    yield "  held-out published figures within 35 %: " + ", ".join(
        f"{phase} {found['within_35_percent']} of {found['figures']} "
        f"({100 * found['lowest_error']:+.0f} to {100 * found['highest_error']:+.0f} %)"
        for phase, found in entry["held_out"].items()
    )


def _overview(devices: list[dict[str, Any]]) -> Table:
    """All devices, a row each; times in ms."""
    table = Table(title="Predicted, times in ms", title_justify="left")
    table.add_column("device", no_wrap=True)
    for heading in ("MB", "fits", "encode", "prefill", "refusal", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in devices:
        least, most = (">=", "<=") if entry["at_best"] else ("", "")
        times = ("encode_ms", "prefill_ms", "refusal_ms")
        table.add_row(
            entry["device"],
            f"{entry['memory']['total_mb']:.0f}",
            "yes" if entry["fits"] else "NO",
            *(f"{least}{_digits(entry[key])}" if entry[key] else "-" for key in times),
            f"{most}{_digits(entry['decode_tokens_per_second'])}",
        )
    return table


def _ms(value: float) -> str:
    return f"{_digits(value)} ms"


def _digits(value: float) -> str:
    """A number without digits that say nothing."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
