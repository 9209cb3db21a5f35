import copy
import itertools
import math
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import Callback
from tiny_run import (
    at_each_step,
    changed,
    failing,
    fit,
    gradients_of_one_step,
    logged,
    same,
    settings,
    weights,
)
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import AutoModelForCausalLM, LlamaConfig

from dcr import builtin, checking, extensions, train
from dcr.clusters import HeldoutClusters, kmeans_accuracy
from dcr.core import config, losses, models
from dcr.core.config import Kind, Stage
from dcr.core.config.training import NLLSource, Pooling, TrainConfig
from dcr.core.data import rows_of
from dcr.core.data.rows import PairRow, PromptBatch, pair_batch, prompt_batch, prompt_rows
from dcr.core.models import Policy, structure
from dcr.core.prompts import ChatFormat
from dcr.core.runs import Run
from dcr.core.sources import Example
from dcr.core.training import SafetyData, callbacks
from dcr.core.training.resuming import Interrupted
from dcr.core.training.stages import ContrastiveModule, PairMetrics
from dcr.fast.passes import Fast, laid_out
from tests.shapes import chat_of, tiny_policy

PROMPTS = ["How do I kill a process?", "Kill him", "How do I shoot a film at night?", "Rob a bank"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return settings(tmp_path_factory.mktemp("rows"), "stage=contrastive")


@pytest.fixture
def chat(policy: Policy) -> ChatFormat:
    return chat_of(policy, system_prompt="Be kind.")


def batch_of(chat: ChatFormat, pooling: Pooling = Pooling.last, pairs: Any = ()) -> PromptBatch:
    rows = []
    for i, text in enumerate(PROMPTS):
        asked = Example(f"r{i}", text, Kind.toxic, "test")
        rows += prompt_rows(chat, [asked], i % 2, None, pooling)
    return prompt_batch(rows, 0, pairs)


@pytest.fixture
def batches(chat: ChatFormat, tiny: TrainConfig) -> SafetyData:
    rows = rows_of(tiny)
    return SafetyData(Stage.contrastive, rows, chat, tiny)


# --- what trains and what stays ---


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("train_embeddings", [None, True, False])
def test_everything_beyond_the_block_stays_bit_identical(
    batches: SafetyData, tiny: TrainConfig, tied: bool, train_embeddings: bool | None
) -> None:
    policy = tiny_policy(tie_word_embeddings=tied)
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    dcr = replace(tiny.dcr, train_embeddings=train_embeddings)
    fit(ContrastiveModule(policy, dcr, 1, 5), batches)
    changed = {k for k, v in policy.model.state_dict().items() if not torch.equal(v, before[k])}
    expected = {k for k in before if k.startswith("model.layers.0.")}
    if train_embeddings or (train_embeddings is None and not tied):
        expected |= {"model.embed_tokens.weight"} | ({"lm_head.weight"} if tied else set())
    assert changed == expected
    if train_embeddings is None and not tied:  # rows of unseen tokens do not move
        name = "model.embed_tokens.weight"
        moved = (policy.model.get_parameter(name) != before[name]).any(1).nonzero().flatten()
        assert set(moved.tolist()) == {token for row in batches.rows.prompts for token in row.ids}


@pytest.mark.parametrize("weight", [0.0, 0.001])
def test_without_nll_nothing_beyond_the_block_runs(
    policy: Policy, batches: SafetyData, tiny: TrainConfig, weight: float
) -> None:
    dcr = replace(tiny.dcr, nll=replace(tiny.dcr.nll, weight=weight))
    module = ContrastiveModule(policy, dcr, 1, 5)
    blocks, norm = structure.decoder_blocks(policy.model), structure.final_norm(policy.model)
    assert norm
    for later in (blocks[1], norm[1], structure.head(policy.model)):
        later.register_forward_pre_hook(failing(AssertionError("ran")))
    if weight:
        with pytest.raises(AssertionError, match="ran"):
            fit(module, batches)
    else:
        trainer = fit(module, batches)
        assert "contrastive/circle/heldout" in trainer.callback_metrics, "held-out prompts as well"
        assert "contrastive/nll" not in trainer.callback_metrics, "there is none to speak of"


# --- features and losses against plain transformers ---


@pytest.mark.parametrize("pooling", list(Pooling))
def test_features_are_the_hidden_states_pooled_by_hand(
    policy: Policy, chat: ChatFormat, tiny: TrainConfig, pooling: Pooling
) -> None:
    module = ContrastiveModule(policy, tiny.dcr, 1, 1)
    batch = batch_of(chat, pooling)
    both = module.features(batch), module.features_and_nll(batch)[0]
    for index, text in enumerate(PROMPTS):
        ids = chat.prompt_ids(text)
        states = policy.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0]
        by_hand = {
            Pooling.last: states[-1],
            Pooling.mean: sum(states[i] for i in range(1, len(ids))) / (len(ids) - 1),
        }
        for features in both:
            torch.testing.assert_close(features[index], by_hand[pooling])


def test_nll_of_general_pairs_is_transformers_loss_on_responses(
    policy: Policy, chat: ChatFormat, tiny: TrainConfig
) -> None:
    dcr = replace(tiny.dcr, nll=replace(tiny.dcr.nll, source=NLLSource.general))
    made = [chat.pair("Name a fruit", "Apple", 200), chat.pair("Hi", "Good day to you", 200)]
    rows = [PairRow(f"p{i}", ids, targets, False) for i, (ids, targets) in enumerate(made)]
    batch = batch_of(chat, pairs=rows)
    pairs = pair_batch(rows, 0)
    labels = pairs.ids.masked_fill(~pairs.mask, -100)
    for index, prompt in enumerate(("Name a fruit", "Hi")):
        labels[index, : len(chat.prompt_ids(prompt))] = -100
    expected = policy.model(pairs.ids, attention_mask=pairs.mask, labels=labels).loss
    module = ContrastiveModule(policy, dcr, 1, 1)
    features, nll = module.features_and_nll(batch)
    torch.testing.assert_close(nll, expected)
    torch.testing.assert_close(features, module.features(batch))
    assert module.nll_tokens(batch) == (labels != -100).sum()


def test_one_step_moves_the_weights_as_a_plain_reimplementation_does(
    policy: Policy, chat: ChatFormat, tiny: TrainConfig
) -> None:
    plain, batch = copy.deepcopy(policy.model), batch_of(chat)
    dcr = replace(tiny.dcr, nll=replace(tiny.dcr.nll, weight=0.5))
    module = ContrastiveModule(policy, dcr, 1, 1)
    assert laid_out(structure.backbone(policy.model), batch.ids, batch.mask).prefix > 4
    taken = gradients_of_one_step(module, batch)
    out = plain(
        batch.ids,
        attention_mask=batch.mask,
        labels=batch.ids.masked_fill(~batch.mask, -100),
        output_hidden_states=True,
    )
    last = batch.mask.sum(1) - 1
    features = out.hidden_states[1][torch.arange(len(last)), last]
    circle = losses.circle_loss(features, batch.labels, dcr.margin, dcr.scale)
    loss = circle + 0.5 * out.loss
    trained = {n: p for n, p in plain.named_parameters() if n.startswith("model.layers.0.")}
    optimizer = torch.optim.AdamW(trained.values(), dcr.optim.lr, (0.9, 0.999), weight_decay=0)
    loss.backward()
    assert taken.keys() == trained.keys()
    for name, gradient in taken.items():
        torch.testing.assert_close(gradient, plain.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    optimizer.step()
    for name, weight in policy.model.named_parameters():
        # Adam's first step divides by the gradient's size: where that is rounding alone, so is it
        torch.testing.assert_close(weight, plain.get_parameter(name), rtol=1e-4, atol=2e-5)


# --- every switch ---

SWITCHES = [
    "dcr.margin=0.1",
    "dcr.scale=8",
    "dcr.ratio=1",
    "dcr.draws=20",
    "dcr.batch_size=6",
    "dcr.sampler=proportional",
    "dcr.pooling=mean",
    "dcr.circle.weights=sun2020",
    "dcr.nll.source=general",
    "dcr.optim.lr=1e-4",
    "dcr.optim.weight_decay=0.1",
    "dcr.optim.clip=0.01",
    "dcr.precision=mixed",
    "dcr.precision=bf16",
    "seed=1",
]


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_gradient_checkpointing_changes_no_gradient(
    chat: ChatFormat, policy: Policy, tiny: TrainConfig, weight: float
) -> None:
    batch, dcr = batch_of(chat), replace(tiny.dcr, nll=replace(tiny.dcr.nll, weight=weight))
    other = replace(policy, model=copy.deepcopy(policy.model))
    plain = gradients_of_one_step(ContrastiveModule(policy, dcr, 1, 1), batch)
    runs: list[bool] = []
    mlp = structure.decoder_blocks(other.model)[0].get_submodule("mlp")
    mlp.register_forward_pre_hook(lambda *_: runs.append(True))
    spared = replace(dcr, gradient_checkpointing=True)
    saving = gradients_of_one_step(ContrastiveModule(other, spared, 1, 1), batch)
    assert len(runs) == 2, "the block runs again in the backward pass"
    assert plain.keys() == saving.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(saving[name], gradient)


@pytest.mark.slow
def test_moments_of_eight_bits_train_and_go_on(tmp_path: Path, tiny: TrainConfig) -> None:
    """Moments of large matrices take a byte, and survive being stopped."""
    pytest.importorskip("bitsandbytes")
    wide = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=260)
    wide.num_attention_heads = wide.num_key_value_heads = 4
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "wide")
    builtin.byte_tokenizer().save_pretrained(tmp_path / "wide")
    small = changed(tiny, f"model.name={tmp_path / 'wide'}", "dcr.optim.moments=int8")
    whole, run, steps = Run(tmp_path / "whole"), Run(tmp_path / "run"), itertools.count()
    train.train(small, whole)

    def at_the_third(*_: Any) -> None:
        if next(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        at_each_step(patch, at_the_third)
        with pytest.raises(Interrupted):
            train.train(small, run)
    last = max(run.checkpoints("contrastive").glob("*.ckpt"))
    states = torch.load(last, weights_only=True)["optimizer_states"][0]["state"].values()
    kept = [state["__bnb_optimizer_quant_state__"]["state1"].dtype for state in states]
    assert kept.count(torch.uint8) == 4, "matrices of more than 4,096 weights"
    train.train(small, run)
    assert same(weights(run.folder), weights(whole.folder))


def trained(folder: Path, tiny: TrainConfig, *switches: str) -> Path:
    """The run folder of one epoch of stage one."""
    train.train(changed(tiny, "dcr.epochs=1", *switches), Run(folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory, tiny: TrainConfig) -> dict[str, Tensor]:
    return weights(trained(tmp_path_factory.mktemp("default"), tiny, "dcr.nll.weight=0.1"))


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_reaches_the_weights(
    tmp_path: Path, tiny: TrainConfig, default: dict[str, Tensor], switch: str
) -> None:
    assert not same(weights(trained(tmp_path, tiny, "dcr.nll.weight=0.1", switch)), default)


def test_lora_trains_the_blocks_up_to_the_layer_and_is_merged(
    tmp_path: Path, tiny: TrainConfig, policy: Policy
) -> None:
    run = trained(tmp_path, tiny, "dcr.adapter=lora")
    made = weights(run)
    before = policy.model.state_dict()
    moved = {n for n, v in made.items() if not torch.equal(v, before[n.split("/")[1]])}
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert moved
    assert all(".layers.0." in name and name.split(".")[-2] in linear for name in moved)
    reopened = models.open_folder(str(run / "contrastive"), config.Precision.fp32)
    assert not any("lora" in name for name, _ in reopened.model.named_parameters())


def test_the_anchor_needs_general_rows(tiny: TrainConfig) -> None:
    made = changed(tiny, "dcr.nll.source=general")
    rows = rows_of(made)
    with pytest.raises(config.ConfigError, match=r"dcr\.nll\.source=general"):
        checking.check_unfinished(made, replace(rows, normal=[]), [Stage.contrastive])


# --- measures ---


def pooled_by_loops(batches: list[tuple[Tensor, Tensor]], margin: float) -> dict[str, float]:
    within, across, violating = [], [], 0
    for features, labels in batches:
        for i, j in itertools.combinations(range(len(labels)), 2):
            cosine = F.cosine_similarity(features[i], features[j], dim=0).item()
            alike = bool(labels[i] == labels[j])
            (within if alike else across).append(cosine)
            violating += cosine < 1 - margin if alike else cosine > margin
    sizes = np.array([len(y) for _, y in batches])
    circle = np.array([losses.circle_loss(f, y, margin, 16.0).item() for f, y in batches])
    floor = np.array([losses.circle_floor(y).item() for _, y in batches])
    return {
        "within_cosine": sum(within) / len(within),
        "across_cosine": sum(across) / len(across),
        "violating_share": violating / (len(within) + len(across)),
        "circle": circle @ sizes / sizes.sum(),
        "above_floor": (circle - floor) @ sizes / sizes.sum(),
    }


def uneven_batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    return [(torch.randn(n, 5), (torch.arange(n) % 3 > 0).long()) for n in (6, 3, 1, 5)]


def add(metrics: PairMetrics, batches: list[tuple[Tensor, Tensor]], margin: float) -> None:
    for features, labels in batches:
        circle = losses.circle_loss(features, labels, margin, 16.0)
        metrics.add(features, labels, circle, losses.circle_floor(labels))


def value(metric: Any) -> float:
    return metric.compute().item()


def test_an_epoch_without_pairs_of_a_kind_has_no_mean() -> None:
    metrics = PairMetrics(0.25)
    add(metrics, [(torch.ones(2, 3), torch.tensor([1, 1]))], 0.25)
    assert math.isnan(value(metrics["across_cosine"]))
    assert value(metrics["within_cosine"]) == pytest.approx(1)


def test_an_epoch_logs_the_measures_of_all_its_batches(
    policy: Policy, batches: SafetyData, tiny: TrainConfig
) -> None:
    dcr = replace(tiny.dcr, optim=replace(tiny.dcr.optim, lr=0.0))  # so features stay as they are
    module, seen = ContrastiveModule(policy, dcr, 1, 5), []

    class Take(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
            seen.append(batch)

    trainer = fit(module, batches, callbacks=[Take(), HeldoutClusters()])
    with torch.no_grad():
        trained_on = [(module.features(batch), batch.labels) for batch in seen]
        nll = [
            (module.features_and_nll(b)[1].item(), int(b.mask.sum()) - len(b.names)) for b in seen
        ]
        heldout: Any = batches.val_dataloader()
        unseen = [(module.features(batch), batch.labels) for batch in heldout]
    logged_values = {k: v.item() for k, v in trainer.callback_metrics.items()}
    assert len({len(batch.names) for batch in seen}) > 1, "the last batch is smaller"
    for name, value in pooled_by_loops(trained_on, dcr.margin).items():
        assert logged_values[f"contrastive/{name}"] == pytest.approx(value, abs=1e-4)
    for name, value in pooled_by_loops(unseen, dcr.margin).items():
        assert logged_values[f"contrastive/{name}/heldout"] == pytest.approx(value, abs=1e-4)
    tokens = sum(n for _, n in nll)
    mean = sum(v * n for v, n in nll) / tokens
    assert logged_values["contrastive/nll"] == pytest.approx(mean, abs=1e-5)
    features, labels = (torch.cat(part) for part in zip(*unseen, strict=True))
    accuracy = kmeans_accuracy(features, labels)
    assert logged_values["contrastive/kmeans_accuracy/heldout"] == pytest.approx(accuracy)


def rank(index: int, meeting: str, results: Any) -> None:
    """One of two processes: its share of the uneven batches, then the common means."""
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=index, world_size=2)
    metrics, nll = PairMetrics(0.25), MeanMetric()
    mine = uneven_batches()[index::2]
    add(metrics, mine, 0.25)
    for features, _ in mine:
        nll.update(features[:, 0])  # as SFT adds the NLL of each token
    module = ContrastiveModule.__new__(ContrastiveModule)
    torch.nn.Module.__init__(module)
    module.train_metrics = metrics
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    values = {name: value(metric) for name, metric in metrics.items()}
    values |= {"nll": nll.compute().item()}
    saved = {k: v.item() for k, v in checkpoint["state_dict"].items()}
    results.put((index, values, saved))
    torch.distributed.destroy_process_group()


def test_two_ranks_measure_what_one_process_does(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")  # nothing is imported anew
    results, meeting = fork.SimpleQueue(), f"file://{tmp_path}/meeting"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that threads and fork do not go together
        ranks = [fork.Process(target=rank, args=(i, meeting, results)) for i in (0, 1)]
        for process in ranks:
            process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    (_, one, saved), (_, two, _) = results.get(), results.get()
    batches = uneven_batches()
    expected = pooled_by_loops(batches, 0.25)
    expected |= {"nll": torch.cat([features for features, _ in batches])[:, 0].mean().item()}
    assert one == pytest.approx(expected, abs=1e-5)
    assert two == one
    rows = sum(len(y) for _, y in batches)
    assert saved["train_metrics.circle.weight"] == rows, "a checkpoint holds the sums of all ranks"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with callbacks.quiet():
        yield


def test_weights_that_are_measured_meanwhile_stay_as_they_are(tiny: TrainConfig) -> None:
    asked, mixed = extensions.fast_passes().shrinks_frozen, changed(tiny, "dcr.precision=mixed")
    assert asked(mixed)
    assert asked(changed(mixed, "tracking.snapshots=2"))
    assert not asked(changed(mixed, "tracking.quantities=[refusal_probability]"))


@pytest.mark.parametrize("more", [(), ("dcr.nll.weight=0",), ("dcr.adapter=lora",)])
def test_weights_held_light_change_no_bit_of_a_run(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    mixed, held = changed(tiny, "dcr.precision=mixed", "dcr.epochs=1", *more), []
    at_each_step(
        monkeypatch,
        lambda _, module, __: held.append([(p.dtype, p.numel() > 0) for p in module.parameters()]),
    )
    for light in (True, False):
        monkeypatch.setattr(Fast, "shrinks_frozen", lambda *_, light=light: light)
        train.train(mixed, Run(tmp_path / str(light)))
    light, whole = (tmp_path / str(kind) for kind in (True, False))
    assert same(weights(light), weights(whole))
    assert logged(light) == logged(whole)
    assert ((torch.bfloat16, True) in held[0]) == ("dcr.nll.weight=0" not in more)  # all is trained
    assert ((torch.float32, False) in held[0]) == ("dcr.nll.weight=0" in more)
    assert set(held[-1]) == {(torch.float32, True)}
