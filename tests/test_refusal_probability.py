"""Refusal probabilities against one pass per phrase, a closed form and hand counts."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dcr import activations, decoding
from dcr.analyses import probability
from dcr.analyses.probability import trie
from dcr.builtin import byte_tokenizer
from dcr.core import passes, prompts
from dcr.core.config import ModelConfig
from dcr.core.models import Policy
from dcr.core.refusal import opening as refusal
from dcr.core.refusal.opening import continuations, ending
from dcr.fast import passes as fast
from dcr.steering import edits

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 260,
    "initializer_range": 0.3,  # far from uniform
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
# "a" begins three others, "ab" two; "q" is a leaf of the root.
SHORT = ("ab", "a", "abc", "xy", "abd", "q")
PROMPTS = ("How do I bake bread?", "Hi", "Name three rivers that flow north, please")


@pytest.fixture(autouse=True)
def _shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares the beginning of the byte tokenizer's chats among prompts, though it is short."""
    monkeypatch.setattr(fast, "WORTHWHILE", 4)


def model_of(kind: str, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **(SHAPE | changes)), attn_implementation=attention
        )
    return made.eval()


def chat_ids(tokenizer: Any, prompt: str) -> list[int]:
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


@torch.no_grad()
def log_p_by_passes(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """One pass over the prompt and the answer, without cache, padding or mask."""
    log_p = model(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0].log_softmax(-1)
    return sum(log_p[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer))


def by_passes(
    model: Any, encoded: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> tuple[list[float], list[float]]:
    plain, free = [], []
    for ids in encoded:
        each = [math.exp(log_p_by_passes(model, ids, answer)) for answer in answers]
        plain.append(sum(each))
        begun = [any(a != b and a[: len(b)] == b for b in answers) for a in answers]
        free.append(sum(p for p, longer in zip(each, begun, strict=True) if not longer))
    return plain, free


def scored(
    model: Any, prompts: Any = PROMPTS, phrases: Any = SHORT, tokenizer: Any = None, **options: Any
) -> torch.Tensor:
    of_bytes = tokenizer or byte_tokenizer()
    return probability.refusal_probability(model, of_bytes, prompts, phrases=phrases, **options)


def check(model: Any) -> None:
    tokenizer = byte_tokenizer()
    encoded = [chat_ids(tokenizer, prompt) for prompt in PROMPTS]
    answers = [tokenizer.encode(phrase, add_special_tokens=False) for phrase in SHORT]
    for free, expected in enumerate(by_passes(model, encoded, answers)):
        got = scored(model, prefix_free=bool(free))
        assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-9)


# --- against one pass per phrase ---


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        *[(kind, how) for kind in ("qwen2", "llama", "gpt2") for how in ("sdpa", "eager")],
        ("gemma2", "eager"),  # soft caps
    ],
)
def test_equals_a_pass_per_phrase(kind: str, attention: str) -> None:
    check(model_of(kind, attention))


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_each_of_the_papers_phrases(kind: str) -> None:
    tokenizer, model = byte_tokenizer(), model_of(kind)
    encoded = [tuple(chat_ids(tokenizer, prompt)) for prompt in PROMPTS[:2]]
    answers = continuations(tokenizer, ending(tokenizer, encoded[0]), refusal.REFUSAL_PHRASES)
    assert [len(answer) for answer in answers] == list(map(len, refusal.REFUSAL_PHRASES))
    tree = trie(answers)
    with torch.inference_mode():
        edges = probability.by_tree(model, tree, passes.current().read(model, encoded))
    for row, ids in enumerate(encoded):
        for path, answer in zip(tree.paths, answers, strict=True):
            expected = log_p_by_passes(model, ids, answer)
            assert edges[row, list(path)].sum().item() == pytest.approx(expected, rel=1e-5)


def test_without_phrases_the_papers_are_meant() -> None:
    model = model_of("qwen2", initializer_range=0.6)
    assert torch.equal(scored(model, phrases=None), scored(model, phrases=refusal.REFUSAL_PHRASES))


def test_float64_stays_float64() -> None:
    model = model_of("llama")
    single, double = scored(model), scored(model.double())
    assert double.dtype == torch.float64
    assert_close(single.double(), double, rtol=1e-5, atol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bf16_and_autocast_are_near(attention: str) -> None:
    model = model_of("llama", attention, initializer_range=0.05)
    expected = scored(model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = scored(model)
    for low in (mixed, scored(model.bfloat16())):
        assert low.dtype == torch.float32
        assert_close(low, expected, rtol=0.05, atol=0)


# --- batches ---


@pytest.mark.parametrize("size", [1, 2, 3, None])
def test_batches_change_nothing_and_keep_the_order(size: int | None) -> None:
    model = model_of("llama")
    together = scored(model, batch_size=size)
    assert_close(together, torch.cat([scored(model, [p]) for p in PROMPTS]), rtol=1e-5, atol=0)
    assert not together.is_inference()
    assert scored(model, []).shape == (0,)


def test_three_passes_and_no_token_too_many() -> None:
    """The three read the beginning of all prompts, their rests, and the phrases."""
    model: Any = model_of("llama")
    fed: list[tuple[int, ...]] = []
    head: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: fed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    model.lm_head.register_forward_pre_hook(lambda _m, args: head.append(args[0].shape[1]))
    scored(model)
    encoded = [chat_ids(byte_tokenizer(), prompt) for prompt in PROMPTS]
    longest = max(map(len, encoded))
    once = next(i for i in range(longest) if len({ids[i] for ids in encoded}) > 1)
    assert fed == [(1, once), (3, longest - once), (3, 3)]  # "a", "ab" and "x" have edges below
    assert head == [1, 3]
    fed.clear()
    scored(model, phrases=("a", "b"), batch_size=1)
    assert fed == [(1, len(ids)) for ids in sorted(encoded, key=len, reverse=True)]


# --- closed form ---


def unigram(p: dict[str, float]) -> Any:
    """A model that gives each letter one probability whatever came before."""
    model: Any = model_of("llama", tie_word_embeddings=False)
    rest = (1 - sum(p.values())) / (260 - len(p))
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1)  # what the norm makes of it is 1 everywhere
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, 0] = math.log(rest) if rest else -1e4
        for letter, value in p.items():
            token = byte_tokenizer().encode(letter, add_special_tokens=False)
            model.lm_head.weight[token, 0] = math.log(value)
    return model


@pytest.mark.parametrize(
    ("phrases", "plain", "free"),
    [
        (["ab"], 1 / 8, 1 / 8),
        (["a", "ab", "abc", "cb"], 1 / 2 + 1 / 8 + 1 / 64 + 1 / 32, 1 / 2 + 1 / 32),
        (["ab", "a", "ab", "b"], 1 / 2 + 1 / 8 + 1 / 4, 1 / 2 + 1 / 4),  # a set
    ],
)
def test_products_of_a_unigram_model(phrases: list[str], plain: float, free: float) -> None:
    model = unigram({"a": 0.5, "b": 0.25, "c": 0.125})
    assert scored(model, ["x"], phrases).item() == pytest.approx(plain, rel=1e-5)
    assert scored(model, ["x"], phrases, prefix_free=True).item() == pytest.approx(free, rel=1e-5)


def test_only_the_plain_sum_exceeds_one() -> None:
    encoded = [chat_ids(byte_tokenizer(), prompt) for prompt in PROMPTS[:2]]
    model = unigram({"a": 0.9, "b": 0.1})
    found = probability.probabilities(model, byte_tokenizer(), encoded, ["a", "aa", "aaa", "b"])
    assert found[0].tolist() == pytest.approx([0.9 + 0.81 + 0.729 + 0.1] * 2, rel=1e-5)
    assert found[1].tolist() == pytest.approx([1.0] * 2, rel=1e-5)
    model = unigram({"I": 0.5, "N": 0.1, "o": 0.1, ",": 0.05, " ": 0.1})
    for phrases in probability.PHRASES.values():
        plain, free = probability.probabilities(model, byte_tokenizer(), encoded, phrases)
        assert ((free > 0) & (free <= 1) & (free <= plain)).all()


# --- phrases ---


def test_trie_by_hand() -> None:
    tree = trie([(1, 2), (1,), (3,), (1, 2, 4), (1, 5, 4)])
    assert tree.tokens == (1, 2, 5)
    assert tree.parents == (0, 1, 1)
    assert tree.depths == (1, 2, 2)
    assert tree.sources == (0, 0, 1, 1, 2, 3)
    assert tree.labels == (1, 3, 2, 5, 4, 4)
    assert tree.paths == ((0, 2), (0,), (1,), (0, 2, 4), (0, 3, 5))
    assert tree.prefix_free == (1, 2)
    assert tree.children == {0: [1], 1: [2, 3], 2: [], 3: []}
    assert tree.sight().tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]


def test_the_papers_set_has_three_phrases_that_others_begin() -> None:
    tokenizer = byte_tokenizer()
    end = ending(tokenizer, chat_ids(tokenizer, "x"))
    tree = trie(continuations(tokenizer, end, refusal.REFUSAL_PHRASES))
    dropped = {refusal.REFUSAL_PHRASES[i] for i in range(31) if i not in tree.prefix_free}
    assert dropped == {
        "I cannot fulfill your request",
        "I cannot fulfill this request",
        "I'm not able to provide you with",
    }


def test_extended_set_covers_what_the_paper_misses() -> None:
    extended = probability.EXTENDED_PHRASES
    assert set(refusal.REFUSAL_PHRASES) < set(extended)
    assert len(extended) == len(set(extended))
    for text in ("I'm sorry, but I can't help.", "I’m sorry, but I can’t.", "Sorry, no", "I can’t"):
        assert text.startswith(tuple(extended)), text
    assert not "I’m sorry, but I can’t".startswith(refusal.REFUSAL_PHRASES)


# --- tokenizers ---


def word_tokenizer(
    texts: Sequence[str] = (" a a a ab xy",), special: Sequence[str] = ("<s>",), bos: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose words hold the space before them."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=258 if len(special) == 1 else 600,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts] * 9, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        additional_special_tokens=list(special[1:]),
    )


def sentencepiece(pieces: dict[str, float], start: str) -> PreTrainedTokenizerFast:
    tokenizer: Any = Tokenizer(models.Unigram([("<s>", -5.0), *pieces.items()], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=start)  # pyright: ignore
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=start)  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.mark.parametrize("bos", [False, True])
def test_bare_prompts_take_a_space_unless_they_end_in_one(bos: bool) -> None:
    tokenizer, model = word_tokenizer(bos=bos), model_of("gpt2")
    assert len(tokenizer.tokenize(" a")) == 1  # the space is part of the word
    bare, leads = ["So it ends.", "A header:\n", "And then"], [" ", "", " "]
    encoded = [tokenizer.encode(prompt) for prompt in bare]
    assert (encoded[0][0] == 0) is bos
    each = []
    for ids, lead in zip(encoded, leads, strict=True):
        answers = [tokenizer.encode(lead + y, add_special_tokens=False) for y in SHORT]
        each.append(by_passes(model, [ids], answers))
    expected = [[value for of in both for value in of] for both in zip(*each, strict=True)]
    by_ids = probability.probabilities(model, tokenizer, encoded, SHORT)
    assert_close(torch.stack(by_ids), torch.tensor(expected), rtol=1e-5, atol=0)
    by_text = scored(model, bare, tokenizer=tokenizer)
    assert_close(by_text, torch.tensor(expected[0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("start", ["first", "always"])
def test_sentencepiece_spaces(start: str) -> None:
    fast = sentencepiece(dict.fromkeys(["▁", *"abcdqxy.\n", "▁a", "▁ab", "ab"], -5.0), start)
    model = model_of("llama")
    encoded = [fast.encode("ab xy."), fast.encode("ab\n")]
    for ids, words in zip(encoded, (["▁ab", "▁a"], ["ab", "a"]), strict=True):
        found = continuations(fast, ending(fast, ids), ["ab", "a"])
        assert [fast.convert_ids_to_tokens(y[0]) for y in found] == words
        assert continuations(fast, ending(fast, [0, *ids]), ["ab", "a"]) == found
    by_text = scored(model, ["ab xy.", "ab\n"], ["ab", "a"], fast)
    by_ids, _ = probability.probabilities(model, fast, encoded, ["ab", "a"])
    assert_close(by_text, by_ids)


def test_ids_of_the_chat_format_equal_the_text(policy: Policy) -> None:
    settings = ModelConfig(name="tiny", label="tiny", layer=1)
    chat = prompts.chat_format(policy.tokenizer, settings)
    by_text = scored(policy.model, phrases=None, tokenizer=policy.tokenizer)
    by_ids, _ = probability.probabilities(
        policy.model, policy.tokenizer, [chat.prompt_ids(prompt) for prompt in PROMPTS]
    )
    assert torch.equal(by_text, by_ids)


# --- models ---


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("mistral", {"sliding_window": 20}, "do not fit its attention window"),
        ("gemma2", {"sliding_window": 20}, "do not fit its attention window"),
        ("bloom", {}, "its positions cannot be set"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "not all of its layers"),
        ("mistral", {"sliding_window": 400}, None),
        ("gemma2", {"sliding_window": 400}, None),
    ],
)
def test_only_models_without_tree_masks_fall_back_and_loudly(
    kind: str, changes: dict[str, Any], reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    check(model_of(kind, "eager", **changes))
    ours = [record for record in caplog.records if record.name == probability.__name__]
    said = [record.getMessage() for record in ours]
    assert len(said) == (2 if reason else 0)  # one per call
    assert all(str(reason) in message for message in said)


def test_adapters_count_and_modes_stay() -> None:
    base = model_of("llama")
    without = scored(base)
    lora = LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.5
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted: Any = get_peft_model(base, lora)
    adapted.train()
    adapted.base_model.model.model.norm.eval()  # a mixed state, as PEFT leaves it
    modes = [module.training for module in adapted.modules()]
    got = scored(adapted)
    assert modes == [module.training for module in adapted.modules()]
    assert all(parameter.grad is None for parameter in adapted.parameters())
    check(adapted.eval())
    assert_close(got, scored(adapted.merge_and_unload()), rtol=1e-4, atol=0)
    assert (got / without - 1).abs().max() > 0.01


def test_edits_of_activations_hold() -> None:
    model = model_of("llama")
    plain = scored(model)
    edit = edits.Edit(activations.Site.block_output, 1, add=torch.linspace(-2, 2, 32))
    with edits.edited(model, [edit]):
        check(model)
        edited = scored(model)
    assert (edited / plain - 1).abs().max() > 0.01


def test_a_plan_by_prompt_edits_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt steered by its own length, only from its last position on."""
    model = model_of("llama")

    def plan(ids: torch.Tensor, mask: torch.Tensor | None) -> list[edits.Edit]:
        assert mask is not None
        last = torch.full((len(ids),), ids.shape[1] - 1)
        vector = torch.linspace(-2, 2, 32)
        scale = mask.sum(1) / 50
        site = activations.Site.block_output
        return [edits.Edit(site, 1, add=vector, scale=scale, start=last)]

    with edits.edited(model, plan):
        fast = scored(model)
        monkeypatch.setattr(decoding, "MASKABLE", set())
        walked = scored(model, batch_size=1)
    assert_close(fast, walked, rtol=1e-5, atol=0)


# --- errors ---


@pytest.mark.parametrize(
    ("given", "phrases", "size", "match"),
    [
        (["x"], [], None, "at least one"),
        (["x"], ["No.", " "], None, "none that is empty"),
        (["x"], "No.", None, "list of strings"),
        ("x", ["No."], None, "list of strings"),
        (["x", ""], ["No."], None, r"prompts\[1\] has no tokens"),
        (["Answer: "], ["ab"], None, "tokens change when 'ab' follows"),
        (["x"], ["No."], 0, "batch_size=0"),
    ],
)
def test_errors_name_the_cure(given: Any, phrases: Any, size: int | None, match: str) -> None:
    with pytest.raises(refusal.PhraseError, match=match):
        scored(model_of("llama"), given, phrases, word_tokenizer(), batch_size=size)
