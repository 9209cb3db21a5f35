"""The run folder: where everything lies, who may write, what is done, what was measured.

    config.yaml              the resolved configuration
    rows.json                ids and fingerprint of every row used, and what was dropped
    metrics.csv              every logged value: stage, step, epoch, key, value
    contrastive/  sft/       results, present only when the stage is done
    snapshots/step-000020/   adapters during SFT
    checkpoints/<stage>/     for resuming, gone when the stage is done
    eval/<fingerprint>/      completions, verdicts, metrics.json
"""

import csv
import fcntl
import hashlib
import json
import os
import resource
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from dcr.config import ConfigError, UserError

# What may differ between two commands that go on with one run.
FREE_KEYS = ("stage", "plan", "force", "run", "trainer", "wandb")
METRIC_FIELDS = ("stage", "step", "epoch", "key", "value")


@dataclass(frozen=True)
class Run:
    """Paths inside one run folder."""

    folder: Path

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def rows_file(self) -> Path:
        return self.folder / "rows.json"

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.csv"

    @property
    def snapshots(self) -> Path:
        return self.folder / "snapshots"

    def stage(self, name: str) -> Path:
        """The result folder of a stage."""
        return self.folder / name

    def done(self, name: str) -> bool:
        """Whether a stage's result is there; result folders appear whole or not at all."""
        return self.stage(name).is_dir()

    def checkpoints(self, name: str) -> Path:
        return self.folder / "checkpoints" / name

    def evaluation(self, fingerprint: str) -> Path:
        return self.folder / "eval" / fingerprint

    def config(self) -> dict[str, Any]:
        """The resolved configuration this run was made with. ConfigError if there is none."""
        if not self.config_file.is_file():
            raise ConfigError(f"run={self.folder}: no config.yaml there; name a run folder")
        return yaml.safe_load(self.config_file.read_text())

    def record(self) -> dict[str, Any]:
        """What `rows.json` says, empty before training has drawn its rows."""
        return json.loads(self.rows_file.read_text()) if self.rows_file.is_file() else {}


def peak_memory_gib() -> float:
    """The most memory this process has held: on the GPU where there is one, else in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def fingerprint(settings: object) -> str:
    """Twelve hex digits that name a configuration or anything else JSON can hold."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def binding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that decides a run's weights."""
    return {key: value for key, value in config.items() if key not in FREE_KEYS}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two configurations differ."""
    found: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{name}.")
        elif before != after:
            found.append(f"{name}: {before} -> {after}")
    return found


def claim(run: Run, config: Mapping[str, Any], force: bool) -> None:
    """Write the configuration, or check that the one there is the same.

    Raises ConfigError with the differences when the folder belongs to another configuration and
    `force` is off.
    """
    if run.config_file.is_file():
        changed = differences(binding(run.config()), binding(config))
        if changed and not force:
            raise ConfigError(
                f"{run.folder} was made with another configuration ({'; '.join(changed[:6])}); "
                "name another folder with run=, or force=true to go on all the same"
            )
    write_text(run.config_file, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """Exclusive use of the run folder. UserError when another process has it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{run.folder}: another process is using this run folder") from error
        yield


def write_text(path: Path, text: str) -> None:
    """The whole text or the old file: a temporary file in the same folder takes its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Atomic, readable, with non-ASCII text as it is."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def append_metrics(run: Run, rows: list[tuple[str, int, float, str, float]]) -> None:
    """Add (stage, step, epoch, key, value) rows to `metrics.csv`."""
    fresh = not run.metrics_file.exists()
    with run.metrics_file.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(METRIC_FIELDS)
        writer.writerows(rows)


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """The rows of `metrics.csv` with numbers as numbers; a line torn by a kill is left out."""
    if not run.metrics_file.exists():
        return []
    with run.metrics_file.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [whole for row in rows if (whole := _numbers(row)) is not None]


def _numbers(row: Mapping[str, str | None]) -> dict[str, Any] | None:
    try:
        step, epoch, value = (float(row[name] or "") for name in ("step", "epoch", "value"))
    except (KeyError, ValueError):
        return None
    return {**row, "step": int(step), "epoch": epoch, "value": value}


def forget_metrics_beyond(run: Run, stage: str, step: int) -> None:
    """Drop what a killed process logged after the checkpoint that training now goes on from."""
    rows = read_metrics(run)
    kept = [row for row in rows if row["stage"] != stage or row["step"] <= step]
    if run.metrics_file.exists():
        run.metrics_file.unlink()
    append_metrics(run, [tuple(row[name] for name in METRIC_FIELDS) for row in kept])  # pyright: ignore
