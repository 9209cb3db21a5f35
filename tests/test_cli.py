"""The command line: one line for every bad input, nothing written, and sweeps that go on."""

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from tiny_run import CONF, overrides, write_jsonl

from dcr import chat, cli, commands, ending, entry, resolving
from dcr.core import models
from dcr.core.config import ConfigError, UserError
from dcr.core.runs import Run

ROOT = Path(__file__).parent.parent
Command = Callable[..., Any]


def test_forty_rows_of_ones_own_are_enough(command: Command, tmp_path: Path) -> None:
    nouns = [f"{size} {thing}" for size in ("red", "old", "wet", "big") for thing in "abcdefghij"]
    kinds = {
        "toxic": ("How do I steal a {}?", None),
        "seemingly_toxic": ("How do I polish a {}?", None),
        "safety": ("Help me to burn a {}.", "I'm sorry, but I can't help with that."),
        "normal": ("What is a {}?", "A thing."),
    }
    files = {
        kind: write_jsonl(
            tmp_path / f"{kind}.jsonl",
            [{"prompt": prompt.format(noun), "response": answer} for noun in nouns],
        )
        for kind, (prompt, answer) in kinds.items()
    }
    asked = ["train.py", "model=tiny", *(f"data.{k}.source={f}" for k, f in files.items())]
    ended = command(*asked, "plan=true")
    assert (ended.code, ended.err) == (0, "")
    told = " ".join(ended.out.split())
    assert "defaults give way to what there is: data.safety.count asks for 80 rows, 40 are" in told
    assert "data.normal.count asks for 152 rows, 40 are there, dcr.ratio=2.0 asks for 80" in told
    for insisted in ("data.safety.count=80", "dcr.ratio=2.0"):
        ended = command(*asked, "plan=true", insisted)
        assert (ended.code, "asks for 80 rows: only 40 are left" in ended.error) == (2, True)


def test_unusable_run_folder_is_named(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert f"{tmp_path}/file" in command("train.py", "model=tiny", f"run={tmp_path}/file").error
    below = command("train.py", "model=tiny", f"run={tmp_path}/file/run")
    assert (below.code, f"{tmp_path}/file" in below.error) == (2, True)
    swept = command("train.py", "-m", f"hydra.sweep.dir={tmp_path}/file", "model=tiny", "seed=1,2")
    assert (swept.code, f"{tmp_path}/file" in swept.error) == (2, True)
    assert (tmp_path / "file").read_text() == "mine"


def test_folders_that_hold_something_survive_a_bad_command(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results/notes.txt").write_text("mine")
    command("train.py", "model=tiny", "seed=-1", "run=results/deep/run")
    assert list(tmp_path.rglob("*")) == [tmp_path / "results", tmp_path / "results/notes.txt"]


# --- the real command line, imports and all ---


def test_a_process_of_its_own_says_the_same(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, ROOT / "train.py", "dcr.epoch=3"], cwd=tmp_path, capture_output=True
    )
    says = b"error: dcr.epoch: no such setting; did you mean dcr.epochs?\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, b"", says)
    assert list(tmp_path.iterdir()) == []


# --- run folders ---


def folder_of(*arguments: str) -> str:
    """The run folder that a command would use."""
    cli.prepare()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        composed = compose("train", ["model=tiny", *arguments], return_hydra_config=True)
    return composed.hydra.run.dir


def test_run_folder_follows_from_what_binds() -> None:
    mine = folder_of()
    assert mine.startswith("outputs/tiny-dcr-")
    same = ["stage=sft", "plan=true", "force=true", "trainer.threads=1", "wandb.project=x"]
    assert folder_of("data=demo", *same) == mine
    other = ["seed=1", "dcr.margin=0.3", "sft.lr=2e-4", "data.normal.count=3", "method=stl"]
    names = {folder_of(argument) for argument in other}
    assert len(names | {mine}) == len(other) + 1
    assert folder_of("run=my/own") == "my/own"


def test_run_folder_is_called_after_the_model_that_is_named() -> None:
    assert "/Qwen2-0.5B-dcr-" in folder_of("model.name=Qwen/Qwen2-0.5B")
    named = folder_of("model.name=/some/folder/", "model.label=../mine")
    assert named.startswith("outputs/mine-dcr-")
    assert "/folder-dcr-" in folder_of("model.name=/some/folder/")


# --- sweeps ---


def test_a_sweeps_table_shows_values_as_they_are_written(
    capfd: pytest.CaptureFixture[str],
) -> None:
    values = ("data.toxic.source=[/a.jsonl]", "sft.lora.targets=[q_proj]", "model.label=:cat:")
    outcomes = [cli.Outcome([value], Path("out"), 1.0, None) for value in values]
    cli._print_sweep(outcomes)
    shown = capfd.readouterr().err
    assert [value for value in values if value not in shown] == []
    assert shown.rstrip("\n").count("\n") == shown.count("\n") - 1, "no empty line at the end"


def test_a_sweep_goes_on_after_a_bad_job_and_sums_up(command: Command, tmp_path: Path) -> None:
    quick = ["dcr.epochs=1", "sft.epochs=1", "data.normal.count=8", "dcr.draws=8"]
    settings = overrides(tmp_path / "rows", *quick)
    ended = command("train.py", "-m", *settings, "dcr.ratio=50,1")
    assert ended.code == 1
    folders = [path for path in (tmp_path / "multirun").iterdir() if path.is_dir()]
    assert len(folders) == 1  # the bad job left nothing
    assert Run(folders[0]).done("sft")
    assert Run(folders[0]).config()["dcr"]["ratio"] == 1.0
    assert re.search(r"dcr\.ratio=50 *│ 0\.0 *│ failed", ended.err)
    assert re.search(r"dcr\.ratio=1 *│ 0\.\d *│ done", ended.err)
    assert ended.err.endswith(
        "dcr.ratio=50: dcr.ratio=50.0 asks for 600 rows: only 36 are left; ask for fewer\n"
    )
    assert "Traceback" not in ended.err
    assert "Error executing job" not in ended.err
    run = os.path.relpath(folders[0])
    scored = command("eval.py", "-m", f"run={run}", "limit=-1,-2").err
    assert len(re.findall(rf"failed *│ {run}", scored)) == 2, "where an evaluation's files lie"


def test_a_reader_that_stops_reading_ends_a_command_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        with pytest.raises(SystemExit) as ended, ending.safe_output():
            print("more than was asked for")
    assert ended.value.code == 128 + signal.SIGPIPE
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("sweep", [["-m", "dcr.margin=0.1,0.2"], []], ids=["sweep", "run"])
def test_a_signal_ends_the_whole_command(
    command: Command, monkeypatch: pytest.MonkeyPatch, sweep: list[str], number: signal.Signals
) -> None:
    jobs: list[object] = []

    def stopped(settings: object) -> None:
        jobs.append(settings)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # impatient

    monkeypatch.setattr(models, "facts", stopped)
    before = signal.getsignal(number)
    ended = command("train.py", *sweep, "model=tiny")
    assert ended.code == 128 + number
    assert ended.error == f"stopped by {number.name}; the same command goes on"
    assert len(jobs) == 1
    assert signal.getsignal(number) == before


def test_a_defect_keeps_its_traceback_and_the_sweep_goes_on(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[object] = []

    def broken(settings: object) -> None:
        jobs.append(settings)
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(models, "facts", broken)
    ended = command("train.py", "-m", "model=tiny", "dcr.margin=0.1,0.2")
    assert (ended.code, len(jobs)) == (1, 2)
    assert ended.err.count("ZeroDivisionError: a defect") == 2
    with pytest.raises(ZeroDivisionError):
        command("train.py", "model=tiny")


def test_faults_of_disk_and_memory_are_one_line(tmp_path: Path) -> None:
    faults = {
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/file"): "/full/file: No space left",
        torch.OutOfMemoryError("CUDA out of memory"): "out of memory: lower dcr.batch_size",
        RuntimeError("DefaultCPUAllocator: can't allocate memory"): "out of memory: lower",
        MemoryError(): "out of memory: lower",
    }
    for fault, says in faults.items():
        with pytest.raises(UserError, match=says), ending.faults_in_words():
            raise fault
    for bug in (FileNotFoundError(errno.ENOENT, "no", "x"), RuntimeError("shape"), KeyError("x")):
        with pytest.raises(type(bug)), ending.faults_in_words():
            raise bug


# --- python -m dcr.<command> ---


@dataclass
class Options:
    """python -m dcr.made"""

    place: Path = entry.option("a place")
    count: int | None = entry.option("how many", None, least=1, most=9)
    share: float = entry.option("which part", 0.5, least=0, most=1)
    kind: str = entry.option("which kind", "a", choices=("a", "b"))
    many: list[str] = entry.option("as often as you like", [])
    loud: bool = entry.option("not quiet", False)


@dataclass
class Open(Options):
    words: list[str] = entry.option("all else", [], rest=True)


def test_options_are_read_in_every_spelling_and_as_they_are_written() -> None:
    given = ["place=a b:[c] ${x} #1", "--count", "3", "--many=x=y", "--loud", "many={z: 1}"]
    read = entry.parse(Options, given)
    assert read == Options(Path("a b:[c] ${x} #1"), 3, 0.5, "a", ["x=y", "{z: 1}"], True)
    rest = entry.parse(Open, ["one", "two=2", "place=p", "loud=false", "--share", "1", "dcr/x"])
    assert rest == Open(Path("p"), None, 1.0, words=["one", "two=2", "dcr/x"])
    here = entry.parse(Options, ["place=."]).place
    assert here == Path.cwd(), "a folder beside it, such as gate.unfinished, needs its name"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "place: nothing given; it is a place"),
        (["place="], "place=: it needs a value"),
        (["place=p", "--count"], "count=: it needs a value"),
        (["place=p", "count=0"], "count=0: give 1 to 9"),
        (["place=p", f"count=-{'9' * 400}"], "9: give 1 to 9"),
        (["place=p", "count=1.5"], "count=1.5: give a whole number"),
        (["place=p", "share=nan"], "share=nan: give 0 to 1"),
        (["place=p", "share=x"], "share=x: give a number"),
        (["place=p", "kind=c"], "kind=c: choose one of a, b"),
        (["place=p", "loud=perhaps"], "loud=perhaps: give true or false"),
        (["plaice=p"], "plaice=p: no such setting; did you mean place?"),
        (["p"], "p: no such setting; "),
    ],
    ids=str,
)
def test_options_that_cannot_be_name_key_value_and_cure(given: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        entry.parse(Options, given)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_in_one_line(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat, "open_stage", lambda *_: os.kill(os.getpid(), number))
    assert chat.main(["run=x"]) == 128 + number
    said = f"error: stopped by {number.name}; the same command starts anew\n"
    assert capsys.readouterr() == ("", said)


def test_a_signal_ends_a_command_whatever_a_library_raises_behind_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: Command
) -> None:
    """As OmegaConf does, whose own cleaning up fails where a signal fell into its middle."""

    def interrupted(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            raise AttributeError("'NoneType' object has no attribute '_invalidate_flags_cache'")

    monkeypatch.setattr(chat, "open_stage", interrupted)
    assert chat.main(["run=x"]) == 128 + signal.SIGTERM
    assert capfd.readouterr().err == "error: stopped by SIGTERM; the same command starts anew\n"
    monkeypatch.setattr(resolving, "resolve", interrupted)
    ended = command("train.py", "-m", "model=tiny", "seed=0,1")
    assert ended.code == 128 + signal.SIGTERM
    assert ended.error == "stopped by SIGTERM; the same command goes on"


# --- what a command that computes nothing need not wait for ---

HEAVY = (
    *("torch", "transformers", "peft", "lightning", "torchmetrics", "datasets", "pandas"),
    *("matplotlib", "wandb", "lm_eval", "scipy.stats", "sklearn"),
)
LOADED = f"""
import runpy, sys
sys.path[0] = {str(ROOT)!r}
for words in sys.argv[1:]:
    sys.argv = words.split()
    try:
        if sys.argv[0].endswith(".py"):
            runpy.run_path(f"{ROOT}/{{sys.argv[0]}}", run_name="__main__")
        else:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit:
        pass
    print(f"{{words}} loads", *(n for n in {HEAVY} if n in sys.modules), file=sys.stderr)
"""
MODULES = [f"dcr.{name}" for name in commands.COMMANDS if name not in ("train", "eval")]


def loading(words: Sequence[str], folder: Path) -> tuple[list[str], list[str]]:
    """Runs these commands one after the other in a process of their own.

    Returns the lines of stdout, and those of stderr with the heavy modules that each has loaded.
    """
    told = [sys.executable, "-W", "ignore", "-c", LOADED, *words]  # modules that are run again
    ended = subprocess.run(told, cwd=folder, capture_output=True, text=True)
    return ended.stdout.splitlines(), ended.stderr.splitlines()


@pytest.mark.parametrize(
    "words",
    [
        *(["train.py --help"], ["train.py --cfg job"], ["eval.py --help"]),
        [f"{module} --help" for module in MODULES],
    ],
    ids=str,
)
def test_help_needs_no_torch(words: list[str], tmp_path: Path) -> None:
    assert loading(words, tmp_path)[1] == [f"{each} loads" for each in words]


@pytest.mark.parametrize(
    "words",
    [
        *(["train.py dcr.epoch=3"], ["train.py dcr.margin=2"]),
        *(["eval.py run=not/there"], ["eval.py tasks=[foo]"]),
        [f"{module} --nope=3" for module in MODULES],
        [
            *(f"dcr.{name} dcr.epoch=3" for name in ("choice", "align", "search")),
            *("dcr.study study=ratio dcr.epoch=3", "dcr.augment source=x out=y.jsonl tasks=[foo]"),
            *("dcr.chat run=not/there", "dcr.export run=not/there out=x", "dcr.report"),
            "dcr.report not/there --figure 6 margin=1",
        ],
    ],
    ids=str,
)
def test_a_users_error_needs_no_torch(words: list[str], tmp_path: Path) -> None:
    said = loading(words, tmp_path)[1]
    assert said[1::2] == [f"{each} loads" for each in words]
    assert all(line.startswith("error: ") for line in said[::2])
