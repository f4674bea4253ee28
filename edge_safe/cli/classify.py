"""`edge-safe classify`: verdicts on many rows, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edge_safe.cli import options
from edge_safe.cli.console import Terminal
from edge_safe.errors import UsageError


def command(
    bundle: options.Bundle,
    input_file: Annotated[
        Path,
        typer.Option(
            "--input",
            metavar="A.jsonl",
            help='Rows {"id", "prompt", "image"?, "audio"?}, or a suite\'s folder or file.',
        ),
    ],
    output_file: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="B.jsonl",
            help='Rows {"id", "decision", "p_unsafe", "stage", "verdict_ms"}, in input order.',
        ),
    ],
    suite: options.SuiteName = "jsonl",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start afresh instead of going on.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Runs side by side; by default one a core."),
    ] = None,
    timeout: options.Timeout = None,
    policy: options.PolicyFile = None,
    provider: options.RunOn = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Judge many requests without answering them. Run it again to go on after a kill.

    Prompts of like length are judged in one run; verdict_ms is a row's share of it.

    A row whose picture or prompt cannot be used gets the decision "error" and is counted; it does
    not end the job.
    """
    from edge_safe.evaluation.judge import judge_many
    from edge_safe.evaluation.judgement_file import JudgementFile
    from edge_safe.evaluation.suites import read_suite
    from edge_safe.runtime.model import SafeModel

    terminal = Terminal(as_json, quiet, verbose)
    if output_file.resolve() == input_file.resolve():
        raise UsageError(f"--output {output_file} is the input; name another file")
    rows = read_suite(suite, input_file, labelled=False)
    results = JudgementFile(output_file, [row.id for row in rows], overwrite=overwrite)
    todo = [row for row in rows if row.id not in results.done]
    if len(todo) < len(rows):
        terminal.note(f"{len(rows) - len(todo)} of {len(rows)} rows were judged before")
    errors: list[dict[str, Any]] = []
    if todo:
        # One thread a run, for the runs go on side by side.
        model = SafeModel.load(bundle, provider=options.name_of(provider), threads=1, policy=policy)
        with results, terminal.progress("judging", len(todo)) as bar:
            for judgement in judge_many(model, todo, workers, timeout):
                results.add(judgement)
                if judgement.decision == "error":
                    errors.append({"id": judgement.id, "reason": judgement.reason})
                    terminal.warn(f"row {judgement.id!r}: {judgement.reason}")
                bar.advance(bar.task_ids[0])
    results.finish()
    counts = results.counts()
    terminal.document(
        {"output": str(output_file), "rows": len(rows), "judged_now": len(todo)}
        | {"decisions": counts, "errors": errors}
    )
    words = ", ".join(f"{count} {decision}" for decision, count in counts.items())
    terminal.say(f"{len(rows)} rows in {output_file}: {words}")
    return 0
