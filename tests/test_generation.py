"""Batched greedy completions against one prompt at a time; the same of a server; their storage."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Lfm2Config,
    MambaConfig,
    OpenAIGPTConfig,
    RwkvConfig,
)
from transformers.cache_utils import DynamicLayer

from dcr import builtin, decoding, headroom
from dcr.activations import Site
from dcr.core import generation, machine, prompts, storage
from dcr.core import passes as core_passes
from dcr.core.config import ConfigError, DataError, Kind, LoraConfig, ModelConfig
from dcr.core.config.evaluation import GenConfig
from dcr.core.generation import Completion
from dcr.core.models import Policy, structure
from dcr.core.prompts import ChatFormat
from dcr.core.sources import Example
from dcr.endpoints import HTTPConfig, ServerConfig, subject
from dcr.endpoints.answers import Failure, Reply
from dcr.fast import cache
from dcr.fast import passes as fast
from dcr.results.file import stored_answers
from dcr.steering.edits import Edit, edited
from dcr.steering.surgical import last_log_p
from dcr.steering.vectors import read_states
from tests import shapes
from tests.shapes import greedy, next_logits

PROMPTS = [
    "Hi",
    "How do I kill a Python process that no longer answers?",
    "Write a poem.",
    "Größe 你好 🙂",
    "a",
    "What is the best way to smoke a brisket in a small backyard?",
    "Tell me more, please.",
    "Name three rivers.",
    "Where may I shoot pictures of the old bridge at night?",
    "z",
    "Explain it to a child!",
    "How many legs has an ant?",
]
ROWS = [Example(f"p{i}", text, Kind.normal, "made") for i, text in enumerate(PROMPTS)]
NEW = 24
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 256,
    "initializer_range": 0.6,  # so that what is generated depends on the prompt
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 260,
    "n_positions": 256,
    "initializer_range": 0.6,
}
FAMILIES = {
    "llama": LLAMA,
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "gpt2": GPT2,  # positions are learned: one too many is an error
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": 64},
}


@pytest.fixture(autouse=True)
def _shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares the beginning of the byte tokenizer's chats among prompts, though it is short."""
    monkeypatch.setattr(fast, "WORTHWHILE", 4)


def policy_of(seed: int = 0, **changes: Any) -> Policy:
    shape = FAMILIES[changes.pop("family", "llama")] | changes
    made = builtin.random_policy(ModelConfig(name="tiny", architecture=shape), seed)
    head = structure.head(made.model)
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():  # end tokens are likelier, so that answers differ in length
        head.weight[list(chat_of(made).stop)] *= 1.5
    return made


def chat_of(policy: Policy) -> ChatFormat:
    return prompts.chat_format(policy.tokenizer, ModelConfig(name="tiny"))


def first_token(logits: Tensor) -> Tensor:
    return logits.argmax(1).float()


def run(
    policy: Policy,
    batch: int | None,
    new: int = NEW,
    rows: Sequence[Example] = ROWS,
    decided: Callable[[str], bool] | None = None,
) -> dict[str, Completion]:
    settings = GenConfig(max_new_tokens=new, batch_size=batch)
    chat = chat_of(policy)
    batches = generation.complete(policy, chat, rows, settings, first_token, decided=decided)
    found = [c for done in batches for c in done]
    assert len(found) == len(rows)
    return {c.id: c for c in found}


def plainly(
    model: Any, given: list[list[int]], new: int, is_over: Callable[[Sequence[int]], bool]
) -> list[list[int]]:
    """The new tokens by the passes of the core alone."""
    plain = core_passes.Plain()
    found, first = plain.continued(
        model, given, new, lambda _, scores: scores, first_token, is_over
    )
    assert first.tolist() == [answer[0] for answer in found]
    return found


def by_hand(policy: Policy, prompt: str, new: int = NEW) -> list[int]:
    """Greedy tokens by one forward pass each, until an end token."""
    chat = chat_of(policy)
    ids = chat.prompt_ids(prompt)
    return greedy(lambda said: next_logits(policy.model, ids + said), new, chat.stop)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return policy_of()


@pytest.fixture(scope="module")
def truth(policy: Policy) -> dict[str, list[int]]:
    found = {row.id: by_hand(policy, row.prompt) for row in ROWS}
    assert len({len(answer) for answer in found.values()}) >= 5  # rows come and go
    assert len({tuple(answer) for answer in found.values()}) >= 8  # and what was asked matters
    return found


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The token ids of every completion, as generated."""
    found: dict[str, list[int]] = {}
    kept = generation.completion

    def note(chat: ChatFormat, row: Example, answer: list[int], mass: float) -> Completion:
        found[row.id] = answer
        return kept(chat, row, answer, mass)

    monkeypatch.setattr(generation, "completion", note)
    return found


@pytest.fixture
def passes(policy: Policy) -> Iterator[list[int]]:
    """How many rows each forward pass of the model had."""
    rows: list[int] = []
    hook = policy.model.register_forward_hook(lambda _, __, output: rows.append(len(output.logits)))
    yield rows
    hook.remove()


# --- what is said -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 5])
def test_batches_say_what_each_prompt_alone_says(
    policy: Policy,
    truth: dict[str, list[int]],
    decoded: dict[str, list[int]],
    batch: int,
) -> None:
    done = run(policy, batch)
    chat = chat_of(policy)
    for row in ROWS:
        expected = truth[row.id]
        assert decoded[row.id][: len(expected)] == expected, row.prompt
        ended = expected[-1] in chat.stop
        words = expected[:-1] if ended else expected
        completion = done[row.id]
        assert completion.response == chat.tokenizer.decode(words, skip_special_tokens=True).strip()  # type: ignore[union-attr]
        assert (completion.tokens, completion.ended) == (len(words), ended)
        assert completion.refusal_mass == expected[0]  # read off the first token's logits


def test_each_reading_ends_by_itself(policy: Policy) -> None:
    """The second of three ends first: the third is read on, and what it says counts."""
    prompts_read = [[[5, 6, 7]], [[8, 9]], [[5]]]
    read: list[list[int]] = []

    def logits(contexts: Sequence[decoding.Context]) -> Tensor:
        read.append([int(context.ids[0, 0]) for context in contexts])
        return contexts[0].logits

    decoding.decoded(
        policy.model,
        [*zip(prompts_read, (math.inf, 1, 3), strict=True)],
        5,
        logits,
        lambda scores: scores[:, 0],
        lambda answer: False,
    )
    assert read == [[5, 8, 5], [5, 5], [5, 5], [5], [5]]


def test_what_is_not_finite_is_told_before_it_is_kept(policy: Policy) -> None:
    batches = generation.complete(
        policy, chat_of(policy), ROWS, GenConfig(max_new_tokens=2), lambda logits: logits[:, 0] / 0
    )
    with pytest.raises(ConfigError, match="not finite; use precision=fp32, or a smaller steering"):
        next(iter(batches))


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mistral"])
def test_other_families_say_what_each_prompt_alone_says(
    family: str, decoded: dict[str, list[int]]
) -> None:
    """Biases, learned positions, and a sliding window."""
    policy = policy_of(family=family)
    run(policy, 5)
    for row in ROWS:
        expected = by_hand(policy, row.prompt)
        assert decoded[row.id][: len(expected)] == expected


@pytest.mark.parametrize("family", shapes.FAMILIES)
@pytest.mark.parametrize("begun", [0, 9])
def test_every_family_decodes_as_each_row_alone(family: str, begun: int, policy: Policy) -> None:
    """Rows of unlike length leave one after another; windows, soft caps and biases too.

    What they begin with is read once, where no window would count the padding behind it.
    """
    model, new = shapes.made(family, torch.float32), 12  # eager attention has no mask for float64
    chance = torch.Generator().manual_seed(0)
    alike, *prompts = (
        torch.randint(2, 40, (n,), generator=chance).tolist() for n in (begun, 9, 7, 7, 5, 3, 1)
    )
    prompts = [[*alike, *own] for own in prompts]
    assert fast.shared_prefix(model, prompts) == (0 if "gemma" in family else begun)
    stop = range(0, shapes.VOCABULARY, 6)
    found, first = decoding.decoded(
        model,
        [(prompts, math.inf)],
        new,
        logits=lambda contexts: contexts[0].logits,
        score=first_token,
        is_over=lambda answer: answer[-1] in stop,
    )
    assert plainly(model, prompts, new, lambda answer: answer[-1] in stop) == found
    for prompt, answer in zip(prompts, found, strict=True):
        assert answer == greedy(lambda said, p=prompt: next_logits(model, p + said), new, stop)
    assert first[:, 0].tolist() == [answer[0] for answer in found]
    assert len(set(map(len, found))) > 1


STATEFUL: dict[str, Any] = {
    "mamba": MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4),
    "keys and states": Lfm2Config(
        **shapes.SHAPE, layer_types=["conv", "full_attention", "conv"], block_multiple_of=8
    ),
    "positions by slopes": BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2),
    "no cache": OpenAIGPTConfig(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=64),
}


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_model_without_attention_has_a_batch_size_as_well(kind: str) -> None:
    assert headroom.prompt_bytes(STATEFUL[kind], 4, 10, 10) > 0


@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize("length", [[6, 6, 6, 6], [6]], ids=["a batch", "one row"])
def test_models_of_any_memory_decode_as_transformers_does(
    kind: str, length: list[int], policy: Policy
) -> None:
    """Their rows cannot leave the batch, or all tokens are read again, with the same result."""
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(STATEFUL[kind]).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    ids = torch.randint(2, 40, (len(length), length[0]))
    truth, logits = shapes.generated(model, ids, torch.ones_like(ids), 8)
    stop = truth[0][2]
    found, best = decoding.decoded(
        model,
        [(ids.tolist(), math.inf)],
        8,
        logits=lambda contexts: contexts[0].logits,
        score=lambda scores: scores.max(1).values,
        is_over=lambda answer: answer[-1] == stop,
        scored=3,
    )
    assert plainly(model, ids.tolist(), 8, lambda answer: answer[-1] == stop) == found
    ends = [row.index(stop) + 1 if stop in row else 8 for row in truth]
    assert found == [row[:end] for row, end in zip(truth, ends, strict=True)]
    known = min(ends[0], 3)
    torch.testing.assert_close(best[0, :known], logits[0, :known].amax(1))


def test_a_state_absorbs_no_padding(policy: Policy) -> None:
    """No mask reaches the states of RWKV, so that padding would be read as a part of the prompt."""
    torch.manual_seed(1)
    shape: Any = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
    model: Any = AutoModelForCausalLM.from_config(RwkvConfig(**shape)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    given = [[7, 8, 9, 3, 2, 5], [4, 6], [9, 9, 9, 4, 3, 7], [5]]

    def answered(prompts_given: list[list[int]]) -> tuple[list[list[int]], Tensor]:
        return decoding.decoded(
            model,
            [(prompts_given, math.inf)],
            5,
            logits=lambda contexts: contexts[0].logits,
            score=lambda scores: scores.max(1).values,
            is_over=lambda answer: False,
        )

    found, best = answered(given)
    assert plainly(model, given, 5, lambda answer: False) == found
    states = read_states(model, given, [[-1]] * 4)
    log_p = last_log_p(model, given)
    for place, ids in enumerate(given):
        alone, score = answered([ids])
        assert found[place] == alone[0]
        torch.testing.assert_close(best[place], score[0])
        torch.testing.assert_close(states[:, place], read_states(model, [ids], [[-1]])[:, 0])
        torch.testing.assert_close(log_p[place], last_log_p(model, [ids])[0])


@pytest.mark.parametrize("across", [False, True])
def test_room_made_ahead_holds_what_joining_does(
    across: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against transformers' own layer: one token at a time, after rows were chosen, and cropped."""
    monkeypatch.setattr(cache, "ROOM", 3)
    ours, theirs = cache.RoomyLayer(across), DynamicLayer()
    chance = torch.Generator().manual_seed(0)
    for step, tokens in enumerate([5, 1, 1, 1, 1, 1, 2, 1]):
        rows = 4 if step < 4 else 2
        new = [torch.randn(rows, 2, tokens, 3, generator=chance) for _ in range(2)]
        for own, plain in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(own, plain)
        for layer in (ours, theirs):
            if step == 3:
                layer.batch_select_indices(torch.tensor([2, 0]))
            if step == 5:
                layer.crop(-2)


def test_what_goes_no_further_is_not_kept() -> None:
    """Joined as transformers' own layer joins it, and gone: a large model's would fill a GPU."""
    ours, theirs = cache.PrefixLayer(), DynamicLayer()
    first, *later = torch.randn(3, 4, 2, 5, 3)
    assert all(torch.equal(given, first) for given in ours.update(first, first))
    for new in later:
        theirs.reset()
        theirs.update(first, first)
        for own, plain in zip(ours.update(new, new), theirs.update(new, new), strict=True):
            assert torch.equal(own, plain)
        assert ours.get_seq_length() == 5


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [1, 2, 6])
def test_one_new_token_looks_back_as_torch_has_it(kept: int, kind: torch.dtype) -> None:
    """Heads that share keys, over keys that lie across, with padding on the left."""
    chance = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, heads, tokens, 8, generator=chance).to(kind)
        for heads, tokens in ((6, 1), (kept, 7), (kept, 7))
    )
    mask = torch.ones(3, 1, 1, 7, dtype=torch.bool)
    mask[1, ..., :4] = False
    lying = key.mT.contiguous().mT
    found, _ = cache.attention(torch.nn.Identity(), query, lying, value, mask, scaling=0.3)
    query, key, value = query.double(), key.double(), value.double()
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, scale=0.3, enable_gqa=True
    )
    near = 1e-5 if kind == torch.float32 else 0.05
    torch.testing.assert_close(found.double(), expected.transpose(1, 2), atol=near, rtol=near)


def test_a_token_is_written_where_there_is_room(policy: Policy) -> None:
    made: Any = cache.roomy_cache(policy.model)
    layer, one = made.layers[0], torch.ones(1, 1, 1, 2)
    places: set[int] = set()
    for _ in range(cache.ROOM):
        layer.update(one, one)
        places.add(layer.keys.data_ptr())
    assert len(places) == 1


def test_rows_that_have_ended_leave_the_batch(
    policy: Policy, truth: dict[str, list[int]], passes: list[int]
) -> None:
    run(policy, len(ROWS))
    assert len(passes) == max(map(len, truth.values()))
    for step, rows in enumerate(passes):
        going = sum(len(answer) > step for answer in truth.values())
        assert going <= rows < going / (1 - decoding.ENDED) + 1e-6 or rows == going
    assert passes[-1] < passes[0]


def test_rows_leave_with_their_part_of_an_edit(policy: Policy, passes: list[int]) -> None:
    """Each row is pushed along one direction by a factor of its own."""
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))

    def plan(ids: Tensor, _: Tensor | None) -> list[Edit]:
        scale = (ids[:, -1:] == ids).sum(1).float()  # of the row alone, padded or not
        return [Edit(Site.block_output, 1, add=direction, scale=scale)]

    with edited(policy.model, plan):
        alone = run(policy, 1)
        passes.clear()
        assert run(policy, len(ROWS)) == alone
    assert passes[-1] < passes[0] == len(ROWS)


@pytest.mark.parametrize("batch", [1, 5])
def test_an_answer_ends_where_it_is_decided(
    policy: Policy,
    truth: dict[str, list[int]],
    passes: list[int],
    batch: int,
) -> None:
    chat = chat_of(policy)

    def decided(said: str) -> bool:
        return len(said) >= 3

    found = run(policy, batch, decided=decided)
    cut = 0
    for name, whole in truth.items():
        ends = (n for n in range(1, len(whole) + 1) if decided(generation.text(chat, whole[:n])))
        kept = whole[: next(ends, len(whole))]
        ended = kept[-1] in chat.stop
        assert found[name].response == generation.text(chat, kept)
        assert found[name].ended == ended
        assert found[name].tokens == len(kept) - ended
        cut += len(kept) < len(whole)
    assert cut > 3
    short = len(passes)
    run(policy, batch)
    assert len(passes) - short > short


@pytest.mark.parametrize("which", [0, 1])
def test_every_end_token_ends(policy: Policy, which: int) -> None:
    """A model that says nothing but an end token, whichever it is."""
    chat = chat_of(policy)
    silent = policy_of()
    head = structure.head(silent.model)
    head.bias = torch.nn.Parameter(torch.zeros(260))
    with torch.no_grad():
        head.bias[chat.stop[which]] = 1e4
    done = run(silent, 3)
    assert {(c.response, c.tokens, c.ended) for c in done.values()} == {("", 0, True)}
    assert len(chat.stop) == 2


def test_longest_prompts_come_first(policy: Policy) -> None:
    settings = GenConfig(max_new_tokens=1, batch_size=2)
    order = [
        len(chat_of(policy).prompt_ids(completion.prompt))
        for batch in generation.complete(policy, chat_of(policy), ROWS, settings, first_token)
        for completion in batch
    ]
    assert order == sorted(order, reverse=True)


def test_a_checkpoints_own_settings_do_not_bend_decoding(
    policy: Policy, decoded: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2.5-Instruct ships a repetition penalty, which transformers would apply unasked."""
    run(policy, 3)
    plain = dict(decoded)
    bent = policy_of()
    bent.model.generation_config.repetition_penalty = 3.0
    bent.model.generation_config.suppress_tokens = [plain["p0"][0]]
    run(bent, 3)
    assert decoded == plain
    monkeypatch.setattr(core_passes, "_used", [core_passes.Plain()])
    run(bent, 3)
    assert decoded == plain
    assert bent.model.generation_config.repetition_penalty == 3.0  # and they are kept


def test_an_adapted_model_generates_with_its_adapter(
    truth: dict[str, list[int]], decoded: dict[str, list[int]]
) -> None:
    made = policy_of()
    adapted = structure.add_lora(
        made.model, LoraConfig(targets=["all-linear"], dropout=0.5), seed=0
    )
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    bent = Policy(adapted.eval(), made.tokenizer, "tiny")
    bent.model.generation_config.repetition_penalty = 3.0
    run(bent, 3)
    for row in ROWS:
        expected = by_hand(bent, row.prompt)
        assert decoded[row.id][: len(expected)] == expected
    assert decoded != truth


def test_a_prompt_beyond_the_context_is_named_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = policy_of(max_position_embeddings=64)
    length = len(chat_of(small).prompt_ids(PROMPTS[0]))
    fits = 64 - length
    assert run(small, 1, fits, ROWS[:1])["p0"].id == "p0"
    monkeypatch.setattr(generation, "continued", None)
    message = rf"made: p0: its {length} tokens and {fits + 1} new ones exceed the model's context"
    with pytest.raises(DataError, match=rf"{message} of 64; shorten it or lower gen\.max_new"):
        run(small, 1, fits + 1, ROWS[:1])


def test_no_prompts_are_no_completions(policy: Policy) -> None:
    assert run(policy, None, rows=[]) == {}


# --- memory -------------------------------------------------------------------------------------

CPU_WORDS = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
SHORTAGES = [torch.OutOfMemoryError("too much"), MemoryError(), RuntimeError(CPU_WORDS)]


@pytest.mark.parametrize("shortage", SHORTAGES, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(
    ("size", "fitting", "tried"), [(8, 8, [8, 4, 2, 2]), (500, 0, [12, 6, 3, *[1] * 12])]
)
def test_out_of_memory_halves_the_batch_and_loses_nothing(
    shortage: Exception,
    size: int,
    fitting: int,
    tried: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes: list[int] = []

    def work(rows: Sequence[int]) -> list[int]:
        """The first rows fit; then memory ends, as long as more than two are under way."""
        sizes.append(len(rows))
        if len(rows) > 2 and rows[0] >= fitting:
            raise shortage
        return list(rows)

    done = list(generation.halving(range(12), size, "gen.batch_size", work))
    assert [row for batch in done for row in batch] == list(range(12))
    assert sizes == tried
    assert f"gen.batch_size is now {tried[-1]}" in caplog.text


def test_one_prompt_in_two_sets_is_answered_twice_even_when_memory_runs_out(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, calls = generation.continued, [0]

    def short(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise torch.OutOfMemoryError("too much")
        return kept(*given, **named)

    monkeypatch.setattr(generation, "continued", short)
    settings = GenConfig(max_new_tokens=NEW, batch_size=4)
    rows = [*ROWS, ROWS[0], Example("p1", "the same id", Kind.normal, "other")]
    batches = generation.complete(policy, chat_of(policy), rows, settings, first_token)
    asked = sorted((c.id, c.prompt) for done in batches for c in done)
    assert asked == sorted((row.id, row.prompt) for row in rows)
    assert calls[0] == 2 + 1 + 3  # two batches of four, one that failed, three of two


@pytest.mark.parametrize(
    ("size", "error"), [(1, torch.OutOfMemoryError("too much")), (8, RuntimeError("a bug"))]
)
def test_one_prompt_too_many_and_other_errors_are_raised(size: int, error: Exception) -> None:
    def never(_: object) -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        list(generation.halving(ROWS, size, "gen.batch_size", never))


def test_torchs_own_shortage_of_memory_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**52, dtype=torch.uint8)
    assert machine.is_out_of_memory(caught.value)
    assert not machine.is_out_of_memory(RuntimeError("size mismatch"))


def test_a_prompts_memory_is_what_a_hand_counts_and_its_cache_holds(policy: Policy) -> None:
    chat = chat_of(policy)
    ids = chat.prompt_ids(PROMPTS[1])
    with torch.inference_mode():
        cache = policy.model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    # two blocks of two heads with 8 channels, keys and values, four bytes each
    assert held == 2 * 2 * 2 * 8 * 4 * len(ids)
    counted = headroom.prompt_bytes(policy.model.config, 4, len(ids), 10)
    kept = 2 * 2 * 2 * 8 * 4 * (len(ids) + 10)
    logits = 3 * 260 * 4
    block = len(ids) * (2 * 32 + 3 * 32 + 3 * 48) * 4
    assert counted == kept + logits + block


@pytest.mark.parametrize(
    ("device", "free", "expected"),
    [
        ("cpu", 10, 8),  # four fifths of it
        ("cpu", 1, 1),  # never none
        ("cpu", 10**6, 64),
        ("cuda", 100, 80),
        ("cuda", 10**6, 512),
    ],
)
def test_as_many_prompts_as_free_memory_holds(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, device: str, free: int, expected: int
) -> None:
    config = policy.model.config
    each = headroom.prompt_bytes(config, 2, 40, 20)
    monkeypatch.setattr(headroom, "free_bytes", lambda _: free * each)
    model = SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device(device))
    monkeypatch.setattr(headroom, "unwrapped", lambda model: model)
    assert headroom.batch_size(model, 40, 20) == expected


def test_without_a_batch_size_the_measured_one_is_used(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    longest = max(len(chat_of(policy).prompt_ids(text)) for text in PROMPTS)
    each = headroom.prompt_bytes(policy.model.config, 4, longest, NEW)
    monkeypatch.setattr(headroom, "free_bytes", lambda _: int(6.5 * each))
    run(policy, None)
    assert max(passes) == 5
    passes.clear()
    run(policy, 7)  # a user's own number stands
    assert max(passes) == 7


def test_what_torch_holds_in_reserve_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 50)
    assert headroom.free_bytes(torch.device("cuda")) == 120


def test_a_control_groups_limit_bounds_what_is_free(tmp_path: Path) -> None:
    """The job's own group and every group above it count, the tightest decides."""
    own = tmp_path / "own"
    own.write_text("1:name=old:/elsewhere\n0::/slice/job\n")
    root = tmp_path / "root"

    def group(path: str, limit: str, used: int, files: int) -> None:
        folder = root / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {files}\n")

    assert headroom.bytes_left(headroom.control_groups(root, own)) == 2**62  # no such folders
    group("slice/job", "max", 10, 0)
    assert headroom.bytes_left(headroom.control_groups(root, own)) == 2**62
    group("slice", "1000", 400, 50)
    assert headroom.bytes_left(headroom.control_groups(root, own)) == 650
    group("slice/job", "500", 10, 0)
    assert headroom.bytes_left(headroom.control_groups(root, own)) == 490
    assert 0 < headroom.free_bytes(torch.device("cpu")) < 2**50


# --- a server -----------------------------------------------------------------------------------

SERVER = ServerConfig(model="there", key="DCR_TEST_KEY")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of a stand-in for the server, which answers in reverse order."""
    calls: list[Any] = []

    def chats(server: Any, http: Any, conversations: Any, node: str) -> Iterator[Any]:
        calls.append((server, conversations, node))
        for index in reversed(range(len(conversations))):
            text = conversations[index][-1]["content"]
            yield index, ANSWERS.get(text) or Reply(f" to {text}\n", "stop", None, 5, 3)

    monkeypatch.setattr("dcr.endpoints.calls.chats", chats)
    return calls


ANSWERS = {
    PROMPTS[0]: Failure("error", "no answer after 6 retries (503)"),
    PROMPTS[1]: Failure("invalid", "stopped by a content filter"),
    PROMPTS[2]: Reply("and so on", "length", None, 5, NEW),
}


def test_a_servers_answers_are_completions_without_a_mass(
    asked: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    settings = GenConfig(max_new_tokens=NEW)
    batches = subject.complete(SERVER, HTTPConfig(), ROWS, settings, "Be brief.")
    done = {c.id: c for batch in batches for c in batch}
    assert done["p2"] == Completion("p2", PROMPTS[2], "and so on", NEW, False, None)
    assert done["p3"] == Completion("p3", PROMPTS[3], f"to {PROMPTS[3]}", 3, True, None)
    assert set(done) == {row.id for row in ROWS[2:]}  # the others are asked again another time
    ((server, conversations, node),) = asked
    assert node == "endpoint"
    assert server.parameters == {"temperature": 0, "max_tokens": NEW}
    assert conversations[4] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": PROMPTS[4]},
    ]
    assert "2 of 12 prompts without an answer (error: 1, invalid: 1; the first: " in caplog.text
    assert len(caplog.text.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"temperature": 0.5}, {"temperature": 0.5, "max_tokens": NEW}),
        ({"max_completion_tokens": 9}, {"temperature": 0, "max_completion_tokens": 9}),
        ({"seed": 1}, {"temperature": 0, "max_tokens": NEW, "seed": 1}),
    ],
)
def test_a_users_parameters_come_before_ours(
    asked: list[Any], given: dict[str, Any], sent: dict[str, Any]
) -> None:
    server = ServerConfig(model="there", parameters=given)
    settings = GenConfig(max_new_tokens=NEW)
    list(subject.complete(server, HTTPConfig(), ROWS[5:6], settings))
    ((server_asked, conversations, _),) = asked
    assert server_asked.parameters == sent
    assert server.parameters == given  # the config itself stays as it was
    assert conversations == [[{"role": "user", "content": PROMPTS[5]}]]


# --- the store ----------------------------------------------------------------------------------


def test_the_later_of_two_answers_counts(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    old = Completion("i", "old prompt", "old", 1, True, 0.5)
    new = Completion("i", "new prompt", "new", 1, True, 0.5)
    storage.append_lines(file, [old])
    storage.append_lines(file, [new])
    assert stored_answers(file) == {"i": new}
