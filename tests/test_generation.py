"""Batched greedy completions against transformers one prompt at a time, and their storage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dcr import generation, models, prompts
from dcr.config import DataError, GenConfig, Kind, LoraConfig, ModelConfig, Precision
from dcr.generation import Completion
from dcr.models import Policy
from dcr.prompts import ChatFormat
from dcr.sources import Example

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

PROMPTS = [
    "Hi",
    "How do I kill a Python process that no longer answers?",
    "Write a poem.",
    "Größe 你好 🙂",
    "a",
    "What is the best way to smoke a brisket in a small backyard?",
    "Tell me more, please.",
]
ROWS = [Example(f"p{i}", text, Kind.normal, "made") for i, text in enumerate(PROMPTS)]
NEW = 12


def policy_of(seed: int = 0, context: int = 256) -> Policy:
    shape = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 260,
        "max_position_embeddings": context,
        "initializer_range": 0.6,  # so that what is generated depends on the prompt
    }
    return models.open_policy(ModelConfig(name="tiny", architecture=shape), Precision.fp32, seed)


def chat_of(policy: Policy) -> ChatFormat:
    return prompts.chat_format(policy.tokenizer, ModelConfig(name="tiny"))


def first_token(logits: Tensor) -> Tensor:
    return logits.argmax(1).float()


def run(policy: Policy, batch: int, new: int = NEW, rows: Any = ROWS) -> dict[str, Completion]:
    settings = GenConfig(max_new_tokens=new, batch_size=batch)
    batches = generation.complete(policy, chat_of(policy), rows, settings, first_token)
    return {c.id: c for done in batches for c in done}


def by_hand(policy: Policy, prompt: str, new: int = NEW) -> list[int]:
    """Greedy tokens by one forward pass each, until an end token."""
    chat = chat_of(policy)
    ids, answer = chat.prompt_ids(prompt), []
    while len(answer) < new:
        with torch.inference_mode():
            token = int(policy.model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax())
        answer.append(token)
        if token in chat.stop:
            break
    return answer


@pytest.fixture(scope="module")
def policy() -> Policy:
    return policy_of()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The token ids of every completion, as generated."""
    found: dict[str, list[int]] = {}
    kept = generation._completion

    def note(chat: ChatFormat, row: Example, answer: list[int], mass: float) -> Completion:
        found[row.id] = answer
        return kept(chat, row, answer, mass)

    monkeypatch.setattr(generation, "_completion", note)
    return found


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_batches_say_what_each_prompt_alone_says(
    policy: Policy, decoded: dict[str, list[int]], batch: int
) -> None:
    done = run(policy, batch)
    chat = chat_of(policy)
    answers = {row.id: by_hand(policy, row.prompt) for row in ROWS}
    assert len({tuple(answer) for answer in answers.values()}) >= 4  # they differ
    for row in ROWS:
        truth = answers[row.id]
        assert decoded[row.id][: len(truth)] == truth, row.prompt
        ended = truth[-1] in chat.stop
        words = truth[:-1] if ended else truth
        completion = done[row.id]
        assert completion.response == chat.tokenizer.decode(words, skip_special_tokens=True).strip()  # type: ignore[union-attr]
        assert (completion.tokens, completion.ended) == (len(words), ended)
        assert completion.refusal_mass == truth[0]  # read off the first token's logits


def test_transformers_own_generate_agrees(policy: Policy, decoded: dict[str, list[int]]) -> None:
    run(policy, 4)
    chat = chat_of(policy)
    for row in ROWS:
        ids = torch.tensor([chat.prompt_ids(row.prompt)])
        output = policy.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=list(chat.stop),
            pad_token_id=chat.stop[0],
        )
        truth = output[0, ids.shape[1] :].tolist()
        assert decoded[row.id][: len(truth)] == truth


@pytest.mark.parametrize("which", [0, 1])
def test_every_end_token_ends(policy: Policy, which: int) -> None:
    """A model that says nothing but an end token, whichever it is."""
    chat = chat_of(policy)
    silent = policy_of()
    with torch.no_grad():
        head = models.head(silent.model)
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        head.bias = torch.nn.Parameter(torch.zeros(260))
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
    policy: Policy, decoded: dict[str, list[int]]
) -> None:
    """Qwen2.5-Instruct ships a repetition penalty, which transformers would apply unasked."""
    run(policy, 3)
    plain = dict(decoded)
    bent = policy_of()
    bent.model.generation_config.repetition_penalty = 3.0
    bent.model.generation_config.suppress_tokens = [plain["p0"][0]]
    run(bent, 3)
    assert decoded == plain
    assert bent.model.generation_config.repetition_penalty == 3.0  # and they are kept


def test_an_adapted_model_generates_with_its_adapter(decoded: dict[str, list[int]]) -> None:
    made = policy_of()
    adapted = models.add_lora(made.model, LoraConfig(targets=["all-linear"], dropout=0.5), seed=0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    bent = Policy(adapted.eval(), made.tokenizer, "tiny")
    bent.model.generation_config.repetition_penalty = 3.0
    run(bent, 3)
    for row in ROWS:
        truth = by_hand(bent, row.prompt)
        assert decoded[row.id][: len(truth)] == truth


def test_out_of_memory_halves_the_batch_and_loses_nothing(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(policy, 8)
    sizes: list[int] = []
    kept = generation._complete_batch

    def small(*args: Any) -> list[Completion]:
        sizes.append(len(args[2]))
        if len(args[2]) > 2:
            raise torch.OutOfMemoryError("too much")
        return kept(*args)

    monkeypatch.setattr(generation, "_complete_batch", small)
    assert run(policy, 8) == expected
    assert sizes == [7, 4, 2, 2, 2, 1]
    assert "gen.batch_size is now 2" in caplog.text


def test_out_of_memory_on_one_prompt_is_raised(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> list[Completion]:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(generation, "_complete_batch", never)
    with pytest.raises(torch.OutOfMemoryError):
        run(policy, 8)


def test_a_prompt_beyond_the_context_is_named_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = policy_of(context=64)
    length = len(chat_of(small).prompt_ids(PROMPTS[0]))
    fits = 64 - length
    assert run(small, 1, fits, ROWS[:1])["p0"].id == "p0"
    monkeypatch.setattr(generation, "_complete_batch", None)
    message = rf"made: p0: its {length} tokens and {fits + 1} new ones exceed the model's context"
    with pytest.raises(DataError, match=message):
        run(small, 1, fits + 1, ROWS[:1])


# --- the store ----------------------------------------------------------------------------------

ODD = "two\nlines \u2028 \u2029 \x85 \r\n \x0b 🙂 \u200b end"


def completions(count: int) -> list[Completion]:
    return [Completion(f"i{n}", f"p{n}", f"{ODD}{n}", n, n % 2 == 0, n / 7) for n in range(count)]


def test_what_is_stored_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "set.jsonl"
    made = completions(5)
    assert generation.stored(file) == {}
    generation.store(file, made[:2])
    generation.store(file, made[2:])
    assert list(generation.stored(file).values()) == made
    assert file.read_bytes().count(b"\n") == 5
    assert all(json.loads(line) for line in file.read_bytes().split(b"\n") if line)


def test_any_torn_end_is_left_out_and_written_on_behind(tmp_path: Path) -> None:
    """Wherever a kill tore the last line, within a character too, nothing else is lost."""
    file = tmp_path / "set.jsonl"
    made = completions(4)
    generation.store(file, made[:2])
    first = file.stat().st_size
    generation.store(file, made[2:3])
    whole = file.read_bytes()
    for size in range(first, len(whole) + 1):
        file.write_bytes(whole[:size])
        kept = made[:3] if size >= len(whole) - 1 else made[:2]  # the newline alone may lack
        assert list(generation.stored(file).values()) == kept, size
        generation.store(file, made[3:])
        assert list(generation.stored(file).values()) == [*kept, made[3]], size


def test_the_later_of_two_answers_counts(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    old = Completion("i", "old prompt", "old", 1, True, 0.5)
    new = Completion("i", "new prompt", "new", 1, True, 0.5)
    generation.store(file, [old])
    generation.store(file, [new])
    assert generation.stored(file) == {"i": new}
