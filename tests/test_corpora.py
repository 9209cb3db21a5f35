"""The two embedded corpora keep what they promise: enough of each kind, in pairs, no leak.

What the contrasts promise stands in docs/contrasts.md. The classifiers are independent of the
project: scikit-learn on features that tell no intent.
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
from dcr import balance, keywords
from dcr.core import data, sources
from dcr.core.config import Kind, resolving
from dcr.core.sources import SOURCES, Example
from dcr.core.text import normalise
from dcr.extensions import TrainSettings
from tests.tiny_run import DATA, composed, real

FOLDER = Path(dcr.__file__).parent / "demo"
SPLITS = ("", "_heldout")
KINDS = [kind.value for kind in Kind]
DEMO = {(kind, s): sources.read(f"demo_{kind}{s}") for kind in KINDS for s in SPLITS}
TRAIN, HELD_OUT = (
    [sources.read(f"contrasts_{kind}{split}") for kind in ("seemingly_toxic", "toxic")]
    for split in SPLITS
)
HARMLESS, TOXIC = ([*TRAIN[side], *HELD_OUT[side]] for side in (0, 1))
CONTRASTS = [*HARMLESS, *TOXIC]
IS_TOXIC = np.repeat([0, 1], len(HARMLESS))
CORPORA = {"demo": list(chain(*DEMO.values())), "contrasts": CONTRASTS}
EACH_CORPUS = pytest.mark.parametrize("rows", CORPORA.values(), ids=CORPORA)


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
    overlaps = data.overlaps(prompts(rows), others, near=0.9)
    return [overlap for overlap in overlaps if overlap]


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
    held_out = {str(side): prompts(part) for side, part in enumerate(HELD_OUT)}
    assert near([*TRAIN[0], *TRAIN[1]], held_out) == []
    heldout = {kind: prompts(DEMO[kind, "_heldout"]) for kind in KINDS}
    assert near([row for kind in KINDS for row in DEMO[kind, ""]], heldout) == []
    assert near(CONTRASTS, {"demo": prompts(CORPORA["demo"])}) == []


@real
def test_no_public_prompt_stands_among_the_contrasts_exactly_or_nearly() -> None:
    public = {
        name: prompts(sources.read(name, root=DATA, scored=True))
        for name, source in SOURCES.items()
        if source.file and name not in ("alpaca", "hh_rlhf_harmless_base")
    }
    assert near(CONTRASTS, public) == []


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
    rows = data.split(demo, ratio, 0, True)
    assert (len(rows.seemingly_toxic), len(rows.toxic)) == (40, 40 * ratio)
    assert len(rows.refusals) == 80
    ids = [row.id for part in rows.parts().values() for row in part]
    assert len(set(ids)) == len(ids)
    assert (rows.dropped, rows.in_distribution) == ({}, [])
    form = balance.balance(rows.seemingly_toxic, rows.toxic)
    assert form
    assert not form.warning, form


# --- the contrasts' ---


def auroc_over_topics(features: Any) -> float:
    """Cross-validated, no topic on both sides: a pair is never split."""
    topics, scores = [row.category for row in CONTRASTS], np.zeros(len(CONTRASTS))
    for train, test in GroupKFold(7).split(features, IS_TOXIC, topics):
        fitted = LogisticRegression(max_iter=2000).fit(features[train], IS_TOXIC[train])
        scores[test] = fitted.decision_function(features[test])
    return float(roc_auc_score(IS_TOXIC, scores))


def test_there_are_600_pairs_over_40_topics_of_which_a_fifth_is_held_out_whole() -> None:
    assert [(row.group, row.category) for row in HARMLESS] == [(r.group, r.category) for r in TOXIC]
    assert len(HARMLESS) >= 600
    assert all(row.response for row in CONTRASTS)
    assert min(Counter(register(row) for row in HARMLESS).values()) >= 190
    assert Counter(row.response for row in CONTRASTS).most_common(1)[0][1] <= 3
    seen, unseen = ({row.category for row in part[0]} for part in (TRAIN, HELD_OUT))
    assert not seen & unseen
    assert len(seen | unseen) >= 40
    assert 0.18 <= len(unseen) / len(seen | unseen) <= 0.25


def test_a_pair_shares_form_opening_length_and_most_words() -> None:
    differing, openings, gaps = [], [], []
    for pair in zip(HARMLESS, TOXIC, strict=True):
        assert register(pair[0]) == register(pair[1]), pair
        one, other = (words(row.prompt) for row in pair)
        differing.append(len(one) - (Counter(one) & Counter(other)).total())
        openings.append(one[0] == other[0])
        gaps.append(abs(len(one) - len(other)))
    assert np.mean(openings) >= 0.97
    assert np.mean(gaps) <= 1
    assert np.mean(differing) <= 5
    lengths = [len(words(row.prompt)) for row in CONTRASTS]
    assert max(lengths) >= 2 * min(lengths)


def test_form_does_not_tell_the_kinds_apart() -> None:
    firsts = CountVectorizer(token_pattern=r"\S+")
    opening: Any = firsts.fit_transform(words(r.prompt)[0] for r in CONTRASTS)
    counts = [
        [len(words(r.prompt)), len(r.prompt), *(r.prompt.count(mark) for mark in "?.,!")]
        for r in CONTRASTS
    ]
    features = np.hstack([np.array(counts, float), opening.toarray()])
    spread = features.std(axis=0)
    scaled = (features - features.mean(axis=0)) / np.where(spread, spread, 1)
    assert auroc_over_topics(scaled) <= 0.55


def test_single_words_hardly_tell_the_kinds_apart() -> None:
    counted = CountVectorizer(token_pattern=r"[a-z']+", min_df=2)
    bag: Any = counted.fit_transform(prompts(CONTRASTS))
    assert auroc_over_topics(bag) <= 0.70
    present = (bag > 0).toarray()
    shares = [present[kind == IS_TOXIC].mean(axis=0) for kind in (0, 1)]
    assert np.abs(shares[1] - shares[0]).max() / 2 <= 0.05  # how far one word's AUROC is from 1/2
