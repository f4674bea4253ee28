"""Parity of greedy text: the graphs decode along torch's text, and freely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edge_safe.export.language_graphs import Cache, LanguageGraphs
from edge_safe.export.reference import Reference

Array = npt.NDArray[Any]

GREEDY_TOKENS = 32


class GreedyParity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Greedy decoding beside torch's.

    Attributes:
        tokens: Tokens compared over all prompts.
        agreement: Share of steps with the same best token after the same text.
        identical_prefix: Mean number of tokens until free-running texts part.
        kl: Mean KL divergence of the next-token distribution from torch's, in nats.
        max_kl: The largest of one step.
        perplexity: Perplexity of the text under the bundle over that under torch.
    """

    tokens: int
    agreement: float
    identical_prefix: float
    kl: float
    max_kl: float
    perplexity: float


def check_greedy(
    graphs: LanguageGraphs, reference: Reference, prompts: Sequence[Array]
) -> GreedyParity:
    """Decodes after each prompt, along torch's text and freely.

    A streamed model reads one text of the graphs' own instead, in one run: it agrees where it
    would have gone on alike.
    """
    agreed: list[bool] = []
    kls: list[float] = []
    prefixes = []
    lost: list[float] = []
    for embeds in prompts:
        if reference.streamed:
            forced = _decode(graphs, embeds, None)
            own = [int(row.argmax()) for row in forced]
            expected = reference.follow(embeds, own)
            same = expected.argmax(-1) == np.array(own)
            agreed += list(same)
            kls += list(_kl(expected, forced))
            lost += _lost(expected, forced, own)
            prefixes.append(GREEDY_TOKENS if same.all() else int(same.argmin()))
            continue
        tokens, expected = reference.greedy(embeds, GREEDY_TOKENS)
        forced = _decode(graphs, embeds, tokens)
        agreed += list(forced.argmax(-1) == np.array(tokens))
        kls += list(_kl(expected, forced))
        lost += _lost(expected, forced, tokens)
        free = [int(row.argmax()) for row in _decode(graphs, embeds, None)]
        parted = [n for n, (a, b) in enumerate(zip(free, tokens, strict=True)) if a != b]
        prefixes.append(parted[0] if parted else GREEDY_TOKENS)
    return GreedyParity(
        tokens=len(agreed),
        agreement=float(np.mean(agreed)),
        identical_prefix=float(np.mean(prefixes)),
        kl=float(np.mean(kls)),
        max_kl=float(np.max(kls)),
        perplexity=float(np.exp(np.mean(lost))),
    )


def _decode(graphs: LanguageGraphs, embeds: Array, tokens: Sequence[int] | None) -> Array:
    """(steps, V) logits of a decoding that follows ``tokens``, or its own best ones."""
    length = int(embeds.shape[1])
    output = graphs.run(embeds, np.ones((1, length), np.int64), graphs.empty(1))
    rows = [output.logits[0]]
    empty = graphs.empty(1).gate
    for step in range(GREEDY_TOKENS - 1):
        token = int(rows[-1].argmax()) if tokens is None else tokens[step]
        mask = np.ones((1, length + step + 1), np.int64)
        # As the runtime does, the gate's columns are not carried through while decoding.
        cache = Cache(output.cache.layers, empty)
        output = graphs.run(graphs.embed(np.array([[token]])), mask, cache)
        rows.append(output.logits[0])
    return np.stack(rows)


def _kl(expected: Array, found: Array) -> Array:
    """(n,) KL(expected || found) of rows of logits."""
    p, q = _log_softmax(expected), _log_softmax(found)
    divergence: Array = (np.exp(p) * (p - q)).sum(-1)
    return divergence


def _lost(expected: Array, found: Array, tokens: Sequence[int]) -> list[float]:
    """Log-probability that each token of a text loses."""
    rows = np.arange(len(tokens))
    p, q = _log_softmax(expected)[rows, tokens], _log_softmax(found)[rows, tokens]
    return [float(value) for value in p - q]


def _log_softmax(logits: Array) -> Array:
    highest: Array = np.max(logits, axis=-1, keepdims=True)
    shifted: Array = np.subtract(logits, highest, dtype=np.float64)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
