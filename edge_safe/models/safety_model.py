"""A safety-token model in torch: one forward pass, a verdict, and an answer that follows it.

Wraps any Hugging Face causal language model whose forward takes ``output_hidden_states``, with
text alone or with pictures and sound beside it. Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from edge_safe.errors import CheckpointError, GateError
from edge_safe.models.base_model import load_base
from edge_safe.models.safety_file import Modality, SafetyFile, read_safety, stage_name
from edge_safe.models.safety_head import FINAL, Readout, SafetyModule


@dataclass(slots=True)
class Assessment:
    """The verdict on a batch of prompts.

    Attributes:
        stage: The stage that gave it, ``gate.<k>`` or ``final``.
        p_unsafe: (B,) calibrated probability that a prompt asks for harm.
        refuse: (B,) bool, p_unsafe at or above the stage's threshold.
        readout: The stage's logits.
    """

    stage: str
    p_unsafe: Tensor
    refuse: Tensor
    readout: Readout


class SafetyTokenModel(nn.Module):
    """A language model with a safety module.

    Args:
        model: The language model; control tokens are rows of its vocabulary.
        tokenizer: Its tokenizer.
        safety: The safety module.
        file: Tokens, layers and calibration.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        safety: SafetyModule,
        file: SafetyFile,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.safety = safety
        self.file = file

    @classmethod
    def from_pretrained(cls, folder: Path, dtype: torch.dtype = torch.float32) -> SafetyTokenModel:
        """Opens a checkpoint folder.

        Raises:
            CheckpointError: The folder lacks a model or a safety module.
        """
        base = load_base(folder, dtype)
        file, safety = read_safety(folder)
        return cls(base.model, base.tokenizer, safety.to(base.model.device), file)

    def read(self, hidden_states: tuple[Tensor, ...], visible: Tensor) -> dict[str, Readout]:
        """Read-outs of all stages.

        Args:
            hidden_states: As Hugging Face returns them, each (B, T, d); the last is normalized.
            visible: (B, T) 1 at prompt positions 0 .. T-1, padded on either side; what is 0 cannot
                change the verdict.

        Raises:
            GateError: The mask does not fit the states, or hides a whole prompt.
        """
        if visible.shape != hidden_states[-1].shape[:2] or not bool(visible.any(-1).all()):
            raise GateError(
                f"The prompt mask {tuple(visible.shape)} does not fit the hidden states "
                f"{tuple(hidden_states[-1].shape)}, or hides a whole prompt."
            )
        order, mask = _right_padded(visible.bool())
        rows = torch.arange(len(mask), device=mask.device)[:, None]
        layers = self.safety.config.layers
        states = {k: hidden_states[k][rows, order].float() for k in layers}
        readouts = {stage_name(k): self.safety.read(k, states, mask) for k in layers}
        readouts[FINAL] = self.safety.read_final(hidden_states[-1][rows, order].float(), mask)
        return readouts

    def judge(
        self, readouts: dict[str, Readout], stage: str | None = None, modality: Modality = "text"
    ) -> Assessment:
        """The verdict of one stage: by default the gate at the exit layer, else ``final``.

        Args:
            readouts: As ``read`` returns them.
            stage: The stage.
            modality: The way in, which has its own calibration where one was fitted.

        Raises:
            CheckpointError: The stage does not exist or was not calibrated.
            GateError: A verdict is not a finite number.
        """
        name = stage or stage_name(self.file.exit_layer)
        if name not in readouts:
            raise CheckpointError(f"There is no stage {name}; stages: {', '.join(readouts)}.")
        calibration = self.file.stage(name).of(modality)
        logits = readouts[name].verdict_logits.detach()
        odds = logits[:, 0] - logits[:, 1]
        if not bool(torch.isfinite(odds).all()):
            raise GateError(f"Stage {name} gave a verdict that is not finite.")
        p_unsafe = torch.from_numpy(calibration.p_unsafe(odds.double().cpu().numpy())).to(odds)
        return Assessment(name, p_unsafe, p_unsafe >= calibration.threshold, readouts[name])

    @torch.no_grad()
    def assess(self, *, stage: str | None = None, **inputs: Any) -> Assessment:
        """Judges prompts without answering.

        Args:
            stage: See `judge`.
            **inputs: What the language model's forward takes: input_ids (B, T), attention_mask
                (B, T), pixel_values and so on.
        """
        if inputs.get("attention_mask") is None:
            # Some models find the places of pictures with a mask alone.
            ids = inputs.get("input_ids")
            like = inputs["inputs_embeds"][..., 0] if ids is None else ids
            inputs["attention_mask"] = torch.ones_like(like, dtype=torch.int64)
        output = self.model(**inputs, output_hidden_states=True, use_cache=False)
        readouts = self.read(output.hidden_states, inputs["attention_mask"])
        return self.judge(readouts, stage, modality_of(inputs))

    @torch.no_grad()
    def generate(self, *, stage: str | None = None, **inputs: Any) -> Tensor:
        """Decodes with the verdict as the first token.

        The prompt runs once: the hidden states of the first decoding step are those the gate reads.
        The first new token is the safe or the unsafe one, whatever the logits say; after it
        neither can be sampled.

        Args:
            stage: See `judge`.
            **inputs: What the language model's ``generate`` takes.

        Returns:
            What the language model's ``generate`` returns.
        """
        visible = inputs.get("attention_mask")
        processor = VerdictProcessor(self, visible, stage, modality_of(inputs))
        processors = LogitsProcessorList([*inputs.pop("logits_processor", ()), processor])
        hook = self.model.register_forward_hook(processor.keep_states)
        try:
            output: Tensor = cast(Any, self.model).generate(
                **inputs, logits_processor=processors, output_hidden_states=True
            )
        finally:
            hook.remove()
        return output


class VerdictProcessor(LogitsProcessor):
    """Masks the vocabulary: only the verdict's token first, no control token afterwards."""

    def __init__(
        self,
        owner: SafetyTokenModel,
        visible: Tensor | None,
        stage: str | None,
        modality: Modality,
    ) -> None:
        self._owner = owner
        self._visible = visible
        self._stage = stage
        self._modality = modality
        self._states: tuple[Tensor, ...] | None = None
        self._decided = False

    def keep_states(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the language model: takes the prompt's states before the verdict."""
        if not self._decided:
            self._states = output.hidden_states

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Masks (B, V) scores of the next token."""
        tokens = self._owner.file.tokens
        if self._decided:
            return scores.index_fill(-1, torch.tensor(tokens.ids, device=scores.device), -torch.inf)
        if self._states is None:
            raise GateError("The language model gave no hidden states, so nothing can be judged.")
        visible = self._visible
        if visible is None:
            visible = torch.ones_like(self._states[-1][..., 0])
        # Beam search repeats every prompt.
        visible = visible.repeat_interleave(len(scores) // len(visible), dim=0)
        readouts = self._owner.read(self._states, visible)
        refuse = self._owner.judge(readouts, self._stage, self._modality).refuse
        self._states, self._decided = None, True
        verdict = torch.where(refuse, *tokens.ids)
        return torch.full_like(scores, -torch.inf).scatter_(-1, verdict[:, None], 0.0)


def modality_of(inputs: Mapping[str, object]) -> Modality:
    """The way in, by the names that Hugging Face gives to inputs of pictures and of sound."""
    given = [name for name, value in inputs.items() if value is not None]
    if any("input_features" in name or "audio" in name for name in given):
        return "audio"
    return "image" if any("pixel_values" in name for name in given) else "text"


def _right_padded(mask: Tensor) -> tuple[Tensor, Tensor]:
    """For (B, T) bool: an order that puts visible positions first, and the mask in that order."""
    order = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)
    return order, mask.gather(-1, order)
