"""Text compared and named; test_hostile_text has what is done against hostile text."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcr.core.text import label_of, normalise


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


@pytest.mark.parametrize(
    ("name", "label"),
    [("org/Model-1.5", "Model-1.5"), ("../..", "model"), ("a b/c d", "c-d"), ("", "model")],
)
def test_a_label_is_part_of_a_folders_name(name: str, label: str) -> None:
    assert label_of(name) == label
