"""Whether answers are about their prompts, against loops over one token at a time."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_prompts import needs_smollm2
from tiny_run import failing, write_jsonl

from dcr import relevance
from dcr.core import learning, models
from dcr.core.config import EMBEDDED_MODEL, ModelConfig, Precision
from dcr.core.generation import Completion
from dcr.core.models import Policy
from dcr.fast.passes import Fast
from dcr.relevance import Relevance

PRINTED = {" ": "Ġ", "\n": "Ċ"}  # what byte-level tokenizers call them
PROMPTS = ["How is bread baked?", "Who wrote this?", "Name a river", "a" * 100]
TASK = "dcr.relevance:Relevance"


def by_loops(policy: Policy, answer: str, prompt: str) -> float:
    """The sum of one log-probability a token, each from a pass of its own over what stands before.

    The tiny model's tokens are letters, and it has no token that begins a text.
    """
    letters, parts = policy.tokenizer.get_vocab(), (answer, relevance.BETWEEN, f" {prompt}")
    begun, between, asked = ([letters[PRINTED.get(c, c)] for c in part] for part in parts)
    read, total = begun[:128] + between, 0.0
    for token in asked[:64]:
        with torch.no_grad():
            logits = policy.model(torch.tensor([read])).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[token])
        read.append(token)
    return total


def test_a_likelihood_is_that_of_a_loop(policy: Policy) -> None:
    assert policy.tokenizer.bos_token_id is None
    for answer in ("", "It is baked in an oven. " * 9):
        expected = [by_loops(policy, answer, prompt) for prompt in PROMPTS]
        found = relevance.log_p(policy, answer, PROMPTS).tolist()
        assert found == pytest.approx(expected, abs=1e-3)


def test_a_score_is_the_gain_in_nats_and_counts_prompts_that_gain_as_much(policy: Policy) -> None:
    texts = ["In an oven, slowly.", "Nobody knows.", "The Nile is one.", ""]
    answers = [Completion(str(i), p, t, 1, True, None)
               for i, (p, t) in enumerate(zip(PROMPTS, texts, strict=True))]  # fmt: skip
    rows = [row for batch in Relevance(others=9).read(policy, answers, PROMPTS) for row in batch]
    for answer, row in zip(answers, rows, strict=True):
        gains = {
            prompt: by_loops(policy, answer.response, prompt) - by_loops(policy, "", prompt)
            for prompt in PROMPTS
        }
        own = gains.pop(answer.prompt)
        assert row.nats == pytest.approx(own, abs=2e-3)
        assert row.others == sum(other >= own for other in gains.values())
    assert (rows[3].nats, rows[3].others) == (0, 3)  # an empty answer tells nothing


def test_an_answer_is_read_once_for_all_prompts(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "_used", [Fast()])
    answers = [Completion("", p, "It is baked. " * 20, 1, True, None) for p in PROMPTS]
    list(Relevance().read(policy, answers[:1], PROMPTS))  # tries the packing, on rows of its own
    read: list[int] = []
    embeddings: Any = policy.model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _m, ids, _o: read.append(ids[0].numel()))
    list(Relevance().read(policy, answers, PROMPTS))
    hook.remove()
    between = len(relevance.BETWEEN)
    asked = sum(min(64, 1 + len(prompt)) for prompt in PROMPTS)
    assert sum(read) <= between + asked + len(answers) * (128 + between + asked)


@needs_smollm2
def test_answers_are_about_their_own_prompts_and_not_about_each_other_s() -> None:
    policy = models.open_policy(ModelConfig(name=EMBEDDED_MODEL), Precision.fp32)
    told = {
        "How do I bake bread at home?": "Mix flour, water, salt and yeast, knead the dough and let "
        "it rise. Then put the loaf into a hot oven for forty minutes.",
        "Why is the sky blue?": "Air scatters short waves of sunlight more than long ones, so that "
        "blue light reaches us from above.",
        "Which exercises make my back stronger?": "Deadlifts, rows and planks train the muscles "
        "along your spine. Begin with light weights.",
    }
    right = list(told)
    found = []
    for prompts in (right, [*right[1:], right[0]]):
        pairs = zip(prompts, told.values(), strict=True)
        answers = [Completion("", prompt, text, 1, True, None) for prompt, text in pairs]
        found.append([row.others for (row,) in Relevance().read(policy, answers, right)])
    assert found[0] == [0, 0, 0]
    assert all(found[1])


def test_a_task_gives_shares_with_intervals_and_keeps_what_it_has_read(
    command: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relevance, "MODEL", str(tiny_folder))
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    asked = write_jsonl(Path("asked.jsonl").absolute(), rows)
    words = ("model=tiny", "precision=fp32", "output=run", "gen.max_new_tokens=4",
             "trainer.accelerator=cpu", "trainer.progress=false", "wandb.mode=disabled",
             f"data.evaluation={{over_refusal: [{asked}], safety: []}}",
             f"tasks=[over_refusal,{TASK}]")  # fmt: skip
    ended = command("eval.py", *words)
    assert ended.code == 0, ended.err
    (file,) = Path("run").glob("eval/*/metrics.json")
    own = json.loads(file.read_text())["own"]["Relevance"]
    (kept,) = file.parent.glob("relevance-*/asked.jsonl")
    scores = [json.loads(line) for line in kept.read_text().splitlines()]
    assert own["settings"] == {"others": 10}
    assert own["measured"].keys() == {"asked", "seemingly_toxic"}
    share, low, high = own["measured"]["asked"]["relevant"]
    assert share == sum(score["others"] == 0 for score in scores) / 4
    assert low <= share <= high
    assert math.isclose(own["measured"]["asked"]["nats"], sum(s["nats"] for s in scores) / 4)
    monkeypatch.setattr(models, "open_policy", failing(AssertionError("opened again")))
    assert command("eval.py", *words).code == 0
    assert json.loads(file.read_text())["own"]["Relevance"] == own


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("own.Relevance.others=0", "own.Relevance.others=0: give prompts, 1 or more"),
        ("own.Relevance.other=3", "own.Relevance.other: no such setting; did you mean others?"),
        ("gen.max_new_tokens=auto", f"gen.max_new_tokens=auto tasks=[{TASK}]: answers end where"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(command: Any, word: str, told: str) -> None:
    ended = command(
        "eval.py", "model=tiny", f"tasks=[over_refusal,{TASK}]", "judge=[keyword]", word
    )
    assert ended.code == 2
    assert told in ended.error
