"""Run folders read into records: what was configured, logged, evaluated and answered."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dcr import keywords, results
from dcr.core import config, runs, storage
from dcr.core.config import Kind, UserError
from dcr.core.evaluation.subjects import Opening
from dcr.core.generation import Completion
from dcr.core.runs import Run
from dcr.ending import printable
from dcr.results.file import stored_answers
from dcr.results.frame import rows_of, trained_on
from dcr.results.schema import Metrics

STAGES = tuple(stage.value for stage in config.STAGES)
STEERED = ("surgical", "scans", "ablation", "probe")  # methods that an evaluation's settings name


class Evaluation(Metrics):
    """One `metrics.json` with printable texts, its folder, and the sets that it was trained on."""

    folder: Path
    learnt: frozenset[str] = frozenset()

    @property
    def scored(self) -> bool:
        """Whether it has anything for a table, beyond the paper's analyses."""
        ranked = self.discernment and self.discernment.pooled
        return any((self.sets, ranked, self.ability, self.quality, self.robustness))

    @property
    def empty(self) -> bool:
        analyses = self.refusal_probability, self.kernel, self.separability, self.claims
        return not self.scored and not any(analyses)

    @property
    def unedited(self) -> bool:
        """Whether plain weights answered, without steering or another decoding."""
        # validation prompts are other prompts, not another way to answer
        return not results.edit({**self.settings, "validation": False})

    @property
    def steering_values(self) -> list[str]:
        """The values of the settings of its steering."""
        return [str(v) for v in flattened({"": self.settings.get("steering")}).values()]

    @property
    def steered_by(self) -> str:
        """The method of its steering; empty without one."""
        node = self.settings.get("steering")
        if isinstance(node, Mapping) and "sha256" in node:  # a user's own
            return str(node.get("method"))
        return next((name for name in STEERED if name in self.steering_values), "")

    @property
    def steering_in_words(self) -> str:
        return printable(results.edit({"steering": self.settings.get("steering")}))

    @property
    def settings_without_seed(self) -> dict[str, Any]:
        return {key: value for key, value in self.settings.items() if key != "seed"}

    def answers(self, name: str) -> list[Completion]:
        """The stored answers that it counts of a set. DataError for a damaged line."""
        kept = stored_answers(self.folder / f"{name}.jsonl")
        return [kept[each] for each in self.sets[name].ids or kept if each in kept]

    @cached_property
    def pivot(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        """Its rows of `results.load` by quantity, judge and the judge's model, one row a set."""
        table: dict[tuple[str, str, str], dict[str, Any]] = {}
        for row in rows_of(self, learnt=self.learnt):
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

    def about(self, key: str) -> str:
        """method, seed, preset_name, or a node's label, from its configuration."""
        value = self.config.get(key, "")
        return printable(str(value.get("label", "") if isinstance(value, Mapping) else value))

    def snapshots(self, has: Callable[[Evaluation], object]) -> list[Evaluation]:
        """Unsteered evaluations of snapshots by step, under the one setting with the most steps."""
        by_setting: dict[str, dict[int, Evaluation]] = {}
        for e in self.evaluations:
            if e.weights == "snapshot" and e.step is not None and e.unedited and has(e):
                by_setting.setdefault(storage.fingerprint([e.settings, e.data]), {})[e.step] = e
        most = max(by_setting.values(), key=len, default={})
        return [most[step] for step in sorted(most)]


def folders(records: Iterable[RunRecord]) -> str:
    """Their places, to be named in a note or an error."""
    return ", ".join(printable(str(run.folder)) for run in records)


def read_run(folder: Path) -> RunRecord:
    """Reads everything readable in a run folder, with a note on everything that is not.

    Raises DataError for a damaged file, UserError for a folder that is no run's.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name run folders")
    notes, evaluations, run = list[str](), list[Evaluation](), Run(folder)
    rows = run.record()
    for path in sorted(folder.glob("eval/*/metrics.json")):
        metrics = _printable(results.read(path).model_dump())
        about = {"folder": path.parent, "learnt": trained_on(rows, metrics["weights"])}
        evaluation = Evaluation.model_validate(metrics | about)
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
    return RunRecord(folder, config, rows, logged, evaluations, notes, tracked)


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


def flattened(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"dcr": {"epochs": 3}}` as `{"dcr.epochs": 3}`."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


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

    def __call__(self, evaluation: Evaluation, name: str) -> list[Answer]:
        """An evaluation's answers to a set. DataError for a damaged line."""
        path, counts = evaluation.folder / f"{name}.jsonl", evaluation.sets[name]
        if path in self.read:
            return self.read[path]
        if not path.is_file():
            self.notes.append(f"{path}: missing; no completions of it are shown or compared")
            return self.read.setdefault(path, [])
        answers = self.read[path] = [
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

    def masses(
        self, evaluation: Evaluation, name: str, ids: Sequence[str] | None
    ) -> list[float] | None:
        """The refusal masses of a set's prompts, from `openings` or else from their answers.

        None if one is unknown.
        """
        openings = evaluation.folder / "openings" / f"{name}.jsonl"
        if openings.is_file():
            by_id = {row.id: row.mass for row in storage.read_lines(openings, Opening)}
            masses = [by_id.get(identity) for identity in ids or by_id]
        elif name in evaluation.sets:
            masses = [answer.refusal_mass for answer in self(evaluation, name)]
        else:
            return None
        known = [mass for mass in masses if mass is not None]
        return known if len(known) == len(masses) else None
