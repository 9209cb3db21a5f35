"""The penalty on repetition against transformers' own, token by token, and where it may not act."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from dcr.calibration import biases
from dcr.core import generation
from dcr.core.config import ConfigError
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
from dcr.extensions import EvalSettings, GenSettings
from dcr.repetition import Penalised
from dcr.results import frame
from tests import test_generation
from tests.shapes import greedy, next_logits
from tests.test_eval import resolved
from tests.test_generation import ROWS, chat_of, first_token

NEW, PENALTY = 24, 1.3


@pytest.fixture(scope="module")
def policy() -> Policy:
    return test_generation.policy_of(max_position_embeddings=512)


def penalised(chat: ChatFormat, penalty: float = PENALTY) -> ChatFormat:
    settings = EvalSettings(gen=GenSettings(repetition_penalty=penalty))
    return Penalised().chat(SimpleNamespace(settings=settings), chat)


def by_hand(policy: Policy, chat: ChatFormat, prompt: str, penalty: float = PENALTY) -> list[int]:
    """One prompt without cache or padding, under transformers' processor."""
    ids = chat.prompt_ids(prompt)
    theirs: Any = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=len(ids))

    def logits(said: list[int]) -> Tensor:
        so_far = ids + said
        return theirs(torch.tensor([so_far]), next_logits(policy.model, so_far)[None].clone())[0]

    return greedy(logits, NEW, chat.stop)


@pytest.mark.parametrize("batch", [1, 4])
def test_answers_are_those_of_transformers_own_penalty(policy: Policy, batch: int) -> None:
    chat = penalised(chat_of(policy))
    settings = GenSettings(max_new_tokens=NEW, batch_size=batch)
    made = generation.complete(policy, chat, ROWS, settings, first_token)
    given = {c.id: c for many in made for c in many}
    assert set(given) == {row.id for row in ROWS}
    plain = {row.id: by_hand(policy, chat, row.prompt, 1.0) for row in ROWS}
    for row in ROWS:
        wanted = by_hand(policy, chat, row.prompt)
        assert given[row.id].response == generation.text(chat, wanted)
        assert given[row.id].refusal_mass == plain[row.id][0], "the first token is left alone"
    assert any(by_hand(policy, chat, row.prompt) != plain[row.id] for row in ROWS)


def test_both_answers_of_a_prompt_are_penalised_from_their_first_token(policy: Policy) -> None:
    chat = penalised(chat_of(policy))
    for many in biases.both_answers(policy, chat, ROWS, NEW):
        for two in many:
            said = two.refusing if two.margin > 0 else two.answering
            wanted = by_hand(policy, chat, two.row.prompt)
            assert generation.text(chat, said) == generation.text(chat, wanted)


def test_words_that_every_answer_begins_with_are_a_part_of_it(policy: Policy) -> None:
    chat = penalised(chat_of(policy))
    assert chat.processor is not None
    begun = replace(chat, prefill="Sure, here is").prompt_ids(ROWS[0].prompt)
    words = begun[len(chat.prompt_ids(ROWS[0].prompt)) :]
    logits = torch.ones(1, 512)
    changed = chat.processor(torch.tensor([begun]), logits)[0] != 1
    assert changed.nonzero()[:, 0].tolist() == sorted(set(words))


def test_a_template_whose_answers_begin_nowhere_is_refused(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = chat_of(policy)
    monkeypatch.setattr(ChatFormat, "lead", lambda _: [])
    assert penalised(chat, 1.0) == chat
    with pytest.raises(ConfigError, match=r"^gen.repetition_penalty=1.3: no token of the chat"):
        penalised(chat)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("gen.repetition_penalty=0.9",), "gen.repetition_penalty=0.9: give 1 or more"),
        (("gen.self_cd=1",), "repetition_penalty=1.2 gen.self_cd=1.0: two ways to decode"),
        (("gen.thinking=8",), "gen.thinking=8: would reach into thoughts; give one"),
        (("tasks=[discernment]",), "it acts while answers are decoded, and discernment"),
        (
            ("endpoint=http://127.0.0.1:9/v1", "endpoint_model=m"),
            r"give 'endpoint_parameters=\{repetition_penalty: 1.2\}'",
        ),
    ],
)
def test_what_it_contradicts_is_refused(overrides: Sequence[str], says: str) -> None:
    model = () if overrides[0].startswith("endpoint") else ("model=tiny",)
    with pytest.raises(ConfigError, match=says):
        resolved(*model, "gen.repetition_penalty=1.2", *overrides)


def test_it_tells_evaluations_apart() -> None:
    settings, _ = resolved("model=tiny", "gen.repetition_penalty=1.2")
    recorded = Penalised().recorded(settings)
    assert frame.edit(recorded) == "repetition_penalty=1.2"
    plain, _ = resolved("model=tiny")
    assert Penalised().recorded(plain) == {}
