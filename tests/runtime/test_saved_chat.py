"""A conversation that was put into a file goes on as if it had never been put away."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_safe.errors import BundleError, IntegrityError, UsageError
from edge_safe.runtime import manifest as m
from edge_safe.runtime import saved_chat
from edge_safe.runtime.chat import Chat
from edge_safe.runtime.families.base import Placed
from edge_safe.runtime.inputs import on_a_grid
from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.policy import Policy
from edge_safe.runtime.prompt import Message
from edge_safe.runtime.saved_chat import Conversation, Turn
from edge_safe.runtime.tokens import Trusted, Untrusted
from edge_safe.runtime.verdict import Decision
from tests.runtime.conftest import allow_all

ASKED = ["What does the sign say?", "And the shop beside it?", "Tell me a story about a boat."]


def reopened(folder: Path) -> SafeModel:
    return SafeModel.load(folder, threads=1, policy=allow_all())


@pytest.mark.parametrize("turns", [0, 1, 2])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_next_turn_is_the_one_it_would_have_been(
    model: SafeModel, bundle_folder: Path, tmp_path: Path, turns: int, system: str | None
) -> None:
    chat = model.chat(system)
    for text in ASKED[:turns]:
        chat.send(text, max_tokens=5)
    chat.save(tmp_path / "talk")
    again = reopened(bundle_folder).load_chat(tmp_path / "talk")
    for text in (ASKED[2], "And then?"):
        expected, found = (c.send(text, max_tokens=9) for c in (chat, again))
        assert found.text == expected.text
        assert found.usage == expected.usage
        assert found.verdict.p_unsafe == pytest.approx(expected.verdict.p_unsafe, abs=1e-6)


def test_a_refused_turn_is_still_seen_by_the_gate(model: SafeModel, tmp_path: Path) -> None:
    def talk(refused: bool) -> float:
        chat: Chat = model.with_policy(Policy(thresholds={"gate": 0.0})).chat()
        if refused:
            assert chat.send(ASKED[0]).verdict.decision is Decision.REFUSE
        chat.save(tmp_path / "talk")
        return model.load_chat(tmp_path / "talk").send(ASKED[1]).verdict.p_unsafe

    assert talk(refused=True) != pytest.approx(talk(refused=False), abs=1e-6)


def test_the_policy_in_force_judges_not_that_of_the_past(model: SafeModel, tmp_path: Path) -> None:
    chat = model.chat()
    chat.send(ASKED[0], max_tokens=2)
    chat.save(tmp_path / "talk")
    refusing = model.with_policy(Policy(thresholds={"gate": 0.0}))
    reply = refusing.load_chat(tmp_path / "talk").send(ASKED[1])
    assert reply.verdict.decision is Decision.REFUSE


def test_a_conversation_that_outgrows_the_context_is_still_read_anew(
    model: SafeModel, tmp_path: Path
) -> None:
    chat = model.chat()
    chat.send("word " * 20, max_tokens=5)
    chat.save(tmp_path / "talk")
    again = model.load_chat(tmp_path / "talk")
    long = "word " * ((model.manifest.model.context_length - 60) // 5)
    assert again.send(long, max_tokens=1).text == chat.send(long, max_tokens=1).text


def test_what_pictures_became_is_kept(model: SafeModel, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    picture = on_a_grid(rng.normal(size=(6, 8)).astype(np.float32), 2, 3, np.zeros((1, 6, 8)))
    rows = rng.normal(size=(3, 8)).astype(np.float32)
    message = Message(
        "user",
        [rows, np.array([4, 5]), Trusted("<a>"), Untrusted("what is this?")],
        [Placed("image", [Trusted("<b>"), picture])],
        image_tokens=6,
        modality="image",
    )
    turn = Turn([message], "image", rng.normal(size=(1, 2, 2, 3, 8)).astype(np.float32))
    saved = Conversation([], model.engine.new_state(), [turn], [7, 8])
    saved_chat.save(tmp_path / "talk", saved, model.manifest)
    found = saved_chat.load(tmp_path / "talk", model.engine.new_state(), model.manifest)
    assert found.pending == [7, 8]
    again = found.turns[0].messages[0]
    assert again.content[2:] == [Trusted("<a>"), Untrusted("what is this?")]
    np.testing.assert_array_equal(again.content[0], rows)
    np.testing.assert_array_equal(again.media[0].pieces[1].places, picture.places)
    np.testing.assert_array_equal(found.turns[0].columns, turn.columns)
    assert (again.image_tokens, again.modality) == (6, "image")


@pytest.fixture(scope="module")
def saved(model: SafeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "talk"
    chat = model.chat()
    chat.send(ASKED[0], max_tokens=2)
    chat.save(path)
    return path


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damage_is_found(model: SafeModel, saved: Path, data: st.DataObject) -> None:
    whole = saved.read_bytes()
    spoilt = bytearray(whole)
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        del spoilt[at:]
    else:
        spoilt[at] ^= data.draw(st.integers(1, 255))
    path = saved.with_name("spoilt")
    path.write_bytes(spoilt)
    try:
        found = model.load_chat(path)
    except (IntegrityError, BundleError):
        return
    # A byte of the archive that says nothing about the contents, a date say.
    chat = model.load_chat(saved)
    assert found.send("x", max_tokens=1).verdict == chat.send("x", max_tokens=1).verdict


def test_another_bundle_does_not_take_it(saved: Path, bundle_folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bundle_folder, tmp_path / "other"))
    manifest = m.load_manifest(other)
    stage = msgspec.structs.replace(manifest.safety.stages["gate"], bias=0.25)
    safety = msgspec.structs.replace(
        manifest.safety, stages={**manifest.safety.stages, "gate": stage}
    )
    changed = msgspec.structs.replace(manifest, safety=safety)
    (other / m.MANIFEST_FILE).write_bytes(m.dump_manifest(changed))
    with pytest.raises(BundleError, match="another bundle"):
        reopened(other).load_chat(saved)


def test_a_missing_file_is_said(model: SafeModel, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no conversation"):
        model.load_chat(tmp_path / "none")


def test_while_it_answers_it_is_not_saved(model: SafeModel, tmp_path: Path) -> None:
    chat = model.chat()
    answering = chat.stream("Hello.", max_tokens=5)
    next(answering)
    with pytest.raises(UsageError, match="answering"):
        chat.save(tmp_path / "talk")
    answering.close()
    chat.save(tmp_path / "talk")


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    model: SafeModel, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(saved, tmp_path / "talk"))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        model.chat().save(path)
    assert path.read_bytes() == saved.read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["talk"]
