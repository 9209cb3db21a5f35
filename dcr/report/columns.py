"""The columns of a report, their names and styles, and the answers behind them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcr import generation, refusal, runs, storage
from dcr.evaluation.discernment import Opening
from dcr.report.records import RULES, Evaluation, RunRecord
from dcr.text import printable

METHODS = {  # left to right, and what a table calls them
    "base": "base model",
    "stl": "STL",
    "stl_aug": "STL-aug",
    "surgical": "Surgical",
    "scans": "SCANS",
    "dcr": "DCR",
}
STEERED = ("surgical", "scans", "ablation")  # may also stand in an evaluation's settings
UNTRAINED = ("base", "endpoint")  # weights that no run of ours made
NAMED_KEYS = 3  # settings that tell two columns apart, as many as a header holds
# What does not decide a run's weights, or stands in the label by itself.
UNTOLD = ("seed", "method", "preset_name", "tracking", "eval", "gen", "output")


@dataclass(frozen=True)
class Style:
    """Which colour (0 is neutral) and which marker a run has in every figure."""

    colour: int
    marker: int


@dataclass(frozen=True)
class Entry:
    """One column: an evaluation of a run's weights, with its name in short lines."""

    run: RunRecord
    evaluation: Evaluation
    label: tuple[str, ...]
    style: Style

    @property
    def name(self) -> str:
        return " ".join(self.label)


@dataclass(frozen=True)
class Group:
    """Entries that differ by nothing but their seed."""

    label: tuple[str, ...]
    places: tuple[int, ...]  # among the entries
    style: Style


def about(run: RunRecord, evaluation: Evaluation, key: str) -> str:
    """method, model, preset, seed or data, from the evaluation or else from the run's config."""
    if key == "method" and evaluation.weights in UNTRAINED:
        return evaluation.weights
    if key in evaluation.about:
        return evaluation.about[key]
    node = {"preset": "preset_name", "model": "model", "data": "data"}.get(key, key)
    value = run.config.get(node, "")
    return printable(str(value.get("label", "") if isinstance(value, Mapping) else value))


def shown(records: Sequence[RunRecord]) -> list[tuple[RunRecord, Evaluation]]:
    """What the table holds: base and final weights; stage one where there is nothing after it.

    The base model is shown once, however many folders hold the same evaluation of it.
    """
    chosen, seen = [], set()
    for run in records:
        scored = [evaluation for evaluation in run.evaluations if evaluation.scored]
        final = {evaluation.weights for evaluation in scored}
        for evaluation in scored:
            stage_one = evaluation.weights == "contrastive" and not final & {"sft", "snapshot"}
            if evaluation.weights not in ("base", "sft", "endpoint") and not stage_one:
                continue
            if evaluation.weights == "base":
                identity = storage.fingerprint(
                    [about(run, evaluation, "model"), evaluation.settings, evaluation.sets]
                )
                if identity in seen:
                    continue
                seen.add(identity)
            chosen.append((run, evaluation))
    return sorted(chosen, key=lambda pair: _order(*pair))


def steering(evaluation: Evaluation) -> str:
    """The activation edit that an evaluation was made under; empty where there was none."""
    told = _edit(evaluation)
    return next((name for name in STEERED if name in told), "")


def _edit(evaluation: Evaluation) -> list[str]:
    return [str(v) for v in flattened({"": evaluation.settings.get("steering")}).values()]


def method_of(run: RunRecord, evaluation: Evaluation) -> str:
    """The method as the paper counts them, in which steering an STL run is one of its own."""
    method, edit = about(run, evaluation, "method"), steering(evaluation)
    return edit if method == "stl" and edit in METHODS else method


def _order(run: RunRecord, evaluation: Evaluation) -> tuple[Any, ...]:
    method = method_of(run, evaluation)
    rank = list(METHODS).index(method) if method in METHODS else len(METHODS)
    preset, seed = about(run, evaluation, "preset"), about(run, evaluation, "seed")
    return (
        evaluation.weights == "endpoint",
        about(run, evaluation, "model"),
        rank,
        method,
        (preset != "paper", preset),
        [(len(part), part) for part in _edit(evaluation)],  # strengths in ascending order
        variant(run, evaluation),
        (len(seed), seed),
        str(evaluation.folder),
    )


def variant(run: RunRecord, evaluation: Evaluation) -> str:
    """Names everything that decides the weights, and an edit of activations, but not the seed."""
    told = [about(run, evaluation, key) for key in ("method", "model", "preset", "data")]
    if told[0] in UNTRAINED:
        return storage.fingerprint(told[:2])
    if steering(evaluation):
        told.append(storage.fingerprint(evaluation.settings["steering"]))
    config = {k: v for k, v in runs.binding(run.config).items() if k not in UNTOLD}
    return storage.fingerprint([told, config])


def settings_without_seed(evaluation: Evaluation) -> dict[str, Any]:
    return {key: value for key, value in evaluation.settings.items() if key != "seed"}


def entries(records: Sequence[RunRecord]) -> list[Entry]:
    """The columns, in order, each with a name that no other has."""
    pairs = shown(records)
    styles = run_styles(records)
    labels = _labels(pairs)
    return [
        Entry(
            run, evaluation, label, styles[variant(run, evaluation), about(run, evaluation, "seed")]
        )
        for (run, evaluation), label in zip(pairs, labels, strict=True)
    ]


def run_styles(records: Sequence[RunRecord]) -> dict[tuple[str, str], Style]:
    """A style for every (variant, seed): colours by variant, markers by seed, base neutral."""
    everything = sorted(
        ((run, evaluation) for run in records for evaluation in evaluations_of(run)),
        key=lambda pair: _order(*pair),
    )
    found = {
        (variant(run, evaluation), about(run, evaluation, "seed")): about(run, evaluation, "method")
        for run, evaluation in everything
    }
    variants = list(dict.fromkeys(key for (key, _), method in found.items() if method != "base"))
    seeds = sorted({seed for _, seed in found}, key=lambda seed: (len(seed), seed))
    return {
        (key, seed): Style(0, 0)
        if method == "base"
        else Style(1 + variants.index(key), seeds.index(seed))
        for (key, seed), method in found.items()
    }


def evaluations_of(run: RunRecord) -> list[Evaluation]:
    """A run's evaluations; where it has none, an empty one that stands for its weights."""
    return run.evaluations or [Evaluation(run.folder, "sft")]


def _labels(pairs: Sequence[tuple[RunRecord, Evaluation]]) -> list[tuple[str, ...]]:
    several_models = len({about(run, evaluation, "model") for run, evaluation in pairs}) > 1
    plain = [_label(run, evaluation, several_models) for run, evaluation in pairs]
    labels = []
    for place, label in enumerate(plain):
        alike = [pairs[other] for other in range(len(plain)) if plain[other] == label]
        if len(alike) > 1:
            label += _distinction(pairs[place], alike)
        labels.append(label)
    return [
        (*label, f"{run.folder.name}/{evaluation.folder.name}")
        if labels.count(label) > 1
        else label
        for label, (run, evaluation) in zip(labels, pairs, strict=True)
    ]


def _label(run: RunRecord, evaluation: Evaluation, with_model: bool) -> tuple[str, ...]:
    method, preset = about(run, evaluation, "method"), about(run, evaluation, "preset")
    model = (about(run, evaluation, "model"),)
    if method == "endpoint":
        return ("endpoint", *model)
    model = model if with_model else ()
    if method == "base":
        return (METHODS[method], *model)
    label = (METHODS.get(method, method),)
    if (edit := steering(evaluation)) and edit != method:
        label += (f"+ {edit}",)
    if preset not in ("", "-", "paper"):
        label += (preset,)
    if evaluation.weights == "contrastive":
        label += ("stage one only",)
    seed = about(run, evaluation, "seed")
    return label + ((f"seed {seed}",) if seed else ()) + model


def _distinction(
    own: tuple[RunRecord, Evaluation], alike: Sequence[tuple[RunRecord, Evaluation]]
) -> tuple[str, ...]:
    """`key=value` for the settings in which one of several columns of one name differs."""
    leaves = [_leaves(*pair) for pair in alike]
    mine = _leaves(*own)
    keys = [
        key
        for key in sorted(set().union(*leaves))
        if len({str(leaf.get(key)) for leaf in leaves}) > 1
    ]
    told = tuple(printable(f"{key}={mine.get(key)}") for key in keys[:NAMED_KEYS])
    more = len(keys) - NAMED_KEYS
    return (*told, f"and {more} more") if more > 0 else told


def _leaves(run: RunRecord, evaluation: Evaluation) -> dict[str, Any]:
    config = {k: v for k, v in runs.binding(run.config).items() if k not in UNTOLD}
    return flattened(config) | flattened({"eval": evaluation.settings})


def flattened(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"dcr": {"epochs": 3}}` as `{"dcr.epochs": 3}`."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def seed_groups(columns: Sequence[Entry]) -> list[Group]:
    """Columns that differ only by seed, where there are two or more."""
    found: dict[str, list[int]] = {}
    for place, entry in enumerate(columns):
        if about(entry.run, entry.evaluation, "method") in UNTRAINED:
            continue
        key = storage.fingerprint(
            [
                variant(entry.run, entry.evaluation),
                entry.evaluation.weights,
                settings_without_seed(entry.evaluation),
            ]
        )
        found.setdefault(key, []).append(place)
    return [_group(columns, places) for places in found.values() if len(places) > 1]


def _group(columns: Sequence[Entry], places: list[int]) -> Group:
    first = columns[places[0]]
    kept = tuple(part for part in first.label if not part.startswith("seed "))
    seeds = {about(columns[place].run, columns[place].evaluation, "seed") for place in places}
    return Group((*kept, f"{len(seeds)} seeds"), tuple(places), first.style)


@dataclass(frozen=True)
class Answer:
    """A stored answer, printable, with its keyword verdicts."""

    id: str
    prompt: str
    response: str
    ended: bool
    refusal_mass: float | None
    outcome: dict[str, str]  # by keyword rules: refused, partial or complied


class Completions:
    """Reads and judges each file of completions once; what is wrong goes to `notes`."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes
        self.read: dict[tuple[Path, str], list[Answer]] = {}

    def __call__(self, entry: Entry, name: str) -> list[Answer]:
        key = entry.evaluation.folder, name
        if key not in self.read:
            self.read[key] = read_completions(entry.evaluation, name, self.notes)
        return self.read[key]

    def masses(self, entry: Entry, name: str, ids: Sequence[str] | None) -> list[float] | None:
        """The refusal masses of prompts of a set, read alone or as they were answered.

        None where one is not known.
        """
        openings = entry.evaluation.folder / "openings" / f"{name}.jsonl"
        if openings.is_file():
            held = {row.id: row.mass for row in storage.read_lines(openings, Opening)}
            found = [held.get(identity) for identity in ids or held]
        elif name in entry.evaluation.sets:
            found = [answer.refusal_mass for answer in self(entry, name)]
        else:
            return None
        known = [mass for mass in found if mass is not None]
        return known if len(known) == len(found) else None


def read_completions(evaluation: Evaluation, name: str, notes: list[str]) -> list[Answer]:
    """The stored completions of a set, judged anew; what is missing or disagrees goes to `notes`.

    DataError for a damaged line.
    """
    path = evaluation.folder / f"{name}.jsonl"
    if not path.is_file():
        notes.append(f"{path}: missing; no completions of it are shown or compared")
        return []
    score, stored = evaluation.sets[name], generation.stored(path)
    answers = [
        Answer(
            found.id, printable(found.prompt), printable(found.response), found.ended,
            found.refusal_mass, {rules: refusal.outcome(found.response, rules) for rules in RULES},
        )
        for identity in score.ids or stored
        if (found := stored.get(identity))
    ]  # fmt: skip
    refused = sum(answer.outcome["paper"] == "refused" for answer in answers)
    counted = score.refused.get("paper", 0)
    if (len(answers), refused) != (score.n, counted):
        told = f"{refused} of {len(answers)} refused, metrics.json says {counted} of {score.n}"
        notes.append(f"{path}: {told}")
    return answers
