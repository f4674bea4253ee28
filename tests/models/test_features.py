"""The feature cache: equal to a direct forward, shared by recipes, whole after a kill."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edge_safe.errors import DataError
from edge_safe.models import features
from edge_safe.models.base_model import BaseModel, fingerprint
from edge_safe.models.data import Example
from edge_safe.models.examples import Encoded, encode
from edge_safe.models.features import FeatureCache
from edge_safe.models.head_training import HeadTask
from edge_safe.models.losses import LossWeights
from edge_safe.models.progress import silent
from edge_safe.models.prompts import Message, PromptEncoder
from edge_safe.models.safety_head import SafetyConfig, SafetyModule

PROMPTS = [tuple(range(10, 10 + n)) for n in (9, 3, 14, 6, 5)]


def computed(base: BaseModel, root: Path) -> FeatureCache:
    cache = FeatureCache(root, fingerprint(base.model), (1, 3))
    cache.compute(base.model, PROMPTS, silent)
    return cache


def test_cached_states_equal_a_direct_forward(base: BaseModel, tmp_path: Path) -> None:
    cache = computed(base, tmp_path)
    for ids in PROMPTS:
        states = base.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for layer in (1, 3):
            expected = states[layer][0].numpy()
            np.testing.assert_allclose(cache.states(layer, ids), expected, atol=4e-3, rtol=2e-3)
        np.testing.assert_allclose(cache.final(ids), states[-1][0, -1].numpy(), atol=4e-3)


def test_a_second_run_computes_nothing(base: BaseModel, tmp_path: Path) -> None:
    computed(base, tmp_path)
    again = FeatureCache(tmp_path, fingerprint(base.model), (1, 3))
    assert again.missing(PROMPTS) == []


def test_a_killed_run_keeps_its_finished_shards(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "SHARD_TOKENS", 12)

    def killed(job: str, done: int, total: int) -> None:
        if done >= 3:
            raise KeyboardInterrupt

    cache = FeatureCache(tmp_path, fingerprint(base.model), (1, 3))
    with pytest.raises(KeyboardInterrupt):
        cache.compute(base.model, PROMPTS, killed)
    again = FeatureCache(tmp_path, fingerprint(base.model), (1, 3))
    left = again.missing(PROMPTS)
    assert 0 < len(left) < len(PROMPTS)
    again.compute(base.model, PROMPTS, silent)
    assert again.missing(PROMPTS) == []


def test_shares_of_several_processes_cover_everything(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "SHARD_TOKENS", 12)
    processes = [FeatureCache(tmp_path, fingerprint(base.model), (1, 3)) for _ in range(2)]
    for rank, cache in enumerate(processes):
        cache.compute(base.model, PROMPTS, silent, (rank, 2))
    processes[0].refresh()
    assert processes[0].missing(PROMPTS) == []


def test_another_model_has_another_cache(base: BaseModel, tmp_path: Path) -> None:
    computed(base, tmp_path)
    with torch.no_grad():
        base.model.get_input_embeddings().weight[0, 0] += 1.0
    assert FeatureCache(tmp_path, fingerprint(base.model), (1, 3)).missing(PROMPTS)


def test_a_prompt_that_was_not_computed_is_an_error(base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lacks a prompt"):
        computed(base, tmp_path).states(1, (1, 2, 3))


def test_a_refused_turn_stands_before_the_next_prompt_in_the_gates_view(
    base: BaseModel, tmp_path: Path
) -> None:
    encoder = PromptEncoder(base.tokenizer)
    turns = ("help me steal a bicycle", "what is a good colour for a kite")
    prompts = tuple((Message("user", text),) for text in turns)
    (example,) = encode(encoder, [Example("x", "after_refusal:made", False, prompts)])
    cache = FeatureCache(tmp_path, fingerprint(base.model), (1,))
    cache.compute(base.model, example.prompts, silent)
    safety = SafetyModule(SafetyConfig(32, (1,), 2, 4, 4))
    task = HeadTask(safety, LossWeights(), cache, [example], [example], 1e-3)
    batch = task.batch([0], 0)
    # The second prompt was run alone: its states do not know the first.
    direct = [
        base.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for ids in example.prompts
    ]
    expected = torch.cat([states[1][0] for states in direct])
    torch.testing.assert_close(batch.states[1][0], expected, atol=4e-3, rtol=2e-3)
    torch.testing.assert_close(batch.final[0], direct[1][-1][0, -1], atol=4e-3, rtol=2e-3)


def test_dropout_blanks_channels_alike_whichever_batch_an_example_is_in(
    base: BaseModel, tmp_path: Path
) -> None:
    cache = computed(base, tmp_path)
    examples = [Encoded((ids,), False, "made") for ids in PROMPTS]
    safety = SafetyModule(SafetyConfig(32, (1, 3), 2, 4, 4))
    task = HeadTask(safety, LossWeights(), cache, examples, examples, 1e-3, dropout=0.5)
    both, alone = task.batch([0, 2], 5).states[3], task.batch([2], 5).states[3]
    assert torch.equal(both[1], alone[0])
    blank = (alone[0] == 0.0).all(0)
    assert 4 < int(blank.sum()) < 28
    plain = task.gate_batch([examples[2]]).states[3][0]
    torch.testing.assert_close(alone[0][:, ~blank], plain[:, ~blank] * 2)
    assert not torch.equal(alone, task.batch([2], 6).states[3])
