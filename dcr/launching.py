"""Sweeps past one process: hydra/launcher=slurm on a cluster, hydra/launcher=joblib on one machine.

A job of a sweep is the plain command of its own run folder, so that it ends, stops, resumes and
spans devices and nodes as that command does; a log there collects its output. Hydra's own plugins
of 2022 do not serve (docs/cluster.md says why), so submitit and joblib are used without them.
"""

import logging
import os
import queue
import runpy
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, configure_log
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from dcr import cli, ending, resolving
from dcr.cli import Outcome
from dcr.core import config, storage
from dcr.core.config import ConfigError, UserError

log = logging.getLogger(__name__)

LAUNCHER = "hydra_plugins.dcr_launchers.CommandLauncher"
SWEEP_ALONE = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweep", "hydra.mode")
PARENT = "DCR_LAUNCHED_BY"  # the process without which a job of a sweep ends
RULE = "---- "  # before each attempt in a job's log
RESULT_SECONDS, QUEUE_SECONDS = 1.0, 10.0  # between two looks at results and at Slurm's queue
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class JoblibOptions:
    """hydra/launcher=joblib: several jobs at a time on this machine."""

    _target_: str = LAUNCHER
    n_jobs: int = -1  # at a time; -1: as many as there are GPUs or else cores for


@dataclass
class SlurmOptions:
    """hydra/launcher=slurm: an array of Slurm jobs, each with a task for each device."""

    _target_: str = LAUNCHER
    cluster: str = "slurm"  # or local, to try it as processes of this machine
    partition: str | None = None
    account: str | None = None
    minutes: int = 1440  # the most for an attempt; a job that is not done by then is requeued
    notice: int = 120  # how many seconds before the end of an attempt USR1 announces it
    parallel: int = 256  # jobs at a time
    gpus_per_node: int | None = None
    cpus_per_task: int = 4
    mem_gb: int | None = None  # of each node
    setup: list[str] = field(default_factory=list)  # shell lines before a job
    sbatch: dict[str, Any] = field(default_factory=dict)  # further options of sbatch by name


@dataclass(frozen=True)
class Command:
    """One job of a sweep, as the command that a user would type for it alone."""

    overrides: list[str]
    words: list[str]  # behind the interpreter
    folder: Path  # of the run
    log: Path
    devices: int
    nodes: int


def launch(
    context: HydraContext,
    composed: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    options: Mapping[str, Any],
) -> list[JobReturn]:
    """Run every job of a sweep and leave the outcomes to `cli.run`, which sums the sweep up.

    Raises UserError for impossible settings of the launcher.
    """
    configure_log(composed.hydra.hydra_logging, composed.hydra.verbose)
    commands = [_command(context, composed, list(overrides)) for overrides in job_overrides]
    named: dict[str, Any] = {
        key: OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for key, v in options.items()
    }
    if "n_jobs" in named:
        accelerator = OmegaConf.select(composed, "trainer.accelerator", default="auto")
        given = gpus() if accelerator in ("auto", "gpu", "cuda") else []
        ends = _side_by_side(commands, JoblibOptions(**named), given)
    else:
        ends = _as_array(commands, SlurmOptions(**named), Path(composed.hydra.sweep.dir).absolute())
    for outcome in ends:
        ended = "done" if outcome.error is None else f"failed: {outcome.error}"
        log.info("%s: %s", os.path.relpath(outcome.folder), ended)
        cli.OUTCOMES.append(outcome)
    return [JobReturn(status=JobStatus.COMPLETED) for _ in commands]


def _command(context: HydraContext, composed: DictConfig, overrides: list[str]) -> Command:
    made = context.config_loader.load_sweep_config(composed, overrides)
    hydra, script = made.hydra, made.hydra.job.config_name
    own = [o for o in hydra.overrides.hydra if not o.lstrip("+~").startswith(SWEEP_ALONE)]
    words = [str(Path(sys.argv[0]).absolute()), *own, *overrides]
    if script == "train":
        folder, name = Path(hydra.sweep.dir, hydra.sweep.subdir).absolute(), "train.log"
        quoted = str(folder).replace("\\", r"\\").replace("'", r"\'")
        words.append(f"hydra.run.dir='{quoted}'")
        devices, nodes = made.trainer.devices, made.trainer.num_nodes
    else:  # several evaluations can share a run folder
        folder = Path(made.get("run") or made.output).absolute()
        name, devices, nodes = f"eval-{storage.fingerprint(overrides)}.log", 1, 1
    return Command(overrides, words, folder, folder / name, devices, nodes)


def register() -> None:
    """Give Hydra the settings of both launchers, whose class lies in `hydra_plugins`.

    A job that a launcher started here ends with it.
    """
    if parent := os.environ.pop(PARENT, ""):
        ending.end_with(int(parent))
    for name, options in {"joblib": JoblibOptions, "slurm": SlurmOptions}.items():
        ConfigStore.instance().store(group="hydra/launcher", name=name, node=options)


# --- one machine ---


def _side_by_side(
    commands: Sequence[Command], options: JoblibOptions, gpus: list[str]
) -> Iterator[Outcome]:
    from joblib import Parallel, delayed

    made = _environments(commands, options.n_jobs, gpus)
    free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for own in made:
        free.put(own)
    running: set[subprocess.Popen[bytes]] = set()
    stopping: list[bool] = []

    def run(command: Command) -> Outcome | None:
        began, own = time.perf_counter(), free.get()
        if stopping:
            return None
        words = [sys.executable, *command.words]
        with _log(command, "") as file:
            # in a session of its own, so that a Ctrl-C reaches it once, through this process
            process = subprocess.Popen(
                words, stdout=file, stderr=file, env=own, start_new_session=True
            )
        running.add(process)
        code = process.wait()
        running.remove(process)
        free.put(own)
        return _outcome(command, began, code)

    log.info("%d jobs, %d at a time", len(commands), len(made))
    found: Any = Parallel(len(made), backend="threading", return_as="generator")(
        delayed(run)(command) for command in commands
    )
    try:
        yield from found
    except BaseException:  # a signal
        stopping.append(True)
        for process in [*running]:
            process.terminate()
        for process in [*running]:
            process.wait()
        raise


def _environments(
    commands: Sequence[Command], asked: int, gpus: Sequence[str]
) -> list[dict[str, str]]:
    """An environment for each place at a time, with its share of GPUs and cores.

    Raises ConfigError for a number of jobs that cannot run at a time.
    """
    from joblib import cpu_count

    devices = max(command.devices for command in commands)
    most = len(gpus) // devices if gpus else cpu_count()
    number = min(max(1, most), len(commands)) if asked == -1 else asked
    if number < 1 or (gpus and number > most):
        raise ConfigError(
            f"hydra.launcher.n_jobs={asked}: give -1 or 1 to {most}"
            + (f", since {len(gpus)} GPUs are shared by jobs of {devices}" if gpus else "")
        )
    own = {
        PARENT: str(os.getpid()),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(max(1, cpu_count() // number)),
    }
    shares = (gpus[place * devices :][:devices] for place in range(number))
    named = ({"CUDA_VISIBLE_DEVICES": ",".join(share)} if share else {} for share in shares)
    return [own | os.environ | each for each in named]


def gpus() -> list[str]:
    """The GPUs that jobs may use, as `CUDA_VISIBLE_DEVICES` names them."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    import torch  # slow to import

    return [str(place) for place in range(torch.cuda.device_count())]


# --- a cluster ---


def _as_array(
    commands: Sequence[Command], options: SlurmOptions, folder: Path
) -> Iterator[Outcome]:
    config.check_installed("submitit", "slurm", "hydra/launcher=slurm")
    # submitit reads it when it is imported, here and in the job; its default is USR2
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    if config.CONF.parent == config.PACKAGE.parent:  # a checkout, which the job is to run as well
        paths = [str(config.PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    import submitit
    from submitit.core.utils import FailedJobError

    shapes = {(command.nodes, command.devices) for command in commands}
    if len(shapes) > 1:
        raise ConfigError(
            "trainer.num_nodes and trainer.devices differ within the sweep: the jobs of an "
            "array are alike; make a sweep of each"
        )
    began, slurm = time.perf_counter(), options.cluster == "slurm"
    try:
        executor = submitit.AutoExecutor(folder / ".submitit", cluster=options.cluster)
        executor.update_parameters(**_parameters(options, *(shapes.pop() if slurm else (1, 1))))
        jobs = executor.map_array(run_in_job, commands)
    except (RuntimeError, ValueError, AssertionError, FailedJobError) as no:
        raise UserError(f"hydra/launcher=slurm: {resolving.one_line(no)}") from no
    names = [job.job_id for job in jobs]
    log.info("%d jobs: %s", len(jobs), " ".join(names))
    if slurm:
        ends = f"scancel {names[0].partition('_')[0]}"
        log.info("a signal to this command leaves them running; %s ends them", ends)
    yield from _ends(jobs, commands, began, slurm)


def _parameters(options: SlurmOptions, nodes: int, devices: int) -> dict[str, Any]:
    """submitit's parameters of an array whose jobs take so many nodes, and devices on each."""
    return {
        "name": "dcr",
        "timeout_min": options.minutes,
        "nodes": nodes,
        "tasks_per_node": devices,
        "cpus_per_task": options.cpus_per_task,
        "gpus_per_node": options.gpus_per_node,
        "mem_gb": options.mem_gb,
        "slurm_partition": options.partition,
        "slurm_account": options.account,
        "slurm_array_parallelism": options.parallel,
        "slurm_signal_delay_s": options.notice,
        "slurm_setup": list(options.setup) or None,
        "slurm_additional_parameters": {"requeue": True, **options.sbatch},
    }


def _ends(jobs: Any, commands: Sequence[Command], began: float, slurm: bool) -> Iterator[Outcome]:
    """Yield outcomes as jobs write their results, or leave the queue without one."""
    absent: dict[str, int] = dict.fromkeys((job.job_id for job in jobs), 0)
    looked = time.monotonic()
    for job, command in zip(jobs, commands, strict=True):
        parts = [job.task(place) for place in range(job.num_tasks)]
        # absent twice, since another node can see a result late
        while not all(p.paths.result_pickle.exists() for p in parts) and absent[job.job_id] < 2:
            time.sleep(RESULT_SECONDS)
            if time.monotonic() > looked + QUEUE_SECONDS:
                looked = time.monotonic()
                there = _queued() if slurm else {job.job_id for job in jobs if not job.done()}
                if there is not None:
                    absent = {n: 0 if n in there else seen + 1 for n, seen in absent.items()}
        written = all(part.paths.result_pickle.exists() for part in parts)
        yield _outcome(command, began, 0 if written and job.exception() is None else 1)


def _queued() -> set[str] | None:
    """Names of this user's jobs in Slurm's queue, None while Slurm does not answer."""
    asked = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
    listed = subprocess.run(asked, capture_output=True, text=True)
    return set(listed.stdout.split()) if listed.returncode == 0 else None


def run_in_job(command: Command) -> None:
    """Run the command in this very process, a task of a job, so that signals reach it once.

    A job that a signal stopped goes back into the queue. Raises UserError where the command failed,
    so that the job fails for Slurm as well.
    """

    def stop(number: int, _: object) -> None:
        sys.exit(ending.SIGNALLED + number)

    for number in STOPPING:  # until the command has handlers of its own
        signal.signal(number, stop)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)  # submitit would log each one that Slurm sends
    job, attempt = _slurm_job(), int(os.environ.get("SLURM_RESTART_COUNT", 0)) + 1
    code: Any = 0
    with _log(command, f"Slurm job {job}, attempt {attempt}: " if job else "") as file:
        streams = [os.dup(stream) for stream in (1, 2)]
        for stream in (1, 2):
            os.dup2(file, stream)
        try:
            sys.argv = list(command.words)
            sys.path.insert(0, str(Path(command.words[0]).parent))
            runpy.run_path(command.words[0], run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        except Exception:  # of any program: the job's own log takes it
            traceback.print_exc()
            code = 1
        finally:
            for stream, before in zip((1, 2), streams, strict=True):
                (sys.stdout, sys.stderr)[stream - 1].flush()
                os.dup2(before, stream)
    if isinstance(code, int) and code > ending.SIGNALLED:
        if job and os.environ.get("SLURM_PROCID", "0") == "0":
            _requeue(job)
        sys.exit(code)
    if code:
        raise UserError(f"exit code {code}; see {command.log}")


def _slurm_job() -> str:
    """This job as squeue and scontrol name it, empty outside Slurm."""
    own = os.environ.get("SLURM_JOB_ID", "")
    array, place = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{place}" if array and place else own


def _requeue(job: str) -> None:
    """Put a job back into the queue, unless Slurm requeues a preempted job itself or ends it."""
    asked = ["squeue", f"--jobs={job}", "--noheader", "--format=%T"]
    if subprocess.run(asked, capture_output=True, text=True).stdout.strip() == "RUNNING":
        subprocess.run(["scontrol", "requeue", job])


# --- logs ---


@contextmanager
def _log(command: Command, where: str) -> Iterator[int]:
    """Open the job's log for another attempt, with a line that tells where and when."""
    command.folder.mkdir(parents=True, exist_ok=True)
    file = os.open(command.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        host, now = os.uname().nodename, time.strftime("%Y-%m-%d %H:%M:%S")
        header = f"{RULE}{now} {host}, {where}{shlex.join(command.words)}\n"
        os.write(file, header.encode(errors="replace"))
        yield file
    finally:
        os.close(file)


def _outcome(command: Command, began: float, code: int) -> Outcome:
    spent, error = time.perf_counter() - began, None
    if code != 0:
        error = UserError(_last_error(command.log))
        error.exit_code = max(code, 1)  # by which a sweep of one job ends; a signal's is below 0
    return Outcome(command.overrides, command.folder, spent, error)


def _last_error(file: Path) -> str:
    """The error of a log's last attempt, the end of its traceback, or that it has neither."""
    text = file.read_text(errors="replace") if file.is_file() else ""
    lines = [line for line in text.rpartition(RULE)[2].splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if not errors and any(line.startswith("Traceback") for line in lines):
        errors = lines[-1:]
    return errors[-1] if errors else f"ended without a word: cancelled, or killed; see {file}"
