"""Text compared, named, printed and stored."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcr.core.text import encodable, label_of, normalise, printable, redact, single_line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("How do I?", "how do i"),
        ("  HOW\tdo\n I!! ", "how do i"),
        ("don’t — stop", "dont stop"),
        ("\uff26\uff55\uff4c\uff4c \uff57ide\uff1f", "full wide"),
        ("ﬁle", "file"),
        ("Straße", "strasse"),
        ("zero\u200bwidth\ufeff", "zerowidth"),
        ("C++ > C", "c++ > c"),
        ("🙂 ok", "🙂 ok"),
        ("?!", "?!"),
        (" ... ", "..."),
        ("", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@given(st.text(st.characters(codec="ascii")))
def test_ascii_case_punctuation_and_spacing_do_not_matter(text: str) -> None:
    once = normalise(text)
    assert once == normalise(text.upper()) == normalise(f"\t{text} ")
    if any(c.isalnum() for c in text):
        assert once == normalise("'".join(text))
        assert not any(unicodedata.category(c).startswith("P") for c in once)


@given(st.text(st.characters(codec="ascii")))
def test_ascii_follows_the_rule_for_any_text(text: str) -> None:
    """A letter of another script sends the same text down the general path."""
    assert normalise(f"word {text} д") == normalise(f"word {text}") + " д"


SECRET = "Zq7-hunter2"


@pytest.mark.parametrize(
    "text",
    [
        f"http://user:{SECRET}@host:8000/v1",
        f"https://{SECRET}@host/v1",
        f"http://user:p@ss{SECRET}@host/v1",
        f"http://user:pa/ss{SECRET}@host/v1",
        f"endpoint=user:{SECRET}@host:8000/v1",
        f"http:/user:{SECRET}@host/v1",  # as a path writes it
        f"http\\://user\\:{SECRET}@host/v1",  # as Hydra escapes it
        f"user\\:{SECRET}@host",
        f"http://host/v1?key={SECRET}",
        f"http://host/v1?anything={SECRET}&other=1",
        f"http://host/v1#{SECRET}",
        f"/v1/chat?token={SECRET} answered",
        f"host/v1?page=2&api_key={SECRET}",
        f"Authorization: Basic {SECRET}",
        f"{{'authorization': 'Token {SECRET}'}}",
        f"X-Api-Key: {SECRET}",
        f"Incorrect key: Bearer {SECRET}",
        f"OPENAI_API_KEY={SECRET}",
        f'{{"password": "{SECRET}"}}',
        f"access_token={SECRET}; path=/",
        f"sk-{SECRET}",
        f"key hf_{'a' * 20}Zq7hunter2 is not valid",
    ],
)
def test_whatever_looks_like_a_secret_goes(text: str) -> None:
    for shown in (redact(text), single_line(text), single_line(ValueError(text))):
        assert "hunter2" not in shown
        assert "[removed]" in shown


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:8000/v1: nothing answers there; give http://host:port/v1 or https://…",
        "endpoint_key=OPENAI_API_KEY: this environment variable is unset; export it",
        "llm.parameters.max_tokens=5: give less; eos_token=<|end|>, tokens=3",
        "a risk-free task, hf_hub_download, key=value, run=outputs/a@b",
        "Write to tutor@example.org?",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_given_secrets_go_wherever_they_stand() -> None:
    assert redact("a7b in xa7by", "a7b", "") == "[removed] in x[removed]y"


@given(st.text(st.characters(codec=None, exclude_categories=())))
def test_no_text_reaches_a_terminal_or_a_file_as_anything_but_text(text: str) -> None:
    for shown in (printable(text), single_line(text)):
        shown.encode()
        assert not any(unicodedata.category(c) == "Cc" for c in shown if c not in "\n\t")
    assert "\n" not in single_line(text)
    assert printable(printable(text)) == printable(text)


def test_control_codes_are_shown_as_pictures() -> None:
    assert printable("\x1b[31mred\x1b[0m\r\n\tand\x9b") == "␛[31mred␛[0m\n\tand\ufffd"


def test_a_single_line_is_cut_after_secrets_have_gone() -> None:
    assert single_line("a\n  b\x00", longest=9) == "a b␀"
    assert single_line(f"{'x' * 20} sk-{SECRET}", longest=26) == f"{'x' * 20} [remo…"
    assert len(single_line("://" * 10_000_000, longest=240)) == 241  # in no time


def test_half_characters_are_joined_or_replaced() -> None:
    assert encodable("\ud83d\ude00 \ud83d, \ufeffé") == "\U0001f600 \ufffd, \ufeffé"


@pytest.mark.parametrize(
    ("name", "label"),
    [("org/Model-1.5", "Model-1.5"), ("../..", "model"), ("a b/c d", "c-d"), ("", "model")],
)
def test_a_label_is_part_of_a_folders_name(name: str, label: str) -> None:
    assert label_of(name) == label
