"""Run folders read into records, and the columns of a report with their names and styles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dcr import keywords, results
from dcr.core import config, continuing, generation, runs, storage
from dcr.core.config import Kind, UserError
from dcr.core.evaluation.subjects import Opening
from dcr.core.generation import Completion
from dcr.core.runs import Run
from dcr.ending import printable
from dcr.results.frame import CONTRASTS, rows_of
from dcr.results.schema import Metrics

STAGES = tuple(stage.value for stage in config.STAGES)
METHODS = {  # left to right, with their names in tables
    "base": "base model",
    "stl": "STL",
    "stl_aug": "STL-aug",
    "surgical": "Surgical",
    "scans": "SCANS",
    "dcr": "DCR",
}
READOUT = " + readout"
FIRST_STAGE_ONLY = "contrastive only"
STEERED = ("surgical", "scans", "ablation", "probe")  # methods that an evaluation's settings name
UNTRAINED = ("base", "endpoint")  # weights that no run of ours made
PLAN = "eval.plan"  # of looks; it changes no answer, so other settings tell columns apart first
NAMED_KEYS = 3  # settings that tell two columns apart, as many as a header holds
# keys that do not decide a run's weights, or that the label names anyway
UNTOLD = ("seed", "method", "preset_name", "tracking", "eval", "gen", "output")


class Evaluation(Metrics):
    """One `metrics.json` with printable texts, and its folder."""

    folder: Path

    @property
    def scored(self) -> bool:
        """Whether it has anything for a table, beyond the paper's analyses."""
        ranked = self.discernment and self.discernment.pooled
        return any((self.sets, ranked, self.ability, self.quality, self.robustness))

    @property
    def empty(self) -> bool:
        analyses = self.refusal_probability, self.kernel, self.separability, self.claims
        return not self.scored and not any(analyses)

    def answers(self, name: str) -> list[Completion]:
        """The stored answers that it counts of a set. DataError for a damaged line."""
        stored = generation.stored(self.folder / f"{name}.jsonl")
        return [stored[each] for each in self.sets[name].ids or stored if each in stored]

    @cached_property
    def pivot(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        """Its rows of `results.load` by quantity, judge and the judge's model, one row a set."""
        table: dict[tuple[str, str, str], dict[str, Any]] = {}
        for row in rows_of(self):
            key = row["quantity"], row["judge"], row["judge_model"]
            table.setdefault(key, {})[row["set"]] = row
        return table


class TrackedStep(results.Tracked):
    """The measurements after so many steps of a stage; a quantity that was not measured is None."""

    folder: Path
    stage: str
    step: int


@dataclass(frozen=True)
class RunRecord:
    """Everything that a report reads of one run folder."""

    folder: Path
    config: dict[str, Any]
    rows: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[Evaluation]
    notes: list[str]  # skipped files, and why
    tracked: list[TrackedStep] = field(default_factory=list)  # by stage and step


def read_run(folder: Path) -> RunRecord:
    """Reads everything readable in a run folder, with a note on everything that is not.

    Raises DataError for a damaged file, UserError for a folder that is no run's.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name run folders")
    notes: list[str] = []
    run = Run(folder)
    evaluations = []
    for path in sorted(folder.glob("eval/*/metrics.json")):
        metrics = _printable(results.read(path).model_dump())
        evaluation = Evaluation.model_validate(metrics | {"folder": path.parent})
        if not evaluation.empty:
            evaluations.append(evaluation)
        elif evaluation.frontier:
            notes.append(f"{path}: not shown here; python -m dcr.frontier compares its answers")
        else:
            notes.append(f"{path}: skipped, nothing measured in it")
    logged, tracked = runs.read_metrics(run), read_tracked(run, notes)
    text = run.metrics_file.read_text("utf-8") if run.metrics_file.exists() else ""
    if torn := max(0, len(text.splitlines()) - 1 - len(logged)):  # less the header
        notes.append(f"{run.metrics_file}: {torn} torn line(s) skipped")
    if not (evaluations or any("dcr.frontier" in note for note in notes)):
        lack = f"{folder}: no evaluations there; run python eval.py run={folder}"
        if not (logged or tracked or run.config_file.exists()):
            raise UserError(lack)
        notes.append(lack)
    for place in sorted(folder.glob("eval/*/")):
        # a folder of plain answers may hold only the prompts that a calibration was chosen on
        begun = ("opening.json", "forks")
        calibrated = any((place / n).exists() for n in begun) and not any(place.glob("*.jsonl"))
        if not (calibrated or (place / "metrics.json").exists()):
            notes.append(f"{place}: skipped, no metrics.json; the evaluation did not finish")
    config: dict[str, Any] = {}
    if run.config_file.exists():
        run.config()  # checked there, but not in the file's order, in which the page shows it
        config = storage.read_yaml(run.config_file, dict[str, Any])
    trained = any((folder / stage).is_dir() for stage in STAGES)
    for path, needed in ((run.config_file, True), (run.rows_file, trained)):
        if needed and not path.exists():
            notes.append(f"{path}: missing")
    return RunRecord(folder, config, run.record(), logged, evaluations, notes, tracked)


def read_tracked(run: Run, notes: list[str]) -> list[TrackedStep]:
    """The steps by stage and number; unfinished ones are noted. DataError for a damaged file."""
    steps = []
    for stage in STAGES:
        for folder in sorted(run.tracked(stage).glob("step-*/")):
            if not (folder / "metrics.json").exists():
                notes.append(f"{folder}: skipped, no metrics.json; measuring did not finish")
                continue
            block = _printable(results.read_tracked(folder / "metrics.json").model_dump())
            step = int(folder.name.removeprefix("step-"))
            about = {"folder": folder, "stage": stage, "step": step}
            steps.append(TrackedStep.model_validate(block | about))
    return sorted(steps, key=lambda tracked: (STAGES.index(tracked.stage), tracked.step))


def _printable(value: Any) -> Any:
    if isinstance(value, str) and not isinstance(value, Kind):
        return printable(value)
    if isinstance(value, dict):
        return {_printable(key): _printable(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_printable, value))
    return value


def config_of(run: RunRecord, key: str) -> str:
    """method, seed, preset_name, or a node's label, from a run's configuration."""
    value = run.config.get(key, "")
    return printable(str(value.get("label", "") if isinstance(value, Mapping) else value))


def about(run: RunRecord, evaluation: Evaluation, key: str) -> str:
    """method, model, preset, seed or data, from the evaluation or else from the run's config."""
    if key == "method" and evaluation.weights in UNTRAINED:
        return evaluation.weights
    if (value := getattr(evaluation, key)) is not None:
        return str(value)
    return config_of(run, "preset_name" if key == "preset" else key)


def steering(evaluation: Evaluation) -> str:
    """The activation edit of an evaluation; empty without one."""
    node = evaluation.settings.get("steering")
    if isinstance(node, Mapping) and "sha256" in node:  # a user's own
        return str(node.get("method"))
    return next((name for name in STEERED if name in _edit(evaluation)), "")


def unedited(evaluation: Evaluation) -> bool:
    """Whether the evaluation is of plain weights, without steering or another decoding."""
    # validation prompts are other prompts, not another way to answer
    return not results.edit({**evaluation.settings, "validation": False})


def _edit(evaluation: Evaluation) -> list[str]:
    return [str(v) for v in flattened({"": evaluation.settings.get("steering")}).values()]


def method_of(run: RunRecord, evaluation: Evaluation) -> str:
    """The method as the paper counts methods: a steered STL run has the steering's."""
    method, edit = about(run, evaluation, "method"), steering(evaluation)
    return edit if method == "stl" and edit in METHODS else method


def called(run: RunRecord, method: str, weights: str) -> str:
    """A method by the stages that made these weights: `STL + readout`, `contrastive only`."""
    if weights == "contrastive":
        return FIRST_STAGE_ONLY
    read = "readout" in runs.stages(run.config, weights)
    return METHODS.get(method, method) + (READOUT if read else "")


def flattened(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"dcr": {"epochs": 3}}` as `{"dcr.epochs": 3}`."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# --- columns ------------------------------------------------------------------------------------


COLOURS, MARKERS = 6, 6  # of figures, beside the neutral colour


@dataclass(frozen=True)
class Style:
    """The look of a run in every figure, by its variant (0 is neutral) and its seed."""

    variant: int
    seed: int

    @property
    def colour(self) -> int:
        return self.variant and 1 + (self.variant - 1) % COLOURS

    @property
    def marker(self) -> int:
        # when colours repeat, the marker moves on, so that no two variants look alike
        return (self.seed + max(0, self.variant - 1) // COLOURS) % MARKERS


@dataclass(frozen=True)
class Column:
    """An evaluation of a run's weights, with its name in short lines."""

    run: RunRecord
    evaluation: Evaluation
    label: tuple[str, ...]
    style: Style

    @property
    def name(self) -> str:
        return " ".join(self.label)

    def about(self, key: str) -> str:
        """Its method, model, preset, seed or data; see `about`."""
        return about(self.run, self.evaluation, key)


def method_name(column: Column) -> str:
    """Its method as tables name it, steering included."""
    method = method_of(column.run, column.evaluation)
    return called(column.run, method, column.evaluation.weights)


@dataclass(frozen=True)
class Group:
    """Columns that differ only by their seed; or their difference from others of the same seeds."""

    label: tuple[str, ...]
    places: tuple[int, ...]  # among the columns
    style: Style
    less: tuple[int, ...] = ()  # the columns subtracted, seed by seed


Evaluated = tuple[RunRecord, Evaluation]


def columns_of(records: Sequence[RunRecord]) -> list[Column]:
    """The columns, in order, each with a name that no other has."""
    pairs, styles = _shown(records), run_styles(records)
    return [
        Column(*pair, label, styles[variant(*pair), about(*pair, "seed")])
        for pair, label in zip(pairs, _labels(pairs), strict=True)
    ]


def _shown(records: Sequence[RunRecord]) -> list[Evaluated]:
    """Selects base and final weights, and stage one if no later weights were evaluated.

    The base model is shown once, however many folders hold the same evaluation of it.
    """
    chosen, known = [], set()
    for run in records:
        scored = [evaluation for evaluation in run.evaluations if evaluation.scored]
        final = {evaluation.weights for evaluation in scored}
        for evaluation in scored:
            earlier = evaluation.weights == "contrastive" and final & {"sft", "readout", "snapshot"}
            if evaluation.weights == "snapshot" or earlier:
                continue
            if evaluation.weights == "base":
                identity = storage.fingerprint(
                    [
                        about(run, evaluation, "model"),
                        evaluation.settings,
                        evaluation.sets,
                        [evaluation.contamination.get(name) for name in evaluation.sets],
                    ]
                )
                if identity in known:
                    continue
                known.add(identity)
            chosen.append((run, evaluation))
    return sorted(chosen, key=lambda pair: _order(*pair))


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
        STAGES.index(evaluation.weights) if evaluation.weights in STAGES else len(STAGES),
        [(len(part), part) for part in _edit(evaluation)],  # strengths in ascending order
        [(key, _by_value(value)) for key, value in sorted(flattened(_binding(run)).items())],
        (len(seed), seed),
        str(evaluation.folder),
    )


def _by_value(value: object) -> tuple[bool, float, str]:
    """A sort key that puts numbers by size before other values."""
    number = isinstance(value, (int, float))
    return not number, float(value) if number else 0.0, str(value)


def variant(run: RunRecord, evaluation: Evaluation) -> str:
    """Names everything that decides the weights, and every edit of answers, but not the seed."""
    named = [about(run, evaluation, key) for key in ("method", "model", "preset", "data")]
    if named[0] in UNTRAINED:
        return storage.fingerprint(named[:2])
    return storage.fingerprint([named, results.edit(evaluation.settings), _binding(run)])


def _binding(run: RunRecord) -> dict[str, Any]:
    return {
        key: value for key, value in continuing.binding(run.config).items() if key not in UNTOLD
    }


def leaves_of(run: RunRecord, evaluation: Evaluation) -> dict[str, Any]:
    """Every setting that may tell two columns apart: `dcr.epochs`, `eval.limit`."""
    settings = evaluation.settings
    if steering(evaluation) and isinstance(settings["steering"], Mapping):
        settings = settings | {"steering": results.steering(settings)}
    asked = {"data": about(run, evaluation, "data"), **settings}
    return flattened(_binding(run)) | flattened({"eval": asked})


def settings_without_seed(evaluation: Evaluation) -> dict[str, Any]:
    return {key: value for key, value in evaluation.settings.items() if key != "seed"}


def run_styles(records: Sequence[RunRecord]) -> dict[tuple[str, str], Style]:
    """A style for every (variant, seed): colours by variant, markers by seed, base neutral."""
    everything = [(run, evaluation) for run in records for evaluation in evaluations_of(run)]
    methods = {
        (variant(*pair), about(*pair, "seed")): about(*pair, "method")
        for pair in sorted(everything, key=lambda pair: _order(*pair))
    }
    variants = list(dict.fromkeys(key for (key, _), method in methods.items() if method != "base"))
    seeds = sorted({seed for _, seed in methods}, key=lambda seed: (len(seed), seed))
    return {
        (key, seed): Style(0, 0)
        if method == "base"
        else Style(1 + variants.index(key), seeds.index(seed))
        for (key, seed), method in methods.items()
    }


def style_of(run: RunRecord, styles: Mapping[tuple[str, str], Style]) -> Style:
    """The style of a run's trained weights; neutral for the base model."""
    evaluations = evaluations_of(run)
    trained = [e for e in evaluations if e.weights != "base"] or evaluations
    first = min(trained, key=lambda evaluation: results.edit(evaluation.settings) != "")
    return styles[variant(run, first), about(run, first, "seed")]


def evaluations_of(run: RunRecord) -> list[Evaluation]:
    """A run's evaluations; where it has none, an empty one that stands for its weights."""
    return run.evaluations or [Evaluation(folder=run.folder, weights=runs.last_stage(run.config))]


def _labels(pairs: Sequence[Evaluated]) -> list[tuple[str, ...]]:
    several_models = len({about(*pair, "model") for pair in pairs}) > 1
    plain = [label_of(*pair, several_models) for pair in pairs]
    leaves = [leaves_of(*pair) for pair in pairs]
    labels = []
    for label, own in zip(plain, leaves, strict=True):
        alike = [of for of, named in zip(leaves, plain, strict=True) if named == label]
        # the settings in which one of several columns of one name differs
        keys = [
            key
            for key in sorted(set().union(*alike), key=lambda key: (key == PLAN, key))
            if len({str(leaf.get(key)) for leaf in alike}) > 1
        ]
        named = tuple(printable(f"{key}={told(own, key)}") for key in keys[:NAMED_KEYS])
        more = len(keys) - NAMED_KEYS
        labels.append((*label, *named, *([f"and {more} more"] if more > 0 else [])))
    places = [evaluation.folder for _, evaluation in pairs]
    for place_of in (lambda place: f"{place.parent.parent.name}/{place.name}", str):
        labels = [
            (*label, place_of(place)) if labels.count(label) > 1 else label
            for label, place in zip(labels, places, strict=True)
        ]
    return labels


def told(settings: Mapping[str, Any], key: str) -> str:
    """A flat setting's value in words; None is every row as a limit, and else what is not set."""
    if settings.get(key) is not None:
        return str(settings[key])
    return "all" if key.endswith("limit") and key in settings else "none"


def label_of(run: RunRecord, evaluation: Evaluation, with_model: bool) -> tuple[str, ...]:
    """Method, decoding, steering, a preset other than the paper's, seed and, if asked, model."""
    method, model, seed = (about(run, evaluation, key) for key in ("method", "model", "seed"))
    if method == "endpoint":
        return ("endpoint", model)
    settings, edit = evaluation.settings, steering(evaluation)
    before, target, words = (settings.get(key) for key in ("gate", "calibrate", "prefill"))
    penalty = settings.get("repetition_penalty")
    parts = (
        METHODS[method] if method == "base" else called(run, method, evaluation.weights),
        "" if before is None else printable(f"behind {before['name']}"),
        "" if target is None else printable(f"calibrated to {target}"),
        "" if words is None else printable(f"prefilled {words!r}"),
        "" if penalty is None else printable(f"repetition penalty {penalty}"),
        *(f"{CONTRASTS[key]} {settings[key]:g}" for key in CONTRASTS if key in settings),
        "on validation prompts" if settings.get("validation") else "",
        f"+ {edit}" if edit and edit != method else "",
        other_preset(about(run, evaluation, "preset")) if method != "base" else "",
        f"seed {seed}" if seed and method != "base" else "",
        model if with_model else "",
    )
    return tuple(filter(None, parts))


def other_preset(preset: str) -> str:
    """A preset where it is not the paper's, which goes without saying."""
    return "" if preset in ("", "-", "paper") else preset


def seed_groups(columns: Sequence[Column]) -> list[Group]:
    """Columns that differ only by seed, where there are two or more, and each such group's
    difference from that of STL.
    """
    places: dict[str, dict[str, int]] = {}
    for place, column in enumerate(columns):
        if column.about("method") not in UNTRAINED:
            weights, settings = column.evaluation.weights, settings_without_seed(column.evaluation)
            key = [variant(column.run, column.evaluation), weights, settings]
            # a seed that was evaluated twice counts once
            places.setdefault(storage.fingerprint(key), {}).setdefault(column.about("seed"), place)
    groups = []
    for by_seed in places.values():
        alike = tuple(by_seed.values())
        first = columns[alike[0]]
        # neither a seed nor the folder of one evaluation
        kept = (part for part in first.label if all(part in columns[i].label for i in alike))
        if len(alike) > 1:
            groups.append(Group((*kept, f"{len(alike)} seeds"), alike, first.style))
    edits = ("steering", "calibrate", "gate", *CONTRASTS)
    less = []
    for a in groups:
        one = columns[a.places[0]]
        settings = settings_without_seed(one.evaluation)
        plain = {key: value for key, value in settings.items() if key not in edits}
        seeds = [columns[i].about("seed") for i in a.places]
        for b in groups:
            other = columns[b.places[0]]  # plain STL with the model, data, seeds and evaluation
            if (
                a is not b
                and method_of(other.run, other.evaluation) == "stl"
                and all(one.about(key) == other.about(key) for key in ("model", "data"))
                and seeds == [columns[i].about("seed") for i in b.places]
                and plain == settings_without_seed(other.evaluation)
            ):
                label = (f"{a.label[0]} − {b.label[0]}", *a.label[1:], "paired, 95% of t")
                less.append(replace(a, label=label, less=b.places))
    return groups + less


# --- answers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """A stored answer, printable, with its keyword verdicts."""

    id: str
    prompt: str
    response: str
    ended: bool
    refusal_mass: float | None
    outcome: dict[str, str]  # by keyword rules: refused, partial, complied or empty

    @property
    def verdict(self) -> str:
        """The outcome by the paper's rules."""
        return self.outcome["paper"]


class Completions:
    """Reads and judges each file of completions once; faults go to `notes`."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes
        self.read: dict[Path, list[Answer]] = {}

    def __call__(self, column: Column, name: str) -> list[Answer]:
        """A column's answers to a set. DataError for a damaged line."""
        path = column.evaluation.folder / f"{name}.jsonl"
        if path not in self.read:
            self.read[path] = self._judged(path, column.evaluation, name)
        return self.read[path]

    def _judged(self, path: Path, evaluation: Evaluation, name: str) -> list[Answer]:
        if not path.is_file():
            self.notes.append(f"{path}: missing; no completions of it are shown or compared")
            return []
        counts = evaluation.sets[name]
        answers = [
            Answer(
                answer.id, printable(answer.prompt), printable(answer.response), answer.ended,
                answer.refusal_mass,
                {rules: keywords.outcome(answer.response, rules) for rules in counts.refused},
            )
            for answer in evaluation.answers(name)
        ]  # fmt: skip
        refused = sum(answer.verdict == "refused" for answer in answers)
        counted = counts.refused.get("paper", 0)
        if (len(answers), refused) != (counts.n, counted):
            judged = f"{refused} of {len(answers)} refused"
            self.notes.append(f"{path}: {judged}, metrics.json says {counted} of {counts.n}")
        return answers

    def masses(self, column: Column, name: str, ids: Sequence[str] | None) -> list[float] | None:
        """The refusal masses of a set's prompts, from `openings` or else from their answers.

        None if one is unknown.
        """
        openings = column.evaluation.folder / "openings" / f"{name}.jsonl"
        if openings.is_file():
            by_id = {row.id: row.mass for row in storage.read_lines(openings, Opening)}
            masses = [by_id.get(identity) for identity in ids or by_id]
        elif name in column.evaluation.sets:
            masses = [answer.refusal_mass for answer in self(column, name)]
        else:
            return None
        known = [mass for mass in masses if mass is not None]
        return known if len(known) == len(masses) else None
