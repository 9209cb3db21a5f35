"""General ability: our task files against the harness's own, scores against plain forward passes.

The harness's own definitions are read from its installed package and given the same rows in the
schema of the hub's data sets.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from lm_eval.tasks import TaskManager

from dcr.ability import AbilityConfig, questions
from dcr.ability import scores as module
from dcr.ability.scores import ability, check
from dcr.core.config import ConfigError, DataError, LoraConfig
from dcr.core.models import Policy, structure
from tests.tiny_run import DATA, real, write_jsonl

THEIRS = Path(lm_eval.__file__).parent / "tasks"
FOLDERS: list[str | Path] = [THEIRS / n for n in ("mmlu/default", "arc", "openbookqa", "piqa")]
HUB = {
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "openbookqa": ("allenai/openbookqa", "main"),
    "piqa": ("baber/piqa", None),
}
SUBJECTS = sorted(
    file.stem.removeprefix("mmlu_") for file in (THEIRS / "mmlu/default").glob("mmlu_*.yaml")
)
# What templates, quoting and byte counts might stumble over.
ODD = (
    "Which kettle boils first?",
    "  How many {{spoons}} fit {% in %} a 'drawer'?\n",
    'Why is a "blue" door\\gate called café–bar?',
    "7",
    "Line one\nLine two:\ttabbed",
)
OPTIONS = ("a small one", "['x', \"y\"]", "l'été — 夏", "{{none}}", "12\n13")


def invented(count: int, choices: int, split: str, seed: str) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    made = []
    for number in range(count):
        width = choices + (number % 2 if choices > 2 else 0)  # ARC has questions of other widths
        options = [f"{draw.choice(OPTIONS)} {draw.randint(0, 9)}" for _ in range(width)]
        asked = f"{ODD[number % len(ODD)]} {seed} {number}" if number % len(ODD) != 3 else "7"
        made.append(
            {
                "id": f"{seed}-{number}",
                "prompt": asked,
                "choices": options,
                "answer": draw.randrange(width),
                "category": None,
                "split": split,
            }
        )
    return made


@pytest.fixture(scope="session")
def whole_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Invented rows for all five tasks, examples included: read only."""
    root = tmp_path_factory.mktemp("ability")
    for name, made in questions.SETS.items():
        if made.by_subject:
            continue
        choices = 2 if name == "piqa" else 4
        write_jsonl(root / made.asked, invented(6, choices, made.asked_split, f"{name} asked"))
        write_jsonl(root / made.shown, invented(5, choices, made.shown_split, f"{name} shown"))
    # A question that also stands among the examples: the harness does not show it to itself.
    twice = {**invented(1, 2, "train", "piqa asked")[0], "id": "another"}
    piqa = root / questions.SETS["piqa"].shown
    piqa.write_text(piqa.read_text() + json.dumps(twice) + "\n")
    mmlu = []
    for subject in SUBJECTS:
        for split, count in (("dev", 3), ("test", 1 + len(subject) % 3)):
            made = invented(count, 4, split, f"{subject} {split}")
            mmlu += [{**r, "choices": r["choices"][:4], "category": subject} for r in made]
    for row in mmlu:
        row["answer"] = min(row["answer"], 3)
    write_jsonl(root / "mmlu/mmlu.jsonl", mmlu)
    return root


@pytest.fixture
def root(whole_root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_root, tmp_path / "data"))


# --- the harness's own tasks, offline -----------------------------------------------------------


def as_on_the_hub(name: str, row: dict[str, Any]) -> dict[str, Any]:
    if name == "mmlu":
        kept = {"question": row["prompt"], "subject": row["category"]}
        return kept | {"choices": row["choices"], "answer": row["answer"]}
    if name == "piqa":
        one, two = row["choices"]
        return {"goal": row["prompt"], "sol1": one, "sol2": two, "label": row["answer"]}
    # ARC labels some questions by digit; OpenBookQA's key may have a space before it.
    digits = name != "openbookqa" and len(row["prompt"]) % 2
    labels = list("12345" if digits else "ABCDE")[: len(row["choices"])]
    key = labels[row["answer"]]
    if name == "openbookqa":
        question = {"question_stem": row["prompt"], "answerKey": f" {key}"}
    else:
        question = {"question": row["prompt"], "answerKey": key}
    choices = {"text": row["choices"], "label": labels}
    return {"id": row["id"], "choices": choices, **question}


def hub_of(root: Path, *names: str) -> dict[tuple[str, str | None], DatasetDict]:
    found: dict[tuple[str, str | None], dict[str, list[Any]]] = {}
    for name in names or questions.SETS:
        made = questions.SETS[name]
        for file in dict.fromkeys((root / made.asked, root / made.shown)):
            for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
                row = json.loads(line)
                key = ("cais/mmlu", row["category"]) if name == "mmlu" else HUB[name]
                splits = found.setdefault(key, {made.asked_split: [], made.shown_split: []})
                splits[row["split"]].append(as_on_the_hub(name, row))
    return {
        key: DatasetDict({split: Dataset.from_list(made) for split, made in splits.items()})
        for key, splits in found.items()
    }


@pytest.fixture(scope="session")
def index() -> TaskManager:
    """The harness's own definitions of the five tasks alone: all of them take seconds to read."""
    return TaskManager(include_path=FOLDERS, include_defaults=False)


@pytest.fixture(scope="session")
def whole_hub(whole_root: Path) -> dict[tuple[str, str | None], DatasetDict]:
    return hub_of(whole_root)


@pytest.fixture
def serve(index: TaskManager, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub that holds nothing but what it is given."""
    served: dict[tuple[str, str | None], DatasetDict] = {}

    def load_dataset(path: str, name: str | None = None, **_: Any) -> DatasetDict:
        if (path, name) not in served:
            raise ConnectionError(f"Couldn't reach '{path}' on the Hub")
        return served[path, name]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(module, "_harness", lambda: index)
    return served.update


def requests(loaded: Any, shots: int, limit: int | None = None) -> dict[str, list[Any]]:
    """{subject or task: [(context, continuation), target]} in the harness's own order."""
    found = {}
    for name, task in loaded["tasks"].items():
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=limit)
        asked = [(i.doc_id, i.idx, i.args) for i in task.instances]
        targets = [task.doc_to_target(doc) for doc in task.eval_docs]
        assert all(isinstance(target, int) for target in targets)
        found[name.split("::")[-1].removeprefix("mmlu_")] = [asked, targets]
    return found


def both(name: str, root: Path) -> tuple[Any, Any]:
    """The task over local rows, and over the hub's."""
    return module._loaded(name, str(root), name), module._loaded(name, None, name)


@pytest.mark.parametrize("name", questions.SETS)
def test_prompts_options_and_targets_are_the_harness_s_own(
    name: str, whole_root: Path, whole_hub: Any, serve: Any
) -> None:
    serve(whole_hub)
    local, hub = both(name, whole_root)
    for shots in (0, 3):
        ours = requests(local, shots)
        assert ours == requests(hub, shots)
        assert sorted(ours) == (SUBJECTS if name == "mmlu" else [name])
        context, continuation = next(iter(ours.values()))[0][0][2]
        assert context.count("Answer:") == (0 if name == "openbookqa" else shots + 1)
        assert continuation.startswith(" ")


@real
@pytest.mark.parametrize("name", questions.SETS)
def test_prompts_of_the_real_rows_are_the_harness_s_own(name: str, serve: Any) -> None:
    serve(hub_of(Path(DATA), name))
    local, hub = both(name, Path(DATA))
    limit = 10 if name == "mmlu" else None  # of each subject: all 14,042 take half a minute
    ours = requests(local, 0, limit)
    assert ours == requests(hub, 0, limit)
    if name == "mmlu":
        assert requests(local, 5, limit=1) == requests(hub, 5, limit=1)
    assert sum(len(targets) for _, targets in ours.values()) == questions.SETS[name].asked_rows


def test_a_groups_score_is_that_of_its_questions(
    policy: Policy, whole_root: Path, tmp_path: Path
) -> None:
    settings = AbilityConfig(tasks=["mmlu", "piqa"], shots=1, batch_size=8, limit=2)
    ours = ability(policy, settings, str(whole_root), tmp_path, 1234, False)
    assert list(ours) == settings.tasks
    assert ours["mmlu"].keys() - {"subjects"} == ours["piqa"].keys()
    assert ours["piqa"]["shots"] == ours["mmlu"]["shots"] == 1
    assert (ours["mmlu"]["version"], ours["piqa"]["version"]) == ("2", "1.0")
    assert ours["mmlu"]["acc_norm"] is None
    subjects = ours["mmlu"]["subjects"]
    assert sorted(subjects) == SUBJECTS
    right = sum(s["acc"] * s["n"] for s in subjects.values())
    assert ours["mmlu"]["n"] == sum(s["n"] for s in subjects.values())
    assert ours["mmlu"]["acc"] == pytest.approx(right / ours["mmlu"]["n"])


# --- scores by hand -----------------------------------------------------------------------------


def likelihood(policy: Policy, context: str, continuation: str) -> float:
    """Sum of the continuation's log-probabilities, one forward pass without padding or cache."""
    encode = policy.tokenizer.encode
    before, whole = encode(context), encode(context + continuation)
    with torch.no_grad():
        logs = policy.model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logs[t - 1, whole[t]].item() for t in range(len(before), len(whole)))


def by_hand(policy: Policy, asked: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    acc, acc_norm = [], []
    for row in asked:
        context = f"Question: {row['prompt']}\nAnswer:"
        found = [likelihood(policy, context, f" {choice}") for choice in row["choices"]]
        normed = [f / len(c) for f, c in zip(found, row["choices"], strict=True)]
        acc.append(float(found.index(max(found)) == row["answer"]))
        acc_norm.append(float(normed.index(max(normed)) == row["answer"]))
    return acc, acc_norm


def stored(folder: Path) -> list[dict[str, Any]]:
    (file,) = (folder / "ability").glob("*.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_accuracies_are_those_of_plain_forward_passes(
    policy: Policy, root: Path, tmp_path: Path
) -> None:
    asked = invented(12, 4, "test", "by hand")
    write_jsonl(root / "arc_easy/arc_easy_test.jsonl", asked)
    settings = AbilityConfig(tasks=["arc_easy"], batch_size=5)
    found = ability(policy, settings, str(root), tmp_path, 0, False)["arc_easy"]
    acc, acc_norm = by_hand(policy, asked)
    assert [row["acc"] for row in stored(tmp_path)] == acc
    assert [row["acc_norm"] for row in stored(tmp_path)] == acc_norm
    assert found["acc"] == pytest.approx(np.mean(acc))
    assert found["acc_norm"] == pytest.approx(np.mean(acc_norm))
    assert found["acc_stderr"] == pytest.approx(np.std(acc, ddof=1) / 12**0.5)
    assert found["n"] == 12
    first = asked[0]
    context = f"Question: {first['prompt']}\nAnswer:"
    expected = [likelihood(policy, context, f" {choice}") for choice in first["choices"]]
    assert [r[0] for r in stored(tmp_path)[0]["responses"]] == pytest.approx(expected, rel=1e-5)


def test_the_adapter_counts(policy: Policy, whole_root: Path, tmp_path: Path) -> None:
    settings = AbilityConfig(tasks=["openbookqa"])
    ability(policy, settings, str(whole_root), tmp_path / "bare", 0, False)
    lora = LoraConfig(rank=2, alpha=4, dropout=0.5, targets=["q_proj", "v_proj"])
    adapted = structure.add_lora(policy.model, lora, seed=0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    tuned = Policy(adapted.train(), policy.tokenizer, policy.name)
    ability(tuned, settings, str(whole_root), tmp_path / "adapter", 0, False)
    merged = Policy(adapted.merge_and_unload(), policy.tokenizer, policy.name)
    ability(merged, settings, str(whole_root), tmp_path / "merged", 0, False)
    bare, adapter, whole = (
        torch.tensor([r[0] for row in stored(tmp_path / n) for r in row["responses"]])
        for n in ("bare", "adapter", "merged")
    )
    torch.testing.assert_close(adapter, whole, rtol=1e-4, atol=1e-4)  # no dropout either
    assert (adapter - bare).abs().max() > 0.01


# --- what is kept, what is left alone -----------------------------------------------------------


def test_model_tokenizer_and_random_states_stay_as_they_are(
    policy: Policy, whole_root: Path, tmp_path: Path
) -> None:
    policy.model.train()
    policy.model.get_input_embeddings().eval()
    policy.tokenizer.pad_token = None
    before = (
        [m.training for m in policy.model.modules()],
        policy.model.generation_config.to_dict(),
        {name: weight.clone() for name, weight in policy.model.state_dict().items()},
    )
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)
    settings = AbilityConfig(tasks=["arc_easy", "piqa"], shots=1)
    ability(policy, settings, str(whole_root), tmp_path, 0, False)
    assert [m.training for m in policy.model.modules()] == before[0]
    assert policy.model.generation_config.to_dict() == before[1]
    assert all(torch.equal(w, before[2][n]) for n, w in policy.model.state_dict().items())
    assert policy.tokenizer.pad_token is None
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    np.testing.assert_equal(np.random.get_state(legacy=False), states[2])


def test_stored_results_are_reused_until_a_setting_or_the_data_changes(
    policy: Policy, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    run = module._run
    monkeypatch.setattr(module, "_run", lambda *given: (runs.append(1), run(*given))[1])

    def count(root: Path = root, seed: int = 0, **changed: Any) -> int:
        settings = AbilityConfig(**({"tasks": ["piqa"], "limit": 3} | changed))
        runs.clear()
        scores = ability(policy, settings, str(root), tmp_path / "out", seed, False)
        assert scores["piqa"]["limit"] == settings.limit
        return len(runs)

    assert count() == 1
    assert count() == 0
    assert count(seed=1) == 0  # nothing is drawn
    assert count(batch_size=2) == 0
    assert count(limit=2) == 1
    assert count(shots=1) == 1
    assert count(shots=1, seed=1) == 1
    assert count() == 0
    file = root / "piqa/piqa_validation.jsonl"
    file.write_text(file.read_text().replace("kettle", "pan"))
    assert count() == 1


def test_prompts_longer_than_the_context_are_counted(
    policy: Policy, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = policy.model.config.max_position_embeddings
    asked = invented(3, 4, "test", "long")
    fixed = len("Question: \nAnswer: ") + len(asked[0]["choices"][0].encode())
    for row, length in zip(asked, (context + 1, context + 2, 10), strict=True):
        row["choices"], row["answer"] = [asked[0]["choices"][0], "b"], 0
        row["prompt"] = "x" * (length - fixed)  # a byte is a token here
    asked[2]["prompt"] = "short"
    write_jsonl(root / "arc_easy/arc_easy_test.jsonl", asked)
    settings = AbilityConfig(tasks=["arc_easy"], batch_size=1)
    found = ability(policy, settings, str(root), tmp_path, 0, False)["arc_easy"]
    assert found["truncated"] == 1  # the last token is never read, so one more fits
    assert "1 of 3 questions exceed" in caplog.text


# --- faults, before any model -------------------------------------------------------------------


def test_a_whole_folder_passes_and_its_size_is_compared(
    whole_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check(AbilityConfig(shots=3), str(whole_root))
    assert "arc_easy: 6 questions" in caplog.text
    assert "2376 in allenai/ai2_arc" in caplog.text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"tasks": ["mmlu_astronmy"]},
            "ability.tasks=mmlu_astronmy: .*did you mean mmlu_astronomy",
        ),
        ({"tasks": ["zzzzzz"]}, "ability.tasks=zzzzzz: the harness has no such task; `lm_eval"),
        ({"tasks": ["mmlu"], "shots": 4}, "ability.shots=4: mmlu.* has 3 examples"),
        ({"tasks": ["piqa"], "shots": 6}, "ability.shots=6: piqa has 6 .*7 are wanted.*piqa_train"),
        ({"tasks": ["ai2_arc"]}, "ability.tasks=ai2_arc: cannot be loaded .*reach.*leave it out"),
    ],
)
def test_settings_that_cannot_be(
    changed: dict[str, Any], message: str, whole_root: Path, serve: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(AbilityConfig(**changed), str(whole_root))


def test_without_the_hub_the_cure_is_a_local_folder(serve: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ability.tasks=mmlu: .*give data.root=") as caught:
        check(AbilityConfig(tasks=["mmlu"]), None)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"data.root=.*nowhere: not a folder"):
        check(AbilityConfig(), str(tmp_path / "nowhere"))


def test_a_missing_file_and_a_missing_subject(root: Path) -> None:
    (root / "openbookqa/openbookqa_test.jsonl").unlink()
    with pytest.raises(DataError, match=r"openbookqa_test.jsonl: no such file.*leave data.root"):
        check(AbilityConfig(tasks=["openbookqa"]), str(root))
    kept = (root / "mmlu/mmlu.jsonl").read_text().splitlines()
    kept = [line for line in kept if json.loads(line)["category"] != "virology"]
    (root / "mmlu/mmlu.jsonl").write_text("\n".join(kept))
    with pytest.raises(DataError, match="no row with split=test and category=virology"):
        check(AbilityConfig(tasks=["mmlu"]), str(root))


@pytest.mark.parametrize(
    ("name", "changed", "field"),
    [
        ("arc_easy", {"prompt": " "}, "prompt: empty"),
        ("arc_easy", {"choices": "AB"}, "choices: not a list"),
        ("arc_easy", {"choices": ["a", ""]}, "choices: not a list of texts"),
        ("arc_easy", {"choices": ["a"]}, "choices: 1 of them"),
        ("arc_easy", {"answer": 5}, "answer: 5; give the right option's place, 0 to 3"),
        ("arc_easy", {"answer": "B"}, "answer: 'B'"),
        ("arc_easy", {"answer": True}, "answer: True"),
        ("arc_easy", {"split": None}, "split: missing"),
        ("mmlu", {"choices": ["a", "b", "c"]}, "choices: 3 of them, not four"),
        ("mmlu", {"category": None}, "category: missing"),
    ],
)
def test_malformed_rows_are_named_by_line_and_field(
    name: str, changed: dict[str, Any], field: str, root: Path
) -> None:
    file = root / questions.SETS[name].asked
    lines = file.read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[0]), **changed})
    file.write_text("\n".join(lines))
    with pytest.raises(DataError, match=f"{file.name}:3: {field}"):
        check(AbilityConfig(tasks=[name]), str(root))
