"""The trials of a search: an Optuna study in a database that worker processes share.

Optuna's heartbeat notices a trial whose worker was killed, on whichever machine, fails it and
enqueues its point again. What a database tells is checked in one place, `read`, since it may be
another's, older or damaged.
"""

import functools
import math
import multiprocessing
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
from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import NullPool, event
from sqlalchemy.exc import SQLAlchemyError

from dcr import launching, study
from dcr.core import ending, results, runs, storage
from dcr.core.config import ConfigError, UserError
from dcr.core.evaluation import subjects
from dcr.core.runs import Cost, Run
from dcr.core.text import single_line
from dcr.report.searches import Tried
from dcr.report.studies import SAFETY
from dcr.search import OBJECTIVES, Search, Space, words_of
from dcr.study import Job, Told

PULSE = 10  # seconds between two heartbeats of a trial
SILENCE = 90  # seconds without one from which on its worker is taken for dead
LOCKED = 5.0  # seconds that SQLite waits for another process
SQLITE = "sqlite:///"
STAGES = ("contrastive", "sft")
COMPLETE, FAIL, WAITING = TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING
with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
    RETRY = RetryHeartbeatStaleTrialCallback()

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Storage(RDBStorage):
    """Optuna's, whose heartbeat survives a database that is busy for longer than it waits, and
    whose transactions take turns on SQLite: it locks no rows, so that two workers could take the
    same trial.
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
            heartbeat_stale_trial_callback=RETRY,
        )
        if url.startswith(SQLITE):
            event.listen(self.engine, "connect", lambda c, _: setattr(c, "isolation_level", None))
            event.listen(self.engine, "begin", lambda c: c.exec_driver_sql("BEGIN IMMEDIATE"))

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(OptunaError, SQLAlchemyError):
            super().record_heartbeat(trial_id)


# --- the study ----------------------------------------------------------------------------------


@contextmanager
def _in_words(url: str) -> Iterator[None]:
    """Turn what Optuna raises over a database into one line: any exception, if it is damaged."""
    try:
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            yield
    except Exception as error:
        if "is locked" in f"{error} {error.__cause__}":
            why = (
                f"another program has held its lock for {LOCKED:g} s; end that, such as a database "
                "browser or a command that hangs, and give the same command again"
            )
        else:
            cause = error.__cause__ or error
            told = single_line(f"{type(cause).__name__} {cause}".strip(), longest=160)
            why = (
                f"{told}; give an URL that Optuna opens, such as {SQLITE}search.db, or restore the "
                "database from a copy"
            )
        raise ConfigError(f"storage={single_line(url)}: {why}") from error


def opened(search: Search, place: int = 0) -> optuna.Study:
    """The study, made where it is not there; sampling is seeded by worker and what is known.

    Raises ConfigError for a storage that cannot be opened.
    """
    with _in_words(search.url):
        known = optuna.create_study(
            storage=Storage(search.url),
            study_name=search.name,
            directions=_directions(search),
            load_if_exists=True,
        )
    worker = f"{search.settings.seed}/{socket.gethostname()}/{place}/{len(read(search, known))}"
    few = min(max(4, search.trials // 4), 10)  # a short search affords no more
    known.sampler = TPESampler(n_startup_trials=few, seed=zlib.crc32(worker.encode()))
    return known


def _directions(search: Search) -> list[StudyDirection]:
    upwards = (OBJECTIVES[name].maximised for name in search.objectives)
    return [StudyDirection.MAXIMIZE if up else StudyDirection.MINIMIZE for up in upwards]


def read(search: Search, known: optuna.Study) -> list[FrozenTrial]:
    """The trials as the database has them now, but for those that a worker left: they were enqueued
    again.

    Raises ConfigError for what no trial of this search can be.
    """
    with _in_words(search.url):
        trials = known.get_trials(deepcopy=False)
        wrong = (
            "" if known.directions == _directions(search) else "an objective has another direction"
        )
        if sorted(trial.number for trial in trials) != list(range(len(trials))):
            wrong = "trials are missing or there twice"
        trials = [t for t in trials if t.state is not FAIL or "fault" in t.user_attrs]
        if trials and not any("configured" in trial.user_attrs for trial in trials):
            wrong = wrong or "no trial is marked as the point as configured"
        for trial in trials:
            wrong = wrong or _wrong(search, trial)
    if wrong:
        raise ConfigError(
            f"storage={single_line(search.url)}: {search.name}: {wrong}, so that it is damaged or "
            "was written by another program; restore it from a copy, or name another"
        )
    return trials


def _wrong(search: Search, trial: FrozenTrial) -> str:
    """What a trial says that it cannot, empty if nothing."""
    said = f"trial {trial.number} "
    if trial.state is TrialState.PRUNED:
        return f"{said}was pruned"
    for key, value in trial.params.items():
        if key not in search.spaces or not search.spaces[key].holds(value):
            return f"{said}has {single_line(f'{key}={value}', longest=60)}"
    if trial.state is COMPLETE:
        if absent := sorted(search.spaces.keys() - trial.params.keys()):
            return f"{said}has no {absent[0]}"
        if len(trial.values or ()) != len(search.objectives):
            return f"{said}has {len(trial.values or ())} values"
        for name, value in zip(search.objectives, trial.values, strict=True):
            # what is maximised is a share
            if not (0 <= value < math.inf) or (OBJECTIVES[name].maximised and value > 1):
                return f"{said}has {name}={value:g}"
    return ""


def tried(search: Search, known: optuna.Study) -> list[Tried]:
    """Every trial that has ended."""
    ended = [trial for trial in read(search, known) if trial.state.is_finished()]
    whole = any(trial.state is COMPLETE for trial in ended)
    with _in_words(search.url):
        front = {trial.number for trial in known.best_trials} if whole else set()
    found = []
    for trial in ended:
        marks = ["front"] * (trial.number in front)
        marks += ["configured"] * ("configured" in trial.user_attrs)
        how = "failed" if trial.state is FAIL else "complete"
        fault = single_line(trial.user_attrs.get("fault", ""))
        values = tuple(trial.values or ())
        found.append(Tried(trial.number, how, trial.params, values, frozenset(marks), fault))
    return found


def importances(known: optuna.Study, objectives: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of every objective the share of its variance that each setting explains (fANOVA); none of
    one that is the same whatever is set.
    """
    evaluator, found = optuna.importance.FanovaImportanceEvaluator(seed=0), {}
    for place, name in enumerate(objectives):
        with suppress(RuntimeError):  # no variance
            found[OBJECTIVES[name].words] = optuna.importance.get_param_importances(
                known, evaluator=evaluator, target=lambda trial, place=place: trial.values[place]
            )
    return found


# --- workers ------------------------------------------------------------------------------------


def carry_out(search: Search, workers: int, point: Mapping[str, object]) -> optuna.Study:
    """All trials, by so many workers here and what others do elsewhere; `point` is the first."""
    known = opened(search)
    with _in_words(search.url):
        if not known.get_trials(deepcopy=False):
            known.enqueue_trial(dict(point), user_attrs={"configured": True})
    while True:
        with _in_words(search.url):
            optuna.storages.fail_stale_trials(known)
        trials = read(search, known)
        missing = search.trials - len(trials)
        missing = max(missing, 0) + sum(trial.state is WAITING for trial in trials)
        if missing:
            left = multiprocessing.get_context("fork").Semaphore(missing)
            places = range(min(workers, missing))
            study.in_fork(*(functools.partial(_work, search, place, left) for place in places))
        elif all(trial.state.is_finished() for trial in trials):
            return known
        else:  # another command's, or one that was killed
            _forget_unbegun(search, known, trials)
            time.sleep(ending.PATIENCE)


def _forget_unbegun(search: Search, known: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
    """Enqueue again what a worker took right before it was killed, without its first heartbeat."""
    for trial in trials:
        began = trial.datetime_start
        if began is None or trial.state.is_finished() or len(trial.params) == len(search.spaces):
            continue
        if (datetime.now() - began).total_seconds() > SILENCE:
            with _in_words(search.url):
                known.tell(trial.number, state=FAIL)
                RETRY(known, trial)


def _work(search: Search, place: int, left: Any) -> None:
    """One worker: trial after trial, as long as any are `left`."""
    if gpus := launching.gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    known = opened(search, place)
    objective = functools.partial(_objective, search)
    while left.acquire(block=False):
        try:
            known.optimize(objective, n_trials=1, catch=(UserError,))
        except (OptunaError, SQLAlchemyError):
            with _in_words(search.url):
                raise
        except ValueError as error:  # where this machine slept, and another has the trial now
            if "Cannot tell a" not in str(error):
                raise
            print("a trial was taken over by another worker", flush=True)


def _objective(search: Search, trial: Trial) -> Sequence[float]:
    def say(told: str) -> None:
        print(f"[trial {trial.number}] {told}", flush=True)

    point = {key: _suggested(trial, key, space) for key, space in search.spaces.items()}
    say(" ".join(words_of(point, short=True)))
    try:
        twin = _twin(search, trial)
        values = _measured(search, search.trial(point)) if twin is None else twin.values
    except UserError as fault:
        trial.set_user_attr("fault", single_line(fault))
        say(f"failed: {single_line(fault)}")
        raise
    except KeyboardInterrupt:
        RETRY(trial.study, trial.study.get_trials(deepcopy=False)[trial.number])
        raise
    if trial.study.get_trials(deepcopy=False)[trial.number].state is FAIL:
        raise Told("another worker has it, after heartbeats were missing", 1)
    told = ", ".join(
        f"{name} {value:.4g}" for name, value in zip(search.objectives, values, strict=True)
    )
    say(told if twin is None else f"as trial {twin.number}: {told}")
    return values


def _suggested(trial: Trial, key: str, space: Space) -> object:
    if space.choices:
        return trial.suggest_categorical(key, space.choices)
    if isinstance(space.low, int):
        return trial.suggest_int(key, space.low, int(space.high), log=space.log)
    return trial.suggest_float(key, space.low, space.high, log=space.log)


def _twin(search: Search, trial: Trial) -> FrozenTrial | None:
    """An earlier trial of the same point, waited for where it is under way."""
    while twins := [
        t
        for t in read(search, trial.study)
        if t.number < trial.number and t.params == trial.params and t.state is not FAIL
    ]:
        if done := [t for t in twins if t.state is COMPLETE]:
            return done[0]
        time.sleep(ending.PATIENCE)
    return None


def _measured(search: Search, job: Job) -> list[float]:
    """The value of each objective, once all of a run is done; Told for a fault."""
    for part in job.parts():
        if not part.done():
            study.in_fork(part.work)
    values = _values(search, job)
    _forget_weights(job.run)
    return values


def _values(search: Search, job: Job) -> list[float]:
    """Each objective as the files of a run that is done tell it; Told where one is missing."""
    run, (evaluating,) = job.run, job.evaluations
    folder = subjects.answers_folder(evaluating, run, subjects.final(run))
    found, metrics = results.read(folder / "metrics.json"), runs.read_metrics(run)
    costs = {stage: storage.read_json(run.cost_file(stage), Cost) for stage in STAGES}
    spent = (cost.device_seconds * cost.of_all_steps(of, metrics) for of, cost in costs.items())
    nll = [row["value"] for row in metrics if row["key"] == "sft/nll/general/heldout"]
    scores = [task.acc for task in found.ability.values() if task.acc is not None]
    ranked = found.discernment and found.discernment.pooled
    values = {
        "auroc": ranked.auroc[0] if ranked else None,
        "answered": ranked.answered[str(SAFETY)][0] if ranked else None,
        "nll": nll[-1] if nll else None,
        "ability": sum(scores) / len(scores) if scores else None,
        "seconds": sum(spent),
    }
    wanted = [value for name in search.objectives if (value := values[name]) is not None]
    if len(wanted) < len(search.objectives) or not all(map(math.isfinite, wanted)):
        raise Told(f"{folder} does not tell all of {', '.join(search.objectives)}", 1)
    return wanted


def _forget_weights(run: Run) -> None:
    """Of what was measured: hundreds of trials fill a disk, and the chosen point is retrained."""
    for place in (*STAGES, "snapshots", "checkpoints"):
        shutil.rmtree(run.folder / place, ignore_errors=True)
