"""Agreement of the keyword rules with people on models left out of the fit, and the fit itself.

    python benchmarks/keywords.py <data> [--write]

`<data>/xstest_completions` holds completions of three models with human labels. For each of them
the weights of `recommended` are fitted to the two others, to the invented completions of
tests/refusal_labelled.jsonl, all but its part `unseen`, and to the demo corpus. Cohen's kappa is
that with the labels of the model left out, of full refusals against all else and of the three
classes; once more without the prompts of the tested completions. `--write` fits to all three and
writes dcr/keywords/weights.json.
"""

import argparse
import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score

from dcr import keywords

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "dcr/keywords/weights.json"
OUTCOMES = {"1": "complied", "2": "refused", "3": "partial"}  # by the labels' first character
STRENGTH = 0.1  # of the fit to the data against the penalty; 0.05 to 0.2 agree within 0.02
FOLDS = 5
LEAST_ROWS, LEAST_CATEGORIES = 15, 6  # that a word needs to have a weight
Weights = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Row:
    """A completion with its label; `outcome` is None where only `refused` is known."""

    response: str
    refused: bool
    outcome: str | None
    model: str = ""
    category: str = ""
    prompt: int = 0
    asked: str = ""  # the prompt's text
    by_each: tuple[str, ...] = ()  # outcome by each of two people, before they agreed on one


def completions(data: Path) -> list[Row]:
    """XSTest's completions with their final human labels, and those of each annotator."""
    rows = []
    for path in sorted((data / "xstest_completions").glob("*.jsonl")):
        for row in _read(path):
            outcome = OUTCOMES[row["meta"]["human_label"][0]]
            number = int(row["id"].split("-")[2])
            labels = (row["response"], outcome == "refused", outcome)
            about = (row["meta"]["model"], row["category"], number, row["prompt"])
            by_each = tuple(OUTCOMES[row["meta"][f"annotation_{i}"][0]] for i in (1, 2))
            rows.append(Row(*labels, *about, by_each))
    return rows


def invented() -> list[Row]:
    """Our own completions, less those kept for testing, and the answers of the demo corpus."""
    rows = [row for row in _read(ROOT / "tests/refusal_labelled.jsonl") if row["part"] != "unseen"]
    demo = {
        outcome: _read(ROOT / f"dcr/demo/{kind}.train.jsonl")
        for outcome, kind in (("refused", "toxic"), ("complied", "seemingly_toxic"))
    }
    return [Row(row["response"], row["refused"], row.get("outcome")) for row in rows] + [
        Row(row["response"], outcome == "refused", outcome)
        for outcome, answers in demo.items()
        for row in answers
        if row.get("response")
    ]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def fitted(rows: Sequence[Row]) -> Weights:
    """Weights of a full refusal against all else, then of a partial one against compliance.

    Words count that stand in several completions on several categories of prompts.
    """
    places: dict[str, list[str]] = {}
    for row in rows:
        for name in _features(row.response) if row.category else ():
            places.setdefault(name, []).append(row.category)
    common = {
        name
        for name, categories in places.items()
        if len(categories) >= LEAST_ROWS and len(set(categories)) >= LEAST_CATEGORIES
    }
    known = [row for row in rows if row.outcome in ("partial", "complied")]
    partly = [row.outcome == "partial" for row in known]
    return {
        "refused": _regression(rows, [row.refused for row in rows], common),
        "partial": _regression(known, partly, common),
    }


def _regression(
    rows: Sequence[Row], labels: Sequence[bool], common: Collection[str]
) -> dict[str, float]:
    columns = DictVectorizer()
    signs = [_features(row.response) for row in rows]
    kept = [
        {k: v for k, v in each.items() if k in common or not k.startswith("word ")}
        for each in signs
    ]
    model = LogisticRegression(C=STRENGTH, max_iter=5000).fit(columns.fit_transform(kept), labels)
    weights = dict(zip(columns.get_feature_names_out(), model.coef_[0].tolist(), strict=True))
    found = {"bias": float(model.intercept_[0])} | weights
    return {name: round(weight, 2) for name, weight in found.items() if round(weight, 2)}


_features = functools.cache(keywords.features)


def left_out(rows: Sequence[Row], disjoint: bool = False) -> list[str]:
    """Outcomes by weights that saw no completion of the row's model, nor its prompt if disjoint."""
    found: dict[int, str] = {}
    for model in sorted({row.model for row in rows}):
        for fold in range(FOLDS if disjoint else 1):
            inside = [not disjoint or row.prompt % FOLDS == fold for row in rows]
            tested = [i for i, row in enumerate(rows) if row.model == model and inside[i]]
            seen = [
                r for i, r in enumerate(rows) if r.model != model and not (disjoint and inside[i])
            ]
            weights = fitted(seen + invented())
            found |= {i: keywords.weighed(rows[i].response, weights) for i in tested}
    return [found[i] for i in range(len(rows))]


def kappas(rows: Sequence[Row], outcomes: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Per model and over all: kappa of full refusals against all else, and of three classes."""
    names = [row.model for row in rows]
    found = {}
    for name in [*sorted(set(names)), "all"]:
        pairs = [
            (row.outcome, told)
            for row, told in zip(rows, outcomes, strict=True)
            if name in (row.model, "all")
        ]
        people, ours = zip(*pairs, strict=True)
        full = cohen_kappa_score([p == "refused" for p in people], [o == "refused" for o in ours])
        found[name] = (float(full), float(cohen_kappa_score(people, ours)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("data", type=Path, help="folder that holds xstest_completions")
    parser.add_argument("--write", action="store_true", help=f"write {WEIGHTS.relative_to(ROOT)}")
    options = parser.parse_args()
    rows = completions(options.data)
    if not rows:
        raise SystemExit(f"{options.data}/xstest_completions: no such folder, or no rows in it")
    ways: Mapping[str, Callable[[], list[str]]] = {
        "paper": lambda: [keywords.outcome(row.response, "paper") for row in rows],
        "recommended, model left out": partial(left_out, rows),
        "recommended, model and prompts left out": partial(left_out, rows, disjoint=True),
    }
    for way, outcomes in ways.items():
        told = kappas(rows, outcomes())
        mean = np.mean([told[name] for name in told if name != "all"], axis=0)
        print(way)
        for name, (full, three) in {**told, "mean of models": mean}.items():
            print(f"  {name:16} full {full:.3f}   three classes {three:.3f}")
    if options.write:
        weights = fitted(rows + invented())
        WEIGHTS.write_text(json.dumps(weights, indent=1) + "\n", "utf-8")
        print(f"{WEIGHTS.relative_to(ROOT)}: {sum(map(len, weights.values()))} weights")


if __name__ == "__main__":
    main()
