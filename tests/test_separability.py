"""Layerwise separability against brute force, closed forms, transformers' own hidden states."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from dcr.analyses import separability
from dcr.analyses.separability import (
    classical_mds,
    fisher_ratio,
    folds,
    linear_probe,
    probe_auroc,
    transfer_auroc,
)
from dcr.clusters import kmeans_accuracy
from dcr.core.config import Kind
from dcr.core.config.training import Pooling
from dcr.core.data.rows import PromptRow, prompt_rows
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
from dcr.core.sources import Example

NOUNS = ("lamp", "rope", "boat", "stone", "candle", "garden", "river", "window", "ladder", "a")


def clouds(count: int, width: int, gap: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two standard normal classes whose means lie `gap` apart along the first axis."""
    chance = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    points = torch.randn(count, width, generator=chance)
    points[:, 0] += gap * labels
    return points, labels


def alone(count: int) -> list[str]:
    return [f"row {i}" for i in range(count)]


def example(place: int, kind: Kind, group: str | None = None) -> Example:
    verb = "break" if kind is Kind.toxic else "blow out"
    prompt = f"How do I {verb} the {NOUNS[place % 10]} " + "very " * (place % 4) + "fast?"
    return Example(f"{kind.value}-{place}", prompt, kind, "made up", group=group)


# --- without a classifier ---


@pytest.mark.parametrize("gap", [0.0, 1.0, 4.0])
def test_kmeans_accuracy_is_that_of_the_hungarian_matching(gap: float) -> None:
    points, labels = clouds(60, 4, gap)
    clusters = KMeans(2, n_init=10, random_state=3).fit_predict(points.double().numpy())  # pyright: ignore
    table = np.zeros((2, 2))
    for cluster, label in zip(clusters, labels.tolist(), strict=True):
        table[cluster, label] += 1
    rows, columns = linear_sum_assignment(-table)
    assert kmeans_accuracy(points, labels, seed=3) == pytest.approx(table[rows, columns].sum() / 60)


def test_kmeans_without_anything_to_tell_apart() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    assert kmeans_accuracy(torch.ones(4, 2), labels) == 0.75
    assert math.isnan(kmeans_accuracy(torch.ones(1, 2), labels[:1]))
    assert math.isnan(kmeans_accuracy(torch.ones(0, 2), labels[:0]))


def test_silhouette_by_loops() -> None:
    points, labels = clouds(15, 3, 1.5)
    values = []
    for i in range(15):
        apart = (points - points[i]).double().norm(dim=1)
        own = [apart[j].item() for j in range(15) if j != i and labels[j] == labels[i]]
        other = [apart[j].item() for j in range(15) if labels[j] != labels[i]]
        a, b = sum(own) / len(own), sum(other) / len(other)
        values.append((b - a) / max(a, b))
    expected = sum(values) / 15
    assert separability.silhouette(points, labels) == pytest.approx(expected, abs=1e-6)


def test_fisher_ratio_by_hand() -> None:
    # means 1 and 5 apart along the first axis, variances 2 and 8 along it; the second is constant
    points = torch.tensor([[0.0, 7.0], [2.0, 7.0], [3.0, 7.0], [7.0, 7.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert fisher_ratio(points, labels) == pytest.approx((5 - 1) ** 2 / (2 + 8))
    assert fisher_ratio(points, 1 - labels) == pytest.approx(1.6)
    turned = points @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    assert fisher_ratio(3 * turned, labels) == pytest.approx(1.6)
    assert fisher_ratio(torch.ones(4, 2), labels) == 0
    assert fisher_ratio(labels[:, None].float(), labels) == math.inf
    assert math.isnan(fisher_ratio(torch.randn(4, 2), torch.tensor([0, 0, 0, 1])))


def test_fisher_ratio_of_no_difference_is_what_the_fit_alone_brings() -> None:
    width, count = 400, 100
    found = [fisher_ratio(*clouds(count, width, 0.0, seed)) for seed in range(10)]
    assert sum(found) / 10 == pytest.approx((1 / 50 + 1 / 50) * width / 2, rel=0.2)


# --- probes ---


def test_no_group_is_on_both_sides_of_a_fold_and_each_prompt_is_tested_once() -> None:
    labels = torch.arange(60) % 2
    groups = [f"template {i // 3}" for i in range(60)]
    parts = folds(labels, groups, seed=1)
    assert len(parts) == 5
    for train, test in parts:
        assert not {groups[i] for i in train} & {groups[i] for i in test}
        assert {labels[i].item() for i in train} == {0, 1}
    assert sorted(itertools.chain(*(test.tolist() for _, test in parts))) == list(range(60))
    again = folds(labels, groups, seed=1)
    assert all((a[1] == b[1]).all() for a, b in zip(parts, again, strict=True))
    other = folds(labels, groups, seed=2)
    assert any(a[1].tolist() != b[1].tolist() for a, b in zip(parts, other, strict=True))


@pytest.mark.parametrize(
    ("labels", "groups", "count"),
    [
        ([0, 0, 0, 1, 1, 1], ["a", "b", "c", "d", "e", "f"], 3),
        ([0, 0, 0, 1, 1, 1], ["a", "b", "c", "d", "d", "d"], 0),  # one toxic template
        ([0, 0, 0, 0], ["a", "b", "c", "d"], 0),
        ([], [], 0),
    ],
)
def test_fewer_folds_where_there_are_fewer_groups(
    labels: list[int], groups: list[str], count: int
) -> None:
    assert len(folds(torch.tensor(labels, dtype=torch.long), groups, 0)) == count


def test_probe_auroc_is_that_of_plain_scikit_learn() -> None:
    points, labels = clouds(90, 6, 1.2)
    labels[::6] = 1  # uneven classes, which weigh the same all the same
    groups = [f"template {i // 2}" for i in range(90)]
    scores = np.zeros(90)
    for train, test in folds(labels, groups, 4):
        scaler = StandardScaler().fit(points[train].double().numpy())
        model = LogisticRegression(
            C=separability.INVERSE_PENALTY, class_weight="balanced", max_iter=1000
        )
        model.fit(scaler.transform(points[train].double().numpy()), labels[train].numpy())
        scores[test] = model.decision_function(scaler.transform(points[test].double().numpy()))
    found = probe_auroc(points, labels, groups, 4)
    assert found.estimate == pytest.approx(roc_auc_score(labels.numpy(), scores))
    assert found.low < found.estimate < found.high


def test_transfer_of_hand_made_features() -> None:
    train, labels = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
    test, others = torch.tensor([[0.0], [5.0], [3.0], [9.0]]), torch.tensor([0, 0, 1, 1])
    # of four pairs (toxic, safe), only 3 against 5 is the wrong way round
    assert transfer_auroc(train, labels, test, others, seed=0).estimate == 0.75
    scores = linear_probe(train, labels)(torch.tensor([[0.0], [1.0], [-1.0]]))
    assert scores[0] == pytest.approx(0, abs=1e-6)
    assert scores[1] == pytest.approx(-scores[2])


@pytest.mark.parametrize("broken", ["nan", "one class", "empty"])
def test_what_is_undefined_is_nan(broken: str) -> None:
    points, labels = clouds(20, 3, 1.0)
    if broken == "nan":
        points[3, 1] = math.nan
    elif broken == "one class":
        labels = torch.zeros_like(labels)
    else:
        points, labels = points[:0], labels[:0]
    groups = alone(len(labels))
    found = probe_auroc(points, labels, groups, 0)
    assert math.isnan(found.estimate)
    assert (found.low, found.high) == (0, 1)
    good = clouds(20, 3, 1.0)
    assert math.isnan(transfer_auroc(points, labels, *good, seed=0).estimate)
    assert math.isnan(transfer_auroc(*good, points, labels, seed=0).estimate)
    (scores,) = separability.layerwise(points[None], labels, groups, seed=0)
    assert math.isnan(scores.silhouette)
    assert math.isnan(scores.fisher)


# --- scaling ---


def distances(points: Tensor) -> Tensor:
    return torch.cdist(
        points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )


def test_classical_mds_is_the_eigendecomposition_of_double_centred_squared_distances() -> None:
    points, _ = clouds(10, 6, 2.0)
    centring = np.eye(10) - np.ones((10, 10)) / 10
    values, vectors = np.linalg.eigh(-centring @ distances(points).numpy() ** 2 @ centring / 2)
    expected = vectors[:, [-1, -2, -3]] * np.sqrt(values[[-1, -2, -3]])
    found = classical_mds(points, 3).numpy()
    for axis in range(3):
        column, other = found[:, axis], expected[:, axis]
        assert min(abs(column - other).max(), abs(column + other).max()) < 1e-8
        assert column[abs(column).argmax()] > 0

    assert classical_mds(torch.empty(0, 4)).shape == (0, 2)
    assert classical_mds(torch.ones(1, 4)).tolist() == [[0, 0]]
    two = classical_mds(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    torch.testing.assert_close(distances(two)[0, 1].item(), 5.0)
    assert two[:, 1].abs().max() < 1e-6


# --- features ---


def encode(chat: ChatFormat, pooling: Pooling, count: int = 9) -> list[PromptRow]:
    rows = [example(i, Kind.toxic) for i in range(count)]
    return prompt_rows(chat, rows, 1, 10_000, pooling=pooling)


POOL: dict[Pooling, Callable[[Tensor, PromptRow], Tensor]] = {
    Pooling.last: lambda states, row: states[-1],
    Pooling.mean: lambda states, row: states[1:].mean(0),
}


@pytest.mark.parametrize("pooling", list(Pooling))
def test_features_are_the_hidden_states_of_each_prompt_alone(
    policy: Policy, chat: ChatFormat, pooling: Pooling
) -> None:
    rows = encode(chat, pooling)
    assert len({len(row.ids) for row in rows}) > 3  # so that most are padded
    found = separability.features(policy, rows, batch_tokens=400)
    assert found.shape == (2, 9, 32)
    assert separability.features(policy, []).shape == (2, 0, 32)
    norm = policy.model.model.norm
    for place, row in enumerate(rows):
        with torch.no_grad():
            out = policy.model(torch.tensor([row.ids]), output_hidden_states=True)
        first, last = POOL[pooling](out.hidden_states[1][0], row), found[1, place]
        torch.testing.assert_close(found[0, place], first, rtol=1e-4, atol=1e-6)
        if pooling is not Pooling.mean:  # the norm that transformers applies last is not linear
            expected = POOL[pooling](out.hidden_states[2][0], row)
            torch.testing.assert_close(norm(last), expected, rtol=1e-4, atol=1e-5)


# --- all layers ---


def test_the_planted_layer_stands_out() -> None:
    flat = [clouds(60, 8, 0.0, seed)[0] for seed in range(3)]
    planted, labels = clouds(60, 8, 6.0, seed=9)
    points = torch.stack([flat[0], flat[1], planted, flat[2]])
    scores = separability.layerwise(points, labels, alone(60), seed=0)
    assert [score.layer for score in scores] == [1, 2, 3, 4]
    for measure in ("kmeans", "probe", "silhouette", "fisher"):
        assert max(scores, key=lambda score: getattr(score, measure)).layer == 3
    assert scores[2].kmeans > 0.95
    assert scores[2].probe > 0.95
    assert scores == separability.layerwise(points, labels, alone(60), seed=0)


def test_groups_are_shared_across_classes_and_a_row_without_one_is_its_own() -> None:
    rows = [example(0, Kind.toxic, "g"), example(0, Kind.seemingly_toxic, "g")]
    rows += [example(1, Kind.toxic), dataclasses.replace(example(1, Kind.toxic), source="other")]
    first, second, third, fourth = separability.group_names(rows)
    assert first == second
    assert len({first, third, fourth}) == 3


def test_analyse_is_json_and_names_its_prompts(policy: Policy, chat: ChatFormat) -> None:
    safe = [example(i, Kind.seemingly_toxic, f"g{i}") for i in range(8)]
    unsafe = [example(i, Kind.toxic, f"g{i}") for i in range(6)]
    found = separability.analyse(policy, chat, safe, unsafe, seed=0)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["majority"] == pytest.approx(8 / 14)
    assert found["ids"] == [row.id for row in [*safe, *unsafe]]
    assert found["labels"] == [0] * 8 + [1] * 6
    assert [layer["layer"] for layer in found["layers"]] == [1, 2]
    assert all(0.5 <= layer["kmeans"] <= 1 for layer in found["layers"])
    assert all(
        layer["probe_low"] <= layer["probe"] <= layer["probe_high"] for layer in found["layers"]
    )
    points = separability.features(
        policy, prompt_rows(chat, safe, 0, 10_000) + prompt_rows(chat, unsafe, 1, 10_000)
    )
    assert set(found["mds"]) == {"1", "2"}
    for layer in (1, 2):
        expected = classical_mds(points[layer - 1])
        shown = torch.tensor(found["mds"][str(layer)], dtype=torch.float64)
        torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-8)


def test_analyse_of_one_class_says_null(policy: Policy, chat: ChatFormat) -> None:
    safe = [example(i, Kind.seemingly_toxic) for i in range(4)]
    found = separability.analyse(policy, chat, safe, [], seed=0)
    assert found["majority"] == 1
    assert {layer["probe"] for layer in found["layers"]} == {None}
    assert separability.analyse(policy, chat, [], [], seed=0)["majority"] is None
