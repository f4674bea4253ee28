"""Opens the language model that a safety token is added to, and runs it for its hidden states.

A family that has its own package here (``edge_safe.models.<model_type>``) registers itself with
the Auto classes when that package is imported.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from edge_safe.errors import CheckpointError

# Where a model that speaks as well describes the part that reads and writes.
THINKER = "thinker_config"


@dataclass(slots=True)
class BaseModel:
    """A model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(slots=True)
class PromptStates:
    """States of a batch of prompts.

    Attributes:
        layers: By depth k, (B, T, d) states entering layer k.
        final: (B, T, d) normalized states at full depth.
        logits: (B, T, V).
    """

    layers: dict[int, Tensor]
    final: Tensor
    logits: Tensor


def load_base(folder: Path, dtype: torch.dtype, *, untrained: bool = False) -> BaseModel:
    """Opens a checkpoint folder, text-only or multimodal.

    Args:
        folder: The checkpoint.
        dtype: Of the model's weights.
        untrained: For pebble: start from its parts, without what was trained here.

    Raises:
        CheckpointError: The folder is none, or its model cannot be opened.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = str(config["model_type"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder} is no model folder: config.json with a model_type is needed ({error})."
        ) from error
    if untrained and model_type != "pebble":
        raise CheckpointError(f"model.from_parts is for pebble; {folder} is a {model_type}.")
    own = f"edge_safe.models.{model_type}"
    if model_type.isidentifier() and importlib.util.find_spec(own) is not None:
        importlib.import_module(own)
    try:
        options: dict[str, Any] = {"untrained": True} if untrained else {}
        if THINKER in config:
            # Given this configuration, transformers leaves the weights of the other parts alone.
            options["config"] = inner_config(AutoConfig.from_pretrained(folder))
            model_type = options["config"].model_type
        model = _auto_class(model_type).from_pretrained(folder, dtype=dtype, **options)
        # Mistral's own package, where it is installed, would come first, without tokenizer.json.
        tokenizer = AutoTokenizer.from_pretrained(folder, mistral_format=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"Cannot open the model in {folder}: {error}") from error
    model.train(False)
    return BaseModel(model.requires_grad_(False), tokenizer)


def inner_config(config: Any) -> Any:
    """Of a model that speaks as well, the configuration of the part that reads and writes."""
    return getattr(config, THINKER, config)


def _auto_class(model_type: str) -> Any:
    """The Auto class that opens a model type with its lm_head."""
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    sees = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES and not sees:
        return AutoModelForMultimodalLM
    return AutoModelForImageTextToText


def text_layers(model: PreTrainedModel) -> int:
    """Number of decoder layers of the language model."""
    return int(model.config.get_text_config().num_hidden_layers)


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the language model's hidden states."""
    return int(model.config.get_text_config().hidden_size)


def check_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Refuses depths that are not between the first and the last layer.

    Raises:
        CheckpointError: The message says which depths there are.
    """
    count = text_layers(model)
    wrong = [k for k in layers if not 1 <= k < count]
    if wrong:
        raise CheckpointError(
            f"Heads at layers {wrong} are impossible: the model has {count} layers, so a head "
            f"reads the states entering layer 1 to {count - 1}."
        )


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers of the language model.

    Raises:
        CheckpointError: None is found.
    """
    count = text_layers(model)
    decoder: nn.Module = cast(Any, model).get_decoder()
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise CheckpointError(f"{type(model).__name__} has no list of {count} decoder layers.")


def run(
    model: nn.Module,
    layers: Sequence[int],
    input_ids: Tensor,
    mask: Tensor,
    prompts: Sequence[int],
) -> PromptStates:
    """Runs right-padded ids (B, T) with their mask (B, T) once.

    Args:
        model: The model.
        layers: Depths to read.
        input_ids: Prompts, with what follows them.
        mask: True at positions that are no padding.
        prompts: (B,) lengths of the prompts.
    """
    output = model(
        input_ids=input_ids,
        attention_mask=mask.long(),
        output_hidden_states=True,
        use_cache=False,
        **token_types(model, input_ids, prompts),
    )
    states = output.hidden_states
    return PromptStates({k: states[k] for k in layers}, states[-1], output.logits)


def run_decoder(
    model: nn.Module, layers: Sequence[int], input_ids: Tensor, mask: Tensor
) -> tuple[dict[int, Tensor], Tensor]:
    """Runs the decoder alone, without lm_head, which costs more than the rest of a short prompt.

    Returns:
        By depth k, the (B, T, d) states entering layer k; and the (B, T, d) normalized states at
        full depth.
    """
    types = token_types(model, input_ids, [input_ids.shape[1]] * len(input_ids))
    # Only the model around the decoder knows of prompts that see themselves.
    decoder: nn.Module = cast(Any, model).model if types else cast(Any, model).get_decoder()
    output = decoder(
        input_ids=input_ids,
        attention_mask=mask.long(),
        output_hidden_states=True,
        use_cache=False,
        **types,
    )
    return {k: output.hidden_states[k] for k in layers}, output.last_hidden_state


def token_types(model: nn.Module, input_ids: Tensor, prompts: Sequence[int]) -> dict[str, Tensor]:
    """What a model whose prompt's positions see each other has to be told.

    PaliGemma: 0 in the prompt, 1 behind it (arXiv 2407.07726).
    """
    if cast(Any, model).config.model_type != "paligemma":
        return {}
    steps = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    lengths = torch.tensor(list(prompts), device=input_ids.device)[:, None]
    return {"token_type_ids": (steps >= lengths).long()}


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids (B, T) int64 and their mask (B, T) bool.

    Padding ids are 0: they are masked out everywhere, so their value is of no account.
    """
    length = max(len(row) for row in rows)
    ids = torch.tensor([list(row) + [0] * (length - len(row)) for row in rows], device=device)
    sizes = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(length, device=device)[None] < sizes[:, None]


def fingerprint(model: PreTrainedModel) -> str:
    """Hash of a model's configuration and of every weight's bytes."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()
