"""The tables of docs/plan.md, made of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from edge_safe.evaluation.planning.devices import DEVICES
from edge_safe.evaluation.planning.fitting import (
    KINDS,
    WITHIN,
    Check,
    apart,
    checks,
    constants_of,
    group,
    split,
)
from edge_safe.evaluation.planning.published import PHASES, SOURCES, Figure

LABELS = {"gpu": "GPUs", "thor": "Jetson Thor", "cpu": "CPUs"}


def refresh(page: str) -> str:
    """The page with every section between ``<!-- NAME -->`` and ``<!-- end -->`` made anew.

    Raises:
        ValueError: The page lacks a section.
    """
    for name, make in SECTIONS.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = page.partition(start)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"the page has no section '{name}' with an end")
        page = f"{before}{start}\n{make()}\n{end}{after}"
    return page


def devices_table() -> str:
    """Every device and power mode."""
    rows = (
        (
            f"`{device.name}`" if mode is device.modes[0] else "",
            device.label,
            mode.name,
            f"{device.memory_gb:.0f}",
            f"{mode.gb_per_second:g}",
            f"{mode.tflops:g}",
            f"{mode.int8_tops:g}",
        )
        for device in DEVICES
        for mode in device.modes
    )
    heads = (
        "`--device`",
        "",
        "power mode",
        "memory, GB",
        "GB/s",
        "dense TFLOPS",
        "dense INT8 TOPS",
    )
    sources = (f"- {device.label}: {'; '.join(device.sources)}" for device in DEVICES)
    return "\n".join([_table(heads, rows), *sources, ""])


def summary_table() -> str:
    """The constants, and how they did on what they were not fitted to."""
    rows = []
    for phase in PHASES:
        for kind in KINDS:
            if group(phase, kind) != kind:
                continue
            fitted, held_out = split(phase, kind)
            errors = [check.error for check in checks(phase, kind) if not check.fitted]
            within = sum(abs(error) <= WITHIN for error in errors)
            rows.append(
                (
                    phase,
                    LABELS[kind],
                    f"{getattr(constants_of(kind), phase):.3f}",
                    str(len(fitted)),
                    str(len(held_out)),
                    str(within),
                    f"{_percent(min(errors))} to {_percent(max(errors))}",
                )
            )
    heads = ("phase", "", "constant", "fitted", "held out", "within 35 %", "errors")
    return _table(heads, rows)


def held_out_table() -> str:
    """Every held-out figure beside its prediction."""
    found = (
        check
        for phase in PHASES
        for kind in KINDS
        if group(phase, kind) == kind
        for check in checks(phase, kind)
        if not check.fitted
    )
    return _checks(found)


def apart_table() -> str:
    """The figures that the formulas do not describe."""
    return _checks(apart())


def sources_list() -> str:
    """Where the published figures stand."""
    return "".join(f"- `{name}`: {text}\n" for name, text in SOURCES.items())


def fitted_table() -> str:
    """Every figure that was fitted."""
    found = (
        check
        for phase in PHASES
        for kind in KINDS
        if group(phase, kind) == kind
        for check in checks(phase, kind)
        if check.fitted
    )
    return _checks(found)


SECTIONS: dict[str, Callable[[], str]] = {
    "devices": devices_table,
    "summary": summary_table,
    "held out": held_out_table,
    "apart": apart_table,
    "sources": sources_list,
}


def _checks(found: Iterable[Check]) -> str:
    heads = ("phase", "device", "mode", "model", "tokens", "published", "predicted", "error", "")
    return _table(heads, _check_rows(found))


def _check_rows(found: Iterable[Check]) -> Iterator[tuple[str, ...]]:
    for check in found:
        figure = check.figure
        error = _percent(check.error)
        yield (
            figure.phase,
            figure.device.label,
            figure.mode.name,
            figure.model,
            str(figure.tokens or "-"),
            _value(figure, figure.seconds),
            _value(figure, check.predicted),
            error if abs(check.error) <= WITHIN else f"**{error}**",
            figure.source,
        )


def _value(figure: Figure, seconds: float) -> str:
    """Milliseconds, or tokens a second."""
    return (
        f"{1.0 / seconds:.1f} tok/s" if figure.phase == "decode" else f"{1000.0 * seconds:.1f} ms"
    )


def _percent(share: float) -> str:
    return f"{100.0 * share:+.0f} %"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
