"""Plain passes against the fast ones that entry points hand in: the same up to rounding."""

import ast
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from tiny_run import logged, settings, weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dcr import extensions, train
from dcr.analyses import probability
from dcr.core import generation, learning, passes
from dcr.core.config import Kind
from dcr.core.config.evaluation import GenConfig
from dcr.core.models import Policy, structure
from dcr.core.prompts import IGNORED, ChatFormat
from dcr.core.refusal import opening as refusal
from dcr.core.runs import Run
from dcr.core.sources import Example
from dcr.fast.passes import Fast

ROOT = Path(__file__).parent.parent
BEGUN = "Please tell me, in a few words, "
PROMPTS = [BEGUN + end for end in ("why", "how a kite flies", "who", "when the rain ends at last")]

Found = TypeVar("Found")


@contextmanager
def using(read: Any, learnt: Any) -> Iterator[None]:
    """These passes in place of those of the session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_used", [read])
        patch.setattr(learning, "_used", [learnt])
        yield


def both(work: Callable[[], Found]) -> tuple[Found, Found]:
    """The result with plain passes, and with fast ones."""
    with using(passes.Plain(), learning.Plain()):
        plain = work()
    with using(Fast(), Fast()):
        return plain, work()


def test_a_run_is_the_same(tmp_path: Path) -> None:
    """Stage one, SFT and the readout, without dropout, which the fast passes draw otherwise."""
    names = ("seemingly_toxic", "toxic")
    made = settings(
        tmp_path,
        *(f"sft.readout.{name}=[{tmp_path}/{name}.jsonl]" for name in names),
        *("sft.readout.steps=6", "sft.readout.blocks=1", "sft.readout.batch_size=8"),
        *("dcr.epochs=1", "sft.epochs=1", "sft.lora.dropout=0"),
    )
    folders = iter((tmp_path / "plain", tmp_path / "fast"))

    def trained() -> Path:
        folder = next(folders)
        train.train(made, Run(folder))
        return folder

    plain, fast = both(trained)
    for one, other in zip(logged(plain), logged(fast), strict=True):
        assert one[:3] == other[:3]
        if "per_second" not in one[2] and "seconds" not in one[2]:
            assert other[3] == pytest.approx(one[3], rel=1e-3, abs=1e-5), one
    ours, theirs = weights(fast), weights(plain)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("prompts", [True, False], ids=["prompts", "responses"])
def test_the_nll_of_each_token_and_its_gradient_are_the_same(
    policy: Policy, chat: ChatFormat, prompts: bool
) -> None:
    """Also of those that all rows begin with, which are computed and counted once."""
    rows = [chat.prompt_ids(prompt) for prompt in PROMPTS]
    ids, mask = passes.padded(rows, 0), passes.attention_mask(rows)
    targets = ids.roll(-1, 1).masked_fill(~mask.roll(-1, 1), IGNORED)
    targets[:, -1] = IGNORED
    targets[0, 3] = IGNORED
    if not prompts:
        targets[:, : len(chat.prompt_ids(BEGUN)) - 4] = IGNORED
    model = policy.model.requires_grad_()
    weight = structure.decoder_blocks(model)[0].get_submodule("mlp.up_proj").weight

    def found() -> list[Tensor]:
        got = learning.current().nll(model, ids, mask, targets, block=1)
        assert got.states is not None
        gradient = torch.autograd.grad(got.total + got.states[mask].sum(), [weight])  # pyright: ignore
        return [got.total, got.each, got.states[mask], *gradient]

    for plain, fast in zip(*both(found), strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)


def test_answers_and_what_is_read_off_their_first_token_are_the_same(
    policy: Policy, chat: ChatFormat
) -> None:
    rows = [Example(f"r{i}", prompt, Kind.normal, "test") for i, prompt in enumerate(PROMPTS)]
    openings = refusal.refusal_openings(chat)
    asked = GenConfig(max_new_tokens=12, batch_size=3)

    def answers() -> list[tuple[str, str, int]]:
        done = generation.complete(
            policy, chat, rows, asked, lambda logits: refusal.refusal_mass(logits, openings)
        )
        found = [answer for batch in done for answer in batch]
        masses.append(torch.tensor([answer.refusal_mass for answer in found]))
        return [(answer.id, answer.response, answer.tokens) for answer in found]

    masses: list[Tensor] = []
    plain, fast = both(answers)
    assert fast == plain
    torch.testing.assert_close(masses[1], masses[0], rtol=1e-4, atol=1e-7)


def test_first_logits_and_probabilities_of_phrases_are_the_same(
    policy: Policy, chat: ChatFormat
) -> None:
    chance = random.Random(0)
    encoded = [chat.prompt_ids(prompt + "?" * chance.randrange(9)) for prompt in PROMPTS]

    def found() -> tuple[Any, ...]:
        read = refusal.first_logits(policy.model, encoded)
        logits = {
            place: row for places, rows in read for place, row in zip(places, rows, strict=True)
        }
        return (
            torch.stack([logits[place] for place in range(len(encoded))]),
            *probability.probabilities(policy.model, chat.tokenizer, encoded),
        )

    for plain, fast in zip(*both(found), strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-6)


class Products(TorchDispatchMode):
    """The inputs and weights of linear layers, as torch is asked for their products."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.linear.default:
            self.pairs.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("given", [passes.Plain(), Fast()], ids=["plain", "fast"])
def test_the_head_reads_states_in_one_block_of_memory(
    policy: Policy, chat: ChatFormat, given: Any
) -> None:
    """Else torch copies a frozen head in bf16 for each prompt: 4 GB for 85 of the default model."""
    encoded = [chat.prompt_ids(prompt) for prompt in PROMPTS]
    with using(given, learning.current()), Products() as products:
        for _ in refusal.first_logits(policy.model, encoded):
            pass
    weight = structure.head(policy.model).weight
    read = [states for states, other in products.pairs if other.shape == weight.shape]
    assert read
    assert all(states.is_contiguous() for states in read)


def test_nothing_but_the_table_imports_the_fast_passes() -> None:
    """So that they can go, with their line there, and leave a slower program."""
    importing = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "dcr").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("dcr.fast.")
    }
    assert {name for name in importing if not name.startswith("dcr/fast/")} == {"dcr/extensions.py"}


def test_an_entry_point_hands_in_the_fast_ones() -> None:
    with using(passes.Plain(), learning.Plain()):
        extensions.hand_in_passes()
        assert isinstance(passes.current(), Fast)
        assert isinstance(learning.current(), Fast)
