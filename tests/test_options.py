"""What both stages can be told beyond the paper, each option by itself."""

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sft import adapted, in_micro_batches, nll_by_row, pair_rows, without_dropout
from tiny_run import (
    Stop,
    at_each_step,
    changed,
    composed,
    gradients_of_one_step,
    logged,
    same,
    settings,
    stop,
    weights,
    write_jsonl,
)

from dcr import cli, config, cost, data, losses, models, plan, refusal, sources, train
from dcr.config import (
    ConfigError,
    ContrastConfig,
    DataConfig,
    Kind,
    Pooling,
    ReadoutConfig,
    SFTConfig,
    Stage,
    TrainConfig,
    TwinsConfig,
)
from dcr.models import Policy
from dcr.runs import Run
from dcr.training import sft
from dcr.training.contrastive import ContrastiveModule
from dcr.training.sft import SFTModule
from tests.shapes import chat_of

PROBES = 2  # passes of two short rows, packed and padded, that say whether rows may be packed
OPTIONS = {
    "twins": "sft.twins.share=0.3",
    "contrast": "sft.contrast.weight=0.5 sft.contrast.batch_size=4",
    "first_token": "sft.first_token_weight=3",
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
    for option in ("readout", "twins", "contrast", "first_token_weight", "from_block"):
        del made_with["sft"][option]
    del made_with["dcr"]["loss"]
    run.config_file.write_text(json.dumps(made_with))
    train.train(tiny, run)
    for option in (*list(OPTIONS.values())[:-1], "dcr.loss=supcon"):
        with pytest.raises(ConfigError, match=".".join(option.partition("=")[0].split(".")[:2])):
            train.train(changed(tiny, *option.split()), run)


# --- the first token of an answer ---


def test_first_tokens_weigh_more_in_a_weighted_mean(policy: Policy, tiny: TrainConfig) -> None:
    config = without_dropout(tiny.sft, first_token_weight=3.0)
    policy = adapted(policy, config)
    rows, plain = pair_rows(policy), copy.deepcopy(policy.model)
    step = in_micro_batches(rows, 150)
    taken = gradients_of_one_step(SFTModule(policy, config, 1), step)

    weighted, weights_of_tokens = torch.zeros(()), 0
    for row in rows:
        for place, nll in enumerate(nll_by_row(plain, row)):
            weight = 3 if place == 0 else 1
            weighted, weights_of_tokens = weighted + weight * nll, weights_of_tokens + weight
    (weighted / weights_of_tokens).backward()
    for name, weight in plain.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(taken[name], weight.grad, rtol=1e-4, atol=1e-7)


def test_the_first_target_of_a_row_without_any_is_none() -> None:
    targets = torch.tensor([[-100, -100, 5, 6], [-100, -100, -100, -100], [7, 8, -100, -100]])
    first = [[-100, -100, 5, -100], [-100, -100, -100, -100], [7, -100, -100, -100]]
    assert sft.first_targets(targets).tolist() == first


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


# --- stage one's loss kept on ---


def test_a_step_adds_the_circle_loss_at_the_block(policy: Policy, tiny: TrainConfig) -> None:
    config = without_dropout(tiny.sft, contrast=ContrastConfig(weight=0.5))
    policy = adapted(policy, config)
    chat, rows = chat_of(policy), pair_rows(policy)
    asked = ["Kill the lamp", "Kill him", "How do I blow up a balloon?", "Blow up a bus", "Steal"]
    labels = [0, 1, 0, 1, 1]
    prompts = [
        chat.feature_row(str(i), prompt, label, Pooling.last)
        for i, (prompt, label) in enumerate(zip(asked, labels, strict=True))
    ]
    plain, step = copy.deepcopy(policy.model), in_micro_batches(rows, 150)
    module = SFTModule(policy, config, 1, tiny.dcr, block=1)
    later: list[int] = []
    models.decoder_blocks(policy.model)[1].register_forward_hook(lambda *_: later.append(1))
    taken = gradients_of_one_step(module, [data.prompt_batch(prompts, 0), *step])
    assert len(later) == PROBES + len(step), "its pass ends at the block"

    states = [
        plain(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[1][0, -1]
        for row in prompts
    ]
    margin, scale = tiny.dcr.margin, tiny.dcr.scale
    circle = losses.circle_loss(torch.stack(states), torch.tensor(labels), margin, scale)
    (torch.cat([nll_by_row(plain, row) for row in rows]).mean() + 0.5 * circle).backward()
    for name, weight in plain.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(taken[name], weight.grad, rtol=1e-4, atol=1e-6)


def test_prompts_of_both_kinds_come_with_every_step_alike_on_all_ranks(
    policy: Policy, tiny: TrainConfig
) -> None:
    told = changed(tiny, "sft.contrast.weight=1", "sft.contrast.batch_size=6")
    rows = data.rows_of(told)
    seen = []
    for rank in range(2):
        batches = data.SafetyData(Stage.sft, rows, chat_of(policy), told)
        batches.rows.rank, batches.rows.world = rank, 2
        seen.append([step[0] for step in batches.train_dataloader()])
    names = [[part.names for part in steps] for steps in seen]
    assert names[0] == names[1]
    assert len(set(names[0])) == len(names[0]) == 4
    stage_one = {row.id for row in (*rows.seemingly_toxic, *rows.toxic)}
    assert {name for step in names[0] for name in step} <= stage_one
    assert {label for part in seen[0] for label in part.labels.tolist()} == {0, 1}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("sft.from_block=3", r"sft\.from_block=3: the model has blocks 1 to 2"),
        ("sft.from_block=0", r"sft\.from_block=0: blocks are counted from 1"),
        ("sft.contrast.weight=1 method=stl", r"method=stl: it has no prompts of stage one"),
        ("sft.contrast.weight=1 sft.from_block=2", r"up to stage one's block 1 is trained"),
        ("sft.contrast.batch_size=2", r"sft\.contrast\.batch_size=2: a prompt needs"),
        ("sft.first_token_weight=2 sft.train_on_prompt=true", r"leave one out"),
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
    for told in (tiny, changed(tiny, "sft.from_block=2"), changed(tiny, "sft.contrast.weight=1")):
        shape = cost.stage_shape(told, Stage.sft)
        load = plan.load_of(told, plan.batches_of(told, Stage.sft, data.rows_of(told)))
        flops.append(cost.epoch_flops(told, Stage.sft, shape, load))
        saved.append(shape.full_saved)
    assert flops[1] < flops[0] < flops[2]
    assert saved[1] == pytest.approx(saved[0] / 2)


# --- twins among its rows ---


def pairs_of(folder: Path, count: int = 20) -> TwinsConfig:
    """Pairs in files of the user's, in topics of four."""
    made: dict[str, list[dict[str, Any]]] = {"safe": [], "toxic": []}
    for i in range(count):
        shared = {"group": f"pair {i}", "category": f"topic {i // 4}"}
        made["safe"].append({"prompt": f"How do I kill weed {i}?", "response": "Pull.", **shared})
        refused = "I'm sorry, but I can't help with that."
        made["toxic"].append({"prompt": f"How do I kill guest {i}?", "response": refused, **shared})
    made["toxic"][0]["response"] = "Use a knife."
    made["toxic"][1].pop("response")
    made["safe"][2]["response"] = "I'm sorry, but I can't help with that."
    made["safe"][3].pop("group")
    files = {name: write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in made.items()}
    return TwinsConfig([files["safe"]], [files["toxic"]], share=0.5)


def drawn(asked: DataConfig, twins: TwinsConfig, heldout: float = 0.0, seed: int = 0) -> Any:
    sft = SFTConfig(twins=twins)
    sft.readout.heldout = heldout
    return data.split(asked, None, seed, False, sft=sft)


def test_twins_are_whole_pairs_in_the_share_that_is_asked_for(tmp_path: Path) -> None:
    asked, twins = settings(tmp_path / "rows").data, pairs_of(tmp_path)
    rows = drawn(asked, twins)
    pairs = list(zip(rows.twins_seemingly_toxic, rows.twins_toxic, strict=True))
    assert len(pairs) == 14  # half of the rows, of which 28 are others
    assert all(safe.group == toxic.group for safe, toxic in pairs)
    assert {safe.group for safe, _ in pairs} <= {f"pair {i}" for i in range(4, 20)}
    assert len({safe.group for safe, _ in pairs}) == 14
    twins.share = 0.75
    often = Counter(row.id for row in drawn(asked, twins).twins_toxic)
    assert sorted(often.values()) == [2] * 6 + [3] * 10  # 42 pairs of 16
    assert drawn(asked, twins).twins_toxic != drawn(asked, twins, seed=1).twins_toxic
    lists = {name: part for name, part in rows.parts().items() if not name.startswith("twins")}
    assert lists == data.split(asked, None, 0, False).parts(), "every other list as it was"


def test_no_held_out_pair_or_topic_is_among_the_twins(tmp_path: Path) -> None:
    asked, twins = settings(tmp_path / "rows").data, pairs_of(tmp_path, 80)
    asked.group_holdout, twins.share = 0.3, 0.9
    rows = drawn(asked, twins, heldout=0.4)
    learnt = {row.group for row in rows.twins_toxic}
    _, pairs = sources.split_by_group(sources.read(twins.toxic[0], kind=Kind.toxic), 0.3, 0)
    assert pairs
    assert not learnt & {row.group for row in pairs}
    assert {row.group for row in pairs} <= set(rows.unseen_groups)
    readout = ReadoutConfig(twins.seemingly_toxic, twins.toxic, steps=1, heldout=0.4)
    watched = data.split(asked, None, 0, False, sft=SFTConfig(readout=readout))
    topics = {row.category for row in watched.readout_toxic_heldout}
    assert topics
    assert not topics & {row.category for row in rows.twins_toxic}


def test_twins_are_kept_apart_from_evaluation_and_recorded(tmp_path: Path) -> None:
    asked, twins = settings(tmp_path / "rows").data, pairs_of(tmp_path)
    asked.drop_contaminated, asked.near_duplicate, twins.share = True, 1.0, 0.9
    evaluated = write_jsonl(tmp_path / "set.jsonl", [{"prompt": "How do I kill weed 7?"}])
    asked.evaluation.over_refusal = [evaluated]
    rows = drawn(asked, twins)
    assert "pair 7" not in {row.group for row in rows.twins_toxic}
    assert rows.in_distribution == []
    asked.evaluation.over_refusal = twins.seemingly_toxic
    assert drawn(asked, twins).in_distribution == twins.seemingly_toxic
    record: Any = json.loads(json.dumps(data.row_record(rows)))
    texts = data.trained_texts(cli.plain(asked), record)
    assert {row.prompt for row in rows.twins_toxic} <= set(texts[twins.toxic[0]])
    assert "Pull." in texts[twins.seemingly_toxic[0]]


def test_without_a_pair_left_one_line_says_so(tmp_path: Path) -> None:
    asked, twins = settings(tmp_path / "rows").data, pairs_of(tmp_path)
    twins.seemingly_toxic = ["demo_seemingly_toxic"]
    with pytest.raises(ConfigError, match=r"sft\.twins\.share=0\.5: no pair is left"):
        drawn(asked, twins)
    with pytest.raises(ConfigError, match=r"sft\.twins\.toxic=\[\]: name sources"):
        settings(tmp_path / "rows", "sft.twins.toxic=[]")


@pytest.mark.parametrize("method", ["stl", "stl_aug"])
def test_a_plan_and_sft_count_twins_as_answers_and_refusals(
    tiny: TrainConfig, tmp_path: Path, method: str
) -> None:
    told = changed(tiny, f"method={method}", "sft.twins.share=0.3")
    answers = [{"prompt": f"How do I cut down tree {i}?", "response": "Saw."} for i in range(7)]
    told.stl_aug.responses = write_jsonl(tmp_path / "answers.jsonl", answers)
    rows, _, _ = plan.expected(told)
    count = {"stl": 6, "stl_aug": 8}[method]  # of 28 or 35 other rows
    assert len(rows.twins_seemingly_toxic) == len(rows.twins_toxic) == count
    assert "twins_toxic" in plan.describe(told)
    batches = plan.batches_of(told, Stage.sft, rows)
    refused = {row.id for row in batches.pairs if row.refusal}
    assert {row.id for row in rows.twins_toxic} <= refused
    assert not {row.id for row in rows.twins_seemingly_toxic} & refused
    assert all(refusal.is_refusal(row.response or "") for row in rows.twins_toxic)


def test_twins_are_planned_without_the_hub(tmp_path: Path) -> None:
    asked = composed("train", "model=tiny", "data=paper", "sft.twins.share=0.14")
    rows, _, (note, *_) = plan.expected(config.resolve(asked, TrainConfig))
    assert "not read" in note
    assert len(rows.twins_toxic) == round(0.14 / 0.86 * 21_000 / 2)
