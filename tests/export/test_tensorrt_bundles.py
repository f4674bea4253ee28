"""Bundles for TensorRT beside those for the CPU: the same checkpoint, verdicts and words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto
from transformers import LlamaForCausalLM

from edge_safe.errors import BundleError, IntegrityError, ProviderError
from edge_safe.export import export_bundle
from edge_safe.export.packing import lattice_matrix
from edge_safe.export.quantization import MatrixFormat
from edge_safe.export.report import ExportReport
from edge_safe.export.tensorrt.releases import RELEASES
from edge_safe.models.safety_file import SAFETY_JSON, EarlyExit, read_safety_file
from edge_safe.models.safety_model import SafetyTokenModel
from edge_safe.runtime.bundle import open_bundle
from edge_safe.runtime.manifest import CAPACITY, Manifest, load_manifest
from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.policy import Policy
from edge_safe.runtime.session import PROVIDERS
from edge_safe.runtime.verdict import Decision
from tests.export.families import EXIT_LAYER

TEXTS = [
    "What is the capital of France?",
    "How do I pick the lock of my neighbour's shed?",
    "Tell me of boats, of rivers and of the people who live beside the water.",
    "A rope.",
]
EARLY_LAYER = 1
ALLOW = Policy(thresholds={"gate": 1.0})
PRECISIONS = ("fp32", "fp16", "int8", "int4")
# How far p_unsafe may be from the CPU's fp32, by what weights are kept as.
REACH = {"fp32": 1e-4, "fp16": 0.01, "int8": 0.1, "int4": 0.1}

Bundles = Callable[[str, bool], Path]


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The tiny checkpoint on lattices that TensorRT's 4 bits hold; then with an early exit."""
    folder = tmp_path_factory.mktemp("checkpoints")
    plain, early = folder / "plain", folder / "early"
    shutil.copytree(tiny_checkpoint, plain)
    round_layers(plain)
    shutil.copytree(plain, early)
    file = read_safety_file(early)
    exit_there = EarlyExit(
        EARLY_LAYER, file.calibration["gate.1"], file.calibration[f"gate.{EXIT_LAYER}"]
    )
    changed = msgspec.structs.replace(file, early=exit_there)
    (early / SAFETY_JSON).write_bytes(msgspec.json.encode(changed))
    return {False: plain, True: early}


def round_layers(folder: Path) -> None:
    """Puts layers' weights on lattices of -7 .. 7, the largest of every 64 being +-7."""
    model = LlamaForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        if "layers" in name and parameter.dim() == 2:
            weight = parameter.detach().numpy()
            blocks = weight.reshape(len(weight), -1, 64)
            step = np.abs(blocks).max(axis=-1, keepdims=True) / 7
            parameter.data[:] = parameter.new_tensor(np.rint(blocks / step) * step).reshape(
                parameter.shape
            )
    model.save_pretrained(folder)
