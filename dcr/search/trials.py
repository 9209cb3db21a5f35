"""The trials of a search: an Optuna study in a database that worker processes share.

Optuna's heartbeat notices a trial whose worker was killed, on whichever machine, fails it and
enqueues its point again. The database may be another's, older or damaged: `read_trials` checks it.
"""

import functools
import math
import os
import shutil
import socket
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

import optuna
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import MaxTrialsCallback, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import NullPool, event
from sqlalchemy.exc import SQLAlchemyError

from dcr import launching, results, study
from dcr.core import config, ending, runs, storage
from dcr.core.config import STAGES, ConfigError, UserError
from dcr.core.evaluation import subjects
from dcr.core.runs import Cost
from dcr.core.text import single_line
from dcr.report.paper import SAFETY_SHARE
from dcr.search import OBJECTIVES, Search, Space, words_of
from dcr.search.drawings import EndedTrial
from dcr.study import Job, StudyError

PULSE = 10  # seconds between two heartbeats of a trial
SILENCE = 90  # seconds without a heartbeat after which a trial's worker counts as dead
LOCKED = 5.0  # seconds that SQLite waits for another process
SQLITE = "sqlite:///"
COMPLETE, FAIL, WAITING = TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING
with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
    enqueue_again = RetryHeartbeatStaleTrialCallback()

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Storage(RDBStorage):
    """Optuna's storage, for processes that share an SQLite file.

    A heartbeat outlives a database that is busy for longer than SQLite waits. Transactions take
    turns: SQLite locks no rows, so that two workers could take the same trial.
    """

    def __init__(self, url: str) -> None:
        options: dict[str, Any] = {"poolclass": NullPool}  # no connection outlives a fork
        if url.startswith(SQLITE):
            options["connect_args"] = {"timeout": LOCKED}
        super().__init__(
            url,
            options,
            heartbeat_interval=PULSE,
            grace_period=SILENCE,
            heartbeat_stale_trial_callback=enqueue_again,
        )
        if url.startswith(SQLITE):
            event.listen(self.engine, "connect", lambda c, _: setattr(c, "isolation_level", None))
            event.listen(self.engine, "begin", lambda c: c.exec_driver_sql("BEGIN IMMEDIATE"))

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(OptunaError, SQLAlchemyError):
            super().record_heartbeat(trial_id)


# --- the study ----------------------------------------------------------------------------------


@contextmanager
def _in_one_line(url: str) -> Iterator[None]:
    """Turn what Optuna raises over a database, any exception if it is damaged, into one line."""
    try:
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            yield
    except Exception as error:
        cause = error.__cause__ or error
        why = single_line(f"{type(cause).__name__} {cause}".strip(), longest=160)
        cure = f"give a URL that Optuna opens, such as {SQLITE}search.db, or restore a copy"
        if "is locked" in f"{error} {cause}":
            why = f"another program has held its lock for {LOCKED:g} s"
            cure = "end that, such as a database browser, and give the same command again"
        raise ConfigError(f"storage={single_line(url)}: {why}; {cure}") from error


def opened(search: Search, place: int = 0) -> optuna.Study:
    """The study of a search, made where it is not there yet.

    Its sampler is seeded by the worker's `place` and the number of trials. Raises ConfigError for
    a storage that cannot be opened.
    """
    with _in_one_line(search.url):
        shared = optuna.create_study(
            storage=Storage(search.url),
            study_name=search.name,
            directions=_directions(search),
            load_if_exists=True,
        )
    number = len(read_trials(search, shared))
    worker = f"{search.settings.seed}/{socket.gethostname()}/{place}/{number}"
    few = min(max(4, search.trials // 4), 10)  # a short search affords no more random trials
    shared.sampler = TPESampler(n_startup_trials=few, seed=zlib.crc32(worker.encode()))
    return shared


def _directions(search: Search) -> list[StudyDirection]:
    upwards = (OBJECTIVES[name].maximised for name in search.objectives)
    return [StudyDirection.MAXIMIZE if up else StudyDirection.MINIMIZE for up in upwards]


def read_trials(search: Search, shared: optuna.Study) -> list[FrozenTrial]:
    """The trials in the database, without those of killed workers, which were enqueued again.

    Raises ConfigError where this search cannot have made them.
    """
    with _in_one_line(search.url):
        trials, wrong = shared.get_trials(deepcopy=False), ""
        if shared.directions != _directions(search):
            wrong = "an objective has another direction"
        elif sorted(trial.number for trial in trials) != list(range(len(trials))):
            wrong = "trials are missing or there twice"
        trials = [t for t in trials if t.state is not FAIL or "fault" in t.user_attrs]
        for trial in trials:
            if not _possible(search, trial):
                wrong = wrong or f"trial {trial.number} has settings or values outside the search"
    if wrong:
        raise ConfigError(
            f"storage={single_line(search.url)}: {search.name}: {wrong}, so that it is damaged or "
            "was written by another program; restore it from a copy, or name another"
        )
    return trials


def _possible(search: Search, trial: FrozenTrial) -> bool:
    """Whether settings lie inside their spaces, and each value is one that its objective takes."""
    for key, value in trial.params.items():
        if key not in search.spaces or not search.spaces[key].holds(value):
            return False
    if trial.state is not COMPLETE:
        return trial.state is not TrialState.PRUNED
    values, most = trial.values or (), {True: 1.0, False: 1e300}  # what is maximised is a share
    highest = [most[OBJECTIVES[name].maximised] for name in search.objectives]
    whole = len(trial.params) == len(search.spaces) and len(values) == len(highest)
    return whole and all(0 <= value <= top for value, top in zip(values, highest, strict=True))


def ended_trials(search: Search, shared: optuna.Study) -> list[EndedTrial]:
    """Every trial that has ended."""
    ended = [trial for trial in read_trials(search, shared) if trial.state.is_finished()]
    whole = any(trial.state is COMPLETE for trial in ended)
    with _in_one_line(search.url):
        front = {trial.number for trial in shared.best_trials} if whole else set()
    return [
        EndedTrial(
            trial.number,
            trial.params,
            tuple(trial.values or ()),
            single_line(trial.user_attrs.get("fault", "")),
            front=trial.number in front,
            # the first that was enqueued, or the same after its worker was killed
            configured=trial.system_attrs.get("failed_trial", trial.number) == 0,
        )
        for trial in ended
    ]


def importances(shared: optuna.Study, objectives: Sequence[str]) -> dict[str, dict[str, float]]:
    """By objective, the share of its variance that each setting explains (fANOVA).

    An objective that is the same whatever is set is left out.
    """
    evaluator, found = optuna.importance.FanovaImportanceEvaluator(seed=0), {}
    for place, name in enumerate(objectives):
        with suppress(RuntimeError):  # no variance
            found[OBJECTIVES[name].words] = optuna.importance.get_param_importances(
                shared, evaluator=evaluator, target=lambda trial, place=place: trial.values[place]
            )
    return found


# --- workers ------------------------------------------------------------------------------------


def carry_out(search: Search, workers: int, point: Mapping[str, object]) -> optuna.Study:
    """Do all trials, `point` first, with so many workers here beside those of other commands."""
    shared = opened(search)
    with _in_one_line(search.url):
        if not shared.get_trials(deepcopy=False):
            shared.enqueue_trial(dict(point))
    while True:
        with _in_one_line(search.url):
            optuna.storages.fail_stale_trials(shared)
        trials = read_trials(search, shared)
        missing = max(search.trials - len(trials), 0) + sum(t.state is WAITING for t in trials)
        if missing:
            places = range(min(workers, missing))
            shares = [len(range(place, missing, len(places))) for place in places]
            study.in_fork(*(functools.partial(_work, search, p, shares[p]) for p in places))
        elif all(trial.state.is_finished() for trial in trials):
            return shared
        else:  # another command's, or one that was killed
            for trial in trials:
                _forget_unbegun(search, shared, trial)
            time.sleep(ending.PATIENCE)


def _forget_unbegun(search: Search, shared: optuna.Study, trial: FrozenTrial) -> None:
    """Enqueue a trial again whose worker was killed before its first heartbeat."""
    began = trial.datetime_start
    if began is None or trial.state.is_finished() or len(trial.params) == len(search.spaces):
        return
    if (datetime.now() - began).total_seconds() > SILENCE:
        with _in_one_line(search.url):
            shared.tell(trial.number, state=FAIL)
            enqueue_again(shared, trial)


def _work(search: Search, place: int, number: int) -> None:
    """Do `number` trials one after the other, or fewer if other commands do the rest."""
    if gpus := launching.gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    shared, objective = opened(search, place), functools.partial(_objective, search)
    try:
        enough = MaxTrialsCallback(search.trials)
        shared.optimize(objective, n_trials=number, catch=(UserError,), callbacks=[enough])
    except (OptunaError, SQLAlchemyError):
        with _in_one_line(search.url):
            raise
    except ValueError as error:  # this machine slept, and another has the trial now
        if "Cannot tell a" not in str(error):
            raise
        print("a trial was taken over by another worker", flush=True)


def _objective(search: Search, trial: Trial) -> Sequence[float]:
    point = {key: _suggested(trial, key, space) for key, space in search.spaces.items()}
    print(f"[trial {trial.number}] {' '.join(words_of(point, short=True))}", flush=True)
    try:
        values = _measured(search, search.trial(point))
    except UserError as fault:
        trial.set_user_attr("fault", single_line(fault))
        print(f"[trial {trial.number}] failed: {single_line(fault)}", flush=True)
        raise
    except KeyboardInterrupt:
        enqueue_again(trial.study, trial.study.get_trials(deepcopy=False)[trial.number])
        raise
    if trial.study.get_trials(deepcopy=False)[trial.number].state is FAIL:
        raise StudyError("another worker has the trial, since heartbeats were missing")
    measured = (
        f"{name} {value:.4g}" for name, value in zip(search.objectives, values, strict=True)
    )
    print(f"[trial {trial.number}] {', '.join(measured)}", flush=True)
    return values


def _suggested(trial: Trial, key: str, space: Space) -> object:
    if space.choices:
        return trial.suggest_categorical(key, space.choices)
    if isinstance(space.low, int):
        return trial.suggest_int(key, space.low, int(space.high), log=space.log)
    return trial.suggest_float(key, space.low, space.high, log=space.log)


def _measured(search: Search, job: Job) -> list[float]:
    """The value of each objective, measured once for all trials of a point; then its weights go.

    Hundreds of trials fill a disk, and the chosen point is trained anew. Raises StudyError for a
    fault.
    """
    run = job.run
    file = run.folder / f"{search.name}.json"
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{run.folder}.lock"):  # a trial of the same point waits
        if not file.exists():
            for part in job.parts():
                if not part.done():
                    study.in_fork(part.work)
            storage.write_json(file, _values(search, job))
        for place in (*(stage.value for stage in STAGES), "snapshots", "checkpoints"):
            shutil.rmtree(run.folder / place, ignore_errors=True)
    return storage.read_json(file, list[float], f"delete {file}")


def _values(search: Search, job: Job) -> list[float]:
    """Each objective by the files of a run that is done. Raises StudyError where one is missing."""
    run, (evaluating,) = job.run, job.evaluations
    folder = subjects.final(evaluating, run).folder
    found, metrics = results.read(folder / "metrics.json"), runs.read_metrics(run)
    assert job.training is not None
    stages = [stage.value for stage in config.stages_of(job.training)]
    costs = {stage: storage.read_json(run.cost_file(stage), Cost) for stage in stages}
    nll = [row["value"] for row in metrics if row["key"] == "sft/nll/general/heldout"]
    scores = [task.acc for task in found.ability.values() if task.acc is not None]
    ranked = found.discernment and found.discernment.pooled
    values = {
        "auroc": ranked.auroc[0] if ranked else None,
        "answered": ranked.answered[str(SAFETY_SHARE)][0] if ranked else None,
        "nll": nll[-1] if nll else None,
        "ability": sum(scores) / len(scores) if scores else None,
        "seconds": sum(c.device_seconds * c.of_all_steps(s, metrics) for s, c in costs.items()),
    }
    wanted = [value for name in search.objectives if (value := values[name]) is not None]
    if len(wanted) < len(search.objectives) or not all(map(math.isfinite, wanted)):
        raise StudyError(f"{folder} does not tell all of {', '.join(search.objectives)}")
    return wanted
