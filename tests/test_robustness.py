"""Answers under attack against greedy decoding by hand, and the task from command to page."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.nn import functional as F
from transformers import RepetitionPenaltyLogitsProcessor

from dcr import builtin, outcomes, results
from dcr.core import generation, prompts, storage
from dcr.core.config import Kind, LoraConfig, ModelConfig, Precision
from dcr.core.generation import Completion
from dcr.core.models import Policy, structure
from dcr.core.prompts import ChatFormat
from dcr.core.refusal import opening as refusal
from dcr.core.sources import Example
from dcr.export import _attacked
from dcr.extensions import EvalSettings
from dcr.report import building, figures
from dcr.report.records import read_run
from dcr.report.sections import Selection
from dcr.robustness import TuningConfig, attacked, tuning
from tests.shapes import greedy, next_logits
from tests.tiny_run import failing

SHAPE = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260,
    "max_position_embeddings": 512, "initializer_range": 0.6,
}  # fmt: skip
MODEL = ModelConfig(name="tiny", label="tiny", template="chatml", architecture=SHAPE)
NEW = 6
ATTACKS = "none,prefill,ablation,system,past_tense,third_person,tuning,tuning_recalibrated"
CARD = "behind an opening of 31 to 60 tokens"


@pytest.fixture
def random() -> Policy:
    return builtin.random_policy(MODEL, 3)


@pytest.fixture
def talk(random: Policy) -> ChatFormat:
    return prompts.chat_format(random.tokenizer, MODEL)


# --- what the model is asked ----------------------------------------------------------------------


def test_openings_are_clean_and_each_stands_once() -> None:
    texts = attacked.openings()
    assert len(set(texts)) == len(texts) > 30
    for text in texts:
        assert text == text.strip() != ""
        assert text.replace("\n", "").isprintable()


def test_a_prefilled_opening_is_one_of_ours_and_of_the_length_asked_for(talk: ChatFormat) -> None:
    encode, found = attacked.prefilled(31, 60, 0, talk), []
    for i in range(40):
        prompt = f"Why {i}?"
        ids, plain = encode(prompt), talk.prompt_ids(prompt)
        assert ids[: len(plain)] == plain
        found.append(talk.tokenizer.decode(ids[len(plain) :]))
        assert 31 <= len(ids) - len(plain) <= 60
    assert len(set(found)) > 5
    assert set(found) <= set(attacked.openings())
    assert encode("Why 3?") == attacked.prefilled(31, 60, 0, talk)("Why 3?")


def test_a_system_prompt_that_asks_to_comply_stands_before_the_prompt(talk: ChatFormat) -> None:
    told = str(talk.tokenizer.decode(attacked.asked_to_comply(talk)("x")))
    assert told.startswith(f"<|im_start|>system\n{attacked.SYSTEM}<|im_end|>")
    assert told.endswith(talk.text("x"))


def by_hand(
    policy: Policy, talk: ChatFormat, ids: list[int], penalty: float = 1.0, asked: int = 0
) -> str:
    """Greedy tokens, a forward pass each; those behind the first `asked` are penalised."""
    theirs: Any = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=asked)

    def logits(said: list[int]) -> torch.Tensor:
        read = ids + said
        return theirs(torch.tensor([read]), next_logits(policy.model, read)[None].clone())[0]

    return generation.text(talk, greedy(logits, NEW, talk.stop))


# --- harmless tuning ------------------------------------------------------------------------------


def test_tuning_takes_adamw_s_steps_on_the_answers(random: Policy, talk: ChatFormat) -> None:
    """Against a loop over steps; with all rows in a batch their order tells nothing."""
    rows = [Example(f"r{i}", f"Say {i}", Kind.normal, "s", f"abc {i}" * i) for i in range(1, 4)]
    settings = EvalSettings(model=MODEL, precision=Precision.fp32)
    lora = LoraConfig(targets=["q_proj", "down_proj"], dropout=0.0)
    one, other = (structure.add_lora(builtin.random_policy(MODEL, 3).model, lora, 0) for _ in "12")
    options = TuningConfig(steps=4, batch_size=3, lr=3e-3)
    tuning.fit(one, talk, rows, options, settings, guarded=False)

    weights = [p for p in other.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0)
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 4)
        losses = []
        for row in rows:
            start = talk.prompt_ids(row.prompt)
            ids, _ = talk.pair(row.prompt, row.response or "", 256)
            logits = other(input_ids=torch.tensor([ids])).logits[0]
            answer = torch.tensor(ids[len(start) :])
            losses.append(F.cross_entropy(logits[len(start) - 1 : -1], answer, reduction="none"))
        torch.cat(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def ran(command: Any, random: Policy, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command on a random model, of which a first letter decides whether it refuses."""
    monkeypatch.setattr(refusal, "is_refusal", lambda text, *_: text[:1] in ("I", *"NAMSU"))
    folder = Path("model").absolute()
    random.model.save_pretrained(folder)
    random.tokenizer.save_pretrained(folder)

    def run(*more: str) -> dict[str, Any]:
        ended = command(
            *("eval.py", f"model.name={folder}", "model.template=chatml", "output=run"),
            *("data=demo", "tasks=[robustness]", "limit=4", f"gen.max_new_tokens={NEW}"),
            *("calibrate=0.5", f"robustness.attacks=[{ATTACKS}]", "robustness.lengths=[30,60,90]"),
            *("robustness.tuning.steps=2", "robustness.tuning.batch_size=2", "model.sft_lr=1e-2"),
            *("steering.surgical.train=8", "precision=fp32", "trainer.accelerator=cpu"),
            *("trainer.progress=false", "wandb.mode=disabled", *more),
        )
        assert ended.code == 0, ended.err
        file = max(Path("run").glob("eval/*/metrics.json"), key=lambda f: f.stat().st_mtime)
        return json.loads(file.read_text()).get("robustness", {}) | {"folder": file.parent}

    return run


def untold(found: dict[str, Any]) -> dict[str, Any]:
    """All but rankings, whose bootstrap a mass's last bit may move."""
    attacks = {label: of | {"ranking": None} for label, of in found.items() if label != "folder"}
    return attacks | {"folder": found["folder"]}


def test_every_attack_is_answered_counted_kept_and_told(
    ran: Any, random: Policy, talk: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ran()
    folder = found.pop("folder")
    labels = [*ATTACKS.replace("prefill", "prefill_1_30,prefill_31_60,prefill_61_90").split(",")]
    assert [*found] == labels
    stored: dict[str, list[Completion]] = {}
    for label in labels:
        (place,) = [folder] if label == "none" else folder.glob(f"robustness/{label}-????????????")
        rows = storage.read_lines(place / "demo_toxic_heldout.jsonl", Completion)
        stored[label], counts = rows, found[label]["sets"]["demo_toxic_heldout"]
        told = [outcomes.outcome(row.prompt, row.response, row.ended).value for row in rows]
        assert {k: n for k, n in counts["outcomes"].items() if n} == {
            each: told.count(each) for each in set(told)
        }
        assert counts["n"] == len(rows) == 4
        assert (found[label]["ranking"] is None) == label.startswith("prefill")
    # behind an opening no bias acts, and the opening is no part of what is judged
    for row in stored["prefill_31_60"]:
        ids = attacked.prefilled(31, 60, 0, talk)(row.prompt)
        assert row.response == by_hand(random, talk, ids)
    assert found["none"]["bias"] == found["system"]["bias"] == found["tuning"]["bias"]
    assert found["tuning_recalibrated"]["bias"] != found["tuning"]["bias"]
    assert stored["tuning"] != stored["none"]

    frame = results.load("run")
    about = {"quantity": "robustness/prefill_31_60/circular", "set": "demo_toxic_heldout"}
    (row,) = frame.loc[(frame[list(about)] == pd.Series(about)).all(axis=1)].to_dict("records")
    circular = found["prefill_31_60"]["sets"]["demo_toxic_heldout"]["outcomes"]["circular"]
    told = {key: row[key] for key in ("count", "n", "kind", "judge")}
    assert told == {"count": circular, "n": 4, "kind": "toxic", "judge": "outcome"}
    lines = _attacked(frame)
    assert [line["attack"] for line in lines][2] == CARD
    apart = frame.loc[frame["kind"] == "seemingly_toxic"].assign(set="coconot_safety")
    assert _attacked(pd.concat([frame, apart])) == lines, "a set that is never pooled"

    # a killed command asks for what lacks, and one that lacks nothing opens nothing
    (file,) = folder.glob("robustness/system-*/demo_toxic_heldout.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:1]) + lines[1][:9])
    assert untold(ran()) == untold(found | {"folder": folder})
    again = storage.read_lines(file, Completion)  # masses differ by a batch's rounding
    assert [row.response for row in again] == [row.response for row in stored["system"]]
    monkeypatch.setattr(tuning, "tuned", failing(AssertionError("tuned again")))
    assert untold(ran()) == untold(found | {"folder": folder})


def test_a_penalty_on_repetition_acts_behind_an_attack_too(
    ran: Any, random: Policy, talk: ChatFormat
) -> None:
    """On the tokens of the opening and of the answer, as transformers' own does."""
    words = "robustness.attacks=[prefill]", "robustness.lengths=[30,60]"
    folders = [ran(*words, *more)["folder"] for more in ((), ("gen.repetition_penalty=1.5",))]
    assert folders[0] != folders[1]
    kept = []
    for folder in folders:
        (file,) = folder.glob("robustness/prefill_31_60-*/demo_toxic_heldout.jsonl")
        kept.append({row.prompt: row.response for row in storage.read_lines(file, Completion)})
    assert kept[0] != kept[1]
    for prompt, response in kept[1].items():
        ids = attacked.prefilled(31, 60, 0, talk)(prompt)
        assert response == by_hand(random, talk, ids, 1.5, len(talk.prompt_ids(prompt)))


def test_the_direction_taken_away_is_that_of_steering(ran: Any) -> None:
    plain, ablated, steered = (
        ran("calibrate=null", *words)["folder"]
        for words in (
            ["robustness.attacks=[none]"],
            ["robustness.attacks=[ablation]"],
            ["tasks=[safety]", "steering=ablation"],
        )
    )
    (place,) = ablated.glob("robustness/ablation-*")
    one, other, third = (
        [row.response for row in storage.read_lines(file, Completion)]
        for file in (f / "demo_toxic_heldout.jsonl" for f in (place, steered, plain))
    )
    assert one == other
    assert one != third


def test_page_and_card_pool_the_sets_of_a_kind(tmp_path: Path) -> None:
    def counts(kind: str, n: int, **outcomes: int) -> dict[str, Any]:
        return {"kind": kind, "n": n, "refused": 0, "outcomes": outcomes}

    sets = {
        "bad": counts("toxic", 10, refused=4, answered=6),
        "worse": counts("toxic", 30, refused=6, circular=24),
        "safe": counts("seemingly_toxic", 20, answered=15, refused=5),
    }
    ranking = {"toxic": 40, "seemingly_toxic": 20, "auroc": [0.66, 0.5, 0.8]}
    ranking |= {"answered": {}, "refused": {}}
    attacks = {"none": {"sets": sets, "ranking": ranking}, "prefill_6_10": {"sets": sets}}
    metrics = {"version": 2, "weights": "base", "method": "base", "robustness": attacks}
    storage.write_json(tmp_path / "run/eval/base-1/metrics.json", metrics)
    told = building.build([tmp_path / "run"], tmp_path / "page.html")
    assert told.count("25.0 [14–40]") == told.count("75.0 [53–89]") == 2
    assert told.count("0.66 [.50–.80]") == 1
    page = (tmp_path / "page.html").read_text()
    assert "behind an opening of 6 to 10 tokens" in page
    assert "Outcomes under attack" in page
    none, prefill = _attacked(results.load(tmp_path / "run"))
    shares = {"refused": "25% (14% to 40%)", "toxic": "40"}
    shares |= {"answered": "75% (53% to 89%)", "seemingly_toxic": "20"}
    assert none == shares | {"attack": "no attack"}
    assert prefill == shares | {"attack": "behind an opening of 6 to 10 tokens"}
    storage.write_json(tmp_path / "run/eval/base-2/metrics.json", metrics)
    assert _attacked(results.load(tmp_path / "run")) == [none, prefill] * 2, "never added up"


def test_bars_and_marks_under_attack_are_those_of_their_run(tmp_path: Path) -> None:
    of = {"kind": "toxic", "n": 4, "refused": 0, "outcomes": {"refused": 1, "answered": 3}}
    ranking = {"toxic": 4, "seemingly_toxic": 4, "auroc": [0.7, 0.5, 0.8]}
    attacks = {"none": {"sets": {"xstest_safe": of}, "ranking": ranking}}
    for seed in ("0", "1"):
        about = {"weights": "sft", "method": "dcr", "seed": seed, "robustness": attacks}
        run = tmp_path / seed
        storage.write_json(run / "eval/sft-1/metrics.json", {"version": 2, **about})
        known = {"rows": {}, "in_distribution": ["xstest_safe"] if seed == "1" else []}
        storage.write_json(run / "rows.json", known)
    runs = [tmp_path / "0", tmp_path / "1"]
    chosen = Selection.of([read_run(run) for run in runs])
    (drawing,) = chosen.section("robustness_bars").drawings
    assert list(drawing.blocks) == ["DCR seed 0", "DCR seed 1"]
    assert "DCR seed 1" in figures.inline(drawing)
    refused, auroc = (block.rows[0] for block in chosen.section("robustness").blocks)
    assert [cell.marks for row in (refused, auroc) for cell in row.values] == ["", "†"] * 2
    assert "† in-distribution" in building.build(runs, tmp_path / "page.html")
    # the data frame tells the same of sets that were attacked alone
    assert [set(results.load(run).in_distribution) for run in runs] == [{False}, {True}]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("robustness.attacks=[sesame]", "robustness.attacks=[sesame]: choose one of none, prefill"),
        ("robustness.attacks=[none,none]", "name each attack once"),
        ("robustness.lengths=[5,5]", "robustness.lengths=[5, 5]: give rising numbers of tokens"),
        ("robustness.attacks=[tuning_recalibrated]", "give calibrate=<share>"),
        ("robustness.tuning.steps=0", "robustness.tuning.steps=0: give steps, 1 or more"),
        ("gen.prefill=Sure", "gen.prefill=Sure: attacks the model as it answers by itself"),
        ("steering=scans", "steering=scans: attacks the model as it answers by itself"),
        ("gen.max_new_tokens=auto", "gen.max_new_tokens=auto tasks=[robustness]: answers end"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(command: Any, word: str, told: str) -> None:
    ended = command("eval.py", "model=tiny", "tasks=[robustness]", "judge=[keyword]", word)
    assert ended.code == 2
    assert told in ended.error
