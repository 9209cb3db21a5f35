"""What run folders say: evaluations, training curves, tracking, rows used."""

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dcr import runs, storage
from dcr.config import DataError, Kind, UserError
from dcr.runs import Run
from dcr.statistics import Interval
from dcr.text import printable


def reason(error: Exception) -> str:
    """An exception in one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)
Part = TypeVar("Part")


def damaged(
    path: Path | str, error: Exception, cure: str = "delete it, or evaluate again"
) -> DataError:
    """What a file that cannot be read ends in."""
    return DataError(f"{printable(str(path))}: damaged ({reason(error)}); {cure}")


def only(
    path: Path, key: str, raw: Mapping[str, Any], parse: Callable[[Mapping[str, Any]], Part]
) -> Part | None:
    """What stands under an optional key of its own."""
    return parts(path, key, {key: {"": raw.get(key)}}, parse).get("")


def parts(
    path: Path,
    key: str,
    raw: Mapping[str, Any],
    parse: Callable[[Mapping[str, Any]], Part],
    prefix: str = "",
) -> dict[str, Part]:
    """What stands under an optional key, by name. DataError, naming the part that is damaged."""
    found = raw.get(key) or {}
    read: dict[str, Part] = {}
    for name, part in found.items():
        if part is None:
            continue
        try:
            read[printable(str(name))] = parse(part)
        except UNREADABLE as error:
            place = f"{path}: {prefix}{key}.{name}".removesuffix(".")
            raise damaged(place, error) from error
    return read


RULES = ("paper", "recommended")
COMPLIANCE, SAFETY = ("complied", "partial", "refused"), ("safe", "unsafe")
FAULTS = {  # by their keys: as a table calls them
    "empty": "empty",
    "truncated": "cut off at the limit",
    "repetitive": "repetitive",
    "non_english": "not English",
    "unanswered": "unanswered",
}


@dataclass(frozen=True)
class Judged:
    """One judge's verdicts on a set. `counts` holds the labels this judge gives, no others."""

    model: str
    counts: dict[str, int]
    invalid: int  # answered, but no verdict
    error: int  # nothing came back: outside of every rate

    @property
    def labelled(self) -> int:
        """Responses with a compliance label."""
        return sum(self.counts.get(label, 0) for label in COMPLIANCE)


@dataclass(frozen=True)
class Overlap:
    """How many prompts of a set stand, in which way, among the rows trained on."""

    n: int
    exact: int
    near: int
    ngram: int
    by_source: dict[str, int]

    @property
    def text(self) -> str:
        return f"{self.exact} / {self.near} / {self.ngram} of {self.n}"

    @property
    def aside(self) -> str:
        """For the score it touches."""
        return f"{self.exact} / {self.near} / {self.ngram} in training"

    def __bool__(self) -> bool:
        return bool(self.exact or self.near or self.ngram)


@dataclass(frozen=True)
class SetScore:
    """How one set of prompts was answered; `refused` counts by keyword rules."""

    name: str
    kind: Kind
    n: int
    refused: dict[str, int]
    in_distribution: bool = False
    unseen_n: int = 0
    unseen_refused: dict[str, int] = field(default_factory=dict)
    partial: dict[str, int] = field(default_factory=dict)  # empty where an older file has none
    unseen_partial: dict[str, int] = field(default_factory=dict)
    seen_by_steering: int = 0  # prompts that the vectors of the evaluation's steering came from
    faults: dict[str, int] = field(default_factory=dict)
    ids: tuple[str, ...] | None = None  # of its prompts, where the store may hold others too
    judged: dict[str, Judged] = field(default_factory=dict)
    overlap: Overlap | None = None

    @property
    def contaminated(self) -> bool:
        """Whether training or steering saw some of its prompts, without its being trained on."""
        return bool(self.overlap or self.seen_by_steering) and not self.in_distribution

    @property
    def aside(self) -> str:
        """What was seen, for the score that it touches."""
        told = [self.overlap.aside] if self.overlap else []
        if self.seen_by_steering:
            told.append(f"{self.seen_by_steering} of {self.n} seen by steering")
        return "; ".join(told)


@dataclass(frozen=True)
class Agreement:
    """Two judges on the same responses; rows of the confusion are the first one's labels."""

    judges: tuple[str, str]
    kind: str
    n: int
    kappa: float | None
    labels: tuple[str, str]
    confusion: tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Usage:
    """What a judge has cost; no price, no `usd`."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None


@dataclass(frozen=True)
class Ability:
    """A task of the lm-evaluation-harness: by metric the accuracy and its standard error."""

    accuracies: dict[str, tuple[float, float]]
    n: int
    version: str
    shots: int
    limit: int | None


@dataclass(frozen=True)
class Quality:
    """Win rates in percent over the reference's answers, ties counting half."""

    win_rate: float
    standard_error: float
    length_controlled: float | None
    discrete: float | None
    n: int
    invalid: int
    error: int
    annotator: str
    reference: str
    mean_length: float | None
    reference_length: float | None
    usage: Usage | None = None  # of the annotator


def set_score(raw: Mapping[str, Any]) -> SetScore:
    """One entry of `sets`, without its name; of `judged`, see `judged`."""
    unseen = raw.get("unseen") or {"n": 0, "refused": {}}
    n, refused, partial = _refusals(raw)
    unseen_n, unseen_refused, unseen_partial = _refusals(unseen)
    return SetScore(
        name="",
        kind=Kind(raw["kind"]),
        n=n,
        refused=refused,
        partial=partial,
        in_distribution=bool(raw.get("in_distribution")),
        unseen_n=unseen_n,
        unseen_refused=unseen_refused,
        unseen_partial=unseen_partial,
        faults={key: _count(raw, key) for key in FAULTS if raw.get(key) is not None},
        ids=None if raw.get("ids") is None else tuple(map(str, raw["ids"])),
        seen_by_steering=int(raw.get("seen_by_steering") or 0),
    )


def _refusals(raw: Mapping[str, Any]) -> tuple[int, dict[str, int], dict[str, int]]:
    """Prompts, and of them those refused and those refused in part, by keyword rules."""
    n, partial = _count(raw, "n"), raw.get("partial") or {}
    refused = {rules: int(raw["refused"][rules]) for rules in RULES if rules in raw["refused"]}
    in_part = {rules: int(partial[rules]) for rules in refused if rules in partial}
    if n and "paper" not in refused:
        raise ValueError("refused.paper is missing")
    for rules, count in refused.items():
        if min(count, in_part.get(rules, 0)) < 0 or count + in_part.get(rules, 0) > n:
            told = f" and partial.{rules}={in_part[rules]}" if rules in in_part else ""
            raise ValueError(f"refused.{rules}={count}{told} of {n}")
    return n, refused, in_part


def judged(raw: Mapping[str, Any]) -> Judged:
    """One judge's entry of `sets.<name>.judged`."""
    labels = [label for label in (*COMPLIANCE, *SAFETY) if raw.get(label) is not None]
    if not labels:
        raise ValueError("no verdicts")
    invalid, error = (_count(raw, key) if raw.get(key) else 0 for key in ("invalid", "error"))
    counts = {label: _count(raw, label) for label in labels}
    return Judged(printable(str(raw.get("model") or "")), counts, invalid, error)


def agreement(raw: Mapping[str, Any]) -> Agreement:
    """One entry of `agreement`."""
    (a, b), (first, second) = raw["judges"], raw["labels"]
    rows = tuple((int(left), int(right)) for left, right in raw["confusion"])
    if len(rows) != 2:
        raise ValueError(f"confusion has {len(rows)} rows")
    return Agreement(
        judges=(printable(str(a)), printable(str(b))),
        kind=printable(str(raw["kind"])),
        n=_count(raw, "n"),
        kappa=_number(raw, "kappa"),
        labels=(printable(str(first)), printable(str(second))),
        confusion=(rows[0], rows[1]),
    )


def usage(raw: Mapping[str, Any]) -> Usage:
    """One entry of `usage`."""
    counts = (_count(raw, key) for key in ("requests", "prompt_tokens", "completion_tokens"))
    return Usage(*counts, usd=_number(raw, "usd"))


def ability(raw: Mapping[str, Any]) -> Ability:
    """One entry of `ability`."""
    found = {}
    for metric in ("acc", "acc_norm"):
        value = _number(raw, metric)
        if value is not None:
            found[metric] = value, _number(raw, f"{metric}_stderr") or 0.0
    if not found:
        raise ValueError("no accuracy")
    limit = raw.get("limit")
    return Ability(
        accuracies=found,
        n=_count(raw, "n"),
        version=printable(str(raw.get("version") or "")),
        shots=int(raw.get("shots") or 0),
        limit=None if limit is None else int(limit),
    )


def quality(raw: Mapping[str, Any]) -> Quality:
    """The entry `quality`."""
    rate, error = _number(raw, "win_rate"), _number(raw, "standard_error")
    if rate is None:
        raise ValueError("no win rate")
    return Quality(
        win_rate=rate,
        standard_error=error or 0.0,
        length_controlled=_number(raw, "length_controlled"),
        discrete=_number(raw, "discrete"),
        n=_count(raw, "n"),
        invalid=int(raw.get("invalid") or 0),
        error=int(raw.get("error") or 0),
        annotator=printable(str(raw["annotator"])),
        reference=printable(str(raw.get("reference") or "")),
        mean_length=_number(raw, "mean_length"),
        reference_length=_number(raw, "reference_length"),
        usage=usage(raw["usage"]) if raw.get("usage") else None,
    )


def overlap(raw: Mapping[str, Any]) -> Overlap:
    """One entry of `contamination`."""
    found = raw.get("by_source") or {}
    return Overlap(
        *(_count(raw, key) for key in ("n", "exact", "near", "ngram")),
        by_source={printable(str(name)): int(count) for name, count in found.items()},
    )


def _count(raw: Mapping[str, Any], key: str) -> int:
    count = int(raw[key])
    if count < 0:
        raise ValueError(f"{key}={count}")
    return count


def _number(raw: Mapping[str, Any], key: str) -> float | None:
    """A finite number, or None where there is none."""
    value = raw.get(key)
    if value is None or not math.isfinite(float(value)):
        return None
    return float(value)


QUANTITIES = ("plain", "prefix_free")
STEP_SCORES = {  # where each may stand among those of a choice of parameters
    "norm": (("norm",), ("norm", "within")),
    "signed": (("signed",), ("prediction", "pearson")),
    "slope": (("slope",), ("prediction", "slope")),
    "dot": (("dot",), ("states", "dot")),
    "cosine": (("cosine",), ("states", "cosine")),
}
LAYER_SCORES = ("kmeans", "probe", "probe_low", "probe_high", "silhouette", "fisher")


@dataclass(frozen=True)
class Probability:
    """Refusal probabilities by quantity and kind: means with intervals, and of single prompts.

    `values` has every prompt by its id; it is empty where only means were kept.
    """

    kinds: dict[str, dict[str, Interval]]
    followed: dict[str, dict[str, float]]
    values: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Kernel:
    """Mean norms, `[params][observer][trained]`; nan where a kind has no pair.

    `ids` and `of` are the prompts and their kinds, row by row of the whole matrices.
    """

    normalise: str
    params: dict[str, dict[str, dict[str, Interval]]]
    top_k: int | None = None
    ids: tuple[str, ...] = ()
    of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Separability:
    """By layer: scores, None where undefined, and plane coordinates; labels are 1 for toxic."""

    layers: dict[int, dict[str, float | None]]
    majority: float | None
    mds: dict[int, list[tuple[float, float]]]
    ids: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class OneStep:
    """What one SGD step on a toxic pair does, against the kernel (Eq. 2, 3; Proposition 1).

    `params` has the statistics STEP_SCORES that could be told, by choice of parameters; `change`
    the mean change of log p(first refusal token) by kind of observer.
    """

    trained: int | None  # how many pairs
    params: dict[str, dict[str, Interval]]
    change: dict[str, Interval]


def probability(raw: Mapping[str, Any]) -> Probability:
    """The entry `refusal_probability`."""
    return Probability(
        {q: {_name(k): _interval(v[q]) for k, v in raw["kinds"].items()} for q in QUANTITIES},
        {
            q: {_name(k): float(v[q]) for k, v in (raw.get("followed") or {}).items()}
            for q in QUANTITIES
        },
        {q: _by_prompt(raw.get("values") or (), q) for q in QUANTITIES},
    )


def _by_prompt(rows: Iterable[Mapping[str, Any]], quantity: str) -> dict[str, dict[str, float]]:
    """Finite values, `[kind][id]`."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        value = _finite(row[quantity])
        if value is not None:
            found.setdefault(_name(row["kind"]), {})[str(row["id"])] = value
    return found


def kernel(raw: Mapping[str, Any]) -> Kernel:
    """The entry `kernel`."""
    ids, of = tuple(map(str, raw.get("ids") or ())), tuple(map(_name, raw.get("of") or ()))
    if len(ids) != len(of):
        raise ValueError(f"{len(ids)} ids and {len(of)} kinds of prompts")
    return Kernel(
        _name(raw.get("normalise") or ""),
        {
            _name(params): {
                _name(observer): {_name(trained): _interval(cell) for trained, cell in row.items()}
                for observer, row in matrix.items()
            }
            for params, matrix in raw["params"].items()
        },
        None if raw.get("top_k") is None else int(raw["top_k"]),
        ids,
        of,
    )


def separability(raw: Mapping[str, Any]) -> Separability:
    """The entry `separability`."""
    labels = tuple(int(label) for label in raw["labels"])
    ids = tuple(map(str, raw.get("ids") or range(len(labels))))
    mds = {
        int(layer): [(float(x), float(y)) for x, y in points]
        for layer, points in (raw.get("mds") or {}).items()
        if points is not None
    }
    if any(len(points) != len(labels) for points in (*mds.values(), ids)):
        raise ValueError(f"coordinates or ids of other than {len(labels)} prompts")
    return Separability(
        layers={
            int(found["layer"]): {key: _finite(found.get(key)) for key in LAYER_SCORES}
            for found in raw["layers"]
        },
        majority=_finite(raw.get("majority")),
        mds=mds,
        ids=ids,
        labels=labels,
    )


def one_step(raw: Mapping[str, Any]) -> OneStep:
    """The entry `claims`; a statistic that is absent, null or not finite is left out."""
    trained = raw.get("trained")
    return OneStep(
        trained if trained is None or isinstance(trained, int) else len(trained),
        {
            _name(params): _intervals({key: _score(found, key) for key in STEP_SCORES})
            for params, found in raw["params"].items()
        },
        _intervals(raw["change"]),
    )


def _score(raw: Mapping[str, Any], key: str) -> Any:
    for place in STEP_SCORES[key]:
        found: Any = raw
        for part in place:
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is not None and not isinstance(found, Mapping):
            return found
    return None


def _intervals(raw: Mapping[str, Any]) -> dict[str, Interval]:
    read = {_name(key): _interval(found) for key, found in raw.items() if found is not None}
    return {
        key: found for key, found in read.items() if all(map(math.isfinite, vars(found).values()))
    }


def _name(text: object) -> str:
    return printable(str(text))


def _interval(raw: Sequence[float | None]) -> Interval:
    estimate, low, high = (math.nan if end is None else float(end) for end in raw)
    return Interval(estimate, low, high)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(float(value)) else float(value)


STAGES = ("contrastive", "sft")


@dataclass(frozen=True)
class Tracked:
    """What was measured after so many steps of a stage; None for what was not."""

    folder: Path
    stage: str
    step: int
    refusal_probability: Probability | None
    kernel: Kernel | None


def read_tracked(run: Run, notes: list[str]) -> list[Tracked]:
    """By stage and step; a step that was not finished is noted. DataError for a damaged file."""
    found = []
    for stage in STAGES:
        for folder in sorted(run.tracked(stage).glob("step-*/")):
            path = folder / "metrics.json"
            if not path.exists():
                notes.append(f"{folder}: skipped, no metrics.json; measuring did not finish")
                continue
            try:
                found.append(_tracked(path, stage))
            except UNREADABLE as error:
                raise damaged(path, error, "delete its folder") from error
    return sorted(found, key=lambda tracked: (STAGES.index(tracked.stage), tracked.step))


def _tracked(path: Path, stage: str) -> Tracked:
    step = int(path.parent.name.removeprefix("step-"))
    raw = json.loads(path.read_text(encoding="utf-8"))
    return Tracked(
        path.parent,
        stage,
        step,
        only(path, "refusal_probability", raw, probability),
        only(path, "kernel", raw, kernel),
    )


WEIGHTS = ("base", "contrastive", "sft", "snapshot", "endpoint")


@dataclass(frozen=True)
class Evaluation:
    """One `metrics.json`: which weights, under which settings, with what result."""

    folder: Path
    weights: str
    step: int | None
    settings: dict[str, Any]
    sets: dict[str, SetScore]
    about: dict[str, str]  # method, model, preset, seed, data
    discernment: Interval | None = None
    discernment_pairs: dict[str, Interval] = field(default_factory=dict)
    seconds: float | None = None
    tokens_per_second: float | None = None
    agreement: list[Agreement] = field(default_factory=list)
    usage: dict[str, Usage] = field(default_factory=dict)  # by judge
    ability: dict[str, Ability] = field(default_factory=dict)  # by task
    quality: Quality | None = None
    contamination: dict[str, Overlap] = field(default_factory=dict)  # by set or task
    refusal_probability: Probability | None = None
    kernel: Kernel | None = None
    separability: Separability | None = None
    one_step: OneStep | None = None  # its block `claims`

    @property
    def scored(self) -> bool:
        """Whether it has anything for a table, and not the paper's analyses alone."""
        return bool(self.sets or self.ability or self.quality)

    @property
    def empty(self) -> bool:
        analyses = self.refusal_probability, self.kernel, self.separability, self.one_step
        return not self.scored and not any(analyses)


@dataclass(frozen=True)
class RunRecord:
    """All a report needs of one run folder."""

    folder: Path
    config: dict[str, Any]
    rows: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[Evaluation]
    notes: list[str]  # what was skipped, and why
    tracked: list[Tracked] = field(default_factory=list)  # by stage and step


def read_run(folder: Path, curves_suffice: bool = False) -> RunRecord:
    """Everything readable in a run folder, with a note on everything that is not.

    Raises DataError for a damaged file, UserError if there is no evaluation; with `curves_suffice`,
    if nothing was logged or tracked either.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name run folders")
    notes: list[str] = []
    run = Run(folder)
    evaluations = []
    for path in sorted(folder.glob("eval/*/metrics.json")):
        try:
            found = _evaluation(path)
        except UNREADABLE as error:
            raise damaged(path, error) from error
        if found.empty:
            notes.append(f"{path}: skipped, nothing measured in it")
        else:
            evaluations.append(found)
    metrics, tracked = _metrics(run, notes), read_tracked(run, notes)
    if not evaluations and not (curves_suffice and (metrics or tracked)):
        why = f" ({notes[0]})" if notes else ""
        raise UserError(f"{folder}: no evaluations there{why}; run python eval.py run={folder}")
    for place in sorted(folder.glob("eval/*/")):
        if not (place / "metrics.json").exists():
            notes.append(f"{place}: skipped, no metrics.json; the evaluation did not finish")
    return RunRecord(
        folder,
        _mapping(run.config_file, yaml.safe_load, notes),
        _mapping(run.rows_file, json.loads, notes, needed=_trained(folder)),
        metrics,
        evaluations,
        notes,
        tracked,
    )


def _trained(folder: Path) -> bool:
    return any((folder / stage).is_dir() for stage in ("contrastive", "sft"))


def _mapping(path: Path, parse: Any, notes: list[str], needed: bool = True) -> dict[str, Any]:
    if not path.is_file():
        if needed:
            notes.append(f"{path}: missing")
        return {}
    try:
        value = parse(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise TypeError("not a mapping")
        storage.fingerprint(value)  # what JSON cannot hold, such as a mapping inside itself
    except (*UNREADABLE, yaml.YAMLError) as error:
        raise damaged(path, error, "restore it, or train the run again") from error
    return value


def _metrics(run: Run, notes: list[str]) -> list[dict[str, Any]]:
    try:
        rows = runs.read_metrics(run)
        text = run.metrics_file.read_text("utf-8") if run.metrics_file.exists() else ""
    except (*UNREADABLE, csv.Error) as error:
        raise damaged(run.metrics_file, error, "delete it: it holds the curves alone") from error
    if torn := max(0, len(text.splitlines()) - 1 - len(rows)):  # less the header
        notes.append(f"{run.metrics_file}: {torn} torn line(s) skipped")
    return rows


def _evaluation(path: Path) -> Evaluation:
    raw = json.loads(path.read_text(encoding="utf-8"))
    if raw["weights"] not in WEIGHTS:
        raise ValueError(f"weights={raw['weights']}")
    contamination = parts(path, "contamination", raw, overlap)
    plain = parts(path, "sets", raw, set_score)
    sets = {
        name: replace(
            score,
            name=name,
            overlap=contamination.get(name),
            judged=parts(path, "judged", raw["sets"][written], judged, f"sets.{name}."),
        )
        for written, (name, score) in zip(raw.get("sets") or {}, plain.items(), strict=True)
    }
    listed = {"agreement": dict(enumerate(raw.get("agreement") or ()))}
    return Evaluation(
        folder=path.parent,
        weights=raw["weights"],
        step=None if raw.get("step") is None else int(raw["step"]),
        settings=dict(raw.get("settings") or {}),
        sets=sets,
        about={
            key: printable(str(raw[key]))
            for key in ("method", "model", "preset", "seed", "data")
            if raw.get(key) is not None
        },
        **_discernment(raw.get("discernment") or {}),
        seconds=raw.get("seconds"),
        tokens_per_second=raw.get("tokens_per_second"),
        agreement=list(parts(path, "agreement", listed, agreement).values()),
        usage=parts(path, "usage", raw, usage),
        ability=parts(path, "ability", raw, ability),
        quality=only(path, "quality", raw, quality),
        contamination=contamination,
        refusal_probability=only(path, "refusal_probability", raw, probability),
        kernel=only(path, "kernel", raw, kernel),
        separability=only(path, "separability", raw, separability),
        one_step=only(path, "claims", raw, one_step),
    )


def _discernment(raw: Mapping[str, Any]) -> dict[str, Any]:
    pooled = raw.get("pooled")
    return {
        "discernment": Interval(*map(float, pooled)) if pooled else None,
        "discernment_pairs": {
            printable(name): Interval(*map(float, value))
            for name, value in (raw.get("pairs") or {}).items()
            if value is not None
        },
    }
