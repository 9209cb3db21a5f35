import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import NonCallableMock

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from tiny_run import (
    at_each_step,
    changed,
    failing,
    fit,
    gradients_of_one_step,
    same,
    settings,
    weights,
)
from torch import Tensor

from dcr import train
from dcr.core.config import Method, Stage
from dcr.core.config.training import Schedule, SFTConfig, TrainConfig
from dcr.core.data import rows_of
from dcr.core.data.rows import PairBatch, PairRow, micro_batches, pair_batch
from dcr.core.models import Policy, structure
from dcr.core.runs import Run
from dcr.core.training import SafetyData, callbacks
from dcr.core.training.resuming import StepSeed, rate_factor
from dcr.core.training.stages import SFTModule
from dcr.fast import passes as fast_passes
from tests.shapes import chat_of

TEXTS = [
    ("Hi", "Good day", False),
    ("Name three fruits that grow in cold places", "Apples, pears and plums", False),
    ("Steal it", "I'm sorry, but I can't help with that.", True),
    ("What is a lamp?", "It gives light " * 4, False),
    ("Kill him", "No.", True),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return settings(tmp_path_factory.mktemp("rows"), "method=stl")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with callbacks.quiet():
        yield


def adapted(policy: Policy, config: SFTConfig) -> Policy:
    """With an adapter whose B is not at the zero it starts from, where A has no gradient."""
    torch.manual_seed(1)
    model = structure.add_lora(policy.model, config.lora, seed=0)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            weight.data.normal_(0, 0.02)
    return replace(policy, model=model)


def without_dropout(config: SFTConfig, **changes: Any) -> SFTConfig:
    return replace(config, lora=replace(config.lora, dropout=0.0), **changes)


def pair_rows(policy: Policy) -> list[PairRow]:
    chat = chat_of(policy)
    made = [(*chat.pair(prompt, answer, 200), refusal) for prompt, answer, refusal in TEXTS]
    return [PairRow(f"r{i}", *row) for i, row in enumerate(made)]


def in_micro_batches(rows: list[PairRow], tokens: int) -> list[PairBatch]:
    return [pair_batch(group, 0) for group in micro_batches(rows, tokens)]


def data_of(policy: Policy, tiny: TrainConfig) -> SafetyData:
    rows = rows_of(tiny)
    return SafetyData(Stage.sft, rows, chat_of(policy), tiny)


def nll_by_row(model: Any, row: PairRow) -> Tensor:
    """NLL of each labelled token of a row alone, from all logits."""
    logits, targets = model(torch.tensor([row.ids])).logits[0], torch.tensor(row.targets)
    return F.cross_entropy(logits[targets != -100], targets[targets != -100], reduction="none")


# --- gradients ---


@pytest.mark.parametrize("tokens", [1, 150, 10**6])
def test_micro_batches_add_up_to_the_token_mean_of_the_whole_batch(
    policy: Policy, tiny: TrainConfig, tokens: int
) -> None:
    config = without_dropout(tiny.sft)
    policy = adapted(policy, config)
    rows, plain = pair_rows(policy), copy.deepcopy(policy.model)
    step = in_micro_batches(rows, tokens)
    assert len(step) == {1: 5, 150: 4, 10**6: 1}[tokens]
    taken = gradients_of_one_step(SFTModule(policy, config, 1), step)

    torch.cat([nll_by_row(plain, row) for row in rows]).mean().backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert taken.keys() == expected.keys()
    assert all(".lora_" in name for name in taken)
    for name, gradient in expected.items():
        torch.testing.assert_close(taken[name], gradient, rtol=1e-4, atol=1e-7)


def test_gradient_checkpointing_changes_no_gradient(policy: Policy, tiny: TrainConfig) -> None:
    config = without_dropout(tiny.sft)
    policy = adapted(policy, config)
    step = in_micro_batches(pair_rows(policy), 150)
    other = replace(policy, model=copy.deepcopy(policy.model))
    plain = gradients_of_one_step(SFTModule(policy, config, 1), step)
    blocks = structure.decoder_blocks(other.model)
    runs: list[bool] = []
    blocks[0].get_submodule("mlp").register_forward_pre_hook(lambda *_: runs.append(True))
    config = replace(config, gradient_checkpointing=True)
    saving = gradients_of_one_step(SFTModule(other, config, 1), step)
    assert len(runs) == 2 * len(step), "each block runs again in the backward pass"
    for name, gradient in plain.items():
        torch.testing.assert_close(saving[name], gradient)


def test_logits_exist_for_labelled_tokens_alone(
    policy: Policy, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = adapted(policy, tiny.sft)
    given: list[Tensor] = []
    before = fast_passes.token_nll

    def spy(hidden: Tensor, targets: Tensor, **readout: Any) -> Any:
        assert hidden.shape[0] == len(targets)
        given.append(targets)
        return before(hidden, targets=targets, **readout)

    monkeypatch.setattr(fast_passes, "token_nll", spy)
    whole_head_ran: Any = failing(AssertionError("the whole head ran"))
    structure.head(policy.model).register_forward_pre_hook(whole_head_ran)
    rows = pair_rows(policy)
    fit(SFTModule(policy, tiny.sft, 1), [in_micro_batches(rows, 150)])
    responses = sorted(t for row in rows for t in row.targets if t != -100)
    assert sorted(torch.cat(given).tolist()) == responses
    assert len(responses) < sum(len(row.ids) for row in rows) / 2


# --- what trains ---


def test_training_is_in_training_mode_before_and_after_validation(
    policy: Policy, tiny: TrainConfig
) -> None:
    config = replace(tiny.sft, lora=replace(tiny.sft.lora, dropout=0.5))
    policy = adapted(policy, config)
    modes: list[bool] = []
    agreed: dict[str, list[bool]] = {"training": [], "validation": []}

    def twice(module: SFTModule, batch: PairBatch) -> bool:
        with torch.no_grad():
            return bool(module.nll(batch)[0] == module.nll(batch)[0])

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
            modes.extend(part.training for part in module.model.modules())
            agreed["training"].append(twice(module, batch[0]))

        def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
            agreed["validation"].append(twice(module, batch))

    fit(SFTModule(policy, config, 8), data_of(policy, tiny), 2, callbacks=[Look()])
    assert all(modes), "every part of the model, in every step of both epochs"
    assert agreed["training"] == [False] * 8, "dropout makes two passes differ"
    assert agreed["validation"] == [True] * 2


def test_dropout_follows_from_seed_and_step(policy: Policy) -> None:
    draws = []
    for seed, step, rank in [(0, 3, 0), (0, 3, 0), (1, 3, 0), (0, 4, 0), (0, 3, 1)]:
        trainer = NonCallableMock(spec=Trainer, global_step=step, global_rank=rank)
        torch.rand(step + rank)  # whatever was drawn before
        StepSeed(seed).on_train_batch_start(trainer, NonCallableMock(spec=LightningModule), None, 0)
        draws.append(torch.rand(4).tolist())
    assert draws[0] == draws[1]
    assert len({tuple(d) for d in draws}) == 4


# --- the learning rate ---


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        (Schedule.constant, [1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (Schedule.linear, [1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7, 0, 0]),
        (Schedule.cosine, [math.cos(math.pi / 14 * s) ** 2 for s in range(8)] + [0]),
    ],
)
def test_warm_up_and_decay_by_hand(schedule: Schedule, after: list[float]) -> None:
    factor = rate_factor(schedule, total=10, warmup=3)
    by_hand = [1 / 4, 2 / 4, 3 / 4, *after]
    assert [factor(step) for step in range(12)] == pytest.approx(by_hand)


def test_the_optimiser_follows_the_schedule(policy: Policy, tiny: TrainConfig) -> None:
    config = replace(tiny.sft, warmup=0.25, lr=0.01)
    rates: list[float] = []

    class Take(Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    policy = adapted(policy, config)
    fit(SFTModule(policy, config, 8), data_of(policy, tiny), 2, callbacks=[Take()])
    by_hand = [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert rates == pytest.approx([0.01 * factor for factor in by_hand])


# --- STL against DCR ---


def test_dcr_differs_from_stl_in_its_starting_weights_alone(
    tmp_path: Path, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Any]] = {}

    def look(_: Any, module: Any, batch: Any) -> None:
        if isinstance(module, SFTModule):
            if method not in seen:
                start = {n: p.detach().clone() for n, p in module.model.named_parameters()}
                seen[method] = [start]
            seen[method].append([(part.names, part.ids.tolist()) for part in batch])

    at_each_step(monkeypatch, look)
    for method in ("stl", "dcr"):
        train.train(changed(tiny, f"method={method}"), Run(tmp_path / method))
    (stl, *stl_batches), (dcr, *dcr_batches) = seen["stl"], seen["dcr"]
    assert stl_batches == dcr_batches, "the same rows in the same batches and micro-batches"
    assert len(stl_batches) == 8
    assert stl.keys() == dcr.keys()
    differ = {n for n in stl if not torch.equal(stl[n], dcr[n])}
    assert differ
    assert all(".layers.0." in n and ".lora_" not in n for n in differ), "what stage one trains"
    assert not same(weights(tmp_path / "stl"), weights(tmp_path / "dcr"))
    assert not (tmp_path / "stl" / "contrastive").exists()


# --- measures ---


def test_general_and_refusal_rows_are_measured_apart(policy: Policy, tiny: TrainConfig) -> None:
    config = without_dropout(tiny.sft, lr=0.0)
    policy = adapted(policy, config)
    data = data_of(policy, replace(tiny, sft=config))
    trainer = fit(SFTModule(policy, config, 4), data)
    measured = {name: value.item() for name, value in trainer.callback_metrics.items()}
    for rows, suffix in ((data.rows.pairs, ""), (data.rows.heldout, "/heldout")):
        for kind, refusal in (("general", False), ("refusal", True)):
            chosen = [row for row in rows if isinstance(row, PairRow) and row.refusal is refusal]
            assert chosen
            with torch.no_grad():
                mean = torch.cat([nll_by_row(policy.model, row) for row in chosen]).mean()
            assert measured[f"sft/nll/{kind}{suffix}"] == pytest.approx(mean.item(), abs=1e-5)


def test_the_loss_of_a_step_is_its_token_mean(policy: Policy, tiny: TrainConfig) -> None:
    config = without_dropout(tiny.sft)
    policy = adapted(policy, config)
    rows, before = pair_rows(policy), copy.deepcopy(policy.model)
    trainer = fit(SFTModule(policy, config, 1), [in_micro_batches(rows, 150)])
    mean = torch.cat([nll_by_row(before, row) for row in rows]).mean().item()
    assert trainer.callback_metrics["sft/step_nll"].item() == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize(
    "switch",
    [
        "sft.epochs=1",
        "sft.batch_size=4",
        "sft.weight_decay=0.5",
        "sft.max_len=50",
        "sft.train_on_prompt=true",
        "sft.terminator=base_eos",
        "sft.precision=bf16",
        "sft.lora.rank=4",
        "sft.lora.alpha=16",
        "sft.lora.dropout=0.5",
        "sft.lora.targets=[q_proj]",
        "seed=1",
    ],
)
def test_every_switch_reaches_the_weights(
    tmp_path: Path, tiny: TrainConfig, switch: str, default: dict[str, Tensor]
) -> None:
    train.train(changed(tiny, switch), Run(tmp_path / "run"))
    assert not same(weights(tmp_path / "run"), default)


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory, tiny: TrainConfig) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("default")
    assert tiny.method is Method.stl
    with callbacks.quiet():
        train.train(tiny, Run(folder / "run"))
    return weights(folder / "run")
