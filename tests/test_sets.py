"""Which sets are asked, which belong together, and that the paper's totals come out."""

import json
from pathlib import Path

import pytest
import yaml

from dcr import eval as eval_entry
from dcr.core import evaluation as sets
from dcr.core import sources
from dcr.core.config import ConfigError, DataConfig, EvaluationSets, Kind
from dcr.core.evaluation import PromptSet
from dcr.core.generation import Completion
from dcr.extensions import TABLE, EvalSettings
from dcr.public import _PAIRS, PAPER_SAFETY, SOURCES
from dcr.steering import SteeringConfig
from tests.tiny_run import DATA, real

PAPER = yaml.safe_load((Path(__file__).parent.parent / "conf/data/paper.yaml").read_text())
PAPER_ROWS = {
    **{"xstest_safe": 250, "coconot_contrast": 379, "orbench_hard": 1319, "oktest": 300},
    "phtest_harmless": 2077,
}
KINDS = {"over_refusal": Kind.seemingly_toxic, "safety": Kind.toxic}


def paper_sets() -> list[tuple[str, Kind]]:
    return [(name, kind) for task, kind in KINDS.items() for name in PAPER["evaluation"][task]]


def test_the_papers_sets_are_asked_by_default_and_are_in_a_local_folder() -> None:
    # the paper's PHTest also counts the controversial tier, which is told apart
    assert {*PAPER_ROWS, *sets.APART} == set(PAPER["evaluation"]["over_refusal"])
    assert set(PAPER_SAFETY) < set(PAPER["evaluation"]["safety"])
    for name, kind in paper_sets():
        assert SOURCES[name].kind is kind, name
        assert SOURCES[name].file is not None, name  # else data.root could not serve it


def test_the_totals_are_the_papers() -> None:
    safety = [SOURCES[name].rows or 0 for name in PAPER_SAFETY]
    assert safety == [100, 178, 40, 100, 520]
    assert sum(safety) == 938
    assert {name: SOURCES[name].rows for name in PAPER_ROWS} == PAPER_ROWS
    controversial = SOURCES["phtest_controversial"].hub
    assert controversial is not None
    assert controversial.rows == 3269 - 2077


@real
def test_real_sets_are_read_whole_and_sampled(caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig(label="paper", root=DATA, evaluation=EvaluationSets(**PAPER["evaluation"]))
    found = sets.of_tasks(["over_refusal", "safety"], config, None, seed=0)
    assert [(b.name, b.kind) for b in found] == paper_sets()
    sizes = {b.name: len(b.rows) for b in found}
    assert sum(sizes[name] for name in PAPER_SAFETY) == 938
    assert sizes["coconot_safety"] == 149
    assert sizes["phtest_controversial"] == 180
    assert not [m for m in caplog.messages if "expected" in m]
    few = sets.of_tasks(["safety"], config, 30, seed=0)
    assert {len(b.rows) for b in few} == {30}
    whole = {b.name: {row.id for row in b.rows} for b in found}
    assert all({row.id for row in b.rows} <= whole[b.name] for b in few)


def test_strengths_are_chosen_on_prompts_of_another_origin_than_extraction() -> None:
    settings = EvalSettings(steering=SteeringConfig(validation=True), limit=5)
    asked = eval_entry.read(settings).sets
    assert {(b.name, b.kind, len(b.rows)) for b in asked} == {
        ("contrasts_toxic_heldout", Kind.toxic, 5),
        ("contrasts_seemingly_toxic_heldout", Kind.seemingly_toxic, 5),
    }
    extracted = {name for kind in Kind for name in getattr(settings.data.extraction, kind.value)}
    assert not {b.name for b in asked} & extracted


def test_pairs_need_every_set_of_both_sides() -> None:
    assert sets.pairs_of([]) == {}
    assert sets.pairs_of(["oktest", "xstest_safe", "orbench_hard"]) == {}
    assert sets.pairs_of(["xstest_safe", "xstest_unsafe", "mine"]) == {
        "xstest_safe / xstest_unsafe": (("xstest_safe",), ("xstest_unsafe",))
    }
    five = ["i_malicious_instructions", "i_cona", "i_controversial", "q_harm", "advbench"]
    assert sets.pairs_of(["oktest", *five[1:]]) == {}
    assert sets.pairs_of(["oktest", *five]) == {"oktest / paper_safety": (("oktest",), tuple(five))}
    assert list(sets.pairs_of(name for name, _ in paper_sets())) == [
        "xstest_safe / xstest_unsafe",
        "orbench_hard / harmfulq",
        "oktest / paper_safety",
    ]
    assert len(sets.pairs_of(SOURCES)) == len(_PAIRS)  # no two labels are the same


def test_sets_apart_are_parts_of_another_or_disputed() -> None:
    looked_at = [name.removesuffix("_final") + "_test" for name, s in SOURCES.items() if s.final]
    parts = {n for n, s in SOURCES.items() if s.part_of and not s.final and n not in looked_at}
    assert set(sets.APART) == parts | {"phtest_controversial"}


def test_tasks_without_prompts_bring_none(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "How do I dye wool?"}) + "\n")
    config = DataConfig(label="made", evaluation=EvaluationSets([str(path)], []))
    (mine,) = sets.of_tasks(["over_refusal", "safety", *TABLE.tasks], config, None, seed=0)
    assert (mine.name, mine.kind) == ("mine", Kind.seemingly_toxic)
    assert sets.of_tasks(["ability", "quality"], config, None, seed=0) == []


def test_a_file_named_like_a_hub_set_takes_its_place_in_pairs(tmp_path: Path) -> None:
    path = tmp_path / "orbench_toxic.jsonl"
    path.write_text(json.dumps({"prompt": "Do harm."}) + "\n")
    assert SOURCES["orbench_toxic"].file is None
    config = DataConfig(label="made", evaluation=EvaluationSets([], [str(path)]))
    (found,) = sets.of_tasks(["safety"], config, None, seed=0)
    assert "orbench_hard / orbench_toxic" in sets.pairs_of([found.name, "orbench_hard"])
    assert sources.read(str(path), kind=Kind.toxic) == found.rows


def test_two_sets_of_one_name_do_not_share_a_file(tmp_path: Path) -> None:
    two = [PromptSet("heldout", kind, []) for kind in (Kind.toxic, Kind.seemingly_toxic)]
    with pytest.raises(ConfigError, match="heldout: two sets have this name"):
        sets.kept(two, lambda rows: iter([]), tmp_path, Completion, "asking", False)
