"""Signs other than intent that tell two kinds of prompts apart: form, single words, length.

Stage one learns whatever separates its pairs. Where grammar does, it may learn that.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dcr.core import statistics
from dcr.core.data import Splits
from dcr.core.sources import Example

FOLDS = 5
TOLD_BY_FORM = 0.75  # AUROC; XSTest's contrasts have .67, the paper's pairing .99
QUESTION_END = re.compile(r"[?\uff1f\u061f][\s\"'”’»)\]]*\Z")  # also full-width and Arabic
WORD = re.compile(r"[\w'’-]+")


@dataclass(frozen=True)
class Balance:
    """How seemingly toxic prompts differ from toxic ones on the outside; pairs in that order.

    `form` and `words` are cross-validated AUROCs of naive Bayes classifiers that see nothing but
    the form (first word, end, length, sentences), or which words occur: 0.5 where that tells
    nothing, None where a kind has too few prompts for folds.
    """

    form: float | None
    words: float | None
    questions: tuple[float, float]  # shares
    length: tuple[float, float]  # mean words a prompt

    def record(self) -> dict[str, object]:
        """The fields as JSON holds them."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    def rows(self) -> list[tuple[str, str]]:
        """The fields as rows of a table."""
        return [
            ("form alone tells the kinds apart (AUROC)", _told(self.form)),
            ("single words alone (AUROC)", _told(self.words)),
            ("questions, seemingly toxic / toxic", " / ".join(f"{s:.0%}" for s in self.questions)),
            (
                "words a prompt, seemingly toxic / toxic",
                " / ".join(f"{n:.1f}" for n in self.length),
            ),
        ]

    @property
    def warning(self) -> str | None:
        """One line with a cure where form alone tells the kinds apart."""
        if self.form is None or self.form <= TOLD_BY_FORM:
            return None
        asked, told = self.questions
        return (
            f"form alone tells seemingly toxic from toxic prompts (AUROC {self.form:.2f}; "
            f"{asked:.0%} and {told:.0%} are questions): stage one can learn it instead of intent. "
            "Take contrasts, as preset=recommended does, or write twins of your toxic prompts: "
            "python -m dcr.augment --help"
        )


def _told(auroc: float | None) -> str:
    return "too few prompts" if auroc is None else f"{auroc:.2f}"


def balance(seemingly_toxic: Sequence[Example], toxic: Sequence[Example]) -> Balance | None:
    """None without prompts of both kinds."""
    if not seemingly_toxic or not toxic:
        return None
    kinds = (seemingly_toxic, toxic)
    lengths = [[len(WORD.findall(row.prompt)) for row in rows] for rows in kinds]
    return Balance(
        form=told_apart(*([(_group(row), form(row.prompt)) for row in rows] for rows in kinds)),
        words=told_apart(*([(_group(row), words(row.prompt)) for row in rows] for rows in kinds)),
        questions=(question_share(seemingly_toxic), question_share(toxic)),
        length=(sum(lengths[0]) / len(seemingly_toxic), sum(lengths[1]) / len(toxic)),
    )


def examined(rows: Splits) -> tuple[dict[str, Any], list[str]]:
    """A run's rows of stage one as `rows.json` tells of them, and what to warn of."""
    found = balance(rows.seemingly_toxic, rows.toxic)
    if found is None:
        return {}, []
    return {"balance": found.record()}, [found.warning] if found.warning else []


def _group(row: Example) -> str:
    return row.group or f"{row.source}/{row.id}"


def form(prompt: str) -> set[str]:
    """Features of a prompt that say nothing of what it is about."""
    found = WORD.findall(prompt.lower())
    return {
        f"first word {found[0] if found else ''}",
        f"length {len(found).bit_length()}",
        f"end {'?' if ends_as_question(prompt) else prompt.rstrip()[-1:]}",
        f"sentences {min(len(re.findall(r'[.!?] +[^a-z ]', prompt)), 3)}",
    }


def words(prompt: str) -> set[str]:
    """The distinct words of a prompt, in lower case."""
    return set(WORD.findall(prompt.lower()))


def ends_as_question(prompt: str) -> bool:
    """Whether the prompt ends in a question mark, closing quotes and spaces aside."""
    return QUESTION_END.search(prompt) is not None


def question_share(rows: Sequence[Example]) -> float:
    """Share of prompts that end as questions; 0 for no rows."""
    return sum(ends_as_question(row.prompt) for row in rows) / max(len(rows), 1)


Row = tuple[str, set[str]]  # its group, its features


def told_apart(negative: Sequence[Row], positive: Sequence[Row]) -> float | None:
    """Cross-validated AUROC of naive Bayes; None where a fold lacks a class.

    Multinomial, with one added to each count. Rows of one group (a pair of contrasts, a template)
    are never on both sides of a fold.
    """
    groups = dict.fromkeys(group for group, _ in [*negative, *positive])
    fold_of = {group: place % FOLDS for place, group in enumerate(groups)}
    scores: tuple[list[float], list[float]] = ([], [])
    for fold in range(FOLDS):
        counts = tuple(
            Counter(f for group, row in rows if fold_of[group] != fold for f in row)
            for rows in (negative, positive)
        )
        if not all(counts):
            return None
        known = counts[0] | counts[1]
        totals = [count.total() + len(known) for count in counts]
        weights = {
            feature: math.log((counts[1][feature] + 1) / totals[1])
            - math.log((counts[0][feature] + 1) / totals[0])
            for feature in known
        }
        for rows, scored in zip((negative, positive), scores, strict=True):
            scored.extend(
                math.fsum(weights.get(feature, 0.0) for feature in row)
                for group, row in rows
                if fold_of[group] == fold
            )
    return statistics.auroc_interval(scores[1], scores[0], resamples=1, seed=0).estimate
