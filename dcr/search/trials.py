"""The trials of a search: an Optuna study that worker processes share, each one trial at a time.

SQLite has no row locks, so that two workers could take one waiting trial: they take turns by a lock
beside the file. A worker's sign of life stands in its trial; one that stays silent is taken for
dead, whatever its machine, and its trial is failed and enqueued again.

Optuna prunes no search of several objectives, and its pruners compare earlier values of the
objective itself. Stage one has none: refusals are learnt after it. So a rule of our own, `beaten`,
ends a trial half-way through stage one by what can be measured there.
"""

import fcntl
import functools
import os
import shutil
import socket
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna import distributions
from optuna.exceptions import OptunaError, TrialPruned, UpdateFinishedTrialError
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from dcr import data, launching, models, prompts, results, runs, separability, storage, study
from dcr import train as training_script
from dcr.config import ConfigError, Stage, TrainConfig, UserError
from dcr.data import LABELS, SafetyData
from dcr.evaluation import sets, subjects
from dcr.models import Policy
from dcr.prompts import PairRow
from dcr.report.searches import Tried
from dcr.report.studies import SAFETY
from dcr.runs import Cost, Run
from dcr.search import OBJECTIVES, RANKED, Search, Space, words_of
from dcr.study import Job, Told
from dcr.text import single_line

PULSE = 10.0  # seconds between two signs of life of a trial
SILENCE = 90.0  # seconds without one from which on its worker is taken for dead
LOCKED = 120.0  # seconds that SQLite waits for another process
SQLITE = "sqlite:///"
PROBED = 200  # rows of each kind that stage one is judged by half-way
RESAMPLES = 500  # of that judgement's interval
STAGES = ("contrastive", "sft")
COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL

optuna.logging.set_verbosity(optuna.logging.WARNING)


# --- the study ----------------------------------------------------------------------------------


def opened(search: Search, place: int = 0) -> optuna.Study:
    """The study, made where it is not there; sampling is seeded by worker and what is known.

    Raises ConfigError for a storage that cannot be opened.
    """
    options = {"connect_args": {"timeout": LOCKED}} if search.url.startswith(SQLITE) else {}
    upwards = [OBJECTIVES[name].maximised for name in search.objectives]
    try:
        with turn(search.url):
            known = optuna.create_study(
                storage=RDBStorage(search.url, options),
                study_name=search.name,
                directions=["maximize" if up else "minimize" for up in upwards],
                load_if_exists=True,
            )
    except (OptunaError, SQLAlchemyError, ImportError, ValueError) as error:
        cure = "give an URL that Optuna opens, such as sqlite:///search.db"
        raise ConfigError(f"storage={search.url}: {single_line(error)[:160]}; {cure}") from error
    worker = f"{search.settings.seed}/{socket.gethostname()}/{place}/{len(_all(known))}"
    few = min(max(4, search.trials // 4), 10)  # a short search affords no more
    known.sampler = TPESampler(n_startup_trials=few, seed=zlib.crc32(worker.encode()))
    return known


@contextmanager
def turn(url: str) -> Iterator[None]:
    """Alone among the workers of an SQLite file; a database server locks rows itself."""
    if not url.startswith(SQLITE):
        yield
        return
    with Path(url.removeprefix(SQLITE) + ".lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _distribution(space: Space) -> distributions.BaseDistribution:
    if space.choices:
        return distributions.CategoricalDistribution(space.choices)
    if isinstance(space.low, int):
        return distributions.IntDistribution(space.low, int(space.high), log=space.log)
    return distributions.FloatDistribution(space.low, space.high, log=space.log)


def _all(known: optuna.Study) -> list[FrozenTrial]:
    """As the storage has them now, without those that a worker left: they were enqueued again."""
    trials = known.get_trials(deepcopy=False)
    return [t for t in trials if t.state is not FAIL or "fault" in t.user_attrs]


def tried(known: optuna.Study) -> list[Tried]:
    """Every trial that has ended."""
    ended = [trial for trial in _all(known) if trial.state.is_finished()]
    whole = any(trial.state is COMPLETE for trial in ended)
    front = {trial.number for trial in known.best_trials} if whole else set()
    found = []
    for trial in ended:
        marks = ["front"] * (trial.number in front)
        marks += ["configured"] * ("configured" in trial.user_attrs)
        how = "failed" if trial.state is FAIL else trial.state.name.lower()
        fault, values = trial.user_attrs.get("fault", ""), tuple(trial.values or ())
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
    with turn(search.url):
        if not known.get_trials(deepcopy=False):
            known.enqueue_trial(dict(point), user_attrs={"configured": True})
    study.in_fork(*(functools.partial(_work, search, place) for place in range(workers)))
    return known


def _work(search: Search, place: int) -> None:
    """One worker: trial after trial, until so many are done and none is under way anywhere."""
    if gpus := launching.gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    known, heard = opened(search, place), {}
    while True:
        if (trial := _taken(search, known, heard)) is not None:
            _carry_out_one(search, known, trial)
        elif all(trial.state.is_finished() for trial in _all(known)):
            return
        else:
            time.sleep(study.PATIENCE)


def _taken(
    search: Search, known: optuna.Study, heard: dict[int, tuple[object, float]]
) -> Trial | None:
    """The next trial: one that waits, or a new one; None where so many are done or under way.

    `heard` is each trial's last sign of life and when this worker heard of it, by its own clock.
    """
    with turn(search.url):
        for other in known.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            sign, now = other.user_attrs.get("alive", "none yet"), time.monotonic()
            before, since = heard.get(other.number, (None, now))
            if sign != before:
                heard[other.number] = sign, now
            elif now - since > SILENCE:
                give_back(known, other)
        trials = _all(known)
        waits = any(trial.state is TrialState.WAITING for trial in trials)
        if len(trials) >= search.trials and not waits:
            return None
        return known.ask({key: _distribution(space) for key, space in search.spaces.items()})


def give_back(known: optuna.Study, left: FrozenTrial) -> None:
    """Fail a trial that its worker left, and enqueue its point again."""
    known.tell(left.number, state=FAIL)
    kept = {"configured": True} if "configured" in left.user_attrs else {}
    known.enqueue_trial(left.params, user_attrs={**kept, "instead_of": left.number})


def _carry_out_one(search: Search, known: optuna.Study, trial: Trial) -> None:
    def say(told: str) -> None:
        print(f"[trial {trial.number}] {told}", flush=True)

    say(" ".join(words_of(trial.params, short=True)))
    values: Sequence[float] | None = None
    state, told = COMPLETE, ""
    try:
        if twin := _twin(known, trial):
            values, state, told = twin.values, twin.state, f"as trial {twin.number}: "
        else:
            values = _measured(search, search.trial(trial.params), trial)
        named = zip(search.objectives, values or (), strict=state is COMPLETE)
        told += ", ".join(f"{name} {value:.4g}" for name, value in named)
    except TrialPruned as why:
        state, told = PRUNED, f"pruned: {why}"
    except UpdateFinishedTrialError:
        say("taken over by another worker")
        return
    except UserError as fault:
        state, told = FAIL, f"failed: {single_line(fault)}"
        trial.set_user_attr("fault", single_line(fault))
    except KeyboardInterrupt:
        with turn(search.url):
            left = known.get_trials(deepcopy=False)[trial.number]
            if not left.state.is_finished():
                give_back(known, left)
        raise
    known.tell(trial, values, state, skip_if_finished=True)
    say(told)


def _twin(known: optuna.Study, trial: Trial) -> FrozenTrial | None:
    """An earlier trial of the same point, waited for where it is under way."""
    while twins := [t for t in _all(known) if t.number < trial.number and t.params == trial.params]:
        if done := [t for t in twins if t.state in (COMPLETE, PRUNED)]:
            return done[0]
        if all(t.state is FAIL for t in twins):
            return None
        trial.set_user_attr("alive", time.time())
        time.sleep(study.PATIENCE)
    return None


def _measured(search: Search, job: Job, trial: Trial) -> list[float]:
    """The value of each objective, once all of a run is done; TrialPruned, or Told for a fault."""
    settings, run, pulse = job.training, job.run, 0.0
    assert settings is not None

    def alive() -> None:
        nonlocal pulse
        if time.monotonic() - pulse > PULSE:
            pulse = time.monotonic()
            trial.set_user_attr("alive", time.time())

    one, *others = job.parts()
    # only where every objective can be foreseen half-way is one run behind another
    prunes = all(OBJECTIVES[name].foreseen for name in search.objectives)
    prunes = prunes and search.pruning and not RANKED.keys().isdisjoint(search.objectives)
    judge = functools.partial(_judge, search, job) if prunes else None
    stage_one = replace(settings, stage=Stage.contrastive)
    one = replace(one, work=functools.partial(training_script.train, stage_one, run, judge))
    try:
        for part in (one, *others):
            if not part.done():
                study.in_fork(part.work, meanwhile=alive)
    except Told:
        if (ahead := _halfway(run).get("beaten_by")) is None:
            raise
        _forget_weights(run)
        raise TrialPruned(f"half-way through stage one trial {ahead} is ahead") from None
    trial.set_user_attr("halfway", _halfway(run))
    values = _values(search, job)
    _forget_weights(run)
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
    if len(wanted) < len(search.objectives):
        raise Told(f"{folder} does not tell all of {', '.join(search.objectives)}", 1)
    return wanted


def _forget_weights(run: Run) -> None:
    """Of what was measured: hundreds of trials fill a disk, and the chosen point is retrained."""
    for place in (*STAGES, "snapshots", "checkpoints"):
        shutil.rmtree(run.folder / place, ignore_errors=True)


# --- half-way -----------------------------------------------------------------------------------


def beaten(
    own: Mapping[str, Any], others: Mapping[int, Mapping[str, Any]], objectives: Sequence[str]
) -> int | None:
    """The first of other trials that half-way was ahead in every objective; None without one.

    Each is `probe` (AUROC with its 95% interval), `nll` and `seconds`. In discernment only
    intervals that lie apart are a lead; in the rest no worse is enough.
    """
    rest = [name for name in objectives if name not in RANKED]
    for number, other in others.items():
        if other["probe"][1] > own["probe"][2] and all(other[n] <= own[n] for n in rest):
            return number
    return None


def _halfway(run: Run) -> dict[str, Any]:
    file = run.halfway_file
    return storage.read_json(file, dict[str, Any]) if file.exists() else {}


def _judge(search: Search, job: Job, module: Any, batches: SafetyData, seconds: float) -> None:
    """In the fork that trains: keep what half of stage one gives, and end it where it is beaten."""
    assert job.training is not None
    found = {"probe": _probed(job, module, batches), "seconds": seconds}
    if "nll" in search.objectives:
        found["nll"] = _nll(job.training, module, batches.rows.pad)
    done = (trial for trial in _all(opened(search)) if trial.state is COMPLETE)
    others = {t.number: of for t in done if (of := t.user_attrs.get("halfway"))}
    found["beaten_by"] = beaten(found, others, search.objectives)
    storage.write_json(job.run.halfway_file, found)
    if found["beaten_by"] is not None:
        raise Told(f"behind trial {found['beaten_by']}", 1)


def _probed(job: Job, module: Any, batches: SafetyData) -> list[float]:
    """AUROC and interval, on the validation prompts, of a linear probe at the trained block that is
    fitted to stage one's own rows.
    """
    settings, (evaluating,) = job.training, job.evaluations
    assert settings is not None
    facts, tokenizer = models.facts(settings.model), models.open_tokenizer(settings.model)
    chat = prompts.chat_format(tokenizer, settings.model)
    own, tested = [], []
    for kind, label in LABELS.items():
        own += [row for row in batches.rows.prompts if row.label == label][:PROBED]
        for asked in (one for one in sets.read(evaluating).ranked if one.kind is kind):
            rows = asked.rows[:PROBED], label, facts.context, settings.dcr.pooling
            tested += data.prompt_rows(chat, *rows)
    policy, sides = Policy(module.model, tokenizer, settings.model.name), []
    for rows in (own, tested):
        points = separability.features(policy, rows)[module.block - 1]
        sides += [points, torch.tensor([row.label for row in rows])]
    found = separability.transfer_auroc(*sides, seed=settings.seed, resamples=RESAMPLES)
    return [found.estimate, found.low, found.high]


def _nll(settings: TrainConfig, module: Any, pad: int) -> float:
    """Of held-out instructions, a token of their answers."""
    chat = prompts.chat_format(models.open_tokenizer(settings.model), settings.model)
    heldout = data.rows_of(settings).normal_heldout[: data.HELD_OUT_PAIRS]
    made = [chat.pair(row.prompt, row.response or "", settings.sft.max_len) for row in heldout]
    rows = [PairRow("", ids, targets, False) for ids, targets in made if ids]
    total, count = 0.0, 0
    for group in data.micro_batches(rows, settings.sft.micro_tokens):
        batch = data.pair_batch(group, pad).to(module.device)
        summed, each = module.labelled_nll(module.hidden(batch.ids, batch.mask), batch.targets)
        total, count = total + float(summed), count + len(each)
    return total / count
