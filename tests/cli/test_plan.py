"""`edge-safe plan`: the document, the tables, what is wrong usage. Nothing is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_safe.evaluation.planning.devices import DEVICES
from tests.cli.conftest import Cli


def test_without_a_device_all_of_them_are_listed(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("plan", tiny_bundle, "--json")
    assert result.code == 0
    document = result.document
    assert document["predicted"] is True
    assert [entry["device"] for entry in document["devices"]] == [row.name for row in DEVICES]
    for entry in document["devices"]:
        assert entry["fits"] is True
        assert 0 < entry["refusal_ms"] < entry["prefill_ms"] <= entry["first_token_ms"]
        assert entry["decode_tokens_per_second"] > 0


def test_one_device_is_told_in_words(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("plan", tiny_bundle, "--device", "raspberry-pi-5", "--prompt-tokens", 100)
    assert result.code == 0
    assert "a prompt of 100 tokens, 356 in the cache" in result.out
    assert "Raspberry Pi 5" in result.out
    assert "fits" in result.out
    assert "at layer 2 of 4" in result.out
    assert "decode 10 of 10" in result.out


def test_people_get_a_row_for_each_device(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("plan", tiny_bundle)
    assert result.code == 0
    assert all(row.name in result.out for row in DEVICES)
    assert ">=" in result.out


@pytest.mark.parametrize("device", [(), ("--device", "orin-nano")])
def test_it_says_that_nothing_was_measured(
    cli: Cli, tiny_bundle: Path, device: tuple[str, ...]
) -> None:
    assert "nothing was run" in cli("plan", tiny_bundle, *device).out
    notes = cli("plan", tiny_bundle, *device, "--json").document["notes"]
    assert any("nothing was run" in note for note in notes)


def test_an_unknown_device_is_wrong_usage_and_names_those_there_are(
    cli: Cli, tiny_bundle: Path
) -> None:
    result = cli("plan", tiny_bundle, "--device", "jetson-nano", "--json")
    assert result.code == 2
    message = result.document["error"]["message"]
    assert all(row.name in message for row in DEVICES)


@pytest.mark.parametrize("option", ["--power-mode", "--measured"])
def test_what_belongs_to_one_device_needs_its_name(
    cli: Cli, tiny_bundle: Path, option: str
) -> None:
    result = cli("plan", tiny_bundle, option, "x", "--json")
    assert result.code == 2
    message = result.document["error"]["message"]
    assert option in message
    assert "--device" in message


def test_a_slower_power_mode_is_slower(cli: Cli, tiny_bundle: Path) -> None:
    device = ("--device", "orin-nano-super")
    (full,) = cli("plan", tiny_bundle, *device, "--json").document["devices"]
    slow_mode = (*device, "--power-mode", "15W")
    (low,) = cli("plan", tiny_bundle, *slow_mode, "--json").document["devices"]
    assert (full["power_mode"], low["power_mode"]) == ("MAXN_SUPER", "15W")
    assert low["decode_tokens_per_second"] < full["decode_tokens_per_second"]


def test_measured_constants_take_the_place_of_the_fitted_ones(
    cli: Cli, tiny_bundle: Path, tmp_path: Path
) -> None:
    from edge_safe.runtime.manifest import load_manifest

    manifest = load_manifest(tiny_bundle)
    measured = {
        "bundle": {"name": manifest.name, "precision": manifest.precision},
        "prompt_tokens": 256,
        "prefill_ms": 77.0,
        "decode_ms_per_token": 3.0,
    }
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(measured))
    arguments = ("plan", tiny_bundle, "--device", "raspberry-pi-5", "--measured", file)
    (entry,) = cli(*arguments, "--json").document["devices"]
    assert entry["prefill_ms"] == pytest.approx(77.0)
    assert "measured on this device" in cli(*arguments).out


def test_pictures_of_a_bundle_with_towers_are_encoded(cli: Cli, seeing_bundle: Path) -> None:
    device = ("--device", "raspberry-pi-5")
    words = cli("plan", seeing_bundle, *device, "--json").document
    seen = cli("plan", seeing_bundle, *device, "--images", 2, "--json").document
    assert words["devices"][0]["encode_ms"] == 0
    assert seen["devices"][0]["encode_ms"] > 0
    assert seen["request"]["prompt_tokens"] == 256 + 2 * seen["request"]["image_tokens"]
    weights = [document["devices"][0]["memory"]["weights_mb"] for document in (words, seen)]
    assert weights[0] < weights[1]
    assert "encode" in cli("plan", seeing_bundle, *device, "--images", 2).out


def test_pictures_of_a_bundle_without_towers_are_wrong_usage(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("plan", tiny_bundle, "--images", 1, "--json")
    assert result.code == 2
    assert "--images" in result.document["error"]["message"]


def test_a_damaged_graph_is_an_error(cli: Cli, own_bundle: Path) -> None:
    path = own_bundle / "decoder.onnx"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    result = cli("plan", own_bundle, "--json")
    assert result.code == 1
    assert result.document["error"]["type"] == "IntegrityError"
