"""Constants of one device, from what ``edge-safe bench --json`` printed there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from edge_safe.errors import DataError, UsageError
from edge_safe.evaluation.planning.bundle_work import bundle_work
from edge_safe.evaluation.planning.devices import Device, Mode
from edge_safe.evaluation.planning.fitting import constants_of
from edge_safe.evaluation.planning.formulas import Constants, compute_seconds, read_seconds
from edge_safe.evaluation.planning.pictures import picture
from edge_safe.evaluation.planning.step import Step
from edge_safe.evaluation.speed.measure import SHORT_CACHE
from edge_safe.runtime.bundle import Bundle

_LEAST_SHARE = 0.02
"""Of a measured time that is left to the operations where reading alone would take all of it."""


class _Name(msgspec.Struct, frozen=True):
    """What was measured."""

    name: str
    precision: str


class _Bench(msgspec.Struct, frozen=True):
    """The part of the document that is needed; it has many fields more."""

    bundle: _Name
    prompt_tokens: int
    prefill_ms: float
    decode_ms_per_token: float
    encode_image_ms: float | None = None


def measured_constants(file: Path, bundle: Bundle, device: Device, mode: Mode) -> Constants:
    """Shares of the device's peaks that this bundle reached there.

    Without a measured picture the fitted constant of encoding stays.

    Args:
        file: What ``edge-safe bench DIR --json`` printed on the device.
        bundle: The same bundle.
        device: The row of the device.
        mode: The power mode it was in.

    Raises:
        DataError: The file cannot be read or is no such document.
        UsageError: It is of another bundle.
    """
    bench = _read(file)
    manifest = bundle.manifest
    if (bench.bundle.name, bench.bundle.precision) != (manifest.name, manifest.precision):
        raise UsageError(
            f"{file} was measured with {bench.bundle.name}, {bench.bundle.precision}; this bundle "
            f"is {manifest.name}, {manifest.precision}. Measure this one with `edge-safe bench`."
        )
    work = bundle_work(bundle)
    token = work.decode(SHORT_CACHE)
    unit = Constants(1.0, 1.0, 1.0)
    decode = read_seconds(token, mode, unit) / (bench.decode_ms_per_token / 1000.0)
    known = replace(constants_of(device.kind), decode=decode)
    prefill = _share(work.prefill(bench.prompt_tokens), bench.prefill_ms / 1000.0, mode, known)
    known = replace(known, prefill=prefill)
    seen = picture(bundle) if bench.encode_image_ms is not None else None
    if seen is None or bench.encode_image_ms is None:
        return known
    return replace(known, encode=_share(seen.step, bench.encode_image_ms / 1000.0, mode, known))


def _share(step: Step, took: float, mode: Mode, known: Constants) -> float:
    """Share of the peak that the operations reached in the time that reading leaves."""
    left = max(took - read_seconds(step, mode, known), took * _LEAST_SHARE)
    return compute_seconds(step, mode) / left


def _read(file: Path) -> _Bench:
    """The document.

    Raises:
        DataError: It cannot be read, or has no such fields.
    """
    try:
        bench = msgspec.json.decode(file.read_bytes(), type=_Bench)
    except OSError as error:
        raise DataError(f"Cannot read {file}: {error}.") from error
    except msgspec.MsgspecError as error:
        raise DataError(
            f"{file} is not what `edge-safe bench --json` prints: {error}. Run it on the device "
            "and keep its output."
        ) from error
    if min(bench.prompt_tokens, bench.prefill_ms, bench.decode_ms_per_token) <= 0:
        raise DataError(f"{file} has times that are not positive; run the measurement again.")
    return bench
