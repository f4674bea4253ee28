"""Readers of the speech and object towers' files, on small files written here."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from edge_safe.errors import PartsError
from edge_safe.models.pebble.ctranslate2_file import read_variables, whisper_encoder_weights
from edge_safe.models.pebble.efficientnet_lite import EfficientNetLite, SameConv, read_checkpoint


def written(variables: dict[str, np.ndarray], aliases: dict[str, str], version: int = 6) -> bytes:
    """CTranslate2's binary layout, written from its description."""

    def text(value: str) -> bytes:
        data = value.encode() + b"\x00"
        return len(data).to_bytes(2, "little") + data

    kinds = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
    out = version.to_bytes(4, "little") + text("WhisperSpec") + (3).to_bytes(4, "little")
    out += len(variables).to_bytes(4, "little")
    for name, array in variables.items():
        out += text(name) + bytes([array.ndim])
        out += b"".join(struct.pack("<I", size) for size in array.shape)
        out += bytes([kinds[str(array.dtype)]]) + struct.pack("<I", array.nbytes) + array.tobytes()
    out += len(aliases).to_bytes(4, "little")
    return out + b"".join(text(a) + text(b) for a, b in aliases.items())


def packed(encoder: WhisperEncoder) -> dict[str, np.ndarray]:
    """A transformers encoder in CTranslate2's names, query, key and value stacked."""
    state = {k: v.detach().numpy().astype(np.float16) for k, v in encoder.state_dict().items()}
    out = {
        "encoder/num_heads": np.array(2, np.int16),
        "encoder/position_encodings/encodings": state["embed_positions.weight"],
    }
    for name in ("conv1", "conv2"):
        out[f"encoder/{name}/weight"] = state[f"{name}.weight"]
        out[f"encoder/{name}/bias"] = state[f"{name}.bias"]
    for i in range(2):
        ours, theirs = f"layers.{i}", f"encoder/layer_{i}"
        attention = f"{ours}.self_attn"
        weights = [state[f"{attention}.{p}_proj.weight"] for p in "qkv"]
        query, value = state[f"{attention}.q_proj.bias"], state[f"{attention}.v_proj.bias"]
        out[f"{theirs}/self_attention/linear_0/weight"] = np.concatenate(weights)
        biases = [query, np.zeros_like(query), value]
        out[f"{theirs}/self_attention/linear_0/bias"] = np.concatenate(biases)
        for a, b in (("self_attention/linear_1", "self_attn.out_proj"),):
            out[f"{theirs}/{a}/weight"] = state[f"{ours}.{b}.weight"]
            out[f"{theirs}/{a}/bias"] = state[f"{ours}.{b}.bias"]
        for a, b in (("ffn/linear_0", "fc1"), ("ffn/linear_1", "fc2")):
            out[f"{theirs}/{a}/weight"] = state[f"{ours}.{b}.weight"]
            out[f"{theirs}/{a}/bias"] = state[f"{ours}.{b}.bias"]
        norms = (("self_attention", "self_attn_layer_norm"), ("ffn", "final_layer_norm"))
        for a, b in norms:
            out[f"{theirs}/{a}/layer_norm/gamma"] = state[f"{ours}.{b}.weight"]
            out[f"{theirs}/{a}/layer_norm/beta"] = state[f"{ours}.{b}.bias"]
    out["encoder/layer_norm/gamma"] = state["layer_norm.weight"]
    out["encoder/layer_norm/beta"] = state["layer_norm.bias"]
    return out


@pytest.fixture
def encoder() -> WhisperEncoder:
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=8,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=12,
        num_mel_bins=4,
        max_source_positions=10,
    )
    made = WhisperEncoder(config)
    made.train(False)
    return made.half().float()


def test_a_whisper_encoder_comes_back_from_ctranslate2(
    encoder: WhisperEncoder, tmp_path: Path
) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(written(packed(encoder), {}))
    weights = whisper_encoder_weights(read_variables(path))
    again = WhisperEncoder(encoder.config)
    again.train(False)
    again.load_state_dict(weights, strict=True)
    sound = torch.randn(1, 4, 20)
    expected = encoder(sound).last_hidden_state
    torch.testing.assert_close(again(sound).last_hidden_state, expected, rtol=0, atol=0)


def test_aliases_name_the_same_variable(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    path.write_bytes(written({"one": array}, {"other": "one"}))
    np.testing.assert_array_equal(read_variables(path)["other"], array)


def test_another_binary_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(written({}, {}, version=5))
    with pytest.raises(PartsError, match="version 5"):
        read_variables(path)


def test_a_file_that_ends_too_early_is_refused(encoder: WhisperEncoder, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(written(packed(encoder), {})[:-100])
    with pytest.raises(PartsError, match="too early"):
        read_variables(path)


def test_a_variable_that_was_not_understood_is_named(
    encoder: WhisperEncoder, tmp_path: Path
) -> None:
    path = tmp_path / "model.bin"
    extra = packed(encoder) | {"encoder/extra": np.zeros(1, np.float32)}
    path.write_bytes(written(extra, {}))
    with pytest.raises(PartsError, match="encoder/extra"):
        whisper_encoder_weights(read_variables(path))


def test_same_padding_puts_the_larger_half_at_the_end() -> None:
    layer = SameConv(1, 1, 3, 2, 1)
    layer.train(False)
    with torch.no_grad():
        layer.convolution.weight.fill_(1.0)
    found = layer(torch.ones(1, 1, 4, 4))[0, 0]
    # TensorFlow pads 0 before and 1 behind: only windows at the end lose cells.
    expected = torch.tensor([[9.0, 6.0], [6.0, 4.0]])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_lite0_has_the_published_size_and_grid() -> None:
    net = EfficientNetLite()
    trained = sum(p.numel() for p in net.parameters())
    assert trained + 1280 * 1000 + 1000 == 4_652_008  # published with its classifier
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 4, 1280)


def test_the_object_tower_never_leaves_inference_mode() -> None:
    net = torch.nn.Sequential(EfficientNetLite(4, (), 8))
    net.train()
    assert not any(module.training for module in net[0].modules())


def test_a_checkpoint_with_foreign_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"backbone.weight": torch.zeros(1)}, path)
    with pytest.raises(PartsError, match=r"backbone\.weight"):
        read_checkpoint(path)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "code.pth"
    torch.save({"_fc.weight": Path("x")}, path)
    with pytest.raises(PartsError, match="not a readable torch checkpoint"):
        read_checkpoint(path)
