"""Opening a bundle: hashes, weight files, acceptance."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from edge_safe.errors import BundleError, IntegrityError, ProviderError
from edge_safe.runtime import manifest as m
from edge_safe.runtime import verified_files
from edge_safe.runtime.bundle import open_bundle
from edge_safe.runtime.digest import sha256_file
from edge_safe.runtime.external_data import external_files
from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.verified_files import VerifiedFiles


def flip_byte(path: Path, at: int) -> None:
    """Changes one byte."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def redescribe(folder: Path, name: str) -> None:
    """Writes a file's new hash into the manifest, as a forger would."""
    path = folder / m.MANIFEST_FILE
    data = json.loads(path.read_text())
    size = (folder / name).stat().st_size
    data["files"][name] = {"sha256": sha256_file(folder / name), "size": size}
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "name", ["gate.onnx", "weights.onnx.data", "tokenizer.json", "chat_template.jinja"]
)
def test_one_changed_byte_is_found_at_load(own_bundle: Path, name: str) -> None:
    flip_byte(own_bundle / name, (own_bundle / name).stat().st_size // 2)
    with pytest.raises(IntegrityError, match=name):
        SafeModel.load(own_bundle)


def test_a_graph_is_never_given_away_on_weights_that_differ(own_bundle: Path) -> None:
    flip_byte(own_bundle / "weights.onnx.data", 7)
    bundle = open_bundle(own_bundle)
    for _ in range(2):
        with pytest.raises(IntegrityError, match=r"weights\.onnx\.data is not the file"):
            bundle.session("gate")


def test_weights_that_differ_are_said_before_what_onnxruntime_says(own_bundle: Path) -> None:
    path = own_bundle / "gate.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    path.write_bytes(model.SerializeToString())
    redescribe(own_bundle, "gate.onnx")
    with pytest.raises(BundleError, match="NoSuchOperator"):
        open_bundle(own_bundle).session("gate")
    flip_byte(own_bundle / "weights.onnx.data", 7)
    with pytest.raises(IntegrityError, match=r"weights\.onnx\.data"):
        open_bundle(own_bundle).session("gate")


def test_files_that_were_hashed_ahead_are_not_hashed_again(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def note(path: Path, stopped: Callable[[], bool]) -> str:
        hashed.append(path.name)
        return sha256_file(path, stopped)

    monkeypatch.setattr(verified_files, "sha256_file", note)
    files = VerifiedFiles(bundle_folder, m.load_manifest(bundle_folder))
    with files.hashing(["decoder", "gate"]):
        pass
    assert sorted(hashed) == ["decoder.onnx", "gate.onnx", "weights.onnx.data"]
    open_bundle(files).check_graph("decoder")
    assert len(hashed) == 3


def test_what_is_wrong_with_a_file_that_was_hashed_ahead_is_said_when_it_is_asked_for(
    own_bundle: Path,
) -> None:
    flip_byte(own_bundle / "weights.onnx.data", 7)
    files = VerifiedFiles(own_bundle, m.load_manifest(own_bundle))
    with files.hashing(["decoder"]):
        pass
    with pytest.raises(IntegrityError, match=r"weights\.onnx\.data is not the file"):
        open_bundle(files).session("decoder")


def test_nobody_waits_for_hashes_of_a_load_that_fails(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up: list[bool] = []

    def slow(_: Path, stopped: Callable[[], bool]) -> str:
        while not stopped():
            time.sleep(0.001)
        given_up.append(True)
        raise OSError("given up")

    files = VerifiedFiles(bundle_folder, m.load_manifest(bundle_folder))
    monkeypatch.setattr(verified_files, "sha256_file", slow)
    with pytest.raises(ProviderError, match="no"), files.hashing(["decoder"]):
        raise ProviderError("no")
    assert given_up == [True]


def test_a_digest_is_given_up_between_parts(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with pytest.raises(OSError, match="given up"):
        sha256_file(path, lambda: True)


def test_verify_checks_every_file(own_bundle: Path) -> None:
    flip_byte(own_bundle / "tokenizer_config.json", 3)
    with pytest.raises(IntegrityError, match="tokenizer_config"):
        open_bundle(own_bundle).verify()


def test_verify_accepts_an_intact_bundle(bundle_folder: Path) -> None:
    bundle = open_bundle(bundle_folder)
    bundle.verify()
    assert set(bundle.run_counts().values()) == {0}


def test_a_shortened_file_is_found(own_bundle: Path) -> None:
    path = own_bundle / "weights.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="bytes"):
        SafeModel.load(own_bundle)


def test_a_missing_file_is_named(own_bundle: Path) -> None:
    (own_bundle / "decoder.onnx").unlink()
    with pytest.raises(BundleError, match=r"decoder\.onnx is missing"):
        SafeModel.load(own_bundle)


@pytest.mark.parametrize("location", ["../weights.onnx.data", "/etc/hostname", "unlisted.data"])
def test_weights_outside_the_manifest_are_not_opened(own_bundle: Path, location: str) -> None:
    path = own_bundle / "gate.onnx"
    model = onnx.load(path, load_external_data=False)
    entry = next(t for t in model.graph.initializer if t.external_data).external_data[0]
    entry.value = location
    path.write_bytes(model.SerializeToString())
    redescribe(own_bundle, "gate.onnx")
    with pytest.raises(IntegrityError):
        open_bundle(own_bundle).session("gate")


def test_external_files_are_found_in_nested_graphs() -> None:
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value="deep.data")
    inner = onnx.helper.make_graph([], "inner", [], [], [tensor])
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    constant = onnx.helper.make_node("Constant", [], ["k"])
    constant.attribute.add(name="value", type=4).t.external_data.add(
        key="location", value="constant.data"
    )
    graph = onnx.helper.make_graph([node, constant], "outer", [], [])
    model = onnx.helper.make_model(graph)
    assert external_files(model.SerializeToString()) == {"deep.data", "constant.data"}


@pytest.mark.parametrize("data", [b"\xff" * 20, b"\x3a\xff\x01", b"hello, this is text"])
def test_bytes_that_are_no_graph_are_a_bundle_error(data: bytes) -> None:
    with pytest.raises(BundleError):
        external_files(data)


def test_a_bundle_that_failed_acceptance_is_refused(own_bundle: Path) -> None:
    path = own_bundle / m.MANIFEST_FILE
    data = json.loads(path.read_text())
    data["safety"]["acceptance"] = {"passed": False, "data": "dev.jsonl", "rows": 10}
    path.write_text(json.dumps(data))
    with pytest.raises(BundleError, match="acceptance"):
        SafeModel.load(own_bundle)
    assert SafeModel.load(own_bundle, accept_failed=True).manifest.name == "tiny"


def test_an_unknown_graph_is_answered_with_those_there_are(bundle_folder: Path) -> None:
    with pytest.raises(BundleError, match="embed_tokens"):
        open_bundle(bundle_folder).session("vision_encoder")


def test_a_provider_that_is_not_installed_is_no_silent_fallback(bundle_folder: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(ProviderError, match=r"edge-safe\[gpu\]"):
        open_bundle(bundle_folder, provider="cuda")


def test_an_unknown_provider_is_answered_with_the_known_ones(bundle_folder: Path) -> None:
    with pytest.raises(ProviderError, match="tensorrt-rtx"):
        open_bundle(bundle_folder, provider="gpu")
