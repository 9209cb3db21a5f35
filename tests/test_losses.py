"""Circle loss against loops, golden values and a library; token NLL against full logits."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import CircleLoss
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from dcr.core import losses
from dcr.core.losses import circle_floor, circle_loss, pair_statistics
from dcr.fast.frozen import token_nll

GOLDEN_FEATURES = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [-1.0, 2.0]])
GOLDEN_LABELS = torch.tensor([0, 0, 1, 1])
GOLDEN_ROWS = {
    "paper": [1.118333, 3.442291, 3.411413, 1.122556],
    "sun2020": [1.093750, 7.374870, 6.180736, 0.806868],
}
GOLDEN_MEAN = {"paper": 2.273648, "sun2020": 3.864055}
BOTH_WEIGHTS = pytest.mark.parametrize("weights", ["paper", "sun2020"])


def random_batch(
    size: int = 9, width: int = 5, classes: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, width, generator=generator, dtype=torch.float64) + 0.5
    return features, torch.randint(classes, (size,), generator=generator)


def cosine(a: list[float], b: list[float]) -> float:
    inner = sum(x * y for x, y in zip(a, b, strict=True))
    return inner / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def anchor_losses(
    rows: list[list[float]], classes: list[int], margin: float, scale: float, weights: str
) -> list[float]:
    """Eq. 5 term by term; 0 for an anchor without a positive or without a negative."""
    losses = []
    for i, row in enumerate(rows):
        positives, negatives = [], []
        for j, other in enumerate(rows):
            s = cosine(row, other)
            if j != i and classes[i] == classes[j]:
                optimum = 1 - margin if weights == "paper" else 1 + margin
                positives.append(math.exp(-scale * max(optimum - s, 0) * (s - (1 - margin))))
            elif j != i:
                optimum = margin if weights == "paper" else -margin
                negatives.append(math.exp(scale * max(s - optimum, 0) * (s - margin)))
        losses.append(math.log(1 + sum(positives) * sum(negatives)))
    return losses


@BOTH_WEIGHTS
def test_golden_values(weights: str) -> None:
    loss = circle_loss(GOLDEN_FEATURES, GOLDEN_LABELS, 0.25, 16.0, weights=weights)
    assert_close(loss, torch.tensor(GOLDEN_MEAN[weights]), atol=2e-6, rtol=0)
    rows = anchor_losses(
        GOLDEN_FEATURES.tolist(), GOLDEN_LABELS.tolist(), margin=0.25, scale=16, weights=weights
    )
    # the loops that the other tests trust give the same rows
    assert rows == pytest.approx(GOLDEN_ROWS[weights], abs=2e-6)


@BOTH_WEIGHTS
@pytest.mark.parametrize(("classes", "margin", "scale"), [(2, 0.25, 16.0), (4, 0.4, 5.0)])
def test_equals_loops_over_pairs(weights: str, classes: int, margin: float, scale: float) -> None:
    for seed in range(5):
        features, labels = random_batch(classes=classes, seed=seed)
        labels[0] = 99  # an anchor without positives
        loss = circle_loss(features, labels, margin, scale, weights=weights)
        rows = anchor_losses(features.tolist(), labels.tolist(), margin, scale, weights)
        assert loss.item() == pytest.approx(sum(rows) / len(rows), rel=1e-10)


@pytest.mark.parametrize("classes", [2, 4])
def test_sun2020_equals_pytorch_metric_learning(classes: int) -> None:
    features, labels = random_batch(size=16, classes=classes)
    features = features.float()
    ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    # the library averages over its non-zero losses
    valid = sum(0 < (labels == y).sum() - 1 < len(labels) - 1 for y in labels)
    loss = circle_loss(ours, labels, 0.4, 80.0, weights="sun2020") * len(labels) / valid
    expected = CircleLoss(m=0.4, gamma=80)(theirs, labels)
    loss.backward()
    expected.backward()
    assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def gradient(features: Tensor, labels: Tensor, **switches: Any) -> Tensor:
    leaf = features.clone().requires_grad_()
    loss = circle_loss(leaf, labels, 0.25, 16.0, **switches)
    return torch.autograd.grad(loss, leaf)[0]


def test_the_gradient_is_that_of_fixed_weights() -> None:
    """Under `paper` the whole derivative is exactly twice as large: half of finite differences."""
    features, labels = random_batch(size=6, width=3)
    half, step = torch.zeros_like(features), 1e-6
    for place in range(features.numel()):
        there, back = features.clone(), features.clone()
        there.view(-1)[place] += step
        back.view(-1)[place] -= step
        ends = [circle_loss(x, labels, 0.25, 16.0) for x in (there, back)]
        half.view(-1)[place] = (ends[0] - ends[1]) / (4 * step)
    assert half.abs().max() > 0.01
    assert_close(gradient(features, labels), half, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("sizes", "floor"),
    [
        ((16, 16), math.log(1 + 15 * 16)),  # 5.485
        # the third is alone in its class, so never an anchor
        ((5, 2, 1), (5 * math.log(1 + 4 * 3) + 2 * math.log(1 + 1 * 6)) / 8),
    ],
)
def test_the_floor_is_met_where_every_pair_meets_its_margin(
    sizes: tuple[int, ...], floor: float
) -> None:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    lengths = torch.arange(1, len(labels) + 1, dtype=torch.float32)
    features = F.one_hot(labels, 4) * lengths[:, None]  # orthogonal, of varying length
    assert circle_floor(labels).item() == pytest.approx(floor, rel=1e-6)
    assert circle_loss(features, labels, 0.25, 16.0).item() == pytest.approx(floor, rel=1e-6)
    assert_close(gradient(features, labels), torch.zeros_like(features))
    for seed in range(20):
        features, labels = random_batch(seed=seed)
        assert circle_loss(features, labels, 0.25, 16.0) >= circle_floor(labels) - 1e-6


@BOTH_WEIGHTS
def test_invariant_to_scaling_and_permutation(weights: str) -> None:
    features, labels = random_batch()
    features = features.float()
    plain = circle_loss(features, labels, 0.25, 16.0, weights=weights)
    # the ends would overflow or vanish if squared in fp32
    factors = torch.tensor([1e-25, 1e-3, 0.5, 1.0, 2.0, 7.0, 1e3, 1e25, 3.0])
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    changed = (features * factors[:, None])[order], labels[order]
    loss = circle_loss(*changed, 0.25, 16.0, weights=weights)
    assert_close(loss, plain, rtol=1e-5, atol=1e-5)


@BOTH_WEIGHTS
@pytest.mark.parametrize(
    "labels",
    [[0, 0, 0, 0], [0, 1, 2, 3], [5], []],
    ids=["one class", "no pairs", "one row", "none"],
)
def test_no_pairs_to_compare_gives_zero_and_a_zero_gradient(
    weights: str, labels: list[int]
) -> None:
    features = torch.randn(len(labels), 3, requires_grad=True)
    classes = torch.tensor(labels, dtype=torch.int64)
    loss = circle_loss(features, classes, 0.25, 16.0, weights=weights)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, features)[0].any()
    assert circle_floor(classes).item() == 0


@BOTH_WEIGHTS
def test_rows_of_norm_zero_have_cosine_zero_and_a_modest_gradient(weights: str) -> None:
    features, labels = random_batch()
    features[2] = 0
    replaced = torch.cat([features, torch.zeros(len(features), 1)], dim=1)
    replaced[2, -1] = 1  # orthogonal to every other row
    loss = circle_loss(features, labels, 0.25, 16.0, weights=weights)
    assert_close(loss, circle_loss(replaced, labels, 0.25, 16.0, weights=weights))
    slopes = gradient(features, labels, weights=weights)
    assert slopes.abs().max() < 1e3


def test_nan_features_are_not_hidden() -> None:
    features = torch.full((4, 2), math.nan)
    assert circle_loss(features, GOLDEN_LABELS, 0.25, 16.0).isnan()
    assert circle_loss(features, torch.zeros(4, dtype=torch.int64), 0.25, 16.0).isnan()


def test_a_large_scale_stays_finite() -> None:
    features, labels = random_batch()
    leaf = features.float().requires_grad_()
    loss = circle_loss(leaf, labels, 0.25, 1e6)
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_features_are_compared_in_fp32_under_autocast_as_well(dtype: torch.dtype) -> None:
    features, labels = random_batch()
    low = features.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = circle_loss(low, labels, 0.25, 16.0)
        pairs = pair_statistics(low, labels, 0.25)
    assert loss.dtype == torch.float32
    assert_close(loss, circle_loss(low.float(), labels, 0.25, 16.0), rtol=0, atol=0)
    wide = pair_statistics(low.float(), labels, 0.25)
    assert_close(pairs["within_cosine"], wide["within_cosine"], rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_pair_statistics_equal_loops(seed: int) -> None:
    features, labels = random_batch(size=12, classes=3, seed=seed)
    rows, classes = features.tolist(), labels.tolist()
    pairs = list(itertools.combinations(range(12), 2))
    within = [cosine(rows[i], rows[j]) for i, j in pairs if classes[i] == classes[j]]
    across = [cosine(rows[i], rows[j]) for i, j in pairs if classes[i] != classes[j]]
    found = pair_statistics(features.requires_grad_(), labels, 0.25)
    assert not any(value.requires_grad for sums in found.values() for value in sums)
    values = {name: (total.item(), int(count)) for name, (total, count) in found.items()}
    assert values["within_cosine"] == (pytest.approx(sum(within)), len(within))
    assert values["across_cosine"] == (pytest.approx(sum(across)), len(across))
    violating = sum(s < 0.75 for s in within) + sum(s > 0.25 for s in across)
    assert 0 < violating < len(pairs)
    assert values["violating_share"] == (violating, len(pairs))


TOKENS, WIDTH, VOCABULARY = 11, 6, 17
HEADS = pytest.mark.parametrize(
    "shape",
    [{}, {"softcap": 3.0}, {"logit_scale": 0.125}, {"softcap": 2.0, "logit_scale": 1.5}],
    ids=["plain", "softcap", "scale", "both"],
)


def random_head(
    dtype: torch.dtype = torch.float64, tokens: int = TOKENS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def nll_from_all_logits(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    logits = logit_scale * F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="none")


@HEADS
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 256])
@pytest.mark.parametrize("token_nll", [losses.token_nll, token_nll], ids=["plain", "fast"])
def test_equals_all_logits(
    shape: dict[str, float], with_bias: bool, trainable: bool, chunk: int, token_nll: Any
) -> None:
    given = random_head()
    (hidden, *ours), (states, *theirs) = ([x.clone() for x in given[:3]] for _ in range(2))
    for tensor in (hidden, states, *(ours + theirs if trainable else [])):
        tensor.requires_grad_()
    bias, other = (ours[1], theirs[1]) if with_bias else (None, None)
    total, per_token = token_nll(hidden, ours[0], given[3], bias=bias, chunk=chunk, **shape)
    expected = nll_from_all_logits(states, theirs[0], given[3], other, **shape)
    assert_close(per_token, expected.detach())
    assert_close(total, expected.sum())
    assert not per_token.requires_grad
    (total / 7).backward()
    (expected.sum() / 7).backward()
    for mine, other in zip((hidden, *ours), (states, *theirs), strict=True):
        assert_close(mine.grad, other.grad)


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(("states", "of_head"), [(FP32, FP32), (BF16, BF16), (FP32, BF16)])
@pytest.mark.parametrize("trainable", [False, True])
def test_low_precision_is_as_close_as_its_rounding(
    states: torch.dtype, of_head: torch.dtype, trainable: bool
) -> None:
    hidden, weight, bias, targets = random_head(of_head)
    ours = hidden.clone().to(states).requires_grad_()
    head = weight.clone().requires_grad_(trainable)
    total, per_token = token_nll(ours, head, targets, bias=bias, chunk=4)
    assert total.dtype == per_token.dtype == torch.float32
    exact = hidden.double().requires_grad_()
    expected = nll_from_all_logits(exact, weight.double(), targets, bias.double())
    tolerance = 1e-5 if of_head == FP32 else 0.05
    assert_close(per_token, expected.float().detach(), rtol=tolerance, atol=tolerance)
    total.backward()
    expected.sum().backward()
    assert ours.grad.dtype == states
    assert_close(ours.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("trainable", [False, True])
def test_autocast_multiplies_in_its_own_precision(trainable: bool) -> None:
    hidden, weight, _, targets = random_head(torch.float32)
    ours = hidden.clone().requires_grad_()
    head = weight.clone().requires_grad_(trainable)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, per_token = token_nll(ours, head, targets, chunk=4)
    low = token_nll(hidden.bfloat16(), weight.bfloat16(), targets, chunk=4)[1]
    assert_close(per_token, low, rtol=1e-6, atol=1e-6)
    assert (per_token - token_nll(hidden, weight, targets)[1]).abs().max() > 1e-3
    total.backward()
    assert {x.grad.dtype for x in (ours, head) if x.requires_grad} == {torch.float32}


@pytest.mark.parametrize("trainable", [False, True])
def test_logits_far_apart_give_exact_losses(trainable: bool) -> None:
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [1e4]], requires_grad=trainable)
    total, per_token = token_nll(hidden, weight, torch.tensor([0, 1]))
    assert per_token.tolist() == [1e4, 0.0]
    total.backward()
    assert hidden.grad.tolist() == [[1e4], [0.0]]


@pytest.mark.parametrize("trainable", [False, True])
def test_no_tokens_give_zero_and_a_zero_gradient(trainable: bool) -> None:
    hidden, weight, bias, targets = random_head(tokens=0)
    ours = hidden.requires_grad_()
    head = weight.clone().requires_grad_(trainable)
    total, per_token = token_nll(ours, head, targets, bias=bias)
    total.backward()
    assert total.item() == 0
    assert per_token.shape == (0,)
    assert ours.grad.shape == (0, WIDTH)
    assert not trainable or not head.grad.any()


class LargestResult(TorchFunctionMode):
    """The number of elements of the largest tensor that any call returned, and head products."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.products = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        self.products += func in (torch.mm, torch.matmul, Tensor.matmul, F.linear)
        return result


@pytest.mark.parametrize("trainable", [False, True])
def test_no_more_than_a_chunk_of_logits_exists(trainable: bool) -> None:
    hidden, weight, bias, targets = random_head(tokens=40)
    head = weight.clone().requires_grad_(trainable)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with LargestResult() as seen, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ours = hidden.requires_grad_()
        total, _ = token_nll(ours, head, targets, bias=bias, chunk=5)
        total.backward()
    largest_input = max(hidden.numel(), weight.numel())
    assert seen.elements <= max(5 * VOCABULARY, largest_input)
    assert max(kept) <= largest_input


def test_frozen_head_multiplies_twice_and_without_gradients_once() -> None:
    hidden, weight, _, targets = random_head()
    with LargestResult() as forward:
        token_nll(hidden.requires_grad_(), weight, targets, chunk=256)
    assert forward.products == 2
    for states, grad in ((hidden.detach(), True), (hidden, False)):
        with LargestResult() as once, torch.set_grad_enabled(grad):
            total, per_token = token_nll(states, weight, targets, chunk=256)
        assert once.products == 1
        assert not total.requires_grad
        assert_close(per_token, nll_from_all_logits(states, weight, targets).detach())


def test_the_gradient_can_be_taken_twice_and_the_second_derivative_is_refused() -> None:
    hidden, weight, _, targets = random_head()
    total, _ = token_nll(hidden.requires_grad_(), weight, targets)
    (first,) = torch.autograd.grad(total, hidden, retain_graph=True)
    (again,) = torch.autograd.grad(total * 3, hidden, retain_graph=True)
    assert_close(again, 3 * first)
    (first,) = torch.autograd.grad(total.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
