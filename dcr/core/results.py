"""`metrics.json`: what an evaluation measured, a record for each of its blocks.

Blocks are there where their task was asked. Extensions add records of theirs (`dcr.results`); keys
that no record names are kept as they are. A file of another version is refused.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from dcr.core import storage
from dcr.core.config import Kind

CURE = "restore it, or delete it and evaluate again: stored answers are kept"
VERSION: Literal[2] = 2  # of the file's layout

NOTABLE = 0.05  # share of empty answers from which a reader is warned

Count = Annotated[int, Field(ge=0)]


def _number(value: Any) -> Any:
    """Neither NaN nor infinity is a number that JSON knows: both are null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_number)]
Estimate = tuple[Number, Number, Number]  # with the ends of its 95% interval


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


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


class SetCounts(Refusals):
    """The counts of answers to one set of prompts."""

    kind: Kind
    ids: list[str] | None = None  # of its prompts, where the store may hold others too
    unanswered: Count | None = None
    truncated: Count | None = None
    repetitive: Count | None = None
    non_english: Count | None = None
    in_distribution: bool = False  # a source that the run was trained on
    unseen: Refusals | None = None  # of a set trained on: template groups that were not
    seen_by_steering: Count = 0  # prompts that the vectors of the steering came from

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


class Metrics(Record):
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


def read(file: Path, record: type[Result]) -> Result:
    """An evaluation's `metrics.json`. DataError "file: what is wrong: cure" where it is damaged."""
    return storage.read_json(file, record, CURE)


def write(file: Path, measured: Mapping[str, Any], record: type[Result]) -> Result:
    """Check and write what was measured, and give it as it is read.

    Raises ValueError where a block is none of the record, UserError where it cannot be written.
    """
    checked = record.model_validate_json(json.dumps(measured, default=str), strict=True)
    storage.write_json(file, measured)
    return checked
