"""`edge-safe eval`: how good a bundle's gate is on labelled rows."""

from __future__ import annotations

import enum
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from edge_safe.cli import options
from edge_safe.cli.answers import show_answers
from edge_safe.cli.console import Terminal, number, percent
from edge_safe.errors import UsageError

if TYPE_CHECKING:
    from edge_safe.evaluation.forms import Form


class Render(str, enum.Enum):
    """In what form the words of a row reach the model."""

    TEXT = "text"
    PICTURES = "pictures"
    SPEECH = "speech"


def command(
    bundle: options.Bundle,
    data: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            help='Rows {"id", "prompt", "label": "safe"|"unsafe", "source"?}, or a suite\'s folder '
            "or file.",
        ),
    ],
    suite: options.SuiteName = "jsonl",
    plot: Annotated[
        Path | None,
        typer.Option(metavar="F.png", help="Draw ROC, reliability and histograms."),
    ] = None,
    render: Annotated[
        Render, typer.Option(help="Each prompt as text, as a picture of it, or spoken.")
    ] = Render.TEXT,
    style: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Layout of the pictures, or `all` in turn. Without, plain.",
        ),
    ] = None,
    voice: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Voice, synthesizer, or `all` in turn. Without, flite, which pebble's training "
            "never hears.",
        ),
    ] = None,
    render_out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep what was drawn or spoken: rows.jsonl and files."),
    ] = None,
    baseline_data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="T.jsonl",
            help="Labelled rows the bag-of-words baseline learns from; may be given several "
            "times. Without, it is cross-validated on the evaluated rows.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="For intervals, length matching and pictures.")
    ] = 0,
    answers: Annotated[
        bool,
        typer.Option("--answers", help="Let the bundle answer, and judge what it says."),
    ] = False,
    max_tokens: options.MaxTokens = 128,
    judge_model: Annotated[
        Path | None,
        typer.Option(
            "--judge",
            metavar="PATH",
            help="With --answers: a model folder or GGUF file that judges beside the rules.",
        ),
    ] = None,
    policy: options.PolicyFile = None,
    provider: options.RunOn = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Measure a gate: ASR, FPR, F1, AUROC, calibration error, per source, time to verdict."""
    from edge_safe.evaluation.answering import Answered, Remembered, answer, answers_report
    from edge_safe.evaluation.judge import judge, thresholds
    from edge_safe.evaluation.plots import check_plotting, plot_gate
    from edge_safe.evaluation.report import build_report
    from edge_safe.evaluation.rows import read_rows
    from edge_safe.evaluation.suites import read_suite
    from edge_safe.runtime.model import SafeModel

    terminal = Terminal(as_json, quiet, verbose)
    if plot is not None:
        check_plotting()
    if judge_model is not None and not answers:
        raise UsageError(f"--judge {judge_model} judges answers; add --answers")
    rows = read_suite(suite, data)
    form = _form(render, style, voice, render_out, seed)
    training = [row for path in baseline_data or () for row in read_rows(path, labelled=True)]
    if form is not None:
        form = Remembered(form)
        rows = [replace(row, modality=form.modality(index)) for index, row in enumerate(rows)]
    opinion = None
    if judge_model is not None:
        from edge_safe.evaluation.local_judge import LocalJudge

        opinion = LocalJudge(judge_model)
        opinion.check()
    model = SafeModel.load(bundle, provider=options.name_of(provider), policy=policy)
    judgements = []
    answered: list[Answered] = []
    with terminal.progress("judging", len(rows)) as bar:
        for index, row in enumerate(rows):
            drawn = partial(form.render, index) if form else None
            judgement = judge(model, row, drawn)
            judgements.append(judgement)
            reason = judgement.reason
            if answers:
                said = answer(
                    model, row, judgement, max_tokens=max_tokens, judge=opinion, render=drawn
                )
                answered.append(said)
                reason = said.reason
            if reason is not None:
                terminal.warn(f"row {row.id!r}: {reason}")
            bar.advance(bar.task_ids[0])
    measured = build_report(rows, judgements, training=training, seed=seed)
    origin = {"bundle": str(bundle), "data": str(data), "suite": suite, "render": render.value}
    report: dict[str, Any] = {**origin, "thresholds": thresholds(model), **measured}
    if answers:
        report["answers"] = answers_report(rows, answered, max_tokens=max_tokens, judge=opinion)
    if plot is not None:
        judged = [
            (bool(row.unsafe), judgement.p_unsafe)
            for row, judgement in zip(rows, judgements, strict=True)
            if judgement.p_unsafe is not None
        ]
        plot_gate(
            plot,
            [unsafe for unsafe, _ in judged],
            [p_unsafe for _, p_unsafe in judged],
            f"{model.manifest.name} {model.manifest.precision} on {data.name} ({render.value})",
            report["thresholds"],
        )
    terminal.document(report)
    _show(terminal, report)
    if answers:
        show_answers(terminal, report["answers"])
    return 0


def _form(
    render: Render, style: str | None, voice: str | None, keep: Path | None, seed: int
) -> Form | None:
    """What draws or speaks the rows."""
    if style is not None and render is not Render.PICTURES:
        raise UsageError(f"--style {style} needs --render pictures")
    if voice is not None and render is not Render.SPEECH:
        raise UsageError(f"--voice {voice} needs --render speech")
    if render is Render.TEXT:
        if keep is not None:
            raise UsageError(f"--render-out {keep} needs --render pictures or --render speech")
        return None
    from edge_safe.evaluation.forms import Drawn, Kept, Spoken

    drawn = render is Render.PICTURES
    form = Drawn(style or "plain", seed) if drawn else Spoken(voice or "flite", seed)
    return form if keep is None else Kept(form, keep)


def _show(terminal: Terminal, report: dict[str, Any]) -> None:
    terminal.say(f"{report['rows']} rows, {report['errors']} without a verdict")
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for heading in ("rows", "unsafe", "ASR", "FPR", "F1", "AUROC", "ECE"):
        table.add_column(heading, justify="right")
    parts = [("all", report["overall"]), ("length-matched", report["length_matched"])]
    parts += [(f"source {name}", part) for name, part in report["by_source"].items()]
    parts += [(f"as {name}", part) for name, part in report["by_modality"].items()]
    for name, part in parts:
        area = part["auroc"]
        against = part.get("auroc_against_others")
        table.add_row(
            name,
            str(part["rows"]),
            str(part["unsafe_rows"]),
            percent(part["asr"]),
            percent(part["fpr"]),
            number(part["f1"]),
            f"{number(against)}*" if area is None and against is not None else number(area),
            number(part["ece"]),
        )
    terminal.show(table)
    terminal.say("* against all rows of the other label")
    for name in ("asr", "fpr", "f1", "auroc", "ece"):
        low, high = report["overall"][f"{name}_interval"]
        terminal.say(f"{name.upper():6} 95 % interval {number(low)} to {number(high)}")
    at = ", ".join(f"{percent(v)} at {100 * float(k):g} %" for k, v in report["asr_at_fpr"].items())
    terminal.say(f"ASR at FPRs whose thresholds are chosen on these rows: {at}")
    words = report["baselines"]["bag_of_words"]
    terminal.say(
        f"Baselines: AUROC of length {number(report['baselines']['length']['auroc'])} "
        f"({number(report['length_matched']['length_auroc'])} on the length-matched rows), of a "
        f"bag of words {number(words['auroc'])} (learned from {words['trained_on']})"
    )
    for place in report["ended_at"]:
        layer = "full depth" if place["layer"] is None else f"layer {place['layer']}"
        terminal.say(
            f"Decided at {layer} ({place['stage']}): {percent(place['harmful'])} of the harmful, "
            f"{percent(place['harmless'])} of the harmless rows, {percent(place['refused'])} of "
            f"them refused, median {number(place['median_ms'], 0)} ms"
        )
    times = report["time_to_verdict_ms"]
    terminal.say(
        f"Time to verdict: median {number(times['median'], 0)} ms, 90 % within "
        f"{number(times['p90'], 0)} ms, longest {number(times['max'], 0)} ms"
    )
