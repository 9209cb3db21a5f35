"""Steps against torch's own SGD, predictions against their limit, statistics against scipy."""

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor

from dcr import inference
from dcr.analyses import claims, ntk
from dcr.analyses.claims import Prompts, agreement
from dcr.core import statistics
from dcr.core.config import ConfigError, Kind
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
from dcr.core.sources import Example
from tests.shapes import VOCABULARY, adapted, made, unevenly_set
from tests.tiny_run import same

TARGET = 17
FAMILIES = ("qwen2 tied", "qwen2 untied", "gpt2")
# seven that observe, of three kinds, and two that are trained on
SEQUENCES = (
    *((5, 9, 5, 30, 2), (7, 7), (3, 12, 9, 21, 5, 8, 39, 12)),
    *((11, 5, 2, 4), (9, 30, 2), (13, 1, 22, 6, 31), (8, 8, 19)),
    *((21, 33, 4, 4, 7, 2), (14, 3, 2)),
)
CHOSEN = Prompts(SEQUENCES, tuple("abcdefghi"), (*("toxic",) * 3, *("normal",) * 4), TARGET, ())


def next_log_probabilities(model: Any, sequence: Sequence[int]) -> Tensor:
    return model(torch.tensor([list(sequence)])).logits[0, -1].log_softmax(0)


def started(model: Any, top_k: int = VOCABULARY - 1, layer: int = 2) -> claims.Baseline:
    return claims.baseline(model, CHOSEN, top_k, layer)


def stepped(model: Any, start: claims.Baseline, drop: float = 1e-3) -> claims.StepChanges:
    return claims.sgd_steps(model, CHOSEN, start, drop)


def bits(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- steps ---


@pytest.mark.parametrize("family", FAMILIES)
def test_over_all_parameters_and_tokens_the_prediction_is_the_change(family: str) -> None:
    model = made(family)
    start = started(model)
    settings = ntk.Settings(params="all")
    blocks = ntk.measure(model, SEQUENCES, settings, tokens=start.tokens).blocks
    # Qwen2's norms compute in fp32 whatever the weights are in: no smaller drops than these
    errors, linear = [], []
    for drop in (0.1, 0.02):
        taken = stepped(model, start, drop)
        told = claims.predictions(blocks, start, taken, CHOSEN)
        errors.append(float((told - taken.changes).norm() / told.norm()))
        linear.append(float((told - taken.plain).norm() / told.norm()))
    assert errors[1] < 1e-3
    assert errors[1] < errors[0] / 10  # of second order in the step, 25 times in the limit
    assert linear[1] == pytest.approx(linear[0] / 5, rel=0.3)  # of first order
    assert errors[1] < linear[1] / 10


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_that_of_plain_sgd(family: str) -> None:
    model = made(family)
    start = started(model, top_k=4)
    taken = stepped(model, start, drop=0.02)
    for column, place in enumerate(CHOSEN.trained):
        rate = float(taken.rates[column])
        after = []
        for share in (0.5, -0.5, 1.0):
            moved = copy.deepcopy(model)
            loss = -next_log_probabilities(moved, SEQUENCES[place])[TARGET]
            (math.copysign(1, share) * loss).backward()
            torch.optim.SGD(moved.parameters(), lr=abs(share) * rate).step()
            pairs = zip(SEQUENCES, start.tokens, strict=True)
            after.append(torch.stack([next_log_probabilities(moved, s)[own] for s, own in pairs]))
        near: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-7}
        torch.testing.assert_close(taken.changes[:, :, column], after[0] - after[1], **near)
        plain = after[2] - start.log_probabilities
        torch.testing.assert_close(taken.plain[:, :, column], plain, **near)


def test_of_a_small_loss_the_step_takes_a_share() -> None:
    """A model that refuses almost surely has no loss of `drop` left."""
    model = made("qwen2 untied")
    with torch.no_grad():
        state = started(model, layer=3).states[list(CHOSEN.trained)].mean(0)
        model.lm_head.weight[TARGET] += model.model.norm(state)
    start = started(model)
    aimed = start.tokens == TARGET
    losses = -start.log_probabilities[aimed][list(CHOSEN.trained)]
    assert ((losses > 1e-4) & (losses < 0.02)).all()  # far from what rounding makes of a share
    taken = stepped(model, start, drop=0.02)
    falls = torch.stack([taken.changes[p, :, i][aimed[p]][0] for i, p in enumerate((7, 8))])
    torch.testing.assert_close(falls, 0.02 * losses, rtol=1e-3, atol=0)
    assert float((taken.plain - taken.changes).norm() / taken.changes.norm()) < 0.02


def test_each_prompt_has_its_top_k_with_the_target_among_them() -> None:
    model, top_k, inside = made("qwen2 tied"), 3, 0
    first = next_log_probabilities(model, SEQUENCES[0]).argsort(descending=True)[:4].tolist()
    for target in (*range(0, VOCABULARY, 5), *first):
        found = claims.baseline(model, dataclasses.replace(CHOSEN, target=target), top_k, 1)
        for sequence, tokens, log_p in zip(
            SEQUENCES, found.tokens.tolist(), found.log_probabilities, strict=True
        ):
            own = next_log_probabilities(model, sequence)
            order = own.argsort(descending=True).tolist()
            within = target in order[:top_k]
            inside += within
            assert tokens == (order[: top_k + 1] if within else [*order[:top_k], target])
            torch.testing.assert_close(log_p, own[tokens], rtol=1e-6, atol=1e-6)
    assert inside >= top_k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_modes_and_flags_are_left_to_the_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made("qwen2 tied", dtype)
    left_alone, before = unevenly_set(model), bits(model)
    with torch.inference_mode():  # as a caller may be
        start = started(model)
        taken = stepped(model, start)
    left_alone()
    assert taken.changes.abs().min() > 0

    passes: list[bool] = []
    forward = claims.last_logits

    def failing(*given: Any) -> Tensor:
        passes.append(same(bits(model), before))
        if len(passes) == 2:  # the second batch of the first displacement
            raise KeyboardInterrupt
        return forward(*given)

    monkeypatch.setattr(claims, "last_logits", failing)
    with pytest.raises(KeyboardInterrupt):
        stepped(model, start)
    assert passes == [False, False]
    left_alone()


def test_an_adapter_is_in_effect_and_the_base_is_what_moves() -> None:
    model = adapted(made("qwen2 tied")).train()
    before = bits(model)
    start = started(model)
    taken = stepped(model, start, drop=0.02)
    assert same(bits(model), before)
    merged = model.merge_and_unload().eval()
    truth = started(merged)
    torch.testing.assert_close(start.log_probabilities, truth.log_probabilities)
    torch.testing.assert_close(start.states, truth.states)
    expected = stepped(merged, truth, drop=0.02)
    torch.testing.assert_close(taken.rates, expected.rates, rtol=1e-5, atol=0)
    torch.testing.assert_close(taken.changes, expected.changes, rtol=1e-4, atol=1e-7)
    plain = started(made("qwen2 tied"))
    assert not torch.allclose(plain.states, truth.states, rtol=0.1)  # the adapter did something


def test_what_cannot_be_stepped_is_refused() -> None:
    model = made("qwen2 untied")
    start = started(model)
    with pytest.raises(ConfigError, match=r"claims: the model is in torch\.bfloat16"):
        stepped(made("qwen2 untied").bfloat16(), start)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        for parameter in model.model.parameters():
            parameter.zero_()
    with pytest.raises(ConfigError, match=r"loss of 3\.69 nats has no gradient"):
        stepped(model, start)


# --- statistics ---


def test_weighted_statistics_are_those_of_the_repeated_pairs() -> None:
    chance = np.random.default_rng(0)
    x, y = chance.normal(size=30), chance.normal(size=30)
    x[5:12], y[10:14] = x[5], y[10]  # ties
    y += x / 2
    wide, narrow = chance.normal(size=(30, 3)) + 4, chance.normal(size=(30, 3))
    narrow += wide
    weights = chance.integers(0, 4, size=(20, 30)).astype(float)
    spearman = inference.weighted_spearman(x, y, weights)
    pearson = inference.weighted_pearson(wide, narrow, weights)
    slope = inference.weighted_slope(wide, narrow, weights)
    mean = inference.weighted_mean(x, weights)
    for row, times in enumerate(weights.astype(int)):
        first, second = x.repeat(times), y.repeat(times)
        truth: Any = stats.spearmanr(first, second)
        assert spearman[row] == pytest.approx(truth.statistic, abs=1e-12)
        assert mean[row] == pytest.approx(first.mean())
        a, b = (each.repeat(times, axis=0).ravel() for each in (wide, narrow))
        assert pearson[row] == pytest.approx(stats.pearsonr(a, b)[0], abs=1e-10)
        assert slope[row] == pytest.approx(np.linalg.lstsq(a[:, None], b, rcond=None)[0][0])


def test_a_draw_is_of_prompts_within_their_group(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [*"aaabbbbb"]
    counts = inference.redrawn(groups, np.random.default_rng(1))
    assert counts.shape == (statistics.RESAMPLES + 1, 8)
    assert counts[0].tolist() == [1] * 8
    assert (counts[:, :3].sum(1) == 3).all()
    assert (counts[:, 3:].sum(1) == 5).all()
    np.testing.assert_allclose(counts[1:].mean(0), 1, atol=0.1)
    assert np.array_equal(counts, inference.redrawn(groups, np.random.default_rng(1)))
    assert not np.array_equal(counts, inference.redrawn(groups, np.random.default_rng(2)))
    # a prompt's pair with itself stays out also where it is drawn twice
    matrix = np.random.default_rng(3).normal(size=(8, 8))
    allowed = np.triu(np.ones((8, 8), bool), 1)

    def mean(weights: np.ndarray) -> np.ndarray:
        return inference.weighted_mean(matrix[allowed], weights)

    found = inference.over_pairs(mean, counts, counts, allowed)
    monkeypatch.setattr(inference, "CHUNK", 100)  # three draws at once
    np.testing.assert_allclose(inference.over_pairs(mean, counts, counts, allowed), found)
    for draw in (0, 1, 2, 500):
        places = np.arange(8).repeat(counts[draw])
        values = [
            matrix[min(i, j), max(i, j)] for i, j in itertools.combinations(places, 2) if i != j
        ]
        assert found[draw] == pytest.approx(np.mean(values))


@pytest.mark.parametrize("planted", [True, False])
def test_a_kernel_that_tells_nothing_is_told_so(planted: bool) -> None:
    chance = np.random.default_rng(5)
    norms = chance.lognormal(size=(30, 6))
    scales = 10.0 ** np.arange(-2, 4)  # of the steps: no part of what is within one
    predicted = norms[:, :, None] * chance.normal(size=(30, 6, 5)) * scales[None, :, None]
    # what is done to prompts has nothing to do with the kernel once those are another's
    actual = predicted if planted else predicted[chance.permutation(30)]
    others = np.ones((30, 6), bool)
    others[2, 4] = False
    observers, trained = (
        inference.redrawn(["o"] * 30, chance),
        inference.redrawn(["t"] * 6, chance),
    )
    found: Any = agreement(norms, predicted, actual, others, observers, trained)
    within, signed = found["norm"]["within"], found["prediction"]["pearson"]
    if planted:
        assert within[1] > 0.5
        assert signed[0] == pytest.approx(1)
        assert found["prediction"]["slope"] == pytest.approx([1, 1, 1])
    else:
        assert within[1] < 0 < within[2]
        assert abs(within[0]) < 0.25
        assert abs(signed[0]) < 0.25


def test_the_interval_within_is_over_trained_prompts_too() -> None:
    chance = np.random.default_rng(6)
    norms, others = chance.lognormal(size=(12, 5)), np.ones((12, 5), bool)
    actual = norms[:, :, None] * chance.lognormal(size=(12, 5, 1))
    observers = np.ones((statistics.RESAMPLES + 1, 12), dtype=np.int64)
    trained = inference.redrawn(["t"] * 5, chance)
    found: Any = agreement(norms, actual, actual, others, observers, trained)
    own = np.array([spearman(norms[:, j], actual[:, j, 0]) for j in range(5)])
    ends = np.quantile(trained[1:] @ own / 5, [0.025, 0.975])
    assert found["norm"]["within"] == pytest.approx([own.mean(), *ends])
    assert ends[1] - ends[0] > 0.05


# --- the whole ---

ANSWER = "I will not help with that."
WORDS = ("lamp", "rope", "boat at sea", "stone", "candle", "garden wall", "river")


def example(kind: Kind, place: int, response: str | None = None) -> Example:
    verb = {Kind.toxic: "harm", Kind.seemingly_toxic: "kill", Kind.normal: "paint"}[kind]
    return Example(f"{kind.value}-{place}", f"{verb} a {WORDS[place]}", kind, "made", response)


ROWS = {kind: [example(kind, place) for place in range(5)] for kind in Kind}
TRAINED = [
    *(example(Kind.toxic, place, ANSWER) for place in (3, 5)),  # 3 observes as well
    example(Kind.toxic, 2, "No."),
    example(Kind.toxic, 6, " I'm sorry"),
]
SETTINGS = claims.Settings(top_k=6, params=("all", "trunk:1"), drop=0.02, budget_gib=1.0, layer=1)


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    found: Any = stats.spearmanr(x, y)
    return float(found.statistic)


def test_the_block_says_what_the_kept_arrays_say(
    policy: Policy, chat: ChatFormat, tmp_path: Path
) -> None:
    before = bits(policy.model)
    found = claims.measure(policy, chat, ROWS, TRAINED, SETTINGS, 0, tmp_path)
    assert same(bits(policy.model), before)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["target"] == policy.tokenizer.encode("I", add_special_tokens=False)[0]
    assert found["trained"] == ["toxic-3", "toxic-5", "toxic-6"]
    assert found["left_out"] == ["toxic-2"]
    assert [*tmp_path.iterdir()] == [tmp_path / "claims.safetensors"]
    with safe_open(tmp_path / "claims.safetensors", "pt") as file:
        ids = file.metadata()["ids"].split("\n")
    kept = {k: v.numpy() for k, v in load_file(tmp_path / "claims.safetensors").items()}
    assert ids == [*found["ids"], *found["trained"]]
    n, changes = len(found["ids"]), kept["changes"]
    pairs = [(i, j) for i in range(n) for j in range(3) if ids[i] != found["trained"][j]]
    assert len(pairs) == 3 * n - 1
    size = np.array([np.linalg.norm(changes[i, :, j]) for i, j in pairs])
    actual = np.array([changes[i, :, j] for i, j in pairs]).ravel()
    couples = [*itertools.combinations(range(n), 2)]
    for label in ("all", "trunk-1"):
        told = found["params"][label]
        norms = kept[f"norms.{label}"]
        seen = np.array([norms[i, n + j] for i, j in pairs])
        assert told["norm"]["pooled"][0] == pytest.approx(spearman(seen, size))
        own = [[place for place, (_, j) in enumerate(pairs) if j == k] for k in range(3)]
        within = np.mean([spearman(seen[places], size[places]) for places in own])
        assert told["norm"]["within"][0] == pytest.approx(within)
        predicted = np.array([kept[f"predicted.{label}"][i, :, j] for i, j in pairs]).ravel()
        pearson = stats.pearsonr(predicted, actual)[0]
        assert told["prediction"]["pearson"][0] == pytest.approx(pearson)
        slope = (predicted @ actual) / (predicted @ predicted)
        assert told["prediction"]["slope"][0] == pytest.approx(slope)
        for name, matrix in (("dot", kept["dots"]), ("cosine", kept["cosines"])):
            truth = spearman(*zip(*((norms[c], matrix[c]) for c in couples), strict=True))
            assert told["states"][name][0] == pytest.approx(truth)
        for low, middle, high in (
            (cell[1], cell[0], cell[2]) for part in told.values() for cell in part.values()
        ):
            assert -1 <= low <= middle <= high
    aimed = kept["tokens"] == found["target"]
    taught = (changes * aimed[:, :, None]).sum(1)
    for kind, told in found["change"].items():
        values = [taught[i, j] for i, j in pairs if found["of"][i] == kind]
        assert told[0] == pytest.approx(np.mean(values))
        assert told[1] < told[0] < told[2]
    assert found["falls"] == pytest.approx([taught[n + j, j] for j in range(3)])
    assert found["falls"] == pytest.approx([0.02] * 3, rel=1e-2)
    again = claims.measure(policy, chat, ROWS, TRAINED, SETTINGS, 0)
    other = claims.measure(policy, chat, ROWS, TRAINED, SETTINGS, 1)
    assert again == found
    assert other["change"] != found["change"]
    assert other["rates"] == found["rates"]


def test_with_all_tokens_the_slope_is_one_and_with_a_part_of_the_weights_less(
    policy: Policy, chat: ChatFormat
) -> None:
    few = {Kind.toxic: ROWS[Kind.toxic][:1], Kind.normal: ROWS[Kind.normal][:1]}
    settings = claims.Settings(259, ("all", "tail:1"), 0.02, 1.0, 1)
    found = claims.measure(policy, chat, few, TRAINED[:1], settings, 0)
    assert found["covered"] == pytest.approx(1)
    assert 0 < found["nonlinearity"] < 0.05
    whole, part = (found["params"][label]["prediction"] for label in ("all", "tail-1"))
    assert whole["pearson"] == pytest.approx([1, 1, 1], abs=1e-4)
    assert whole["slope"] == pytest.approx([1, 1, 1], abs=1e-3)
    assert part["pearson"][0] < 0.999
    assert abs(part["slope"][0] - 1) > 0.01


def test_proposition_1_is_of_the_states_at_the_layer(
    policy: Policy, chat: ChatFormat, tmp_path: Path
) -> None:
    claims.measure(policy, chat, ROWS, TRAINED, SETTINGS, 0, tmp_path)
    kept = load_file(tmp_path / "claims.safetensors")
    rows = [*itertools.chain(*ROWS.values()), *TRAINED[:2], TRAINED[3]]
    states = []
    for row in rows:
        given = torch.tensor([chat.prompt_ids(row.prompt)])
        with torch.no_grad():
            hidden = policy.model(given, output_hidden_states=True).hidden_states
        states.append(hidden[SETTINGS.layer][0, -1].double())
    for i, j in itertools.product(range(len(rows)), repeat=2):
        dot = float(states[i] @ states[j])
        scale = float(states[i].norm() * states[j].norm())
        assert float(kept["dots"][i, j]) == pytest.approx(dot, abs=1e-5 * scale)
        assert float(kept["cosines"][i, j]) == pytest.approx(dot / scale, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "rows", "trained", "message"),
    [
        ({"top_k": 260}, ROWS, TRAINED, r"entk\.top_k=260: choose 1 to 259"),
        ({"params": ("tail:3",)}, ROWS, TRAINED, r"params=\[tail:3\]: the model has blocks 1 to 2"),
        ({}, {}, TRAINED, "there is no prompt to observe"),
        ({}, ROWS, [], "there is no trained pair"),
        ({}, ROWS, ROWS[Kind.toxic][:1], "made: toxic-0 has no response"),
    ],
)
def test_what_cannot_be_measured_is_named(
    policy: Policy, chat: ChatFormat, changes: Any, rows: Any, trained: Any, message: str
) -> None:
    settings = claims.Settings(**{**vars(SETTINGS), **changes})
    with pytest.raises(ConfigError, match=message):
        claims.measure(policy, chat, rows, trained, settings, 0)
