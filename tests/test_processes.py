"""Several processes are one: the same global batches, the same pairs, the same weights."""

import contextlib
import logging
import multiprocessing
import os
import socket
import traceback
import warnings
from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only
from tiny_run import Stop, at_each_step, changed, logged, settings, stop, weights

from dcr import train
from dcr.core.config.training import TrainConfig
from dcr.core.runs import Run
from dcr.core.training.resuming import TrainingError

# No dropout, whose draws are a rank's own. Nine prompts a step and then two or one, so that ranks
# hold uneven shares and in the last step of an epoch one of three has no row of its own.
SHARED = ("dcr.lora.dropout=0", "sft.lora.dropout=0", "dcr.batch_size=9", "dcr.draws=20")
UNTIED = "model.architecture.tie_word_embeddings=false"  # so that stage one trains embeddings
SLOW = (pytest.mark.slow, pytest.mark.timeout(900))
GENERAL = "dcr.nll.weight=0.5 dcr.nll.source=general dcr.nll.general_batch_size=3"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return settings(tmp_path_factory.mktemp("rows"), *SHARED)


def rank(index: int, world: int, port: int, made: TrainConfig, folder: Path) -> None:
    """One process of several, told its place as torchrun does."""
    names = {"LOCAL_RANK": index, "RANK": index, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {name: str(value) for name, value in names.items()} | {"GROUP_RANK": "0"}
    rank_zero_only.rank = index
    warnings.simplefilter("ignore")
    logging.disable(logging.DEBUG)  # torch tells each call among processes, and pytest keeps it
    try:
        train.train(made, Run(folder))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # past the hooks of the process that was forked


def together(
    made: TrainConfig, folder: Path, world: int, strategy: str = "ddp", ends: int = 0
) -> None:
    """Train on several gloo processes, forked from this one so that nothing is imported anew."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = changed(made, f"trainer.devices={world}", f"trainer.strategy={strategy}")
    fork = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that threads and fork do not go together
        ranks = [
            fork.Process(target=rank, args=(i, world, port, several, folder)) for i in range(world)
        ]
        for process in ranks:
            process.start()
    for process in ranks:
        process.join(100)
        process.kill()
    assert [process.exitcode for process in ranks] == [ends] * world


def same_results(one: Path, several: Path, named: str) -> None:
    """Weights, snapshots and logged values of two runs within rounding."""
    found, wanted = weights(several), weights(one)
    assert found.keys() == wanted.keys()
    largest = max(float((found[name] - wanted[name]).abs().max()) for name in wanted)
    print(f"{named}: weights differ by at most {largest:.1e}")
    # Adam's first steps divide by the gradient's size: where that is rounding, so is the step, of
    # one weight or the other by some of the rate of 1e-3
    assert largest < 5e-4
    for name, expected in wanted.items():
        apart = int(((found[name] - expected).abs() > 1e-5).sum())
        assert apart <= max(1, expected.numel() / 100), f"{name}: {apart} weights differ"
    assert {f.name for f in one.glob("sft/*")} == {f.name for f in several.glob("sft/*")}
    steps, again = logged(one), logged(several)
    assert [row[:3] for row in again] == [row[:3] for row in steps]
    assert [row[3] for row in again] == pytest.approx([row[3] for row in steps], abs=1e-4)


@pytest.mark.parametrize(
    ("several", "switches"),
    [
        (["ddp*2", "fsdp*2"], "dcr.nll.weight=0 dcr.batch_size=3"),  # no rank holds both kinds
        (["ddp*3"], "dcr.nll.weight=0.5 dcr.optim.clip=0.1 data.validation=0.4"),
        (["fsdp*2"], f"{GENERAL} {UNTIED}"),
        (["ddp*3"], "method=stl stage=all sft.batch_size=13"),
        (["fsdp*2"], "stage=all dcr.nll.weight=0.5 dcr.adapter=lora tracking.snapshots=2"),
        *(
            pytest.param(["ddp*2", "ddp*4", "fsdp*2", "fsdp*4"], switches, marks=SLOW)
            for switches in (
                "stage=all dcr.nll.weight=0",
                f"stage=all dcr.nll.weight=0.5 {UNTIED}",
                f"stage=all {GENERAL} sft.gradient_checkpointing=true",
                "stage=all dcr.nll.weight=0 dcr.adapter=lora dcr.lora.rank=3 sft.lora.rank=3",
                f"stage=all dcr.nll.weight=0.5 dcr.adapter=lora dcr.optim.clip=0.1 {UNTIED}",
                f"stage=all {GENERAL} dcr.adapter=lora sft.micro_tokens=100",
                "method=stl stage=all sft.batch_size=13 sft.readout.steps=3 sft.readout.lr=1e-4",
            )
        ),
    ],
)
def test_several_processes_train_what_one_does(
    tiny: TrainConfig, tmp_path: Path, several: list[str], switches: str
) -> None:
    made = changed(tiny, "stage=contrastive", *switches.split())
    train.train(made, Run(tmp_path / "one"))
    for each in several:
        strategy, world = each.split("*")
        together(made, tmp_path / each, int(world), strategy)
        same_results(tmp_path / "one", tmp_path / each, f"{each} {switches}")


@pytest.mark.parametrize(
    ("stopped", "further", "switches"),
    [
        ("fsdp*2", "auto*1", "dcr.nll.weight=0.5"),
        ("auto*1", "fsdp*2", "method=stl stage=all"),
        *(
            pytest.param(stopped, further, switches, marks=SLOW)
            for stopped, further in (
                ("fsdp*2", "auto*1"),
                ("fsdp*4", "ddp*2"),
                ("fsdp*2", "fsdp*4"),
                ("auto*1", "fsdp*4"),
                ("ddp*2", "auto*1"),
            )
            for switches in (
                f"dcr.nll.weight=0.5 {UNTIED}",
                "dcr.nll.weight=0 dcr.adapter=lora dcr.lora.rank=3",
                "method=stl stage=all sft.lora.rank=3",
            )
        ),
    ],
)
def test_a_checkpoint_goes_on_on_another_number_of_processes(
    tiny: TrainConfig, tmp_path: Path, stopped: str, further: str, switches: str
) -> None:
    made = changed(tiny, "stage=contrastive", *switches.split())
    train.train(made, Run(tmp_path / "one"))
    begun: list[int] = []
    for how in (stopped, further):
        strategy, world = how.split("*")
        with pytest.MonkeyPatch.context() as patch:
            if how == stopped:  # behind the checkpoint of step 4, in the middle of an epoch
                at_each_step(patch, lambda trainer, *_: trainer.global_step == 5 and stop())
            else:
                at_each_step(patch, lambda trainer, *_: begun.append(trainer.global_step))
            if strategy == "auto":
                with contextlib.suppress(Stop):
                    train.train(made, Run(tmp_path / "moved"))
            else:
                ends = int(how == stopped)
                together(made, tmp_path / "moved", int(world), strategy, ends)
    assert not begun or begun[0] in (4, 5)
    same_results(tmp_path / "one", tmp_path / "moved", f"{stopped} -> {further} {switches}")


def test_a_stage_that_moves_no_weight_is_not_done(tiny: TrainConfig, tmp_path: Path) -> None:
    still = changed(tiny, "dcr.optim.lr=1e-30")
    with pytest.raises(TrainingError, match="contrastive: no weight moved in 6 steps"):
        train.train(still, Run(tmp_path / "run"))
    assert not (tmp_path / "run" / "contrastive").exists()
