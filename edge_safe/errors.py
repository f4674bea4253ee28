"""Every error a user can meet.

Each class carries the exit code the command line ends with; ``edge_safe.cli`` is the one place
that turns an error into a message. A message says what was wrong, with what value, and what to
do next. This module knows nothing of torch, ONNX or terminals.
"""

from __future__ import annotations

from typing import ClassVar


class EdgeSafeError(Exception):
    """Base of every error raised on purpose."""

    exit_code: ClassVar[int] = 1


class UsageError(EdgeSafeError):
    """The command or call was put together wrongly."""

    exit_code: ClassVar[int] = 2


class RecipeError(UsageError):
    """A training recipe has an unknown key, a wrong type or an impossible value."""


class BundleError(EdgeSafeError):
    """A bundle folder is missing, incomplete or cannot be used here."""


class IntegrityError(BundleError):
    """A file of a bundle is not the one its manifest names."""


class SchemaError(BundleError):
    """A manifest does not follow the schema this version reads."""


class ProviderError(EdgeSafeError):
    """The ONNX Runtime execution provider asked for is not the one that would run."""


class MediaError(EdgeSafeError):
    """A picture or a sound cannot be read, is too large, or cannot be judged by this bundle."""


class PromptError(EdgeSafeError):
    """A prompt is empty or does not fit the context."""


class PolicyError(EdgeSafeError):
    """A policy file is malformed or asks for a stage that the bundle does not have."""


class ExportError(EdgeSafeError):
    """A checkpoint cannot be exported, or the target folder cannot be written."""


class PartsError(EdgeSafeError):
    """A pretrained part cannot be fetched, or its hash differs from the pinned one."""


class DataError(EdgeSafeError):
    """A data file is missing, malformed or lacks a required field."""


class JudgeError(EdgeSafeError):
    """A judge of answers cannot be opened, or cannot tell."""


class PeerError(EdgeSafeError):
    """A peer that a bundle is to be compared with is unknown, not set up, or broke."""


class WheelError(EdgeSafeError):
    """A wheel for another machine cannot be had or does not serve there."""


class CheckpointError(EdgeSafeError):
    """A checkpoint folder lacks what a safety-token model needs."""


class GateError(EdgeSafeError):
    """The gate could not decide. The runtime turns it into ``Decision.ERROR`` and never answers."""

    exit_code: ClassVar[int] = 4
