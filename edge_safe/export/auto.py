"""Which layers need 8 bits: measured group by group, smallest bundle first.

Each group of layers is rounded to 4 bits alone, in torch, and the verdicts and next tokens of some
prompts are compared with the unrounded model's. Candidates then run from 4 bits everywhere to 8
bits everywhere; the group that costs most per byte saved is the first to get its bytes back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from edge_safe.errors import ExportError
from edge_safe.export.drift import refuses
from edge_safe.export.footprint import least_bytes
from edge_safe.export.graphs.spec import DecoderSpec
from edge_safe.export.packing import dequantize
from edge_safe.export.quantization import INT4, INT8, PRECISIONS, MatrixFormat, Precision
from edge_safe.export.reference import Reference
from edge_safe.export.rounding import quantize
from edge_safe.models.base_model import decoder_layers
from edge_safe.runtime.calibration import StageCalibration

# Groups of consecutive layers; the gate's layer is always a border.
GROUPS = 6
PICTURE = "pareto.png"
# Prompts that are run per group.
PROMPTS = 48

Array = npt.NDArray[np.float32]


class GroupEffect(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What rounding one group of layers to 4 bits does, everything else unrounded.

    Attributes:
        first: First layer.
        last: Last layer.
        log_odds: Mean change of the verdict's log-odds, without sign.
        kl: Mean KL divergence of the next token, in nats.
    """

    first: int
    last: int
    log_odds: float
    kl: float

    @property
    def layers(self) -> range:
        """The layers."""
        return range(self.first, self.last + 1)


class Candidate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way to spread bits over the layers.

    Attributes:
        bits: Per layer.
        bytes: Of the language model's matrices, at least.
        bytes_per_token: Read for each token that is decoded, which bounds the speed.
        agreement: Verdicts like the unrounded model's, the weights rounded in torch.
        kl: Mean KL divergence of the next token there.
        accepted: Whether the finished bundle passed acceptance; None where none was built.
    """

    bits: tuple[int, ...]
    bytes: int
    bytes_per_token: int
    agreement: float
    kl: float
    accepted: bool | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """A candidate as a row of the table of precisions."""

    precision: Precision
    candidate: Candidate


def search(
    reference: Reference,
    model: PreTrainedModel,
    spec: DecoderSpec,
    prompts: Sequence[Array],
    calibration: StageCalibration,
    exit_layer: int | None,
) -> tuple[list[GroupEffect], list[Choice]]:
    """Measures the groups and lists the candidates, the smallest first.

    Args:
        reference: The torch model with its safety module.
        model: Its language model, whose weights are rounded and put back.
        spec: Its description.
        prompts: (1, S, d) embeddings with slot T.
        calibration: Of the first stage.
        exit_layer: Layer of the gate.

    Raises:
        ExportError: The model is too large to be held in memory.
    """
    if reference.streamed:
        raise ExportError(
            "Precision auto rounds the torch model in memory, for which this one is too large. "
            "Choose a precision: int4, or int4-gate8 where verdicts count most."
        )
    whole = _measure(reference, prompts)
    groups = [
        GroupEffect(first, last, *_effect(reference, model, prompts, range(first, last + 1), whole))
        for first, last in _borders(spec.layers, exit_layer)
    ]
    odds = max(effect.log_odds for effect in groups) or 1.0
    kl = max(effect.kl for effect in groups) or 1.0
    order = sorted(
        groups, key=lambda e: (e.log_odds / odds + e.kl / kl) / len(e.layers), reverse=True
    )
    choices = []
    for raised in range(len(order) + 1):
        eight = {layer for effect in order[:raised] for layer in effect.layers}
        forms = tuple(INT8 if layer in eight else INT4 for layer in range(spec.layers))
        row = dataclasses.replace(PRECISIONS["int4"], name="auto", layers=forms)
        found = _candidate(reference, model, spec, prompts, calibration, row, whole)
        choices.append(Choice(row, found))
    return groups, choices


def draw(candidates: Sequence[Candidate], chosen: int, path: Path) -> None:
    """Draws size and speed against agreement; the chosen candidate is filled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    size = ([c.bytes / 2**20 for c in candidates], "language model, MB")
    speed = ([c.bytes_per_token / 2**20 for c in candidates], "MB read per token")
    agreement = ([c.agreement for c in candidates], "agreement of verdicts")
    kl = ([c.kl for c in candidates], "KL of the next token, nats")
    for axis, (x, across), (y, up) in zip(
        axes, (size, size, speed), (agreement, kl, kl), strict=True
    ):
        axis.plot(x, y, "o-", fillstyle="none")
        axis.plot(x[chosen], y[chosen], "o", label="chosen")
        axis.set(xlabel=across, ylabel=up)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def _borders(layers: int, exit_layer: int | None) -> list[tuple[int, int]]:
    """First and last layer of each group."""
    size = max(1, -(-layers // GROUPS))
    cuts = sorted({*range(0, layers, size), *([exit_layer] if exit_layer else []), layers})
    return [(first, end - 1) for first, end in pairwise(cuts)]


def _measure(reference: Reference, prompts: Sequence[Array]) -> tuple[Array, Array]:
    """(n,) log-odds and (n, V) log-probabilities of the token at slot T."""
    found = reference.run_each(prompts)
    verdicts = [e.final_verdict if e.gate_verdict is None else e.gate_verdict for e in found]
    odds = np.array([v[0, 0] - v[0, 1] for v in verdicts], np.float32)
    logits = torch.from_numpy(np.concatenate([e.logits for e in found]))
    return odds, logits.log_softmax(-1).numpy()


def _effect(
    reference: Reference,
    model: PreTrainedModel,
    prompts: Sequence[Array],
    layers: range,
    whole: tuple[Array, Array],
) -> tuple[float, float]:
    """Changes of log-odds and next token by 4 bits in these layers."""
    with _rounded(model, dict.fromkeys(layers, INT4)):
        odds, tokens = _measure(reference, prompts)
    return float(np.abs(odds - whole[0]).mean()), _kl(whole[1], tokens)


def _candidate(
    reference: Reference,
    model: PreTrainedModel,
    spec: DecoderSpec,
    prompts: Sequence[Array],
    calibration: StageCalibration,
    row: Precision,
    whole: tuple[Array, Array],
) -> Candidate:
    with _rounded(model, dict(enumerate(row.layers))):
        odds, tokens = _measure(reference, prompts)
    same = [
        refuses(calibration, float(a)) == refuses(calibration, float(b))
        for a, b in zip(odds, whole[0], strict=True)
    ]
    size = least_bytes(spec, row, None)
    table = least_bytes(dataclasses.replace(spec, layers=0), row, None)
    # Of the embedding one row is read; lm_head is read whole, and is the same table if tied.
    per_token = size - (0 if spec.tied else table // 2)
    return Candidate(
        tuple(form.bits for form in row.layers),
        size,
        per_token,
        float(np.mean(same)),
        _kl(whole[1], tokens),
    )


def _kl(expected: Array, found: Array) -> float:
    return float((np.exp(expected) * (expected - found)).sum(-1).mean())


@contextmanager
def _rounded(model: PreTrainedModel, forms: dict[int, MatrixFormat]) -> Iterator[None]:
    """Rounds the linear layers of some decoder layers for as long as the block runs."""
    kept: list[tuple[nn.Linear, torch.Tensor]] = []
    layers = decoder_layers(model)
    try:
        for index, form in forms.items():
            for module in layers[index].modules():
                if isinstance(module, nn.Linear):
                    weight = module.weight.detach().numpy()
                    kept.append((module, module.weight.data))
                    packed = quantize(weight, form)
                    rounded = dequantize(packed, form, weight.shape[1])
                    module.weight.data = torch.from_numpy(rounded)
        yield
    finally:
        for module, data in kept:
            module.weight.data = data
