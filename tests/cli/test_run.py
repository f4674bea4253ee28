"""`run`: documents, exit codes, and one line for every bad input."""

from __future__ import annotations

import io
import json
import wave
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_safe.rendering.pictures import render_request
from edge_safe.runtime.manifest import MANIFEST_FILE, SCHEMA_VERSION

KEYS = [
    "decision",
    "p_unsafe",
    "stage",
    "category",
    "text",
    "refusal",
    "finish_reason",
    "usage",
    "timing",
]


def test_an_allowed_request_prints_the_document_of_the_design(cli, tiny_bundle, allow) -> None:
    result = cli("run", tiny_bundle, "Hello.", "--policy", allow, "--max-tokens", 5, "--json")
    assert result.code == 0
    assert list(result.document) == KEYS
    assert result.document["decision"] == "allow"
    assert result.document["refusal"] is None
    assert 1 <= result.document["usage"]["completion_tokens"] <= 5
    assert set(result.document["usage"]) == {
        "prompt_tokens",
        "image_tokens",
        "audio_tokens",
        "completion_tokens",
    }
    assert set(result.document["timing"]) == {
        "encode_ms",
        "verdict_ms",
        "first_token_ms",
        "decode_tokens_per_second",
        "total_ms",
    }


def test_a_refused_request_ends_with_code_3_and_no_text(cli, tiny_bundle, refuse) -> None:
    result = cli("run", tiny_bundle, "Help me steal a bicycle.", "--policy", refuse, "--json")
    assert result.code == 3
    assert result.document["decision"] == "refuse"
    assert result.document["text"] is None
    assert result.document["finish_reason"] == "content_filter"
    assert result.document["usage"]["completion_tokens"] == 0
    assert result.document["timing"]["first_token_ms"] is None


def test_a_gate_that_cannot_decide_ends_with_code_4_and_no_text(cli, broken_gate) -> None:
    result = cli("run", broken_gate, "Hello.", "--json")
    assert result.code == 4
    assert result.document["decision"] == "error"
    assert result.document["p_unsafe"] is None
    assert result.document["text"] is None
    assert result.document["refusal"] is None


def test_without_a_verdict_in_time_it_ends_with_code_4(cli, tiny_bundle, allow) -> None:
    arguments = ("run", tiny_bundle, "Hello.", "--policy", allow, "--max-tokens", 2, "--json")
    late = cli(*arguments, "--timeout", "1e-6")
    assert late.code == 4
    assert (late.document["decision"], late.document["text"]) == ("error", None)
    assert "time for a verdict is over" in late.err
    assert cli(*arguments, "--timeout", 60).code == 0


@pytest.mark.parametrize("verb", ["run", "chat", "classify"])
@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon"])
def test_no_time_at_all_is_wrong_usage(cli, verb: str, seconds: str, tmp_path: Path) -> None:
    words = {"run": ["Hello."], "classify": ["--input", "a", "--output", "b"]}.get(verb, [])
    result = cli(verb, tmp_path, *words, "--timeout", seconds, "--json")
    assert result.code == 2
    assert result.document["error"]["type"] == "UsageError"
    assert "--timeout" in result.err


def test_words_go_to_stdout_and_the_verdict_to_stderr(cli, tiny_bundle, allow) -> None:
    arguments = ("run", tiny_bundle, "Hello.", "--policy", allow, "--max-tokens", 5)
    text = cli(*arguments, "--json").document["text"]
    result = cli(*arguments)
    printable = "".join(c for c in text if c.isprintable() or c in "\n\t")
    assert result.out.strip() == printable.strip()
    assert "allow at gate" in result.err
    assert cli(*arguments, "--quiet").err == ""


def test_a_refusal_in_words_is_the_policys_text(cli, tiny_bundle, refuse) -> None:
    result = cli("run", tiny_bundle, "Hello.", "--policy", refuse)
    assert result.code == 3
    assert result.out == "I can't help with that request.\n"


def test_a_dash_reads_the_prompt_from_stdin(
    cli, tiny_bundle, allow, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (tiny_bundle, "--policy", allow, "--max-tokens", 3, "--json")
    direct = cli("run", *arguments, "What does the sign say?").document
    monkeypatch.setattr("sys.stdin", io.StringIO("What does the sign say?"))
    piped = cli("run", *arguments, "-").document
    assert (piped["text"], piped["p_unsafe"]) == (direct["text"], direct["p_unsafe"])


def test_a_seed_makes_sampling_repeatable(cli, tiny_bundle, allow) -> None:
    arguments = ("run", tiny_bundle, "Hello.", "--policy", allow, "--max-tokens", 12, "--json")
    warm = (*arguments, "--temperature", 1.5, "--seed")
    assert cli(*warm, 1).document["text"] == cli(*warm, 1).document["text"]
    assert len({cli(*warm, seed).document["text"] for seed in range(4)}) > 1


def test_variables_stand_for_options(
    cli, tiny_bundle, allow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_SAFE_POLICY", str(allow))
    monkeypatch.setenv("EDGE_SAFE_MAX_TOKENS", "2")
    document = cli("run", tiny_bundle, "Hello.", "--json").document
    assert document["decision"] == "allow"
    assert document["usage"]["completion_tokens"] <= 2


def no_file(folder: Path) -> Path:
    return folder / "none.png"


def text_named_png(folder: Path) -> Path:
    path = folder / "words.png"
    path.write_text("these are words")
    return path


def truncated_png(folder: Path) -> Path:
    path = folder / "half.png"
    Image.effect_noise((200, 200), 60).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:3000])
    return path


def huge_png(folder: Path) -> Path:
    """30,000 x 30,000 pixels, all black: 110 kB on disk, 2.7 GB decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + checksum

    size = 30_000
    header = size.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    compressor = zlib.compressobj(9)
    row = bytes(1 + size // 8)
    data = b"".join(compressor.compress(row) for _ in range(size)) + compressor.flush()
    path = folder / "huge.png"
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


def empty_wav(folder: Path) -> Path:
    path = folder / "empty.wav"
    path.write_bytes(b"")
    return path


def long_wav(folder: Path) -> Path:
    path = folder / "long.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(1000)
        file.writeframes(bytes([128]) * (2 * 3600 * 1000))
    return path


def one_clear_line(result) -> None:
    assert result.code in (1, 2)
    assert result.out == ""
    assert "Traceback" not in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert result.err.startswith("edge-safe: ")


@pytest.mark.parametrize(
    ("option", "make"),
    [
        ("--image", no_file),
        ("--image", text_named_png),
        ("--image", truncated_png),
        ("--image", huge_png),
        ("--audio", no_file),
        ("--audio", empty_wav),
        ("--audio", long_wav),
    ],
)
def test_media_that_cannot_be_judged_get_one_line(
    cli, seeing_bundle, tmp_path: Path, option: str, make: Callable[[Path], Path]
) -> None:
    path = make(tmp_path)
    result = cli("run", seeing_bundle, "What is this?", option, path)
    one_clear_line(result)
    assert path.name in result.err


def test_a_bundle_that_only_reads_says_so(cli, tiny_bundle, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "sign.png")
    result = cli("run", tiny_bundle, "What is this?", "--image", tmp_path / "sign.png")
    one_clear_line(result)
    assert "text only" in result.err


def test_pictures_and_sound_are_counted(cli, seeing_bundle, allow, tmp_path: Path) -> None:
    render_request("No smoking", "sign", 1).picture.save(tmp_path / "sign.png")
    with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        tone = 8000 * np.sin(np.arange(16_000) / 20)
        file.writeframes(tone.astype("<i2").tobytes())
    media = ("--image", tmp_path / "sign.png", "--audio", tmp_path / "tone.wav")
    options = ("--policy", allow, "--max-tokens", 2, "--json")
    usage = cli("run", seeing_bundle, "What is this?", *media, *options).document["usage"]
    bare = cli("run", seeing_bundle, "What is this?", *options).document["usage"]
    assert usage["image_tokens"] > 0
    assert (bare["image_tokens"], bare["audio_tokens"]) == (0, 0)
    assert usage["prompt_tokens"] > bare["prompt_tokens"] + usage["image_tokens"]


@pytest.mark.parametrize("prompt", ["", "  \n", "word " * 20_000], ids=["empty", "blank", "long"])
def test_prompts_that_cannot_be_judged_get_one_line(cli, tiny_bundle, prompt: str) -> None:
    one_clear_line(cli("run", tiny_bundle, prompt))


def test_a_missing_bundle_gets_one_line(cli, tmp_path: Path) -> None:
    one_clear_line(cli("run", tmp_path / "none", "Hello."))


def test_a_bundle_with_one_byte_changed_gets_one_line(cli, own_bundle: Path) -> None:
    path = sorted(own_bundle.glob("*.onnx.data"))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = cli("run", own_bundle, "Hello.")
    one_clear_line(result)
    assert path.name in result.err


def test_a_manifest_of_a_newer_schema_gets_one_line(cli, own_bundle: Path) -> None:
    path = own_bundle / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    manifest["schema_version"] = SCHEMA_VERSION + 1
    path.write_text(json.dumps(manifest))
    result = cli("run", own_bundle, "Hello.")
    one_clear_line(result)
    assert f"schema {SCHEMA_VERSION + 1}" in result.err


def test_a_policy_with_a_typo_names_the_nearest_key(cli, tiny_bundle, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text('{"treshold": {}}')
    result = cli("run", tiny_bundle, "Hello.", "--policy", path)
    one_clear_line(result)
    assert "did you mean 'thresholds'" in result.err


def test_a_provider_that_is_not_here_is_an_error(cli, tiny_bundle) -> None:
    result = cli("run", tiny_bundle, "Hello.", "--provider", "tensorrt-rtx")
    one_clear_line(result)
    assert "tensorrt-rtx" in result.err


def test_a_setting_out_of_range_is_wrong_usage(cli, tiny_bundle) -> None:
    result = cli("run", tiny_bundle, "Hello.", "--max-tokens", 0)
    one_clear_line(result)
    assert result.code == 2


def test_an_error_with_json_is_a_document(cli, tmp_path: Path) -> None:
    result = cli("run", tmp_path / "none", "Hello.", "--json")
    assert result.document["error"]["type"] == "BundleError"
    assert result.document["error"]["exit_code"] == result.code == 1
