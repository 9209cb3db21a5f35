"""A search over the settings of stage one: the Pareto front of discernment, ability and cost.

This module defines a search: spaces in a plain grammar, validation prompts of another origin than
the training rows, and the run that a point of the spaces stands for. `trials` has the Optuna study
and its workers; `python -m dcr.search` shows the front.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from dcr import cli, continuing, study
from dcr.choice import origins
from dcr.choice.origins import SourcePair
from dcr.core import config, data, storage
from dcr.core.config import ConfigError, UserError
from dcr.core.config.training import AUTO_LAYER, TrainConfig, block_of
from dcr.core.evaluation import read_set
from dcr.public import SOURCES
from dcr.study import Job

NUMBER = r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
RANGE = re.compile(rf"{NUMBER}\.\.{NUMBER}(:log)?")
GRAMMAR = "a space is low..high, low..high:log or a,b,c"
QUIET = "trainer.progress=false"  # several workers share one terminal
FIXED = {*continuing.FREE_KEYS, "seed"}  # keys that no trial varies
HELD_OUT = "contrasts_seemingly_toxic_heldout:contrasts_toxic_heldout"


OBJECTIVES = {  # whether each is maximised
    "auroc": True,
    "answered": True,
    "nll": False,
    "ability": True,
    "seconds": False,
}


# --- spaces -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """The values of one setting: an interval (of integers if both ends are) or choices in words."""

    low: float = 0
    high: float = 0
    log: bool = False
    choices: tuple[str, ...] = ()

    def holds(self, value: object) -> bool:
        if self.choices or not isinstance(value, (int, float)):
            return str(value) in self.choices
        return self.low <= value <= self.high and value == type(self.low)(value)

    def __str__(self) -> str:
        if self.choices:
            return ",".join(self.choices)
        return f"{self.low:g}..{self.high:g}{':log' if self.log else ''}"


def parsed(words: Sequence[str]) -> tuple[dict[str, Space], list[str]]:
    """The spaces by setting, and the words that fix a value; the last word of each key counts.

    Raises ConfigError for a malformed space.
    """
    last = {word.partition("=")[0]: word for word in words}
    spaces = {key: space for key, word in last.items() if (space := _space(key, word))}
    return spaces, [word for key, word in last.items() if key not in spaces]


def _space(key: str, word: str) -> Space | None:
    value = word.removeprefix(f"{key}=")
    if match := RANGE.fullmatch(value):
        whole = not re.search("[.eE]", match[1] + match[2])
        low, high = ((int if whole else float)(end) for end in match.groups()[:2])
        if not low < high < math.inf or (match[3] and low <= 0):
            raise ConfigError(f"{word}: give low..high, low below high, and with :log both above 0")
        return Space(low, high, bool(match[3]))
    if re.match(r"[-+\d.]*\d\.\.", value):
        raise ConfigError(f"{word}: {GRAMMAR}")
    combined = cli.combinations([word])
    choices = tuple(one.removeprefix(f"{key}=") for (one,) in combined)
    return Space(choices=choices) if len(choices) > 1 else None


def usual(settings: TrainConfig) -> list[str]:
    """The default spaces around these settings, as a user would write them.

    They hold the blocks of the middle half, the paper's margins, ratios for which the sources hold
    rows, up to two more epochs, and some powers of two or ten around the rest.
    """
    from dcr.core import models

    stage_one, depth = settings.dcr, models.facts(settings.model).depth
    lr = stage_one.optim.lr
    words = [
        f"dcr.layer={max(1, round(0.3 * depth))}..{round(0.8 * depth)}",
        "dcr.margin=0.1..0.4",
        "dcr.scale=8..64:log",
        f"dcr.epochs=1..{stage_one.epochs + 2}",
        "dcr.nll.weight=1e-4..1e-1:log",
        f"dcr.optim.lr={lr / 5:g}..{lr * 5:g}:log",
    ]
    if stage_one.ratio is not None:
        rows = data.rows_of(replace(settings, dcr=replace(stage_one, ratio=None)))
        most = min(5, math.floor(10 * len(rows.toxic) / len(rows.seemingly_toxic)) / 10)
        words += [f"dcr.ratio=1.0..{most}"] if most > 1 else []
    return words if depth > 1 else words[1:]


def configured(settings: TrainConfig, spaces: Mapping[str, Space]) -> dict[str, object]:
    """The settings as a point of the spaces, without those that lie outside their space."""
    from dcr.core import models
    from dcr.report.records import flattened

    values = flattened(config.plain(settings))
    if settings.dcr.layer != AUTO_LAYER:
        values["dcr.layer"] = block_of(settings.dcr, models.facts(settings.model).depth)
    held = {key: values.get(key) for key, space in spaces.items() if space.holds(values.get(key))}
    return {key: str(value) if spaces[key].choices else value for key, value in held.items()}


# --- validation prompts -------------------------------------------------------------------------


def validation_of(settings: TrainConfig, asked: str | None) -> list[SourcePair]:
    """The pairs of sets that trials are measured on: `asked`, or the first usual one that serves.

    Raises UserError where a set cannot be read, is tested on, or has the origin of training rows.
    """
    if asked is not None:
        if not (pairs := origins.parsed("validation", asked)):
            raise ConfigError(
                f"validation={asked}: give <seemingly toxic>:<toxic>, or leave it out"
            )
        for pair in pairs:
            _check_validation(settings, pair)
        return pairs
    for pair in (*origins.parsed("", HELD_OUT), *origins.usual_tests(settings.data).values()):
        with suppress(UserError):
            _check_validation(settings, pair)
            return [pair]
    raise ConfigError(
        "validation: every usual set is trained or tested on; name another with "
        "validation=<seemingly toxic>:<toxic>, or take one out of data.evaluation"
    )


def _check_validation(settings: TrainConfig, pair: SourcePair) -> None:
    nodes, phase = ("seemingly_toxic", "toxic", "safety", "normal"), settings.sft.readout
    trained = {name for node in nodes for name in getattr(settings.data, node).source}
    trained |= {*phase.seemingly_toxic, *phase.toxic} if phase.steps else set()
    # the held-out part of an embedded corpus has the corpus's origin
    names, own = ({(SOURCES[n].embedded or "").split("/")[0] for n in of if n in SOURCES} - {""}
                  for of in (pair.names, trained))  # fmt: skip
    if names & own or origins.related(pair.names, trained):
        raise ConfigError(f"validation={pair}: has the origin of the training rows; name another")
    tested = {*settings.data.evaluation.over_refusal, *settings.data.evaluation.safety}
    if both := pair.names & tested:
        raise ConfigError(f"validation={pair}: data.evaluation tests on {min(both)}; name another")
    for kind, side in pair.sides:
        for name in side:
            read_set(name, kind, settings.data.root, None, settings.seed)


# --- runs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """The spaces, objectives and settings of a search, and the place of its files."""

    out: Path
    spaces: Mapping[str, Space]
    objectives: tuple[str, ...]
    settings: TrainConfig
    training: tuple[str, ...]
    evaluating: tuple[str, ...]
    validation: tuple[SourcePair, ...]
    trials: int

    @property
    def name(self) -> str:
        """The study's name, by which the same command finds its own in the journal."""
        spaces = {key: vars(space) for key, space in self.spaces.items()}
        settings, pairs = config.plain(self.settings), list(map(str, self.validation))
        what = [continuing.binding(settings), spaces, self.objectives, self.evaluating]
        files = study.own_files([settings, [sorted(pair.names) for pair in self.validation]])
        return f"search-{storage.fingerprint([what, pairs, *files])}"

    @property
    def journal(self) -> Path:
        return self.out / "search.journal"

    def trial(self, point: Mapping[str, object]) -> Job:
        """The run of a point, measured on the validation prompts."""
        evaluation = self.settings.data.evaluation
        tested = [evaluation.over_refusal, evaluation.safety]
        validated = [[n for pair in self.validation for n in pair.sides[i][1]] for i in (0, 1)]
        # training drops rows near any of these prompts, so that all runs learn from the same rows
        asked = _asking([[*t, *v] for t, v in zip(tested, validated, strict=True)])
        tasks = "discernment,ability" if "ability" in self.objectives else "discernment"
        evaluating = [QUIET, *self.evaluating, f"tasks=[{tasks}]", *_asking(validated)]
        training = [QUIET, *self.training, *asked, *words_of(point)]
        return study.job_of(self.out / "trials", "trial", training, evaluating)

    def corners(self) -> list[Job]:
        """Trials that together have both ends of every space and every choice."""
        ends = [space.choices or (space.low, space.high) for space in self.spaces.values()]
        points = ([of[min(i, len(of) - 1)] for of in ends] for i in range(max(map(len, ends))))
        return [self.trial(dict(zip(self.spaces, point, strict=True))) for point in points]


def words_of(point: Mapping[str, object], short: bool = False) -> list[str]:
    """A point as settings of train.py; `short` rounds numbers for the eye."""
    return [
        f"{key}={value:.3g}" if short and isinstance(value, float) else f"{key}={value}"
        for key, value in point.items()
    ]


def _asking(sides: Sequence[Sequence[str]]) -> list[str]:
    named = (json.dumps(list(dict.fromkeys(names)), ensure_ascii=False) for names in sides)
    keys = ("data.evaluation.over_refusal", "data.evaluation.safety")
    return [f"{key}={names}" for key, names in zip(keys, named, strict=True)]


def check_search(
    settings: TrainConfig, spaces: Mapping[str, Space], objectives: Sequence[str]
) -> None:
    """Raises ConfigError for a space or an objective that these settings do not allow."""
    for key in spaces:
        if key.split(".")[0] in FIXED:
            raise ConfigError(f"{key}: not searched, since it decides no weights or is the seed")
    if not spaces:
        raise ConfigError(f"nothing to search: every setting has one value; {GRAMMAR}")
    if not set(objectives) <= OBJECTIVES.keys() or len(set(objectives)) < len(objectives):
        near = ", ".join(OBJECTIVES)
        raise ConfigError(f"objectives={','.join(objectives)}: choose from {near}, each once")
    if "nll" in objectives and not data.rows_of(settings).normal_heldout:
        raise ConfigError(
            f"objectives=nll: data.validation={settings.data.validation} holds out no instruction "
            "row; raise it, lower data.normal.count, or leave the objective out"
        )
