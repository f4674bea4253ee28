"""Llamas of other shapes than the tiny checkpoint's, through the same emitter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from edge_safe.errors import ExportError
from edge_safe.export.decoder_config import tensors_of
from edge_safe.export.families.base import family_names
from edge_safe.export.families.llama import llama_spec
from edge_safe.export.graphs.decoder import decoder_graph, embedding_graph, store_model
from edge_safe.export.graphs.safety import TokenRows
from edge_safe.export.graphs.spec import DecoderSpec
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.language_graphs import LanguageGraphs
from edge_safe.export.quantization import PRECISIONS

SHAPE = {
    "vocab_size": 90,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


def seeded(model: PreTrainedModel) -> PreTrainedModel:
    """Random biases and norms too, which start as zeros and ones."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def llama(**changes: object) -> tuple[PreTrainedModel, DecoderSpec]:
    torch.manual_seed(3)
    model = seeded(LlamaForCausalLM(LlamaConfig(**SHAPE | changes)))
    return model, llama_spec(model.config)


CASES = {
    "untied": lambda: llama(tie_word_embeddings=False),
    "biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama3 rope": lambda: llama(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "yarn rope": lambda: llama(
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "one key head": lambda: llama(num_key_value_heads=1),
}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_decoder_of_another_shape(case: str, precision: str, tmp_path: Path) -> None:
    model, spec = CASES[case]()
    rows = TokenRows(np.eye(2, 64, dtype=np.float32), None)
    with WeightStore(tmp_path / "weights.onnx.data") as store:
        weights = store_model(
            store, spec, tensors_of(model), PRECISIONS[precision], lambda share: None
        )
        embedding_graph(weights, spec).save(tmp_path / "embed_tokens.onnx")
        decoder_graph(weights, spec, None, rows, store).save(tmp_path / "decoder.onnx")
    graphs = LanguageGraphs(tmp_path, spec, None, [])
    ids = np.random.default_rng(0).integers(0, 90, (1, 70))
    embeds, mask = graphs.embed(ids), np.ones((1, 70), np.int64)
    first = graphs.run(embeds[:, :66], mask[:, :66], graphs.empty(1))
    found = graphs.run(embeds[:, 66:], mask, first.cache)
    output = model(torch.tensor(ids), output_hidden_states=True)
    expected = output.logits[0, -1].numpy()
    if precision == "fp32":
        np.testing.assert_allclose(found.logits[0], expected, atol=1e-4, rtol=1e-4)
        state = output.hidden_states[-1][0, -2].numpy()
        np.testing.assert_allclose(found.final_verdict[0], state[:2], atol=1e-4, rtol=1e-4)
    else:
        assert np.corrcoef(found.logits[0], expected)[0, 1] > 0.99


def test_rope_that_changes_with_length_is_refused() -> None:
    with pytest.raises(ExportError, match="dynamic"):
        llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})


def test_another_activation_is_refused() -> None:
    with pytest.raises(ExportError, match="gelu"):
        llama(hidden_act="gelu")


def test_families_are_files() -> None:
    assert family_names() == [
        "gemma", "gemma3", "gemma3_text", "idefics3", "internvl", "llama", "llava",
        "llava_onevision", "mistral", "paligemma", "pebble", "phi3", "phi4_multimodal", "qwen2",
        "qwen2_5_omni", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_audio", "qwen2_vl", "qwen3",
        "qwen3_vl", "smollm3", "smolvlm", "voxtral",
    ]  # fmt: skip
