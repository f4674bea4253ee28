"""`classify`: order, resuming, and rows that cannot be judged."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

KEYS = ["id", "decision", "p_unsafe", "stage", "verdict_ms"]
PROMPTS = [f"Tell me a story about boat number {i}." for i in range(6)]


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def data(rows) -> Path:
    return rows(*({"id": f"r{i}", "prompt": prompt} for i, prompt in enumerate(PROMPTS)))


def test_verdicts_stand_in_input_order(cli, tiny_bundle, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    result = cli("classify", tiny_bundle, "--input", data, "--output", output, "--json")
    assert result.code == 0
    written = records(output)
    assert [list(record) for record in written] == [KEYS] * len(PROMPTS)
    assert [record["id"] for record in written] == [f"r{i}" for i in range(len(PROMPTS))]
    decisions = result.document["decisions"]
    assert sum(decisions.values()) == len(PROMPTS)
    assert decisions["error"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_verdicts_are_those_of_run(cli, tiny_bundle, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    cli("classify", tiny_bundle, "--input", data, "--output", output)
    alone = cli("run", tiny_bundle, PROMPTS[3], "--max-tokens", 1, "--json").document
    assert records(output)[3]["p_unsafe"] == pytest.approx(alone["p_unsafe"], abs=1e-5)


def test_a_row_that_cannot_be_judged_is_an_error_of_its_own(
    cli, tiny_bundle, rows, tmp_path: Path
) -> None:
    data = rows(
        {"id": 1, "prompt": PROMPTS[0]},
        {"id": 2, "prompt": PROMPTS[1], "image": "missing.png"},
        {"id": 3, "prompt": ""},
        {"id": 4, "prompt": PROMPTS[2]},
    )
    output = tmp_path / "out.jsonl"
    result = cli("classify", tiny_bundle, "--input", data, "--output", output, "--json")
    assert result.code == 0
    written = records(output)
    assert [record["decision"] == "error" for record in written] == [False, True, True, False]
    assert [record["p_unsafe"] is None for record in written] == [False, True, True, False]
    assert [list(record) for record in written] == [KEYS] * 4
    assert result.document["decisions"]["error"] == 2
    assert [error["id"] for error in result.document["errors"]] == [2, 3]


def test_a_row_without_a_verdict_in_time_is_an_error(
    cli, tiny_bundle, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    result = cli(
        "classify", tiny_bundle, "--input", data, "--output", output, "--timeout", "1e-6", "--json"
    )
    assert result.code == 0
    assert result.document["decisions"]["error"] == len(PROMPTS)


def test_a_second_run_goes_on_after_a_torn_line(
    cli, tiny_bundle, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    cli("classify", tiny_bundle, "--input", data, "--output", output)
    lines = output.read_text().splitlines(keepends=True)
    whole = records(output)
    output.unlink()
    (tmp_path / "out.jsonl.part").write_text("".join(lines[:2]) + lines[2][:17])
    result = cli("classify", tiny_bundle, "--input", data, "--output", output, "--json")
    assert result.document["judged_now"] == len(PROMPTS) - 2
    again = records(output)
    assert [record["id"] for record in again] == [record["id"] for record in whole]
    assert [record["p_unsafe"] for record in again] == [record["p_unsafe"] for record in whole]
    assert again[:2] == whole[:2]


def test_a_finished_output_is_not_judged_again(
    cli, tiny_bundle, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    cli("classify", tiny_bundle, "--input", data, "--output", output)
    before = output.read_bytes()
    result = cli("classify", tiny_bundle, "--input", data, "--output", output, "--json")
    assert result.document["judged_now"] == 0
    assert output.read_bytes() == before


def test_rows_added_to_the_input_are_judged_and_placed(
    cli, tiny_bundle, rows, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    first = rows({"id": "b", "prompt": PROMPTS[1]})
    cli("classify", tiny_bundle, "--input", first, "--output", output)
    both = rows({"id": "a", "prompt": PROMPTS[0]}, {"id": "b", "prompt": PROMPTS[1]})
    result = cli("classify", tiny_bundle, "--input", both, "--output", output, "--json")
    assert result.document["judged_now"] == 1
    assert [record["id"] for record in records(output)] == ["a", "b"]


def test_overwrite_starts_afresh(cli, tiny_bundle, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    cli("classify", tiny_bundle, "--input", data, "--output", output)
    arguments = ("--input", data, "--output", output, "--overwrite", "--json")
    assert cli("classify", tiny_bundle, *arguments).document["judged_now"] == len(PROMPTS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"id": "zz", "decision": "allow", "p_unsafe": 0.1}\n', "no row 'zz'"),
        ("a letter to a friend\n", "not a judgement"),
    ],
)
def test_a_file_of_something_else_is_left_alone(
    cli, tiny_bundle, data: Path, tmp_path: Path, content: str, words: str
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text(content)
    result = cli("classify", tiny_bundle, "--input", data, "--output", output)
    assert result.code == 1
    assert words in result.err
    assert output.read_text() == content


def test_the_input_is_never_the_output(cli, tiny_bundle, data: Path) -> None:
    before = data.read_bytes()
    result = cli("classify", tiny_bundle, "--input", data, "--output", data)
    assert result.code == 2
    assert data.read_bytes() == before


def test_a_broken_input_line_is_named_and_nothing_is_written(
    cli, tiny_bundle, rows, tmp_path: Path
) -> None:
    data = rows({"id": 1, "prompt": "p"}, {"id": 2})
    result = cli("classify", tiny_bundle, "--input", data, "--output", tmp_path / "out.jsonl")
    assert result.code == 1
    assert "line 2" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_killed_job_goes_on_where_it_stopped(cli, tiny_bundle, rows, tmp_path: Path) -> None:
    data = rows(*({"id": i, "prompt": f"story {i} " * 20} for i in range(400)))
    output = tmp_path / "out.jsonl"
    arguments = ["classify", str(tiny_bundle), "--input", str(data), "--output", str(output)]
    job = subprocess.Popen([sys.executable, "-m", "edge_safe.cli.main", *arguments, "--quiet"])
    part = tmp_path / "out.jsonl.part"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size > 500):
        time.sleep(0.005)
    job.kill()
    job.wait()
    assert not output.exists()
    judged_before = part.read_bytes().count(b"\n")
    assert 0 < judged_before < 400
    result = cli(*arguments, "--json")
    assert result.document["judged_now"] == 400 - judged_before
    assert [record["id"] for record in records(output)] == list(range(400))
