"""Probe-gated refusal against scikit-learn's own decision, single prompts and unedited passes."""

from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from dcr.analyses import separability
from dcr.core import sources
from dcr.core.config import ConfigError
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
from dcr.core.refusal import opening as refusal
from dcr.steering import ProbeConfig, SteeringConfig, edits, probe
from dcr.steering.prompts import Extraction
from tests.shapes import block_outputs, chat_of, outspoken_policy

ROWS = {kind: sources.read(f"contrasts_{kind}")[:24] for kind in ("toxic", "seemingly_toxic")}
ASKED = [row.prompt for row in sources.read("contrasts_toxic_heldout")[:7]]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return outspoken_policy(depth=4)


@pytest.fixture(scope="module")
def chat(policy: Policy) -> ChatFormat:
    return chat_of(policy)


def settings(strength: float, layer: int | None = 3) -> SteeringConfig:
    return SteeringConfig("probe", strength, probe=ProbeConfig(layer))


@pytest.fixture(scope="module")
def made(policy: Policy, chat: ChatFormat) -> Any:
    return probe.find(policy, chat, Extraction(ROWS["toxic"], ROWS["seemingly_toxic"]), settings(1))


def last(policy: Policy, chat: ChatFormat, prompt: str, block: int) -> Tensor:
    return block_outputs(policy.model, chat.prompt_ids(prompt))[block - 1][-1].float()


def log_odds(policy: Policy, chat: ChatFormat, prompts: list[str]) -> Tensor:
    openings, found = refusal.refusal_openings(chat), torch.zeros(len(prompts))
    encoded = [chat.prompt_ids(prompt) for prompt in prompts]
    for places, logits in refusal.first_logits(policy.model, encoded):
        found[places] = refusal.refusal_log_odds(logits, openings)
    return found


def says(policy: Policy, chat: ChatFormat, made: Any, prompts: list[str]) -> Tensor:
    """The probe's score of each prompt."""
    tensors, info = made
    read = torch.stack([last(policy, chat, prompt, info["block"]) for prompt in prompts])
    return read @ tensors["probe"] + info["bias"]


def test_the_weights_are_those_of_the_probe(policy: Policy, chat: ChatFormat, made: Any) -> None:
    rows = [*ROWS["seemingly_toxic"], *ROWS["toxic"]]
    features = torch.stack([last(policy, chat, row.prompt, 3) for row in rows])
    decide = separability.linear_probe(features, torch.tensor([0] * 24 + [1] * 24))
    asked = torch.stack([last(policy, chat, prompt, 3) for prompt in ASKED])
    theirs = torch.from_numpy(decide(asked)).float()
    torch.testing.assert_close(says(policy, chat, made, ASKED), theirs, rtol=1e-2, atol=1e-2)


def test_a_little_strength_adds_as_much_log_odds_as_the_probe_says(
    policy: Policy, chat: ChatFormat, made: Any
) -> None:
    plain, told = log_odds(policy, chat, ASKED), says(policy, chat, made, ASKED)
    strength = 0.02 / told.abs().mean().item()
    with edits.edited(policy.model, probe.edits(policy, chat, made, settings(strength))):
        gained = log_odds(policy, chat, ASKED) - plain
    assert (gained.sign() == told.sign()).all()
    # 1 a log-odds on average over the prompts it was fitted to
    slopes = gained / (strength * told)
    assert 0.3 < slopes.mean().item() < 3


def test_much_strength_leaves_the_probe_alone_to_decide(
    policy: Policy, chat: ChatFormat, made: Any
) -> None:
    told = says(policy, chat, made, ASKED)
    with edits.edited(policy.model, probe.edits(policy, chat, made, settings(3))):
        found = log_odds(policy, chat, ASKED)
    agreement: Any = spearmanr(found, told)
    assert agreement.statistic > 0.9


def test_nothing_behind_the_first_answer_token_is_edited(
    policy: Policy, chat: ChatFormat, made: Any
) -> None:
    ids = torch.tensor([chat.prompt_ids(ASKED[0])])
    token = torch.tensor([[5]])

    def passes() -> list[Tensor]:
        with torch.inference_mode():
            first = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
            second = policy.model(input_ids=token, past_key_values=first.past_key_values)
        return [first.logits, second.logits]

    plain = passes()
    with edits.edited(policy.model, probe.edits(policy, chat, made, settings(5))):
        edited = passes()
    assert not torch.equal(plain[0][:, -1], edited[0][:, -1])
    assert torch.equal(plain[0][:, :-1], edited[0][:, :-1])
    assert torch.equal(plain[1], edited[1])
    begun = torch.cat([ids, token], 1)
    with torch.inference_mode():
        unedited = policy.model(input_ids=begun, attention_mask=torch.ones_like(begun)).logits
        with edits.edited(policy.model, probe.edits(policy, chat, made, settings(5))):
            found = policy.model(input_ids=begun, attention_mask=torch.ones_like(begun)).logits
    assert torch.equal(found, unedited), "an answer that calibration begins"


def test_a_text_without_a_mask_is_not_edited(policy: Policy, chat: ChatFormat, made: Any) -> None:
    assert probe.edits(policy, chat, made, settings(5))(torch.tensor([[1, 2]]), None) == []


def test_the_block_is_three_fifths_of_the_depth_or_the_one_named() -> None:
    assert probe.block_of(30, ProbeConfig()) == 18
    assert probe.block_of(30, ProbeConfig(layer=30)) == 30
    for layer in (0, 31):
        with pytest.raises(
            ConfigError, match=rf"probe.layer={layer}: the model has blocks 1 to 30"
        ):
            probe.block_of(30, ProbeConfig(layer=layer))
