"""Agreement of the judges that run offline with people, on models left out, and the outcomes' fit.

    python benchmarks/outcomes.py <data> [--record <name>] [--write]

`<data>/xstest_completions` holds completions of three models with human labels. Cohen's kappa is
that of answered against the rest, of full refusals against the rest and of the three classes; a
text that is circular, empty or in another language counts as neither. Whether a text was ended by
the token limit is not known, and changes nothing of texts as long as theirs. `people` is one of the
two annotators against the other. `--record` writes all of it to docs/records/<name>.csv.

For each model the weights of the keyword rules and then those of the outcomes are fitted to the two
others, and to our own rows: tests/outcomes_labelled.jsonl and the contrast corpus. The margins of
the keyword rules, which are features, come for a model in the fit from rules that saw only the
other models. `--write` fits to all three and writes dcr/outcomes/weights.json.
"""

import argparse
import datetime
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score

from benchmarks import keywords as rules
from benchmarks.keywords import ROOT, Row, Weights
from dcr import inference, keywords, outcomes
from dcr.core import storage
from dcr.core.statistics import Interval
from dcr.outcomes import Outcome
from dcr.record import origins, writing

WEIGHTS = ROOT / "dcr/outcomes/weights.json"
STRENGTH = 0.45  # of the fit against an L1 penalty, which leaves some two dozen weights
TOLD = ("answered", "refused", "three_classes")  # from the rest, or from each other
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


class Number(NamedTuple):
    judge: str
    model: str  # whose answers were judged, or "mean"
    told: str
    kappa: Interval


class Fits:
    """Weights by the models that they are fitted to; those of the keyword rules are kept."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows, self.own, self.invented = list(rows), ours(), rules.invented()
        self.models = sorted({row.model for row in rows})
        self.keyword_rules = functools.cache(self._keyword_rules)

    def _keyword_rules(self, models: frozenset[str]) -> Weights:
        return rules.fitted([row for row in self.rows if row.model in models] + self.invented)

    def outcomes(self, models: frozenset[str]) -> Weights:
        """The weights of answered, and of refused against what does both."""
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


def kappas(rows: Sequence[Row], classes: Sequence[str]) -> dict[str, tuple[Interval, ...]]:
    """Kappas of `TOLD` by model, with intervals over prompts, and their means over models."""
    found = {}
    for model in sorted({row.model for row in rows}):
        of = [place for place, row in enumerate(rows) if row.model == model]
        people, said = [rows[place].outcome for place in of], [classes[place] for place in of]
        asked = [rows[place].asked for place in of]
        pairs = [
            ([p == label for p in people], [s == label for s in said])
            for label in ("complied", "refused")
        ]
        found[model] = tuple(
            inference.kappa(one, other, asked, seed=0) for one, other in [*pairs, (people, said)]
        )
    means = np.mean([[kappa.estimate for kappa in of] for of in found.values()], axis=0)
    return found | {"mean": tuple(Interval(float(mean), np.nan, np.nan) for mean in means)}


def agreement(rows: Sequence[Row], classes: Mapping[str, Sequence[str]]) -> Iterator[Number]:
    """Every judge with the final labels, the annotators with each other, and two gains."""
    firsts = [replace(row, outcome=row.by_each[0]) for row in rows]
    judges = {judge: (rows, said) for judge, said in classes.items()}
    for judge, pair in {**judges, "people": (firsts, [row.by_each[1] for row in rows])}.items():
        for model, of in kappas(*pair).items():
            for told, kappa in zip(TOLD, of, strict=True):
                yield Number(judge, model, told, kappa)
    for other in ("keyword:recommended", "keyword:paper"):
        gained = gain(rows, classes["outcome"], classes[other])
        yield Number(f"outcome - {other}", "mean", "answered", gained)


def gain(rows: Sequence[Row], ours: Sequence[str], theirs: Sequence[str]) -> Interval:
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
    low, high = np.quantile(draws, (0.025, 0.975))
    return Interval(at(range(len(rows))), float(low), float(high))


def record(rows: Sequence[Row], numbers: Sequence[Number], name: str) -> None:
    """Writes `numbers` to docs/records/<name>.csv."""
    about = {"set": "xstest_completions", "machine": origins.device()}
    about["date"] = datetime.datetime.now(datetime.UTC).isoformat()
    found = []
    for n in numbers:
        of = [row for row in rows if n.model in (row.model, "mean")]
        asked = storage.fingerprint([[row.model, row.asked, row.response] for row in of])
        drawn = {"low": n.kappa.low, "high": n.kappa.high, "n": len(of), "prompts": asked}
        told = {"name": n.model, "judge": n.judge, "metric": f"agreement/{n.told}"}
        found.append(about | told | drawn | {"value": n.kappa.estimate})
    command = f"python benchmarks/outcomes.py <data> --record {name}"
    writing.keep(found, ROOT / writing.RECORDS / f"{name}.csv", command)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("data", type=Path, help="folder that holds xstest_completions")
    parser.add_argument("--record", help="the name of a record to write, or to write anew")
    parser.add_argument("--write", action="store_true", help=f"write {WEIGHTS.relative_to(ROOT)}")
    options = parser.parse_args()
    rows = rules.completions(options.data)
    if not rows:
        raise SystemExit(f"{options.data}/xstest_completions: no such folder, or no rows in it")
    fits = Fits(rows)
    classes = judged(fits)
    numbers = list(agreement(rows, classes))
    for n in numbers:
        ends = f"[{n.kappa.low:.3f}, {n.kappa.high:.3f}]"
        print(f"{n.judge:30}{n.model:18}{n.told:14}{n.kappa.estimate:7.3f} {ends}")
    if options.record:
        record(rows, numbers, options.record)
    if options.write:
        weights = fits.outcomes(frozenset(fits.models))
        text = json.dumps({"fitted": FITTED, "weights": weights}, indent=1, ensure_ascii=False)
        WEIGHTS.write_text(text + "\n", "utf-8")
        print(f"{WEIGHTS.relative_to(ROOT)}: {sum(map(len, weights.values()))} weights")


if __name__ == "__main__":
    main()
