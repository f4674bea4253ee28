"""The projectors: padding, selection and read-out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_safe.models.pebble.projectors import (
    SequenceProjector,
    SequenceProjectorConfig,
)

SHAPE = SequenceProjectorConfig(
    state_size=6, hidden_size=8, width=16, layers=2, heads=2, kernel=5, window=3, candidates=3
)


@pytest.fixture
def projector() -> SequenceProjector:
    torch.manual_seed(0)
    return SequenceProjector(SHAPE).eval()


def test_padding_changes_no_real_step(projector: SequenceProjector) -> None:
    states = torch.randn(1, 9, 6)
    lengths = torch.tensor([9])
    alone = projector(states, lengths)
    padded = torch.cat([states, torch.full((1, 7, 6), 50.0)], 1)
    beside = projector(torch.cat([padded, torch.randn(1, 16, 6)]), torch.tensor([9, 16]))
    for short, long in zip(alone, beside, strict=True):
        torch.testing.assert_close(short[0], long[0, :9], rtol=0, atol=1e-6)


def test_attention_sees_no_further_than_its_window(projector: SequenceProjector) -> None:
    attention = projector.blocks[0].attention
    states = torch.randn(1, 12, 16)
    changed = states.clone()
    changed[0, 8:] += 3.0
    keep = torch.ones(1, 12, 1)
    difference = (attention(states, keep) - attention(changed, keep)).abs().amax(-1)[0]
    assert difference[:5].max() == 0
    assert difference[5:8].min() > 0


def test_select_reads_line_by_line_and_skips_padding(projector: SequenceProjector) -> None:
    emission = torch.tensor([[1.0, -1.0, 2.0, 3.0], [-1.0, 0.5, 0.0, 1.0]])
    line, step = projector.select(emission, torch.tensor([3, 4]))
    assert line.tolist() == [0, 0, 1, 1]
    assert step.tolist() == [0, 2, 1, 3]


def test_read_out_is_the_weighted_mean_of_the_best_rows(projector: SequenceProjector) -> None:
    generator = np.random.default_rng(0)
    query = generator.normal(size=(4, 8)).astype(np.float32)
    embedding = generator.normal(size=(40, 8)).astype(np.float32)
    logits = query @ embedding.T
    expected = []
    for row in logits:
        best = np.argsort(row)[::-1][:3]
        weight = np.exp(row[best] - row[best].max())
        expected.append((weight / weight.sum()) @ embedding[best])
    found, pieces = projector.read_out(torch.from_numpy(query), torch.from_numpy(embedding))
    np.testing.assert_allclose(found.numpy(), np.stack(expected), atol=1e-6)
    assert pieces.tolist() == logits.argmax(-1).tolist()


def test_the_same_piece_at_neighbouring_steps_is_read_once(projector: SequenceProjector) -> None:
    with torch.no_grad():
        projector.emission.weight.zero_()
        projector.emission.bias.fill_(1.0)
        projector.query.weight.zero_()
    features, line, pieces = projector.read(
        torch.randn(2, 5, 6), torch.tensor([5, 3]), torch.randn(20, 8)
    )
    assert line.tolist() == [0, 1]
    assert len(features) == len(pieces) == 2


def test_a_picture_without_text_gives_no_embedding(projector: SequenceProjector) -> None:
    with torch.no_grad():
        projector.emission.weight.zero_()
        projector.emission.bias.fill_(-1.0)
    features, line = projector.project(
        torch.randn(2, 5, 6), torch.tensor([5, 3]), torch.randn(20, 8)
    )
    assert features.shape == (0, 8)
    assert line.shape == (0,)


def test_own_pieces_are_emitted_where_one_is_likelier_than_silence() -> None:
    torch.manual_seed(3)
    projector = SequenceProjector(
        SequenceProjectorConfig(state_size=6, hidden_size=8, width=16, layers=1, heads=2, pieces=5)
    ).eval()
    projector.piece_ids.copy_(torch.tensor([3, 8, 11, 20, 21]))
    states, lengths = torch.randn(1, 16, 6), torch.tensor([15])
    with torch.no_grad():
        projector.emission.weight.mul_(8)
        projector.classes.weight.mul_(8)
        emission, query = projector(states, lengths)
        _, _, pieces = projector.read(states, lengths, torch.randn(30, 8))
    emits = emission[0].sigmoid()[:, None]
    steps = torch.cat([1 - emits, emits * projector.classes(query[0]).softmax(-1)], -1)[:15]
    path = steps.argmax(-1).tolist()
    merged = [p for i, p in enumerate(path) if p and (i == 0 or path[i - 1] != p)]
    assert pieces.tolist() == projector.piece_ids[torch.tensor(merged) - 1].tolist()
    assert 0 < len(merged) < 15
