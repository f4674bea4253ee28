"""The manifest: round trip, versions, strictness, confined paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_safe.errors import BundleError, IntegrityError, SchemaError
from edge_safe.runtime.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    confine,
    dump_manifest,
    load_manifest,
    parse_manifest,
)


def edit(folder: Path, **changes: object) -> None:
    """Changes fields of a bundle's manifest."""
    path = folder / MANIFEST_FILE
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps(data))


def test_what_is_written_is_read_again(bundle_folder: Path) -> None:
    manifest = load_manifest(bundle_folder)
    assert parse_manifest(dump_manifest(manifest), "copy") == manifest


def test_a_newer_schema_says_what_to_do(own_bundle: Path) -> None:
    edit(own_bundle, schema_version=SCHEMA_VERSION + 1)
    with pytest.raises(SchemaError, match="Upgrade edge-safe"):
        load_manifest(own_bundle)


def test_a_newer_schema_is_named_even_if_its_fields_are_unknown(own_bundle: Path) -> None:
    edit(own_bundle, schema_version=SCHEMA_VERSION + 1, something_new=1)
    with pytest.raises(SchemaError, match=f"follows schema {SCHEMA_VERSION + 1}"):
        load_manifest(own_bundle)


@pytest.mark.parametrize("version", [None, "1", True, 0, -3])
def test_an_unusable_version_is_rejected(own_bundle: Path, version: object) -> None:
    edit(own_bundle, schema_version=version)
    with pytest.raises(SchemaError, match="schema_version"):
        load_manifest(own_bundle)


def test_unknown_fields_are_rejected(own_bundle: Path) -> None:
    edit(own_bundle, extra=1)
    with pytest.raises(SchemaError, match="extra"):
        load_manifest(own_bundle)


def test_a_manifest_that_is_not_json_is_a_schema_error(own_bundle: Path) -> None:
    (own_bundle / MANIFEST_FILE).write_bytes(b"\x89PNG")
    with pytest.raises(SchemaError, match="not valid JSON"):
        load_manifest(own_bundle)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        load_manifest(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle folder"):
        load_manifest(tmp_path / "absent")


def test_the_gates_own_layer_is_the_last_that_it_reads(own_bundle: Path) -> None:
    safety = json.loads((own_bundle / MANIFEST_FILE).read_text())["safety"]
    edit(own_bundle, safety={**safety, "attention": {"layers": [2, 1]}})
    with pytest.raises(SchemaError, match="has to be the last"):
        load_manifest(own_bundle)


def test_exit_layer_and_graphs_must_agree(own_bundle: Path) -> None:
    safety = json.loads((own_bundle / MANIFEST_FILE).read_text())["safety"]
    edit(own_bundle, safety={**safety, "exit_layer": None})
    with pytest.raises(SchemaError, match="exit_layer"):
        load_manifest(own_bundle)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "a\\b", "C:/x", "", ".", "a//b", "./a", "a\0b"]
)
def test_paths_that_could_leave_are_rejected(tmp_path: Path, name: str) -> None:
    with pytest.raises(IntegrityError):
        confine(tmp_path, name)


def test_a_path_inside_is_resolved(tmp_path: Path) -> None:
    assert confine(tmp_path, "towers/a.onnx") == tmp_path.resolve() / "towers/a.onnx"


def test_a_link_that_leads_out_is_rejected(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (tmp_path / "secret").write_text("x")
    (bundle / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(IntegrityError, match="symbolic link"):
        confine(bundle, "link")


def test_a_manifest_whose_path_escapes_is_rejected(own_bundle: Path) -> None:
    files = json.loads((own_bundle / MANIFEST_FILE).read_text())["files"]
    edit(own_bundle, files={**files, "../outside": {"sha256": "0", "size": 1}})
    with pytest.raises(IntegrityError, match="outside"):
        load_manifest(own_bundle)
