"""Agreement of the judges that run offline with people, on models left out, and the outcomes' fit.

    python benchmarks/outcomes.py <data> [--write]

`<data>/xstest_completions` holds completions of three models with human labels. Cohen's kappa is
that of answered against the rest, of full refusals against the rest and of the three classes; a
text that is circular, empty or in another language counts as neither. Whether a text was ended by
the token limit is not known, and changes nothing of texts as long as theirs.

For each model the weights of the keyword rules and then those of the outcomes are fitted to the two
others, and to our own rows: tests/outcomes_labelled.jsonl and the contrast corpus. The margins of
the keyword rules, which are features, come for a model in the fit from rules that saw only the
other models. `--write` fits to all three and writes dcr/outcomes/weights.json.
"""

import argparse
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score

from benchmarks import keywords as rules
from benchmarks.keywords import ROOT, Row, Weights
from dcr import keywords, outcomes
from dcr.outcomes import Outcome

WEIGHTS = ROOT / "dcr/outcomes/weights.json"
STRENGTH = 0.45  # of the fit against an L1 penalty, which leaves some two dozen weights
TIMES = {"ours": 2.0, "contrasts": 0.3}  # how often such a row counts
CLASSES = {
    Outcome.answered: "complied",
    Outcome.refused: "refused",
    Outcome.partly_refused: "partial",
    Outcome.refused_but_helped: "partial",
}
FITTED = (
    "L1 logistic regressions of answered against the rest, then of refused against partly refused; "
    f"C={STRENGTH}; fitted by benchmarks/outcomes.py --write to XSTest's 1,350 labelled "
    f"completions, to tests/outcomes_labelled.jsonl ({TIMES['ours']:g} times) and to the contrast "
    f"corpus ({TIMES['contrasts']:g} times). 'keywords say' the margin m of the recommended rules, "
    "as 2 tanh(m/4)."
)


def ours() -> list[Row]:
    """Our own rows: invented answers with prompts, and the contrast corpus."""
    labelled = [
        Row(row["response"], kind == "refused", kind, "ours", asked=row["prompt"])
        for row in _lines(ROOT / "tests/outcomes_labelled.jsonl")
        for kind in [CLASSES[Outcome(row["outcome"])]]
    ]
    contrasts = [
        Row(row["response"], kind == "toxic", outcome, "contrasts", asked=row["prompt"])
        for kind, outcome in (("toxic", "refused"), ("seemingly_toxic", "complied"))
        for part in ("train", "heldout")
        for row in _lines(ROOT / f"dcr/contrasts/{kind}.{part}.jsonl")
    ]
    return labelled + contrasts


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


class Fits:
    """Weights by the models that they are fitted to; those of the keyword rules are kept."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows, self.own, self.invented = list(rows), ours(), rules.invented()
        self.models = sorted({row.model for row in rows})
        self.keyword_rules = functools.cache(self._keyword_rules)

    def _keyword_rules(self, models: frozenset[str]) -> Weights:
        return rules.fitted([row for row in self.rows if row.model in models] + self.invented)

    def outcomes(self, models: frozenset[str]) -> Weights:
        """Of answered, and of refused against what does both."""
        rows = [row for row in self.rows if row.model in models] + self.own
        seen = [
            outcomes.features(row.asked, row.response, self.keyword_rules(models - {row.model}))
            for row in rows
        ]
        declined = [place for place, row in enumerate(rows) if row.outcome != "complied"]
        return {
            "answered": _regression(rows, seen, range(len(rows)), "complied"),
            "refused": _regression(rows, seen, declined, "refused"),
        }


def _regression(
    rows: Sequence[Row], seen: Sequence[Mapping[str, float]], places: Sequence[int], label: str
) -> dict[str, float]:
    columns = DictVectorizer(sparse=False)
    matrix = columns.fit_transform([seen[place] for place in places])
    model = LogisticRegression(
        C=STRENGTH, l1_ratio=1, solver="liblinear", max_iter=5000, random_state=0
    ).fit(
        matrix,
        [rows[place].outcome == label for place in places],
        sample_weight=[TIMES.get(rows[place].model, 1.0) for place in places],
    )
    weights = dict(zip(columns.get_feature_names_out(), model.coef_[0].tolist(), strict=True))
    found = {"bias": float(model.intercept_[0])} | weights
    rounded = {name: round(weight, 2) for name, weight in found.items()}
    return {name: weight for name, weight in rounded.items() if weight or name == "bias"}


def told(row: Row, of: Weights | None = None, by: Weights | None = None) -> str:
    """The class of a row by outcomes, with the weights `of` these and `by` keyword rules."""
    found = outcomes.outcome(row.asked, row.response, True, of, by)
    return CLASSES.get(found, "neither")


def judged(fits: Fits) -> dict[str, list[str]]:
    """The class of each row by every judge, by weights that have not seen the row's model."""
    rows = fits.rows
    others = {model: frozenset(fits.models) - {model} for model in fits.models}
    weights = {model: fits.outcomes(others[model]) for model in fits.models}
    by_rules = {model: fits.keyword_rules(others[model]) for model in fits.models}
    return {
        "keyword:paper": [keywords.outcome(row.response, "paper") for row in rows],
        "keyword:recommended": [
            keywords.weighed(row.response, by_rules[row.model]) for row in rows
        ],
        "outcome": [told(row, weights[row.model], by_rules[row.model]) for row in rows],
    }


def kappas(rows: Sequence[Row], classes: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """By model: kappa of answered, and of refused, against the rest, and of the three classes."""
    found = {}
    for model in sorted({row.model for row in rows}):
        pairs = [
            (row.outcome, said)
            for row, said in zip(rows, classes, strict=True)
            if row.model == model
        ]
        people, ours = zip(*pairs, strict=True)
        one = [
            cohen_kappa_score([p == label for p in people], [o == label for o in ours])
            for label in ("complied", "refused")
        ]
        found[model] = (*map(float, one), float(cohen_kappa_score(people, ours)))
    return found


def gain(rows: Sequence[Row], ours: Sequence[str], theirs: Sequence[str]) -> list[float]:
    """The mean gain in kappa of answered, with its 95% bootstrap interval over prompts."""
    places = {prompt: [] for prompt in sorted({row.prompt for row in rows})}
    for place, row in enumerate(rows):
        places[row.prompt].append(place)
    chance, keys = np.random.default_rng(0), list(places)

    def at(drawn: Sequence[int]) -> float:
        mean = []
        for model in {row.model for row in rows}:
            of = [place for place in drawn if rows[place].model == model]
            people = [rows[place].outcome == "complied" for place in of]
            both = [
                cohen_kappa_score(people, [told[place] == "complied" for place in of])
                for told in (ours, theirs)
            ]
            mean.append(both[0] - both[1])
        return float(np.mean(mean))

    draws = [
        at([place for key in chance.choice(keys, len(keys)) for place in places[key]])
        for _ in range(200)
    ]
    return [at(range(len(rows))), *map(float, np.quantile(draws, (0.025, 0.975)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("data", type=Path, help="folder that holds xstest_completions")
    parser.add_argument("--write", action="store_true", help=f"write {WEIGHTS.relative_to(ROOT)}")
    options = parser.parse_args()
    rows = rules.completions(options.data)
    if not rows:
        raise SystemExit(f"{options.data}/xstest_completions: no such folder, or no rows in it")
    fits = Fits(rows)
    classes = judged(fits)
    print(f"{'judge':28}{'model':18}answered  refused  three classes")
    for judge, said in classes.items():
        by_model = kappas(rows, said)
        mean = np.mean(list(by_model.values()), axis=0)
        for model, of in {**by_model, "mean": mean}.items():
            print(f"{judge:28}{model:18}" + "".join(f"{kappa:8.3f}" for kappa in of))
    for other in ("keyword:recommended", "keyword:paper"):
        told = gain(rows, classes["outcome"], classes[other])
        print("gain over {}: {:.3f} [{:.3f}, {:.3f}]".format(other, *told))
    if options.write:
        weights = fits.outcomes(frozenset(fits.models))
        text = json.dumps({"fitted": FITTED, "weights": weights}, indent=1, ensure_ascii=False)
        WEIGHTS.write_text(text + "\n", "utf-8")
        print(f"{WEIGHTS.relative_to(ROOT)}: {sum(map(len, weights.values()))} weights")


if __name__ == "__main__":
    main()
