"""The arms of a plan, found among runs and compared: all numbers as one record, and its tables."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from dcr import entry, inference, results
from dcr.core import storage
from dcr.core.config import DataError, Kind
from dcr.core.evaluation import APART
from dcr.core.refusal.keywords import is_refusal
from dcr.core.runs import Run
from dcr.core.statistics import Interval
from dcr.frontier import Rule, arms
from dcr.frontier.answers import PLACE, Pair
from dcr.frontier.arms import Comparison, Model, Prompts
from dcr.looks import counting
from dcr.looks.counting import Plan
from dcr.outcomes import Outcome, outcome
from dcr.record import origins

CURE = "evaluate it with tasks=[frontier], docs/evidence.md"
STEERING = "steering="  # the word of an arm that tells its evaluation from others of the same run


def _partial(prompt: str, answer: str, ended: bool) -> str:
    found = outcome(prompt, answer, ended)
    return Outcome.refused if found is Outcome.partly_refused else found


def _keyword(prompt: str, answer: str, ended: bool) -> str:
    return Outcome.refused if is_refusal(answer) else Outcome.answered


VERDICTS: dict[Rule, arms.Verdict] = {
    Rule.outcome: outcome,
    Rule.partial: _partial,
    Rule.keyword: _keyword,
}


@dataclass(frozen=True)
class Measured:
    """The evaluation of a run: its answers by set, their kinds, and the calibrated bias."""

    folder: Path
    given: dict[str, list[Pair]]
    kinds: dict[str, Kind]
    bias: float | None


def plan_of(file: Path) -> Plan:
    """A plan. Raises DataError where a key is missing or wrong."""
    return storage.read_yaml(file, Plan, counting.CURE)


def record(
    plan: Plan,
    given: Sequence[str],
    label: str,
    safety: float,
    seed: int,
    rule: Rule = Rule.outcome,
) -> dict[str, Any]:
    """All numbers of a plan's comparison, as plain JSON.

    `given` are run folders, or folders of them, that were evaluated on data of a label; `seed` is
    of the bootstrap, and `rule` says what refuses. Raises DataError where a run or an evaluation is
    lacking, or two fit.
    """
    there = _by_arm(plan, [Run(folder) for word in given for folder in _folders(Path(word))])
    found = {
        (arm, number): measured(run, label, steering_of(plan.arms[arm]))
        for (arm, number), run in there.items()
    }
    first = next(iter(found.values()))
    asked = arms.prompts_of(first.given, first.kinds)
    verdict = VERDICTS[rule]
    models = {key: arms.model_of(of.given, asked, verdict, of.bias) for key, of in found.items()}
    numbers: dict[str, Any] = {"verdict": rule.value}
    numbers |= _numbers(plan, models, asked, safety, seed)
    for row in numbers["rows"]:
        row["origin"] = asdict(origins.of(found[row["arm"], row["seed"]].folder))
    return numbers


def write(file: Path, numbers: dict[str, Any]) -> None:
    """Write the record."""
    storage.write_json(file, numbers)


def _folders(place: Path) -> list[Path]:
    if (place / "config.yaml").is_file():
        return [place]
    return sorted(file.parent for file in place.glob("*/config.yaml"))


def _by_arm(plan: Plan, found: list[Run]) -> dict[tuple[str, int], Run]:
    """The run of each arm and seed. DataError where one is lacking, or two are."""
    there: dict[tuple[str, int], Run] = {}
    for run in found:
        made_with = run.config()
        for arm, words in plan.arms.items():
            if made_with.get("seed") in plan.seeds and is_made_with(made_with, words):
                key = arm, made_with["seed"]
                if key in there:
                    raise DataError(
                        f"{run.folder}: arm {arm!r}, seed {key[1]}: {there[key].folder} is that as "
                        "well; leave one out"
                    )
                there[key] = run
    for arm in plan.arms:
        for seed in plan.seeds:
            if (arm, seed) not in there:
                raise DataError(f"plan: arm {arm!r}: no run of seed {seed} is among those given")
    return {(arm, seed): there[arm, seed] for arm in plan.arms for seed in plan.seeds}


def is_made_with(made_with: dict[str, Any], words: str) -> bool:
    """Whether a run was made with all settings of an arm, written as on the command line."""
    for word in words.split():
        if word.startswith(STEERING):
            continue
        setting, node = _setting(word), made_with
        for name in setting.key_or_group.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        if node != setting.value():
            return False
    return True


def _setting(word: str) -> Override:
    """A setting in Hydra's grammar, by which 1e-3 is a number. DataError for what is none."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        raise DataError(f"plan: arm's setting {word!r}: write it as for train.py") from error


def steering_of(words: str) -> str | None:
    """The steering under which an arm answers, from its settings; None for none."""
    named = [word.removeprefix(STEERING) for word in words.split() if word.startswith(STEERING)]
    return named[-1] if named else None


def measured(run: Run, label: str, steering: str | None = None) -> Measured:
    """The one evaluation of a run on data of a label, under a steering or under none.

    Raises DataError where there is none, or several.
    """
    found: list[Measured] = []
    for file in sorted((run.folder / "eval").glob("*/metrics.json")):
        metrics = results.read(file)
        under = results.steering(metrics.settings).get("method")
        if metrics.data == label and metrics.frontier is not None and under == steering:
            counted = {
                name: of
                for name, of in metrics.frontier["plain"]["sets"].items()
                if name not in APART
            }
            given = {
                name: storage.read_lines(file.parent / PLACE / f"{name}.jsonl", Pair)
                for name in counted
            }
            kinds = {name: Kind(of["kind"]) for name, of in counted.items()}
            bias = metrics.calibration.bias if metrics.calibration else None
            found.append(Measured(file.parent, given, kinds, bias))
    if len(found) != 1:
        edited = f" {STEERING}{steering}" if steering else ""
        raise DataError(f"{run.folder}: {len(found)} evaluations on data={label}{edited}; {CURE}")
    return found[0]


def _numbers(
    plan: Plan,
    models: dict[tuple[str, int], Model],
    asked: Prompts,
    safety: float,
    seed: int,
) -> dict[str, Any]:
    weights = asked.weights(seed)
    plain = weights[0]
    pooled = {key: arms.answered_at(of, asked, weights, safety) for key, of in models.items()}
    benign = sorted({n for n, toxic in zip(asked.sets, asked.toxic, strict=True) if not toxic})
    rows = []
    for (arm, number), model in models.items():
        achieved = None if model.bias is None else arms.under(model, asked, plain, model.bias)
        own = arms.under(model, asked, plain, 0.0)
        rows.append(
            {
                "arm": arm,
                "seed": number,
                "auroc": arms.auroc(model, asked),
                "answered": float(pooled[arm, number][0]),
                "most": arms.most_refused(model, asked, plain),
                "by_set": {
                    name: float(arms.answered_at(model, asked, weights[:1], safety, among=name)[0])
                    for name in benign
                },
                "plain": own,
                "bias": model.bias,
                "calibrated": achieved,
                "outcomes": None if model.bias is None else arms.shares(model, asked, model.bias),
            }
        )
    named = [plan.primary, *plan.others]
    comparisons = [_comparison(name, plan, pooled) for name in named]
    adjusted = inference.holm([each.p for each in comparisons[1:]])
    return {
        "question": plan.question,
        "safety": safety,
        "prompts": {name: asked.sets.count(name) for name in dict.fromkeys(asked.sets)},
        "rows": rows,
        "comparisons": [
            {**asdict(each), "p_holm": p}
            for each, p in zip(comparisons, [comparisons[0].p, *adjusted], strict=True)
        ],
    }


def _comparison(name: str, plan: Plan, pooled: dict[tuple[str, int], Any]) -> Comparison:
    one, _, other = (word.strip() for word in name.partition(" - "))
    for arm in (one, other):
        if arm not in plan.arms:
            raise DataError(f"plan: {name!r}: {arm!r} is no arm; write <arm> - <arm>")
    return arms.compared(
        name,
        [pooled[one, seed] for seed in plan.seeds],
        [pooled[other, seed] for seed in plan.seeds],
    )


def tables(record: dict[str, Any]) -> list[Any]:
    """The record as tables: arms and seeds, the same by set, and differences of arms."""
    safety = record["safety"]
    sets = sorted(record["rows"][0]["by_set"])
    heads = ["arm", "seed", "AUROC", f"answered at {safety:g}", "most refused", "bias", "refused"]
    table = entry.table(
        f"Generated answers by {record['verdict']}, every set weighing the same",
        [*heads, "answered"],
    )
    words = [name.replace("_", " ") for name in sets]  # which wrap where a name cannot
    by_set = entry.table(f"Answered at {safety:g}, by set", ["arm", "seed", *words])
    for row in record["rows"]:
        of = row["arm"], str(row["seed"])
        calibrated = row["calibrated"] or (math.nan,) * 2
        table.add_row(
            *of,
            *(_told(row[key]) for key in ("auroc", "answered", "most")),
            _told(math.nan if row["bias"] is None else row["bias"]),
            *map(_told, calibrated),
        )
        by_set.add_row(*of, *(_told(row["by_set"][name]) for name in sets))
    heads = ["difference", "by seed", "mean, over seeds", "over prompts", "p"]
    differences = entry.table(
        f"Answered at {safety:g}: differences of arms, same prompts", heads, 2
    )
    for each in record["comparisons"]:
        differences.add_row(
            each["arms"],
            " ".join(_told(value, "+.2f") for value in each["by_seed"]),
            _shown(Interval(**each["over_seeds"])),
            _shown(Interval(**each["over_prompts"])),
            f"{each['p_holm']:.3g}",
        )
    return [table, by_set, differences]


def _shown(of: Interval) -> str:
    if not math.isfinite(of.low):  # of a single seed, or of an arm that never refuses as many
        return _told(of.estimate, "+.3f")
    return f"{of.estimate:+.3f} [{of.low:+.3f}, {of.high:+.3f}]"


def _told(value: float, how: str = ".2f") -> str:
    """A number; a dash where no bias makes a model refuse as many as are asked for."""
    return "–" if math.isnan(value) else format(value, how)
