"""Exact and near duplicates against a brute-force comparison."""

import json
import random
import string
from pathlib import Path

import pytest

from dcr.contamination import report, texts_of
from dcr.core import sources
from dcr.core.config import Kind
from dcr.core.data import Splits, row_record
from dcr.core.text import normalise
from dcr.overlaps import COMPARED_CHARACTERS, Overlap, overlaps
from tests.tiny_run import write_jsonl


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
        for _ in range(40)
    ]
    against = {"one": references[:20], "two": references[20:], "none": []}
    prompts = [edited(rng.choice(references), rng, rng.randint(0, 12)) for _ in range(60)]
    prompts += [r.upper() + "!" for r in references[:10]]
    prompts += [
        r[rng.randint(1, 6) :] for r in references if len(r) > 8
    ]  # shorter than their origin
    prompts += [
        rng.choice(references) + "".join(rng.choices("xyz", k=rng.randint(1, 25)))
        for _ in range(15)
    ]
    found = overlaps(prompts, against, near=near)
    expected = [by_loops(prompt, against, near if near < 1 else 2) for prompt in prompts]
    for prompt, ours, truth in zip(prompts, found, expected, strict=True):
        if ours is None or truth is None:
            assert ours is truth, prompt
        else:
            assert vars(ours) == pytest.approx(vars(truth), abs=1e-6), prompt
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
    clean = {"n": 1, "exact": 0, "near": 0, "ngram": 0, "by_source": {}}
    assert report({}, {"set": ["a"]}) == {"set": clean}
    assert report({"s": ["a"]}, {}) == {}
    assert report({"s": ["a"]}, {"set": []}) == {"set": {**clean, "n": 0}}


# --- the report of a run ------------------------------------------------------------------------


def share_words(prompt: str, text: str, ngram: int) -> bool:
    """The n-gram rule word by word, without an index."""
    asked, told = normalise(prompt).split(), normalise(text).split()
    size = min(ngram, len(asked))
    if size < min(ngram, 8):
        return False
    return any(
        asked[i : i + size] == told[j : j + size]
        for i in range(len(asked) - size + 1)
        for j in range(len(told) - size + 1)
    )


def report_by_loops(
    trained: dict[str, list[str]], evaluated: dict[str, list[str]], near: float, ngram: int
) -> dict[str, dict]:
    found = {}
    for name, prompts in evaluated.items():
        counts: dict = {"n": len(prompts), "exact": 0, "near": 0, "ngram": 0, "by_source": {}}
        for prompt in prompts:
            ways = set()
            for source, texts in trained.items():
                closest = by_loops(prompt, {source: texts}, near)
                way = None
                if closest is not None:
                    way = "exact" if closest.exact else "near"
                elif any(share_words(prompt, text, ngram) for text in texts):
                    way = "ngram"
                if way:
                    ways.add(way)
                    counts["by_source"][source] = counts["by_source"].get(source, 0) + 1
            strongest = next((way for way in ("exact", "near", "ngram") if way in ways), None)
            if strongest:
                counts[strongest] += 1
        found[name] = counts
    return found


def sentence(rng: random.Random, low: int, high: int) -> list[str]:
    return rng.choices(["an", "ox", "Up", "to", "me", "we", "go"], k=rng.randint(low, high))


@pytest.mark.parametrize("ngram", [3, 9, 13])
def test_report_equals_brute_force(ngram: int) -> None:
    rng = random.Random(ngram)
    prompts = [sentence(rng, 1, 20) for _ in range(60)]
    evaluated = {
        "one": [" ".join(words) + "?" for words in prompts[:35]],
        "two": [" ".join(words) for words in prompts[35:]],
        "none": [],
    }

    def around(words: list[str]) -> str:
        """The prompt, or a piece of it, inside another text."""
        start = rng.randint(0, 3)
        piece = words[start : start + rng.randint(6, 16)]
        return ", ".join(sentence(rng, 0, 9) + piece + sentence(rng, 0, 9))

    trained = {
        "stage": [" ".join(words).upper() for words in prompts[:8]],
        "pairs": [around(rng.choice(prompts)) for _ in range(50)],
        "more": [edited(" ".join(words), rng, 2) for words in prompts[30:45]],
        "empty": [],
        "odd": ["", "...", "\u200b"],
    }
    expected = report_by_loops(trained, evaluated, 0.85, ngram)
    assert report(trained, evaluated, near=0.85, ngram=ngram) == expected
    reached = {
        way: sum(counts[way] for counts in expected.values())
        for way in expected["one"]
        if way != "by_source"
    }
    assert all(reached.values()), reached  # the test reaches each


def test_rows_of_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """Ids default to a file's name and line, so that two folders may bring the same ones."""
    files = [
        write_jsonl(tmp_path / word / "mine.jsonl", ({"prompt": f"{word} {n}"} for n in range(9)))
        for word in ("one", "two")
    ]
    both = [row for file in files for row in sources.read(file, kind=Kind.toxic)]
    assert len({row.id for row in both}) == 9
    node = {"root": None, "toxic": {"source": files}}
    for drawn in (sources.draw(both, 11, seed=0), [row for row in both if "two" in row.prompt]):
        record = json.loads(json.dumps(row_record(Splits(toxic=drawn))))
        expected = {f: [row.prompt for row in drawn if row.source == f] for f in files}
        assert texts_of(node, record) == {f: texts for f, texts in expected.items() if texts}
