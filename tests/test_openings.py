"""The corpus of compliant openings: clean, parted for good, and unseen where it says so."""

import re
from collections import Counter

import pytest
from rapidfuzz import fuzz

from dcr import openings
from dcr.core.text import normalise

TRAINING, HELD_OUT = openings.training(), openings.held_out()


def test_openings_are_clean_and_each_stands_once() -> None:
    rows = openings.corpus()
    assert len(rows) > 400
    assert len({row.id for row in rows}) == len({row.text for row in rows}) == len(rows)
    for row in rows:
        assert row.text == row.text.strip() != ""
        assert row.text.replace("\n", "").isprintable()
        assert row.id.startswith(row.register)
        # words and marks, about what a tokenizer of a large vocabulary makes of it
        assert 1 <= len(re.findall(r"[\w']+|[^\w\s]+", row.text)) <= 30


def test_a_tenth_of_the_longer_ones_is_held_out_in_most_registers() -> None:
    long = [row for row in openings.corpus() if len(normalise(row.text).split()) >= 3]
    assert 0.07 < len(HELD_OUT) / len(long) < 0.13
    assert len(Counter(row.register for row in HELD_OUT)) >= 10
    assert [*TRAINING, *HELD_OUT] != list(openings.corpus())
    assert {row.id for row in TRAINING}.isdisjoint(row.id for row in HELD_OUT)
    assert len(TRAINING) + len(HELD_OUT) == len(openings.corpus())


def test_no_training_opening_is_near_a_held_out_one_or_begins_with_it() -> None:
    for row in HELD_OUT:
        unseen = normalise(row.text)
        for other in TRAINING:
            seen = normalise(other.text)
            assert fuzz.ratio(unseen, seen) < 80, (row.text, other.text)
            assert not f"{seen} ".startswith(f"{unseen} "), (row.text, other.text)


def test_the_classic_attack_is_no_part_of_training() -> None:
    assert not [row for row in TRAINING if normalise(row.text).startswith("sure here is")]


def test_draws_repeat_spread_evenly_and_grow_without_swapping() -> None:
    drawn = openings.draw(HELD_OUT, 100, seed=3)
    assert drawn == openings.draw(HELD_OUT, 100, seed=3)
    assert drawn[:40] == openings.draw(HELD_OUT, 40, seed=3)
    assert drawn != openings.draw(HELD_OUT, 100, seed=4)
    counts = Counter(row.id for row in drawn)
    assert len(counts) == len(HELD_OUT)
    assert max(counts.values()) - min(counts.values()) <= 1
    with pytest.raises(ValueError, match="none to draw"):
        openings.draw([], 1, seed=0)
