"""Template and tokens: equal to the whole text for ordinary prompts, inert for all others."""

from __future__ import annotations

from pathlib import Path

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edge_safe.errors import BundleError, PromptError
from edge_safe.runtime.prompt import Message, PromptBuilder, token_ids
from edge_safe.runtime.template import ChatTemplate, Content, Place
from edge_safe.runtime.tokens import Tokens, Trusted, Untrusted

SAFE, UNSAFE = 3, 4
SPECIAL_TEXTS = ["<|im_start|>", "<|im_end|>", "<|safe|>", "<|unsafe|>", "<|endoftext|>"]


@pytest.fixture(scope="module")
def raw(bundle_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(bundle_folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def tokens(bundle_folder: Path) -> Tokens:
    return Tokens((bundle_folder / "tokenizer.json").read_bytes(), [SAFE, UNSAFE])


@pytest.fixture(scope="module")
def source(bundle_folder: Path) -> str:
    return (bundle_folder / "chat_template.jinja").read_text()


@pytest.fixture(scope="module")
def builder(source: str, tokens: Tokens) -> PromptBuilder:
    return PromptBuilder(ChatTemplate(source, {}), tokens, SAFE, 10_000)


def messages(*pairs: tuple[str, str]) -> list[Message]:
    return [Message(role, [Untrusted(text)]) for role, text in pairs]


@pytest.mark.parametrize(
    "text",
    [
        "What does the sign say?",
        "  two spaces in front, a tab\tand a newline at the end\n",
        "\n\nlines\n\n\nand more",
        "naïve café 日本語 🚲 e\u0301",
        "it's 3.14159, isn't it?",
        "user\nassistant\n",
    ],
)
def test_ids_equal_those_of_the_whole_template(
    builder: PromptBuilder, raw: Tokenizer, source: str, text: str
) -> None:
    conversation = [("system", "Be brief."), ("user", text), ("assistant", text), ("user", text)]
    whole = jinja2.Template(source).render(
        messages=[{"role": role, "content": content} for role, content in conversation],
        add_generation_prompt=True,
    )
    ours = token_ids(builder.build(messages(*conversation)))
    assert ours.tolist() == raw.encode(whole, add_special_tokens=False).ids


def test_the_default_system_text_comes_from_the_template(
    builder: PromptBuilder, raw: Tokenizer
) -> None:
    ids = token_ids(builder.build(messages(("user", "hello"))))
    assert raw.decode(ids.tolist(), skip_special_tokens=False).startswith(
        "<|im_start|>system\nYou are helpful.<|im_end|>"
    )


@pytest.mark.parametrize("attack", SPECIAL_TEXTS)
def test_text_of_control_tokens_never_becomes_one(
    tokens: Tokens, builder: PromptBuilder, attack: str
) -> None:
    plain = token_ids(builder.build(messages(("user", "hello"))))
    ids = token_ids(builder.build(messages(("user", f"hello {attack} there"))))
    assert np.sort(ids[ids < 5]).tolist() == np.sort(plain[plain < 5]).tolist()
    assert tokens.decode(tokens.encode([Untrusted(attack)])[0].tolist()) == attack


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(SPECIAL_TEXTS), st.text(max_size=8))).map("".join))
def test_no_text_at_all_gives_a_control_token(tokens: Tokens, text: str) -> None:
    try:
        arrays = tokens.encode([Trusted("user\n"), Untrusted(text)])
    except PromptError:
        return
    ids = token_ids(arrays)
    assert (ids >= 5).all()
    assert tokens.decode(ids.tolist()) == "user\n" + text


def test_a_lone_surrogate_is_a_prompt_error(tokens: Tokens) -> None:
    with pytest.raises(PromptError, match="cannot be tokenized"):
        tokens.encode([Untrusted("bad \ud800")])


def test_control_tokens_must_be_special(bundle_folder: Path) -> None:
    with pytest.raises(BundleError, match="300"):
        Tokens((bundle_folder / "tokenizer.json").read_bytes(), [SAFE, 300])


def test_a_broken_tokenizer_is_a_bundle_error() -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokens(b"{}", [])


def test_embeddings_keep_their_place(tokens: Tokens) -> None:
    picture = np.ones((2, 8), np.float32)
    arrays = tokens.encode([Trusted("<|im_start|>user\n"), picture, Untrusted("\nhi")])
    assert [a.ndim for a in arrays] == [1, 1, 2, 1]


def test_content_cannot_reach_the_template(source: str) -> None:
    parts = ChatTemplate(source, {}).render(["user"])
    assert parts.count(Content(0)) == 1
    assert not any(isinstance(p, str) and "mark" in p for p in parts)


def test_a_begun_answer_ends_the_prompt(builder: PromptBuilder, raw: Tokenizer) -> None:
    ids = token_ids(builder.build(messages(("user", "hello"), ("assistant", "It says"))))
    text = raw.decode(ids.tolist(), skip_special_tokens=False)
    assert text.endswith("<|im_start|>assistant\n<|safe|>It says")


def test_a_template_without_the_safe_token_gets_it(tokens: Tokens, source: str) -> None:
    bare = source.replace("'<|safe|>'", "''")
    turns = messages(("user", "a"), ("assistant", "b"), ("user", "c"))
    with_token = PromptBuilder(ChatTemplate(source, {}), tokens, SAFE, 999).build(turns)
    without = PromptBuilder(ChatTemplate(bare, {}), tokens, SAFE, 999).build(turns)
    assert token_ids(without).tolist() == token_ids(with_token).tolist()


@pytest.mark.parametrize(
    "bad",
    [
        "{% for m in messages %}{{ m.role }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
    ],
)
def test_templates_that_lose_or_repeat_content_are_rejected(bad: str) -> None:
    with pytest.raises(BundleError, match="exactly once"):
        ChatTemplate(bad, {}).render(["user"])


def test_a_template_cannot_reach_python() -> None:
    attack = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(PromptError, match="chat template"):
        ChatTemplate(attack, {}).render(["user"])


def test_a_template_may_reject_roles() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(PromptError, match="roles must alternate"):
        template.render(["user"])


def test_unknown_roles_are_rejected(source: str) -> None:
    with pytest.raises(PromptError, match="<\\|im_end\\|>"):
        ChatTemplate(source, {}).render(["<|im_end|>"])


def test_a_template_that_does_not_parse_is_a_bundle_error() -> None:
    with pytest.raises(BundleError, match="not valid"):
        ChatTemplate("{% for %}", {})


def test_pieces_that_were_heard_become_those_of_the_typed_text(
    tokens: Tokens, raw: Tokenizer
) -> None:
    text = " open the door"
    letters = [piece for letter in text for piece in raw.encode(letter).ids]
    typed = raw.encode(text).ids
    assert len(letters) > len(typed)
    assert tokens.respelled(letters).tolist() == typed
    assert not len(tokens.respelled([]))


PLACES = (
    "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
IMAGES = {"image": "<image>"}


def test_places_for_media_are_found_in_order() -> None:
    template = ChatTemplate(PLACES, {}, IMAGES)
    parts = template.render(["user", "assistant", "user"], [["image"], [], ["image", "image"]])
    assert parts == [
        "[user]", Place(0, 0), Content(0), "[assistant]", Content(1),
        "[user]", Place(2, 0), Place(2, 1), Content(2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (PLACES.replace("<image>", ""), "no place for 1 of the media"),
        (PLACES.replace("<image>", "<image><image>"), "more often than there are media"),
    ],
)
def test_a_template_has_one_place_for_each_medium(source: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        ChatTemplate(source, {}, IMAGES).render(["user"], [["image"]])


def test_a_placeholder_in_a_template_without_media_is_not_left_as_text() -> None:
    with pytest.raises(BundleError, match="more often than there are media"):
        ChatTemplate("<image>" + PLACES, {}, IMAGES).render(["user"])
