"""One finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    Attributes:
        name: What was looked at.
        status: ``ok``, ``note`` (works, with a limit) or ``missing`` (keeps bundles from running).
        found: What is there.
        advice: What to do; empty when there is nothing to do.
    """

    name: str
    status: str
    found: str
    advice: str = ""


def version(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
