"""What of a checkpoint's safety module goes into a bundle, and under which calibration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from edge_safe.errors import ExportError, UsageError
from edge_safe.export.families.base import Opened, float_array
from edge_safe.export.graphs.early_exit import rows_of_gate_past
from edge_safe.export.graphs.safety import GateHead, GateSource, TokenRows
from edge_safe.models.safety_file import SAFETY_JSON, Calibration, SafetyFile, read_safety
from edge_safe.models.safety_file import stage_name as stage_key
from edge_safe.models.safety_head import SafetyModule, TokenReadout
from edge_safe.runtime.calibration import StageCalibration
from edge_safe.runtime.policy import STAGES, Stage


@dataclass(frozen=True, slots=True)
class EarlyPlan:
    """The head of a bundle's early exit.

    Attributes:
        layer: Where it reads.
        head: In arrays.
        calibration: Carried over from torch.
    """

    layer: int
    head: GateHead
    calibration: StageCalibration


@dataclass(frozen=True, slots=True)
class SafetyPlan:
    """The safety part of a bundle.

    Attributes:
        safe_token_id: Row of the safe token.
        unsafe_token_id: Row of the unsafe token.
        exit_layer: Layer of the gate, None for the ``final`` stage alone.
        layers: Layers that have a head in the checkpoint.
        head: The gate's head in arrays, None without a gate.
        final: The ``final`` stage's rows.
        stages: Calibrations carried over from torch.
        module: The torch module, None for a model that was only fine-tuned to emit two tokens.
        early: What ends clear cases before the exit layer; None without it.
    """

    safe_token_id: int
    unsafe_token_id: int
    exit_layer: int | None
    layers: tuple[int, ...]
    head: GateHead | None
    final: TokenRows
    stages: dict[Stage, StageCalibration]
    module: SafetyModule | None
    early: EarlyPlan | None = None

    @property
    def columns(self) -> list[int]:
        """Layers whose entering states stand in gate_past, in their order."""
        if self.head is None:
            return []
        return rows_of_gate_past(self.head, None if self.early is None else self.early.head)

    @property
    def first_stage(self) -> Stage:
        """The stage that a bundle asks when its policy says nothing."""
        return next(stage for stage in STAGES if stage in self.stages)


def check_tokens(source: Path, safe_token: str | None, unsafe_token: str | None) -> bool:
    """Whether the two tokens take the place of a safety module; before anything is loaded.

    Raises:
        UsageError: Only one is given, or the checkpoint has a safety module.
    """
    if (safe_token is None) != (unsafe_token is None):
        raise UsageError("The safe and the unsafe token go together; give both or neither.")
    if safe_token is None:
        return False
    if (source / SAFETY_JSON).exists():
        raise UsageError(
            f"{source} has a safety module ({SAFETY_JSON}) that names its tokens; leave the safe "
            "and the unsafe token out."
        )
    return True


def choose_layer(file: SafetyFile, wanted: str, bound: float | None = None) -> int | None:
    """The gate's layer from ``auto``, ``none`` or a number.

    Args:
        file: The heads there are.
        wanted: As it was asked for.
        bound: For ``auto``, the calibrated ASR a head may have at most; without it the
            checkpoint's own exit layer is taken.

    Raises:
        UsageError: It is none of these.
        ExportError: There is no head at that layer; the message lists those there are.
    """
    if wanted == "auto":
        return file.exit_layer if bound is None else earliest(file, bound)
    if wanted == "none":
        return None
    if not wanted.isdecimal():
        raise UsageError(f"The exit layer is {wanted!r}; give auto, none or a layer's number.")
    layer = int(wanted)
    if layer not in file.layers:
        known = ", ".join(map(str, file.layers)) or "none"
        raise ExportError(
            f"There is no safety head at layer {layer}; layers with a head: {known}. "
            "Choose one of these, or train a head there."
        )
    return layer


def earliest(file: SafetyFile, bound: float) -> int:
    """The lowest head whose calibrated ASR, in every way in, is within a bound.

    Raises:
        ExportError: No head is; the message gives the ASR of each.
    """
    found: dict[int, float] = {}
    for layer in sorted(file.layers):
        fitted = file.calibration.get(stage_key(layer))
        if fitted is not None:
            found[layer] = max(one.asr for one in (fitted, *fitted.modalities.values()))
            if found[layer] <= bound:
                return layer
    rates = ", ".join(f"{layer}: {rate:.3f}" for layer, rate in found.items()) or "none"
    raise ExportError(
        f"No head's calibrated ASR is within the policy's max_asr of {bound:g} in every way in "
        f"(layer: ASR in the worst one: {rates}). Raise max_asr, or train a better head."
    )


def plan_from_module(source: Path, wanted: str, bound: float | None = None) -> SafetyPlan:
    """Reads the safety module beside a checkpoint; see ``choose_layer``.

    Raises:
        CheckpointError: There is none, or it cannot be read.
        UsageError: See ``choose_layer``.
        ExportError: See ``choose_layer``.
    """
    file, module = read_safety(source)
    layer = choose_layer(file, wanted, bound)
    # The two were fitted for each other; a layer that is asked for by its number decides alone.
    paired = wanted == "auto" and layer == file.exit_layer
    early = file.early if paired and layer is not None else None
    stages: dict[Stage, StageCalibration] = {}
    if layer is not None:
        stages["gate"] = (
            _calibration(file, stage_key(layer)) if early is None else stage_calibration(early.gate)
        )
    stages["final"] = _calibration(file, stage_key(None))
    return SafetyPlan(
        safe_token_id=file.safe_token_id,
        unsafe_token_id=file.unsafe_token_id,
        exit_layer=layer,
        layers=tuple(file.layers),
        head=None if layer is None else gate_head(module, layer),
        final=token_rows(module.final),
        stages=stages,
        module=module,
        early=None
        if early is None
        else EarlyPlan(
            early.layer, gate_head(module, early.layer), stage_calibration(early.calibration)
        ),
    )


def plan_from_tokens(opened: Opened, safe_token: str, unsafe_token: str) -> SafetyPlan:
    """Takes lm_head's own rows of two tokens as the ``final`` stage.

    Raises:
        ExportError: A string is not exactly one token of the tokenizer.
    """
    safe = _token_id(opened.tokenizer, safe_token)
    unsafe = _token_id(opened.tokenizer, unsafe_token)
    name = "model.embed_tokens.weight" if opened.spec.tied else "lm_head.weight"
    rows = opened.tensor(name)[[unsafe, safe]]
    final = TokenRows(rows, None)
    return SafetyPlan(safe, unsafe, None, (), None, final, {"final": StageCalibration()}, None)


def gate_head(module: SafetyModule, layer: int) -> GateHead:
    """What decides at a layer as arrays: the heads of several layers become one.

    The verdict is linear in the read-outs of the heads, so their mean has all their attention heads
    side by side, block-diagonal inner layers, and shares of the outer one and of the rows.
    """
    layers = module.layers_at(layer)
    heads = [module.head(k) for k in layers]
    attentions = [head.attention for head in heads]
    share = 1.0 / len(heads)
    return GateHead(
        sources=tuple(
            GateSource(
                layer=k,
                token=replace(rows := token_rows(head.token), rows=rows.rows * np.float32(share)),
                attention_norm=float_array(head.attention.norm.weight),
                key=float_array(head.attention.key.weight),
                value=float_array(head.attention.value.weight),
            )
            for k, head in zip(layers, heads, strict=True)
        ),
        query=float_array(torch.cat([a.query for a in attentions])),
        slope=float_array(torch.cat([a.slope for a in attentions])),
        up_weight=float_array(torch.block_diag(*[a.up.weight for a in attentions])),
        up_bias=float_array(torch.cat([a.up.bias for a in attentions])),
        down_weight=float_array(torch.cat([a.down.weight for a in attentions], 1) * share),
        down_bias=float_array(torch.stack([a.down.bias for a in attentions]).mean(0)),
    )


def token_rows(readout: TokenReadout) -> TokenRows:
    """A torch token read-out as arrays."""
    norm = readout.norm
    return TokenRows(float_array(readout.rows), float_array(norm.weight), norm.eps)


def stage_calibration(fitted: Calibration) -> StageCalibration:
    """A calibration as the manifest has it: the same fields."""
    return msgspec.convert(msgspec.to_builtins(fitted), StageCalibration)


def _calibration(file: SafetyFile, key: str) -> StageCalibration:
    """The torch calibration of a stage; the plain sigmoid for one that was never calibrated."""
    fitted: Calibration | None = file.calibration.get(key)
    if fitted is None:
        return StageCalibration()
    return stage_calibration(fitted)


def _token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    index = tokenizer.get_vocab().get(text)
    if index is None:
        raise ExportError(
            f"{text!r} is no token of the checkpoint's tokenizer. Give the strings exactly as "
            "tokenizer.json has them."
        )
    return int(index)
