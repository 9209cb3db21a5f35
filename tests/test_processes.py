"""Two processes are one: the same global batches, the same pairs, the same weights."""

import multiprocessing
import os
import socket
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from tiny_run import changed, logged, settings, weights

from dcr import train
from dcr.config import TrainConfig
from dcr.runs import Run
from dcr.training.resuming import TrainingError

# No dropout, whose draws are a rank's own. Nine prompts a step and then two or one, so that ranks
# hold uneven shares and in the last step of an epoch one of three has no row of its own.
SHARED = ("dcr.lora.dropout=0", "sft.lora.dropout=0", "dcr.batch_size=9", "dcr.draws=20")


PAIRS = (
    "dcr.sampler=pairs dcr.ratio=null data.seemingly_toxic.source=[demo_seemingly_toxic] "
    "data.toxic.source=[demo_toxic]"
)


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
    try:
        train.train(made, Run(folder))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # past the hooks of the process that was forked


def together(made: TrainConfig, folder: Path, world: int = 2) -> None:
    """Train on several gloo processes, forked from this one so that nothing is imported anew."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = changed(made, f"trainer.devices={world}", "trainer.strategy=ddp")
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
    assert [process.exitcode for process in ranks] == [0] * world


@pytest.mark.parametrize(
    ("world", "switches"),
    [
        (2, "dcr.nll.weight=0"),
        (2, "dcr.nll.weight=0 dcr.batch_size=3"),  # no rank holds a pair of each kind
        (2, "dcr.nll.weight=0.5"),
        (2, f"dcr.nll.weight=0 dcr.loss=triplet dcr.batch_size=10 {PAIRS}"),
        (2, "dcr.nll.weight=0.5 dcr.nll.source=general dcr.nll.general_batch_size=3"),
        (2, "dcr.nll.weight=0.5 dcr.adapter=lora"),
        (2, "dcr.nll.weight=0 dcr.adapter=lora"),
        (3, "dcr.nll.weight=0.5 dcr.optim.clip=0.1"),
        (3, "method=stl stage=all sft.batch_size=13"),
        (2, "stage=all sft.contrast.weight=0.5 sft.first_token_weight=3 sft.twins.share=0.1"),
    ],
)
def test_several_processes_train_what_one_does(
    tiny: TrainConfig, tmp_path: Path, world: int, switches: str
) -> None:
    made = changed(tiny, "stage=contrastive", *switches.split())
    train.train(made, Run(tmp_path / "one"))
    together(made, tmp_path / "several", world)
    one, several = weights(tmp_path / "one"), weights(tmp_path / "several")
    for name, weight in one.items():
        # Adam's first steps divide by the gradient's size: where that is rounding, so is the step
        torch.testing.assert_close(several[name], weight, rtol=0, atol=1e-5)
    steps = [row for row in logged(tmp_path / "one") if "/step_" in row[2]]
    again = [row for row in logged(tmp_path / "several") if "/step_" in row[2]]
    assert [row[:3] for row in again] == [row[:3] for row in steps]
    assert [row[3] for row in again] == pytest.approx([row[3] for row in steps], abs=1e-5)


def test_a_stage_that_moves_no_weight_is_not_done(tiny: TrainConfig, tmp_path: Path) -> None:
    still = changed(tiny, "dcr.optim.lr=1e-30")
    with pytest.raises(TrainingError, match="contrastive: no weight moved in 6 steps"):
        train.train(still, Run(tmp_path / "run"))
    assert not (tmp_path / "run" / "contrastive").exists()
