"""An encoder of Whisper's kind with its projector: the graph, and what torch makes of the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_safe.export.families.base import Emission, TowerCase, float_array
from edge_safe.export.graphs.builder import FLOAT, INT64, GraphBuilder
from edge_safe.export.graphs.matrices import Matrix
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.towers.modules import Layers
from edge_safe.export.towers.tower import GraphTower
from edge_safe.export.towers.whisper import whisper_states
from edge_safe.runtime.audio_io import SAMPLE_RATE
from edge_safe.runtime.audio_windows import STRIDE, Windows, cut, mel_features
from edge_safe.runtime.hearing import AUDIO_ENCODER

SOURCE, STEPS, RESULT = "input_features", "steps", "audio_features"

Project = Callable[[Any, Layers, str], str]
Features = Callable[[Any, Tensor, int], Tensor]


def audio_tower(
    model: Any,
    windows: Windows,
    width: int,
    project: Project,
    features: Features,
    positions: Tensor,
) -> GraphTower:
    """The graph input_features (1, bins, frames) -> audio_features (1, tokens, width).

    Frames vary but for windows of the kind ``whole``; for those of the kind ``sound`` a second
    input ``steps`` (1,) int64 says how many states the sound has.

    Args:
        model: The torch model.
        windows: What the runtime feeds.
        width: Width of the language model.
        project: Emits what stands behind the encoder's layers, given the model, the graph and the
            name of the states (1, T, c); returns the output's name.
        features: What torch makes of the features (1, bins, frames) of a sound that is so many
            frames long, (1, tokens, width).
        positions: Embeddings (states, c) of the encoder's positions.
    """
    whole = windows.kind == "whole"

    def build(emission: Emission, store: WeightStore) -> tuple[GraphBuilder, list[Matrix]]:
        g = GraphBuilder(AUDIO_ENCODER)
        x = g.input(SOURCE, FLOAT, [1, windows.feature_size, windows.frames if whole else "frames"])
        steps = g.input(STEPS, INT64, [1]) if windows.kind == "sound" else None
        tokens = windows.frames // STRIDE // windows.states_per_token
        g.output(RESULT, FLOAT, [1, tokens if whole else "tokens", width])
        layers = Layers(g, store, emission.precision.towers)
        states = whisper_states(layers, x, model.model.audio_tower, positions, steps)
        g.op("Identity", [project(model, layers, states)], scope="features", outputs=[RESULT])
        return g, layers.matrices

    def cases() -> Iterator[TowerCase]:
        random = np.random.default_rng(0)
        for label, frames in _lengths(windows):
            count = min(frames * windows.hop_length, windows.chunk_length * SAMPLE_RATE)
            samples = random.normal(0, 0.1, count).astype(np.float32)
            with torch.no_grad():
                mel = torch.from_numpy(mel_features(samples, windows))
                expected = float_array(features(model, mel, frames))
            first = 0
            for window in cut(samples, windows):
                part = expected[:, first : first + window.tokens]
                first += window.tokens
                yield TowerCase(label, window.feeds, {RESULT: part})

    return GraphTower(AUDIO_ENCODER, build, cases)


def _lengths(windows: Windows) -> list[tuple[str, int]]:
    """Sounds on which graphs are compared, in frames."""
    if windows.kind == "whole":
        return [("half a window", windows.frames // 2), ("a window", windows.frames)]
    token = STRIDE * windows.states_per_token
    if windows.chunk_frames is not None:
        length = windows.chunk_frames
        return [
            ("one token", token),
            ("half a window", length // 2 // token * token + 1),
            ("a window", length),
            ("two windows and some", 2 * length + token),
        ]
    # An odd number of states: the last one is heard but makes no token.
    odd = windows.frames // 2 // token * token + STRIDE
    return [("one token", token), ("half a window", odd), ("a window", windows.frames)]
