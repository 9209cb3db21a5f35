"""`metrics.json`: what an evaluation measured, a record for each of its blocks.

Blocks are there where their task was asked; keys that no record names are kept as they are. A file
of another version is refused.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dcr.core import storage
from dcr.core.config import Kind
from dcr.core.evaluation.protocols import VERSION
from dcr.core.statistics import Interval

CURE = "restore it, or delete it and evaluate again: stored answers are kept"
NOTABLE = 0.05  # share of empty answers from which a reader is warned

Count = Annotated[int, Field(ge=0)]


def _number(value: Any) -> Any:
    """Neither NaN nor infinity is a number that JSON knows: both are null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_number)]
Estimate = tuple[Number, Number, Number]  # with the ends of its 95% interval


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


def interval(estimate: Estimate) -> Interval:
    """An estimate with its ends, nan where one is not known."""
    return Interval(*(math.nan if end is None else end for end in estimate))


class Refusals(Record):
    """Prompts answered, and of them those refused in full and in part, by keyword rules.

    The rest but the `empty` answers complied.
    """

    n: Count
    refused: dict[str, Count] = {}
    partial: dict[str, Count] = {}
    empty: Count | None = None

    @model_validator(mode="after")
    def _add_up(self) -> "Refusals":
        if self.n and "paper" not in self.refused:
            raise ValueError("refused.paper is missing")
        said = self.n - (self.empty or 0)
        for rules, count in self.refused.items():
            if count + self.partial.get(rules, 0) > said:
                raise ValueError(f"more refusals by {rules} than {said} answers that say anything")
        return self


class Judged(Record):
    """One judge's verdicts on a set; a label that this judge does not give is None."""

    model: str = ""
    n: Count | None = None
    complied: Count | None = None
    partial: Count | None = None
    refused: Count | None = None
    safe: Count | None = None
    unsafe: Count | None = None
    labels: dict[str, Count] = {}  # of a user's own judge: those that no other judge gives
    invalid: Count = 0  # answered, but no verdict
    error: Count = 0  # nothing came back: outside of every rate

    @model_validator(mode="after")
    def _says_something(self) -> "Judged":
        if not self.counts:
            raise ValueError("no verdicts")
        return self

    @property
    def counts(self) -> dict[str, int]:
        """By label that this judge gives."""
        labels = ("complied", "partial", "refused", "safe", "unsafe")
        counts = {label: getattr(self, label) for label in labels}
        return {label: count for label, count in counts.items() if count is not None} | self.labels


class SetCounts(Refusals):
    """How one set of prompts was answered, and how judges have it."""

    kind: Kind
    ids: list[str] | None = None  # of its prompts, where the store may hold others too
    unanswered: Count | None = None
    truncated: Count | None = None
    repetitive: Count | None = None
    non_english: Count | None = None
    in_distribution: bool = False  # a source that the run was trained on
    unseen: Refusals | None = None  # of a set trained on: template groups that were not
    seen_by_steering: Count = 0  # prompts that steering or a gate was made from
    judged: dict[str, Judged] = {}

    @model_validator(mode="after")
    def _faults_are_answers(self) -> "SetCounts":
        for key in ("empty", "truncated", "repetitive", "non_english", "seen_by_steering"):
            if (getattr(self, key) or 0) > self.n:
                raise ValueError(f"{key}: more than {self.n} answers")
        return self


class Ranking(Record):
    """The ranking of toxic above seemingly toxic prompts by refusal mass.

    `answered` is, by the share of toxic prompts that a threshold refuses, the share of seemingly
    toxic ones below it; `refused`, by the share of seemingly toxic prompts that it refuses, that
    of toxic ones at or above it.
    """

    toxic: Count | None = None  # prompts
    seemingly_toxic: Count | None = None
    auroc: Estimate
    answered: dict[str, Estimate] = {}
    refused: dict[str, Estimate] = {}
    auroc_bounds: tuple[Number, Number] | None = None  # of masses that a server shows in part


class RankedSet(Record):
    """A set that has a part in it."""

    kind: Kind
    n: Count
    ids: list[str] | None = None  # of its prompts, where the store may hold others too
    in_distribution: bool = False


class Unseen(Record):
    """The refusal mass of a prompt that a server may not have shown, over all prompts."""

    mean: Number
    max: Number


class Discernment(Record):
    """Rankings of all sets pooled, of those alone that no stage was trained on, and of pairs."""

    pooled: Ranking | None = None
    untrained: Ranking | None = None
    pairs: dict[str, Ranking | None] = {}
    sets: dict[str, RankedSet] = {}
    unseen: Unseen | None = None


class Agreement(Record):
    """Two judges on the same responses; rows of the confusion are the first one's labels."""

    judges: tuple[str, str]
    kind: str
    n: Count
    kappa: Number = None
    labels: tuple[str, str]
    confusion: tuple[tuple[Count, Count], tuple[Count, Count]]


class Usage(Record):
    """The cost of a judge; without a price, `usd` is None."""

    requests: Count
    prompt_tokens: Count
    completion_tokens: Count
    usd: Number = None


class Overlap(Record):
    """How many prompts of a set stand, in which way, among the rows trained on."""

    n: Count
    exact: Count
    near: Count
    ngram: Count
    by_source: dict[str, Count] = {}

    @property
    def any(self) -> bool:
        return bool(self.exact or self.near or self.ngram)


class CalibratedSet(Record):
    """Validation prompts that are refused without and with the bias, and whose answers then open
    with a refusal's first token."""

    kind: Kind
    n: Count
    plain: Count
    refused: Count
    opened: Count


class Calibration(Record):
    """A bias on the first token of refusals, or a gate's threshold, and the share of toxic prompts
    that it is for. Behind a gate, `plain` counts the model alone, and `opened` the gate alone."""

    target: Number
    run: str | None = None  # that refuses this share
    bias: Number = None
    threshold: Number = None
    sets: dict[str, CalibratedSet] = {}


class ThoughtRefusals(Record):
    """Prompts by whether the thought resolves to refuse and whether the answer refuses."""

    both: Count
    thought_alone: Count
    answer_alone: Count
    neither: Count


class Thoughts(Record):
    """The thoughts before the answers to one set: tokens on average, and who ended them."""

    n: Count
    tokens: Number
    itself: Count
    budget: Count
    answerless: Count
    refused: ThoughtRefusals


class Ability(Record):
    """A task of the lm-evaluation-harness."""

    acc: Number = None
    acc_stderr: Number = None
    acc_norm: Number = None
    acc_norm_stderr: Number = None
    n: Count
    version: str = ""
    shots: Count = 0
    limit: Count | float | None = None
    truncated: Count = 0
    metrics: dict[str, Number] = {}
    subjects: dict[str, dict[str, Any]] = {}


class Quality(Record):
    """Win rates in percent over the reference's answers, ties counting half."""

    win_rate: Number = None
    standard_error: Number = None
    length_controlled: Number = None
    discrete: Number = None
    n: Count
    invalid: Count = 0
    error: Count = 0
    identical: Count = 0
    missing: Count = 0
    annotator: str
    reference: str = ""
    mean_length: Number = None
    reference_length: Number = None
    usage: Usage | None = None


class AttackedSet(Record):
    """Answers to a set under an attack: refusals by XSTest's keywords, and outcomes."""

    kind: Kind
    n: Count
    refused: Count
    outcomes: dict[str, Count]


class Attacked(Record):
    """Answers under an attack, the bias that they bear, and how first tokens rank prompts."""

    bias: Number = None
    sets: dict[str, AttackedSet]
    ranking: Ranking | None = None


class OwnTask(Record):
    """A measurement by a user's own task, with the task's path, source and settings."""

    path: str
    sha256: str
    settings: dict[str, Any] = {}
    measured: Any = None

    @property
    def numbers(self) -> dict[tuple[str, ...], tuple[float, float, float]]:
        """Every number of the block by its keys, with its ends where it is an estimate."""
        return dict(_numbers(self.measured, ()))


def _numbers(
    node: Any, keys: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], tuple[float, float, float]]]:
    if isinstance(node, Mapping):
        for key, each in node.items():
            yield from _numbers(each, (*keys, str(key)))
    elif isinstance(node, (int, float)):
        yield keys, (float(node), math.nan, math.nan)
    elif (
        isinstance(node, list) and len(node) == 3 and all(isinstance(n, int | float) for n in node)
    ):
        value, low, high = map(float, node)
        yield keys, (value, low, high)


class KindProbability(Record):
    n: Count | None = None
    plain: Estimate
    prefix_free: Estimate


class PromptProbability(Record):
    id: str = ""
    kind: str = ""
    plain: Number
    prefix_free: Number


class FirstToken(Record):
    """The mass of refusals' first tokens beside the probabilities over phrases, by score."""

    n: Count
    rank_correlation: dict[str, Number] = {}
    auroc: dict[str, Estimate] | None = None


class RefusalProbability(Record):
    """A.5: means by kind, one followed prompt of each, and every prompt's own."""

    first_token: FirstToken | None = None
    phrases: str = ""
    kinds: dict[str, KindProbability]
    followed: dict[str, PromptProbability] = {}
    values: list[PromptProbability] = []


class Kernel(Record):
    """A.6: mean norms, `params[choice][observer][trained]`; `ids`, `of` are the matrices' rows."""

    top_k: Count | None = None
    method: str = ""
    normalise: str = ""
    kinds: list[str] = []
    ids: list[str] = []
    of: list[str] = []
    params: dict[str, dict[str, dict[str, Estimate]]]

    @model_validator(mode="after")
    def _one_kind_each(self) -> "Kernel":
        if len(self.ids) != len(self.of):
            raise ValueError(f"{len(self.ids)} ids and {len(self.of)} kinds of prompts")
        return self


class LayerSeparability(Record):
    layer: Count
    kmeans: Number = None
    probe: Number = None
    probe_low: Number = None
    probe_high: Number = None
    silhouette: Number = None
    fisher: Number = None


class Separability(Record):
    """A.9: scores of every block, and plane coordinates of the prompts; labels are 1 for toxic."""

    layers: list[LayerSeparability]
    majority: Number = None
    mds: dict[str, list[tuple[float, float]] | None] = {}
    labels: list[int]
    ids: list[str] | None = None

    @model_validator(mode="after")
    def _one_place_each(self) -> "Separability":
        points = [part for part in (*self.mds.values(), self.ids) if part is not None]
        if any(len(part) != len(self.labels) for part in points):
            raise ValueError(f"coordinates or ids of other than {len(self.labels)} prompts")
        return self


Statistics = dict[str, Estimate | None]  # None where it is undefined


class OneStepParams(Record):
    """How the kernel over some parameters agrees with the changes, and with the states."""

    norm: Statistics = {}  # within, pooled
    prediction: Statistics = {}  # pearson, slope
    states: Statistics = {}  # dot, cosine


class OneStep(Record):
    """The changes by one SGD step on a toxic pair, against the kernel (Eq. 2, 3; Proposition 1)."""

    trained: list[str] = []  # ids of the pairs
    params: dict[str, OneStepParams]
    change: dict[str, Estimate | None] = {}


class Tracked(Record):
    """`tracking/<stage>/step-…/metrics.json`: what was measured after so many steps of training."""

    refusal_probability: RefusalProbability | None = None
    kernel: Kernel | None = None


class Metrics(Tracked):
    """One `metrics.json`: which weights, under which settings, with what result."""

    version: Literal[2] = VERSION  # a file of another one is refused
    weights: Literal["base", "contrastive", "sft", "readout", "snapshot", "endpoint"]
    step: Count | None = None
    method: str | None = None
    model: str | None = None
    preset: str | None = None
    seed: int | str | None = None
    data: str | None = None
    settings: dict[str, Any] = {}
    decoding: dict[str, list[int]] | None = None  # threads and batch sizes of the answers
    sets: Mapping[str, SetCounts] = {}
    discernment: Discernment | None = None
    seconds: Number = None
    peak_memory_gib: Number = None
    steering: dict[str, Any] | None = None  # what the edits were made from
    calibration: Calibration | None = None
    thinking: dict[str, Thoughts] = {}  # by set
    agreement: list[Agreement] = []
    usage: dict[str, Usage] = {}  # by judge
    contamination: dict[str, Overlap] = {}  # by set
    ability: dict[str, Ability] = {}  # by task
    quality: Quality | None = None
    own: dict[str, OwnTask] = {}  # by class of a user's own task
    separability: Separability | None = None
    frontier: dict[str, Any] | None = None  # answers under each bias, see `dcr.frontier`
    robustness: dict[str, Attacked] = {}  # by attack
    claims: OneStep | None = None
    tokens_per_second: Number = None

    @property
    def silence(self) -> str:
        """A warning where a notable share of the answers is empty, else nothing."""
        empty, n = (sum(getattr(of, k) or 0 for of in self.sets.values()) for k in ("empty", "n"))
        if not empty or empty < NOTABLE * n:
            return ""
        return (
            f"{empty} of {n} answers ({empty / n:.0%}) are empty: they count as neither compliance "
            "nor refusal, and the rates say little"
        )


Result = TypeVar("Result", bound=Record)


def read(file: Path) -> Metrics:
    """An evaluation's `metrics.json`. DataError "file: what is wrong: cure" where it is damaged."""
    return storage.read_json(file, Metrics, CURE)


def read_tracked(file: Path) -> Tracked:
    """A `metrics.json` that training left at one of its steps, with the errors of `read`."""
    return storage.read_json(file, Tracked, "delete its folder")


def write(file: Path, measured: Mapping[str, Any], record: type[Result]) -> Result:
    """Check and write what was measured, and give it as it is read.

    Raises ValueError where a block is none of the record, UserError where it cannot be written.
    """
    checked = record.model_validate_json(json.dumps(measured, default=str), strict=True)
    storage.write_json(file, measured)
    return checked
