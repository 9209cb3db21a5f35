"""The embedded corpora keep what they promise: enough of each kind, in pairs, no leak.

What the contrasts and their registers promise stands in docs/contrasts.md. The classifiers are
independent of the project: scikit-learn on features that tell no intent.
"""

import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold

import dcr
from dcr import balance, keywords, resolving
from dcr.core import sources
from dcr.core.config import Kind
from dcr.core.sources import Example
from dcr.core.text import normalise
from dcr.extensions import TrainSettings
from dcr.overlaps import overlaps
from dcr.public import SOURCES
from tests.tiny_run import DATA, composed, drawn, real

FOLDER = Path(dcr.__file__).parent / "demo"
SPLITS = ("", "_heldout")
KINDS = [kind.value for kind in Kind]
DEMO = {(kind, s): sources.read(f"demo_{kind}{s}") for kind in KINDS for s in SPLITS}


class Pairs:
    """The pairs of a corpus: what is trained on, then what is held out."""

    def __init__(self, name: str) -> None:
        self.train, self.held_out = (
            [sources.read(f"{name}_{kind}{split}") for kind in ("seemingly_toxic", "toxic")]
            for split in SPLITS
        )
        self.harmless, self.toxic = ([*self.train[k], *self.held_out[k]] for k in (0, 1))
        self.rows = [*self.harmless, *self.toxic]
        self.is_toxic = np.repeat([0, 1], len(self.harmless))


CONTRASTS, VOICES = Pairs("contrasts"), Pairs("registers")
CORPORA = {
    "demo": list(chain(*DEMO.values())),
    "contrasts": CONTRASTS.rows,
    "registers": VOICES.rows,
}
EACH_CORPUS = pytest.mark.parametrize("rows", CORPORA.values(), ids=CORPORA)
PAIRED = pytest.mark.parametrize("pairs", [CONTRASTS, VOICES], ids=["contrasts", "registers"])
REGISTERS = ("fiction", "role play", "exaggeration", "anger", "set-up")


def words(prompt: str) -> list[str]:
    return re.findall(r"[\w'-]+", prompt.lower())


def question(row: Example) -> bool:
    return row.prompt.endswith("?")


def register(row: Example) -> str:
    if re.search(r"[.!] \w", row.prompt):
        return "situation"
    return "question" if question(row) else "imperative"


def prompts(rows: list[Example]) -> list[str]:
    return [row.prompt for row in rows]


def near(rows: list[Example], others: dict[str, list[str]]) -> list[Any]:
    return [overlap for overlap in overlaps(prompts(rows), others, near=0.9) if overlap]


# --- both ---


@EACH_CORPUS
def test_texts_are_clean_and_prompts_and_ids_unique(rows: list[Example]) -> None:
    for text in chain(*((row.prompt, row.response or "x") for row in rows)):
        assert text == text.strip()
        assert "  " not in text
        assert text.isprintable()
    assert (
        len({normalise(row.prompt) for row in rows}) == len({row.id for row in rows}) == len(rows)
    )


@EACH_CORPUS
@pytest.mark.parametrize("rules", ["paper", "recommended"])
def test_answers_answer_and_refusals_refuse(rows: list[Example], rules: str) -> None:
    for row in rows:
        if row.response:
            refused = keywords.outcome(row.response, rules) == "refused"
            assert refused == (row.kind is Kind.toxic), (row.id, row.response)


def test_what_is_held_out_is_not_near_what_is_trained_on() -> None:
    for pairs in (CONTRASTS, VOICES):
        held_out = {str(side): prompts(part) for side, part in enumerate(pairs.held_out)}
        assert near([*chain(*pairs.train)], held_out) == []
    heldout = {kind: prompts(DEMO[kind, "_heldout"]) for kind in KINDS}
    assert near([row for kind in KINDS for row in DEMO[kind, ""]], heldout) == []
    assert near(CONTRASTS.rows, {"demo": prompts(CORPORA["demo"])}) == []
    others = {name: prompts(CORPORA[name]) for name in ("demo", "contrasts")}
    assert near(VOICES.rows, others) == []


@real
def test_no_public_prompt_stands_among_the_pairs_exactly_or_nearly() -> None:
    public = {
        name: prompts(sources.read(name, root=DATA, scored=True))
        for name, source in SOURCES.items()
        if source.file and name not in ("alpaca", "hh_rlhf_harmless_base")
    }
    assert near([*CONTRASTS.rows, *VOICES.rows], public) == []


# --- the demo's ---


def test_there_is_enough_of_every_kind_and_nothing_else() -> None:
    for kind, least in (("seemingly_toxic", 160), ("toxic", 380), ("normal", 240)):
        assert len(DEMO[kind, ""]) + len(DEMO[kind, "_heldout"]) >= least
        assert len(DEMO[kind, "_heldout"]) >= 80
    assert all(row.response for row in DEMO["normal", ""])
    files = {f"{kind}.{split.lstrip('_') or 'train'}.jsonl" for kind, split in DEMO}
    assert {file.name for file in FOLDER.glob("*.jsonl")} == files
    known = {"id", "prompt", "category", "pair", "response"}
    for line in chain(*((FOLDER / file).read_text().splitlines() for file in files)):
        assert {"id", "prompt", "category"} <= set(json.loads(line)) <= known


@pytest.mark.parametrize("split", SPLITS)
def test_pairs_are_whole_and_share_their_form(split: str) -> None:
    safe, toxic = (
        {row.group: row for row in DEMO[kind, split] if row.group}
        for kind in ("seemingly_toxic", "toxic")
    )
    assert safe.keys() == toxic.keys()
    assert len(safe) == len(DEMO["seemingly_toxic", split])
    for pair, row in safe.items():
        assert question(row) == question(toxic[pair]), pair
        assert row.category == toxic[pair].category, pair
        assert row.prompt.split()[0] == toxic[pair].prompt.split()[0], pair
    if not split:
        assert {row.group for row in sources.read("demo_toxic_matched")} == safe.keys()


@pytest.mark.parametrize("place", DEMO, ids="".join)
def test_both_forms_stand_in_every_class(place: tuple[str, str]) -> None:
    assert 0.4 <= np.mean([question(row) for row in DEMO[place]]) <= 0.6
    assert len({row.category for row in DEMO[place]}) >= 8


@pytest.mark.parametrize("kind", KINDS)
def test_no_held_out_prompt_opens_as_a_training_prompt(kind: str) -> None:
    """The first two words are the template of a short prompt."""
    train, heldout = (
        {" ".join(normalise(row.prompt).split()[:2]) for row in DEMO[kind, split]}
        for split in SPLITS
    )
    assert not train & heldout


def test_refusals_do_not_all_open_alike() -> None:
    texts = [row.response for row in DEMO["toxic", ""] if row.response]
    assert len(set(texts)) == len(texts) >= 80
    openings = Counter(" ".join(text.split()[:3]) for text in texts)
    assert openings.most_common(1)[0][1] <= len(texts) / 4


@pytest.mark.parametrize("ratio", [1, 2, 3, 5])
def test_every_ratio_has_its_rows(ratio: float) -> None:
    demo = resolving.resolve(composed("train", "model=tiny"), TrainSettings).data
    rows = drawn(demo, ratio, dcr=True)
    assert (len(rows.seemingly_toxic), len(rows.toxic)) == (40, 40 * ratio)
    assert len(rows.refusals) == 80
    ids = [row.id for part in rows.parts().values() for row in part]
    assert len(set(ids)) == len(ids)
    assert (rows.dropped, rows.in_distribution) == ({}, [])
    form = balance.balance(rows.seemingly_toxic, rows.toxic)
    assert form
    assert not form.warning, form


# --- the contrasts' and the registers' ---


def scores_over_topics(features: Any, pairs: Pairs) -> Any:
    """Cross-validated log-odds of a toxic prompt, no topic on both sides: a pair is never split."""
    topics, scores = [row.category for row in pairs.rows], np.zeros(len(pairs.rows))
    for train, test in GroupKFold(7).split(features, pairs.is_toxic, topics):
        fitted = LogisticRegression(max_iter=2000).fit(features[train], pairs.is_toxic[train])
        scores[test] = fitted.decision_function(features[test])
    return scores


def scores_by_form(pairs: Pairs) -> Any:
    firsts = CountVectorizer(token_pattern=r"\S+")
    opening: Any = firsts.fit_transform(words(row.prompt)[0] for row in pairs.rows)
    counts = [
        [len(words(r.prompt)), len(r.prompt), *(r.prompt.count(mark) for mark in "?.,!")]
        for r in pairs.rows
    ]
    features = np.hstack([np.array(counts, float), opening.toarray()])
    spread = features.std(axis=0)
    scaled = (features - features.mean(axis=0)) / np.where(spread, spread, 1)
    return scores_over_topics(scaled, pairs)


def bag_of_words(pairs: Pairs) -> Any:
    return CountVectorizer(token_pattern=r"[a-z']+", min_df=2).fit_transform(prompts(pairs.rows))


def gap(pair: tuple[Example, Example]) -> tuple[bool, int, int, int]:
    """Whether both open alike, differing words, difference in length, the first's length."""
    one, other = (words(row.prompt) for row in pair)
    differing = len(one) - (Counter(one) & Counter(other)).total()
    return one[0] == other[0], differing, abs(len(one) - len(other)), len(one)


@PAIRED
def test_pairs_are_whole_answered_and_a_fifth_of_topics_is_held_out_whole(pairs: Pairs) -> None:
    harmless, toxic = (
        [(r.group, r.category) for r in part] for part in (pairs.harmless, pairs.toxic)
    )
    assert harmless == toxic
    assert all(row.response for row in pairs.rows)
    assert Counter(row.response for row in pairs.rows).most_common(1)[0][1] <= 3
    seen, unseen = ({row.category for row in part[0]} for part in (pairs.train, pairs.held_out))
    assert not seen & unseen
    assert 0.18 <= len(unseen) / len(seen | unseen) <= 0.25


def test_there_are_600_contrasts_over_40_topics_in_three_forms() -> None:
    assert len(CONTRASTS.harmless) >= 600
    assert min(Counter(register(row) for row in CONTRASTS.harmless).values()) >= 190
    assert len({row.category for row in CONTRASTS.harmless}) >= 40


def test_a_contrast_shares_form_opening_length_and_most_words() -> None:
    pairs = list(zip(CONTRASTS.harmless, CONTRASTS.toxic, strict=True))
    assert [pair for pair in pairs if register(pair[0]) != register(pair[1])] == []
    opening, differing, longer, _ = np.mean([gap(pair) for pair in pairs], axis=0)
    assert opening >= 0.97
    assert longer <= 1
    assert differing <= 5
    lengths = [len(words(row.prompt)) for row in CONTRASTS.rows]
    assert max(lengths) >= 2 * min(lengths)


@PAIRED
def test_form_does_not_tell_the_kinds_apart(pairs: Pairs) -> None:
    assert roc_auc_score(pairs.is_toxic, scores_by_form(pairs)) <= 0.55


@PAIRED
def test_single_words_hardly_tell_the_kinds_apart(pairs: Pairs) -> None:
    bag = bag_of_words(pairs)
    assert roc_auc_score(pairs.is_toxic, scores_over_topics(bag, pairs)) <= 0.70
    present = (bag > 0).toarray()
    shares = [present[kind == pairs.is_toxic].mean(axis=0) for kind in (0, 1)]
    assert np.abs(shares[1] - shares[0]).max() / 2 <= 0.05  # how far one word's AUROC is from 1/2


def test_each_register_has_both_intents_in_equal_form() -> None:
    """One pair of each register in each topic; a row's register stands in its file alone."""
    folder = Path(dcr.__file__).parent / "contrasts"
    lines = {
        row["id"]: row
        for file in folder.glob("registers_*.jsonl")
        for row in map(json.loads, file.read_text().splitlines())
    }
    asked = [(row.category, lines[row.id]["register"]) for row in VOICES.harmless]
    assert asked == [(row.category, lines[row.id]["register"]) for row in VOICES.toxic]
    topics = dict.fromkeys(topic for topic, _ in asked)
    assert sorted(asked) == sorted((topic, voice) for topic in topics for voice in REGISTERS)
    alarming = Counter(lines[row.id]["alarming"] for row in VOICES.harmless)
    assert 0.4 <= alarming["seemingly_toxic"] / alarming.total() <= 0.6

    gaps: dict[str, list[tuple[bool, int, int, int]]] = {voice: [] for voice in REGISTERS}
    for pair in zip(VOICES.harmless, VOICES.toxic, strict=True):
        assert pair[0].prompt[-1] == pair[1].prompt[-1], pair
        assert [pair[0].prompt.count(mark) for mark in "?!"] == [
            pair[1].prompt.count(mark) for mark in "?!"
        ], pair
        gaps[lines[pair[0].id]["register"]].append(gap(pair))
    voices = np.array([voice for _, voice in asked] * 2)
    by_form = scores_by_form(VOICES)
    by_words = scores_over_topics(bag_of_words(VOICES), VOICES)
    for voice, found in gaps.items():
        opening, differing, longer, length = np.mean(found, axis=0)
        assert opening == 1
        assert longer <= 2
        assert differing <= length / 2
        assert length >= 35
        here = voices == voice
        assert roc_auc_score(VOICES.is_toxic[here], by_form[here]) <= 0.65
        assert roc_auc_score(VOICES.is_toxic[here], by_words[here]) <= 0.75
    lengths = [found[-1] for part in gaps.values() for found in part]
    assert min(lengths) >= 25
    assert np.mean([part[-1] for part in gaps["set-up"]]) >= 55
