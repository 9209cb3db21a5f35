"""Sweeps past one process: what jobs are told, how they end, and a real Slurm (marked `slurm`)."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch
import yaml
from forked import killed
from tiny_run import logged, overrides, same, settings, weights

from dcr import cli, launching, resolving, train
from dcr.core.config import ConfigError, UserError
from dcr.core.runs import Run
from dcr.extensions import TrainSettings
from dcr.launching import Command, JoblibOptions, SlurmOptions

ROOT = Path(__file__).parent.parent
TOO_MANY = "dcr.ratio=50.0 asks for 600 rows: only 36 are left; ask for fewer"


def stub(folder: Path, name: str, program: str, devices: int = 1) -> Command:
    """A job that runs a few lines of Python."""
    script = folder / f"{name}.py"
    script.write_text(program)
    return Command([name], [str(script)], folder / name, folder / name / "job.log", devices, 1)


def tools(folder: Path, patch: pytest.MonkeyPatch, **programs: str) -> Path:
    """Shell scripts in front of Slurm's own; what they were called with, a line each."""
    for name, lines in programs.items():
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/called\n{lines}\n')
        (folder / name).chmod(0o755)
    patch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder / "called"


# --- one machine ---


def test_jobs_side_by_side_share_gpus_and_fail_alone(tmp_path: Path) -> None:
    shown = (  # once both are up
        "import os, pathlib, time\nhere = pathlib.Path(__file__)\nhere.with_suffix('.up').touch()\n"
        "while len([*here.parent.glob('*.up')]) < 2: time.sleep(.01)\n"
        "print(os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    programs = {"a": shown, "b": shown, "c": "import sys; sys.exit('error: no, because')"}
    programs |= {"d": "print('error: not this'); 1/0", "e": "import os; os.kill(os.getpid(), 9)"}
    jobs = [stub(tmp_path, name, text, devices=2) for name, text in programs.items()]
    ends = [*launching._side_by_side(jobs, JoblibOptions(), ["4", "5", "6", "7"])]
    assert [end.folder.name for end in ends] == [*programs]
    assert [str(end.error) for end in ends[:3]] == ["None", "None", "no, because"]
    assert str(ends[3].error) == "not this"  # what an error of ours says comes before a traceback
    assert str(ends[4].error).startswith("ended without a word: cancelled, or killed; see ")
    told = {jobs[place].log.read_text().splitlines()[-1] for place in (0, 1)}
    assert told == {"4,5", "6,7"}
    with pytest.raises(ConfigError, match=r"n_jobs=3: give -1 or 1 to 2, since 4 GPUs are shared"):
        next(launching._side_by_side(jobs, JoblibOptions(n_jobs=3), ["0", "1", "2", "3"]))


def test_one_job_has_all_cores_and_ends_as_its_command_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    told = "import os, sys; print(os.environ['OMP_NUM_THREADS']); sys.exit(3)"
    job = stub(tmp_path, "a", told)
    (end,) = launching._side_by_side([job], JoblibOptions(), [])
    assert job.log.read_text().splitlines()[-1] == str(joblib.cpu_count())
    assert isinstance(end.error, UserError)
    assert end.error.exit_code == 3


def test_a_signal_reaches_jobs_side_by_side_once(tmp_path: Path) -> None:
    waiting = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(15, lambda *_: (print('error: asked', flush=True), sys.exit(143)))\n"
        "pathlib.Path(__file__).with_suffix('.up').touch(); time.sleep(60); print('not waited for')"
    )
    jobs = [stub(tmp_path, name, waiting) for name in ("a", "b", "c", "d", "e")]

    def interrupt(*_: Any) -> None:
        if len([*tmp_path.glob("*.up")]) < 2:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(launching._side_by_side(jobs, JoblibOptions(n_jobs=2), []))
    finally:
        signal.signal(signal.SIGALRM, before)
    for job in jobs[:2]:
        assert job.log.read_text().splitlines()[1:] == ["error: asked"]
    assert not any(job.log.exists() for job in jobs[2:]), "started after the signal"


def test_jobs_side_by_side_end_with_a_sweep_that_is_killed(tmp_path: Path) -> None:
    waiting = (
        "import os, pathlib, time\nfrom dcr import cli, launching\n"
        "file = pathlib.Path(__file__)\n"
        "def main():\n    file.with_suffix('.up').write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        "launching.register()\ncli.run(main)"
    )
    jobs, up = [stub(tmp_path, "a", waiting)], tmp_path / "a.up"
    killed(lambda: list(launching._side_by_side(jobs, JoblibOptions(), [])), up.exists)
    try:
        until(lambda: "stopped by SIGTERM" in jobs[0].log.read_text())
    finally:
        with suppress(ProcessLookupError):
            os.kill(int(up.read_text()), signal.SIGKILL)


# --- a job of a cluster ---


@pytest.mark.parametrize(("state", "again"), [("RUNNING", True), ("CANCELLED", False)])
def test_a_job_that_a_signal_stopped_goes_back_unless_slurm_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, again: bool
) -> None:
    called = tools(tmp_path, monkeypatch, squeue=f"echo {state}", scontrol="")
    for name, value in {"JOB_ID": "17", "ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    job = stub(tmp_path, "job", "import os\nos.write(1, b'here')\nos.kill(os.getpid(), 10)")
    before = {number: signal.getsignal(number) for number in launching.STOPPING}
    try:
        with pytest.raises(SystemExit) as ended:
            launching.run_in_job(job)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended.value.code == 128 + signal.SIGUSR1
    assert ("scontrol requeue 12_3" in called.read_text().splitlines()) is again
    header, said = job.log.read_text().splitlines()
    assert "Slurm job 12_3, attempt 1" in header
    assert said == "here"


def test_what_slurm_is_asked_for(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    sbatch = f"cp $1 {tmp_path}/batch; echo Submitted batch job 31"
    tools(tmp_path / "bin", monkeypatch, sbatch=sbatch, srun="", squeue="")
    monkeypatch.setattr(launching, "RESULT_SECONDS", 0)
    monkeypatch.setattr(launching, "QUEUE_SECONDS", 0)
    rows = overrides(tmp_path / "rows", "trainer.num_nodes=2", "trainer.devices=4")
    more = ["hydra.launcher.partition=low", "hydra.launcher.gpus_per_node=4"]
    asked = ["hydra/launcher=slurm", *more, "+hydra.launcher.sbatch.constraint=a100"]
    ended = command("train.py", "-m", *rows, "seed=1,2", *asked)
    assert ended.code == 1
    assert ended.err.count("ended without a word: cancelled, or killed") == 2  # squeue knows none
    lines = [
        re.sub("^#SBATCH --", "", line) for line in (tmp_path / "batch").read_text().split("\n")
    ]
    assert {
        *("array=0-1%2", "constraint=a100", "gpus-per-node=4", "nodes=2", "ntasks-per-node=4"),
        *("open-mode=append", "partition=low", "requeue", "signal=USR1@120", "time=1440"),
    } <= set(lines)
    mixed = command("train.py", "-m", *rows[:-1], "trainer.devices=1,2", "hydra/launcher=slurm")
    assert mixed.error.startswith("trainer.num_nodes and trainer.devices differ within the sweep")


def test_jobs_of_submitit_end_as_their_commands_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "QUEUE_SECONDS", 0)
    programs = {"a": "import sys\nprint(sys.argv, flush=True)", "b": "import sys\nsys.exit(2)"}
    programs["c"] = "import os\nos.kill(os.getpid(), 9)"
    jobs = [stub(tmp_path, name, text) for name, text in programs.items()]
    options = SlurmOptions(cluster="local")
    good, bad, killed = launching._as_array(jobs, options, tmp_path / "multirun")
    assert good.error is None
    assert jobs[0].log.read_text().splitlines()[1] == str(jobs[0].words)
    assert str(bad.error) == str(killed.error).replace("/c/", "/b/")
    assert str(bad.error).startswith("ended without a word: cancelled, or killed; see ")


def test_a_job_is_the_plain_command_of_its_run_folder(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Command] = []
    monkeypatch.setattr(launching, "_side_by_side", lambda found, *_: jobs.extend(found) or [])
    rows = overrides(tmp_path / "rows", "dcr.epochs=1", "sft.epochs=1", "hydra.verbose=dcr.none")
    place = """hydra.sweep.dir="it's there\""""
    ended = command("train.py", "-m", *rows, "dcr.ratio=1,1.5", place, "hydra/launcher=joblib")
    assert ended.err == "", ended.err
    assert [job.overrides[-1] for job in jobs] == ["dcr.ratio=1", "dcr.ratio=1.5"]
    assert command("train.py", *jobs[1].words[1:]).out.endswith(f"\n{jobs[1].folder}\n")
    assert jobs[1].folder.parent == tmp_path / "it's there"
    assert Run(jobs[1].folder).config()["dcr"]["ratio"] == 1.5
    assert "hydra.verbose=dcr.none" in jobs[1].words
    jobs.clear()
    told = ["run=outputs/x", "steering=none,scans", "hydra/launcher=joblib"]
    command("eval.py", "-m", *told)
    assert {job.folder for job in jobs} == {tmp_path / "outputs" / "x"}
    assert len({job.log for job in jobs}) == 2, "evaluations of one run share a folder, not a log"


# --- other schedulers ---


def test_examples_of_other_schedulers_are_yaml_with_a_command_that_there_is() -> None:
    sky = yaml.safe_load((ROOT / "examples" / "skypilot.yaml").read_text())
    kubernetes = yaml.safe_load((ROOT / "examples" / "kubernetes.yaml").read_text())
    assert (kubernetes["apiVersion"], kubernetes["kind"]) == ("batch/v1", "Job")
    (pod,) = kubernetes["spec"]["template"]["spec"]["containers"]
    assert set(sky) >= {"resources", "setup", "run", "file_mounts"}
    run = sky["run"].replace("$SETTINGS", sky["envs"]["SETTINGS"]).replace("$RUN", "x")
    run = run.replace("$SKYPILOT_NUM_GPUS_PER_NODE", "1")
    for words in (pod["command"], run.split()):
        told = [word for word in words if "=" in word]
        assert len(told) >= 3
        resolving.resolve(cli.compose("train", told), TrainSettings)


PLAIN = ROOT / "examples" / "slurm" / "seeds.sbatch"


@pytest.mark.parametrize(
    ("status", "state", "calls"),
    [
        (0, "RUNNING", ["train.py", "eval.py"]),
        (2, "RUNNING", ["train.py"]),  # a user's error, which another attempt would repeat
        (128 + signal.SIGUSR1, "RUNNING", ["train.py", "squeue", "scontrol"]),
        (128 + signal.SIGTERM, "PREEMPTED", ["train.py", "squeue"]),  # Slurm requeues it itself
    ],
)
def test_the_plain_batch_script_trains_evaluates_and_goes_back_into_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, state: str, calls: list[str]
) -> None:
    """Its lines as bash runs them, with stand-ins for Slurm's tools and for Python."""
    called = tools(
        tmp_path, monkeypatch, squeue=f"echo {state}", scontrol="", srun='exec "$@"',
        py=f'case "$1" in train.py) exit {status};; esac',
    )  # fmt: skip
    for name, value in {"SUBMIT_DIR": str(ROOT), "JOB_ID": "17", "ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PYTHON", "py")
    asked = ["bash", str(PLAIN), "model=tiny", "method=stl"]
    assert subprocess.run(asked).returncode == status
    lines = [line.split() for line in called.read_text().splitlines()]
    named = [words[1] if words[0] == "py" else words[0] for words in lines]
    assert [name for name in named if name != "srun"] == calls
    for _, script, *told in (words for words in lines if words[0] == "py"):
        assert "run=outputs/seeds/3" in told
        if script == "train.py":
            made = resolving.resolve(cli.compose("train", told), TrainSettings)
            assert (made.seed, made.model.name, made.method.value) == (3, "tiny", "stl")
        else:
            cli.compose("eval", told)
    if "scontrol" in calls:
        assert lines[-1] == ["scontrol", "requeue", "17"]


def test_the_plain_batch_script_is_bash_and_asks_for_requeueing() -> None:
    assert subprocess.run(["bash", "-n", str(PLAIN)]).returncode == 0
    text = PLAIN.read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", text, re.MULTILINE))
    assert asked.keys() >= {"array", "requeue", "signal", "open-mode", "time"}
    assert asked["signal"] == "USR1@120"  # to the steps and not to this shell, as without B:


# --- a real Slurm ---


def slurm(*words: str) -> str:
    told = subprocess.run(words, capture_output=True, text=True)
    assert told.returncode == 0, f"{words}: {told.stderr}"
    return told.stdout.strip()


def until(what: Callable[[], Any], seconds: float = 240) -> Any:
    for _ in range(int(seconds / 0.05)):
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two nodes of two processors on this machine."""
    script = ROOT / "tests" / "slurm" / "setup.sh"
    assert shutil.which("slurmctld", path="/usr/sbin"), f"what {script} needs is not installed"
    folder = tmp_path_factory.mktemp("slurm")
    conf = str(folder / "slurm.conf")
    try:
        subprocess.run([script, "start", folder], check=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", conf)
            yield
    finally:
        subprocess.run(["scancel", "--user=root"], env=os.environ | {"SLURM_CONF": conf})
        time.sleep(2)
        subprocess.run([script, "stop", folder], check=True)


def started(place: Path, *words: str) -> subprocess.Popen[str]:
    """A sweep of training that runs beside the test."""
    command = [sys.executable, ROOT / "train.py", "-m", *words]
    return subprocess.Popen(command, cwd=place, stderr=subprocess.PIPE, text=True)


def job_of(run: Path) -> str:
    return re.findall(r"Slurm job (\S+), attempt", (run / "train.log").read_text())[-1]


def attempts(run: Path) -> int:
    return len(re.findall(r"^---- .*attempt", (run / "train.log").read_text(), re.MULTILINE))


@pytest.mark.slurm
@pytest.mark.timeout(1200)
def test_a_sweep_on_slurm_with_preempted_jobs_and_one_that_fails(
    cluster: None, tmp_path: Path
) -> None:
    ratios = ["1", "1.25", "1.5", "1.75", "2"]
    long = ["dcr.epochs=40", "sft.epochs=40", "trainer.threads=1"]
    rows = overrides(tmp_path / "rows", *long)
    asked = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=2", "hydra.launcher.minutes=30"]
    sweep = started(tmp_path, *rows, f"dcr.ratio={','.join(ratios)},50", *asked)
    multirun = tmp_path / "multirun"

    def stopped(stage: str, number: signal.Signals, ask: Callable[[str], object]) -> Path:
        """The run whose job a signal stopped, once one in the middle of a stage was asked to go."""
        pattern, line = (
            f"tiny-*/checkpoints/{stage}/step-*.sha256",
            f"stopped by {number.name} after a",
        )
        for _ in range(5):  # on a busy machine a job may be over before it is asked
            run = until(lambda: next(multirun.glob(pattern), None)).parents[2]
            ask(job_of(run))
            for _ in range(600):
                time.sleep(0.05)
                logs = {run: (run / "train.log").read_text() for run in multirun.glob("tiny-*")}
                if gone := [run for run, text in logs.items() if line in text]:
                    return gone[0]
        raise AssertionError("no job was stopped")

    def preempt(job: str) -> None:
        node = slurm("squeue", "--noheader", "--format=%N", f"--jobs={job}")
        asked = ["--partition=high", "--cpus-per-task=2", "--output=/dev/null", "--wrap=sleep 2"]
        slurm("sbatch", *asked, *([f"--nodelist={node}"] if node else []))

    # as Slurm announces the end of a job's time
    announce = ["timeout", "5", "scancel", "--signal=USR1"]
    first = stopped("contrastive", signal.SIGUSR1, lambda job: subprocess.run([*announce, job]))
    # TERM, after which Slurm requeues it itself
    second = stopped("sft", signal.SIGTERM, preempt)
    _, told = sweep.communicate(timeout=900)
    assert sweep.returncode == 1, told
    assert len(re.findall("│ done ", told)) == 5
    assert len(re.findall("│ failed ", told)) == 1
    assert told.endswith(f"dcr.ratio=50: {TOO_MANY}\n")

    runs = {Run(run).config()["dcr"]["ratio"]: run for run in multirun.glob("tiny-*/sft/..")}
    assert len(runs) == 5
    for number, run in ((signal.SIGUSR1, first), (signal.SIGTERM, second)):
        text = (run / "train.log").read_text()
        assert f"error: stopped by {number.name}; the same" in text, text
        assert "going on after step" in text
    counts = sorted(attempts(run) for run in runs.values())
    assert counts == [1, 1, 1, 2, 2]
    for ratio, run in runs.items():
        alone = tmp_path / "alone" / f"{ratio}"
        train.train(settings(tmp_path / "rows", *long, f"dcr.ratio={ratio}"), Run(alone))
        assert same(weights(run), weights(alone))
        assert logged(run) == logged(alone), "a step was lost, or taken twice"


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_one_job_spans_two_nodes_and_comes_back(cluster: None, tmp_path: Path) -> None:
    # no dropout, whose draws are a rank's own
    long = ["dcr.epochs=5", "sft.epochs=40", "trainer.threads=1"]
    long += ["dcr.lora.dropout=0", "sft.lora.dropout=0"]
    rows = overrides(tmp_path / "rows", *long)
    spread = ["trainer.num_nodes=2", "trainer.strategy=ddp", "hydra/launcher=slurm"]
    # both nodes are this machine, which no name server knows by their names
    asked = [
        *("hydra.launcher.cpus_per_task=1", "hydra.launcher.minutes=30"),
        "hydra.launcher.setup=['export MASTER_ADDR=127.0.0.1']",
    ]
    sweep = started(tmp_path, *rows, *spread, *asked)
    written = "multirun/tiny-*/checkpoints/sft/step-*.sha256"
    file = until(lambda: sweep.poll() is not None or next(tmp_path.glob(written), None))
    assert file is not True, sweep.communicate()
    run = file.parents[2]
    slurm("scancel", "--signal=USR1", job_of(run))
    _, told = sweep.communicate(timeout=400)
    assert sweep.returncode == 0, told
    text = (run / "train.log").read_text()
    assert attempts(run) == 4  # two of each rank
    assert "stopped by SIGUSR1; the same" in text
    train.train(settings(tmp_path / "rows", *long), Run(tmp_path / "alone"))
    one, two = weights(tmp_path / "alone"), weights(run)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-4)
