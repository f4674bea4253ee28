"""Which TensorRT a bundle is written for, and what goes with none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_safe.errors import ExportError, UsageError
from edge_safe.export import export_bundle
from edge_safe.export.targets import TARGETS
from edge_safe.export.tensorrt.precisions import PRECISIONS, tensorrt_precision
from edge_safe.export.tensorrt.releases import RELEASES, release_for

TENSORRT = sorted(name for name, target in TARGETS.items() if target.tensorrt)
# The first opset with weights of 4 bits, and with scales for blocks of them.
BLOCKS = 21


@pytest.mark.parametrize("name", RELEASES)
def test_a_row_says_what_its_parser_reads(name: str) -> None:
    row = RELEASES[name]
    assert row.name == name
    assert row.target in TENSORRT
    assert set(row.precisions) <= set(PRECISIONS)
    assert ("int4" in row.precisions) is (row.opset >= BLOCKS)
    assert row.source
    assert row.found_in


@pytest.mark.parametrize("target", TENSORRT)
def test_every_target_has_a_release_for_every_precision(target: str) -> None:
    for precision in PRECISIONS:
        row = release_for(target, precision)
        assert row.target == target
        assert precision in row.precisions


@pytest.mark.parametrize(
    ("precision", "name"), [("fp32", "10.3"), ("fp16", "10.3"), ("int8", "10.3"), ("int4", "10.16")]
)
def test_without_a_name_it_is_the_oldest_that_reads_the_precision(
    precision: str, name: str
) -> None:
    assert release_for("tensorrt", precision).name == name


def test_a_named_release_is_taken() -> None:
    assert release_for("tensorrt", "fp16", "10.16") is RELEASES["10.16"]


def test_a_precision_that_a_release_does_not_read_lists_those_it_does() -> None:
    with pytest.raises(
        ExportError, match=r"'int4' is not read by tensorrt release 10\.3.*: fp32, fp16, int8\."
    ):
        release_for("tensorrt", "int4", "10.3")


def test_a_precision_of_onnx_runtimes_own_lists_those_that_tensorrt_reads() -> None:
    with pytest.raises(
        ExportError, match=r"'bf16' is not read by tensorrt; .*: fp32, fp16, int8, int4\."
    ):
        release_for("tensorrt", "bf16")
    with pytest.raises(ExportError, match=r"'bf16'.*: int4, int8, fp16, fp32\."):
        tensorrt_precision("bf16")


@pytest.mark.parametrize(
    ("target", "name", "known"),
    [
        ("tensorrt", "rtx-1.7", r"10\.3 \(JetPack 6\.1.*10\.16 \(JetPack 7\.2"),
        ("tensorrt-rtx", "10.3", r"rtx-1\.7 \("),
        ("tensorrt", "11", r"10\.3 .*10\.16"),
    ],
)
def test_a_release_of_another_target_is_refused_with_its_own(
    target: str, name: str, known: str
) -> None:
    with pytest.raises(ExportError, match=f"Target '{target}' has no release '{name}'.*{known}"):
        release_for(target, "fp16", name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "cpu", "release": "10.3"}, "A release is TensorRT's"),
        ({"target": "cuda", "release": "10.3"}, "A release is TensorRT's"),
        ({"target": "tensorrt", "embedding": "fp16"}, "--embedding, --lm-head and --kv-cache out"),
        ({"target": "tensorrt", "lm_head": "int8"}, "--embedding, --lm-head and --kv-cache out"),
        ({"target": "tensorrt-rtx", "kv_cache": "int8"}, "and --kv-cache out"),
    ],
)
def test_options_that_do_not_go_with_it_are_a_usage_error(
    tiny_checkpoint: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        export_bundle(tiny_checkpoint, tmp_path / "out", precision="fp16", **options)
    assert not list(tmp_path.iterdir())


def test_a_precision_that_the_release_does_not_read_writes_nothing(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="choose one of: fp32, fp16, int8"):
        export_bundle(
            tiny_checkpoint, tmp_path / "out", target="tensorrt", precision="int4", release="10.3"
        )
    assert not list(tmp_path.iterdir())


def test_a_target_that_does_not_exist_lists_those_that_do(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="cpu, cuda, tensorrt, tensorrt-rtx"):
        export_bundle(tiny_checkpoint, tmp_path / "out", target="tensorrt-11")
