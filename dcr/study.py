"""A named study: jobs of a grid trained and evaluated one after the other, and their one page.

A job is a run folder that bears a fingerprint of its resolved settings, so that what one study has
done another finds. Its parts, each stage and each evaluation, run one by one in forks of this
process: imports are paid once, peak memory is a part's own, and no fault or kill of one ends the
study. Stage one is the same for all jobs that agree in model, data, seed and `dcr`: the first
trains it, the others take it over by hard links.
"""

import functools
import hashlib
import importlib
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from dcr import entry, extensions, plan, report
from dcr import eval as evaluation_script
from dcr.core import cli, config, data, ending, precision, prompts, runs, storage
from dcr.core.config import (
    STAGES,
    ConfigError,
    DeviceConfig,
    EvalConfig,
    Method,
    Stage,
    TrainConfig,
    UserError,
)
from dcr.core.evaluation import sets
from dcr.core.runs import Cost, Run
from dcr.core.text import label_of, single_line
from dcr.plan import cost

WORK = ("dcr.train", "dcr.core.evaluation.metrics")  # what takes seconds to import
# Settings of train.py and eval.py that a study gives itself.
OWN = {
    *("run", "stage", "plan", "force", "output", "snapshots", "steps", "sweep"),
    *("endpoint", "endpoint_model", "endpoint_key", "endpoint_parameters"),
}
# What stage one depends on, and what it logs.
STAGE_ONE = ("model", "data", "dcr", "seed", "tracking")
STAGE_ONE_ROWS = ("seemingly_toxic", "toxic", "normal")


@dataclass(frozen=True)
class Study:
    """A grid of `conf/sweep`, the table of its report, and what stands beside the grid."""

    grid: str
    table: str
    with_stl: bool = True  # an STL job to compare with
    steered: tuple[str, ...] = ()  # steering of the STL job, as the paper's Table 1 has it


STUDIES = {
    "epochs": Study("epochs", "table3"),
    "ratio": Study("ratio", "table4"),
    "layer_margin": Study("layer_margin", "table1"),
    "methods": Study("methods", "table1", with_stl=False, steered=("scans", "surgical")),
    "cost": Study("methods", "table2", with_stl=False),
}


@dataclass
class Options:
    """python -m dcr.study study=epochs [seeds=3] [any setting of train.py or eval.py]

    Trains every job of a named study, evaluates each and the base model, and writes one page. A
    setting with several values, such as sft.lr=1e-4,5e-4, is one more dimension. What is done is
    found: the same command goes on after a fault or a kill.
    """

    study: str = entry.option("its name", choices=tuple(STUDIES))
    seeds: int = entry.option("how many, from seed= (0) on", 1, least=1)
    out: Path = entry.option("where run folders and pages lie", Path("outputs/study"))
    plan: bool = entry.option("say what would be done, and how long it takes", False)
    settings: list[str] = entry.option(
        "any setting of train.py or eval.py; python train.py --cfg job lists them", [], rest=True
    )


@entry.command(Options, goes_on=True)
def main(options: Options) -> None:
    study = STUDIES[options.study]
    with told_once():
        planned = jobs(options, study)
    in_fork(lambda: check(planned))
    if options.plan:
        in_fork(lambda: print(describe(planned)))
        return
    words = " ".join([options.study, *options.settings])
    named = hashlib.sha256(words.encode()).hexdigest()[:8]
    os.environ.setdefault("DCR_SWEEP", f"{options.study}-{named}")  # the group of its W&B runs
    with storage.locked(options.out):  # a killed study's last part may still be ending
        failed = carry_out([part for job in planned for part in job.parts()])
    page, (folders, notes) = options.out / f"{options.study}.html", shown(planned, failed)
    while folders:
        known = [*notes, *(f"failed: {job}: {why}" for job, why in failed.items())]
        try:
            print(f"{report.build(folders, page, [study.table], notes=known)}\n\npage: {page}")
            break
        except UserError as fault:  # of a job that was done, and whose files were damaged since
            damaged = next((f for f in folders if str(fault).startswith(f"{f}{os.sep}")), None)
            if damaged is None:
                raise
            folders.remove(damaged)
            (name,) = (job.name for job in planned if job.run.folder == damaged)
            failed[name] = single_line(f"report: {fault}")
            print(f"failed: {failed[name]}", file=sys.stderr, flush=True)
    if failed:
        told = "; ".join(f"{job}: {why}" for job, why in failed.items())
        raise Told(f"{len(failed)} of {len(planned)} jobs failed: {told}", 1)


# --- jobs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What is done or is not: a stage of a job's training, or an evaluation of it."""

    job: str
    name: str
    done: Callable[[], bool]
    work: Callable[[], object]


@dataclass(frozen=True)
class Job:
    """One run folder: how it is trained, if it is, and evaluated."""

    name: str
    run: Run
    training: TrainConfig | None
    evaluations: tuple[EvalConfig, ...]

    def parts(self) -> list[Part]:
        """In the order of their doing."""
        found: list[Part] = []
        if (settings := self.training) is not None:
            for stage in config.stages_of(settings.method):
                done = functools.partial(self.run.done, stage.value)
                work = functools.partial(train_stage, settings, self.run, stage)
                found.append(Part(self.name, stage.value, done, work))
        for settings in self.evaluations:
            steering = settings.steering.method.value
            name = "evaluation" + ("" if steering == "none" else f", {steering}")
            name += ", calibrated" if settings.calibrate else ""
            found.append(Part(self.name, name, *_evaluation(settings, self.run)))
        return found


def jobs(options: Options, study: Study) -> list[Job]:
    """The base model and every job of a study, each with its settings resolved.

    Raises ConfigError for whatever is wrong with a setting.
    """
    training, evaluating = sorted_words(options.settings)
    seeds = [word for word in training if word.startswith("seed=")]
    first = seeds[-1].removeprefix("seed=") if seeds else "0"
    if options.seeds > 1:
        if not first.isdecimal():
            raise ConfigError(f"seeds={options.seeds} seed={first}: give the first seed alone")
        numbers = range(int(first), int(first) + options.seeds)
        training.append(f"seed={','.join(map(str, numbers))}")
    grid = storage.read_yaml(cli.CONF / "sweep" / f"{study.grid}.yaml", dict[str, Any])
    swept = grid["hydra"]["sweeper"]["params"]
    beside = [word for word in training if word.split("=")[0] not in {*swept, "method"}]
    combined = cli.combinations(["method=stl", *beside]) if study.with_stl else []
    combined += cli.combinations([*(f"{key}={value}" for key, value in swept.items()), *training])
    shared = set.intersection(*map(set, combined))
    found: dict[Path, Job] = {}
    for words in combined:
        name = " ".join(word for word in words if word not in shared) or "the only job"
        job = job_of(options.out, name, words, evaluating, study.steered)
        assert job.training is not None
        base = base_of(options.out, job.training, evaluating)
        found.setdefault(base.run.folder, base)
        found.setdefault(job.run.folder, job)
    return list(found.values())


def job_of(
    out: Path,
    name: str,
    words: Sequence[str],
    evaluating: Sequence[str],
    steered: Sequence[str] = (),
) -> Job:
    """A run under `out`, trained with the settings `words` and evaluated, STL also `steered`."""
    settings = config.resolve(cli.compose("train", words, Options), TrainConfig)
    if settings.trainer.devices * settings.trainer.num_nodes > 1:
        raise ConfigError("trainer.devices: a study runs job after job, each on one device")
    made_with = cli.plain(settings)
    named = storage.fingerprint(runs.binding(made_with))
    run = Run(out / f"{_label(settings)}-{settings.method.value}-{named}")
    combined = cli.combinations(evaluating)
    if settings.method is Method.stl:
        combined += [[*each, f"steering={name}"] for name in steered for each in combined]
    evaluations = [
        replace(settings, run=str(run.folder)) for settings in _evaluations(combined, made_with)
    ]
    return Job(name, run, settings, tuple(evaluations))


def base_of(out: Path, settings: TrainConfig, evaluating: Sequence[str]) -> Job:
    """The model that a job starts from, evaluated as the job is."""
    made_with = cli.plain(settings)
    named = f"{_label(settings)}-base-{storage.fingerprint(made_with['model'])}"
    evaluations = _evaluations(cli.combinations(evaluating), made_with)
    return Job(f"base model {_label(settings)}", Run(out / named), None, tuple(evaluations))


def _label(settings: TrainConfig) -> str:
    return settings.model.label or label_of(settings.model.name)


@contextmanager
def told_once() -> Iterator[None]:
    """A notice on a model's settings is the same for each job."""
    told: set[str] = set()

    def new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not (message in told or told.add(message))

    notices = logging.getLogger(config.leave_numbers_of_another_model.__module__)
    notices.addFilter(new)
    try:
        yield
    finally:
        notices.removeFilter(new)


def _evaluations(
    combined: Sequence[Sequence[str]], made_with: Mapping[str, Any]
) -> list[EvalConfig]:
    """What a run that is made with these settings is evaluated with."""
    composed = (cli.compose("eval", each, Options) for each in combined)
    return [
        config.resolve(evaluation_script.completed(one, made_with), EvalConfig) for one in composed
    ]


def sorted_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings of training and of evaluation; of both where they are of the machine or W&B."""
    training, evaluating = (
        {entry.name for entry in fields(schema)} | {group}
        for schema, group in ((TrainConfig, "preset"), (EvalConfig, "steering"))
    )
    evaluating -= {"model", "data", "seed"}  # the run's own
    machine = {f"trainer.{entry.name}" for entry in fields(DeviceConfig)}
    found: tuple[list[str], list[str]] = ([], [])
    for word in words:
        key = word.lstrip("+~").split("=")[0]
        head = key.split(".")[0]
        if head in OWN or "=" not in word:
            why = "a study sets it itself" if head in OWN else "settings are written key=value"
            raise ConfigError(f"{word}: {why}")
        if head not in training | evaluating:
            near = config.nearest(head, sorted(training | evaluating))
            offer = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"{word}: no setting of train.py or eval.py{offer}")
        if head in training:
            found[0].append(word)
        if head in evaluating and (head != "trainer" or key in machine):
            found[1].append(word)
    return found


def check(planned: Sequence[Job]) -> None:
    """Raises UserError for what can be known wrong with any job before weights are opened."""
    from dcr import train as training_script
    from dcr.core.evaluation import metrics

    for job in planned:
        if job.training is not None:
            training_script.checked(job.training, job.run)
        for settings in job.evaluations:
            sets.read(settings)
            if job.training is None:
                metrics.check(settings, job.run)


# --- parts --------------------------------------------------------------------------------------


def train_stage(settings: TrainConfig, run: Run, stage: Stage) -> None:
    """One stage of a run in this process; stage one is taken over where a run has the same."""
    from dcr import train as training_script

    extensions.hand_in_passes()
    if stage is Stage.sft:
        training_script.train(settings, run)
    elif not adopt(settings, run):
        training_script.train(replace(settings, stage=stage), run)


def _evaluation(settings: EvalConfig, run: Run) -> tuple[Callable[[], bool], Callable[[], None]]:
    """Whether it is done, and the doing."""
    file = run.evaluated_file

    def known() -> dict[str, float]:
        return storage.read_json(file, dict[str, float]) if file.exists() else {}

    def done() -> bool:
        return (run.folder / "eval").is_dir() and _evaluated(settings, run) in known()

    def work() -> None:
        began = time.perf_counter()
        extensions.hand_in_passes()
        evaluation_script.evaluate(settings, run)
        spent = round(time.perf_counter() - began, 1)
        storage.write_json(file, known() | {_evaluated(settings, run): spent})

    return done, work


def _evaluated(settings: EvalConfig, run: Run) -> str:
    """A fingerprint of the weights and of everything that is measured of them."""
    from dcr.core import models
    from dcr.core.evaluation import subjects

    subject = subjects.subjects(settings, run)[0]
    weights = models.weights_fingerprint(subject.folder) if subject.folder else subject.weights
    apart = ("run", "output", "trainer", "wandb")
    made_with = {key: value for key, value in cli.plain(settings).items() if key not in apart}
    return storage.fingerprint([weights, made_with])


def stage_one(made_with: Mapping[str, Any]) -> str:
    """A fingerprint of the settings that stage one depends on, of a run's configuration."""
    decisive = runs.binding(made_with)
    return storage.fingerprint({key: decisive.get(key) for key in STAGE_ONE})


def adopt(settings: TrainConfig, run: Run) -> bool:
    """Take over the stage one of a run beside this one, if one has the same settings and rows.

    Files are hard-linked where the disk can, so that it takes no room. A donor whose files are
    damaged is told in one line and passed over.
    """
    found = donors(settings, run)
    if not found:
        return False
    from dcr import train as training_script

    record = data.row_record(training_script.checked(settings, run))
    for donor in found:
        try:
            with ending.faults_in_words():
                taken = _take_over(donor, run, settings, record)
        except UserError as fault:
            print(f"no stage one is taken over: {single_line(fault)}", file=sys.stderr, flush=True)
            continue
        if taken:
            print(f"taken over from {donor.folder}")
            return True
    return False


def donors(settings: TrainConfig, run: Run) -> list[Run]:
    """Runs beside a run whose stage one is done and was made with the same settings."""
    settled, _ = precision.of_training(settings, run.precisions())
    key, found = stage_one(cli.plain(settled)), []
    for file in sorted(run.folder.parent.glob("*/config.yaml")):
        donor = Run(file.parent)
        with suppress(UserError):  # one of another version, or damaged, has nothing to give
            if donor.folder != run.folder and donor.done("contrastive"):
                found += [donor] if stage_one(donor.config()) == key else []
    return found


def _rows_of_stage_one(record: Mapping[str, Any]) -> list[str | None]:
    return [record["rows"].get(name, {}).get("fingerprint") for name in STAGE_ONE_ROWS]


def _take_over(donor: Run, run: Run, settings: TrainConfig, record: Mapping[str, Any]) -> bool:
    """Whether the donor started from the same weights and learnt from the same rows, and its stage
    one is now the run's as well.

    Raises UserError, before anything is written, where a file of the donor is damaged.
    """
    from dcr.core import models

    folder, weights = Path(settings.model.name), donor.stage("contrastive")
    now = models.weights_fingerprint(folder) if folder.is_dir() else None
    started = storage.read_json(donor.base_file, runs.StartedFrom, runs.RESTORE)["contrastive"]
    same = _rows_of_stage_one(donor.record()) == _rows_of_stage_one(record)
    if not same or now not in (None, started):
        return False
    storage.check_checksums(weights, needed=True)
    logged = [row for row in runs.read_metrics(donor) if row["stage"] == "contrastive"]
    block, cost_file = donor.block(), donor.cost_file("contrastive")
    spent = storage.read_json(cost_file, Cost) if cost_file.exists() else None
    with storage.locked(run.folder):
        storage.write_json(run.adopted_file, {"contrastive": donor.folder.name})
        storage.write_json(run.base_file, {"contrastive": started})
        runs.forget_metrics_beyond(run, "contrastive", 0)
        runs.append_metrics(run, ([row[key] for key in runs.METRIC_FIELDS] for row in logged))
        if block is not None:
            storage.write_json(run.layer_file, {"block": block})
        if spent is not None:
            storage.write_json(run.cost_file("contrastive"), asdict(spent))
        for source, target in (
            (donor.tracked("contrastive"), run.tracked("contrastive")),
            (weights, run.stage("contrastive")),  # last: with it the stage is done
        ):
            if source.is_dir():
                with storage.replaced_folder(target) as staging:
                    shutil.copytree(source, staging, copy_function=_link, dirs_exist_ok=True)
    return True


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def carry_out(parts: Sequence[Part]) -> dict[str, str]:
    """Do what is not done, in order; why the first part of each failed job failed, by job."""
    failed: dict[str, str] = {}
    for place, part in enumerate(parts, start=1):
        if part.job in failed:
            continue
        try:
            with ending.faults_in_words():
                done = part.done()
            if not done:
                print(f"[{place}/{len(parts)}] {part.job}: {part.name}", flush=True)
                in_fork(part.work)
        except UserError as fault:
            failed[part.job] = single_line(f"{part.name}: {fault}")
            print(f"failed: {failed[part.job]}", file=sys.stderr, flush=True)
    return failed


def all_done(parts: Sequence[Part]) -> None:
    """Do what is not done, in order. Raises Told with the first job that failed."""
    for job, why in carry_out(parts).items():
        raise Told(f"{job}: {why}", 1)


def in_fork(*works: Callable[[], object]) -> None:
    """Do something in a fork of this process, several things at once in one each.

    Raises Told with the fault that ended the first of those that failed, when all have ended.
    """
    for name in WORK:  # here, so that no fork imports it for itself alone
        importlib.import_module(name)
    fork = multiprocessing.get_context("fork")
    sys.stdout.flush()
    children: list[tuple[BaseProcess, Connection]] = []
    try:
        for work in works:
            receiving, sending = multiprocessing.Pipe(duplex=False)
            child = fork.Process(target=_in_child, args=(work, sending, os.getpid()))
            child.start()
            sending.close()
            children.append((child, receiving))
        while alive := [child.sentinel for child, _ in children if child.exitcode is None]:
            wait(alive)
    except BaseException:
        for child, _ in children:
            child.terminate()
        for child, _ in children:
            child.join()
        raise
    for child, receiving in children:
        child.join()
        if child.exitcode:
            raise _told(child.exitcode, receiving)
        prompts.UNTEMPLATED.update(receiving.recv())  # so that no other child says it again


def _told(exitcode: int, receiving: Connection) -> "Told":
    try:
        return receiving.recv()
    except EOFError:
        killed = exitcode < 0
        how = f"killed by {signal.Signals(-exitcode).name}" if killed else "ended without a word"
        return Told(how, 1)


class Told(UserError):
    """What another process said of the fault that ended it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)  # both, by which it is copied from process to process
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


def _in_child(work: Callable[[], object], sending: Connection, parent: int) -> None:
    ending.end_with(parent)
    try:
        with ending.faults_in_words():
            work()
        sending.send(prompts.UNTEMPLATED)
        return
    except KeyboardInterrupt:
        told = Told("stopped", 1)
    except UserError as error:
        told = Told(str(error), error.exit_code)
    except Exception as error:
        traceback.print_exc()
        told = Told(f"{type(error).__name__}: {error}", 1)
    sending.send(told)
    sys.exit(1)


# --- what is told -------------------------------------------------------------------------------


def shown(planned: Sequence[Job], failed: dict[str, str]) -> tuple[list[Path], list[str]]:
    """The run folders that the page can show, and as its notes what was done once for several jobs.

    A folder that cannot be read is added to the jobs that `failed`.
    """
    from dcr.report import records

    folders, notes = list[Path](), list[str]()
    for job in planned:
        run, file = job.run, job.run.adopted_file
        if not any(run.folder.glob("eval/*/metrics.json")):
            continue
        try:
            with ending.faults_in_words():
                records.read_run(run.folder)
                donor = storage.read_json(file, runs.StartedFrom) if file.exists() else None
        except UserError as fault:
            failed.setdefault(job.name, single_line(f"report: {fault}"))
            continue
        folders.append(run.folder)
        if donor is not None:
            notes.append(f"{run.folder.name}: stage one is that of {donor['contrastive']}")
    return folders, notes


def describe(planned: Sequence[Job]) -> str:
    """Jobs and their parts: done, shared, or to be done in an estimated time."""
    table = entry.table("Jobs", ["job", "stage one", "SFT", "evaluations", "folder"], names=5)
    first: dict[str, str] = {}  # job by its stage one
    seconds = [0.0]
    for job in planned:
        cells = [_stage_cell(job, stage, first, seconds) for stage in STAGES[Method.dcr]]
        done = sum(part.done() for part in job.parts()[-len(job.evaluations) :])
        answers = sum(len(one.rows) for e in job.evaluations for one in sets.read(e).sets)
        cells.append("done" if done == len(job.evaluations) else f"{answers} answers")
        table.add_row(job.name, *cells, job.run.folder.name)
    total = plan.duration(sum(seconds))
    return entry.plain_text(table, f"training in all: {total}, an estimate; answers come on top")


def _stage_cell(job: Job, stage: Stage, first: dict[str, str], seconds: list[float]) -> str:
    settings = job.training
    if settings is None or stage not in STAGES[settings.method]:
        return "–"
    if job.run.done(stage.value):
        return "done"
    if stage is Stage.contrastive:
        key = stage_one(cli.plain(settings))
        if key in first or donors(settings, job.run):
            return f"that of {first.get(key, 'an earlier run')}"
        first[key] = job.name
    settings, _ = precision.of_training(settings, job.run.precisions())
    drawn, *_ = plan.expected(settings)
    of = plan.stage_plan(settings, stage, cost.stage_shape(settings, stage), drawn)
    rate = cost.throughput(settings, of.precision, of.shape.width)
    flops = of.flops + (of.readout.flops if of.readout else 0)
    seconds.append(flops / rate.flops)
    return plan.duration(seconds[-1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
