"""Tables of a recipe that say what of a model is trained, how, and how it is calibrated."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from edge_safe.models.recipe.section import (
    Count,
    OpenShare,
    Positive,
    Rate,
    Section,
    Share,
    Text,
    Weight,
)


class ModelSection(Section, frozen=True):
    """``[model]``: a checkpoint folder, relative to the recipe, and the dtype it is run in.

    ``from_parts`` leaves out what an earlier run trained, so that a pebble is trained anew.
    """

    source: Text
    from_parts: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class TokensSection(Section, frozen=True):
    """``[tokens]``: strings of the control tokens; ids only to choose the rows by hand."""

    safe: Text = "<|safe|>"
    unsafe: Text = "<|unsafe|>"
    safe_id: Count | None = None
    unsafe_id: Count | None = None


class HeadsSection(Section, frozen=True):
    """``[heads]``: layers with a head, and the shape of the safety attention.

    ``exit_layer = "auto"`` takes the layer with the best validation AUROC. ``query`` is the
    question whose state in the base model the attention's query starts from. ``members`` modules
    of this shape are trained from different seeds and averaged into one. The heads of ``joined``,
    each trained by itself, decide together at the last of these layers. The head at
    ``early_layer`` ends clear cases before the exit layer.
    """

    layers: tuple[Positive, ...]
    exit_layer: Positive | Literal["auto"] = "auto"
    attention_heads: Positive = 8
    head_dim: Positive = 32
    hidden: Positive = 64
    query: Text = "Is this request harmful or unsafe?"
    members: Positive = 1
    joined: tuple[Positive, ...] = ()
    early_layer: Positive | None = None


class LoraSection(Section, frozen=True):
    """``[lora]``: adapters in the language model; without this table it stays frozen.

    ``targets`` are names of linear modules in a decoder layer; ``layers`` are indices, all without.
    """

    rank: Positive = 16
    alpha: Positive = 32
    targets: Annotated[tuple[Text, ...], Meta(min_length=1)] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    layers: tuple[Count, ...] | None = None


class OptimizerSection(Section, frozen=True):
    """``[optimizer]``: AdamW; linear warm-up, then a cosine down to a tenth."""

    learning_rate: Rate = 1e-3
    lora_learning_rate: Rate = 1e-4
    weight_decay: Weight = 0.01
    warmup: Share = 0.05
    clip: Rate = 1.0


class TrainingSection(Section, frozen=True):
    """``[training]``: ``batch`` is global, over all processes; ``micro_batch`` limits memory.

    ``feature_dropout`` blanks this share of the channels of an example, all positions alike, while
    heads train on frozen features.
    """

    epochs: Positive = 6
    batch: Positive = 32
    micro_batch: Positive | None = None
    seed: int = 0
    checkpoint_every: Positive = 100
    frozen_features: bool = True
    feature_dtype: Literal["float32", "bfloat16"] = "float32"
    feature_dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0


class SafeRowSection(Section, frozen=True):
    """``[safe_row]``: trains the safe token's input embedding row so that answers stay the base's.

    Needs ``[answers]``. Left out, the row stays as it is (or is trained with LoRA).
    """

    epochs: Positive = 1
    batch: Positive = 4
    learning_rate: Rate = 1e-2
    validation_rows: Positive = 32


class CalibrationSection(Section, frozen=True):
    """``[calibration]``: how log-odds become probabilities, and where the thresholds lie.

    Attributes:
        target_fpr: False-positive rate of the thresholds.
        media_target_fpr: That of pictures and sound, where it is another.
        stage: The stage a report leads with.
        method: ``auto`` takes the method with the least log loss on held-out rows.
    """

    target_fpr: OpenShare = 0.03
    media_target_fpr: OpenShare | None = None
    stage: Literal["gate", "final"] = "gate"
    method: Literal["platt", "temperature", "isotonic", "auto"] = "platt"
