"""Trains through the language model: LoRA, the control tokens' rows, and the safety module.

One forward pass over prompt, control token and answer serves every loss: attention is causal, so
the states of the prompt are those of the prompt alone, and the gate reads only these.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from edge_safe.errors import RecipeError
from edge_safe.models import base_model
from edge_safe.models.control_tokens import ControlTokens
from edge_safe.models.examples import Encoded, GateBatch, LogOdds, collect_log_odds, read_stages
from edge_safe.models.losses import (
    LossWeights,
    answer_loss,
    gate_losses,
    retain_loss,
    weighted_sum,
)
from edge_safe.models.recipe import LoraSection, OptimizerSection
from edge_safe.models.safety_head import SafetyModule
from edge_safe.models.token_rows import TokenRows

_EVALUATION_BATCH = 8


@dataclass(slots=True)
class Fidelity:
    """How near answers after the safe token are to the base model's.

    Attributes:
        rows: Prompts with an answer of the base model's (or of the answer files).
        perplexity_ratio: Perplexity of the answers after the safe token over the base model's.
        kl: Mean KL(base || model) of an answer token, in nats.
        agreement: Share of answer tokens at which both think the same token likeliest.
    """

    rows: int
    perplexity_ratio: float
    kl: float
    agreement: float


class GatedLanguageModel(nn.Module):
    """A language model with control tokens and, where it is trained too, a safety module.

    Args:
        model: The language model, with adapters or without.
        tokens: Its control tokens.
        weights: Weights of the losses.
        rows: Trainable input rows of control tokens.
        safety: Trained together with the model, or None.
        with_answers: Whether the examples have answers to learn from.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokens: ControlTokens,
        weights: LossWeights,
        rows: TokenRows | None = None,
        safety: SafetyModule | None = None,
        with_answers: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokens = tokens
        self.weights = weights
        self.rows = rows
        self.safety = safety
        self.with_answers = with_answers

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next(self.model.parameters()).device

    def forward(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """The weighted sum under "loss", and every part."""
        parts: dict[str, Tensor] = {}
        batch, logits = self.run(examples)
        if self.safety is not None:
            parts |= gate_losses(read_stages(self.safety, batch), batch.unsafe, self.weights)
        if self.with_answers:
            targets, mask = base_model.pad([e.answer or (0,) for e in examples], self.device)
            mask &= torch.tensor([[bool(e.answer)] for e in examples], device=self.device)
            benign = ~batch.unsafe
            if self.safety is not None:
                parts["answer"] = answer_loss(
                    logits, targets, mask, batch.unsafe, self.weights.beta
                )
            base = self.base_logits(examples)
            parts["retain"] = retain_loss(logits, base, mask, benign)
        return {"loss": weighted_sum(parts, self.weights)} | parts

    def run(self, examples: Sequence[Encoded]) -> tuple[GateBatch, Tensor]:
        """Runs prompts, control tokens and answers.

        Returns:
            The gate's view of the prompts, and (B, A, V) predictions of the answers' tokens.
        """
        rows, prompt_sizes, last_rows = [], [], []
        for example in examples:
            *earlier, prompt = example.prompts
            control = self.tokens.unsafe_id if example.unsafe else self.tokens.safe_id
            rows += [*earlier, (*prompt, control, *example.answer)]
            prompt_sizes.append([len(p) for p in example.prompts])
            last_rows.append(len(rows) - 1)
        ids, mask = base_model.pad(rows, self.device)
        layers = self.safety.config.layers if self.safety is not None else ()
        lengths = [size for sizes in prompt_sizes for size in sizes]
        states = base_model.run(self.model, layers, ids, mask, lengths)
        gate = {
            k: pad_sequence(
                [
                    torch.cat(
                        [value[last - len(sizes) + 1 + j, :size] for j, size in enumerate(sizes)]
                    )
                    for last, sizes in zip(last_rows, prompt_sizes, strict=True)
                ],
                batch_first=True,
            )
            for k, value in states.layers.items()
        }
        totals = torch.tensor([sum(sizes) for sizes in prompt_sizes], device=self.device)
        slots = torch.tensor([sizes[-1] for sizes in prompt_sizes], device=self.device)
        chosen = torch.tensor(last_rows, device=self.device)
        batch = GateBatch(
            gate,
            torch.arange(int(totals.max()), device=self.device)[None] < totals[:, None],
            states.final[chosen, slots - 1].float(),
            torch.tensor([e.unsafe for e in examples], device=self.device),
        )
        return batch, _predictions(states.logits[chosen], slots, examples)

    def base_logits(self, examples: Sequence[Encoded]) -> Tensor:
        """(B, A, V) the base model's predictions of the answers, without a control token."""
        ids, mask = base_model.pad([(*e.prompts[-1], *e.answer) for e in examples], self.device)
        with torch.no_grad(), self._without_adapters():
            lengths = [len(e.prompts[-1]) for e in examples]
            logits = base_model.run(self.model, (), ids, mask, lengths).logits
        starts = torch.tensor([len(e.prompts[-1]) - 1 for e in examples], device=self.device)
        return _predictions(logits, starts, examples)

    def _without_adapters(self) -> AbstractContextManager[None]:
        if isinstance(self.model, PeftModel):
            context: AbstractContextManager[None] = self.model.disable_adapter()
            return context
        return nullcontext()

    def fidelity(self, examples: Sequence[Encoded]) -> Fidelity:
        """Compares answers after the safe token with the base model's on benign examples."""
        ours, base_nll, kl, agreement, tokens = 0.0, 0.0, 0.0, 0.0, 0
        for start in range(0, len(examples), _EVALUATION_BATCH):
            part = examples[start : start + _EVALUATION_BATCH]
            targets, mask = base_model.pad([e.answer for e in part], self.device)
            with torch.no_grad():
                logits = self.run(part)[1].float()
                # As in decoding: control tokens are masked out after slot T.
                logits[..., list(self.tokens.ids)] = -torch.inf
                ours += float(_nll(logits, targets)[mask].sum())
                base = self.base_logits(part).float()
                base_nll += float(_nll(base, targets)[mask].sum())
                base[..., list(self.tokens.ids)] = -torch.inf
                difference = functional.kl_div(
                    logits.log_softmax(-1), base.log_softmax(-1), reduction="none", log_target=True
                )
                kl += float(difference.nan_to_num(0.0).sum(-1)[mask].sum())
                agreement += float((logits.argmax(-1) == base.argmax(-1))[mask].sum())
            tokens += int(mask.sum())
        ratio = float(torch.tensor((ours - base_nll) / max(tokens, 1)).exp())
        return Fidelity(len(examples), ratio, kl / max(tokens, 1), agreement / max(tokens, 1))


class LanguageModelTask:
    """Training through the language model; see ``training.Task``."""

    def __init__(
        self,
        name: str,
        module: GatedLanguageModel,
        train: Sequence[Encoded],
        validation: Sequence[Encoded],
        optimizer: OptimizerSection,
    ) -> None:
        self.name = name
        self.gated = module
        self.module: nn.Module = module
        self.train = train
        self.validation = validation
        self.lengths = [example.length for example in train]
        self.optimizer = optimizer

    def batch(self, indices: Sequence[int], seed: int) -> list[Encoded]:
        """Training examples; the module makes tensors of them. Nothing here is random."""
        return [self.train[i] for i in indices]

    def learning_rate(self, parameter: str) -> float:
        """Adapters have a rate of their own."""
        adapter = ".lora_" in parameter
        return self.optimizer.lora_learning_rate if adapter else self.optimizer.learning_rate

    def evaluate(self) -> dict[str, float]:
        """AUROC of every stage, and how near benign answers are to the base model's."""
        figures: dict[str, float] = {}
        if self.gated.safety is not None:
            figures |= self.log_odds().aurocs()
        answered = [e for e in self.validation if e.answer and not e.unsafe]
        if answered:
            fidelity = self.gated.fidelity(answered)
            figures["validation.perplexity_ratio"] = round(fidelity.perplexity_ratio, 5)
            figures["validation.kl"] = round(fidelity.kl, 5)
        return figures

    def log_odds(self) -> LogOdds:
        """What every stage says of the validation split."""
        safety = self.gated.safety
        if safety is None:
            raise RecipeError(f"{self.name} trains no safety module, so it has no verdicts.")
        ordered = sorted(self.validation, key=lambda example: example.length)
        parts = []
        with torch.no_grad():
            for start in range(0, len(ordered), _EVALUATION_BATCH):
                batch, _ = self.gated.run(ordered[start : start + _EVALUATION_BATCH])
                parts.append((read_stages(safety, batch), batch.unsafe))
        return collect_log_odds(parts, ordered)


def add_lora(model: PreTrainedModel, section: LoraSection) -> PeftModel:
    """Puts adapters on linear modules of the language model's layers, none on towers.

    Raises:
        RecipeError: A layer or a module of the recipe does not exist in the model.
    """
    layers = base_model.decoder_layers(model)
    wanted = range(len(layers)) if section.layers is None else section.layers
    if any(index >= len(layers) for index in wanted):
        raise RecipeError(f"lora.layers goes up to {max(wanted)}, the model has {len(layers)}.")
    inside = {id(module) for i in wanted for module in layers[i].modules()}
    linear = {
        name: module
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, nn.Linear)
    }
    names = [name for name in linear if name.rsplit(".", 1)[-1] in section.targets]
    missing = set(section.targets) - {name.rsplit(".", 1)[-1] for name in names}
    if missing:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise RecipeError(
            f"lora.targets names {', '.join(sorted(missing))}, which no decoder layer has. "
            f"Linear modules there: {', '.join(known)}."
        )
    config = LoraConfig(
        r=section.rank, lora_alpha=section.alpha, lora_dropout=0.0, target_modules=names
    )
    return get_peft_model(model, config)


def _predictions(logits: Tensor, starts: Tensor, examples: Sequence[Encoded]) -> Tensor:
    """Picks (B, A, V) predictions of the answers' tokens out of (B, L, V), from ``starts`` on."""
    longest = max(1, *(len(e.answer) for e in examples)) if examples else 1
    positions = starts[:, None] + torch.arange(longest, device=logits.device)
    positions = positions.clamp_max(logits.shape[1] - 1)
    return logits[torch.arange(len(logits), device=logits.device)[:, None], positions]


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, A) negative log-likelihood of targets under (B, A, V) logits."""
    return functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
