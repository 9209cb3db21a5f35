"""The stream against transformers' own hidden states, edits against a loop over the blocks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dcr import activations, decoding
from dcr.activations import Site
from dcr.core import learning
from dcr.core.config import ConfigError, LoraConfig
from dcr.core.models import structure
from dcr.steering import edits as editing
from tests.shapes import SHAPE, generated, made
from tests.tiny_run import failing

IDS = torch.tensor([[3, 8, 5, 9, 1], [7, 7, 2, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.mark.parametrize("block", [1, 2, 3])
def test_capture_is_the_hidden_state_of_its_number(model: Any, block: int) -> None:
    with learning.captured(model, block) as taken:
        whole = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True)
    (hidden,) = taken
    if block == 3:  # before the final norm
        assert not torch.allclose(hidden, whole.hidden_states[3])
        hidden = model.model.norm(hidden)
    assert torch.equal(hidden, whole.hidden_states[block])


def test_pooling_is_a_mean_over_each_rows_span_whatever_stands_outside() -> None:
    hidden = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    hidden[2, [0, 5]] = float("nan")
    hidden.requires_grad_()
    spans = [(0, 6), (5, 6), (1, 4), (2, 3)]
    means = [hidden[i, a:b].mean(0) for i, (a, b) in enumerate(spans)]
    pooled = learning.pooled(hidden, torch.tensor(spans))
    torch.testing.assert_close(pooled, torch.stack(means))
    (gradient,) = torch.autograd.grad(pooled.sum(), hidden)
    torch.testing.assert_close(gradient[2, :, 0], torch.tensor([0, 1, 1, 1, 0, 0]) / 3)


def test_pooling_of_bf16_is_fp32() -> None:
    hidden = torch.full((1, 1000, 1), 1.0, dtype=torch.bfloat16)
    pooled = learning.pooled(hidden, torch.tensor([[0, 1000]]))
    assert pooled.dtype is torch.float32
    assert pooled.item() == 1.0  # a sum in bf16 would have stopped at 256


# --- edits ---

WIDTH = SHAPE["hidden_size"]


@pytest.fixture
def model() -> Any:
    return made("llama biased", torch.float32)


# biases and RMSNorm; tied; LayerNorm; parallel blocks
@pytest.fixture(params=["llama biased", "qwen2 tied", "gpt2", "gpt_neox"])
def family(request: pytest.FixtureRequest) -> Any:
    return made(request.param, torch.float32)


def vector(seed: int, unit: bool = False) -> Tensor:
    found = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return found / found.norm() if unit else found


def by_hand(model: Any, ids: Tensor, edit: Callable[[Site, int, Tensor], Tensor]) -> Tensor:
    """Logits [length, vocabulary] of one row by a loop over the blocks, edited between the parts.

    What the parts compute is theirs; what is added to what, and where, is spelt out here.
    """
    kind = model.config.model_type
    places = torch.arange(len(ids))[None]
    if kind == "gpt2":
        body, turned = model.transformer, {}
        h = body.wte(ids[None]) + body.wpe(places)
    else:
        body = model.gpt_neox if kind == "gpt_neox" else model.model
        h = body.embed_in(ids[None]) if kind == "gpt_neox" else body.embed_tokens(ids[None])
        turned = {"position_embeddings": body.rotary_emb(h, places)}
    for number, block in enumerate(structure.decoder_blocks(model), 1):
        first, second, attend, mlp = parts(kind, block)
        h = edit(Site.block_input, number, h)
        a = attend(first(h), attention_mask=None, **turned)[0]
        a = edit(Site.attention_output, number, a)
        between = h if kind == "gpt_neox" else h + a
        m = edit(Site.mlp_output, number, mlp(second(between)))
        h = edit(Site.block_output, number, between + m + (a if kind == "gpt_neox" else 0))
    final = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}.get(kind, "norm")
    return structure.head(model)(getattr(body, final)(h))[0]


def parts(kind: str, block: Any) -> tuple[Any, Any, Any, Any]:
    if kind == "gpt2":
        return block.ln_1, block.ln_2, block.attn, block.mlp
    attend = block.attention if kind == "gpt_neox" else block.self_attn
    return block.input_layernorm, block.post_attention_layernorm, attend, block.mlp


ROW = torch.tensor([3, 8, 5, 9, 1, 4])


@pytest.mark.parametrize("site", Site)
@torch.no_grad()
def test_an_edit_is_what_a_loop_over_the_blocks_does(family: Any, site: Site) -> None:
    w, r, factor = vector(1, unit=True), vector(2), 0.7

    def edit(where: Site, block: int, h: Tensor) -> Tensor:
        if (where, block) != (site, 2):
            return h
        new = h.clone()
        for t in range(2, h.shape[1]):  # from position 2 on
            x = h[0, t]
            new[0, t] = x - factor * sum(x[i] * w[i] for i in range(WIDTH)) * w + factor * r
        return new

    told = editing.Edit(site, 2, add=r, ablate=w, scale=factor, start=torch.tensor([2]))
    plain = family(input_ids=ROW[None]).logits[0]
    with editing.edited(family, [told]):
        found = family(input_ids=ROW[None]).logits[0]
    torch.testing.assert_close(plain, by_hand(family, ROW, lambda _s, _b, h: h))
    torch.testing.assert_close(found, by_hand(family, ROW, edit))
    assert (found[2:] - plain[2:]).abs().max() > 1e-3
    assert torch.equal(found[:2], plain[:2])


@torch.no_grad()
def test_full_ablation_leaves_no_component_at_any_site(family: Any) -> None:
    w = vector(1, unit=True)
    sites = (Site.block_input, Site.attention_output, Site.mlp_output)
    edits = [editing.Edit(s, b, ablate=w) for b in (1, 2, 3) for s in sites]
    with editing.edited(family, edits):
        seen = {
            site: activations.states(family, IDS, MASK.bool(), torch.tensor([[0, 2]] * 2), site)
            for site in Site
        }
    for site, states in seen.items():  # the output of a block is a sum of what was ablated
        assert states.norm(dim=-1).min() > 0.1, site
        assert (states @ w).abs().max() < 1e-5, site
    plain = activations.states(family, IDS, MASK.bool(), torch.tensor([[0, 2]] * 2))
    assert (plain @ w).abs().max() > 0.1


def edits_by_row(starts: list[int]) -> list[editing.Edit]:
    scale, start = torch.tensor([1.5, -0.5]), torch.tensor(starts)
    return [
        editing.Edit(Site.block_output, 2, add=vector(3), scale=scale, start=start),
        editing.Edit(Site.mlp_output, 1, ablate=vector(1, unit=True), scale=scale, start=start),
    ]


def one_of(edits: list[editing.Edit], row: int, start: int) -> list[editing.Edit]:
    scale = [1.5, -0.5][row]
    return [replace(edit, scale=scale, start=torch.tensor([start])) for edit in edits]


LEFT = torch.tensor([[3, 8, 5, 9, 1], [0, 0, 7, 7, 2]])
LEFT_MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


@torch.no_grad()
def test_rows_padded_on_the_left_are_edited_as_alone(family: Any) -> None:
    edits = edits_by_row([4, 3])
    with editing.edited(family, edits):
        assert decoding.per_row(family)
        batch = generated(family, LEFT, LEFT_MASK)[1]
    for row, (prompt, start) in enumerate([(LEFT[:1], 4), (LEFT[1:, 2:], 1)]):
        with editing.edited(family, one_of(edits, row, start)):
            alone = generated(family, prompt, torch.ones_like(prompt))[1]
        torch.testing.assert_close(batch[row], alone[0])


@torch.no_grad()
def test_cached_generation_equals_recomputation(family: Any) -> None:
    ids, mask = LEFT[:1].repeat(2, 1), torch.ones(2, 5, dtype=torch.long)
    edits = edits_by_row([4, 2])
    with editing.edited(family, edits):
        cached = generated(family, ids, mask)[1]
        for step in range(4):  # each time a prefill, whose later positions lie behind `start`
            logits = family(input_ids=ids, use_cache=False).logits[:, -1]
            torch.testing.assert_close(cached[:, step], logits)
            ids = torch.cat([ids, logits.argmax(1, keepdim=True)], 1)


@torch.no_grad()
def test_a_scale_of_zero_changes_no_bit(family: Any) -> None:
    plain = family(input_ids=LEFT, attention_mask=LEFT_MASK).logits
    for scale in (0.0, torch.zeros(2)):
        edits = [editing.Edit(s, 2, vector(3), vector(1, True), scale) for s in Site]
        with editing.edited(family, edits):
            found = family(input_ids=LEFT, attention_mask=LEFT_MASK).logits
        assert torch.equal(found, plain)
    edit = editing.Edit(Site.block_output, 1, vector(3), scale=torch.tensor([0.0, 1.0]))
    with editing.edited(family, [edit]):
        found = family(input_ids=LEFT, attention_mask=LEFT_MASK).logits
    assert torch.equal(found[0], plain[0])
    assert not torch.equal(found[1], plain[1])


def hooks_of(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def test_edits_are_undone_also_after_an_exception(family: Any) -> None:
    before, plain = hooks_of(family), family(input_ids=ROW[None]).logits
    edits = [editing.Edit(site, 1, vector(3)) for site in Site]

    def fail(edited: bool) -> None:
        assert torch.equal(family(input_ids=ROW[None]).logits, plain) != edited
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), editing.edited(family, edits):
        fail(edited=True)
    with pytest.raises(RuntimeError, match="inside"), learning.captured(family, 2):
        fail(edited=False)
    assert hooks_of(family) == before
    assert torch.equal(family(input_ids=ROW[None]).logits, plain)
    planned: Any = failing(RuntimeError("planned"))
    with pytest.raises(RuntimeError, match="planned"), editing.edited(family, planned):
        family(input_ids=ROW[None])
    assert hooks_of(family) == before


@torch.no_grad()
def test_a_plan_sees_each_prefill_and_its_own_passes_are_plain(model: Any) -> None:
    seen: list[tuple[Tensor, Tensor | None]] = []
    states: list[Tensor] = []

    def plan(ids: Tensor, mask: Tensor | None) -> list[editing.Edit]:
        seen.append((ids, mask))
        whole = torch.ones_like(ids).bool() if mask is None else mask.bool()
        states.append(activations.states(model, ids, whole, torch.tensor([[-1]] * len(ids))))
        scale = ids[:, 0].float() - 4  # 3 and 0: down by one and by four
        return [editing.Edit(Site.block_output, 2, add=vector(3), scale=scale)]

    fixed = editing.Edit(Site.block_output, 2, vector(3), scale=torch.tensor([-1.0, -4.0]))
    with editing.edited(model, [fixed]):
        expected = generated(model, LEFT, LEFT_MASK)[1]
    plain = model(input_ids=LEFT, attention_mask=LEFT_MASK, output_hidden_states=True)
    with editing.edited(model, plan):
        assert decoding.per_row(model)
        found = generated(model, LEFT, LEFT_MASK)[1]
        assert len(seen) == 1  # the passes behind the cache hold no new prompt
        generated(model, LEFT[:1], LEFT_MASK[:1])  # transformers drops a mask of ones
        model(input_ids=LEFT)
    assert not decoding.per_row(model)
    torch.testing.assert_close(found, expected)
    assert torch.equal(seen[0][0], LEFT)
    masks: list[Any] = [mask for _, mask in seen]
    assert torch.equal(masks[0], LEFT_MASK)
    assert torch.equal(masks[1], LEFT_MASK[:1])
    assert masks[2] is None
    torch.testing.assert_close(states[0][1, :, 0], plain.hidden_states[2][:, -1])


@torch.no_grad()
def test_edits_reach_an_adapted_model(model: Any) -> None:
    adapted = structure.add_lora(model, LoraConfig(targets=["q_proj"]), seed=0)
    plain = model(input_ids=ROW[None]).logits

    def plan(_ids: Tensor, _mask: Tensor | None) -> list[editing.Edit]:
        return [editing.Edit(Site.attention_output, 2, vector(3))]

    for edits in (plan, plan(ROW, None)):
        with editing.edited(adapted, edits):
            found = adapted(input_ids=ROW[None]).logits
            assert decoding.per_row(adapted) is callable(edits)
        assert not torch.equal(found, plain)
    assert torch.equal(adapted(input_ids=ROW[None]).logits, plain)


def test_contexts_nest_but_no_plan_inside_rows(model: Any) -> None:
    one, two = (editing.Edit(Site.block_output, b, vector(b)) for b in (1, 2))
    with torch.no_grad(), editing.edited(model, [one, two]):
        expected = model(input_ids=ROW[None]).logits
    with torch.no_grad(), editing.edited(model, [one]):
        with editing.edited(model, lambda _ids, _mask: [two]):
            assert torch.equal(model(input_ids=ROW[None]).logits, expected)
            with pytest.raises(ValueError, match="another batch"):
                editing.edited(model, lambda _ids, _mask: []).__enter__()
        assert not decoding.per_row(model)


def test_rows_of_another_batch_are_refused(model: Any) -> None:
    with (
        editing.edited(model, edits_by_row([0, 0])),
        pytest.raises(ValueError, match="2 rows met a batch of 1"),
    ):
        model(input_ids=ROW[None])


@torch.no_grad()
def test_a_block_without_the_part_is_refused_by_name() -> None:
    shape = AutoConfig.for_model("bloom", hidden_size=16, n_layer=2, n_head=2, vocab_size=11)
    bloom = AutoModelForCausalLM.from_config(shape)
    edit = editing.Edit(Site.attention_output, 1, vector(1))
    with pytest.raises(ConfigError, match=r"^model\.name: Bloom.* adds the residual"):
        editing.edited(bloom, [edit]).__enter__()
    bloom.transformer.h[0].self_attention = None
    with pytest.raises(ConfigError, match=r"^model\.name: a block of Bloom.* has 0 parts"):
        editing.edited(bloom, [edit]).__enter__()


@torch.no_grad()
def test_bf16_is_edited_in_fp32_and_rounded_once(model: Any) -> None:
    low = model.to(torch.bfloat16)
    w, r = vector(1, unit=True), vector(2)
    with learning.captured(low, 1) as taken:
        low(input_ids=ROW[None])
    with (
        editing.edited(low, [editing.Edit(Site.block_output, 1, r, w, 0.3)]),
        learning.captured(low, 1) as edited,
    ):
        low(input_ids=ROW[None])
    x = taken[0].double()
    truth = x - 0.3 * (x @ w.double())[..., None] * w.double() + 0.3 * r.double()
    assert edited[0].dtype is torch.bfloat16
    assert torch.equal(edited[0], truth.to(torch.bfloat16))


def test_states_of_padded_rows_are_those_of_each_alone(family: Any) -> None:
    places = torch.tensor([[4, 0], [4, 2]])
    with torch.no_grad():
        found = activations.states(family, LEFT, LEFT_MASK.bool(), places)
        cut = activations.states(family, LEFT, LEFT_MASK.bool(), places, until=2)
        for row, (prompt, at) in enumerate([(LEFT[:1], [4, 0]), (LEFT[1:, 2:], [2, 0])]):
            alone = family(input_ids=prompt, output_hidden_states=True).hidden_states
            for block in (1, 2):  # the third is normed by HF
                torch.testing.assert_close(found[block - 1, row], alone[block][0, at])
            inputs = activations.states(
                family, prompt, torch.ones_like(prompt).bool(), torch.tensor([at]), Site.block_input
            )
            torch.testing.assert_close(inputs[2, 0], alone[2][0, at])
    torch.testing.assert_close(cut, found[:2])
    assert found.shape == (3, 2, 2, WIDTH)
