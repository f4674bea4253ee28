"""What rounding the language model's weights, and the gate's, does to the verdict.

Every scheme rounds the linear layers below the gate and gives their values back in float32
("fake" quantization); embedding, norms and activations stay as they are. The gate's own matrices
(verdict rows, keys, values, query, the two layers behind) stay in float32 or are rounded alike. The
last lines are the exporter's graphs in ONNX Runtime, whose embedding has 8 bits and whose kernels
round activations as well. Heads are never trained on rounded weights: the checkpoint's own gate is
asked, where it has one at this layer.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from transformers import PreTrainedModel

from benchmarks.study.figures import FPR, labels, percent, shown
from benchmarks.study.gates import Graph, emit
from benchmarks.study.lab import Array, Lab
from benchmarks.study.report import Row
from benchmarks.study.rows import balanced
from benchmarks.study.schemes import SCHEMES, Scheme
from benchmarks.study.states import Depth
from edge_safe.evaluation import metrics
from edge_safe.models.examples import Encoded
from edge_safe.models.features import FeatureCache
from edge_safe.models.safety_head import SafetyModule

NAME = "quantization"
TITLE = "Quantization: what rounding the weights does to the verdict"
SETTINGS = ("quantized_rows",)

REFERENCE = "fp32"
ROUNDED_GATE = "rounded gate"
WHOLE_GATE = "fp32 gate"
GRAPHS = ("fp32", "int8", "int4")


def answer(lab: Lab) -> dict[str, Any]:
    """Agreement, rates and drift of every scheme against fp32 on the same rows."""
    examples = balanced(
        [e for e in lab.reported if len(e.prompts) == 1],
        lambda e: e.unsafe,
        lab.options.quantized_rows,
    )
    safety = lab.gate()
    store = _Store(lab, examples, safety)
    reference = store.get(REFERENCE, partial(_rounded, lab, safety, examples, None))
    unsafe = labels(examples)
    odds = np.array(reference[WHOLE_GATE])
    found: dict[str, Any] = {REFERENCE: {WHOLE_GATE: _compare(unsafe, odds, odds)}}
    for scheme in SCHEMES:
        values = store.get(scheme.name, partial(_rounded, lab, safety, examples, scheme))
        found[scheme.name] = {
            gate: _compare(unsafe, odds, np.array(values[gate]))
            for gate in (WHOLE_GATE, ROUNDED_GATE)
        } | {"weight_error": values["weight_error"]}
    for precision in GRAPHS:
        name = f"{precision} graph, ONNX Runtime"
        values = store.get(name, partial(_graph, lab, safety, examples, precision))
        found[name] = {WHOLE_GATE: _compare(unsafe, odds, np.array(values[WHOLE_GATE]))}
    return {
        "layer": lab.layer,
        "rows": len(examples),
        "harmful": int(unsafe.sum()),
        "schemes": found,
    }


class _Store:
    """Log-odds of finished schemes, so that a stopped study goes on."""

    def __init__(self, lab: Lab, examples: Sequence[Encoded], safety: SafetyModule) -> None:
        digest = hashlib.sha256(f"{lab.model_hash} {lab.layer}".encode())
        digest.update(repr([e.prompts for e in examples]).encode())
        for name, tensor in sorted(safety.state_dict().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        self._path = lab.work / "quantization" / f"{digest.hexdigest()[:16]}.json"
        self._known: dict[str, Any] = {}
        if self._path.exists():
            self._known = json.loads(self._path.read_text(encoding="utf-8"))

    def get(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured of a scheme, now or before."""
        if name not in self._known:
            self._known[name] = measure()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part = self._path.with_suffix(".part")
            part.write_text(json.dumps(self._known), encoding="utf-8")
            part.replace(self._path)
        return cast(dict[str, Any], self._known[name])


def _rounded(
    lab: Lab, safety: SafetyModule, examples: Sequence[Encoded], scheme: Scheme | None
) -> dict[str, Any]:
    """Log-odds with the rounded language model, and with the rounded gate on top."""
    model = Depth(lab.model, torch.float32, lab.layer)
    error = 0.0 if scheme is None else round_linears(model, scheme)
    name = REFERENCE if scheme is None else scheme.name
    root = lab.work / "quantization" / "states"
    cache = FeatureCache(root, f"{lab.model_hash} {name}", (lab.layer,))
    prompts = [p for e in examples for p in e.prompts]
    cache.compute(
        cast(PreTrainedModel, model),
        prompts,
        lambda _, done, total: lab.progress(name, done, total),
    )
    gates = {WHOLE_GATE: safety}
    if scheme is not None:
        gates[ROUNDED_GATE] = round_gate(safety, lab.layer, scheme)
    odds = {
        gate: lab.read(module, cache, examples).verdicts[lab.layer].tolist()
        for gate, module in gates.items()
    }
    shutil.rmtree(cache.folder)
    return {**odds, "weight_error": error}


def round_linears(model: nn.Module, scheme: Scheme) -> float:
    """Rounds every linear layer in place; returns the relative error of their weights."""
    lost = energy = 0.0
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                weight = module.weight.numpy().copy()
                rounded = scheme(weight)
                lost += float(((weight - rounded) ** 2).sum(dtype=np.float64))
                energy += float((weight**2).sum(dtype=np.float64))
                module.weight.copy_(torch.from_numpy(rounded))
    return float(round((lost / energy) ** 0.5, 5))


def round_gate(safety: SafetyModule, layer: int, scheme: Scheme) -> SafetyModule:
    """A copy whose matrices at one layer are rounded; norms, biases and slopes are not."""
    rounded = copy.deepcopy(safety)
    with torch.no_grad():
        for parameter in rounded.head(layer).parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.from_numpy(scheme(parameter.numpy().copy())))
    return rounded


def _graph(
    lab: Lab, safety: SafetyModule, examples: Sequence[Encoded], precision: str
) -> dict[str, Any]:
    """Log-odds of the exporter's gate graph."""
    with TemporaryDirectory(prefix="study") as folder:
        emit(lab, safety, (lab.layer,), precision, Path(folder))
        graph = Graph(lab, Path(folder), lab.layer)
        odds = []
        for number, example in enumerate(examples, 1):
            odds.append(graph.log_odds(example.prompts[0]))
            lab.progress(f"{precision} graph", number, len(examples))
    return {WHOLE_GATE: odds}


def _compare(
    unsafe: np.ndarray[Any, np.dtype[np.bool_]], odds: Array, values: Array
) -> dict[str, float]:
    """Figures against the reference's log-odds, all thresholds for ``FPR`` on these rows."""
    threshold = metrics.threshold_at_fpr(odds[~unsafe], FPR)
    own = metrics.threshold_at_fpr(values[~unsafe], FPR)
    refused = values >= threshold
    return {
        "agreement": float((refused == (odds >= threshold)).mean()),
        "auroc": metrics.auroc(unsafe, values),
        "asr": metrics.attack_success_rate(unsafe, refused),
        "fpr": metrics.false_positive_rate(unsafe, refused),
        "asr_at_own_threshold": float((values[unsafe] < own).mean()),
        "drift": own - threshold,
        "largest_change": float(np.abs(values - odds).max()),
    }


def rows(found: dict[str, Any]) -> list[Row]:
    """A line a scheme and gate."""
    table = []
    for name, gates in found["schemes"].items():
        for gate in (WHOLE_GATE, ROUNDED_GATE):
            if gate not in gates:
                continue
            values = gates[gate]
            table.append(
                {
                    "language model": name,
                    "gate": gate.removesuffix(" gate"),
                    "error of the weights": percent(gates.get("weight_error")),
                    "agreement": percent(values["agreement"]),
                    "AUROC": shown(values["auroc"], 4),
                    "ASR": percent(values["asr"]),
                    "FPR": percent(values["fpr"]),
                    "drift of the threshold": f"{values['drift']:+.2f}",
                    "ASR at own threshold": percent(values["asr_at_own_threshold"]),
                }
            )
    return table


def draw(found: dict[str, Any], figure: Figure) -> None:
    """Agreement and drift of each scheme."""
    names = list(found["schemes"])
    axes = figure.subplots(1, 3, sharey=True)
    columns = (
        ("agreement", "agreement with fp32"),
        ("auroc", "AUROC"),
        ("drift", "drift, log-odds"),
    )
    for axis, (key, label) in zip(axes, columns, strict=True):
        for gate, marker in ((WHOLE_GATE, "o"), (ROUNDED_GATE, "x")):
            points = [
                (gates[gate][key], place)
                for place, gates in enumerate(found["schemes"].values())
                if gate in gates
            ]
            axis.plot(*zip(*points, strict=True), marker, label=gate)
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize="small")
