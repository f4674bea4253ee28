"""The documents say what is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import edge_safe
from edge_safe.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_the_command_reference_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate_cli.py", "--check", "docs/cli.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    verbs = {command.name for command in app.registered_commands}
    used = set(re.findall(r"^\s*(?:\$ )?edge-safe ([a-z]+)", text, re.MULTILINE))
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    made = set(re.findall(r"`make ([a-z-]+)", text)) | set(
        re.findall(r"^\s*make ([a-z-]+)", text, re.MULTILINE)
    )
    assert used <= verbs
    assert made <= set(targets)


def test_every_variable_of_the_code_is_documented() -> None:
    code = "".join(path.read_text() for path in (ROOT / "edge_safe").rglob("*.py"))
    names = set(re.findall(r"[\"'](EDGE_SAFE_[A-Z_]+)[\"']", code))
    documented = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert {name for name in names if name not in documented} == set()


def test_the_changelog_knows_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {edge_safe.__version__}" in changelog


def test_the_package_and_its_metadata_agree_on_the_version() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{edge_safe.__version__}"\n' in text
