"""The residual stream against transformers' own hidden states, and pooling against loops."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dcr import activations, models
from dcr.config import LoraConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = torch.tensor([[3, 8, 5, 9, 1], [7, 7, 2, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.fixture
def model() -> Any:
    shape = AutoConfig.for_model(
        "llama",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=11,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(shape).eval()


@pytest.mark.parametrize("block", [1, 2])
def test_capture_is_the_hidden_state_of_its_number(model: Any, block: int) -> None:
    with activations.captured(model, block) as taken:
        whole = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True)
    assert len(taken) == 1
    assert torch.equal(taken[0], whole.hidden_states[block])


def test_last_block_is_captured_before_the_final_norm(model: Any) -> None:
    with activations.captured(model, 3) as taken:
        whole = model(input_ids=IDS, output_hidden_states=True)
    torch.testing.assert_close(model.model.norm(taken[0]), whole.hidden_states[3])
    assert not torch.allclose(taken[0], whole.hidden_states[3])


def test_captured_tensors_carry_gradients(model: Any) -> None:
    with activations.captured(model, 1) as taken:
        model(input_ids=IDS)
    taken[0].sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert model.model.layers[1].mlp.up_proj.weight.grad is None


def test_capture_reaches_through_an_adapter(model: Any) -> None:
    adapted = models.add_lora(model, LoraConfig(targets=["q_proj"]), seed=0)
    with activations.captured(adapted, 2) as taken:
        whole = adapted(input_ids=IDS, output_hidden_states=True)
    assert torch.equal(taken[0], whole.hidden_states[2])


def test_no_hook_outlives_an_exception(model: Any) -> None:
    def fail() -> None:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), activations.captured(model, 2):
        fail()
    assert all(not block._forward_hooks for block in models.decoder_blocks(model))


def test_pooling_is_a_mean_over_each_rows_span() -> None:
    chance = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, 3, generator=chance)
    spans = torch.tensor([[0, 6], [5, 6], [1, 4], [2, 3]])
    truth = torch.stack(
        [
            sum(hidden[i, t] for t in range(a, b)) / (b - a)
            for i, (a, b) in enumerate(spans.tolist())
        ]
    )
    torch.testing.assert_close(activations.pooled(hidden, spans), truth)


def test_positions_outside_the_span_do_not_matter_even_if_nan() -> None:
    hidden = torch.ones(1, 4, 2)
    hidden[0, [0, 3]] = float("nan")
    hidden.requires_grad_()
    pooled = activations.pooled(hidden, torch.tensor([[1, 3]]))
    assert torch.equal(pooled, torch.ones(1, 2))
    pooled.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[0, :, 0].tolist() == [0.0, 0.5, 0.5, 0.0]


def test_pooling_of_bf16_is_fp32() -> None:
    hidden = torch.full((1, 1000, 1), 1.0, dtype=torch.bfloat16)
    pooled = activations.pooled(hidden, torch.tensor([[0, 1000]]))
    assert pooled.dtype is torch.float32
    assert pooled.item() == 1.0  # a sum in bf16 would have stopped at 256
