"""What a transformers configuration says of a text decoder, as data for the graphs.

Nothing here knows a family: each family's file says which of these its models have. Everything is
read from ``config.json``, so that what the graphs cannot express is refused before any weight is
loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from edge_safe.errors import CheckpointError, ExportError
from edge_safe.export.checkpoint.adapter import weights_folder
from edge_safe.export.checkpoint.reader import CheckpointReader
from edge_safe.export.checkpoint.streaming import streaming_model
from edge_safe.export.families.base import Opened, family_names, find_module, float_array
from edge_safe.export.graphs.spec import (
    Activation,
    DecoderSpec,
    FloatArray,
    LayerAttention,
    Rope,
    TensorSource,
)
from edge_safe.models.base_model import inner_config, load_base

# Scalings whose frequencies do not change with the length of the sequence.
STATIC_ROPE = {"default", "linear", "llama3", "yarn"}
# The attention kernel reads rotary tables in steps of this many columns.
ROPE_STEP = 8
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
LAYER_TYPES = ("full_attention", "sliding_attention")

# Largest torch model in fp32 that parity holds in memory, about 1B parameters.
HELD_BYTES = 4 * 2**30

SpecOf = Callable[[Any], DecoderSpec]
Translate = Callable[[TensorSource, DecoderSpec], TensorSource]


@dataclass(frozen=True, slots=True)
class TextFamily:
    """What a text-only family's file offers as ``TEXT``, to itself and to models that contain it.

    Attributes:
        spec_of: Describes the decoder from its configuration.
        translate: Gives the weights by the names of Llama's, where the family has other ones.
    """

    spec_of: SpecOf
    translate: Translate | None = None

    def tensors(self, tensor: TensorSource, spec: DecoderSpec) -> TensorSource:
        """The weights by the names of Llama's."""
        return tensor if self.translate is None else self.translate(tensor, spec)


def text_family(model_type: str) -> TextFamily:
    """The text-only family that a model's language part belongs to.

    Raises:
        ExportError: There is none of that type.
    """
    found = find_module(model_type)
    family = getattr(found, "TEXT", None)
    if not isinstance(family, TextFamily):
        known = [name for name in family_names() if hasattr(find_module(name), "TEXT")]
        raise ExportError(
            f"The language model inside is a {model_type!r}, which cannot be exported yet; "
            f"possible: {', '.join(known)}."
        )
    return family


def open_text(folder: Path, family: TextFamily) -> Opened:
    """Opens a text-only checkpoint in fp32.

    The torch model is held in memory up to ``HELD_BYTES``, else read layer by layer as it runs.

    Args:
        folder: The checkpoint, or an adapter for one.
        family: What its family's file offers.

    Raises:
        CheckpointError: It cannot be opened.
        ExportError: It uses something that the graphs cannot express.
    """
    base = weights_folder(folder)
    config = read_config(base)
    spec = family.spec_of(config)
    reader = CheckpointReader(folder, config)
    held = 4 * spec.parameters <= HELD_BYTES
    if reader.plain and held:
        # Read by transformers, so that parity also compares the two ways of reading.
        language = load_base(folder, torch.float32).model
    else:
        language = streaming_model(base, config, reader)
    return Opened(
        spec,
        family.tensors(reader.tensor, spec),
        language,
        load_tokenizer(folder, base),
        lattice=reader.lattice if reader.packed else None,
        streamed=not held,
    )


def load_tokenizer(folder: Path, base: Path) -> PreTrainedTokenizerBase:
    """Opens the tokenizer of a folder, or of its base model where it has none.

    Raises:
        CheckpointError: Neither has one that can be opened.
    """
    own = folder if (folder / "tokenizer_config.json").is_file() else base
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(own)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"Cannot open the tokenizer in {own}: {error}") from error
    return tokenizer


def read_config(folder: Path) -> Any:
    """Reads ``config.json`` as transformers does, with its defaults.

    Of a model that speaks as well, it is that of the part which reads and writes.

    Raises:
        ExportError: transformers refuses it.
    """
    try:
        return inner_config(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ExportError(f"transformers refuses {folder / 'config.json'}: {error}") from error


def tensors_of(model: PreTrainedModel) -> TensorSource:
    """The weights of a model by name, as float32, one at a time."""
    state = model.state_dict()

    def tensor(name: str) -> FloatArray:
        if name not in state:
            raise ExportError(f"The checkpoint has no tensor {name}.")
        return float_array(state[name])

    return tensor


def of_language(tensor: TensorSource, prefix: str) -> TensorSource:
    """The text model's weights by the names they have in a text-only checkpoint."""

    def named(name: str) -> FloatArray:
        head, _, rest = name.partition(".")
        return tensor(prefix + rest if head == "model" else name)

    return named


def decoder_spec(config: Any, activation: str, ropes: Sequence[Rope]) -> DecoderSpec:
    """What all these decoders have: sizes, RMSNorm, rotary embedding, a gated MLP.

    A family adds its own with ``dataclasses.replace``.

    Args:
        config: The configuration.
        activation: The name it gives to the activation of the MLP's gate.
        ropes: Its rotary embeddings.

    Raises:
        ExportError: There is no such activation in the graphs.
    """
    if activation not in ACTIVATIONS:
        raise ExportError(
            f"Activation {activation!r} has no counterpart in the graphs; they can: "
            f"{', '.join(ACTIVATIONS)}."
        )
    return DecoderSpec(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        eps=config.rms_norm_eps,
        ropes=tuple(ropes),
        # Of a language model inside another one the outer configuration says it.
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        activation=ACTIVATIONS[activation],
    )


def head_dim(config: Any) -> int:
    """Width of a head, by default the share of the model's width."""
    width: int | None = getattr(config, "head_dim", None)
    return width or config.hidden_size // config.num_attention_heads


def static_rope(
    config: Any,
    layer_type: str | None = None,
    *,
    partial: bool = False,
    kinds: Collection[str] = STATIC_ROPE,
) -> Rope:
    """The rotary embedding of a configuration.

    Frequencies are theta ** (-2 i / dim) (Su et al., RoFormer, arXiv 2104.09864), scaled where
    the configuration says so, in float32 as transformers computes them.

    Args:
        config: The configuration.
        layer_type: The kind of layer, where each kind has its own parameters.
        partial: Whether the family may rotate a first part of each head alone.
        kinds: Scalings whose frequencies do not change within the context of the bundle.

    Raises:
        ExportError: The frequencies change with the length of the prompt, or the kernel cannot
            read tables of that width.
    """
    parameters = config.rope_parameters
    if layer_type is not None:
        parameters = parameters[layer_type]
    kind = parameters.get("rope_type")
    if kind not in kinds:
        raise ExportError(
            f"Rotary scaling {kind!r} is not in the graphs, whose tables are the same for prompts "
            f"of any length; they can: {', '.join(sorted(kinds))}."
        )
    share = float(parameters.get("partial_rotary_factor", 1.0))
    if share != 1 and not partial:
        raise ExportError(
            f"partial_rotary_factor {share} is not known of model type {config.model_type!r}; "
            "it has to be 1."
        )
    scale = 1.0
    if kind == "default":
        width = int(head_dim(config) * share)
        exponents = torch.arange(0, width, 2, dtype=torch.float) / width
        frequencies = 1.0 / (parameters["rope_theta"] ** exponents)
    else:
        named = {} if layer_type is None else {"layer_type": layer_type}
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, **named)
    if len(frequencies) % ROPE_STEP:
        raise ExportError(
            f"{2 * len(frequencies)} dimensions of a head are rotated; the attention kernel takes "
            f"multiples of {2 * ROPE_STEP}."
        )
    return Rope(frequencies.double().numpy().astype(np.float64), float(scale))


def layer_windows(config: Any) -> list[int | None]:
    """The sliding window of each layer, from ``layer_types``.

    Raises:
        ExportError: A layer is of a kind that the graphs do not have.
    """
    for kind in config.layer_types:
        if kind not in LAYER_TYPES:
            raise ExportError(
                f"Layer type {kind!r} has no counterpart in the graphs; they can: "
                f"{', '.join(LAYER_TYPES)}."
            )
    return [
        sliding_window(config) if kind == "sliding_attention" else None
        for kind in config.layer_types
    ]


def uniform_windows(config: Any) -> list[int | None]:
    """The same window for every layer, where the configuration has one.

    Raises:
        ExportError: It holds no position.
    """
    window = None if config.sliding_window is None else sliding_window(config)
    return [window] * int(config.num_hidden_layers)


def sliding_window(config: Any) -> int | None:
    """The window of layers that have one, None where it holds the whole context.

    Raises:
        ExportError: There is none, or it holds no position.
    """
    window = config.sliding_window
    if window is None or window < 1:
        raise ExportError(
            f"Layers of type 'sliding_attention' need a sliding_window of at least 1, not {window}."
        )
    return int(window) if window < config.max_position_embeddings else None


def windowed(windows: Sequence[int | None]) -> tuple[LayerAttention, ...]:
    """Layers that differ in their windows alone; nothing where no layer has one."""
    if all(window is None for window in windows):
        return ()
    return tuple(LayerAttention(window=window) for window in windows)


def scale_of(scalar: float) -> float:
    """Factor of attention scores that are divided by the root of ``scalar``.

    Raises:
        ExportError: It is not positive.
    """
    if not scalar > 0:
        raise ExportError(f"query_pre_attn_scalar is {scalar}; it has to be more than 0.")
    return 1.0 / math.sqrt(scalar)
