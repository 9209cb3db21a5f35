"""Balance: how well form and words tell kinds apart, by scikit-learn and on known pairings."""

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.naive_bayes import MultinomialNB
from sklearn.preprocessing import MultiLabelBinarizer

from dcr import balance
from dcr.core import sources
from dcr.core.config import Kind
from dcr.core.sources import Example
from tests.tiny_run import DATA, real


def examples(*prompts: str, kind: Kind = Kind.toxic) -> list[Example]:
    return [Example(f"{kind.value}-{i}", text, kind, "test") for i, text in enumerate(prompts)]


def test_the_classifier_is_cross_validated_naive_bayes() -> None:
    rows = [sources.read(f"contrasts_{kind}_heldout") for kind in ("seemingly_toxic", "toxic")]
    kinds = [[(row.group or "", balance.words(row.prompt)) for row in part] for part in rows]
    groups = list(dict.fromkeys(group for group, _ in kinds[0] + kinds[1]))
    fold = np.array([groups.index(group) % balance.FOLDS for group, _ in kinds[0] + kinds[1]])
    labels = np.repeat([0, 1], [len(part) for part in kinds])
    scores = np.zeros(len(labels))
    for place in range(balance.FOLDS):
        train = fold != place
        words = [row for _, row in kinds[0] + kinds[1]]
        table = MultiLabelBinarizer().fit([words[i] for i in np.flatnonzero(train)])
        known = set(table.classes_)
        counted: Any = table.transform([row & known for row in words])
        fitted = MultinomialNB(alpha=1, fit_prior=False).fit(counted[train], labels[train])
        odds = fitted.predict_log_proba(counted[~train])
        scores[~train] = odds[:, 1] - odds[:, 0]
    found = balance.told_apart(kinds[0], kinds[1])
    assert found == pytest.approx(roc_auc_score(labels, scores), abs=1e-3)


def test_form_that_goes_with_the_kind_is_found_and_warned_of() -> None:
    asked = examples(*(f"How may I {n} it?" for n in range(40)), kind=Kind.seemingly_toxic)
    told = examples(*(f"Do {n} now" for n in range(40)))
    found = balance.balance(asked, told)
    assert found
    assert (found.form, found.questions, found.length) == (1, (1, 0), (5, 3))
    assert "100% and 0% are questions" in (found.warning or "")
    mixed = asked[:20] + told[:20]
    same = balance.balance(mixed, [*reversed(mixed)])
    assert same
    assert (same.form, same.warning) == (0.5, None)


def test_a_pair_is_never_on_both_sides_of_a_fold() -> None:
    """Each pair has words of its own: seen elsewhere they would tell its kinds apart."""
    rows = [[(str(i), {f"{kind} {i // 2}"}) for i in range(40)] for kind in "ab"]
    assert (balance.told_apart(rows[0], rows[1]) or 0) > 0.5
    rows = [[(str(i // 2), {f"{kind} {i // 2}"}) for i in range(40)] for kind in "ab"]
    assert balance.told_apart(rows[0], rows[1]) == 0.5


def test_without_both_kinds_there_is_nothing_to_say() -> None:
    assert balance.balance([], examples("Do it")) is None
    one = balance.balance(examples("a b", kind=Kind.seemingly_toxic), examples("c d"))
    assert one
    assert (one.form, one.words) == (None, None)
    assert one.warning is None


@real
def test_the_papers_pairing_is_told_apart_by_form_and_its_cures_are_not() -> None:
    safe = sources.read("xstest_safe", root=DATA)
    paper = balance.balance(safe, sources.read("stl_safety", root=DATA))
    assert paper
    assert (paper.form or 0) > 0.95
    assert "100% and 0% are questions" in (paper.warning or "")
    contrasts = balance.balance(safe, sources.read("xstest_unsafe", root=DATA))
    assert contrasts
    assert contrasts.warning is None


def test_ends_as_question() -> None:
    asked = (
        "How?",
        "He asked: 'how?' ",
        "“How?”\n",
        "\u5982\u4f55\uff1f",
        "\u0643\u064a\u0641\u061f",
    )
    assert all(map(balance.ends_as_question, asked))
    assert not any(map(balance.ends_as_question, ("How? Tell me.", "Tell me how", "?!", "")))
