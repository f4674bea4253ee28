"""Which matrices need how many bytes: measured group by group, smallest bundle first.

Each group (some layers; embedding and lm_head) is rounded alone, in torch, to each of the formats
it may have, and the verdicts and next tokens of some prompts are compared with the unrounded
model's. Candidates then run from the smallest format everywhere to the largest everywhere; the
group that gains most per byte is the first to get a larger one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from edge_safe.errors import ExportError
from edge_safe.export.footprint import least_bytes, matrix_bytes
from edge_safe.export.graphs.spec import DecoderSpec
from edge_safe.export.packing import dequantize
from edge_safe.export.quantization import (
    PRECISIONS,
    TABLE_FORMATS,
    MatrixFormat,
    Precision,
)
from edge_safe.export.reference import Reference
from edge_safe.export.rounding import quantize
from edge_safe.models.base_model import decoder_layers
from edge_safe.runtime.calibration import StageCalibration, refuses

# Rows of the table of precisions that a group of layers may have, and formats of embedding and
# lm_head, from the smallest on. What the last ones lose is taken as nothing.
LAYER_ROWS = ("int4-asymmetric-128", "int4", "int8")
TABLE_ROWS = ("int4", "int8")
# Groups of consecutive layers; the gate's layer is always a border.
GROUPS = 6
PICTURE = "pareto.png"
# Prompts that are run per group.
PROMPTS = 48

Array = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class GroupEffect(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What rounding one group alone does, everything else unrounded.

    Attributes:
        layers: First and last layer; None for embedding and lm_head.
        row: What it is rounded to.
        log_odds: Mean change of the verdict's log-odds, without sign.
        kl: Mean KL divergence of the next token, in nats.
    """

    layers: tuple[int, int] | None
    row: str
    log_odds: float
    kl: float


class Candidate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way to spread bytes over the matrices.

    Attributes:
        layers: Row of the table of precisions, per layer.
        tables: Format of embedding and lm_head.
        bytes: Of the language model's matrices, at least.
        bytes_per_token: Read for each token that is decoded, which bounds the speed.
        agreement: Verdicts like the unrounded model's, the weights rounded in torch.
        kl: Mean KL divergence of the next token there.
        accepted: Whether the finished bundle passed acceptance; None where none was built.
    """

    layers: tuple[str, ...]
    tables: str
    bytes: int
    bytes_per_token: int
    agreement: float
    kl: float
    accepted: bool | None = None

    def hopeless(self, perplexity: float) -> bool:
        """Whether it is not worth building where perplexity may rise by that factor at most.

        A mean KL divergence is what the logarithm of the perplexity rises by on the model's own
        samples.
        """
        return self.kl > math.log(perplexity)


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """A candidate as a row of the table of precisions."""

    precision: Precision
    candidate: Candidate


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Matrices that are rounded alike.

    Attributes:
        layers: Layers; empty for embedding and lm_head.
        rows: What they may be stored as, from the smallest on.
    """

    layers: range
    rows: tuple[str, ...]

    def form(self, level: int) -> MatrixFormat:
        """The format of a row by its place."""
        name = self.rows[level]
        return PRECISIONS[name].weights if self.layers else TABLE_FORMATS[name]


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """A torch model, what it is asked, and what it answers before anything is rounded."""

    reference: Reference
    model: PreTrainedModel
    spec: DecoderSpec
    prompts: Sequence[Ids]
    calibration: StageCalibration

    def measure(self) -> tuple[Array, Array]:
        """(n,) log-odds and (n, V) log-probabilities of the token at slot T."""
        embeds = [self.reference.embed(ids) for ids in self.prompts]
        found = self.reference.run_each(embeds)
        verdicts = [e.final_verdict if e.gate_verdict is None else e.gate_verdict for e in found]
        odds = np.array([v[0, 0] - v[0, 1] for v in verdicts], np.float32)
        logits = torch.from_numpy(np.concatenate([e.logits for e in found]))
        return odds, logits.log_softmax(-1).numpy()


def search(
    reference: Reference,
    model: PreTrainedModel,
    spec: DecoderSpec,
    prompts: Sequence[Ids],
    calibration: StageCalibration,
    exit_layer: int | None,
) -> tuple[list[GroupEffect], list[Choice]]:
    """Measures the groups and lists the candidates, the smallest first.

    Args:
        reference: The torch model with its safety module.
        model: Its language model, whose weights are rounded and put back.
        spec: Its description.
        prompts: (1, S) ids with slot T.
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
    probe = Probe(reference, model, spec, prompts, calibration)
    whole = probe.measure()
    groups = [Group(range(0), TABLE_ROWS)]
    groups += [
        Group(range(first, last + 1), LAYER_ROWS)
        for first, last in _borders(spec.layers, exit_layer)
    ]
    effects = {
        (number, level): _effect(probe, group, level, whole)
        for number, group in enumerate(groups)
        for level in range(len(group.rows) - 1)
    }
    choices = []
    for levels in _path(groups, effects, spec):
        row = _row(groups, levels, spec.layers)
        choices.append(Choice(row, _candidate(probe, groups, levels, row, whole)))
    return list(effects.values()), sorted(choices, key=lambda choice: choice.candidate.bytes)


def _path(
    groups: Sequence[Group],
    effects: dict[tuple[int, int], GroupEffect],
    spec: DecoderSpec,
) -> Iterator[tuple[int, ...]]:
    """Levels of all groups, from the smallest everywhere to the largest everywhere."""
    odds = max(effect.log_odds for effect in effects.values()) or 1.0
    kl = max(effect.kl for effect in effects.values()) or 1.0

    def damage(number: int, level: int) -> float:
        effect = effects.get((number, level))
        return 0.0 if effect is None else effect.log_odds / odds + effect.kl / kl

    levels = [0] * len(groups)

    def gain(number: int) -> float:
        higher = levels.copy()
        higher[number] += 1
        added = _size(groups, higher, spec) - _size(groups, levels, spec)
        return (damage(number, levels[number]) - damage(number, higher[number])) / added

    while True:
        yield tuple(levels)
        open_ = [n for n, group in enumerate(groups) if levels[n] + 1 < len(group.rows)]
        if not open_:
            return
        levels[max(open_, key=gain)] += 1


def _row(groups: Sequence[Group], levels: Sequence[int], layers: int) -> Precision:
    """The candidate as a row of the table of precisions."""
    forms = {
        layer: group.form(level)
        for group, level in zip(groups, levels, strict=True)
        for layer in group.layers
    }
    return dataclasses.replace(
        PRECISIONS["int4"],
        name="auto",
        embedding=groups[0].form(levels[0]),
        layers=tuple(forms[layer] for layer in range(layers)),
    )


def _size(groups: Sequence[Group], levels: Sequence[int], spec: DecoderSpec) -> int:
    return least_bytes(spec, _row(groups, levels, spec.layers), None)


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


def _effect(probe: Probe, group: Group, level: int, whole: tuple[Array, Array]) -> GroupEffect:
    """Changes of log-odds and next token by one format in one group."""
    with _rounded(probe, group, level):
        odds, tokens = probe.measure()
    layers = (group.layers[0], group.layers[-1]) if group.layers else None
    change = float(np.abs(odds - whole[0]).mean())
    return GroupEffect(layers, group.rows[level], change, _kl(whole[1], tokens))


def _candidate(
    probe: Probe,
    groups: Sequence[Group],
    levels: Sequence[int],
    row: Precision,
    whole: tuple[Array, Array],
) -> Candidate:
    with ExitStack() as stack:
        for group, level in zip(groups, levels, strict=True):
            stack.enter_context(_rounded(probe, group, level))
        odds, tokens = probe.measure()
    same = [
        refuses(probe.calibration, float(a)) == refuses(probe.calibration, float(b))
        for a, b in zip(odds, whole[0], strict=True)
    ]
    spec = probe.spec
    size = least_bytes(spec, row, None)
    names = {
        layer: group.rows[level]
        for group, level in zip(groups, levels, strict=True)
        for layer in group.layers
    }
    return Candidate(
        tuple(names[layer] for layer in range(spec.layers)),
        groups[0].rows[levels[0]],
        size,
        # Of the embedding one row is read; lm_head is read whole, and is the same table if tied.
        size - (0 if spec.tied else matrix_bytes(spec.table_parameters, row.embedding)),
        float(np.mean(same)),
        _kl(whole[1], tokens),
    )


def _kl(expected: Array, found: Array) -> float:
    return float((np.exp(expected) * (expected - found)).sum(-1).mean())


@contextmanager
def _rounded(probe: Probe, group: Group, level: int) -> Iterator[None]:
    """Rounds a group's matrices for as long as the block runs."""
    form = group.form(level)
    layers = decoder_layers(probe.model)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for weight in _weights(probe.model, [layers[index] for index in group.layers]):
            matrix = weight.detach().numpy()
            kept.append((weight, weight.data))
            weight.data = torch.from_numpy(
                dequantize(quantize(matrix, form), form, matrix.shape[1])
            )
        yield
    finally:
        for weight, data in kept:
            weight.data = data


def _weights(model: PreTrainedModel, layers: Sequence[nn.Module]) -> list[torch.Tensor]:
    """Of the linear layers in some decoder layers; without any, embedding and lm_head, once."""
    if layers:
        linear = (m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear))
        return [module.weight for module in linear]
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    found = [getattr(table, "weight", None) for table in tables]
    return list({id(weight): weight for weight in found if weight is not None}.values())
