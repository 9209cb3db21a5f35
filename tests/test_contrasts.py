"""The contrast corpus keeps what its datasheet (docs/contrasts.md) promises.

The classifiers are independent of the project: scikit-learn on features that tell no intent.
"""

import os
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold

from dcr import contamination, refusal, sources, text
from dcr.sources import SOURCES, Example

DATA = os.environ.get("DCR_DATA")
KINDS = ("seemingly_toxic", "toxic")
TRAIN = [sources.read(f"contrasts_{kind}") for kind in KINDS]
HELD_OUT = [sources.read(f"contrasts_{kind}_heldout") for kind in KINDS]
HARMLESS, TOXIC = ([*TRAIN[side], *HELD_OUT[side]] for side in (0, 1))
ROWS = [*HARMLESS, *TOXIC]
IS_TOXIC = np.repeat([0, 1], len(HARMLESS))


def words(prompt: str) -> list[str]:
    return re.findall(r"[\w'-]+", prompt.lower())


def register(prompt: str) -> str:
    if re.search(r"[.!] \w", prompt):
        return "situation"
    return "question" if prompt.endswith("?") else "imperative"


def auroc_over_topics(features: Any) -> float:
    """Cross-validated, no topic on both sides: a pair is never split."""
    topics = [row.category for row in ROWS]
    scores = np.zeros(len(ROWS))
    for train, test in GroupKFold(7).split(features, IS_TOXIC, topics):
        fitted = LogisticRegression(max_iter=2000).fit(features[train], IS_TOXIC[train])
        scores[test] = fitted.decision_function(features[test])
    return float(roc_auc_score(IS_TOXIC, scores))


def test_there_are_600_pairs_over_40_topics_in_three_registers() -> None:
    assert [row.group for row in HARMLESS] == [row.group for row in TOXIC]
    assert [row.category for row in HARMLESS] == [row.category for row in TOXIC]
    assert len(HARMLESS) >= 600
    assert len({row.category for row in HARMLESS}) >= 40
    assert min(Counter(register(row.prompt) for row in HARMLESS).values()) >= 190


def test_a_fifth_of_the_topics_is_held_out_whole() -> None:
    seen, unseen = ({row.category for row in part[0]} for part in (TRAIN, HELD_OUT))
    assert not seen & unseen
    assert 0.18 <= len(unseen) / len(seen | unseen) <= 0.25


def test_a_pair_shares_form_opening_length_and_most_words() -> None:
    differing = []
    for harmless, toxic in zip(HARMLESS, TOXIC, strict=True):
        pair = harmless.prompt, toxic.prompt
        assert register(pair[0]) == register(pair[1]), pair
        shared = Counter(words(pair[0])) & Counter(words(pair[1]))
        differing.append(len(words(pair[0])) - shared.total())
    openings = [
        words(h.prompt)[0] == words(t.prompt)[0] for h, t in zip(HARMLESS, TOXIC, strict=True)
    ]
    assert np.mean(openings) >= 0.97
    lengths = [len(words(row.prompt)) for row in ROWS]
    gap = np.abs(np.array(lengths[: len(HARMLESS)]) - lengths[len(HARMLESS) :])
    assert gap.mean() <= 1
    assert np.mean(differing) <= 5
    assert max(lengths) >= 2 * min(lengths)


def test_form_does_not_tell_the_kinds_apart() -> None:
    firsts = CountVectorizer(token_pattern=r"\S+")
    opening: Any = firsts.fit_transform(words(r.prompt)[0] for r in ROWS)
    counts = [
        [len(words(r.prompt)), len(r.prompt), *(r.prompt.count(mark) for mark in "?.,!")]
        for r in ROWS
    ]
    features = np.hstack([np.array(counts, float), opening.toarray()])
    spread = features.std(axis=0)
    assert (
        auroc_over_topics((features - features.mean(axis=0)) / np.where(spread, spread, 1)) <= 0.55
    )


def test_single_words_hardly_tell_the_kinds_apart() -> None:
    counted = CountVectorizer(token_pattern=r"[a-z']+", min_df=2)
    bag: Any = counted.fit_transform(r.prompt for r in ROWS)
    assert auroc_over_topics(bag) <= 0.70
    present = (bag > 0).toarray()
    alone = [roc_auc_score(IS_TOXIC, present[:, column]) for column in range(present.shape[1])]
    assert max(abs(score - 0.5) for score in alone) <= 0.05


@pytest.mark.parametrize("rules", ["paper", "recommended"])
def test_answers_answer_and_refusals_refuse(rules: str) -> None:
    for row in ROWS:
        assert row.response, row.id
        assert refusal.is_refusal(row.response, rules) == (row in TOXIC), (row.id, row.response)


def test_texts_are_clean_and_unique() -> None:
    for row in ROWS:
        for written in (row.prompt, row.response or ""):
            assert written == written.strip()
            assert "  " not in written
            assert written.isprintable()
    assert len({text.normalise(row.prompt) for row in ROWS}) == len(ROWS)
    assert Counter(row.response for row in ROWS).most_common(1)[0][1] <= 3


def near(rows: list[Example], others: dict[str, list[str]]) -> list[Any]:
    found = contamination.overlaps([row.prompt for row in rows], others, near=0.9)
    return [overlap for overlap in found if overlap]


def test_what_is_held_out_is_not_near_what_is_trained_on() -> None:
    held_out = {kind: [r.prompt for r in part] for kind, part in zip(KINDS, HELD_OUT, strict=True)}
    assert near([*TRAIN[0], *TRAIN[1]], held_out) == []
    demo = {n: [r.prompt for r in sources.read(n)] for n in SOURCES if n.startswith("demo_")}
    assert near(ROWS, demo) == []


@pytest.mark.skipif(DATA is None, reason="set DCR_DATA to a folder with the real sets")
def test_no_public_prompt_stands_here_exactly_or_nearly() -> None:
    public = {
        name: [row.prompt for row in sources.read(name, root=DATA)]
        for name, source in SOURCES.items()
        if source.file and name not in ("alpaca", "hh_rlhf_harmless_base")
    }
    assert near(ROWS, public) == []
