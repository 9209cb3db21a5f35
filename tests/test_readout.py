import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_models import SHAPES, made
from tiny_run import changed, logged, same, settings, weights
from torch import Tensor

from dcr import plan, train
from dcr.core import batching, cli, config, data, models, prompts
from dcr.core.config import ConfigError, Kind, LoraConfig, Stage, TrainConfig
from dcr.core.data import SEEMINGLY_TOXIC, TOXIC
from dcr.core.data.readout import OPENING
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
from dcr.core.runs import Run
from dcr.core.sources import Example
from dcr.core.training import callbacks, readout
from dcr.plan import cost


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


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask, and the last position of each row."""
    mask = batching.attention_mask(rows)
    read = torch.zeros_like(mask)
    read[torch.arange(len(rows)), mask.sum(1) - 1] = True
    return batching.padded(rows, 0), mask, read


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
    given = readout.entered(model, count, *padded(rows))
    backbone: Any = models.backbone(model)
    with torch.no_grad():
        alone = [backbone(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    torch.testing.assert_close(
        readout.leaving(model, given), torch.stack(alone), rtol=1e-4, atol=1e-5
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
        for name, weight in models.decoder_blocks(model)[-count:].named_parameters()
        if weight.requires_grad
    }
    ids, mask, read = padded(rows)
    read[0, -3:] = True  # the first row ends with two tokens of a refusal
    given = readout.entered(model, count, ids, mask, read)
    first, opening = torch.tensor([True, False, False, True, True]), torch.tensor([9, 7])
    batch = readout.Batch(given, labels, first, opening)
    contrast, loss = readout.pair_losses(model, batch, openings, greedy=0.5)
    found = torch.autograd.grad(loss, list(last.values()))

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
        model: Any = models.add_lora(policy.model, LoraConfig(targets=["all-linear"]), seed=0)
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


# --- the phase ---


def test_only_the_adapter_in_the_last_blocks_moves_and_the_record_says_how_far(
    tiny: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    train.train(changed(tiny, "sft.readout.steps=0"), Run(tmp_path / "run"))
    before, after = weights(tmp_path / "run"), weights(whole)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".layers.1." in name}
    record = json.loads((whole / "readout.json").read_text())
    assert record["loss"]["last"] < record["loss"]["first"]
    assert record["drift"]["answer_tokens"] > 0
    assert not (tmp_path / "run" / "readout.json").exists()


def test_a_larger_weight_keeps_drift_smaller(
    tiny: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    train.train(changed(tiny, "sft.readout.drift=100"), Run(tmp_path / "run"))
    one, other = (json.loads((f / "readout.json").read_text()) for f in (tmp_path / "run", whole))
    assert one["drift"]["answer_tokens"] < other["drift"]["answer_tokens"] / 2


def test_killed_in_the_phase_a_run_ends_as_if_nothing_had_been(
    tiny: TrainConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(readout, "_moved", killed)  # all steps are made
        with pytest.raises(KeyboardInterrupt):
            train.train(tiny, Run(tmp_path / "run"))
    assert not (tmp_path / "run" / "sft").exists()
    train.train(tiny, Run(tmp_path / "run"))
    assert same(weights(tmp_path / "run"), weights(whole))
    assert (tmp_path / "run" / "readout.json").read_bytes() == (whole / "readout.json").read_bytes()
    told = [row for row in logged(tmp_path / "run") if row[0] == "readout"]
    assert told == [row for row in logged(whole) if row[0] == "readout"]
    assert [step for _, step, key, _ in told if key == "readout/contrast"] == list(range(24))


def test_only_the_batches_that_steps_take_are_prepared_and_each_once(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    few, prepared = changed(tiny, "sft.readout.steps=2", "trainer.progress=true"), []
    tokens: list[int] = []
    original = readout.entered

    def counted(model: Any, count: int, ids: Tensor, *others: Any) -> readout.Entered:
        prepared.append(len(ids))
        tokens.append(ids.numel())
        return original(model, count, ids, *others)

    monkeypatch.setattr(readout, "entered", counted)
    train.train(few, Run(tmp_path / "run"))
    chat = prompts.chat_format(models.open_tokenizer(few.model), few.model)
    drawn = data.readout_rows(chat, data.rows_of(few), few.sft, few.seed)
    assert len(set(drawn.steps)) == len(drawn.steps) == 2 < len(drawn.pairs) == len(drawn.general)
    asked = [part[place] for part in (drawn.pairs, drawn.general) for place in sorted(drawn.steps)]
    assert prepared == [len(part) for part in (*asked, *drawn.watched, *drawn.ordinary)]
    shape, rows = cost.stage_shape(few, Stage.sft), data.rows_of(few)
    planned = plan.stage_plan(few, Stage.sft, shape, rows).readout
    assert planned
    assert (planned.prepared, planned.batches, planned.flops > 0) == (2, len(drawn.pairs), True)
    padded = plan.readout_plan(few, shape, rows, prefix=None)
    assert (padded.through_all, padded.through_last) == (sum(tokens), sum(tokens[:4]))
    assert "tokens through all blocks, once" in plan.describe(few)
    told = capfd.readouterr().err
    assert f"readout, preparing: 100%|██████████| {len(prepared)}/{len(prepared)}" in told
    assert "readout: 100%|██████████| 2/2" in told


def test_a_run_made_before_the_phase_was_known_goes_on(tiny: TrainConfig, tmp_path: Path) -> None:
    plain, run = changed(tiny, "sft.readout.steps=0"), Run(tmp_path / "run")
    train.train(plain, run)
    made_with = run.config()
    del made_with["sft"]["readout"]
    run.config_file.write_text(json.dumps(made_with))
    train.train(plain, run)
    with pytest.raises(ConfigError, match=r"sft\.readout"):
        train.train(tiny, run)


def test_more_blocks_than_the_model_has_are_refused(tiny: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sft\.readout\.blocks=3: the model has 2"):
        train.train(changed(tiny, "sft.readout.blocks=3"), Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# --- its rows ---


def test_topics_are_held_out_whole_and_every_row_is_recorded(tmp_path: Path) -> None:
    node = config.ReadoutConfig(steps=1, heldout=0.3)
    asked = settings(tmp_path, "method=stl", "data.drop_contaminated=true").data
    rows = data.split(asked, None, 0, False, readout=node)
    topics = [
        {row.group for row in (*rows.readout_toxic, *rows.readout_seemingly_toxic)},
        {row.group for row in (*rows.readout_toxic_heldout, *rows.readout_seemingly_toxic_heldout)},
    ]
    assert all(topics)
    assert not topics[0] & topics[1]
    assert len(rows.readout_toxic) + len(rows.readout_toxic_heldout) == 499 + 312
    texts = data.trained_texts(cli.plain(asked), data.row_record(rows))
    assert set(texts["contrasts_toxic"]) == {
        row.prompt for row in rows.readout_toxic if row.source == "contrasts_toxic"
    }


def test_prompts_of_an_evaluation_set_are_no_rows_of_it(tmp_path: Path) -> None:
    sets = "data.evaluation={over_refusal: [contrasts_seemingly_toxic], safety: []}"
    asked = settings(tmp_path, "method=stl", "data.drop_contaminated=true", sets).data
    node = config.ReadoutConfig(steps=1, seemingly_toxic=["demo_seemingly_toxic"])
    rows = data.split(asked, None, 0, False, readout=node)
    assert rows.in_distribution == []
    node.seemingly_toxic = ["contrasts_seemingly_toxic"]
    rows = data.split(asked, None, 0, False, readout=node)
    assert rows.in_distribution == ["contrasts_seemingly_toxic"]


def test_how_a_refusal_goes_on_is_learnt_from_refusals_of_toxic_prompts_alone(
    chat: ChatFormat,
) -> None:
    said = ["I cannot help with it.", "Take the bus and wait.", None]
    rows = [Example(str(i), f"word {i}", Kind.toxic, "x", a) for i, a in enumerate(said)]
    for label, opens in ((TOXIC, 0), (SEEMINGLY_TOXIC, None)):
        made = data.readout_prompts(chat, rows, label)
        for place, (row, example) in enumerate(zip(made, rows, strict=True)):
            asked = chat.prompt_ids(example.prompt)
            whole, _ = chat.pair(example.prompt, example.response or "", 999)
            behind = whole[len(asked) :][:OPENING] if place == opens else []
            assert [*row.ids, *behind[-1:]] == [*asked, *behind]
            assert list(row.opening) == behind[1:]
            assert row.places == [len(asked) - 1 + i for i in range(max(1, len(behind)))]
