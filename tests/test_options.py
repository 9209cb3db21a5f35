"""What both stages can be told beyond the paper, each option by itself."""

import copy
import json
from pathlib import Path

import pytest
import torch
from test_sft import adapted, in_micro_batches, nll_by_row, pair_rows, without_dropout
from tiny_run import (
    Stop,
    at_each_step,
    changed,
    gradients_of_one_step,
    logged,
    same,
    settings,
    stop,
    weights,
)

from dcr import cost, data, models, plan, train
from dcr.config import (
    ConfigError,
    Stage,
    TrainConfig,
)
from dcr.models import Policy
from dcr.runs import Run
from dcr.training.contrastive import ContrastiveModule
from dcr.training.sft import SFTModule

PROBES = 2  # passes of two short rows, packed and padded, that say whether rows may be packed
OPTIONS = {
    "from_block": "sft.from_block=2",
    "pairs": "dcr.loss=triplet dcr.sampler=pairs dcr.ratio=null dcr.draws=40 "
    "data.seemingly_toxic.source=[demo_seemingly_toxic] data.toxic.source=[demo_toxic]",
}


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_an_option_reaches_the_weights_and_is_gone_on_with_to_the_bit(
    tiny: TrainConfig, whole: Path, tmp_path: Path, option: str
) -> None:
    told, stopped = changed(tiny, *option.split()), SFTModule
    if option.startswith("dcr"):
        stopped = ContrastiveModule
    train.train(told, Run(tmp_path / "one"))
    assert not same(weights(tmp_path / "one"), weights(whole))
    with pytest.MonkeyPatch.context() as patch:
        at_each_step(
            patch,
            lambda trainer, module, _: (
                isinstance(module, stopped) and trainer.global_step == 3 and stop()
            ),
        )
        with pytest.raises(Stop):
            train.train(told, Run(tmp_path / "two"))
    train.train(told, Run(tmp_path / "two"))
    assert same(weights(tmp_path / "two"), weights(tmp_path / "one"))
    assert logged(tmp_path / "two") == logged(tmp_path / "one")


def test_a_run_made_before_the_options_were_known_goes_on(
    tiny: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    train.train(tiny, run)
    made_with = run.config()
    for option in ("readout", "from_block"):
        del made_with["sft"][option]
    del made_with["dcr"]["loss"]
    run.config_file.write_text(json.dumps(made_with))
    train.train(tiny, run)
    for option in (*list(OPTIONS.values())[:-1], "dcr.loss=supcon"):
        with pytest.raises(ConfigError, match=".".join(option.partition("=")[0].split(".")[:2])):
            train.train(changed(tiny, *option.split()), run)


# --- LoRA above a block alone ---


def test_below_its_first_block_sft_trains_nothing_and_keeps_no_graph(
    policy: Policy, tiny: TrainConfig
) -> None:
    config = without_dropout(tiny.sft, from_block=2)
    policy = adapted(policy, config)
    below, above = models.decoder_blocks(policy.model)
    passed: list[bool] = []
    below.register_forward_hook(lambda _, __, output: passed.append(output.requires_grad))
    whole, step = copy.deepcopy(policy.model), in_micro_batches(pair_rows(policy), 150)
    taken = gradients_of_one_step(SFTModule(policy, config, 1), step)
    assert passed == [False] * (PROBES + len(step))
    assert {".layers.1." in name for name in taken} == {True}
    assert len(taken) == len([w for w in above.parameters() if w.requires_grad])
    whole.requires_grad_(True)
    torch.cat([nll_by_row(whole, row) for row in pair_rows(policy)]).mean().backward()
    truth = {name: weight.grad for name, weight in whole.named_parameters()}
    for name, gradient in taken.items():
        torch.testing.assert_close(gradient, truth[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("sft.from_block=3", r"sft\.from_block=3: the model has blocks 1 to 2"),
        ("sft.from_block=0", r"sft\.from_block=0: blocks are counted from 1"),
    ],
)
def test_what_cannot_be_is_refused(
    tiny: TrainConfig, tmp_path: Path, told: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train.train(settings(tmp_path / "rows", *told.split()), Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_plan_counts_less_where_no_gradient_passes(tiny: TrainConfig) -> None:
    flops, saved = [], []
    for told in (tiny, changed(tiny, "sft.from_block=2")):
        shape = cost.stage_shape(told, Stage.sft)
        load = plan.load_of(told, plan.batches_of(told, Stage.sft, data.rows_of(told)))
        flops.append(cost.epoch_flops(told, Stage.sft, shape, load))
        saved.append(shape.full_saved)
    assert flops[1] < flops[0]
    assert saved[1] == pytest.approx(saved[0] / 2)
