"""Which onnxruntime is installed, and which of its providers really start."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from importlib import metadata

from edge_safe.cli.doctor.asking import Answer, ask
from edge_safe.cli.doctor.check import Check, version
from edge_safe.runtime.jetson import Jetson
from edge_safe.runtime.libraries import JETSON_WHEEL, diagnose, how_to_get

WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-qnn", "onnxruntime-openvino")

_TAG = re.compile(r"^Tag: .*-(\S+)$", re.MULTILINE)


def wheel_check(jetson: Jetson | None, wheels: Sequence[str] = WHEELS) -> Check:
    """The installed onnxruntime; there are several, which exclude each other."""
    name = "onnxruntime"
    there = [package for package in wheels if version(package)]
    if not there:
        return Check(name, "missing", "not installed", "pip install 'edge-safe[cpu]' (or [gpu])")
    found = ", ".join(f"{package} {version(package)}" for package in there)
    if len(there) > 1:
        return Check(
            name, "note", found, "these wheels overwrite each other: uninstall all, install one"
        )
    tags = _TAG.findall(metadata.distribution(there[0]).read_text("WHEEL") or "")
    # What somebody built for Jetson is tagged linux_aarch64; an index serves manylinux alone.
    if jetson and there[0] == "onnxruntime-gpu" and any("manylinux" in tag for tag in tags):
        return Check(
            name, "note", f"{found} of the package index, without kernels for Jetson", JETSON_WHEEL
        )
    return Check(name, "ok", found)


def provider_checks(jetson: Jetson | None) -> list[Check]:
    """Every provider: is it compiled in, and does it start?"""
    if not any(version(package) for package in WHEELS):
        return []  # said before
    first = ask("start", "cpu")
    names = first.document["names"] if first.document else {}
    checks = [_provider("cpu", names.get("cpu"), first, jetson)]
    for provider, name in names.items():
        if provider != "cpu":
            answer = ask("start", provider) if name else first
            checks.append(_provider(provider, name, answer, jetson))
    return checks


def _provider(provider: str, name: str | None, answer: Answer, jetson: Jetson | None) -> Check:
    title, status = f"Provider {provider}", "missing" if provider == "cpu" else "note"
    remedy = how_to_get(provider, jetson, platform.machine())
    if answer.document and name is None:
        reason = answer.document["reason"] if provider == "cpu" else ""
        return Check(title, status, reason or "not in this onnxruntime", remedy)
    if answer.document and answer.document["started"]:
        return Check(title, "ok", str(name))
    reason, loading = answer.ending, answer.output
    if answer.document:
        reason, loading = answer.document["reason"], answer.document["loading"] or ""
    found = diagnose(f"{loading}\n{reason}", jetson)
    if found:
        return Check(title, status, f"does not start: {found.what}", found.remedy)
    return Check(title, status, f"does not start: {reason}", remedy)
