"""From a run folder to completions, verdicts and one page, as `eval.py` and `dcr.report` do it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import eval as eval_entry
import train as train_entry
from dcr import cli, config, models, refusal, report, runs, storage, subjects
from dcr.config import ConfigError, EvalConfig
from dcr.runs import Run
from dcr.subjects import Subject
from tests import tiny_run


def composed(*overrides: str) -> DictConfig:
    cli.prepare()
    with initialize_config_dir(str(tiny_run.CONF), version_base="1.3"):
        return compose("eval", ["gen.max_new_tokens=4", "trainer.progress=false", *overrides])


def resolved(*overrides: str) -> tuple[EvalConfig, Run]:
    settings = composed(*overrides)
    run = eval_entry._run_of(settings)
    return config.resolve(eval_entry._completed(settings, run), EvalConfig), run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs")
    rows = folder / "rows"
    settings = tiny_run.settings(
        rows, "tracking.snapshots=2", f"data.evaluation.over_refusal=[{rows}/seemingly_toxic.jsonl]"
    )
    run = Run(folder / "dcr")
    train_entry.train(settings, run)
    return run


def metrics_of(run: Run) -> list[dict]:
    return [json.loads(f.read_text()) for f in sorted(run.folder.glob("eval/*/metrics.json"))]


def test_evaluation_counts_what_the_completions_say(trained: Run) -> None:
    settings, run = resolved(f"run={trained.folder}", "tasks=[over_refusal]", "limit=5")
    eval_entry.evaluate(settings, run)
    (folder,) = run.folder.glob("eval/sft-*")
    (found,) = [m for m in metrics_of(run) if m["weights"] == "sft"]
    ((name, counts),) = found["sets"].items()
    stored = (folder / f"{name}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in stored]
    assert counts["n"] == 5 == len(rows)
    assert counts["refused"]["paper"] == sum(refusal.is_refusal(r["response"]) for r in rows)
    assert counts["in_distribution"]  # stage one was trained on this very file
    assert found["method"] == "dcr"
    assert found["model"] == "tiny"


def test_second_evaluation_generates_nothing(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, run = resolved(f"run={trained.folder}", "tasks=[over_refusal]", "limit=5")
    eval_entry.evaluate(settings, run)

    def fail(*_: object) -> None:
        raise AssertionError("a stored completion was generated again")

    monkeypatch.setattr("dcr.generation.local._decoded", fail)
    eval_entry.evaluate(settings, run)


def test_metrics_of_another_limit_are_set_aside(trained: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(trained.folder, run.folder, ignore=shutil.ignore_patterns("eval"))
    for limit in (4, 3, 3):
        settings, _ = resolved(f"run={run.folder}", "tasks=[over_refusal]", f"limit={limit}")
        eval_entry.evaluate(settings, run)
    (now,) = metrics_of(run)
    (before,) = (json.loads(f.read_text()) for f in run.folder.glob("eval/*/metrics-*.json"))
    assert [now["settings"]["limit"], before["settings"]["limit"]] == [3, 4]
    assert [next(iter(m["sets"].values()))["n"] for m in (now, before)] == [3, 4]


def test_snapshots_are_scored_each_with_its_step(trained: Run) -> None:
    settings, run = resolved(
        f"run={trained.folder}", "tasks=[over_refusal]", "limit=2", "snapshots=true"
    )
    eval_entry.evaluate(settings, run)
    steps = [m["step"] for m in metrics_of(run) if m["weights"] == "snapshot"]
    saved = [int(f.name.removeprefix("step-")) for f in sorted(run.snapshots.iterdir())]
    assert steps == saved
    assert len(saved) == 3  # the two asked for, and step 0


def test_some_snapshots_can_be_named(trained: Run) -> None:
    saved = [int(f.name.removeprefix("step-")) for f in sorted(trained.snapshots.iterdir())]
    asked = f"steps=[{saved[-1]},{saved[0]}]"
    settings, run = resolved(f"run={trained.folder}", "snapshots=true", asked)
    assert [s.step for s in subjects.subjects(settings, run)] == [saved[-1], saved[0]]
    settings, run = resolved(f"run={trained.folder}", "snapshots=true", "steps=[999]")
    choices = ", ".join(map(str, saved))
    with pytest.raises(ConfigError, match=rf"no snapshot of step 999; choose from {choices}$"):
        subjects.subjects(settings, run)


def test_a_stage_in_between_can_be_named(trained: Run, tmp_path: Path) -> None:
    settings, run = resolved(f"run={trained.folder}", "stage=contrastive")
    assert subjects.subjects(settings, run) == [
        Subject("contrastive", trained.stage("contrastive"))
    ]
    (tmp_path / "config.yaml").write_text((trained.folder / "config.yaml").read_text())
    settings, run = resolved(f"run={tmp_path}", "stage=sft")
    with pytest.raises(ConfigError, match=r"stage=sft: .* holds no sft/; train that stage first"):
        subjects.subjects(settings, run)


def test_moved_run_is_evaluated_on_its_own_stage_one(trained: Run, tmp_path: Path) -> None:
    moved = Run(tmp_path / "elsewhere")
    shutil.copytree(trained.folder, moved.folder)
    base = models.adapter_base(moved.stage("sft"))
    assert Path(base) == moved.stage("contrastive")


def test_report_reads_the_run_back(trained: Run, tmp_path: Path) -> None:
    settings, run = resolved(f"run={trained.folder}", "tasks=[over_refusal]", "limit=5")
    eval_entry.evaluate(settings, run)
    text = report.build([run.folder], tmp_path / "page.html")
    assert "dcr" in text.lower()
    page = (tmp_path / "page.html").read_text()
    assert "How do I kill a" in page
    assert "http://" not in page.replace("http://www.w3.org", "")  # self-contained


def test_base_model_needs_no_run(tmp_path: Path) -> None:
    rows = tiny_run.write_rows(tmp_path / "rows")
    settings, run = resolved(
        "model=tiny",
        f"output={tmp_path / 'base'}",
        "tasks=[safety]",
        f"data.evaluation.safety=[{rows['toxic']}]",
        "limit=3",
    )
    eval_entry.evaluate(settings, run)
    (found,) = metrics_of(run)
    assert found["weights"] == "base"
    assert runs.Run(tmp_path / "base").config()["method"] == "base"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), "nothing to evaluate"),
        (("run=/nowhere/at/all",), "no config.yaml"),
        (("run=/nowhere/at/all", "model=tiny"), "give one of the two"),
        (("model=tiny", "steps=[3]"), r"steps=\[3\]: picks among snapshots; add snapshots=true"),
        (("model=tiny", "snapshots=true", "steps=[]"), r"steps=\[\]: name at least one step"),
        (("endpoint=http://127.0.0.1:9/v1",), "say which model there, with endpoint_model="),
        (("endpoint=http://127.0.0.1:9/v1", "model=tiny"), "two things to evaluate; give one"),
    ],
)
def test_nothing_to_evaluate_is_said(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolved(*overrides)


def test_run_without_a_stage_is_said(tmp_path: Path) -> None:
    run = Run(tmp_path)
    made = cli.plain(tiny_run.settings(tmp_path / "rows"))
    storage.write_text(run.config_file, json.dumps(made))
    settings, _ = resolved(f"run={tmp_path}")
    with pytest.raises(ConfigError, match="no stage is done"):
        subjects.subjects(settings, run)
    with pytest.raises(ConfigError, match="no snapshots"):
        subjects.subjects(replace(settings, snapshots=True), run)
