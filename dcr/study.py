"""A named study: jobs of a grid trained and evaluated one after the other, and their one page.

A job is a run folder named by a fingerprint of its resolved settings, so that one study finds the
jobs of another. Its parts, each stage and each evaluation, run one by one in forks of this process:
imports are paid once, peak memory is a part's own, and no fault or kill of one ends the study. Jobs
share stages (`adopting`): the first trains one, the others take it over.
"""

import functools
import hashlib
import importlib
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from dcr import (
    adopting,
    chat_templates,
    cli,
    continuing,
    ending,
    entry,
    extensions,
    plan,
    resolving,
)
from dcr import eval as evaluation
from dcr.adopting import NAMES
from dcr.core import config, data, extending, storage
from dcr.core.config import STAGES, ConfigError, DataError, Method, Stage, UserError
from dcr.core.config.evaluation import DeviceConfig
from dcr.core.config.training import TrainConfig, stages_of
from dcr.core.runs import Run
from dcr.core.text import label_of
from dcr.ending import single_line
from dcr.extensions import EvalSettings, TrainSettings
from dcr.own import load
from dcr.plan import cost

SLOW_IMPORTS = ("dcr.train", "dcr.core.evaluation.scoring", "dcr.core.evaluation.subjects")
SET_BY_STUDY = {  # settings of train.py and eval.py that no user gives
    *("run", "stage", "plan", "force", "output", "snapshots", "steps", "sweep"),
    *("endpoint", "endpoint_model", "endpoint_key", "endpoint_parameters"),
}


@dataclass(frozen=True)
class Study:
    """A grid of `conf/sweep`, the table of its report, and the jobs beside the grid."""

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
    "arms": Study("arms", "table1", with_stl=False),
}


@dataclass
class Options:
    """python -m dcr.study study=epochs [seeds=3] [any setting of train.py or eval.py]

    Trains every job of a named study, evaluates each and the base model, and writes one page. A
    setting with several values, such as sft.lr=1e-4,5e-4, is one more dimension. The same command
    continues after a fault or a kill.
    """

    study: str = entry.option("its name", choices=tuple(STUDIES))
    seeds: int = entry.option("how many, from seed= (0) on", 1, least=1)
    out: Path = entry.option("where run folders and pages lie", Path("outputs/study"))
    plan: bool = entry.option("say what would be done, and how long it takes", False)
    settings: list[str] = entry.settings_of("train.py or eval.py")


@entry.command(Options, goes_on=True)
def main(options: Options) -> None:
    study = STUDIES[options.study]
    with notices_once():
        planned = jobs(options, study)
    in_fork(lambda: check_jobs(planned))
    if options.plan:
        in_fork(lambda: print(describe(planned)))
        return
    words = " ".join([options.study, *options.settings])
    named = hashlib.sha256(words.encode()).hexdigest()[:8]
    os.environ.setdefault("DCR_SWEEP", f"{options.study}-{named}")  # the group of its W&B runs
    with storage.locked(options.out):  # a killed study's last part may still be ending
        failed = carry_out([part for job in planned for part in job.parts()])
    write_page(planned, failed, options.out / f"{options.study}.html", study.table)
    if failed:
        reasons = "; ".join(f"{job}: {why}" for job, why in failed.items())
        raise StudyError(f"{len(failed)} of {len(planned)} jobs failed: {reasons}")


# --- jobs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A stage of a job's training, or an evaluation of it."""

    job: str
    name: str
    done: Callable[[], bool]
    work: Callable[[], object]
    needed: bool = True  # by the job's parts behind it


@dataclass(frozen=True)
class Job:
    """One run folder with the settings of its training, if any, and of its evaluations."""

    name: str
    run: Run
    training: TrainConfig | None
    evaluations: tuple[EvalSettings, ...]

    def parts(self) -> list[Part]:
        found: list[Part] = []
        if (settings := self.training) is not None:
            for stage in stages_of(settings):
                done = functools.partial(self.run.done, stage.value)
                work = functools.partial(train_stage, settings, self.run, stage)
                found.append(Part(self.name, stage.value, done, work))
        for settings in self.evaluations:
            steering = settings.steering.method
            name = "evaluation" + ("" if steering == "none" else f", {steering}")
            name += ", behind a gate" if settings.gate else ""
            name += ", calibrated" if settings.calibrate else ""
            done = functools.partial(evaluation_done, settings, self.run)
            work = functools.partial(evaluate, settings, self.run)
            found.append(Part(self.name, name, done, work, needed=False))
        return found


def jobs(options: Options, study: Study) -> list[Job]:
    """The base model and every job of a study, each with its settings resolved.

    Raises ConfigError for a wrong setting.
    """
    training, evaluating = split_settings(options.settings)
    training += ["plan=true"] * options.plan  # a plan needs less than training
    seeds = [word for word in training if word.startswith("seed=")]
    first = seeds[-1].removeprefix("seed=") if seeds else "0"
    if options.seeds > 1:
        if not first.isdecimal():
            raise ConfigError(f"seeds={options.seeds} seed={first}: give the first seed alone")
        numbers = range(int(first), int(first) + options.seeds)
        training.append(f"seed={','.join(map(str, numbers))}")
    grid = storage.read_yaml(config.CONF / "sweep" / f"{study.grid}.yaml", dict[str, Any])
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
    settings = resolving.resolve(cli.compose("train", words, Options), TrainSettings)
    if settings.trainer.devices * settings.trainer.num_nodes > 1:
        raise ConfigError("trainer.devices: a study runs job after job, each on one device")
    made_with = config.plain(settings)
    named = storage.fingerprint(continuing.binding(made_with))
    run = Run(out / f"{_label(settings)}-{settings.method.value}-{named}")
    combined = cli.combinations(evaluating)
    if settings.method is Method.stl:
        combined += [[*each, f"steering={name}"] for name in steered for each in combined]
    asked = (replace(one, run=str(run.folder)) for one in _evaluations(combined, made_with))
    return Job(name, run, settings, tuple(asked))


def base_of(out: Path, settings: TrainConfig, evaluating: Sequence[str]) -> Job:
    """The model that a job starts from, evaluated as the job is."""
    made_with = config.plain(settings)
    model = storage.fingerprint(continuing.binding_model(made_with["model"]))
    named = f"{_label(settings)}-base-{model}"
    evaluations = _evaluations(cli.combinations(evaluating), made_with)
    return Job(f"base model {_label(settings)}", Run(out / named), None, tuple(evaluations))


def _label(settings: TrainConfig) -> str:
    return settings.model.label or label_of(settings.model.name)


@contextmanager
def notices_once() -> Iterator[None]:
    """Log a notice on a model's settings once, not for every job."""
    seen: set[str] = set()

    def new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not (message in seen or seen.add(message))

    notices = logging.getLogger(cli.leave_numbers_of_another_model.__module__)
    notices.addFilter(new)
    try:
        yield
    finally:
        notices.removeFilter(new)


def _evaluations(
    combined: Sequence[Sequence[str]], made_with: Mapping[str, Any]
) -> list[EvalSettings]:
    """Settings of the evaluations of a run that is made with the settings `made_with`."""
    found, trained_with = list[EvalSettings](), resolving.own_paths(made_with)
    for one in (cli.compose("eval", each, Options) for each in combined):
        own = trained_with | resolving.own_paths(one)
        found.append(resolving.resolve(cli.completed(one, made_with), EvalSettings, own))
    return found


def split_settings(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The settings of training and those of evaluation; the machine's and W&B's are in both.

    Raises ConfigError for a word that is neither, or that a study sets itself.
    """
    training, evaluating = (
        {entry.name for entry in fields(schema)} | {group}
        for schema, group in ((TrainSettings, "preset"), (EvalSettings, "steering"))
    )
    evaluating -= {"model", "data", "seed"}  # the run's own
    machine = {f"trainer.{entry.name}" for entry in fields(DeviceConfig)}
    found: tuple[list[str], list[str]] = ([], [])
    for word in words:
        if word.startswith("own."):
            continue
        key = word.lstrip("+~").split("=")[0]
        head = key.split(".")[0]
        if head in SET_BY_STUDY:
            raise ConfigError(f"{word}: a study sets it itself")
        if "=" not in word:
            raise ConfigError(f"{word}: settings are written key=value")
        if head not in training | evaluating:
            near = resolving.nearest(head, sorted(training | evaluating))
            offer = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"{word}: no setting of train.py or eval.py{offer}")
        if head in training:
            found[0].append(word)
        if head in evaluating and (head != "trainer" or key in machine):
            found[1].append(word)
    for word in words:  # settings of a user's own class go where the class is named
        if word.startswith("own."):
            own = re.compile(rf":{re.escape(word.split('=')[0].split('.')[1])}\b")
            there = [side for side in found if any(own.search(other) for other in side)]
            for side in there or found[:1]:
                side.append(word)
    return found


def check_jobs(planned: Sequence[Job]) -> None:
    """Raises UserError for a fault of any job that shows before weights are opened."""
    from dcr import train as training_script

    for job in planned:
        if job.training is not None:
            rows = training_script.checked(job.training, job.run)
            try:
                with suppress(DataError):  # a damaged run fails by itself
                    continuing.check_rows(job.run, data.row_record(rows), force=False)
            except ConfigError as fault:
                raise ConfigError(f"{job.name}: {fault} (here: out=)") from fault
        for settings in job.evaluations:
            asked = evaluation.read(settings)
            if job.training is None:  # the others are asked the same, in the same words
                found = evaluation.checked(settings, job.run)
                found[0].check_prompts([*asked.sets, *asked.ranked])


# --- parts --------------------------------------------------------------------------------------


def train_stage(settings: TrainConfig, run: Run, stage: Stage) -> None:
    """One stage of a run in this process, or taken over where another run has the same."""
    from dcr import train as training_script

    extensions.hand_in_passes()
    last = stage is stages_of(settings)[-1]
    adopted = stage is not Stage.readout and adopting.adopt(settings, run, stage)
    if last or not adopted:
        training_script.train(settings if last else replace(settings, stage=stage), run)


def evaluation_done(settings: EvalSettings, run: Run) -> bool:
    return (run.folder / "eval").is_dir() and evaluated_as(settings, run) in _seconds(run)


def evaluate(settings: EvalSettings, run: Run) -> None:
    """Evaluate a run and note in its folder how many seconds that took."""
    began = time.perf_counter()
    extensions.hand_in_passes()
    evaluation.evaluate(settings, run)
    spent = round(time.perf_counter() - began, 1)
    storage.write_json(run.evaluated_file, _seconds(run) | {evaluated_as(settings, run): spent})


def _seconds(run: Run) -> dict[str, float]:
    file = run.evaluated_file
    return storage.read_json(file, dict[str, float]) if file.exists() else {}


def evaluated_as(settings: EvalSettings, run: Run) -> str:
    """A fingerprint of the weights and of the settings and files that they are evaluated with."""
    from dcr.core.evaluation import subjects

    subject = subjects.subjects(settings, run)[0]
    weights = storage.weights_fingerprint(subject.source) if subject.source else subject.weights
    free = ("run", "output", "trainer", "wandb")
    made_with = {key: value for key, value in config.plain(settings).items() if key not in free}
    return storage.fingerprint([weights, made_with, *own_files(made_with)])


def own_files(node: Any) -> list[str]:
    """The hashes of a user's own files and classes that plain settings name."""
    if isinstance(node, str) and config.is_path(node):
        return [extending.sha256(load(node, object))]
    if isinstance(node, str):
        return [storage.sha256(Path(node))] if os.path.isfile(node) else []
    parts = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    return [found for part in parts for found in own_files(part)]


def carry_out(parts: Sequence[Part]) -> dict[str, str]:
    """Do the parts that are not done, in order; returns by job why parts of it failed."""
    failed, ended = dict[str, str](), set[str]()
    for place, part in enumerate(parts, start=1):
        if part.job in ended:
            continue
        try:
            with ending.faults_in_words():
                done = part.done()
            if not done:
                print(f"[{place}/{len(parts)}] {part.job}: {part.name}", flush=True)
                in_fork(part.work)
        except UserError as fault:
            why = single_line(f"{part.name}: {fault}")
            failed[part.job] = "; ".join(filter(None, (failed.get(part.job), why)))
            ended |= {part.job} if part.needed else set()
            print(f"failed: {why}", file=sys.stderr, flush=True)
    return failed


def do_all(parts: Sequence[Part]) -> None:
    """Do the parts that are not done, in order. Raises StudyError for the first job that failed."""
    for job, why in carry_out(parts).items():
        raise StudyError(f"{job}: {why}")


def in_fork(*works: Callable[[], object]) -> None:
    """Do each work in a fork of this process, all at once.

    Raises StudyError, when all have ended, with the fault of the first that failed.
    """
    for name in SLOW_IMPORTS:  # here, so that no fork imports it for itself alone
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
        code = child.exitcode or 0
        try:
            sent = receiving.recv()
        except EOFError:
            sent = StudyError(
                f"killed by {signal.Signals(-code).name}" if code < 0 else "ended without a word"
            )
        if isinstance(sent, StudyError):
            raise sent
        chat_templates.UNTEMPLATED.update(sent)  # so that no other child says it again


class StudyError(UserError):
    """The fault that ended a part, in another process or here."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message, exit_code)  # both, since pickling calls it with these
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


def _in_child(work: Callable[[], object], sending: Connection, parent: int) -> None:
    ending.end_with(parent)
    try:
        with ending.faults_in_words():
            work()
        sending.send(chat_templates.UNTEMPLATED)
        return
    except KeyboardInterrupt:
        fault = StudyError("stopped")
    except UserError as error:
        fault = StudyError(single_line(error), error.exit_code)
    except Exception as error:
        traceback.print_exc()
        # cut: a longer text than a pipe holds would wait for a reader who waits for the child's end
        fault = StudyError(single_line(f"{type(error).__name__}: {error}"))
    sending.send(fault)
    sys.exit(1)


# --- page and plan ------------------------------------------------------------------------------


def write_page(planned: Sequence[Job], failed: dict[str, str], page: Path, table: str) -> None:
    """Write the page of the jobs that can be read, and print its table.

    Its notes say which jobs failed and which took over stage one. A job whose files are damaged is
    left out and added to `failed`.
    """
    from dcr.report import building  # help and a slip need no drawing library

    shown = [job for job in planned if any(job.run.folder.glob("eval/*/metrics.json"))]
    while shown:
        try:
            with ending.faults_in_words():
                notes = [
                    f"{job.run.folder.name}: {NAMES[Stage(stage)]} is that of {donor}"
                    for job in shown
                    for stage, donor in adopting.adopted(job.run).items()
                ]
                notes += [f"failed: {job}: {why}" for job, why in failed.items()]
                places = [job.run.folder for job in shown]
                text = building.build(places, page, [table], notes=notes)
        except UserError as fault:
            damaged = next((job for job in shown if str(job.run.folder) in str(fault)), None)
            if damaged is None:
                raise
            shown.remove(damaged)
            failed.setdefault(damaged.name, single_line(f"report: {fault}"))
            print(f"failed: {failed[damaged.name]}", file=sys.stderr, flush=True)
        else:
            print(f"{text}\n\npage: {page}")
            return


def describe(planned: Sequence[Job]) -> str:
    """A table of the jobs: which parts are done, shared, or take how long."""
    chains = [stages_of(job.training) for job in planned if job.training]
    named = [stage for stage in STAGES if any(stage in chain for chain in chains)]
    heads = ["job", *(NAMES[stage] for stage in named), "evaluations", "folder"]
    table = entry.table("Jobs", heads, names=len(heads))
    first: dict[str, str] = {}  # the job that trains each shared stage
    seconds = [0.0]
    for job in planned:
        cells = [_stage_cell(job, stage, first, seconds) for stage in named]
        done = sum(part.done() for part in job.parts()[-len(job.evaluations) :])
        answers = sum(len(one.rows) for e in job.evaluations for one in evaluation.read(e).sets)
        cells.append("done" if done == len(job.evaluations) else f"{answers} answers")
        table.add_row(job.name, *cells, job.run.folder.name)
    total = plan.duration(sum(seconds))
    return entry.plain_text(table, f"training in all: about {total}; answers come on top")


def _stage_cell(job: Job, stage: Stage, first: dict[str, str], seconds: list[float]) -> str:
    settings = job.training
    if settings is None or stage not in stages_of(settings):
        return "–"
    if job.run.done(stage.value):
        return "done"
    if stage is not Stage.readout:
        key = adopting.made_of(config.plain(settings), stage)
        if key in first or adopting.donors(settings, job.run, stage):
            return f"that of {first.get(key, 'an earlier run')}"
        first[key] = job.name
    settings, _ = continuing.with_precisions(settings, job.run.precisions())
    shape = cost.stage_shape(settings, stage)
    of = plan.stage_plan(settings, stage, shape, data.rows_of(settings))
    seconds.append(of.flops / cost.throughput(settings, of.precision, of.shape.width).flops)
    return plan.duration(seconds[-1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
