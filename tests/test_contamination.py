"""Exact and near duplicates against a brute-force comparison."""

import random
import string
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcr.config import ConfigError
from dcr.contamination import COMPARED_CHARACTERS, Overlap, normalise, overlaps


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


def longest_common_subsequence(a: str, b: str) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        previous = 0
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], previous + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def by_loops(prompt: str, against: dict[str, list[str]], near: float) -> Overlap | None:
    query = normalise(prompt)
    rows = [
        (name, i, normalise(text))
        for name, texts in against.items()
        for i, text in enumerate(texts)
    ]
    for name, index, text in rows:
        if text == query:
            return Overlap(name, index, True, 1.0)
    best = None
    for name, index, text in rows:
        a, b = query[:COMPARED_CHARACTERS], text[:COMPARED_CHARACTERS]
        similarity = 2 * longest_common_subsequence(a, b) / (len(a) + len(b)) if a or b else 0.0
        if similarity >= near and (best is None or similarity > best.similarity):
            best = Overlap(name, index, False, similarity)
    return best


def edited(text: str, rng: random.Random, edits: int) -> str:
    characters = list(text)
    for _ in range(edits):
        characters[rng.randrange(len(characters))] = rng.choice(string.ascii_lowercase)
    return "".join(characters)


@pytest.mark.parametrize("near", [0.7, 0.9, 1.0])
def test_equals_brute_force_over_many_lengths(near: float) -> None:
    rng = random.Random(0)
    references = [
        "".join(rng.choices(string.ascii_lowercase + " ", k=rng.randint(2, 45))).strip() or "a"
        for _ in range(60)
    ]
    against = {"one": references[:25], "two": references[25:], "none": []}
    prompts = [edited(rng.choice(references), rng, rng.randint(0, 12)) for _ in range(110)]
    prompts += [r.upper() + "!" for r in references[:10]]
    prompts += [
        r[rng.randint(1, 6) :] for r in references if len(r) > 8
    ]  # shorter than their origin
    prompts += [
        rng.choice(references) + "".join(rng.choices("xyz", k=rng.randint(1, 25)))
        for _ in range(30)
    ]
    found = overlaps(prompts, against, near=near)
    expected = [by_loops(prompt, against, near if near < 1 else 2) for prompt in prompts]
    for prompt, ours, truth in zip(prompts, found, expected, strict=True):
        if truth is None:
            assert ours is None, prompt
        else:
            assert ours is not None, prompt
            assert (ours.set, ours.index, ours.exact) == (truth.set, truth.index, truth.exact), (
                prompt
            )
            assert ours.similarity == pytest.approx(truth.similarity, abs=1e-6)
    kinds = [None if overlap is None else overlap.exact for overlap in expected]
    assert {None, True} | ({False} if near < 1 else set()) == set(kinds)  # the test reaches each


def test_more_rows_than_a_block_keep_their_places() -> None:
    prompts = [f"question number {i} of a long list" for i in range(1500)]
    against = {"set": ["something else entirely", *prompts[700:720]]}
    found = overlaps(prompts, against, near=1.0)
    assert [i for i, overlap in enumerate(found) if overlap] == list(range(700, 720))
    assert found[705] == Overlap("set", 6, True, 1.0)
    near = overlaps([p + " now" for p in prompts], {"set": [prompts[1234]]}, near=0.99)
    assert not any(near)
    near = overlaps([p + "s" for p in prompts], {"set": [prompts[1234]]}, near=0.98)
    assert [i for i, overlap in enumerate(near) if overlap] == [1234]


def test_exact_is_preferred_and_the_earlier_set_wins_a_tie() -> None:
    against = {
        "near": ["how do i get there now"],
        "b": ["How do I get there?"],
        "c": ["how do i get there"],
    }
    assert overlaps(["How do I get there"], against, near=0.8) == [Overlap("b", 0, True, 1.0)]
    twice = {"a": ["nothing", "how do i get here"], "b": ["how do i get here"]}
    (found,) = overlaps(["how do i get there"], twice, near=0.9)
    assert found is not None
    assert (found.set, found.index, found.exact) == ("a", 1, False)


def test_long_texts_are_exact_over_all_and_near_over_their_start() -> None:
    start = "".join(random.Random(1).choices(string.ascii_lowercase, k=COMPARED_CHARACTERS))
    (found,) = overlaps([start + "a" * 300], {"set": [start + "b" * 3000]}, near=0.99)
    assert found == Overlap("set", 0, False, 1.0)
    (found,) = overlaps([start + "a" * 300], {"set": [start + "a" * 300]}, near=0.99)
    assert found == Overlap("set", 0, True, 1.0)


def test_nothing_to_compare_is_no_error() -> None:
    assert overlaps([], {"set": ["a"]}) == []
    assert overlaps(["a", "b"], {}) == [None, None]
    assert overlaps(["a"], {"set": []}) == [None]
    assert overlaps([""], {"set": ["a"]}) == [None]


@pytest.mark.parametrize("near", [0.0, -1.0, 1.1, float("nan")])
def test_a_similarity_outside_its_range_is_refused(near: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.near_duplicate="):
        overlaps(["a"], {"set": ["a"]}, near=near)
