"""A training pass without padding against the plain model on each row alone; its fused parts."""

import copy
from typing import Any

import pytest
import torch
from peft.tuners import lora
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from dcr.core.config import LoraConfig
from dcr.core.models import structure
from dcr.core.models.training import trunk
from dcr.fast import fusing, packing
from tests.shapes import FAMILIES, MIXED, SHAPE, made

LENGTHS = (3, 9, 1, 9, 6)
# Rows that begin with the same eight tokens, two of which have no more: seven are shared.
ALIKE, PREFIX = (11, 30, 8, 17, 8), 7
OTHERS: dict[str, Any] = {
    "mistral, a wide window": MistralConfig(**SHAPE, sliding_window=64),
    "gemma3, wide windows": Gemma3TextConfig(
        **SHAPE, head_dim=8, sliding_window=64, layer_types=MIXED, initializer_range=0.2
    ),
    "mistral, a narrow window": MistralConfig(**SHAPE, sliding_window=4),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4),
}
# Softcaps, dropout in attention, a window that rows are longer than.
PADDED = {"gemma2", "gemma3", "gpt2", "gpt2 untied", "mistral, a narrow window"}
FP32 = {"gemma2", "gemma3", "gemma3, wide windows", "mixtral"}  # the others in fp64


def batch(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(5)
    ids = torch.randint(2, SHAPE["vocab_size"], (len(lengths), max(lengths)), generator=chance)
    if lengths is ALIKE:
        ids[:, : PREFIX + 1] = ids[0, : PREFIX + 1]
    return ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def states(backbone: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, packing.Layout]:
    layout = packing.laid_out(backbone, ids, mask, packing.packs(backbone, ids.device))
    return layout.padded(packing.run(backbone, layout)), layout


@pytest.mark.parametrize("lengths", [LENGTHS, ALIKE], ids=["unlike", "alike"])
@pytest.mark.parametrize("block", [None, 2], ids=["whole", "trunk"])
@pytest.mark.parametrize(
    ("family", "adapted"),
    [
        (family, adapted)
        for family in [*FAMILIES, *OTHERS]
        for adapted in (True, False)
        if not (adapted and family == "mixtral")  # its experts are no layers
    ],
)
def test_states_and_gradients_are_those_of_each_row_alone(
    family: str,
    adapted: bool,
    block: int | None,
    lengths: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "QUERIES", 4)  # so that a row takes several products
    monkeypatch.setattr(packing, "SCORES", 80)  # and the rows several groups
    dtype = torch.float32 if family in FP32 else torch.float64
    if family in OTHERS:
        torch.manual_seed(1)
        model: Any = AutoModelForCausalLM.from_config(OTHERS[family]).to(dtype)
    else:
        model = made(family, dtype)
    if adapted:
        model = structure.add_lora(model, LoraConfig(dropout=0.0, targets=["all-linear"]), 0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1)
    plain = copy.deepcopy(model)
    ids, mask = batch(lengths)
    weight = torch.randn(*ids.shape, 16, dtype=dtype)

    def cut(whole: Any) -> Any:
        return trunk(whole, block) if block else structure.backbone(whole)

    found, layout = states(cut(model), ids, mask)
    assert (layout.places is not None) == (family not in PADDED)
    assert layout.prefix == (PREFIX if lengths is ALIKE and family not in PADDED else 0)
    (found * weight)[mask].sum().backward()
    for row, length in enumerate(lengths):
        alone = cut(plain)(input_ids=ids[row : row + 1, :length], use_cache=False).last_hidden_state
        torch.testing.assert_close(
            found[row, :length], alone[0], rtol=1e-5, atol=1e-5, check_dtype=False
        )
        (alone[0] * weight[row, :length]).sum().backward()
    near = 1e-4 if family in FP32 else 1e-5
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert len(gradients) > 10
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=2e-4, atol=near)
    assert not any("forward" in vars(part) for part in model.modules()), "nothing is left behind"
    assert structure.unwrapped(model).config._attn_implementation == "sdpa" or family == "gemma2"


def test_a_deep_model_in_bf16_is_packed_though_its_kernels_round_apart() -> None:
    """By three hundredths, as Gemma 3 does: no more may tell a wrong packing from a right one."""
    deep = SHAPE | {"num_hidden_layers": 24, "initializer_range": 0.2, "head_dim": 8}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(Gemma3TextConfig(**deep)).to(torch.bfloat16)
    backbone = structure.backbone(model.eval())
    assert packing.packs(backbone, torch.device("cpu")) is packing.Packing.prefix


@pytest.mark.parametrize("lengths", [LENGTHS, ALIKE], ids=["unlike", "alike"])
def test_no_token_is_computed_twice_nor_any_padding(lengths: tuple[int, ...]) -> None:
    model, seen = made("qwen2 tied"), []
    backbone = structure.backbone(model)
    structure.decoder_blocks(model)[0].get_submodule("mlp").register_forward_pre_hook(
        lambda _, given: seen.append(given[0].shape)
    )
    packs = packing.packs(backbone, torch.device("cpu"))
    seen.clear()
    packing.run(backbone, packing.laid_out(backbone, *batch(lengths), packs))
    twice = (len(ALIKE) - 1) * PREFIX if lengths is ALIKE else 0
    assert seen == [(1, sum(lengths) - twice, 16)]


def test_a_prefix_is_shared_where_it_is_right_and_worth_it(monkeypatch: Any) -> None:
    ids, mask = batch(ALIKE)
    adapted: Any = structure.add_lora(
        made("qwen2 tied"), LoraConfig(dropout=0.1, targets=["all-linear"]), 0
    )
    backbone, jittered = structure.backbone(adapted), OTHERS["mixtral"]
    packs = packing.packs(backbone.train(), ids.device)
    assert packs is packing.Packing.prefix

    def prefix(of: Any, ids: Tensor, mask: Tensor) -> int:
        return packing.laid_out(of, ids, mask, packs).prefix

    assert prefix(backbone, ids, mask) == 0, "rows would share what dropout draws"
    assert prefix(backbone.eval(), ids, mask) == PREFIX
    assert prefix(backbone, ids[:1], mask[:1]) == 0
    assert prefix(backbone, ids[:, 5:], mask[:, 5:]) == 0, "two tokens are few"
    monkeypatch.setattr(jittered, "router_jitter_noise", 0.1)
    noisy = structure.backbone(AutoModelForCausalLM.from_config(jittered))
    assert prefix(noisy.train(), ids, mask) == 0
    assert prefix(noisy.eval(), ids, mask) == PREFIX
    own = packing._with_prefix

    def blind(group: packing.Group, kept: int, given: Tensor) -> Tensor:
        seen = own(group, kept, given)
        seen[:, : group.before] = 0
        return seen

    monkeypatch.setattr(packing, "_with_prefix", blind)
    packs = packing.packs(backbone, ids.device)
    assert packs is packing.Packing.rows, "without a prefix nothing is wrong with it"
    assert prefix(backbone, ids, mask) == 0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_checkpointed_blocks_stay_padded() -> None:
    model = made("qwen2 tied")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    packs = packing.packs(structure.backbone(model.train()), torch.device("cpu"))
    assert packs is packing.Packing.padded
    assert structure.decoder_blocks(model)[0].training


@pytest.mark.parametrize("chance", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_layer_is_peft_s(dtype: torch.dtype, chance: float, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5).requires_grad_(False)
    settings = lora.LoraConfig(r=3, lora_alpha=12, lora_dropout=chance)
    layer: Any = lora.Linear(base, "default", config=settings, r=3, lora_alpha=12)
    nn.init.normal_(layer.lora_B["default"].weight)
    kept = fusing.dropout_bits(8 * 6, chance) if chance else None
    monkeypatch.setattr(fusing, "dropout_bits", lambda *_: kept)
    x = torch.randn(2, 4, 6).to(dtype).float().requires_grad_()
    given, found = torch.randn(2, 4, 5), []
    for ours in (True, False):
        if not ours and kept is not None:
            mask = fusing.dropped_out(torch.ones(2, 4, 6), kept) / (1 - chance)
            layer.lora_dropout["default"].forward = lambda value, mask=mask: value * mask
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = fusing.lora_linear(layer, x) if ours else layer(x)
        out.backward(given.to(out.dtype))
        factors = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        found.append([out, *(part.grad for part in (x, *factors))])
        for part in (x, *factors):
            part.grad = None
    for own, theirs in zip(*found, strict=True):
        near = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(own.float(), theirs.float(), rtol=near, atol=near)


def test_dropout_keeps_what_it_should_and_follows_from_the_seed() -> None:
    torch.manual_seed(3)
    ones, drawn = torch.ones(999, 333), fusing.dropout_bits(999 * 333, 0.05)
    assert len(drawn) == -(-999 * 333 // 8), "a bit for each"
    left = fusing.dropped_out(ones, drawn)
    assert set(left.unique().tolist()) == {0, 1}
    deviation = (0.05 * 0.95 / left.numel()) ** 0.5
    assert abs((left == 0).double().mean() - 0.05) < 4 * deviation
    for step in (1, 8):  # values beside each other, and at one place of neighbouring bytes
        neighbours = ((left[:, step:] == 0) & (left[:, :-step] == 0)).double().mean()
        assert neighbours == pytest.approx(0.05**2, rel=0.1)
    assert torch.equal(left.bfloat16(), fusing.dropped_out(ones.bfloat16(), drawn))
    torch.manual_seed(3)
    assert torch.equal(drawn, fusing.dropout_bits(999 * 333, 0.05))


@pytest.mark.parametrize("adapted", [True, False], ids=["LoRA", "all weights"])
def test_a_swiglu_is_autograd_s_to_the_bit(adapted: bool) -> None:
    torch.manual_seed(0)
    mlp: Any = LlamaMLP(LlamaConfig(**SHAPE)).bfloat16()
    if adapted:
        mlp.gate_proj = lora.Linear(mlp.gate_proj, "default", config=lora.LoraConfig(), r=3)
    x, found = torch.randn(3, 4, 16).bfloat16().requires_grad_(), []
    for module in (lambda value: fusing.swiglu(mlp, value), mlp):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.append(t) or t, _same):
            out = module(x)
        out.sum().backward()
        wide = {t.data_ptr() for t in kept if t.shape[-1] == SHAPE["intermediate_size"]}
        found.append((out, x.grad, len(wide), *(p.grad for p in mlp.parameters())))
        x.grad = None
        mlp.zero_grad()
    for own, theirs in zip(found[0][:2], found[1][:2], strict=True):
        assert torch.equal(own, theirs)
    assert found[0][2] == found[1][2] - 1, "the gate's own function is not kept"
    for own, theirs in zip(found[0][3:], found[1][3:], strict=True):
        assert (own is theirs is None) or torch.equal(own, theirs)


def test_what_is_no_swiglu_stays_as_it_is() -> None:
    class ScaledMLP(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(0.5 * x)

    for mlp in (ScaledMLP(LlamaConfig(**SHAPE)), LlamaMLP(LlamaConfig(**SHAPE, hidden_act="gelu"))):
        with fusing.fused(mlp):
            assert "forward" not in vars(mlp)


def _same(kept: Tensor) -> Tensor:
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_has_the_gradient_autograd_finds(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(16).to(dtype)
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 4, 16).to(dtype).requires_grad_()
    given, found = torch.randn(3, 4, 16).to(dtype), []
    for module in (lambda value: fusing.rms_norm(norm, value), norm):
        out = module(x)
        out.backward(given)
        found.append((out, x.grad, norm.weight.grad))
        x.grad = norm.weight.grad = None
    assert torch.equal(found[0][0], found[1][0])
    for own, theirs in zip(found[0][1:], found[1][1:], strict=True):
        near = 1e-5 if dtype == torch.float32 else 0.03
        torch.testing.assert_close(own, theirs, rtol=near, atol=near)


@pytest.mark.parametrize("lengths", [LENGTHS, ALIKE], ids=["unlike", "alike"])
def test_long_and_short_rows_on_the_llama_shape_in_bf16(lengths: tuple[int, ...]) -> None:
    """Attention in autocast, as in training: against transformers' own, to bf16's last bits."""
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).bfloat16()
    ids, mask = batch(lengths)
    with torch.autocast("cpu", torch.bfloat16):
        found, layout = states(structure.backbone(model), ids, mask)
        plain = structure.backbone(model)(input_ids=ids, attention_mask=mask).last_hidden_state
    assert layout.prefix == (PREFIX if lengths is ALIKE else 0)
    torch.testing.assert_close(found[mask], plain[mask], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_laid_out_once_multiply_as_before(dtype: torch.dtype, monkeypatch: Any) -> None:
    """On a tied head, layers with biases, and beside LoRA weights, which stay as they are."""
    shape: dict[str, Any] = SHAPE | {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 100}
    config = LlamaConfig(**shape, attention_bias=True, tie_word_embeddings=True)
    model: Any = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    adapted = structure.add_lora(model, LoraConfig(targets=["all-linear"]), seed=0).eval()
    ids = torch.arange(12).view(3, 4)
    with torch.inference_mode():
        expected = adapted(input_ids=ids).logits
        with fusing.prepacked(adapted):
            layers: list[Any] = [m for m in adapted.modules() if "forward" in vars(m)]
            found = adapted(input_ids=ids).logits
        monkeypatch.setattr(fusing, "COPIES", sum(layer.weight.nbytes for layer in layers) - 1)
        with fusing.prepacked(adapted):
            assert not any("forward" in vars(m) for m in adapted.modules())
    # two of seven in a block have fewer channels than are worth it; bf16 needs a CPU with its units
    packed = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert [type(layer) for layer in layers] == [nn.Linear] * (packed * (3 * 5 + 1))
    assert not any("forward" in vars(m) for m in adapted.modules())
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
