"""The trials of a search: an Optuna study in a journal that worker processes share."""

import functools
import math
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress

import optuna
import pandas as pd
from filelock import FileLock
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from dcr import launching, results, study
from dcr.core import runs, storage
from dcr.core.config import STAGES, DataError, UserError
from dcr.core.config.training import stages_of
from dcr.core.evaluation import subjects
from dcr.ending import single_line
from dcr.report.paper import SAFETY_SHARE
from dcr.search import OBJECTIVES, Search, Space, words_of
from dcr.stages import Cost
from dcr.study import Job, StudyError

optuna.logging.set_verbosity(optuna.logging.ERROR)


def opened(search: Search, place: int = 0) -> optuna.Study:
    """The study of a search, made where it is not there yet.

    Its sampler is seeded by the worker's `place` and the number of trials. Raises DataError for a
    damaged journal.
    """
    if search.journal.exists() and not search.journal.is_file():
        raise DataError(f"{search.journal}: is no file; name another folder with out=")
    try:
        shared = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(search.journal))),
            study_name=search.name,
            directions=[
                "maximize" if OBJECTIVES[name] else "minimize" for name in search.objectives
            ],
            load_if_exists=True,
        )
        number = len(shared.trials)
    except OSError:
        raise
    except Exception as error:  # whatever Optuna stumbles over
        raise DataError(
            f"{search.journal}: damaged ({type(error).__name__}: {single_line(error)}); restore "
            "it from a copy, or delete it: trials that are measured are not measured again"
        ) from error
    worker = f"{search.settings.seed}/{place}/{number}"
    few = min(max(4, search.trials // 4), 10)  # a short search affords no more random trials
    shared.sampler = TPESampler(n_startup_trials=few, seed=zlib.crc32(worker.encode()))
    return shared


def _drop_torn_line(search: Search) -> None:
    """Cuts what a kill left of a line: Optuna skips it last, and stumbles over it in the middle."""
    if search.journal.is_file():
        written = search.journal.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]
        if whole != written:
            storage.write_bytes(search.journal, whole)


def carry_out(search: Search, workers: int, point: Mapping[str, object]) -> optuna.Study:
    """Do all trials, `point` first if it is one of the spaces.

    A part of a point would be filled up by chance, and be called configured. No other command may
    do trials of the same folder meanwhile.
    """
    _drop_torn_line(search)
    shared = opened(search)
    if not shared.trials and point.keys() == search.spaces.keys():
        shared.enqueue_trial(dict(point), user_attrs={"configured": True})
    for trial in shared.get_trials(states=[TrialState.RUNNING]):  # of a command that was killed
        shared.tell(trial.number, state=TrialState.FAIL)
        _give_back(shared, trial.number)
    if (missing := search.trials - len(ended(shared))) > 0:
        places = range(min(workers, missing))
        shares = [len(range(place, missing, len(places))) for place in places]
        study.in_fork(*(functools.partial(_work, search, p, shares[p]) for p in places))
    return opened(search)


def _give_back(shared: optuna.Study, number: int) -> None:
    """Enqueue the point of a trial that was stopped."""
    trial = shared.get_trials(deepcopy=False)[number]
    point = trial.system_attrs.get("fixed_params", {}) | trial.params
    shared.enqueue_trial(point, user_attrs=trial.user_attrs)


def ended(shared: optuna.Study) -> list[FrozenTrial]:
    """Every trial that has ended, without those that were killed and enqueued again."""
    return [
        trial
        for trial in shared.get_trials(deepcopy=False)
        if trial.state is TrialState.COMPLETE or "fault" in trial.user_attrs
    ]


def table(search: Search, shared: optuna.Study) -> pd.DataFrame:
    """A row for each trial that has ended; it has the value of each objective if it did not fail.

    `front` marks the Pareto front, `configured` the settings as configured.
    """
    front = {trial.number for trial in shared.best_trials}
    rows = [
        {
            "trial": trial.number,
            "ended": trial.state.name.lower().replace("fail", "failed"),
            "front": trial.number in front,
            "configured": trial.user_attrs.get("configured", False),
            **{key: trial.params.get(key) for key in search.spaces},
            **dict(zip(search.objectives, trial.values or (), strict=False)),
            "fault": single_line(trial.user_attrs.get("fault", "")),
        }
        for trial in ended(shared)
    ]
    return pd.DataFrame(rows)


def importances(shared: optuna.Study, objectives: Sequence[str]) -> dict[str, dict[str, float]]:
    """By objective, the share of its variance that each setting explains (fANOVA).

    An objective that is the same whatever is set is left out.
    """
    evaluator, found = optuna.importance.FanovaImportanceEvaluator(seed=0), {}
    for place, name in enumerate(objectives):
        with suppress(RuntimeError):  # no variance
            found[name] = optuna.importance.get_param_importances(
                shared, evaluator=evaluator, target=lambda trial, place=place: trial.values[place]
            )
    return found


def _work(search: Search, place: int, number: int) -> None:
    """Do `number` trials one after the other."""
    if gpus := launching.gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    objective = functools.partial(_objective, search)
    opened(search, place).optimize(objective, n_trials=number, catch=(UserError,))


def _objective(search: Search, trial: Trial) -> Sequence[float]:
    point = {key: _suggested(trial, key, space) for key, space in search.spaces.items()}
    print(f"[trial {trial.number}] {' '.join(words_of(point, short=True))}", flush=True)
    try:
        values = _measured(search, search.trial(point))
    except UserError as fault:
        trial.set_user_attr("fault", single_line(fault))
        print(f"[trial {trial.number}] failed: {single_line(fault)}", flush=True)
        raise
    except KeyboardInterrupt:  # for which Optuna fails the trial
        _give_back(trial.study, trial.number)
        raise
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
    # The lock of the search's folder keeps other commands out, not two workers of this one from the
    # same point: the second waits, where `storage.locked` would fail it.
    with FileLock(f"{run.folder}.lock"):
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
    stages = [stage.value for stage in stages_of(job.training)]
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
