"""A search over the settings of stage one: the Pareto front of discernment, ability and cost.

This module has the spaces of a search, its validation prompts of another origin than the training
rows, the run of a point, and the trials: an Optuna study in a journal that worker processes share.
"""

import itertools
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from dcr import cli, continuing, launching, study
from dcr.choice import origins
from dcr.choice.origins import SourcePair
from dcr.core import config, data, runs, storage
from dcr.core.config import STAGES, ConfigError, DataError, UserError
from dcr.core.config.training import AUTO_LAYER, TrainConfig, block_of, stages_of
from dcr.ending import single_line
from dcr.public import SOURCES
from dcr.stages import Cost
from dcr.study import Job, StudyError

if TYPE_CHECKING:
    from optuna import Study, Trial

NUMBER = r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
RANGE = re.compile(rf"{NUMBER}\.\.{NUMBER}(:log)?")
GRAMMAR = "give low..high with low below high, low..high:log with both above 0, or a,b,c"
JOURNAL = "search.journal"
HELD_OUT = "contrasts_seemingly_toxic_heldout:contrasts_toxic_heldout"
QUIET = "trainer.progress=false"  # several workers share one terminal
FIXED = {*continuing.FREE_KEYS, "seed"}  # keys that no trial varies
OBJECTIVES = ("auroc", "answered", "nll", "ability", "seconds")
MAXIMISED = {"auroc", "answered", "ability"}


@dataclass(frozen=True)
class Space:
    """The values of one setting: an interval (of integers if both ends are) or choices in words."""

    written: str
    low: float = 0
    high: float = 0
    log: bool = False
    choices: tuple[str, ...] = ()

    def holds(self, value: object) -> bool:
        if self.choices or not isinstance(value, (int, float)):
            return str(value) in self.choices
        return self.low <= value <= self.high and value == type(self.low)(value)

    def suggested(self, trial: "Trial", key: str) -> object:
        if self.choices:
            return trial.suggest_categorical(key, self.choices)
        if isinstance(self.low, int):
            return trial.suggest_int(key, self.low, int(self.high), log=self.log)
        return trial.suggest_float(key, self.low, self.high, log=self.log)


def parsed(words: Sequence[str]) -> tuple[dict[str, Space], list[str]]:
    """The spaces by setting, and the words that fix a value; the last word of each key counts.

    Raises ConfigError for a malformed space.
    """
    spaces, fixed = dict[str, Space](), list[str]()
    for key, word in {word.partition("=")[0]: word for word in words}.items():
        value = word.removeprefix(f"{key}=")
        if match := RANGE.fullmatch(value):
            whole = not re.search("[.eE]", match[1] + match[2])
            low, high = ((int if whole else float)(end) for end in match.groups()[:2])
            if not low < high < math.inf or (match[3] and low <= 0):
                raise ConfigError(f"{word}: {GRAMMAR}")
            spaces[key] = Space(value, low, high, bool(match[3]))
        elif re.match(r"[-+\d.]*\d\.\.", value):
            raise ConfigError(f"{word}: {GRAMMAR}")
        elif len(combined := cli.combinations([word])) > 1:
            choices = tuple(one.removeprefix(f"{key}=") for (one,) in combined)
            spaces[key] = Space(value, choices=choices)
        else:
            fixed.append(word)
    return spaces, fixed


def usual(settings: TrainConfig) -> list[str]:
    """The default spaces around these settings, as a user would write them."""
    from dcr.core import models

    stage_one, depth = settings.dcr, models.facts(settings.model).depth
    words = [
        f"dcr.layer={max(1, round(0.3 * depth))}..{round(0.8 * depth)}",
        "dcr.margin=0.1..0.4",
        "dcr.scale=8..64:log",
        f"dcr.epochs=1..{stage_one.epochs + 2}",
        "dcr.nll.weight=1e-4..1e-1:log",
        f"dcr.optim.lr={stage_one.optim.lr / 5:g}..{stage_one.optim.lr * 5:g}:log",
    ]
    if stage_one.ratio is not None:
        rows = data.rows_of(replace(settings, dcr=replace(stage_one, ratio=None)))
        most = min(5, math.floor(10 * len(rows.toxic) / len(rows.seemingly_toxic)) / 10)
        words += [f"dcr.ratio=1.0..{most}"] if most > 1 else []
    return words if depth > 1 else words[1:]


def validation_of(settings: TrainConfig, asked: str | None) -> SourcePair:
    """The sets that trials are measured on: those `asked`, or the first usual pair that serves.

    Raises ConfigError for a set that is trained or tested on.
    """
    if asked is not None:
        if len(pairs := origins.parsed("validation", asked)) != 1:
            raise ConfigError(f"validation={asked}: give one pair, <seemingly toxic>:<toxic>")
        return _unseen(settings, pairs[0])
    for pair in (*origins.parsed("", HELD_OUT), *origins.usual_tests(settings.data).values()):
        with suppress(ConfigError):
            return _unseen(settings, pair)
    cure = "name another pair with validation=<seemingly toxic>:<toxic>"
    raise ConfigError(f"validation: every usual set is trained or tested on; {cure}")


def _unseen(settings: TrainConfig, pair: SourcePair) -> SourcePair:
    nodes, phase = ("seemingly_toxic", "toxic", "safety", "normal"), settings.sft.readout
    trained = {name for node in nodes for name in getattr(settings.data, node).source}
    trained |= {*phase.seemingly_toxic, *phase.toxic} if phase.steps else set()
    # the held-out part of an embedded corpus has the corpus's origin
    corpora = {name: of.embedded.split("/")[0] for name, of in SOURCES.items() if of.embedded}
    own = {corpora[name] for name in trained if name in corpora}
    if origins.related(pair.names, trained) or own & {corpora.get(name) for name in pair.names}:
        raise ConfigError(f"validation={pair}: has the origin of the training rows; name another")
    tested = {*settings.data.evaluation.over_refusal, *settings.data.evaluation.safety}
    if both := pair.names & tested:
        raise ConfigError(f"validation={pair}: data.evaluation tests on {min(both)}; name another")
    return pair


@dataclass(frozen=True)
class Search:
    """The spaces, objectives and settings of a search, and the place of its files."""

    out: Path
    spaces: Mapping[str, Space]
    objectives: tuple[str, ...]
    settings: TrainConfig
    training: tuple[str, ...]
    evaluating: tuple[str, ...]
    validation: SourcePair
    trials: int

    @property
    def name(self) -> str:
        """The study's name, by which the same command finds its own in the journal."""
        settings, spaces = config.plain(self.settings), {k: vars(s) for k, s in self.spaces.items()}
        files = study.own_files([settings, sorted(self.validation.names)])
        what = [continuing.binding(settings), spaces, self.objectives, self.evaluating, files]
        return f"search-{storage.fingerprint([*what, str(self.validation)])}"

    @property
    def configured(self) -> dict[str, object]:
        """The settings as a point of the spaces, without those that lie outside their space."""
        from dcr.core import models
        from dcr.report.records import flattened

        values = flattened(config.plain(self.settings))
        if self.settings.dcr.layer != AUTO_LAYER:
            depth = models.facts(self.settings.model).depth
            values["dcr.layer"] = block_of(self.settings.dcr, depth)
        return {
            key: str(value) if space.choices else value
            for key, space in self.spaces.items()
            if space.holds(value := values.get(key))
        }

    def trial(self, point: Mapping[str, object]) -> Job:
        """The run of a point, measured on the validation prompts."""
        training, evaluating = [QUIET, *self.training], [QUIET, *self.evaluating]
        tested, pair = self.settings.data.evaluation, self.validation
        listed = partial(json.dumps, ensure_ascii=False)
        for side, names in (("over_refusal", pair.seemingly_toxic), ("safety", pair.toxic)):
            # training drops rows near any of both, so that all runs learn from the same rows
            both = [*getattr(tested, side), *names]
            training.append(f"data.evaluation.{side}={listed(both)}")
            evaluating.append(f"data.evaluation.{side}={listed(names)}")
        training += [f"{key}={value}" for key, value in point.items()]
        tasks = "discernment,ability" if "ability" in self.objectives else "discernment"
        evaluating.append(f"tasks=[{tasks}]")
        return study.job_of(self.out / "trials", "trial", training, evaluating)

    def corners(self) -> list[Job]:
        """Trials that together have both ends of every space and every choice."""
        ends = [space.choices or (space.low, space.high) for space in self.spaces.values()]
        points = ([of[min(i, len(of) - 1)] for of in ends] for i in range(max(map(len, ends))))
        return [self.trial(dict(zip(self.spaces, point, strict=True))) for point in points]


def carry_out(search: Search, workers: int) -> list[dict[str, Any]]:
    """Do the trials that are missing, the configured point first, and give the rows of all.

    A point that is configured in part would be filled up by chance, so it is not tried. No other
    command may do trials of the same folder meanwhile. Raises DataError for a damaged journal.
    """
    from optuna.trial import TrialState

    journal = search.out / JOURNAL
    if journal.is_file() and not (written := journal.read_bytes()).endswith(b"\n"):
        # a kill left a part of a line, behind which Optuna could read no other
        storage.write_bytes(journal, written[: written.rfind(b"\n") + 1])
    shared, configured = opened(search), search.configured
    if not shared.trials and configured.keys() == search.spaces.keys():
        shared.enqueue_trial(configured, user_attrs={"configured": True})
    for trial in shared.get_trials(states=[TrialState.RUNNING]):  # of a command that was killed
        point = trial.system_attrs.get("fixed_params", {}) | trial.params
        shared.enqueue_trial(point, user_attrs=trial.user_attrs)
        shared.tell(trial.number, state=TrialState.FAIL)
    missing = search.trials - len(table(search, shared))
    shares = [len(range(place, missing, workers)) for place in range(min(workers, missing))]
    study.in_fork(*(partial(_work, search, *share) for share in enumerate(shares)))
    return table(search, shared)


def opened(search: Search, place: int = 0) -> "Study":
    """The study of a search, new or as its journal has it. Raises DataError for a damaged one."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    journal = search.out / JOURNAL
    try:
        shared = optuna.create_study(
            storage=optuna.storages.JournalStorage(JournalFileBackend(str(journal))),
            study_name=search.name,
            directions=["maximize" if n in MAXIMISED else "minimize" for n in search.objectives],
            load_if_exists=True,
        )
        seed = zlib.crc32(f"{search.settings.seed}/{place}/{len(shared.trials)}".encode())
    except OSError:
        raise
    except Exception as error:  # whatever Optuna stumbles over
        raise DataError(
            f"{journal}: damaged ({type(error).__name__}: {single_line(error)}); restore "
            "it from a copy, or delete it: trials that are measured are not measured again"
        ) from error
    few = min(max(4, search.trials // 4), 10)  # a short search affords no more random trials
    shared.sampler = optuna.samplers.TPESampler(n_startup_trials=few, seed=seed)
    return shared


def table(search: Search, shared: "Study") -> list[dict[str, Any]]:
    """A row for each trial that has ended, but not for those that were stopped and enqueued again.

    `front` marks the Pareto front, `configured` the settings as configured.
    """
    front = {trial.number for trial in shared.best_trials}
    return [
        {
            "trial": trial.number,
            "ended": trial.state.name.lower().replace("fail", "failed"),
            "front": trial.number in front,
            "configured": trial.user_attrs.get("configured", False),
            **{key: trial.params.get(key) for key in search.spaces},
            **dict(zip(search.objectives, trial.values or itertools.repeat(None), strict=False)),
            "fault": single_line(trial.user_attrs.get("fault", "")),
        }
        for trial in shared.get_trials(deepcopy=False)
        if trial.state.name == "COMPLETE" or "fault" in trial.user_attrs
    ]


def _work(search: Search, place: int, number: int) -> None:
    """Do `number` trials one after the other."""
    if gpus := launching.gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    opened(search, place).optimize(partial(_objective, search), n_trials=number, catch=(UserError,))


def _objective(search: Search, trial: "Trial") -> Sequence[float]:
    point = {key: space.suggested(trial, key) for key, space in search.spaces.items()}
    print(f"[trial {trial.number}] {shown(point)}", flush=True)
    try:
        values = _measured(search, search.trial(point))
    except UserError as fault:
        trial.set_user_attr("fault", single_line(fault))
        print(f"[trial {trial.number}] failed: {single_line(fault)}", flush=True)
        raise
    except KeyboardInterrupt:  # Optuna would fail the trial, which now stays as a kill leaves it
        raise SystemExit(1) from None
    told = shown(dict(zip(search.objectives, values, strict=True)))
    print(f"[trial {trial.number}] {told}", flush=True)
    return values


def shown(point: Mapping[str, object]) -> str:
    """Settings or values for the eye, numbers rounded."""
    short = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in point.items()}
    return " ".join(f"{key}={value}" for key, value in short.items())


def _measured(search: Search, job: Job) -> list[float]:
    """The value of each objective, measured once for all trials of a point; then its weights go."""
    folder = job.run.folder
    file = folder / f"{search.name}.json"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # of two workers at the same point, the second waits
        if not file.exists():
            for part in job.parts():
                if not part.done():
                    study.in_fork(part.work)
            storage.write_json(file, _values(search, job))
        for place in (*(stage.value for stage in STAGES), "snapshots", "checkpoints"):
            shutil.rmtree(folder / place, ignore_errors=True)
    return storage.read_json(file, list[float], f"delete {file}")


def _values(search: Search, job: Job) -> list[float]:
    """Each objective by the files of a run that is done. Raises StudyError where one is missing."""
    from dcr import eval as evaluation
    from dcr import results
    from dcr.core.evaluation import subjects
    from dcr.report.paper import SAFETY_SHARE

    run, (evaluating,) = job.run, job.evaluations
    settled, _ = evaluation.settle_precision(evaluating, run.precisions())
    folder = subjects.final(settled, run).folder
    found, metrics = results.read(folder / "metrics.json"), runs.read_metrics(run)
    assert job.training is not None
    stages = [stage.value for stage in stages_of(job.training)]
    costs = {stage: storage.read_json(run.cost_file(stage), Cost) for stage in stages}
    nll = [row["value"] for row in metrics if row["key"] == "sft/nll/general/heldout"]
    scores = [task.acc for task in found.ability.values() if task.acc is not None]
    ranked = found.discernment and found.discernment.pooled
    values = {
        "auroc": ranked.auroc[0] if ranked else math.nan,
        "answered": ranked.answered[str(SAFETY_SHARE)][0] if ranked else math.nan,
        "nll": nll[-1] if nll else math.nan,
        "ability": sum(scores) / len(scores) if scores else math.nan,
        "seconds": sum(c.device_seconds * c.of_all_steps(s, metrics) for s, c in costs.items()),
    }
    wanted = [values[name] for name in search.objectives]
    if not all(map(math.isfinite, wanted)):
        raise StudyError(f"{folder} does not tell all of {', '.join(search.objectives)}")
    return wanted
