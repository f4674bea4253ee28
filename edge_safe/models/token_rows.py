"""Input embedding rows that train while the rest of the embedding stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class TokenRows(nn.Module):
    """Own input embeddings of a few tokens, put in place of the embedding's.

    The embedding itself gets no gradient, so a tied lm_head cannot move either. ``merge`` writes
    the rows back.

    Args:
        model: The model; a hook on its input embedding is set.
        ids: Tokens that get a row of their own.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int]) -> None:
        super().__init__()
        embedding = model.get_input_embeddings()
        self.ids = tuple(ids)
        # In a tuple, so that the embedding does not become a part of this module.
        self._embedding = (embedding,)
        self.rows = nn.Parameter(self.embedding_weight[list(ids)].detach().float().clone())
        # Gemma's embedding multiplies its rows on their way out.
        self._scale = float(getattr(embedding, "embed_scale", 1.0))
        self._hook = embedding.register_forward_hook(self._replace)

    @property
    def embedding_weight(self) -> Tensor:
        """(V, d) weight of the embedding the rows stand in."""
        return cast(Tensor, self._embedding[0].weight)

    def _replace(self, _: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        for number, token in enumerate(self.ids):
            here = (arguments[0] == token).unsqueeze(-1)
            output = torch.where(here, (self._scale * self.rows[number]).to(output.dtype), output)
        return output

    def merge(self) -> None:
        """Writes the rows into the embedding and takes the hook off."""
        self._hook.remove()
        weight = self.embedding_weight
        with torch.no_grad():
            weight[list(self.ids)] = self.rows.detach().to(weight.dtype).to(weight.device)
