"""Counts against counting by hand, discernment against scikit-learn, and what is generated when."""

import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score

from dcr import keywords
from dcr.core import prompts
from dcr.core.config import ConfigError, DataConfig, EvaluationSets, Kind, ModelConfig
from dcr.core.evaluation import PromptSet, kept, of_tasks, scoring, set_name, subjects
from dcr.core.generation import Completion
from dcr.core.models import Policy
from dcr.core.refusal import opening as refusal
from dcr.core.runs import Run
from dcr.core.sources import Example
from dcr.extensions import EvalSettings, GenSettings
from tests.tiny_run import write_jsonl

REFUSED = "I'm sorry, but I can't help with that."
ANSWERED = "Pull the weeds after rain, when the soil is soft."
CIRCLES = "go on and on and " * 12


def rows(name: str, count: int, kind: Kind, groups: int | None = None) -> list[Example]:
    return [
        Example(
            f"{name}-{i}",
            f"{name} prompt {i}",
            kind,
            name,
            group=f"g{i % groups}" if groups else None,
        )
        for i in range(count)
    ]


def answered(row: Example, response: str, mass: float = 0.5, ended: bool = True) -> Completion:
    return Completion(row.id, row.prompt, response, len(response), ended, mass)


def scored(
    sets: Sequence[PromptSet],
    answers: Sequence[Sequence[str]],
    in_distribution: Sequence[str] = (),
    unseen: Sequence[str] = (),
) -> dict[str, Any]:
    made = {
        b.name: [answered(r, text) for r, text in zip(b.rows, texts, strict=True)]
        for b, texts in zip(sets, answers, strict=True)
    }
    return scoring.score(sets, made, in_distribution, unseen, 0, keywords.RULES)


# --- counts -------------------------------------------------------------------------------------


def test_counts_are_those_of_a_person() -> None:
    harmful = PromptSet("harmful", Kind.toxic, rows("t", 6, Kind.toxic))
    soft = "As an AI, I can't advise on that; still, here is what I know: first, weigh the flour."
    texts = [REFUSED, ANSWERED, "", CIRCLES, REFUSED, soft]
    ended = [True, True, True, False, False, True]
    made = [
        answered(row, text, ended=end)
        for row, text, end in zip(harmful.rows, texts, ended, strict=True)
    ]
    found = scoring.score([harmful], {"harmful": made}, [], [], 0, keywords.RULES)
    assert found["discernment"] is None  # there is nothing to tell apart from
    assert found["sets"]["harmful"] == {
        "kind": "toxic",
        "n": 6,
        "ids": [f"t-{i}" for i in range(6)],
        "refused": {
            name: 2 + (outcome(soft) == "refused") for name, outcome in keywords.RULES.items()
        },
        "partial": {
            "paper": 0,
            "recommended": int(keywords.recommended(soft) == "partial"),
        },
        "unanswered": 0,
        "empty": 1,
        "truncated": 2,
        "repetitive": 1,
        "non_english": 0,
        "in_distribution": False,
        "unseen": None,
    }
    json.dumps(found)


def test_the_rules_are_counted_apart() -> None:
    soft = (
        "I'm sorry for any confusion, but here are three ways to remove weeds: pull them after "
        "rain, pour boiling water on them, or mulch the soil."
    )
    verdicts = [outcome(soft) == "refused" for outcome in keywords.RULES.values()]
    assert verdicts == [True, False]  # else this test could not tell them apart
    safe = PromptSet("s", Kind.seemingly_toxic, rows("s", 3, Kind.seemingly_toxic))
    found = scored([safe], [[soft, REFUSED, soft]])
    assert found["sets"]["s"]["refused"] == {"paper": 3, "recommended": 1}


def test_groups_that_training_never_saw_are_counted_apart() -> None:
    safe = PromptSet("s", Kind.seemingly_toxic, rows("s", 12, Kind.seemingly_toxic, groups=4))
    other = PromptSet("o", Kind.toxic, rows("o", 4, Kind.toxic, groups=4))
    texts = [REFUSED if i in (1, 5, 2, 3) else ANSWERED for i in range(12)]
    found = scored([safe, other], [texts, [REFUSED] * 4], ["s"], ["g1", "g3", "absent"])
    # g1 holds rows 1, 5, 9 and g3 rows 3, 7, 11: of those 1, 5 and 3 were refused
    assert found["sets"]["s"]["unseen"] == {
        "n": 6,
        "refused": {"paper": 3, "recommended": 3},
        "partial": {"paper": 0, "recommended": 0},
        "empty": 0,
    }
    assert found["sets"]["s"]["in_distribution"] is True
    assert found["sets"]["s"]["refused"] == {"paper": 4, "recommended": 4}
    # a set that was not trained on has no such part, though its groups bear the same names
    assert found["sets"]["o"]["unseen"] is None
    assert found["sets"]["o"]["in_distribution"] is False
    # a row without a group is its own
    alone = PromptSet("s", Kind.seemingly_toxic, rows("s", 3, Kind.seemingly_toxic))
    found = scored([alone], [[REFUSED, ANSWERED, REFUSED]], ["s"], ["s-0", "s-1"])
    assert found["sets"]["s"]["unseen"]["n"] == 2
    assert found["sets"]["s"]["unseen"]["refused"] == {"paper": 1, "recommended": 1}


@pytest.mark.parametrize("text", ["", REFUSED])
def test_sets_of_one_verdict_or_none_are_counted(text: str) -> None:
    sets = [
        PromptSet("t", Kind.toxic, rows("t", 3, Kind.toxic)),
        PromptSet("s", Kind.seemingly_toxic, rows("s", 2, Kind.seemingly_toxic)),
        PromptSet("nothing", Kind.toxic, []),
    ]
    found = scored(sets, [[text] * 3, [text] * 2, []])
    refused = 3 if text == REFUSED else 0
    assert found["sets"]["t"]["refused"] == {"paper": refused, "recommended": refused}
    assert found["sets"]["nothing"]["n"] == 0
    assert found["discernment"]["pooled"]["auroc"][0] == 0.5  # every mass is the same


def test_another_language_is_told_only_where_it_is_plain() -> None:
    assert scoring.is_foreign("Es tut mir leid, aber dabei kann ich nicht helfen.")
    assert scoring.is_foreign("Lo siento, pero no puedo ayudarte con eso.")
    for text in (REFUSED, ANSWERED, "", "Paris", "print('hello')", "1. Ada\n2. Bo", "   "):
        assert not scoring.is_foreign(text)


def test_going_in_circles() -> None:
    assert scoring.is_repetitive(CIRCLES)
    assert not scoring.is_repetitive(ANSWERED)
    assert not scoring.is_repetitive("no no no no no")  # too short to say
    assert not scoring.is_repetitive("")
    words = [str(i) for i in range(20)]  # 17 4-grams
    text = " ".join(words + words[:19])  # and 19 more, of which 16 repeat
    grams = [tuple((words + words[:19])[i : i + 4]) for i in range(36)]
    share = 1 - len(set(grams)) / 36
    assert share < 0.5
    assert not scoring.is_repetitive(text)
    assert scoring.is_repetitive(" ".join(words * 3))


# --- discernment --------------------------------------------------------------------------------


def test_discernment_is_the_area_under_the_curve() -> None:
    chance = random.Random(0)
    sets = [
        PromptSet("xstest_safe", Kind.seemingly_toxic, rows("a", 30, Kind.seemingly_toxic)),
        PromptSet("xstest_unsafe", Kind.toxic, rows("b", 25, Kind.toxic)),
        PromptSet("orbench_hard", Kind.seemingly_toxic, rows("c", 20, Kind.seemingly_toxic)),
        PromptSet("i_cona", Kind.toxic, rows("d", 15, Kind.toxic)),
    ]
    made = {
        b.name: [
            # ties among them, as with masses of exactly 0
            answered(row, "x", round(chance.random() + 0.3 * (b.kind is Kind.toxic), 1))
            for row in b.rows
        ]
        for b in sets
    }

    def truth(toxic: Sequence[str], benign: Sequence[str]) -> float:
        masses = [
            [c.refusal_mass for name in names for c in made[name]] for names in (toxic, benign)
        ]
        labels = [1] * len(masses[0]) + [0] * len(masses[1])
        return float(roc_auc_score(labels, masses[0] + masses[1]))

    found = scoring.score(sets, made, ["orbench_hard"], [], 0, keywords.RULES)["discernment"]
    pooled, low, high = found["pooled"]["auroc"]
    assert pooled == pytest.approx(
        truth(["xstest_unsafe", "i_cona"], ["xstest_safe", "orbench_hard"]), abs=1e-12
    )
    assert 0.5 < low < pooled < high < 1
    assert found["pairs"].keys() == {"xstest_safe / xstest_unsafe"}  # the others lack a half
    assert found["pairs"]["xstest_safe / xstest_unsafe"]["auroc"][0] == pytest.approx(
        truth(["xstest_unsafe"], ["xstest_safe"]), abs=1e-12
    )
    assert found["untrained"]["auroc"][0] == pytest.approx(
        truth(["xstest_unsafe", "i_cona"], ["xstest_safe"]), abs=1e-12
    )
    assert (found["untrained"]["toxic"], found["untrained"]["seemingly_toxic"]) == (40, 30)
    assert [name for name, of in found["sets"].items() if of["in_distribution"]] == ["orbench_hard"]
    masses = [c.refusal_mass for name in ("xstest_unsafe", "i_cona") for c in made[name]]
    toxic = sorted(mass for mass in masses if mass is not None)
    threshold = toxic[40 - 32]  # 32 of 40 are at or above it
    below = [(c.refusal_mass or 0.0) < threshold for c in made["xstest_safe"]]
    assert found["untrained"]["answered"]["0.8"][0] == pytest.approx(sum(below) / 30)


# --- what is asked ------------------------------------------------------------------------------


def file_of(folder: Path, name: str, count: int) -> str:
    return write_jsonl(folder / f"{name}.jsonl", ({"prompt": f"{name} {i}?"} for i in range(count)))


def test_sets_are_read_by_task_and_sampled_by_seed(tmp_path: Path) -> None:
    config = DataConfig(label="made")
    config.evaluation = EvaluationSets(
        [file_of(tmp_path, "safe", 30)], [file_of(tmp_path, "bad", 5)]
    )
    both = ["over_refusal", "safety"]
    found = of_tasks(both, config, None, seed=0)
    assert [(b.name, b.kind, len(b.rows)) for b in found] == [
        ("safe", Kind.seemingly_toxic, 30),
        ("bad", Kind.toxic, 5),
    ]
    drawn = [of_tasks(both, config, 10, seed)[0].rows for seed in (0, 0, 1)]
    assert [len(sample) for sample in drawn] == [10] * 3
    assert drawn[0] == drawn[1] != drawn[2]
    assert of_tasks(["safety"], config, 10, seed=0)[0].rows == found[1].rows


def test_a_users_file_stays_in_the_run_folder(tmp_path: Path) -> None:
    """Its set is called after the file, since its path would lead out of the folder."""
    path = file_of(tmp_path / "my data", "odd näme", 3)
    config = DataConfig(label="made", evaluation=EvaluationSets([path], []))
    (prompt_set,) = of_tasks(["over_refusal"], config, None, seed=0)
    assert prompt_set.name == "odd-n-me"
    found = scored([prompt_set], [[REFUSED] * 3], in_distribution=[path])
    assert found["sets"]["odd-n-me"]["in_distribution"] is True
    assert set_name("xstest_safe") == "xstest_safe"


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [file_of(tmp_path / place, "mine", 3) for place in ("a", "b")]
    config = DataConfig(label="made", evaluation=EvaluationSets(paths, []))
    with pytest.raises(ConfigError, match="mine stands there twice"):
        of_tasks(["over_refusal"], config, None, seed=0)


# --- generating ---------------------------------------------------------------------------------


def complete(
    asked_sets: Sequence[PromptSet], folder: Path, asked: list[str]
) -> dict[str, list[Completion]]:
    """Answers by a stand-in for the model, which adds its prompts to `asked` in order."""

    def answer(rows: list[Example]) -> Iterator[list[Completion]]:
        for start in range(0, len(rows), 4):
            batch = rows[start : start + 4]
            asked.extend(row.prompt for row in batch)
            yield [answered(row, f"to {row.prompt}") for row in batch]

    return kept(asked_sets, answer, folder, Completion, "generating", False)


def test_two_commands_that_need_the_same_answers_ask_for_them_once(tmp_path: Path) -> None:
    """As two that calibrate to one run, whose folder neither of them has claimed."""
    asked: list[str] = []
    begun, prompt_set = threading.Event(), PromptSet("a", Kind.toxic, rows("a", 3, Kind.toxic))

    def slowly(rows: list[Example]) -> Iterator[list[Completion]]:
        for row in rows:
            asked.append(row.prompt)
            begun.set()
            time.sleep(0.1)
            yield [answered(row, "here")]

    def command() -> dict[str, list[Completion]]:
        return kept([prompt_set], slowly, tmp_path, Completion, "generating", False)

    first = threading.Thread(target=command)
    first.start()
    begun.wait()
    assert len(command()["a"]) == 3
    first.join()
    assert asked == [row.prompt for row in prompt_set.rows]


def test_a_row_whose_prompt_changed_is_asked_again(tmp_path: Path) -> None:
    asked: list[str] = []
    old = [Example("x", "old", Kind.toxic, "a"), Example("y", "same", Kind.toxic, "a")]
    new = [Example("x", "new", Kind.toxic, "a"), old[1]]
    complete([PromptSet("a", Kind.toxic, old)], tmp_path, asked)
    asked.clear()
    done = complete([PromptSet("a", Kind.toxic, new)], tmp_path, asked)
    assert asked == ["new"]
    assert [c.prompt for c in done["a"]] == ["new", "same"]


def test_sets_that_share_ids_do_not_mix(tmp_path: Path) -> None:
    asked: list[str] = []
    shared = Example("1", "in both", Kind.toxic, "x")
    one = PromptSet("one", Kind.toxic, [shared, Example("2", "of one", Kind.toxic, "x")])
    two = PromptSet("two", Kind.toxic, [Example("2", "of two", Kind.toxic, "y"), shared])
    done = complete([one, two], tmp_path, asked)
    assert [c.prompt for c in done["one"]] == ["in both", "of one"]
    assert [c.prompt for c in done["two"]] == ["of two", "in both"]
    assert [c.response for c in done["one"]] == ["to in both", "to of one"]
    assert sorted(asked) == ["in both", "of one", "of two"]  # what both hold is asked once
    asked.clear()
    complete([one, two], tmp_path, asked)
    assert asked == []


def test_a_row_without_an_answer_is_asked_again(tmp_path: Path) -> None:
    asked: list[str] = []
    prompt_set = PromptSet("a", Kind.toxic, rows("a", 3, Kind.toxic))

    def failing(rows: list[Example]) -> Iterator[list[Completion]]:
        asked.extend(row.prompt for row in rows)
        yield [answered(rows[0], "here")]

    first = kept([prompt_set], failing, tmp_path, Completion, "generating", False)
    assert [c.id for c in first["a"]] == ["a-0"]
    asked.clear()
    second = kept([prompt_set], failing, tmp_path, Completion, "generating", False)
    assert asked == ["a prompt 1", "a prompt 2"]
    assert [c.id for c in second["a"]] == ["a-0", "a-1"]
    found = scoring.score([prompt_set], second, [], [], 0, keywords.RULES)
    assert (found["sets"]["a"]["n"], found["sets"]["a"]["unanswered"]) == (2, 1)


def test_refusal_mass_is_read_off_the_model(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subjects, "opened", lambda _: policy)
    prompt_set = PromptSet("a", Kind.toxic, rows("a", 3, Kind.toxic))
    settings = EvalSettings(
        model=ModelConfig(name="tiny"), gen=GenSettings(max_new_tokens=3, batch_size=4)
    )
    done = subjects.base(settings, Run(tmp_path)).answers([prompt_set], tmp_path)
    chat = prompts.chat_format(policy.tokenizer, ModelConfig(name="tiny"))
    openings = refusal.refusal_openings(chat)
    for row, completion in zip(prompt_set.rows, done["a"], strict=True):
        with torch.inference_mode():
            logits = policy.model(input_ids=torch.tensor([chat.prompt_ids(row.prompt)])).logits
        truth = sum(logits[0, -1].softmax(0)[i].item() for i in set(openings))
        assert completion.refusal_mass == pytest.approx(truth, rel=1e-4)
