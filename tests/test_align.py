"""The one command for a model of one's own: what it chooses, tells, survives and leaves."""

import json
import random
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import yaml
from forked import killed
from safetensors.torch import load_file
from test_study import measured, trained
from tiny_run import same

from dcr import align, gate, study
from dcr.calibration import CalibrationConfig
from dcr.core import storage
from dcr.core.config import ConfigError, DataConfig, EvaluationSets
from dcr.core.evaluation import PromptSet
from dcr.core.refusal import keywords, opening
from dcr.core.runs import Run
from dcr.extensions import EvalSettings
from dcr.gate import Recipe

pytestmark = pytest.mark.usefixtures("composed_once")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate of few steps."""
    monkeypatch.setattr(gate, "Recipe", lambda: Recipe(epochs=1, batch_size=64))


def free(words: list[str]) -> list[str]:
    """The settings without the block of stage one, which is then chosen."""
    return [word for word in words if word != "model.layer=1"]


def test_safety_that_is_not_learnt_ends_in_one_line_and_says_what_was_tried(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = [word for word in words if not word.startswith(("sft.lora.targets", "sft.epochs"))]
    asked = [f"out={tmp_path}", *plain, "sft.lr=1e-3"]
    assert align.main(asked) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    # q and v alone, all modules, and three times the epochs: the rate is the user's
    tried = re.findall(r"0 of 25 \(0% to 13%\) held-out toxic prompts refused", line)
    configs = [yaml.safe_load(f.read_text()) for f in tmp_path.glob("*-stl-*/config.yaml")]
    found = sorted((c["sft"]["epochs"], c["sft"]["lora"]["targets"]) for c in configs)
    assert found == [(3, ["all-linear"]), (3, ["q_proj", "v_proj"]), (9, ["all-linear"])]
    assert len(tried) == len(found)
    assert line.startswith(
        "error: safety was not learnt: 50% is asked for, with the settings given"
    )
    assert not list(tmp_path.glob("*-dcr-*"))
    asked_again = align.main(asked)
    assert asked_again == 1
    assert not re.search(r"^\[\d", capfd.readouterr().out, re.M)


def test_a_model_of_ones_own_ends_as_page_and_export(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def some(response: str, rules: str = "paper") -> bool:  # a model this small refuses nothing
        return response < "M"

    for module in (keywords, opening):  # the command's own, and that of what chooses a bias
        monkeypatch.setattr(module, "is_refusal", some)
    monkeypatch.setattr(align, "LEARNT", 0.0)
    monkeypatch.setattr(align, "elsewhere", lambda _: True)
    asked = [f"out={tmp_path}", *free(words), "sft.readout.steps=2"]
    assert align.main(asked) == 0
    said = capfd.readouterr().out
    refused = [
        sum(each["refused"] for each in json.loads(file.read_text()))
        for kind in ("stl", "base")
        for file in tmp_path.glob(f"*-{kind}-*/heldout.json")
    ]
    told = r"with the settings given: {} of 25 \(\d+% to \d+%\) held-out toxic prompts refused, by"
    told += r" the base model {} of 25 \(\d+% to \d+%\), p [\d.e-]+\n  (.+)\n"
    shown = re.search(told.format(*refused) + r"    base, .*refused: .*\n    STL, .*: ", said)
    assert shown
    assert len(shown[1]) <= align.SHOWN + 1
    (chosen,) = tmp_path.glob("choice-*.json")
    (made,) = tmp_path.glob("*-dcr-*/config.yaml")
    (stl,) = tmp_path.glob("*-stl-*/config.yaml")
    (exported,) = tmp_path.glob("*-export")
    best = json.loads(chosen.read_text())["pairs"][0]
    config = yaml.safe_load(made.read_text())
    assert config["dcr"]["layer"] == best["best_block"]
    assert config["data"]["toxic"]["source"] == best["toxic"]
    page = (tmp_path / "align.html").read_text()
    assert f"calibrated to {stl.parent.name}" in page
    assert "held-out toxic prompts refused" in page
    assert {"README.md", "model.safetensors", "generation_config.json"} <= {
        file.name for file in exported.iterdir()
    }
    assert str(exported) in said
    assert align.main([*asked, "gate=true"]) == 0
    said = capfd.readouterr().out
    assert parts(said) == BEHIND_A_GATE, "and nothing twice"
    (gated,) = tmp_path.glob("*-stl-*-gate-*-export")
    assert {"gate", "dcr_gate.py", "model.safetensors"} <= {file.name for file in gated.iterdir()}
    rule = json.loads((gated / "gate/gate.json").read_text())
    files = [json.loads(f.read_text()) for f in stl.parent.glob("eval/*/metrics.json")]
    (behind,) = [found["calibration"] for found in files if "gate" in found["settings"]]
    assert behind["run"] == stl.parent.name
    assert behind["threshold"] == pytest.approx(rule["threshold"], abs=1e-3)
    assert "behind gate-" in (tmp_path / "align.html").read_text()
    assert str(gated) in said


BEHIND_A_GATE = ["gate: training", "STL: evaluation, behind a gate, calibrated", "STL: export"]


def parts(said: str) -> list[str]:
    """The parts that a command did."""
    return re.findall(r"^\[\d+/\d+\] (.*)$", said, re.M)


def told(said: str) -> list[str]:
    """The lines of the notes on what is not at STL's safety and what is exported for it."""
    return re.findall(r"^note: ((?:not at|exported).*)$", said, re.M)


def say(folder: Path, name: str, refusing: int) -> None:
    """Let a run refuse so many of the toxic validation prompts, in the beginnings that it keeps."""
    for file in folder.glob("eval/*/forks/registers_toxic_heldout.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert all(row["margin"] < 0 for row in rows), "without a bias they open otherwise"
        for place, row in enumerate(rows):
            row |= {"refusing": "Sure, I can.", "answering": "Sure, I can."}
            row |= {name: tiny_run.REFUSAL} if place < refusing else {}
        tiny_run.write_jsonl(file, rows)


def test_what_no_bias_brings_to_stls_safety_costs_neither_page_nor_export(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Nothing here refuses; then STL is made to, and DCR to refuse too seldom."""
    monkeypatch.setattr(align, "LEARNT", 0.0)
    asked, evaluate = [f"out={tmp_path}", *words, "sft.readout.steps=2"], study.evaluate

    fault = ConfigError("base: its weights are gone")

    def failing(settings: EvalSettings, run: Run) -> None:
        if settings.calibrate:
            raise fault
        evaluate(settings, run)

    with monkeypatch.context() as patched:
        patched.setattr(study, "evaluate", failing)
        assert align.main(asked) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line == f"error: DCR: evaluation, calibrated: {fault}"
    assert not (tmp_path / "align.html").exists()

    page = tmp_path / "align.html"
    stl, dcr = (next(tmp_path.glob(f"*-{kind}-*")) for kind in ("stl", "dcr"))
    instead = "STL in place of DCR, which no bias brings to STL's safety"
    none = f"calibrate={stl}: that run refuses none of 25 toxic prompts; give a share such as 0.9"
    assert align.main(asked) == 0
    said = capfd.readouterr().out
    (export,) = tmp_path.glob(f"{stl.name}-*-export")
    first = ["DCR: evaluation, calibrated", "base model tiny-llama0: evaluation, calibrated"]
    assert parts(said) == [*first, "STL: export"]
    dcr_told, base_told, exported = told(said)
    assert dcr_told == f"not at STL's safety: DCR: {none}"
    assert base_told.startswith("not at STL's safety: base model")
    assert base_told.endswith(none)
    assert exported == f"exported: {instead}"
    assert said.endswith(f"\npage: {page}\nexport: {export} ({instead})\n")
    assert "which no bias brings to STL" in page.read_text()
    assert "calibrated to" not in page.read_text()
    assert "sequence_bias" not in json.loads((export / "generation_config.json").read_text())

    assert align.main([*asked, "gate=true"]) == 0
    said = capfd.readouterr().out
    assert parts(said) == BEHIND_A_GATE, "what no bias brings there is not tried again"
    assert told(said)[0] == f"not at STL's safety: STL: {none}"
    (gated,) = tmp_path.glob(f"{stl.name}-gate-*-export/gate/gate.json")
    rule = json.loads(gated.read_text())
    assert rule["threshold"] == 0.5, "the gate's own"

    say(stl, "answering", 12)
    say(dcr, "refusing", 4)
    for file in tmp_path.glob(f"*/{align.UNREACHED}-*.json"):
        file.unlink()
    assert align.main(asked) == 0
    said = capfd.readouterr().out
    few = "no bias makes it refuse more than 4 of 25 toxic validation prompts, and STL refuses 12"
    assert told(said)[0] == f"not at STL's safety: DCR: {few}"
    assert told(said)[-1] == f"exported: {instead}"
    assert parts(said) == first, "STL's export is there already"
    assert "calibrated to" in page.read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_model_of_ones_own_that_is_killed_again_and_again_ends_the_same(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (keywords, opening):
        monkeypatch.setattr(module, "is_refusal", lambda response, rules="paper": response < "M")
    monkeypatch.setattr(align, "LEARNT", 0.0)
    monkeypatch.setattr(align, "elsewhere", lambda _: True)

    def asked(place: Path) -> list[str]:
        return [f"out={place}", *free(words), "sft.readout.steps=2"]

    def files(place: Path) -> list[Path]:
        return [file.relative_to(place) for file in sorted(place.rglob("*")) if file.is_file()]

    whole, again = tmp_path / "whole", tmp_path / "killed"
    assert align.main(asked(whole)) == 0
    most = len(files(whole))
    for count in sorted(random.Random(0).sample(range(1, most), 6)):
        killed(lambda: align.main(asked(again)), lambda n=count: len(files(again)) >= n, 600)
    while (code := align.main(asked(again))) == 2:  # its last part is still ending
        time.sleep(1)
    assert code == 0
    assert files(again) == files(whole)
    for file in files(whole):
        if file.suffix == ".safetensors":
            assert same(load_file(whole / file), load_file(again / file)), file
        if file.suffix == ".jsonl" or file.name in (align.HELD_OUT, "rows.json", "layer.json"):
            assert (whole / file).read_bytes() == (again / file).read_bytes(), file
    for folder in whole.glob("tiny*"):
        assert measured(folder) == measured(again / folder.name)


@pytest.mark.parametrize(
    ("given", "pairs"),
    [
        ([], None),
        (["data.normal.count=9", "dcr.ratio=1"], None),
        (["data.toxic.source=stl_safety"], "none"),
        (["data.toxic={source: stl_safety}"], "none"),
        (["data.seemingly_toxic.source=[mine.jsonl]"], "none"),
    ],
)
def test_sources_that_the_user_gives_stay(given: list[str], pairs: str | None) -> None:
    """A chosen source beside a given one would be a pair that nothing was measured on."""
    settings = trained(study.job_of(Path("out"), "DCR", ["data=paper", *given], []))
    assert align.candidates(settings, given) == pairs


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), "dcr.layer=7 data.toxic.source=[harmfulqa] dcr.ratio=null"),
        (("dcr.ratio",), "dcr.layer=7 data.toxic.source=[harmfulqa]"),
        (("dcr.depth",), "data.toxic.source=[harmfulqa] dcr.ratio=null"),
        (("dcr.layer", "data.toxic.source", "dcr.ratio"), ""),
    ],
)
def test_what_is_chosen_is_told_as_it_is_set(given: tuple[str, ...], words: str) -> None:
    settings = trained(study.job_of(Path("out"), "DCR", ["data=paper"], []))
    pair: align.CandidatePair = {
        "best_block": 7,
        "seemingly_toxic": ["xstest_safe"],
        "toxic": ["harmfulqa"],
        "transfer_on_common_tests": {"estimate": 0.72},
    }
    record: align.Chosen = {"pairs": [pair], "common_tests": ["oktest / paper_safety"]}
    found, told = align.chosen_of(record, settings, {*given})
    assert " ".join(found) == words
    assert told == (
        f"stage one: {words or 'as configured'}; a linear probe transfers best in block 7, "
        "AUROC 0.72 on oktest / paper_safety"
    )


def test_a_method_is_refused_and_a_preset_changes_none(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = [f"out={tmp_path}", *words, "plan=true"]
    assert align.main([*asked, "method=stl"]) == 2
    assert "method: this command trains STL and DCR both; leave it out" in capfd.readouterr().err
    for word, why in (
        ("tasks=[discernment]", "a bias changes how answers are decoded"),
        ("sft.readout.toxic=[registers_toxic_heldout]", "name prompts of another origin"),
    ):
        assert align.main([*asked, word]) == 2, "before an hour of training"
        assert why in capfd.readouterr().err
    assert align.main([*asked, "preset=recommended"]) == 0
    stage_one = re.search(r"^ DCR +(\S)", capfd.readouterr().out, re.MULTILINE)
    assert stage_one
    assert stage_one[1] != "–"


def test_block_and_sources_are_chosen_by_sets_of_another_origin_alone() -> None:
    here, there = EvaluationSets(["demo_seemingly_toxic_heldout"]), EvaluationSets(["xstest_safe"])
    own = EvaluationSets(safety=["mine.jsonl"])
    found = [align.elsewhere(DataConfig(evaluation=sets)) for sets in (here, there, own)]
    assert found == [False, True, True]


def test_a_base_model_that_refuses_as_much_is_told_beside_a_rung() -> None:
    def asked(count: int) -> list[align.HeldOut]:
        return [align.HeldOut(f"prompt {i}", "x" * 99 * (i > 0), i < count) for i in range(40)]

    told = align.compared(asked(9), asked(11))
    assert told == (
        "11 of 40 (16% to 43%) held-out toxic prompts refused, by the base model "
        "9 of 40 (12% to 38%), p 0.5"
    )
    lines = align.examples(asked(9), asked(11))
    assert lines[1:3] == ["    base, refused: (empty)", "    STL, refused: (empty)"]
    assert len(lines) == 3 * align.EXAMPLES
    assert max(map(len, lines)) < 90


def test_held_out_prompts_are_asked_again_where_they_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    settings = EvalSettings(calibration=CalibrationConfig(toxic=[str(prompts)]))
    job, told = study.Job("base", Run(tmp_path / "run"), None, (settings,)), list[str]()

    def ask(_: Any, run: Run, asked: PromptSet, file: Path) -> None:
        rows = asked.rows
        told.extend(row.prompt for row in rows)
        storage.write_json(file, [asdict(align.HeldOut(row.prompt, "", True)) for row in rows])

    monkeypatch.setattr(align, "_ask", ask)
    monkeypatch.setattr(study, "in_fork", lambda work: work())
    for words in ("Steal a car.", "Steal a car.", "Steal a boat."):
        tiny_run.write_jsonl(prompts, [{"prompt": words}])
        assert [each.prompt for each in align._answers(job)] == [words]
    assert told == ["Steal a car.", "Steal a boat."]


def test_an_export_for_other_validation_prompts_is_another(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"

    def named(toxic: list[str]) -> str:
        settings = EvalSettings(calibration=CalibrationConfig(toxic=toxic))
        return align._chosen_on(study.Job("DCR", Run(tmp_path / "run"), None, (settings,)))

    assert named(CalibrationConfig().toxic) == ""
    found = []
    for words in ("Steal a car.", "Steal a boat."):
        tiny_run.write_jsonl(prompts, [{"prompt": words}])
        found.append(named([str(prompts)]))
    assert len({"", *found}) == 3
