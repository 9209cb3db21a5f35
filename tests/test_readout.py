import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_models import SHAPES, made
from tiny_run import (
    Stop,
    at_each_step,
    changed,
    drawn,
    failing,
    logged,
    same,
    settings,
    stop,
    weights,
)
from torch import Tensor

from dcr import contamination, plan, train
from dcr.core import config, data, models, passes, prompts, runs
from dcr.core.config import ConfigError, Kind, LoraConfig, Stage
from dcr.core.config.training import ReadoutConfig, TrainConfig
from dcr.core.data.rows import SEEMINGLY_TOXIC, TOXIC
from dcr.core.models import Policy, structure
from dcr.core.prompts import ChatFormat
from dcr.core.runs import Run
from dcr.core.sources import Example
from dcr.core.training import callbacks
from dcr.plan import cost
from dcr.readout import stage as readout
from dcr.readout.rows import OPENING, ReadoutRows, readout_prompts
from dcr.readout.stage import ReadoutBatch, ReadoutModule

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    more = ("method=stl", "sft.readout.steps=24", "sft.readout.blocks=1")
    more += ("sft.readout.batch_size=8", "sft.readout.lr=1e-2")
    folder = tmp_path_factory.mktemp("rows")
    files = {
        name: f"sft.readout.{name}=[{folder}/{name}.jsonl]" for name in ("seemingly_toxic", "toxic")
    }
    return settings(folder, *more, *files.values())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: TrainConfig) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train.train(tiny, Run(folder))
    return folder


@pytest.fixture
def sft(whole: Path, tmp_path: Path) -> Path:
    """A run whose SFT is done and whose readout has not begun."""
    left = shutil.ignore_patterns("readout*", "checkpoints", ".lock")
    shutil.copytree(whole, tmp_path / "run", ignore=left)
    runs.forget_metrics_beyond(Run(tmp_path / "run"), "readout", 0)
    return tmp_path / "run"


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask, and the last position of each row."""
    mask = passes.attention_mask(rows)
    read = torch.zeros_like(mask)
    read[torch.arange(len(rows)), mask.sum(1) - 1] = True
    return passes.padded(rows, 0), mask, read


# --- the last blocks by themselves ---


APART = [[5, 6, 7, 8, 9], [5, 6, 3], [4, 7, 7, 2]]
ALIKE = [[5, 6, 7, 8, 5, 6, 7, 8, 9], [5, 6, 7, 8, 5, 6, 3], [5, 6, 7, 8, 4, 7, 7, 2]]


@pytest.mark.parametrize("rows", [APART, ALIKE], ids=["apart", "alike"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("family", SHAPES)
def test_the_last_blocks_alone_give_what_each_prompt_gives_by_itself(
    family: str, count: int, rows: list[list[int]]
) -> None:
    model = made(family).eval()
    given = readout.half_pass(model, count, *padded(rows))
    backbone: Any = structure.backbone(model)
    with torch.no_grad():
        alone = [backbone(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    torch.testing.assert_close(
        readout.final_states(model, given), torch.stack(alone), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("rows", [APART, ALIKE], ids=["apart", "alike"])
@pytest.mark.parametrize("count", [1, 2])
def test_gradients_are_those_of_the_whole_model_with_all_else_frozen(
    policy: Policy, count: int, rows: list[list[int]]
) -> None:
    model = adapted(policy).model
    openings, labels = torch.tensor([5, 9]), torch.tensor([TOXIC, 0, TOXIC])
    last = {
        name: weight
        for name, weight in structure.decoder_blocks(model)[-count:].named_parameters()
        if weight.requires_grad
    }
    moving = {n for n, w in model.named_parameters() if any(w is each for each in last.values())}
    ids, mask, read = padded(rows)
    read[0, -3:] = True  # the first row ends with two tokens of a refusal
    first, opening = torch.tensor([True, False, False, True, True]), torch.tensor([9, 7])
    batch = ReadoutBatch(ids, mask, read, labels, first, opening, ("a", "b", "c"), 0)
    asked = ReadoutConfig(blocks=count, greedy=0.5)
    module = ReadoutModule(Policy(model, policy.tokenizer, ""), asked, openings)
    module.half_passes[0] = readout.half_pass(model, count, ids, mask, read)
    contrast, wording = module.contrast(batch)
    loss = contrast + readout.WORDING * wording
    assert {name for name, w in model.named_parameters() if w.requires_grad} == moving
    found = torch.autograd.grad(loss, list(last.values()))
    for weight in model.parameters():
        weight.requires_grad = True

    expected = torch.zeros(())
    for row, label in zip([rows[0][:-2], *rows[1:]], labels.tolist(), strict=True):
        logits = model(torch.tensor([row])).logits[0, -1]
        p = logits.softmax(-1)[openings].sum()
        others = [token for token in range(len(logits)) if token not in openings]
        decides = (logits[openings].max() - logits[others].max()).sigmoid()
        for chance, weight in ((p, 1.0), (decides, 0.5)):
            right = chance if label == TOXIC else 1 - chance
            expected = expected - weight * right.log() / len(rows)
    torch.testing.assert_close(contrast, expected, rtol=1e-5, atol=1e-6)
    told = model(torch.tensor(rows[:1])).logits[0].log_softmax(-1)
    expected = expected - readout.WORDING * (told[-2, 9] + told[-1, 7]) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    truth = torch.autograd.grad(expected, list(last.values()))
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def adapted(policy: Policy) -> Policy:
    with callbacks.quiet():
        model: Any = structure.add_lora(policy.model, LoraConfig(targets=["all-linear"]), seed=0)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            weight.data.normal_(0, 0.05)
    return Policy(model.eval(), policy.tokenizer, policy.name)


def test_drift_is_the_kl_divergence_to_before() -> None:
    torch.manual_seed(0)
    before, now = torch.randn(5, 11), torch.randn(5, 11)
    one, other = (torch.distributions.Categorical(logits=logits) for logits in (before, now))
    torch.testing.assert_close(
        readout.drift(before, now), torch.distributions.kl_divergence(one, other)
    )
    assert not readout.drift(before, before).any()


# --- the stage ---


def test_only_the_adapter_in_the_last_blocks_moves_and_the_record_says_how_far(
    whole: Path,
) -> None:
    before, after = (load_file(whole / stage / ADAPTER) for stage in ("sft", "readout"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".layers.1." in name}
    record = json.loads((whole / "readout.json").read_text())
    assert record["loss"]["last"] < record["loss"]["first"]
    assert record["drift"]["answer_tokens"] > 0
    cost = json.loads((whole / "readout.cost.json").read_text())
    assert cost["steps"] == 24
    assert cost["tokens"] > 0


def test_held_out_rows_are_measured_in_equal_rounds_and_as_the_record_says(whole: Path) -> None:
    told = [row for row in logged(whole) if row[0] == "readout"]
    by_key = {key: [(s, v) for _, s, k, v in told if k == key] for key in {row[2] for row in told}}
    assert [step for step, _ in by_key["readout/step_contrast"]] == list(range(24))
    assert [step for step, _ in by_key["readout/step_drift"]] == list(range(24))
    record = json.loads((whole / "readout.json").read_text())
    for key, last in (
        ("readout/auroc/heldout", record["heldout_auroc"]["after"][0]),
        ("readout/drift/heldout", record["drift"]["answer_tokens"]),
    ):
        assert [step for step, _ in by_key[key]] == list(range(2, 24, 3))
        assert by_key[key][-1][1] == pytest.approx(last, rel=1e-6)


def test_a_larger_weight_keeps_drift_smaller(tiny: TrainConfig, whole: Path, sft: Path) -> None:
    train.train(changed(tiny, "sft.readout.drift=100"), Run(sft))
    one, other = (json.loads((f / "readout.json").read_text()) for f in (sft, whole))
    assert one["drift"]["answer_tokens"] < other["drift"]["answer_tokens"] / 2


@pytest.mark.parametrize("where", [11, 23, "preparing", "saving"])
def test_stopped_anywhere_a_run_ends_as_if_nothing_had_been(
    tiny: TrainConfig, whole: Path, sft: Path, monkeypatch: pytest.MonkeyPatch, where: int | str
) -> None:
    with monkeypatch.context() as patched:
        if isinstance(where, int):
            at_each_step(patched, lambda trainer, *_: trainer.global_step == where and stop())
        else:
            name = {"preparing": "half_pass", "saving": "save_adapter"}[where]
            patched.setattr(readout, name, failing(Stop()))
        with pytest.raises(Stop):
            train.train(tiny, Run(sft))
    assert not (sft / "readout").exists()
    train.train(changed(tiny, "stage=readout"), Run(sft))
    assert_same_run(sft, whole)


def assert_same_run(one: Path, other: Path) -> None:
    assert same(weights(one), weights(other))
    assert (one / "readout.json").read_bytes() == (other / "readout.json").read_bytes()
    assert logged(one) == logged(other)
    assert not list((one / "checkpoints").rglob("*.*"))


def test_a_readout_follows_a_finished_sft_and_needs_one(
    tiny: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    alone = changed(tiny, "stage=readout")
    with pytest.raises(ConfigError, match=r"stage=readout: .* holds no sft/ to start from"):
        train.train(alone, run)
    train.train(changed(tiny, "sft.readout.steps=0"), run)
    assert not (run.folder / "readout.json").exists()
    train.train(alone, run)
    assert_same_run(run.folder, whole)
    with pytest.raises(ConfigError, match=r"sft\.readout.*readout is done there and would not"):
        train.train(changed(tiny, "sft.readout.lr=1e-3"), run)


def test_only_the_batches_that_steps_take_are_prepared_and_each_once(
    tiny: TrainConfig, sft: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    few, prepared = changed(tiny, "sft.readout.steps=2", "trainer.progress=true"), []
    tokens: list[int] = []
    original = readout.half_pass

    def counted(model: Any, count: int, ids: Tensor, *others: Any) -> readout.HalfPass:
        prepared.append(len(ids))
        tokens.append(ids.numel())
        return original(model, count, ids, *others)

    monkeypatch.setattr(readout, "half_pass", counted)
    train.train(few, Run(sft))
    chat = prompts.chat_format(models.open_tokenizer(few.model), few.model)
    made = ReadoutRows(data.rows_of(few), chat, few)
    steps = made.sampler.places
    assert len(set(steps)) == len(steps) == 2 < len(made.drawn)
    assert {len(passes) for passes in made.drawn} == {2}, "prompts and answers"
    asked = [made.drawn[place][kind] for kind in (0, 1) for place in sorted(steps)]
    assert prepared == [len(each.rows) for each in (*asked, *made.heldout_passes)]
    shape = cost.stage_shape(few, Stage.readout)
    planned = plan.stage_plan(few, Stage.readout, shape, data.rows_of(few))
    assert (planned.steps, planned.load.full) == (2, sum(tokens))
    last = few.sft.readout.blocks / shape.depth * shape.blocks
    assert planned.padded_flops > 2 * sum(tokens) * shape.blocks + 4 * last * sum(tokens[:4])
    assert re.search(rf"padded .* {sum(tokens):,}\n", plan.describe(few))
    told = capfd.readouterr().err
    assert f"readout, preparing: 100%|██████████| {len(prepared)}/{len(prepared)}" in told
    assert "readout: 100%|██████████| 2/2" in told


def test_what_training_came_to_is_told_in_a_line() -> None:
    found: dict[str, Any] = {
        "steps": 3,
        "loss": {"first": 1.894, "last": 1.875},
        "heldout_auroc": {"before": (0.457, 0.36, 0.55), "after": (0.5, 0.41, 0.6), "prompts": 82},
        "drift": {"answer_tokens": 0.0123, "first_token": 0.02},
    }
    line = "3 steps; loss 1.89 to 1.88; AUROC 0.46 to 0.50 [0.41, 0.60] on held-out pairs"
    assert readout.summary(found) == f"{line}; drift 0.012 nats an answer token"
    found["loss"] = {"first": None, "last": None}
    found["heldout_auroc"] |= {"before": None, "after": None}
    found["drift"]["answer_tokens"] = None
    assert readout.summary(found) == "3 steps"


def test_more_blocks_than_the_model_has_are_refused(tiny: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sft\.readout\.blocks=3: the model has 2"):
        train.train(changed(tiny, "sft.readout.blocks=3"), Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# --- its rows ---


def test_topics_are_held_out_whole_and_every_row_is_recorded(tmp_path: Path) -> None:
    node = ReadoutConfig(steps=1, heldout=0.3)
    asked = settings(tmp_path, "method=stl", "data.drop_contaminated=true").data
    rows = drawn(asked, readout=node)
    topics = [
        {row.group for row in (*rows.readout_toxic, *rows.readout_seemingly_toxic)},
        {row.group for row in (*rows.readout_toxic_heldout, *rows.readout_seemingly_toxic_heldout)},
    ]
    assert all(topics)
    assert not topics[0] & topics[1]
    assert len(rows.readout_toxic) + len(rows.readout_toxic_heldout) == 499 + 312
    texts = contamination.texts_of(config.plain(asked), data.row_record(rows))
    assert set(texts["contrasts_toxic"]) == {
        row.prompt for row in rows.readout_toxic if row.source == "contrasts_toxic"
    }


def test_prompts_of_an_evaluation_set_are_no_rows_of_it(tmp_path: Path) -> None:
    sets = "data.evaluation={over_refusal: [contrasts_seemingly_toxic], safety: []}"
    asked = settings(tmp_path, "method=stl", "data.drop_contaminated=true", sets).data
    node = ReadoutConfig(steps=1, seemingly_toxic=["demo_seemingly_toxic"])
    rows = drawn(asked, readout=node)
    assert rows.in_distribution == []
    node.seemingly_toxic = ["contrasts_seemingly_toxic"]
    rows = drawn(asked, readout=node)
    assert rows.in_distribution == ["contrasts_seemingly_toxic"]


def test_how_a_refusal_goes_on_is_learnt_from_refusals_of_toxic_prompts_alone(
    chat: ChatFormat,
) -> None:
    said = ["I cannot help with it.", "Take the bus and wait.", None]
    rows = [Example(str(i), f"word {i}", Kind.toxic, "x", a) for i, a in enumerate(said)]
    for label, opens in ((TOXIC, 0), (SEEMINGLY_TOXIC, None)):
        made = readout_prompts(chat, rows, label)
        for place, (row, example) in enumerate(zip(made, rows, strict=True)):
            asked = chat.prompt_ids(example.prompt)
            whole, _ = chat.pair(example.prompt, example.response or "", 999)
            behind = whole[len(asked) :][:OPENING] if place == opens else []
            assert [*row.ids, *behind[-1:]] == [*asked, *behind]
            assert list(row.opening) == behind[1:]
            assert row.places == [len(asked) - 1 + i for i in range(max(1, len(behind)))]


def test_a_refusal_is_worded_as_sft_words_it(tiny: TrainConfig, chat: ChatFormat) -> None:
    rows = data.rows_of(tiny)
    refusal = replace(rows.refusals[0], response="I cannot do so, since it harms.")
    no_refusal = replace(rows.refusals[0], response="Take the bus.")
    for refusals, reworded in (([no_refusal, refusal], True), ([no_refusal], False)):
        made = ReadoutRows(replace(rows, refusals=refusals, normal=[]), chat, tiny)
        found = [row for asked, *_ in made.drawn for row in asked.rows if row.label == TOXIC]
        said = {row.opening for row in found if row.opening}
        expected = tuple(chat.pair("x", "I cannot do so", 999)[0][len(chat.prompt_ids("x")) :])
        assert all(row.opening for row in found) or not reworded
        assert (said == {expected[1:OPENING]}) is reworded
