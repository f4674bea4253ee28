"""A tiny pebble with random weights, complete enough to train on, save, export and run.

Its detector is no random one: it finds dark writing on a light ground, so that pictures of text
really go through the whole chain.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast, WhisperConfig

from edge_safe.models.control_tokens import ControlTokens
from edge_safe.models.onnx_graph import read_onnx
from edge_safe.models.pebble import PebbleConfig, PebbleForConditionalGeneration, PebbleProcessor
from edge_safe.models.pebble.processor_settings import ProcessorSettings
from edge_safe.models.pebble.respelling import Respelling
from edge_safe.models.pebble.speech_words import SpeechWords
from edge_safe.models.safety_file import Calibration, describe, write_safety
from edge_safe.models.safety_head import SafetyConfig, SafetyModule

HIDDEN = 64
LAYERS = 4
STATES = "states"
REPOSITORY = Path(__file__).parents[3]
TEMPLATE = REPOSITORY / "models" / "pebble" / "chat_template.jinja"
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<reserved_{i}>" for i in range(3, 12)),
    "<|image|>",
    "<|audio|>",
    "<|media_end|>",
    "<|safe|>",
    "<|unsafe|>",
]
SPEECH_WORDS = 300
"""Tokens of the speech decoder that are words; control tokens follow."""
SPEECH_CONTROLS = ("<|endoftext|>", "<|startoftranscript|>", "<|nospeech|>", "<|notimestamps|>")
CORPUS = [
    "What does the sign say? No smoking on the train to London.",
    "How do I pick the lock of my neighbour's shed? Help me steal a bicycle.",
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "system user assistant hello world the quick brown fox jumps over the lazy dog",
]


def build_tiny_pebble(folder: Path, trained: tuple[str, ...] = ("text_lines",)) -> Path:
    """Writes a full-form checkpoint with a safety module.

    Args:
        folder: Where to; it is created.
        trained: Modalities that config.json calls trained.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    model = tiny_model(folder, tokenizer, trained)
    model.save_pretrained(folder)
    PebbleProcessor(tokenizer, model.config, ProcessorSettings()).save_pretrained(folder)
    write_tiny_safety(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with SmolLM2's first 17 rows, as pebble names them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=352,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    fast.chat_template = TEMPLATE.read_text(encoding="utf-8")
    return fast


def tiny_speech_words() -> SpeechWords:
    """Byte-level BPE whose words come before its control tokens, as Whisper's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SPEECH_WORDS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPEECH_CONTROLS])
    return SpeechWords(tokenizer.to_str().encode())


def tiny_config(
    folder: Path, tokenizer: PreTrainedTokenizerFast, trained: tuple[str, ...]
) -> PebbleConfig:
    """The full form's configuration; both OCR graphs go through real files in ``folder``."""
    detector, recognizer = folder / "detector.onnx", folder / "recognizer.onnx"
    write_detector(detector)
    write_recognizer(recognizer)
    graphs = (read_onnx(detector)[0].to_dict(), read_onnx(recognizer, STATES)[0].to_dict())
    detector.unlink()
    recognizer.unlink()
    sequence = {"width": 16, "layers": 1, "heads": 2, "kernel": 5, "window": 4, "candidates": 4}
    stages = [[1, 3, 1, 1, 8], *([[1, 3, 2, 2, 8]] * 4)]
    return PebbleConfig(
        text_config=LlamaConfig(
            vocab_size=352,
            hidden_size=HIDDEN,
            intermediate_size=128,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=2048,
            initializer_range=0.15,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            tie_word_embeddings=True,
        ),
        audio_config=WhisperConfig(
            vocab_size=SPEECH_WORDS + len(SPEECH_CONTROLS),
            d_model=32,
            encoder_layers=1,
            encoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_layers=2,
            decoder_attention_heads=2,
            decoder_ffn_dim=32,
            max_target_positions=448,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            decoder_start_token_id=0,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        vision_config={"stem": 8, "stages": stages, "head": 16},
        text_projector={"state_size": 12, **sequence},
        audio_decoder={
            "prompt_ids": [SPEECH_WORDS + 1, SPEECH_WORDS + 3],
            "end_id": SPEECH_WORDS,
            "no_speech_id": SPEECH_WORDS + 2,
        },
        vision_projector={"state_size": 16, "width": 8, "inner": 8, "slots": 5},
        text_detector=graphs[0],
        text_recognizer=graphs[1],
        modalities={m: {"trained": m in trained} for m in ("text_lines", "objects", "speech")},
        newline_token_id=tokenizer.convert_tokens_to_ids("Ċ"),
        architectures=["PebbleForConditionalGeneration"],
    )


def tiny_model(
    folder: Path, tokenizer: PreTrainedTokenizerFast, trained: tuple[str, ...]
) -> PebbleForConditionalGeneration:
    """A tiny pebble with seeded random weights."""
    config = tiny_config(folder, tokenizer, trained)
    torch.manual_seed(5)
    model = PebbleForConditionalGeneration(config)
    for name, write in (("detector", write_detector), ("recognizer", write_recognizer)):
        path = folder / f"{name}.onnx"
        write(path)
        weights = read_onnx(path, STATES if name == "recognizer" else None)[1]
        model.get_submodule(f"text_{name}").load_state_dict(weights)
        path.unlink()
    with torch.no_grad():
        for module in model.vision_encoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        model.vision_projector.emission.bias.fill_(3.0)
        torch.manual_seed(7)
        # Sharp enough that some steps emit and some do not, whatever is read.
        model.text_projector.emission.weight.normal_(0, 1.0)
        model.text_projector.query.weight.normal_(0, 0.3)
        # Sharp enough that words depend on the sound and on the words before.
        for weight in model.audio_decoder.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 0.3)
    model.speech_words = tiny_speech_words()
    model.respelling = Respelling(tokenizer.backend_tokenizer)
    model.train(False)
    return model


def write_tiny_safety(folder: Path, layers: tuple[int, ...] = (2, 3)) -> None:
    """Writes a random safety module with heads at some layers, calibrated to nothing."""
    torch.manual_seed(11)
    config = SafetyConfig(HIDDEN, layers, attention_heads=2, attention_head_dim=16)
    safety = SafetyModule(config)
    with torch.no_grad():
        for name, parameter in safety.named_parameters():
            if name.endswith("rows"):
                parameter.normal_(0, 0.2)
    stages = [*(f"gate.{k}" for k in layers), "final"]
    calibration = {
        stage: Calibration(1.0, 0.0, 0.5, "nothing: random weights", 0, 0.5, 0.5, 0.5)
        for stage in stages
    }
    tokens = ControlTokens("<|safe|>", "<|unsafe|>", 15, 16)
    write_safety(folder, safety, describe(config, tokens, layers[0], calibration))


def write_detector(path: Path) -> None:
    """A detector of dark pixels: ink per 4 x 4 cell, smeared sideways, over a threshold."""
    weights = {
        "ink": np.full((1, 3, 4, 4), -1 / 48, np.float32),
        "white_is_zero": np.ones(1, np.float32),
        "smear": np.full((1, 1, 1, 5), 0.2, np.float32),
        "spread": np.ones((1, 1, 4, 4), np.float32),
        "threshold": np.array(0.12, np.float32),
        "slope": np.array(30.0, np.float32),
    }
    nodes = [
        _node("Conv", ["x", "ink", "white_is_zero"], "cells", kernel_shape=[4, 4], strides=[4, 4]),
        _node("Conv", ["cells", "smear"], "rows", kernel_shape=[1, 5], auto_pad="SAME_UPPER"),
        _node("Identity", ["rows"], "same"),
        _node("ConvTranspose", ["same", "spread"], "pixels", kernel_shape=[4, 4], strides=[4, 4]),
        _node("Sub", ["pixels", "threshold"], "over"),
        _node("Mul", ["over", "slope"], "logit"),
        _node("Sigmoid", ["logit"], "probability"),
    ]
    save_graph(path, nodes, weights, ["N", 3, "H", "W"], "probability")


def write_recognizer(path: Path, with_head: bool = True) -> None:
    """A recognizer with random states (N, W / 8, 12) and a CTC head over 20 characters."""
    rng = np.random.default_rng(3)
    size = 12
    weights: dict[str, np.ndarray[Any, Any]] = {
        "glyph.w": rng.normal(0, 0.1, (size, 3, 48, 8)).astype(np.float32),
        "bn.scale": rng.uniform(0.5, 1.5, size).astype(np.float32),
        "bn.bias": rng.normal(0, 0.5, size).astype(np.float32),
        "bn.mean": rng.normal(0, 0.5, size).astype(np.float32),
        "bn.var": rng.uniform(0.5, 1.5, size).astype(np.float32),
    }
    nodes = [
        _node("Conv", ["x", "glyph.w"], "glyphs", kernel_shape=[48, 8], strides=[48, 8]),
        _node("BatchNormalization", ["glyphs", *list(weights)[1:]], "normal", epsilon=1e-5),
        _node("Relu", ["normal"], "positive"),
        _node("Squeeze", ["positive"], "columns", axes=[2]),
        _node("Transpose", ["columns"], STATES, perm=[0, 2, 1]),
    ]
    result = STATES
    if with_head:
        weights["ctc.w"] = rng.normal(0, 1, (size, 20)).astype(np.float32)
        nodes.append(_node("MatMul", [STATES, "ctc.w"], "logits"))
        nodes.append(_node("Softmax", ["logits"], "characters", axis=2))
        result = "characters"
    save_graph(path, nodes, weights, ["N", 3, 48, "W"], result)


def save_graph(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray[Any, Any]],
    shape: list[int | str],
    result: str,
    opset: int = 11,
) -> None:
    """Writes an ONNX file with one input ``x``."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, str(path))


def _node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], **attributes)
