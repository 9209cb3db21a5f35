"""Self-CD and AdaCD against a hand-made model, closed forms and plain loops."""

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from dcr import chat_templates, resolving
from dcr.chat_templates import CHATML
from dcr.contrast import ContrastConfig
from dcr.contrast import decoding as contrast
from dcr.contrast.decoding import EMPHASIS, REFUSE, adapted, contrasted
from dcr.core import generation, prompts
from dcr.core.config import ConfigError, DataError, Kind, ModelConfig
from dcr.core.generation import Completion
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
from dcr.core.sources import Example
from dcr.extensions import EvalSettings, GenSettings
from tests import test_generation
from tests.shapes import greedy, next_logits

WORDS = ["Hi", "How do I kill a Python process?", "Write a poem.", "Größe 你好 🙂", "a", "Why not?"]
ROWS = [Example(f"p{i}", text, Kind.normal, "made") for i, text in enumerate(WORDS)]
NEW = 16


def policy_of(family: str = "llama", **changes: Any) -> Policy:
    """With room for the emphasis."""
    room = {"n_positions" if family == "gpt2" else "max_position_embeddings": 512}
    return test_generation.policy_of(family=family, **room | changes)


def chat_of(policy: Policy, system: str | None = None) -> ChatFormat:
    return prompts.chat_format(policy.tokenizer, ModelConfig(name="tiny", system_prompt=system))


@pytest.fixture(scope="module")
def policy() -> Policy:
    return policy_of()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The token ids of every completion, as generated: texts may hide a difference."""
    found: dict[str, list[int]] = {}
    original = generation.completion

    def noting(chat: ChatFormat, row: Example, answer: list[int], mass: float) -> Completion:
        made = original(chat, row, answer, mass)
        found[row.id] = list(answer[: made.tokens])
        return made

    monkeypatch.setattr(generation, "completion", noting)
    return found


def stressed(chat: ChatFormat) -> ChatFormat:
    return self_cd(1.0).stressed(chat)


def self_cd(weight: float) -> contrast.Contrast:
    asked_for = contrast.asked_for(ContrastConfig(self_cd=weight or 1.0))
    assert asked_for is not None
    return replace(asked_for, logits=functools.partial(contrasted, weight=weight))


def top(logits: Tensor) -> Tensor:
    return logits.max(1).values


def run(policy: Policy, chat: ChatFormat, weight: float | None, batch: int | None, new: int = NEW):
    settings = ContrastConfig(max_new_tokens=new, batch_size=batch, self_cd=weight)
    made = [
        c
        for b in generation.complete(
            policy, chat, ROWS, settings, top, decoding=contrast.asked_for(settings)
        )
        for c in b
    ]
    assert len(made) == len(ROWS)
    return {c.id: c for c in made}


def by_hand(
    policy: Policy, chat: ChatFormat, prompt: str, weight: float
) -> tuple[list[int], float]:
    """Both contexts anew for each token, no cache or padding; and the best of the first logits."""
    system = f"{chat.system_prompt}\n\n{EMPHASIS}" if chat.system_prompt else EMPHASIS
    both = (chat.prompt_ids(prompt), chat_of(policy, system).prompt_ids(prompt))

    def wanted(said: list[int]) -> Tensor:
        plain, safe = (next_logits(policy.model, ids + said) for ids in both)
        return (1 + weight) * plain - weight * safe

    answer = [token for token in greedy(wanted, NEW, chat.stop) if token not in chat.stop]
    with torch.inference_mode():
        return answer, float(wanted([]).max())


# --- the formula --------------------------------------------------------------------------------


def test_closed_form_of_two_distributions() -> None:
    """From p = (0.5, 0.3, 0.2) and q = (0.8, 0.1, 0.1): p (p/q)^w, normalised."""
    plain, safe = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.8, 0.1, 0.1]])
    for weight in (0.0, 0.5, 1.5):
        ratio = [p * (p / q) ** weight for p, q in ((0.5, 0.8), (0.3, 0.1), (0.2, 0.1))]
        wanted = torch.tensor([[value / sum(ratio) for value in ratio]])
        # logits are known up to a constant only, and it must not matter
        found = contrasted(plain.log() + 3.0, safe.log() - 7.0, weight).softmax(1)
        torch.testing.assert_close(found, wanted)


def test_the_paper_s_ratio_is_the_weight_plus_one() -> None:
    """OverKill: y_with - a (y_with - y_without), a = 2.5 as released."""
    chance = torch.Generator().manual_seed(0)
    without, with_safety = (torch.randn(4, 9, generator=chance) for _ in range(2))
    theirs = with_safety - 2.5 * (with_safety - without)
    torch.testing.assert_close(contrasted(without, with_safety, 1.5), theirs)


class HandMade(PreTrainedModel):
    """Says `s` at once, all the more where it has read the emphasis; else `a`; then ends.

    Plain: s 2.0, a 1.5. With the emphasis: s 3.0, a 0.5. So the contrast turns where
    2 + w (2 - 3) < 1.5 + w (1.5 - 0.5), at w = 0.25.
    """

    LONG = 200  # tokens: no plain prompt has as many

    def __init__(self, tokenizer: Any, end: int) -> None:
        shape = PretrainedConfig()
        shape._attn_implementation = "eager"
        super().__init__(shape)
        self.s, self.a = (
            tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in "sa"
        )
        self.end = end
        self.place = torch.nn.Parameter(torch.zeros(1))  # where the model is

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        use_cache: bool,
        logits_to_keep: int,
        return_dict: bool = True,
        past_key_values: Any = None,
    ) -> Any:
        logits = torch.full((len(input_ids), 1, 260), -50.0)
        for row, mask in enumerate(attention_mask):
            if past_key_values is not None:
                logits[row, 0, self.end] = 0.0
            else:
                emphasised = int(mask.sum()) > self.LONG
                logits[row, 0, self.s] = 3.0 if emphasised else 2.0
                logits[row, 0, self.a] = 0.5 if emphasised else 1.5
        return CausalLMOutputWithPast(logits=logits, past_key_values=DynamicCache())


@pytest.mark.parametrize(("weight", "said"), [(0.2, "s"), (0.3, "a"), (1.5, "a")])
def test_a_hand_made_model_turns_where_it_should(policy: Policy, weight: float, said: str) -> None:
    chat = chat_of(policy)
    made = HandMade(policy.tokenizer, chat.stop[0])
    lengths = [len(c.prompt_ids(r.prompt)) for c in (chat, stressed(chat)) for r in ROWS]
    assert sum(n <= made.LONG for n in lengths) == len(ROWS)
    hand = replace(policy, model=made)
    plain, other = ([c.prompt_ids(row.prompt) for row in ROWS] for c in (chat, stressed(chat)))
    answers, best = contrast.continued(hand, chat, plain, other, NEW, top, self_cd(weight))
    spoken = policy.tokenizer(said, add_special_tokens=False)["input_ids"]
    assert answers == [[*spoken, chat.stop[0]]] * len(ROWS)
    assert best.tolist() == pytest.approx([max(2 - weight, 1.5 + weight)] * len(ROWS))  # contrasted


# --- decoding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_tokens_are_those_of_two_plain_loops(family: str, decoded: dict[str, list[int]]) -> None:
    made = policy_of(family)
    chat = chat_of(made)
    answers = run(made, chat, 1.5, 4)
    for row in ROWS:
        tokens, first = by_hand(made, chat, row.prompt, 1.5)
        assert decoded[row.id] == tokens, row.id
        mass = answers[row.id].refusal_mass
        assert mass == pytest.approx(first, abs=1e-3)
    assert len({len(tokens) for tokens in decoded.values()}) > 1


def test_the_contrast_is_one(policy: Policy) -> None:
    """Else all the tests above could hold for plain decoding."""
    chat = chat_of(policy)
    plain, other = run(policy, chat, None, 4), run(policy, chat, 1.5, 4)
    assert sum(plain[i].response != other[i].response for i in plain) >= 4


def test_weight_zero_is_plain_greedy_to_the_token(
    policy: Policy, decoded: dict[str, list[int]]
) -> None:
    chat = chat_of(policy)
    plain = run(policy, chat, None, 4)
    tokens = dict(decoded)
    assert run(policy, chat, 0.0, 4) == plain
    assert decoded == tokens
    # not only by going another way: the contrast itself leaves the model as it is
    own, other = ([c.prompt_ids(row.prompt) for row in ROWS] for c in (chat, stressed(chat)))
    answers, _ = contrast.continued(policy, chat, own, other, NEW, top, self_cd(0.0))
    for row, answer in zip(ROWS, answers, strict=True):
        ended = tokens[row.id] + list(chat.stop[:1]) * (len(tokens[row.id]) < NEW)
        assert answer[: len(ended)] == ended


# --- limits and refusals ------------------------------------------------------------------------


def test_the_longer_prompt_must_fit_the_context() -> None:
    chat = chat_of(policy_of())
    longest = max(len(stressed(chat).prompt_ids(text)) for text in WORDS)
    exact = policy_of(max_position_embeddings=longest + NEW)
    assert run(exact, chat_of(exact), 1.5, 4)
    short = policy_of(max_position_embeddings=longest + NEW - 1)
    assert run(short, chat_of(short), None, 4)
    with pytest.raises(DataError, match="exceed the model's context"):
        run(short, chat_of(short), 1.5, 4)


def test_half_as_many_rows_where_two_caches_are_kept(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = contrast.continued
    monkeypatch.setattr(generation, "batch_size", lambda *_: 5)

    def noting(policy: Policy, chat: ChatFormat, prompts: Any, *rest: Any) -> Any:
        seen.append(len(prompts))
        return original(policy, chat, prompts, *rest)

    monkeypatch.setattr(contrast, "continued", noting)
    run(policy, chat_of(policy), 1.5, None)
    assert seen == [2, 2, 2]


NO_SYSTEM = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "words"),
    [(NO_SYSTEM, "leaves the system prompt out"), (REFUSES + CHATML, "takes no system prompt")],
)
def test_a_template_without_system_prompt_is_refused(
    policy: Policy, template: str, words: str
) -> None:
    chat = replace(chat_of(policy), template=template)
    with pytest.raises(ConfigError, match=f"^gen.self_cd: .*{words}.*leave gen.self_cd out"):
        run(policy, chat, 1.5, 4)


DEFAULT = (
    "{% if messages[0].role != 'system' %}"
    "<|im_start|>system\nYou are Nobody.<|im_end|>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "own"),
    [(DEFAULT + CHATML, "You are Nobody.\n\n"), (CHATML, ""), (chat_templates.PLAIN, "")],
)
def test_the_emphasis_stands_behind_the_own_system_prompt_of_template_or_model(
    policy: Policy, template: str, own: str
) -> None:
    """Otherwise what is contrasted would be the model's default away, not the emphasis added."""
    chat = replace(chat_of(policy), template=template)
    named = replace(chat, system_prompt=own + EMPHASIS)
    assert stressed(chat).text("Hi") == named.text("Hi")
    text = stressed(chat_of(policy, "You are Tiny.")).text("Hi")
    assert text.index("You are Tiny.\n\n" + EMPHASIS) < text.index("Hi")


# --- AdaCD ----------------------------------------------------------------------------------------


def by_cases(plain: list[float], stressed: list[float], ratio: float) -> list[float]:
    """Logits of log-probabilities by the paper's cases, token by token."""
    p, q = ([math.exp(x) / sum(map(math.exp, of)) for x in of] for of in (plain, stressed))
    rank = sorted(range(len(p)), key=lambda i: -p[i]).index(q.index(max(q))) + 1
    towards = 1 / rank >= 0.9 and max(p) >= 0.9 * max(q)
    return [
        -math.inf if p[i] < 0.01 * max(p)
        else z + ratio * (z - y) if towards
        else z - ratio * (z - y)
        for i, (y, z) in enumerate(zip(plain, stressed, strict=True))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("plain", "stressed", "said"),
    [
        ([2.0, 1.0, 0.0], [2.1, 0.9, 0.0], 0),  # both refuse, plain as surely: refused the more
        ([2.0, 1.8, 0.0], [4.0, 0.5, 0.0], 1),  # both refuse, plain much less surely: answered
        ([1.8, 2.0, 0.0], [4.0, 0.5, 0.0], 1),  # they disagree: answered
        ([2.0, 1.8, -9.0], [4.0, 0.5, -30.0], 1),  # what is implausible does not come of it
    ],
)
def test_adacd_adds_where_both_agree_and_takes_away_elsewhere(
    plain: list[float], stressed: list[float], said: int
) -> None:
    found = adapted(torch.tensor([plain]), torch.tensor([stressed]), 4.5)
    torch.testing.assert_close(found, torch.tensor([by_cases(plain, stressed, 4.5)]))
    assert int(found.argmax()) == said
    chance = torch.Generator().manual_seed(0)
    pairs = torch.randn(2, 200, 9, generator=chance) * 3
    wanted = [by_cases(pairs[0, i].tolist(), pairs[1, i].tolist(), 4.5) for i in range(200)]
    torch.testing.assert_close(adapted(pairs[0], pairs[1], 4.5), torch.tensor(wanted))
    assert len({math.inf in map(abs, row) for row in wanted}) == 2


def test_adacd_decodes_ten_tokens_against_the_prompt_and_then_plainly(
    policy: Policy, decoded: dict[str, list[int]]
) -> None:
    chat = chat_of(policy)
    refusing = chat_of(policy, REFUSE)
    settings = ContrastConfig(max_new_tokens=NEW, batch_size=4, adacd=4.5)
    list(
        generation.complete(
            policy, chat, ROWS, settings, top, decoding=contrast.asked_for(settings)
        )
    )
    plain = {row.id: adaptive(policy, chat, row.prompt, None) for row in ROWS}
    for row in ROWS:
        assert decoded[row.id] == adaptive(policy, chat, row.prompt, refusing), row.id
    assert any(decoded[i] != plain[i] for i in plain)


def adaptive(
    policy: Policy, chat: ChatFormat, prompt: str, refusing: ChatFormat | None
) -> list[int]:
    def logits(said: list[int]) -> Tensor:
        plain, other = (
            next_logits(policy.model, c.prompt_ids(prompt) + said) for c in (chat, refusing or chat)
        )
        if refusing is None or len(said) >= 10:
            return plain
        return torch.tensor(by_cases(plain.tolist(), other.tolist(), 4.5))

    return [token for token in greedy(logits, NEW, chat.stop) if token not in chat.stop]


def test_one_way_to_decode_at_a_time() -> None:
    settings = EvalSettings(gen=GenSettings(self_cd=1.0, adacd=4.5))
    settings.steering.surgical.refusal_tokens = ["I"]  # else what it is taken from, not resolved
    with pytest.raises(ConfigError, match=r"gen.self_cd=1.0 gen.adacd=4.5: two ways to decode"):
        resolving.check(settings)
