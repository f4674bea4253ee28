"""`edge-safe doctor`: what this machine can run, and why not, in the order to fix it."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from edge_safe.cli import options
from edge_safe.cli.console import Terminal
from edge_safe.cli.doctor import basics, nvidia, providers
from edge_safe.cli.doctor.asking import ask
from edge_safe.cli.doctor.check import Check
from edge_safe.runtime.jetson import this_jetson

_PROVIDER = "Provider "


def command(
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Say what this machine can run, and why not, in the order to fix it."""
    terminal = Terminal(as_json, quiet, verbose)
    checks = examine()
    ok = all(check.status != "missing" for check in checks)
    terminal.document({"ok": ok, "checks": [asdict(check) for check in checks]})
    table = Table(box=None, pad_edge=False)
    for heading in ("", "", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[red]missing[/]"}
    for check in checks:
        table.add_row(marks[check.status], Text(check.name), Text(check.found), Text(check.advice))
    terminal.show(table)
    running = ", ".join(
        check.name.removeprefix(_PROVIDER)
        for check in checks
        if check.name.startswith(_PROVIDER) and check.status == "ok"
    )
    terminal.say(
        f"This machine can run bundles on: {running}."
        if ok
        else "This machine cannot run bundles yet."
    )
    return 0 if ok else 1


def examine() -> list[Check]:
    """All findings, most basic first."""
    jetson = this_jetson()
    return [
        basics.python(),
        basics.system(),
        basics.processor(),
        basics.memory(),
        providers.wheel_check(jetson),
        basics.swap(wanted=jetson is not None),
        basics.disk(),
        *(nvidia.jetson_checks(jetson) if jetson else ()),
        *nvidia.nvidia_checks(ask("look"), jetson),
        *providers.provider_checks(jetson),
        *(basics.extra(name) for name in basics.PACKAGES_OF_EXTRA),
    ]
