import logging
import os
import resource
import runpy
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import (
    Stop,
    at_each_step,
    failing,
    logged,
    overrides,
    same,
    settings,
    stop,
    weights,
)

from dcr import headroom, train
from dcr.core import models, storage
from dcr.core.config import Method, UserError
from dcr.core.config.training import SFTConfig, TrainConfig
from dcr.core.data.rows import PairBatch
from dcr.core.runs import Run
from dcr.core.training import resuming, stages
from dcr.core.training.resuming import Checkpoints, Interrupted, TrainingError, VerifiedCheckpointIO
from dcr.core.training.stages import ContrastiveModule, SFTModule

ROOT = Path(__file__).parent.parent
STEPS = {"contrastive": 10, "sft": 8}  # two epochs of five and of four
MODULES = {"contrastive": ContrastiveModule, "sft": SFTModule}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny: TrainConfig) -> Path:
    """A run that was stopped in stage one behind checkpoints of steps 4 and 5."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_each_step(patch, lambda trainer, *_: trainer.global_step == 5 and stop())
        with pytest.raises(Stop):
            train.train(tiny, Run(run))
    return run


@pytest.fixture
def stopped(two_checkpoints: Path, tmp_path: Path) -> Path:
    return shutil.copytree(two_checkpoints, tmp_path / "run")


@pytest.fixture
def act() -> Iterator[Any]:
    """Do something when a stage is about to make a step; returns the steps that were begun."""
    with pytest.MonkeyPatch.context() as patch:

        def install(stage: str, step: int = -1, deed: Any = stop) -> list[int]:
            begun: list[int] = []

            def at(trainer: Any, module: Any, _: Any) -> None:
                if isinstance(module, MODULES[stage]):
                    begun.append(trainer.global_step)
                    if trainer.global_step == step:
                        deed(module)

            patch.undo()
            at_each_step(patch, at)
            return begun

        yield install


def checkpoints(run: Path, stage: str) -> list[str]:
    return sorted(file.name for file in (run / "checkpoints" / stage).glob("step-*.ckpt"))


# --- a process killed outright ---


def in_child(function: Any, *given: Any) -> int:
    """The exit status of a process forked from this one, so that nothing is imported anew."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that threads and fork do not go together
        child = os.fork()
        if not child:
            status: Any = 0
            try:
                function(*given)
            except SystemExit as ended:
                status = ended.code
            except BaseException:
                traceback.print_exc()
                status = 99
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def command(stage: str, step: int, call: int, number: int, overrides: list[str]) -> None:
    """`train.py` that signals itself at the n-th forward pass of a step."""
    owner, name = MODULES[stage], "nll" if stage == "sft" else "circle"
    before, calls = getattr(owner, name), []

    def fatal(self: Any, *given: Any) -> Any:
        if self.global_step == step and self.trainer.training:
            calls.append(step)
            if len(calls) == call:
                os.kill(os.getpid(), number)
        return before(self, *given)

    setattr(owner, name, fatal)
    sys.argv = ["train.py", *overrides]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def full_disk(file: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    with pytest.raises(TrainingError, match=f"{file}: cannot be written"):
        VerifiedCheckpointIO(torch.nn.Module()).save_checkpoint({"x": torch.zeros(100_000)}, file)


def test_kill_9_in_the_middle_of_steps_and_sigterm_end_in_the_same_bits(
    whole: Path, tmp_path: Path, act: Any
) -> None:
    rows, run = tmp_path / "rows", tmp_path / "run"
    same_rows = settings(rows)
    told = overrides(rows, f"run={run}")

    def killed(stage: str, step: int, call: int, number: signal.Signals) -> int:
        return in_child(command, stage, step, call, number, told)

    assert killed("contrastive", 7, 1, signal.SIGKILL) == -signal.SIGKILL
    assert checkpoints(run, "contrastive") == ["step-000005.ckpt", "step-000006.ckpt"]
    # goes on in stage one, crosses into SFT, and is asked to stop between micro-batches
    assert killed("sft", 1, 2, signal.SIGTERM) == 128 + signal.SIGTERM
    assert (run / "contrastive").is_dir()
    assert checkpoints(run, "sft") == ["step-000001.ckpt"]
    stage_one = [step for stage, step, key, _ in logged(run) if key == "contrastive/step_circle"]
    assert stage_one == list(range(10)), "each step of stage one is logged once"
    # between two micro-batches: gradients of a part of the step are there and are lost
    assert killed("sft", 5, 2, signal.SIGKILL) == -signal.SIGKILL
    assert checkpoints(run, "sft") == ["step-000002.ckpt", "step-000004.ckpt"]
    begun = act("sft")
    train.train(same_rows, Run(run))
    assert begun == [4, 5, 6, 7], "the first step after the last checkpoint, and no earlier one"
    assert same(weights(run), weights(whole))
    assert logged(run) == logged(whole)


# --- stopped at any step, within this process ---


def test_stopped_again_and_again_it_goes_on_with_the_next_step(
    tiny: TrainConfig, whole: Path, tmp_path: Path, act: Any
) -> None:
    """Epoch means are over all steps of the epoch, each row once, wherever it was stopped."""
    run, expected = tmp_path / "run", {"contrastive": 0, "sft": 0}
    for stage, step, kept in [
        ("contrastive", 1, 0),  # no checkpoint yet
        ("contrastive", 4, 4),  # only the last step of the epoch is missing
        ("contrastive", 5, 5),  # exactly between two epochs
        ("contrastive", 7, 6),  # in mid-epoch
        ("contrastive", 9, 8),  # the very last step
        ("sft", 0, 0),
        ("sft", 3, 2),
        ("sft", 4, 4),
        ("sft", 5, 4),
        ("sft", 7, 6),
    ]:
        begun = act(stage, step, stop)
        with pytest.raises(Stop):
            train.train(tiny, Run(run))
        assert begun == list(range(expected[stage], step + 1))
        expected[stage] = kept
    begun = act("sft")
    train.train(tiny, Run(run))
    assert begun == [6, 7]
    assert same(weights(run), weights(whole))
    assert logged(run) == logged(whole)


FAULTS = [
    (SFTModule, "validation_step", Stop()),  # when the step before is repeated
    (stages, "save_adapter", Stop()),  # when the result is being written
    (SFTModule, "nll", torch.OutOfMemoryError("CUDA out of memory. Tried 20 GiB.\nmore")),
    (stages, "save_full", UserError("disk full")),
]


@pytest.mark.parametrize(("owner", "name", "error"), FAULTS)
def test_stopped_anywhere_it_ends_in_the_same_bits(
    tiny: TrainConfig,
    half: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    error: Exception,
) -> None:
    run = tmp_path / "new" if name == "save_full" else half
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(error))
        with pytest.raises((Stop, UserError)) as caught:
            train.train(tiny, Run(run))
    if name == "nll":
        assert isinstance(caught.value, TrainingError)
        assert caught.value.exit_code == 1
        assert "20 GiB.): lower sft.micro_tokens" in str(caught.value)
    if name.startswith("save"):
        assert list((run / "checkpoints").rglob("*.ckpt")), "nothing is lost"
    train.train(tiny, Run(run))
    assert same(weights(run), weights(whole))
    assert logged(run) == logged(whole)
    assert not list((run / "checkpoints").rglob("*.*")), "gone when a stage is done"


def test_a_finished_stage_is_left_alone(tiny: TrainConfig, half: Path, act: Any) -> None:
    def results() -> dict[Path, tuple[int, int]]:
        files = half.glob("*/*.safetensors")
        return {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in files}

    before, begun = results(), act("contrastive")
    train.train(tiny, Run(half))
    assert begun == []
    after = results()
    assert before.items() < after.items()
    train.train(tiny, Run(half))
    assert results() == after


def test_passes_follow_from_the_settings_however_little_memory_is_free(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another number would draw other dropout masks, and weights would tell of the machine."""
    monkeypatch.setattr(headroom, "free_bytes", lambda _: 0)
    sft, run = replace(tiny.sft, micro_tokens=SFTConfig().micro_tokens), Run(tmp_path / "run")
    passes: list[int] = []
    kept = SFTModule.training_step

    def note(module: SFTModule, batch: list[PairBatch], index: int) -> None:
        passes.append(len(batch))
        kept(module, batch, index)

    monkeypatch.setattr(SFTModule, "training_step", note)
    train.train(replace(tiny, method=Method.stl, sft=sft), run)
    assert run.config()["sft"]["micro_tokens"] == 2048
    assert set(passes) == {1}, "a step of the tiny run is one pass of so many tokens"


# --- what stands in a checkpoint ---


def test_checkpoints_hold_trainable_tensors_alone(tiny: TrainConfig, half: Path, act: Any) -> None:
    act("sft", 3, stop)
    with pytest.raises(Stop):
        train.train(tiny, Run(half))
    (file,) = (half / "checkpoints" / "sft").glob("*.ckpt")
    # weights_only refuses anything that is not a tensor or a plain value
    state = torch.load(file, weights_only=True)["state_dict"]
    tensors = {name for name in state if name.startswith("model.")}
    assert tensors
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
    module = resuming.ResumableModule()
    module.model = models.open_policy(tiny.model, tiny.dcr.precision).model
    with pytest.raises(TrainingError, match="lacks trainable weights"):
        module.on_load_checkpoint({"state_dict": state})


# --- damaged files ---


def sum_of(file: Path) -> Path:
    return file.with_suffix(".sha256")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def a_folder(place: Path) -> None:
    place.unlink()
    place.mkdir()
    (place / "x").touch()


DAMAGES = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "a bit flipped": flip_a_bit,
    "no sum": lambda file: sum_of(file).unlink(),
    "a sum that is no text": lambda file: sum_of(file).write_bytes(b"\xff\xfe"),
    "a sum that is a folder": lambda file: a_folder(sum_of(file)),
    "a folder in its place": a_folder,
}


def place(run: Path) -> tuple[Path, Path]:
    older, newer = sorted((run / "checkpoints" / "contrastive").glob("*.ckpt"))
    return older, newer


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    stopped: Path, caplog: Any, damage: Any
) -> None:
    older, newer = place(stopped)
    assert resuming.newest_checkpoint(older.parent) == newer
    damage(newer)
    assert resuming.newest_checkpoint(older.parent) == older
    assert [r.message for r in caplog.records if newer.name in r.message and "damaged" in r.message]


def test_from_the_checkpoint_before_a_damaged_one_it_ends_in_the_same_bits(
    tiny: TrainConfig, stopped: Path, whole: Path, act: Any
) -> None:
    older, newer = place(stopped)
    assert sorted(older.parent.iterdir()) == sorted([older, newer, sum_of(older), sum_of(newer)])
    flip_a_bit(newer)
    torn = older.with_name(".writing-abc")  # as a kill leaves it
    torn.write_bytes(b"half")
    for name in ("step-.ckpt", "step-abc.ckpt", "step-1e9.ckpt", "step--00003.ckpt"):
        newer.with_name(name).touch()  # what no run wrote
    begun = act("contrastive")
    train.train(tiny, Run(stopped))
    assert begun[0] == resuming.step_of(older) == 4
    assert not list((stopped / "checkpoints").rglob("*.*"))
    assert not torn.exists()
    assert same(weights(stopped), weights(whole))
    assert logged(stopped) == logged(whole)


def test_training_never_silently_starts_again(tiny: TrainConfig, stopped: Path, act: Any) -> None:
    for file in place(stopped):
        flip_a_bit(file)
    begun = act("contrastive")
    with pytest.raises(UserError, match=f"{stopped}.*every checkpoint is damaged") as caught:
        train.train(tiny, Run(stopped))
    assert begun == []
    assert caught.value.exit_code == 2


def test_a_file_where_checkpoints_belong_is_named(tmp_path: Path) -> None:
    (tmp_path / "sft").touch()
    with pytest.raises(UserError, match=r"sft: a file where checkpoints belong"):
        resuming.newest_checkpoint(tmp_path / "sft")


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (os, "replace", OSError(30, "Read-only file system")),
        (torch, "save", OSError(28, "No space left on device")),
        # what torch makes of a full disk
        (torch, "save", RuntimeError("[enforce fail at inline_container.cc] . unexpected pos")),
        (storage.tempfile, "mkstemp", PermissionError(13, "Permission denied")),
    ],
)
def test_a_failed_write_names_the_path_and_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception
) -> None:
    writer, old, new = (
        VerifiedCheckpointIO(torch.nn.Module()),
        tmp_path / "step-000002.ckpt",
        "step-000004.ckpt",
    )
    writer.save_checkpoint({"x": torch.ones(3)}, old)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(error))
        with pytest.raises(TrainingError, match=f"{tmp_path / new}: cannot be written"):
            writer.save_checkpoint({"x": torch.zeros(3)}, tmp_path / new)
    assert not list(tmp_path.glob(".writing-*"))
    assert [file.name for file in tmp_path.iterdir()] != [new]
    assert resuming._is_whole(old)
    assert torch.equal(writer.load_checkpoint(old)["x"], torch.ones(3))


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    assert in_child(full_disk, tmp_path / "step-000004.ckpt") == 0
    assert not list(tmp_path.iterdir())


# --- signals ---


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Send a signal in a pass of a step, forwards or backwards; returns the passes begun since."""

    def install(stage: str, step: int, where: str, number: int) -> list[int]:
        since: list[int] = []
        name = "nll" if stage == "sft" else "circle"
        plain, optimise = getattr(MODULES[stage], name), MODULES[stage].on_before_optimizer_step

        def send(*_: Any) -> None:
            os.kill(os.getpid(), number)
            since.append(-1)

        def passed(module: Any, *given: Any) -> Any:
            here = module.global_step == step and (module.training or where == "validation")
            since.extend([module.global_step] * bool(since))
            if here and not since and where in ("forward", "validation"):
                send()
            loss, other = plain(module, *given)
            if here and not since and where == "backward":
                loss.register_hook(send)
            return loss, other

        def stepping(module: Any, optimizer: Any) -> None:
            if module.global_step == step and where == "optimizer":
                send()
            optimise(module, optimizer)

        monkeypatch.setattr(MODULES[stage], name, passed)
        monkeypatch.setattr(MODULES[stage], "on_before_optimizer_step", stepping)
        return since

    return install


@pytest.mark.parametrize(
    ("stage", "step", "where", "number", "kept"),
    [
        ("contrastive", 0, "backward", signal.SIGINT, 0),
        ("contrastive", 2, "optimizer", signal.SIGINT, 3),
        ("contrastive", 4, "backward", signal.SIGTERM, 4),  # the last step of an epoch
        ("contrastive", 5, "validation", signal.SIGUSR2, 4),  # behind it
        ("sft", 0, "forward", signal.SIGUSR1, 0),
        ("sft", 7, "backward", signal.SIGTERM, 7),  # the very last step
        ("sft", 6, "optimizer", signal.SIGTERM, 7),
    ],
)
def test_a_signal_leaves_the_step_unfinished_that_it_falls_into(
    tiny: TrainConfig,
    whole: Path,
    tmp_path: Path,
    half: Path,
    act: Any,
    signalled: Any,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    step: int,
    where: str,
    number: Any,
    kept: int,
) -> None:
    run, handler = half if stage == "sft" else tmp_path / "new", signal.getsignal(number)
    since = signalled(stage, step, where, number)
    with pytest.raises(Interrupted, match=f"stopped by {number.name};") as caught:
        train.train(tiny, Run(run))
    monkeypatch.undo()
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) == handler
    assert since == [-1], "no pass was begun behind the signal"
    assert not (run / stage).exists()
    assert checkpoints(run, stage)[-1:] == ([f"step-{kept:06d}.ckpt"] if kept else [])
    begun = act(stage)
    train.train(tiny, Run(run))
    assert begun == list(range(kept, STEPS[stage]))
    assert same(weights(run), weights(whole))
    assert logged(run) == logged(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once_and_says_so(
    tiny: TrainConfig, half: Path, act: Any, number: signal.Signals
) -> None:
    def twice(_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), number)

    act("sft", 3, twice)
    with pytest.raises(Interrupted, match=f"stopped by {number.name} a second time") as caught:
        train.train(tiny, Run(half))
    assert caught.value.exit_code == 128 + number
    assert checkpoints(half, "sft") == ["step-000002.ckpt"], "not waited for"


def test_slurm_sends_several_signals_for_one_request(
    tiny: TrainConfig, half: Path, act: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preempted(_: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)

    monkeypatch.setenv("SLURM_JOB_ID", "12")
    act("sft", 3, preempted)
    with pytest.raises(Interrupted, match="stopped by SIGTERM; the same command goes on"):
        train.train(tiny, Run(half))
    assert checkpoints(half, "sft")[-1] == "step-000003.ckpt"


def test_a_ctrl_c_before_the_first_step_is_one(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming.ResumableModule, "on_fit_start", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):  # which Lightning makes a silent exit(1)
        train.train(tiny, Run(tmp_path / "run"))


def test_a_sigterm_before_the_first_step_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def before_a_step() -> None:
        def terminated(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        # Lightning has set its handler by then, and dcr.core.training not yet its own
        pytest.MonkeyPatch().setattr(resuming.Checkpoints, "on_train_start", terminated)
        # Lightning's handler wrote to the stream that it found when it was imported
        logging.getLogger("lightning").handlers = [logging.StreamHandler()]
        logging.getLogger("lightning.pytorch").handlers = [logging.StreamHandler()]
        command("sft", -1, 0, 0, overrides(tmp_path / "rows", f"run={tmp_path / 'run'}"))

    assert in_child(before_a_step) == 128 + signal.SIGTERM
    (line,) = capfd.readouterr().err.splitlines()  # Lightning's own word is not shown
    assert line.startswith("error: stopped by SIGTERM; the same command goes on")


# --- numbers that are not finite ---


def poison(module: Any) -> None:
    weight = next(p for p in module.parameters() if p.requires_grad)
    weight.data.view(-1)[0] = float("nan")


@pytest.mark.parametrize("stage", ["contrastive", "sft"])
def test_a_loss_that_is_not_finite_stops_with_step_and_rows(
    tiny: TrainConfig, tmp_path: Path, half: Path, act: Any, stage: str
) -> None:
    run = half if stage == "sft" else tmp_path / "new"
    act(stage, 3, poison)
    row = "(seemingly_)?toxic-" if stage == "contrastive" else "(normal|safety)-"
    with pytest.raises(TrainingError, match=rf"loss is nan at step 3, rows {row}\d+"):
        train.train(tiny, Run(run))
    assert checkpoints(run, stage) == ["step-000002.ckpt"]
    state = torch.load(run / "checkpoints" / stage / "step-000002.ckpt", weights_only=True)
    trained = [w for name, w in state["state_dict"].items() if name.startswith("model.")]
    assert trained
    assert all(w.isfinite().all() for w in trained)


def test_bad_weights_never_reach_a_checkpoint(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Checkpoints.on_train_batch_end

    def poisoned(self: Any, trainer: Any, module: Any, *rest: Any) -> None:
        if trainer.global_step == 4:
            poison(module)
        saved(self, trainer, module, *rest)

    monkeypatch.setattr(Checkpoints, "on_train_batch_end", poisoned)
    with pytest.raises(TrainingError, match=r"not finite at step 4.*no checkpoint written"):
        train.train(tiny, Run(tmp_path / "run"))
    assert checkpoints(tmp_path / "run", "contrastive") == ["step-000002.ckpt"]


@pytest.mark.parametrize("stage", ["contrastive", "sft"])
def test_a_gradient_that_is_not_finite_reaches_no_weight(
    tiny: TrainConfig, tmp_path: Path, half: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    run = half if stage == "sft" else tmp_path / "new"
    module, before = MODULES[stage], MODULES[stage].on_before_optimizer_step

    def spoilt(self: Any, optimizer: Any) -> None:
        if self.global_step == 1:
            next(p for p in self.parameters() if p.requires_grad).grad.view(-1)[0] = float("inf")
        before(self, optimizer)

    monkeypatch.setattr(module, "on_before_optimizer_step", spoilt)
    with pytest.raises(TrainingError, match=r"gradient is not finite at step 1, rows \w+-\d+"):
        train.train(tiny, Run(run))


# --- memory, and other processes in the folder ---


def test_a_process_whose_folder_was_deleted_writes_nothing_into_a_new_one(
    tiny: TrainConfig, tmp_path: Path, act: Any
) -> None:
    run = tmp_path / "run"

    def replaced(_: Any) -> None:
        run.rename(tmp_path / "old")
        with storage.locked(run):
            (run / "theirs").touch()

    act("contrastive", 3, replaced)
    with pytest.raises(UserError, match="deleted or replaced"):
        train.train(tiny, Run(run))
    assert {file.name for file in run.rglob("*")} == {".lock", "theirs"}


def test_a_process_whose_folder_was_deleted_says_so(
    tiny: TrainConfig, tmp_path: Path, act: Any
) -> None:
    run = tmp_path / "run"
    act("contrastive", 3, lambda _: shutil.rmtree(run))
    with pytest.raises(UserError, match="deleted or replaced"):
        train.train(tiny, Run(run))
    assert not run.exists()
