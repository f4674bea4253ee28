"""The small file that says how a verdict is turned into a decision.

A policy moves thresholds, chooses the stages that are asked and holds the texts of a refusal. It
cannot switch the gate off: at least one stage is always asked, and only the last one may allow.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from edge_safe.errors import PolicyError

Stage = Literal["gate", "final"]

STAGES: tuple[Stage, ...] = ("gate", "final")

REFUSAL = "I can't help with that request."


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How verdicts become decisions.

    Attributes:
        stages: The stages asked, in their order; empty asks the bundle's earliest one. Every
            stage may refuse, only the last one asked may allow.
        thresholds: Replaces a stage's fitted threshold: refuse when p_unsafe >= threshold.
        early_threshold: The same for the gate's early exit, where a bundle has one. The two are
            fitted together: a policy that moves the gate's and not this one has no early exit.
        max_asr: For ``export --exit-layer auto``: the share of harmful validation requests that the
            gate may let pass, in each way in; the earliest layer within it is taken.
        language: Which of ``refusals`` is shown.
        refusals: Text of a refusal by language.
    """

    stages: tuple[Stage, ...] = ()
    thresholds: dict[Stage, float] = {}
    early_threshold: float | None = None
    max_asr: float | None = None
    language: str = "en"
    refusals: dict[str, str] = msgspec.field(default_factory=lambda: {"en": REFUSAL})

    def refusal(self) -> str:
        """The text shown instead of an answer."""
        return self.refusals[self.language]


def check_policy(policy: Policy) -> Policy:
    """Checks what the types cannot say and returns the policy.

    Raises:
        PolicyError: Stages out of order or twice, a threshold outside [0, 1], or a language
            without a refusal text.
    """
    if list(policy.stages) != [stage for stage in STAGES if stage in policy.stages]:
        raise PolicyError(
            f"The policy's stages are {list(policy.stages)}; name each stage once, in the order "
            f"{list(STAGES)}."
        )
    thresholds = {f"stage '{stage}'": number for stage, number in policy.thresholds.items()}
    if policy.early_threshold is not None:
        thresholds["the early exit"] = policy.early_threshold
    if policy.max_asr is not None and not 0.0 <= policy.max_asr <= 1.0:
        raise PolicyError(f"The policy's max_asr is {policy.max_asr}; give 0 to 1.")
    for name, threshold in thresholds.items():
        if not math.isfinite(threshold) or not 0.0 <= threshold <= 1.0:
            raise PolicyError(f"The threshold of {name} is {threshold}; give 0 to 1.")
    if policy.language not in policy.refusals:
        known = ", ".join(sorted(policy.refusals)) or "none"
        raise PolicyError(
            f"The policy has no refusal text for language '{policy.language}' (there is: {known}). "
            "Add one under 'refusals' or choose another 'language'."
        )
    return policy


def load_policy(path: Path) -> Policy:
    """Reads a policy from a TOML or JSON file.

    Raises:
        PolicyError: The file is missing, is neither TOML nor JSON, or does not fit the schema; an
            unknown key is answered with the nearest known one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"Cannot read the policy file {path}: {error}.") from error
    try:
        raw = msgspec.json.decode(text) if path.suffix == ".json" else _decode_toml(text)
    except ValueError as error:
        raise PolicyError(f"The policy file {path} cannot be parsed: {error}.") from error
    return parse_policy(raw, str(path))


def parse_policy(raw: object, origin: str) -> Policy:
    """Turns decoded data into a checked policy; ``origin`` names the file in messages.

    Raises:
        PolicyError: See ``load_policy``.
    """
    if not isinstance(raw, Mapping):
        raise PolicyError(f"The policy in {origin} is not a table of settings.")
    known = list(Policy.__struct_fields__)
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise PolicyError(
                f"Unknown key '{key}' in the policy {origin}; did you mean '{near}'? "
                f"Known keys: {', '.join(known)}."
            )
    try:
        return check_policy(msgspec.convert(raw, Policy))
    except msgspec.ValidationError as error:
        raise PolicyError(f"The policy {origin} does not fit: {error}.") from error


def _decode_toml(text: str) -> Any:
    """Decodes TOML with the standard library, or with tomli on Python 3.10."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise PolicyError(
                "Python 3.10 cannot read TOML by itself; write the policy as .json, or install "
                "tomli."
            ) from error
    return tomllib.loads(text)
