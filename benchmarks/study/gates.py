"""The exporter's own graphs of one model cut at several depths, run by ONNX Runtime."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.lab import Lab
from edge_safe.export.decoder_config import tensors_of
from edge_safe.export.emission import WEIGHTS_FILE
from edge_safe.export.families.llama import llama_spec
from edge_safe.export.graphs.decoder import (
    decoder_graph,
    embedding_graph,
    gate_graph,
    store_model,
)
from edge_safe.export.graphs.spec import DecoderSpec
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.quantization import precision_named
from edge_safe.export.safety_plan import gate_head, token_rows
from edge_safe.models.safety_head import SafetyModule
from edge_safe.runtime.session import Session

EMBEDDING = "embed_tokens.onnx"
WHOLE = "decoder.onnx"


def emit(
    lab: Lab, safety: SafetyModule, layers: Sequence[int], precision: str, folder: Path
) -> None:
    """Writes the embedding, a gate at each layer and the whole model over one weights file.

    Raises:
        ExportError: The language model has no counterpart in the graphs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec = llama_spec(lab.language.config)
    row = precision_named(precision)
    with WeightStore(folder / WEIGHTS_FILE) as store:
        weights = store_model(
            store,
            spec,
            tensors_of(lab.language),
            row,
            lambda share: lab.progress(f"quantize to {precision}", round(share * 100), 100),
        )
        embedding_graph(weights, spec).save(folder / EMBEDDING)
        for layer in layers:
            head = gate_head(safety, layer)
            gate_graph(weights, spec, layer, head, store).save(folder / _file(layer))
        decoder_graph(weights, spec, None, token_rows(safety.final), store).save(folder / WHOLE)


class Graph:
    """Embedding and gate at one layer, or embedding and the whole model for ``layer`` None."""

    def __init__(self, lab: Lab, folder: Path, layer: int | None) -> None:
        threads = lab.options.threads
        self._spec: DecoderSpec = llama_spec(lab.language.config)
        self._layer = layer
        self._slot = lab.run.tokens.safe_id
        self._embed = Session(folder / EMBEDDING, threads=threads)
        name = WHOLE if layer is None else _file(layer)
        self._session = Session(folder / name, threads=threads)

    def log_odds(self, prompt: Sequence[int]) -> float:
        """Unsafe - safe of a prompt without its slot T."""
        verdict = self._run(prompt)["verdict_logits"][0]
        return float(verdict[0] - verdict[1])

    def milliseconds(self, prompt: Sequence[int]) -> float:
        """From ids to the verdict."""
        start = time.perf_counter()
        self._run(prompt)
        return (time.perf_counter() - start) * 1000.0

    def _run(self, prompt: Sequence[int]) -> Mapping[str, Any]:
        ids = np.array([[*prompt, self._slot]], np.int64)
        embeds = self._embed.run({"input_ids": ids})["inputs_embeds"]
        spec, length = self._spec, ids.shape[1]
        nothing = np.zeros((1, spec.kv_heads, 0, spec.head_dim), np.float32)
        feeds: dict[str, Any] = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length, dtype=np.int64)[None],
        }
        for index in range(spec.layers if self._layer is None else self._layer):
            feeds[f"past_key_values.{index}.key"] = nothing
            feeds[f"past_key_values.{index}.value"] = nothing
        if self._layer is not None:
            layers = self._session.shape("gate_past")[1]
            feeds["gate_past"] = np.zeros((1, layers, 0, spec.hidden_size), np.float32)
        return self._session.run(feeds)


def _file(layer: int) -> str:
    return f"gate.{layer}.onnx"
