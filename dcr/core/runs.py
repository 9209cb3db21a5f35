"""The run folder: its paths, its writers, finished stages and measurements.

config.yaml              the resolved configuration
rows.json                ids and fingerprint of every row used, and counts of dropped ones
layer.json               the block that dcr.layer=auto chose
threads.json             the number of threads of the last training
base.json                fingerprints of the weights each stage started from
metrics.csv              every logged value: stage, step (the first is 0), epoch, key, value
readout.json             the changes by the readout, if there is one
<stage>.cost.json        seconds, tokens and peak memory of a stage
adopted.json             the neighbouring runs whose stages it took over
evaluated.json           seconds of each evaluation that a study made
contrastive/  sft/  readout/  results, present only when the stage is done
snapshots/step-000020/   adapters during SFT
tracking/<stage>/step-…/ measurements of tracking.quantities, prompt by prompt
checkpoints/<stage>/     for resuming, gone when the stage is done
eval/<fingerprint>/      completions, verdicts, metrics.json
gates/<fingerprint>/     scores of prompts by a gate
labels/<sheet>/          answers drawn for people to label, and their labels
"""

import copy
import csv
import functools
import io
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import yaml
from pydantic import ConfigDict
from typing_extensions import TypedDict

from dcr.core import extending, machine, storage
from dcr.core.config import STAGES, ConfigError, DataError, Precision

log = logging.getLogger(__name__)

# files that a command writes before its first step
BEFORE_TRAINING = {
    *(".lock", "config.yaml", "rows.json", "base.json", "layer.json", "threads.json"),
    *("wandb_id", "wandb"),
}
METRIC_FIELDS = ("stage", "step", "epoch", "key", "value")
RESTORE = "restore it from a copy of the run, or train into another folder"


class Open(TypedDict):
    """Read with the keys that it does not name."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]


class MadeWith(Open):
    """The keys of every run's `config.yaml`; a trained run has the rest of `TrainConfig` too."""

    method: str
    seed: int
    preset_name: str
    model: dict[str, Any]
    data: dict[str, Any]


class RowList(Open):
    count: int
    fingerprint: str
    ids: list[str]


class OwnSource(TypedDict):
    """A user's own source, see `extending.origin`."""

    path: str
    sha256: str
    settings: dict[str, Any]


class RowRecord(Open):
    """`rows.json`, see `data.row_record`."""

    rows: dict[str, RowList]
    dropped: NotRequired[dict[str, int]]
    in_distribution: NotRequired[list[str]]
    unseen_groups: NotRequired[list[str]]
    own: NotRequired[dict[str, OwnSource]]


class RunPath:
    """A file or folder of a run by its name, see above."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: Any, _: type) -> Path:
        return run.folder / self.name


@dataclass(frozen=True)
class Run:
    """Paths inside one run folder."""

    folder: Path

    config_file, rows_file = RunPath("config.yaml"), RunPath("rows.json")
    base_file, layer_file = RunPath("base.json"), RunPath("layer.json")
    threads_file = RunPath("threads.json")
    metrics_file, readout_file = RunPath("metrics.csv"), RunPath("readout.json")
    adopted_file, evaluated_file = RunPath("adopted.json"), RunPath("evaluated.json")
    snapshots = RunPath("snapshots")

    def cost_file(self, stage: str) -> Path:
        return self.folder / f"{stage}.cost.json"

    def tracked(self, stage: str) -> Path:
        """The folder of a stage's tracking, with a folder a step: `step-000020`."""
        return self.folder / "tracking" / stage

    def stage(self, name: str) -> Path:
        """The result folder of a stage."""
        return self.folder / name

    def done(self, name: str) -> bool:
        """Whether a stage has its result; result folders appear whole or not at all."""
        return self.stage(name).is_dir()

    def checkpoints(self, name: str) -> Path:
        return self.folder / "checkpoints" / name

    def evaluation(self, fingerprint: str) -> Path:
        return self.folder / "eval" / fingerprint

    def config(self) -> dict[str, Any]:
        """The resolved configuration of this run. Raises UserError if there is none."""
        if not self.config_file.exists():
            raise ConfigError(f"run={self.folder}: no config.yaml there; name a run folder")
        held = storage.read_text(self.config_file, RESTORE)
        return copy.deepcopy(_config(self.config_file, held))

    def record(self) -> dict[str, Any]:
        """The content of `rows.json`, empty before training has drawn its rows.

        Raises DataError if it is damaged, or missing although a stage was trained.
        """
        trained = any(self.done(stage.value) for stage in STAGES)
        if not trained and not self.rows_file.exists():
            return {}
        return dict(storage.read_json(self.rows_file, RowRecord, RESTORE))

    def block(self) -> int | None:
        """The block that `dcr.layer=auto` chose for stage one; None if it has not."""
        return self._number(self.layer_file, "block")

    def threads(self) -> int | None:
        """The number of threads of the run's last training; None before it."""
        return self._number(self.threads_file, "threads")

    def _number(self, file: Path, key: str) -> int | None:
        if not file.exists():
            return None
        found = storage.read_json(file, dict[str, int], RESTORE)
        if key not in found:
            raise DataError(f"{file}: {key}: missing; {RESTORE}")
        return found[key]

    def precisions(self) -> dict[str, Precision]:
        """The precisions of stages and evaluation, after `precision=auto` was settled."""
        made_with = self.config() if self.config_file.exists() else {}
        nodes = {"contrastive": "dcr", "sft": "sft"}
        named = {use: (made_with.get(node) or {}).get("precision") for use, node in nodes.items()}
        known = {use: Precision(name) for use, name in named.items() if name not in (None, "auto")}
        if "sft" in known:
            return known | {"evaluation": machine.evaluated_in(known["sft"])}
        own = made_with.get("precision", "auto")  # of a model that was only evaluated
        return known | ({} if own == "auto" else {"evaluation": Precision(own)})


def write_config(run: Run, made_with: Mapping[str, Any]) -> None:
    """Writes `config.yaml` as plain data."""
    storage.write_text(run.config_file, as_yaml(made_with))


@functools.lru_cache(maxsize=8)
def _config(file: Path, held: str) -> dict[str, Any]:
    """A run's configuration, read and checked once while its file holds the same text."""
    made_with = storage.read_yaml(file, MadeWith, RESTORE)
    # a folder may come from someone else, and only the user's own command can trust code
    if "trust_remote_code" in made_with["model"]:
        made_with["model"]["trust_remote_code"] = False
    if fault := extending.part("fault_of_run")(made_with):
        raise DataError(f"{file}: {fault}; {RESTORE}")
    return dict(made_with)


def as_yaml(plain: Mapping[str, Any]) -> str:
    """Plain data as YAML that reads back the same.

    Non-ASCII letters stay, except beside a Unicode line separator, which PyYAML would fold.
    """
    text = yaml.safe_dump(dict(plain), sort_keys=False, allow_unicode=True)
    return text if yaml.safe_load(text) == plain else yaml.safe_dump(dict(plain), sort_keys=False)


def append_metrics(run: Run, rows: Iterable[Sequence[object]]) -> None:
    """Adds (stage, step, epoch, key, value) rows to `metrics.csv`. Raises UserError on failure."""
    file = run.metrics_file
    header = not file.exists() or file.stat().st_size == 0
    storage.append(file, _csv(rows, header).encode())


def _csv(rows: Iterable[Sequence[object]], header: bool) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerows([METRIC_FIELDS] if header else [])
    writer.writerows(rows)
    return text.getvalue()


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """The rows of `metrics.csv` with numbers as numbers; a last line without its end is left out.

    A kill tore such a line, and a number cut in half still looks like one. Raises DataError
    "file:line: fault" for any other row that training did not write.
    """
    if not run.metrics_file.exists():
        return []
    header, *lines = storage.read_text(run.metrics_file).split("\n")[:-1] or [""]
    if lines and header.rstrip("\r").split(",") != list(METRIC_FIELDS):
        raise DataError(f"{run.metrics_file}:1: header: not {','.join(METRIC_FIELDS)}; restore it")
    return [_metric(line, f"{run.metrics_file}:{i}") for i, line in enumerate(lines, start=2)]


def _metric(line: str, where: str) -> dict[str, Any]:
    try:
        ((stage, step, epoch, key, value),) = csv.reader([line])
        row = {"stage": stage, "step": int(step), "epoch": int(float(epoch)), "key": key}
        row["value"] = float(value)
        if not math.isfinite(row["value"]):
            raise ValueError("its value is not finite")
    except (ValueError, OverflowError, csv.Error) as error:
        raise DataError(f"{where}: row: {str(error)[:80]}; remove the line") from None
    return row


def forget_metrics_beyond(run: Run, stage: str, step: int) -> None:
    """Drops the metrics that a killed process logged after the first `step` optimiser steps."""
    if not run.metrics_file.exists():
        return
    if not storage.read_text(run.metrics_file).endswith("\n"):
        log.warning("%s: its last line broke off with a kill and is dropped", run.metrics_file)
    before = [row for row in read_metrics(run) if row["stage"] != stage or row["step"] < step]
    rows = ([row[name] for name in METRIC_FIELDS] for row in before)
    storage.write_text(run.metrics_file, _csv(rows, header=True))
