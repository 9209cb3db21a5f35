"""The embedded corpus keeps what it promises: enough of each kind, in pairs, and nothing leaks."""

import json
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

import dcr
from dcr import balance, contamination, data, refusal, sources
from dcr.config import DataConfig, EvaluationSets, SafetyPairsConfig, SourceConfig
from dcr.text import normalise

FOLDER = Path(dcr.__file__).parent / "demo"
KINDS = ("toxic", "seemingly_toxic", "normal")
SPLITS = ("train", "heldout")
RULES = ("paper", "recommended")


def read(kind: str, split: str) -> list[dict[str, Any]]:
    text = (FOLDER / f"{kind}.{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


CORPUS = {(kind, split): read(kind, split) for kind in KINDS for split in SPLITS}
EVERY_ROW = list(chain(*CORPUS.values()))
TRAINING = [(kind, "train") for kind in KINDS]


def question(prompt: str) -> bool:
    return prompt.rstrip().endswith("?")


def test_there_is_enough_of_every_kind() -> None:
    total = {kind: sum(len(CORPUS[kind, split]) for split in SPLITS) for kind in KINDS}
    assert total["seemingly_toxic"] >= 160
    assert total["toxic"] >= 380
    assert total["normal"] >= 240
    assert all(len(CORPUS[kind, "heldout"]) >= 80 for kind in KINDS)
    assert sum(bool(row.get("response")) for row in CORPUS["toxic", "train"]) >= 80
    assert all(row["response"].strip() for row in CORPUS["normal", "train"])


def test_files_hold_nothing_else() -> None:
    names = {f"{kind}.{split}.jsonl" for kind, split in CORPUS}
    assert {file.name for file in FOLDER.glob("*.jsonl")} == names
    known = {"id", "prompt", "category", "pair", "response"}
    assert all(set(row) <= known and {"id", "prompt", "category"} <= set(row) for row in EVERY_ROW)


def test_ids_and_prompts_are_unique_across_files() -> None:
    ids = Counter(row["id"] for row in EVERY_ROW)
    assert ids.most_common(1)[0][1] == 1
    prompts = Counter(normalise(row["prompt"]) for row in EVERY_ROW)
    assert prompts.most_common(1)[0][1] == 1


@pytest.mark.parametrize("split", SPLITS)
def test_pairs_are_whole_and_share_their_form(split: str) -> None:
    sides = [
        {row["pair"]: row for row in CORPUS[kind, split] if row.get("pair")}
        for kind in ("seemingly_toxic", "toxic")
    ]
    assert sides[0].keys() == sides[1].keys()
    assert all(row.get("pair") for row in CORPUS["seemingly_toxic", split])
    for pair, safe in sides[0].items():
        assert question(safe["prompt"]) == question(sides[1][pair]["prompt"]), pair
        assert safe["category"] == sides[1][pair]["category"], pair
        assert safe["prompt"].split()[0] == sides[1][pair]["prompt"].split()[0], pair


@pytest.mark.parametrize("place", list(CORPUS), ids=".".join)
def test_both_forms_stand_in_every_class(place: tuple[str, str]) -> None:
    rows = CORPUS[place]
    assert 0.4 <= sum(question(row["prompt"]) for row in rows) / len(rows) <= 0.6
    assert len({row["category"] for row in rows}) >= 8


@pytest.mark.parametrize("kind", KINDS)
def test_no_held_out_prompt_opens_as_a_training_prompt(kind: str) -> None:
    """The first two words are the template of a short prompt."""

    def openings(split: str) -> dict[str, str]:
        return {
            " ".join(normalise(row["prompt"]).split()[:2]): row["prompt"]
            for row in CORPUS[kind, split]
        }

    shared = openings("train").keys() & openings("heldout").keys()
    assert not shared, {o: openings("heldout")[o] for o in sorted(shared)}


@pytest.mark.parametrize("rules", RULES)
def test_refusals_are_refusals_and_answers_are_not(rules: str) -> None:
    for kind in KINDS:
        for row in chain(*(CORPUS[kind, split] for split in SPLITS)):
            if row.get("response"):
                refused = refusal.is_refusal(row["response"], rules)
                assert refused == (kind == "toxic"), (row["id"], row["response"])


def test_refusals_do_not_all_open_alike() -> None:
    texts = [row["response"] for row in CORPUS["toxic", "train"] if row.get("response")]
    openings = Counter(" ".join(text.split()[:3]) for text in texts)
    assert len(set(texts)) == len(texts)
    assert openings.most_common(1)[0][1] <= len(texts) / 4


def test_texts_are_clean() -> None:
    for row in EVERY_ROW:
        for text in (row["prompt"], row.get("response") or "x"):
            assert text == text.strip()
            assert "  " not in text
            assert text.isprintable()


# --- as the demo draws it -----------------------------------------------------------------------


def demo_config() -> DataConfig:
    file = Path(dcr.__file__).parents[1] / "conf" / "data" / "demo.yaml"
    node = yaml.safe_load(file.read_text())
    listed = {
        name: node[name] | {"source": [node[name]["source"]]}
        for name in ("seemingly_toxic", "toxic", "safety", "normal")
    }
    return DataConfig(
        label=node["label"],
        matched=node["matched"],
        seemingly_toxic=SourceConfig(**listed["seemingly_toxic"]),
        toxic=SourceConfig(**listed["toxic"]),
        safety=SafetyPairsConfig(**listed["safety"]),
        normal=SourceConfig(**listed["normal"]),
        evaluation=EvaluationSets(**node["evaluation"]),
    )


@pytest.mark.parametrize("ratio", [1, 2, 3, 5])
def test_every_ratio_has_its_rows(ratio: float) -> None:
    config = demo_config()
    rows = data.split(config, ratio, 0, True, refusal.is_refusal)
    assert len(rows.seemingly_toxic) == 40
    assert len(rows.toxic) == 40 * ratio
    assert len(rows.refusals) == 80
    found = [r.id for part in rows.parts().values() for r in part]
    assert len(set(found)) == len(found)
    assert rows.dropped == {}
    assert rows.in_distribution == []
    found = balance.balance(rows.seemingly_toxic, rows.toxic)
    assert found
    assert not found.warning, found


def test_nothing_evaluated_is_near_what_is_trained_on() -> None:
    trained = [row["prompt"] for place in TRAINING for row in CORPUS[place]]
    heldout = {kind: [row["prompt"] for row in CORPUS[kind, "heldout"]] for kind in KINDS}
    near = contamination.overlaps(trained, heldout, near=0.9)
    assert [overlap for overlap in near if overlap] == []


def test_matched_contrasts_are_the_paired_rows() -> None:
    matched = sources.read("demo_toxic_matched")
    safe = sources.read("demo_seemingly_toxic")
    assert {row.group for row in matched} == {row.group for row in safe}
    assert len(matched) == len(safe)
