"""Evaluations as columns of tables: their names, their order and looks, and groups of seeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dcr import continuing, results
from dcr.core import storage
from dcr.ending import printable
from dcr.report.records import STAGES, Evaluation, RunRecord, flattened
from dcr.results.frame import CONTRASTS
from dcr.stages import last_stage, stages_behind

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
UNTRAINED = ("base", "endpoint")  # weights that no run of ours made
WEIGHTS = {  # trained or not, with their names in figures
    **{"base": METHODS["base"], "contrastive": "after stage one"},
    **{"sft": "after SFT", "readout": "after the readout"},
}
PLAN = "eval.plan"  # of looks; it changes no answer, so other settings tell columns apart first
NAMED_KEYS = 3  # settings that tell two columns apart, as many as a header holds
# keys that do not decide a run's weights, or that the label names anyway
UNTOLD = ("seed", "method", "preset_name", "tracking", "eval", "gen", "output")
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


Styles = Mapping[tuple[str, str], Style]  # by `Column.look`
NEUTRAL = Style(0, 0)


@dataclass(frozen=True)
class Column:
    """An evaluation of a run's weights; shown in a table, it has a label that no other has."""

    run: RunRecord
    evaluation: Evaluation
    label: tuple[str, ...] = ()
    style: Style = NEUTRAL

    @property
    def name(self) -> str:
        return " ".join(self.label)

    def about(self, key: str) -> str:
        """Its method, model, preset, seed or data, of its own or else of its run."""
        if key == "method" and self.evaluation.weights in UNTRAINED:
            return self.evaluation.weights
        if (value := getattr(self.evaluation, key)) is not None:
            return str(value)
        return self.run.about("preset_name" if key == "preset" else key)

    @property
    def method(self) -> str:
        """The method as the paper counts methods: a steered STL run has the steering's."""
        method, edit = self.about("method"), self.evaluation.steered_by
        return edit if method == "stl" and edit in METHODS else method

    @property
    def preset(self) -> str:
        """The preset where it is not the paper's, which goes without saying."""
        preset = self.about("preset")
        return "" if preset in ("", "-", "paper") else preset

    @property
    def stages(self) -> list[str]:
        """The stages that made the weights."""
        return stages_behind(self.run.config, self.evaluation.weights)

    def called(self, method: str) -> str:
        """A method by the stages that made these weights: `STL + readout`, `contrastive only`."""
        if self.evaluation.weights == "contrastive":
            return FIRST_STAGE_ONLY
        return METHODS.get(method, method) + (READOUT if "readout" in self.stages else "")

    @cached_property
    def binding(self) -> dict[str, Any]:
        """The settings of the run that decide its weights and are not named otherwise."""
        binding = continuing.binding(self.run.config)
        return {key: value for key, value in binding.items() if key not in UNTOLD}

    @cached_property
    def variant(self) -> str:
        """Names all that decides the weights, and every edit of answers, but not the seed."""
        named = [self.about(key) for key in ("method", "model", "preset", "data")]
        if named[0] in UNTRAINED:
            return storage.fingerprint(named[:2])
        return storage.fingerprint([named, results.edit(self.evaluation.settings), self.binding])

    @property
    def look(self) -> tuple[str, str]:
        """The key of its style."""
        return self.variant, self.about("seed")

    @property
    def leaves(self) -> dict[str, Any]:
        """Every setting that may tell two columns apart: `dcr.epochs`, `eval.limit`."""
        settings = self.evaluation.settings
        if self.evaluation.steered_by and isinstance(settings["steering"], Mapping):
            settings = settings | {"steering": results.steering(settings)}
        asked = {"data": self.about("data"), **settings}
        return flattened(self.binding) | flattened({"eval": asked})

    def words(self, with_model: bool) -> tuple[str, ...]:
        """Method, decoding, steering, a preset but the paper's, seed and, if asked, model."""
        method, model, seed = (self.about(key) for key in ("method", "model", "seed"))
        if method == "endpoint":
            return ("endpoint", model)
        settings, edit = self.evaluation.settings, self.evaluation.steered_by
        before, target, words = (settings.get(key) for key in ("gate", "calibrate", "prefill"))
        penalty, thinking = (settings.get(key) for key in ("repetition_penalty", "thinking"))
        parts = (
            METHODS[method] if method == "base" else self.called(method),
            "" if before is None else printable(f"behind {before['name']}"),
            "" if target is None else printable(f"calibrated to {target}"),
            "" if words is None else printable(f"prefilled {words!r}"),
            "" if thinking is None else printable(f"thinking {thinking}"),
            "" if penalty is None else printable(f"repetition penalty {penalty}"),
            *(f"{CONTRASTS[key]} {settings[key]:g}" for key in CONTRASTS if key in settings),
            "on validation prompts" if settings.get("validation") else "",
            f"+ {edit}" if edit and edit != method else "",
            self.preset if method != "base" else "",
            f"seed {seed}" if seed and method != "base" else "",
            model if with_model else "",
        )
        return tuple(filter(None, parts))

    @property
    def order(self) -> tuple[Any, ...]:
        """A key that sorts columns by model, method, preset, stage, settings and seed."""
        weights, method, preset = self.evaluation.weights, self.method, self.about("preset")
        seed = self.about("seed")

        def by_value(value: object) -> tuple[bool, float, str]:  # numbers by size, before others
            number = isinstance(value, (int, float))
            return not number, float(value) if number else 0.0, str(value)

        return (
            weights == "endpoint",
            self.about("model"),
            list(METHODS).index(method) if method in METHODS else len(METHODS),
            method,
            (preset != "paper", preset),
            STAGES.index(weights) if weights in STAGES else len(STAGES),
            # strengths in ascending order
            [(len(part), part) for part in self.evaluation.steering_values],
            [(key, by_value(value)) for key, value in sorted(flattened(self.binding).items())],
            (len(seed), seed),
            str(self.evaluation.folder),
        )


def evaluated(records: Iterable[RunRecord]) -> list[Column]:
    """Every evaluation of these runs."""
    return [Column(run, evaluation) for run in records for evaluation in run.evaluations]


def standing_for(run: RunRecord, weights: str = "") -> Column:
    """An empty evaluation of a run's weights, by default its last ones."""
    made = {"folder": run.folder, "weights": weights or last_stage(run.config)}
    return Column(run, Evaluation.model_validate(made))


def of_run(run: RunRecord) -> list[Column]:
    """A run's evaluations; where it has none, an empty one that stands for its weights."""
    return evaluated([run]) or [standing_for(run)]


# --- the columns of tables ----------------------------------------------------------------------


def columns_of(records: Sequence[RunRecord]) -> list[Column]:
    """The columns that tables show, in order, each with a name that no other has.

    Base and final weights are shown, and stage one if no later weights were evaluated; the base
    model once, however many folders hold the same evaluation of it.
    """
    shown, known = list[Column](), set[str]()
    for run in records:
        scored = [column for column in evaluated([run]) if column.evaluation.scored]
        final = {column.evaluation.weights for column in scored}
        for column in scored:
            e = column.evaluation
            earlier = e.weights == "contrastive" and final & {"sft", "readout", "snapshot"}
            if e.weights == "snapshot" or earlier:
                continue
            if e.weights == "base":
                overlaps = [e.contamination.get(name) for name in e.sets]
                identity = [column.about("model"), e.settings, e.sets, overlaps]
                if (identity := storage.fingerprint(identity)) in known:
                    continue
                known.add(identity)
            shown.append(column)
    shown.sort(key=lambda column: column.order)
    styles, labels = run_styles(records), _labels(shown)
    return [
        replace(column, label=label, style=styles[column.look])
        for column, label in zip(shown, labels, strict=True)
    ]


def _labels(columns: Sequence[Column]) -> list[tuple[str, ...]]:
    several_models = len({column.about("model") for column in columns}) > 1
    plain = [column.words(several_models) for column in columns]
    leaves = [column.leaves for column in columns]
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
    places = [column.evaluation.folder for column in columns]
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


def run_styles(records: Iterable[RunRecord]) -> Styles:
    """The style of every variant and seed: colours by variant, markers by seed, base neutral."""
    every = sorted((c for run in records for c in of_run(run)), key=lambda column: column.order)
    methods = {column.look: column.about("method") for column in every}
    variants = list(dict.fromkeys(key for (key, _), method in methods.items() if method != "base"))
    seeds = sorted({seed for _, seed in methods}, key=lambda seed: (len(seed), seed))
    return {
        (key, seed): NEUTRAL
        if method == "base"
        else Style(1 + variants.index(key), seeds.index(seed))
        for (key, seed), method in methods.items()
    }


def style_of(run: RunRecord, styles: Styles) -> Style:
    """The style of a run's trained weights; neutral for the base model."""
    columns = of_run(run)
    trained = [column for column in columns if column.evaluation.weights != "base"] or columns
    return styles[min(trained, key=lambda c: results.edit(c.evaluation.settings) != "").look]


# --- groups of seeds ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Columns that differ only by their seed; or their difference from others of the same seeds."""

    label: tuple[str, ...]
    places: tuple[int, ...]  # among the columns
    style: Style
    less: tuple[int, ...] = ()  # the columns subtracted, seed by seed


def shared_label(labels: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The words that labels of several seeds share, without seed and folder, and their number."""
    shared = (part for part in labels[0] if all(part in label for label in labels))
    return (*shared, f"{len(labels)} seeds")


def seed_groups(columns: Sequence[Column]) -> list[Group]:
    """Columns that differ by seed alone, two or more, and each such group's difference from STL."""
    places: dict[str, dict[str, int]] = {}
    for place, column in enumerate(columns):
        if column.about("method") not in UNTRAINED:
            e = column.evaluation
            key = storage.fingerprint([column.variant, e.weights, e.settings_without_seed])
            # a seed that was evaluated twice counts once
            places.setdefault(key, {}).setdefault(column.about("seed"), place)
    alike = [tuple(by_seed.values()) for by_seed in places.values() if len(by_seed) > 1]
    groups = [
        Group(shared_label([columns[place].label for place in of]), of, columns[of[0]].style)
        for of in alike
    ]
    edits = ("steering", "calibrate", "gate", *CONTRASTS)
    less = []
    for a in groups:
        one = columns[a.places[0]]
        settings = one.evaluation.settings_without_seed
        plain = {key: value for key, value in settings.items() if key not in edits}
        seeds = [columns[i].about("seed") for i in a.places]
        for b in groups:
            other = columns[b.places[0]]  # plain STL with the model, data, seeds and evaluation
            # two of plain STL differ one way alone: by what a readout adds
            more = one.method != "stl" or settings != plain or len(one.stages) > len(other.stages)
            if (
                more
                and other.method == "stl"
                and all(one.about(key) == other.about(key) for key in ("model", "data"))
                and seeds == [columns[i].about("seed") for i in b.places]
                and plain == other.evaluation.settings_without_seed
            ):
                label = (f"{a.label[0]} − {b.label[0]}", *a.label[1:], "paired, 95% of t")
                less.append(replace(a, label=label, less=b.places))
    return groups + less


# --- names in figures ---------------------------------------------------------------------------


def named(records: Sequence[RunRecord], weights: str = "") -> list[tuple[RunRecord, str]]:
    """Each run with a name that no other has: method, preset, seed, and, of several, the model.

    The stages that made `weights` name the method; by default these are the run's last weights.
    """
    several = len({run.about("model") for run in records} - {""}) > 1
    plain = [
        ", ".join(standing_for(run, weights).words(several))
        if run.about("method")
        else printable(run.folder.name)
        for run in records
    ]
    for distinct in (lambda folder: folder.name, str):
        plain = [
            f"{name} ({printable(distinct(run.folder))})" if plain.count(name) > 1 else name
            for name, run in zip(plain, records, strict=True)
        ]
    return list(zip(records, plain, strict=True))


def name_of_weights(run_name: str, column: Column) -> str:
    """The name of the evaluated weights: a run after a stage or step of SFT, or the base model.

    An edit of activations follows.
    """
    evaluation = column.evaluation
    edit = evaluation.steering_in_words
    if evaluation.weights == "base":
        return ", ".join(filter(None, (WEIGHTS["base"], column.about("model"), edit)))
    stage = WEIGHTS.get(evaluation.weights, evaluation.weights)
    stage = stage if evaluation.step is None else f"SFT step {evaluation.step}"
    return ", ".join(filter(None, (run_name, stage, edit)))
