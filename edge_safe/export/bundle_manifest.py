"""The manifest of a bundle whose graphs stand: what is known before it is calibrated and tested."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge_safe.errors import ExportError
from edge_safe.export.bundle_files import describe_graphs, provenance
from edge_safe.export.families.base import Opened
from edge_safe.export.safety_plan import SafetyPlan
from edge_safe.runtime import manifest as schema
from edge_safe.runtime.calibration import StageCalibration
from edge_safe.runtime.policy import Policy, Stage


def draft_manifest(
    folder: Path,
    source: Path,
    opened: Opened,
    plan: SafetyPlan,
    *,
    family: str,
    target: str,
    precision: str,
    command: str,
    policy: Policy,
) -> schema.Manifest:
    """The manifest without files, and with the torch model's calibration.

    Args:
        folder: The bundle being built; its graphs are described.
        source: The checkpoint folder.
        opened: The checkpoint.
        plan: Its safety part.
        family: The model_type.
        target: Name of the target.
        precision: Name of the row of the table of precisions.
        command: The call, for the provenance.
        policy: What the bundle comes with.

    Raises:
        ExportError: The checkpoint names no end-of-text token.
    """
    return schema.Manifest(
        name=source.resolve().name,
        family=family,
        target=target,
        precision=precision,
        modalities={n: schema.Modality(t) for n, t in opened.modalities.items()},
        files={},
        graphs=describe_graphs(folder),
        model=_model_info(opened),
        processors=opened.processors,
        safety=_safety(plan, policy),
        provenance=provenance(source, command),
    )


def with_stages(
    manifest: schema.Manifest,
    stages: dict[Stage, StageCalibration],
    early: StageCalibration | None = None,
    *,
    refitted: bool = False,
) -> schema.Manifest:
    """The manifest with another calibration of its stages; without ``early`` they decide alone."""
    there = manifest.safety.early
    safety = msgspec.structs.replace(
        manifest.safety,
        stages=stages,
        early=None if there is None or early is None else schema.EarlyExit(there.layer, early),
        refitted=refitted,
    )
    return msgspec.structs.replace(manifest, safety=safety)


def _safety(plan: SafetyPlan, policy: Policy) -> schema.Safety:
    attention = None
    if plan.head is not None:
        attention = schema.AttentionInfo(plan.columns)
    return schema.Safety(
        safe_token_id=plan.safe_token_id,
        unsafe_token_id=plan.unsafe_token_id,
        control_token_ids=[plan.safe_token_id, plan.unsafe_token_id],
        exit_layer=plan.exit_layer,
        layers=list(plan.layers),
        attention=attention,
        stages=plan.stages,
        policy=policy,
        early=None
        if plan.early is None
        else schema.EarlyExit(plan.early.layer, plan.early.calibration),
    )


def _model_info(opened: Opened) -> schema.ModelInfo:
    """What the engine has to know, with the tokens that end an answer."""
    spec = opened.spec
    ends = getattr(opened.language.generation_config, "eos_token_id", None)
    if ends is None:
        ends = opened.tokenizer.eos_token_id
    ids = [ends] if isinstance(ends, int) else list(ends or [])
    if not ids:
        raise ExportError("The checkpoint names no end-of-text token (eos_token_id).")
    pad = opened.tokenizer.pad_token_id
    return schema.ModelInfo(
        layers=spec.layers,
        hidden_size=spec.hidden_size,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        context_length=spec.context_length,
        eos_token_ids=[int(index) for index in ids],
        pad_token_id=int(ids[0] if pad is None else pad),
        bidirectional=spec.bidirectional,
        position_axes=3 if spec.position_axes == 3 else 1,
        deepstack=spec.deepstack,
    )
