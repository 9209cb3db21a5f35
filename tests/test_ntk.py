"""The kernel against explicit Jacobians by autograd, in float64, on models of three families."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

from dcr import builtin
from dcr.analyses import ntk
from dcr.analyses.ntk import Settings, empirical, exact
from dcr.core.config import ConfigError
from dcr.core.models import Policy
from tests.shapes import FAMILIES, SHAPE, VOCABULARY, adapted, made, unevenly_set

SUBSETS = [("all", True), ("all", False), ("tail:1", True), ("tail:2", False), ("trunk:2", True)]
PROMPTS = [[5, 9, 5, 30, 2], [7, 7], [3, 12, 9, 21, 5, 8, 39, 12], [11, 5, 2, 4], [9, 30, 2]]


def own_parameters(model: Any, params: str, head: bool) -> list[nn.Parameter]:
    """The subset written out: blocks by attribute, no look at how the package finds them."""
    gpt = hasattr(model, "transformer")
    blocks = model.transformer.h if gpt else model.model.layers
    norm = model.transformer.ln_f if gpt else model.model.norm
    word, _, count = params.partition(":")
    roots = {
        "tail": [*blocks[len(blocks) - int(count or 0) :], norm, model.lm_head],
        "trunk": blocks[: int(count or 0)],
        "all": [model],
    }[word]
    chosen = {id(p): p for root in roots for p in root.parameters()}
    if not head:
        chosen.pop(id(model.lm_head.weight), None)
    return list(chosen.values())


def jacobian_blocks(
    model: Any, sequences: Sequence[Sequence[int]], tokens: Tensor, params: list[nn.Parameter]
) -> Tensor:
    """K by whole gradients, one prompt and one logit after another, nothing padded."""
    grams = jacobian_grams(model, sequences, tokens)
    return torch.stack([grams[p] for p in params]).sum(0)


def jacobian_grams(
    model: Any, sequences: Sequence[Sequence[int]], tokens: Tensor
) -> dict[nn.Parameter, Tensor]:
    """The part of each parameter in K."""
    every = list(model.parameters())
    rows: list[list[Tensor]] = [[] for _ in every]
    for sequence, chosen in zip(sequences, tokens.tolist(), strict=True):
        logits = model(torch.tensor([sequence])).logits[0, -1]
        for token in chosen:
            grads = torch.autograd.grad(
                logits[token], every, retain_graph=True, materialize_grads=True
            )
            for kept, grad in zip(rows, grads, strict=True):
                kept.append(grad.flatten())
    jacobians = [torch.stack(kept) for kept in rows]
    return {
        p: (j @ j.T).view(*tokens.shape, *tokens.shape)
        for p, j in zip(every, jacobians, strict=True)
    }


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_neox"])
def test_the_kernel_is_that_of_explicit_jacobians(family: str) -> None:
    model = made(family)
    grams: dict[nn.Parameter, Tensor] = {}
    # gemma2: its eager attention gives NaN for wholly masked rows in float64
    size = 1 if family == "gemma2" else 2
    for params, head in SUBSETS:
        settings = Settings(top_k=3, params=params, head=head, batch_size=size)
        found = ntk.measure(model, PROMPTS, settings)
        grams = grams or jacobian_grams(model, PROMPTS, found.tokens)
        truth = torch.stack([grams[p] for p in own_parameters(model, params, head)]).sum(0)
        assert error(found.blocks, truth) < 1e-6, (params, head)
        norms = [[truth[i, :, j].norm() for j in range(5)] for i in range(5)]
        torch.testing.assert_close(found.norms, torch.tensor(norms), rtol=1e-6, atol=0)
        for prompt, likely, log_p in zip(
            PROMPTS, found.tokens, found.log_probabilities, strict=True
        ):
            own = model(torch.tensor([prompt])).logits[0, -1].log_softmax(0)
            assert likely.tolist() == own.argsort(descending=True)[:3].tolist()
            torch.testing.assert_close(log_p, own[likely])


@pytest.mark.parametrize("family", ["qwen2 tied", "gpt2", "gemma2"])
def test_padding_batches_and_budget_change_nothing(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # gemma2: eager attention gives NaN for wholly masked rows in float64
    near = 1e-4 if family == "gemma2" else 1e-6
    model = made(family, torch.float32 if family == "gemma2" else torch.float64)
    settings = Settings(top_k=3, params="all", batch_size=5)
    truth = ntk.measure(model, PROMPTS, settings).blocks
    for size in (1, 2):
        other = dataclasses.replace(settings, batch_size=size)
        assert error(ntk.measure(model, PROMPTS, other).blocks, truth) < near
    sweeps: list[int] = []
    collect = exact.collect

    def counted(model: Any, chosen: Any, *rest: Any) -> Any:
        sweeps.append(len(chosen))
        return collect(model, chosen, *rest)

    monkeypatch.setattr("dcr.analyses.ntk.empirical.collect", counted)
    small = dataclasses.replace(settings, budget_gib=1e-4)
    split = ntk.measure(model, PROMPTS, small).blocks
    assert len(sweeps) > 1
    assert error(split, truth) < near
    with pytest.raises(ConfigError, match=r"budget_gib=1e-06: .* alone needs"):
        ntk.measure(model, PROMPTS, dataclasses.replace(settings, budget_gib=1e-6))


def test_sums_of_a_half_precision_model_are_in_single_precision() -> None:
    settings = Settings(top_k=3, params="all")
    model = made("qwen2 tied", noise=0.05)
    truth = ntk.measure(model, PROMPTS, settings)
    found = ntk.measure(model.bfloat16(), PROMPTS, settings, tokens=truth.tokens)
    assert found.norms.dtype == found.log_probabilities.dtype == torch.float32
    assert error(found.norms.double(), truth.norms) < 0.03


def test_a_pad_token_that_stands_in_a_prompt_has_the_gradient_that_torch_gives_it() -> None:
    config = Qwen2Config(**{**SHAPE, "pad_token_id": 5}, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    found = ntk.measure(model, PROMPTS, Settings(top_k=3, params="all"))
    truth = jacobian_blocks(model, PROMPTS, found.tokens, own_parameters(model, "all", True))
    assert error(found.blocks, truth) < 1e-6


@pytest.mark.parametrize(
    ("family", "params", "epsilon"),
    # Qwen's norms compute in fp32 whatever the weights are in: rounding noise below 1e-4
    [("gpt2", "all", 1e-5), ("qwen2 untied", "tail:2", 2e-4), ("qwen2 tied", "tail:1", 2e-4)],
)
def test_finite_differences_agree_and_leave_the_weights_bit_for_bit(
    family: str, params: str, epsilon: float
) -> None:
    model = made(family, noise=0.03)
    left_alone = unevenly_set(model)
    settings = Settings(top_k=2, params=params, method="finite_difference", epsilon=epsilon)
    with torch.inference_mode():  # as a caller may be
        found = ntk.measure(model, PROMPTS[:3], settings)
    exact = ntk.measure(model, PROMPTS[:3], dataclasses.replace(settings, method="exact"))
    assert torch.equal(found.tokens, exact.tokens)
    assert error(found.blocks, exact.blocks) < 1e-4
    assert error(found.norms, exact.norms) < 1e-4
    left_alone()


def test_weights_are_restored_after_an_exception_and_half_precision_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = made("qwen2 tied", torch.float32)
    left_alone = unevenly_set(model)
    settings = Settings(top_k=2, method="finite_difference")
    passes: list[int] = []
    forward = empirical.last_logits

    def failing(*given: Any) -> Tensor:
        passes.append(1)
        if len(passes) == 4:
            raise KeyboardInterrupt
        return forward(*given)

    monkeypatch.setattr("dcr.analyses.ntk.empirical.last_logits", failing)
    with pytest.raises(KeyboardInterrupt):
        ntk.measure(model, PROMPTS, settings)
    left_alone()
    with pytest.raises(ConfigError, match="needs fp32 at least"):
        ntk.measure(model.bfloat16(), PROMPTS, settings)


@pytest.mark.parametrize("family", ["qwen2 tied", "gpt2"])
def test_with_an_adapter_the_kernel_is_that_of_the_merged_model(family: str) -> None:
    plain, changed = made(family), adapted(made(family)).train()
    choices = [Settings(top_k=3, params=params) for params in ("all", "tail:1", "trunk:2")]
    found = [ntk.measure(changed, PROMPTS, settings).blocks for settings in choices]
    merged = changed.merge_and_unload()
    for settings, blocks in zip(choices, found, strict=True):
        truth = ntk.measure(merged, PROMPTS, settings).blocks
        torch.testing.assert_close(blocks, truth, rtol=1e-6, atol=1e-6)
        base = ntk.measure(plain, PROMPTS, settings).blocks
        assert error(base, truth) > 1e-2  # the adapter did something


def test_an_adapters_own_kernel_is_that_of_explicit_jacobians() -> None:
    model = adapted(made("gpt2"))
    found = ntk.measure(model, PROMPTS, Settings(top_k=3, params="adapter"))
    model.eval().requires_grad_(True)
    own = [p for name, p in model.named_parameters() if "lora_" in name]
    truth = jacobian_blocks(model, PROMPTS, found.tokens, own)
    assert error(found.blocks, truth) < 1e-9
    near = Settings(top_k=3, params="adapter", method="finite_difference", epsilon=1e-5)
    assert error(ntk.measure(model, PROMPTS, near).blocks, truth) < 5e-4


def test_a_module_with_unknown_gradients_is_named() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Squared(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width).double())

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden * self.weight**2

    model = made("qwen2 untied")
    model.model.layers[2].mlp.up_proj = Scaled(16, 24, bias=False).double()
    with pytest.raises(ConfigError, match=r"layers\.2\.mlp\.up_proj \(Scaled\) are not known"):
        ntk.measure(model, PROMPTS, Settings())
    ntk.measure(model, PROMPTS, Settings(params="trunk:2"))  # not in this one
    # what the exact scheme does not know, the paper's still does
    ntk.measure(model, PROMPTS[:1], Settings(top_k=1, method="finite_difference"))
    model = made("qwen2 untied")
    model.model.layers[2].input_layernorm = Squared(16)
    with torch.no_grad():
        model.model.layers[2].input_layernorm.weight.mul_(1.5)
    with pytest.raises(ConfigError, match=r"layers\.2\.input_layernorm \(Squared\) is no"):
        ntk.measure(model, PROMPTS, Settings())
    model = made("qwen2 untied")
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    with pytest.raises(ConfigError, match=r"up_proj\.weight works in 2 modules"):
        ntk.measure(model, PROMPTS, Settings(params="all"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": "trunk:0"}, r"params=\[trunk:0\]: the model has blocks 1 to 3"),
        ({"params": "head"}, r"params=\[head\]: choose tail:N, trunk:ℓ, all or adapter"),
        ({"params": "adapter"}, r"params=adapter: the model has no LoRA adapter"),
        ({"top_k": 41}, r"top_k=41: choose 1 to 40"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ntk.measure(made("qwen2 tied"), PROMPTS, Settings(**changes))
    with pytest.raises(ConfigError, match="logits are not finite"):  # float64, padded rows
        ntk.measure(made("gemma2"), PROMPTS, Settings())


def test_the_outside_entrance_renders_the_chat_template_where_there_is_one(policy: Policy) -> None:
    words = ["Kill the process", "Bake a loaf"]
    norms = ntk.kernel(policy.model, policy.tokenizer, words, top_k=3, params="all")
    text = [f"<|im_start|>user\n{w}<|im_end|>\n<|im_start|>assistant\n" for w in words]
    rows = [policy.tokenizer.encode(t, add_special_tokens=False) for t in text]
    settings = Settings(top_k=3, params="all")
    torch.testing.assert_close(norms, ntk.measure(policy.model, rows, settings).norms)
    bare = ntk.kernel(policy.model, builtin.byte_tokenizer(None), words, top_k=3, params="all")
    rows = [policy.tokenizer.encode(w) for w in words]
    torch.testing.assert_close(bare, ntk.measure(policy.model, rows, settings).norms)
    assert norms.shape == (2, 2)


def test_normalisers() -> None:
    norms = torch.tensor([[4.0, 1.0], [1.0, 0.25]])
    assert ntk.normalised(norms, "observer").tolist() == [[1.0, 0.25], [4.0, 1.0]]
    assert ntk.normalised(norms, "symmetric").tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert ntk.normalised(norms, "none").tolist() == norms.tolist()
    measured = ntk.measure(made("llama biased"), PROMPTS, Settings(top_k=3)).norms
    assert ntk.normalised(measured, "symmetric").max() <= 1 + 1e-12


def test_means_by_kind_are_those_of_loops() -> None:
    matrix = torch.arange(25.0).view(5, 5)
    kinds = ["toxic", "normal", "toxic", "normal", "toxic"]
    for self_pairs in (False, True):
        means = ntk.mean_by_kind(matrix, kinds, self_pairs, seed=0)
        assert list(means) == ["toxic", "normal"]
        for seen in means:
            for trained in means[seen]:
                pairs = [
                    matrix[i, j].item()
                    for i in range(5)
                    for j in range(5)
                    if (kinds[i], kinds[j]) == (seen, trained) and (self_pairs or i != j)
                ]
                found = means[seen][trained]
                assert found.estimate == pytest.approx(np.mean(pairs))
                assert found.low <= found.estimate <= found.high
    alone = ntk.mean_by_kind(matrix[:1, :1], ["toxic"], seed=0)["toxic"]["toxic"]
    assert math.isnan(alone.estimate)


def test_the_bootstrap_draws_prompts_and_leaves_out_pairs_of_one() -> None:
    """Against a loop that draws prompts; a self-pair would show, as the diagonal is huge."""
    generator = np.random.default_rng(5)
    values = generator.random((8, 8))
    matrix = torch.tensor(values + 1e6 * np.eye(8))
    drawn = []
    for _ in range(4000):
        chosen = generator.integers(0, 8, 8)
        pairs = [values[i, j] for i in chosen for j in chosen if i != j]
        drawn.append(np.mean(pairs))
    low, high = np.quantile(drawn, [0.025, 0.975])
    found = ntk.mean_by_kind(matrix, ["toxic"] * 8, seed=1)["toxic"]["toxic"]
    width = high - low
    assert found.low == pytest.approx(low, abs=0.1 * width)
    assert found.high == pytest.approx(high, abs=0.1 * width)


def test_the_change_of_log_probabilities_is_that_of_one_step() -> None:
    """Eq. 2 and 3 over the whole vocabulary, against a real SGD step on the first prompt."""
    model = made("gpt2")
    tokens = torch.arange(VOCABULARY).repeat(3, 1)
    settings = Settings(params="all")
    found = ntk.measure(model, PROMPTS[:3], settings, tokens=tokens)
    target, rate = 7, 1e-7
    residual = found.log_probabilities[0].exp() - nn.functional.one_hot(
        torch.tensor(target), VOCABULARY
    )
    told = ntk.log_probability_change(
        found.blocks[:, :, 0], found.log_probabilities, residual, rate
    )
    loss = -model(torch.tensor(PROMPTS[:1])).logits[0, -1].log_softmax(0)[target]
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= rate * parameter.grad
    after = ntk.measure(model, PROMPTS[:3], Settings(params="tail:1"), tokens=tokens)
    change = after.log_probabilities - found.log_probabilities
    assert error(told, change) < 1e-2
