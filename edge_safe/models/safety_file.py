"""``safety.json`` and ``safety.safetensors``: what a checkpoint folder says of its safety module.

The JSON file is typed and rejects fields it does not know; the tensors are a SafetyModule's state.
Knows nothing of the language model beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import torch
from safetensors.torch import load_file, save_file

from edge_safe.errors import CheckpointError
from edge_safe.evaluation.metrics import FloatArray, Interval, Knots, Method, calibrated
from edge_safe.models.control_tokens import ControlTokens
from edge_safe.models.safety_head import FINAL, SafetyConfig, SafetyModule

SAFETY_JSON = "safety.json"
SAFETY_TENSORS = "safety.safetensors"
SCHEMA_VERSION = 1

Medium = Literal["image", "audio"]
Modality = Literal["text"] | Medium
"""A way in: audio for whatever has sound, else image for whatever has a picture, else text."""


class AttentionShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shape of every safety attention of the module."""

    heads: int
    head_dim: int
    hidden: int


class Fitted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From log-odds to a decision: refuse when p_unsafe >= threshold.

    ``p_unsafe = sigmoid(scale * curve(log-odds) + bias)``; the curve is the identity without knots.

    Attributes:
        scale: Factor on the log-odds, verdict logit unsafe - safe.
        bias: Added to them.
        threshold: Lowest p_unsafe that is refused.
        fitted_on: The data, in words.
        rows: Number of rows fitted on.
        auroc: Area under the ROC curve on these rows.
        asr: Share of their harmful requests that pass at the threshold.
        fpr: Share of their harmless requests that are refused at it.
        method: How scale, bias and knots were fitted.
        knots: Points (log-odds, value) of an isotonic curve, straight lines between them, level
            beyond them; never falling. Empty for the other methods.
        target_fpr: The share of harmless rows that the threshold was to refuse at most.
        auroc_interval: 95 % interval of ``auroc``, from a stratified bootstrap.
        asr_interval: 95 % interval of ``asr`` for the threshold as it is (Clopper & Pearson).
        fpr_interval: 95 % interval of ``fpr``, likewise.
    """

    scale: float
    bias: float
    threshold: float
    fitted_on: str
    rows: int
    auroc: float
    asr: float
    fpr: float
    method: Method = "platt"
    knots: Knots = ()
    target_fpr: float | None = None
    auroc_interval: Interval | None = None
    asr_interval: Interval | None = None
    fpr_interval: Interval | None = None

    def p_unsafe(self, log_odds: FloatArray) -> FloatArray:
        """Calibrated probabilities of log-odds, of their shape."""
        return calibrated(log_odds, self.scale, self.bias, self.knots)


class Calibration(Fitted, frozen=True, forbid_unknown_fields=True):
    """One stage: its calibration for text, and those of the other ways in that have their own.

    Attributes:
        modalities: By way in; one that is absent uses the stage's own.
    """

    modalities: dict[Medium, Fitted] = {}

    def of(self, modality: Modality) -> Fitted:
        """The calibration of requests that come in this way."""
        return self if modality == "text" else self.modalities.get(modality, self)


class EarlyExit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Two heads that judge one after the other; see ``early_exit.fit_early_exit``.

    Attributes:
        layer: The lower head, which may refuse and never allow.
        calibration: Its own, with the threshold from which on a request ends there; ``asr`` is
            the share of harmful rows that go on, ``fpr`` that of harmless ones refused there.
        gate: The calibration of the head at the exit layer, which decides all others; ``asr`` and
            ``fpr`` are those of both together.
    """

    layer: int
    calibration: Calibration
    gate: Calibration


class SafetyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of ``safety.json``.

    Attributes:
        safe_token: String of the safe token; ``unsafe_token`` likewise.
        safe_token_id: Its row; ``unsafe_token_id`` likewise.
        layers: Depths that have a head; empty where only ``final`` was trained.
        exit_layer: The head used unless another is asked for; None without heads.
        attention: Shape of the safety attentions; None without heads.
        eps: Epsilon of the module's norms.
        calibration: Per stage, ``gate.<k>`` or ``final``.
        joined: See ``SafetyConfig``.
        early: The head that ends clear cases before the exit layer; None without one.
        schema_version: Version of this layout.
    """

    safe_token: str
    unsafe_token: str
    safe_token_id: int
    unsafe_token_id: int
    layers: tuple[int, ...]
    exit_layer: int | None
    attention: AttentionShape | None
    eps: float
    calibration: dict[str, Calibration]
    joined: tuple[int, ...] = ()
    early: EarlyExit | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def tokens(self) -> ControlTokens:
        """The control tokens."""
        return ControlTokens(
            self.safe_token, self.unsafe_token, self.safe_token_id, self.unsafe_token_id
        )

    def stage(self, name: str) -> Calibration:
        """Calibration of one stage.

        Raises:
            CheckpointError: The stage was not calibrated; the message lists those that were.
        """
        if name not in self.calibration:
            known = ", ".join(self.calibration) or "none"
            raise CheckpointError(
                f"Stage {name} has no calibration; calibrated stages: {known}. "
                "Choose one of these, or train and calibrate that head."
            )
        return self.calibration[name]


def stage_name(layer: int | None) -> str:
    """Name of a stage: ``gate.<layer>``, or ``final`` for None."""
    return FINAL if layer is None else f"gate.{layer}"


def describe(
    config: SafetyConfig,
    tokens: ControlTokens,
    exit_layer: int | None,
    calibration: dict[str, Calibration],
    early: EarlyExit | None = None,
) -> SafetyFile:
    """The ``safety.json`` of a module of this shape."""
    return SafetyFile(
        safe_token=tokens.safe,
        unsafe_token=tokens.unsafe,
        safe_token_id=tokens.safe_id,
        unsafe_token_id=tokens.unsafe_id,
        layers=config.layers,
        exit_layer=exit_layer,
        attention=AttentionShape(
            config.attention_heads, config.attention_head_dim, config.attention_hidden
        )
        if config.layers
        else None,
        eps=config.eps,
        calibration=calibration,
        joined=config.joined,
        early=early,
    )


def write_safety(folder: Path, safety: SafetyModule, file: SafetyFile) -> None:
    """Writes both files into an existing folder."""
    tensors = {
        name: tensor.detach().float().cpu().contiguous()
        for name, tensor in safety.state_dict().items()
    }
    save_file(tensors, folder / SAFETY_TENSORS, metadata={"format": "pt"})
    encoded = msgspec.json.format(msgspec.json.encode(file), indent=2)
    (folder / SAFETY_JSON).write_bytes(encoded + b"\n")


def read_safety_file(folder: Path) -> SafetyFile:
    """Reads ``safety.json``.

    Raises:
        CheckpointError: The file is missing, malformed, or of a newer schema.
    """
    path = folder / SAFETY_JSON
    try:
        file = msgspec.json.decode(path.read_bytes(), type=SafetyFile)
    except OSError as error:
        raise CheckpointError(
            f"{folder} has no readable {SAFETY_JSON} ({error.strerror}). "
            "Train a safety module first: edge-safe train RECIPE.toml."
        ) from error
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Write it again.") from error
    if file.schema_version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema {file.schema_version}, this version reads up to {SCHEMA_VERSION}. "
            "Update edge-safe."
        )
    return file


def read_safety(folder: Path) -> tuple[SafetyFile, SafetyModule]:
    """Reads ``safety.json`` and builds the module with its tensors, fp32 on the CPU.

    Raises:
        CheckpointError: A file is missing or the tensors do not fit the description.
    """
    file = read_safety_file(folder)
    path = folder / SAFETY_TENSORS
    if not path.exists():
        raise CheckpointError(f"{folder} has {SAFETY_JSON} but no {SAFETY_TENSORS}.")
    tensors = load_file(path)
    rows = tensors.get("final.rows")
    if rows is None:
        raise CheckpointError(f"{path} lacks final.rows. Write the checkpoint again.")
    shape = file.attention
    sizes = (shape.heads, shape.head_dim, shape.hidden) if shape else (1, 1, 1)
    safety = SafetyModule(SafetyConfig(int(rows.shape[1]), file.layers, *sizes, eps=file.eps))
    try:
        safety.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {SAFETY_JSON}: {error}") from error
    safety.join(file.joined)
    return file, safety.requires_grad_(False).to(torch.float32).eval()
