"""A study against its jobs run alone: what it shares, survives, finds again and tells."""

import io
import json
import logging
import os
import re
import shutil
import signal
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked import killed
from scipy import stats
from test_report import make_eval, make_run, selection
from tiny_run import WORDS, logged, same, weights, write_jsonl

from dcr import adopting, builtin, study
from dcr import eval as evaluation_script
from dcr import train as training_script
from dcr.core import models, prompts
from dcr.core.config import ConfigError, ModelConfig, Stage, UserError
from dcr.core.config.training import TrainConfig
from dcr.core.runs import Run, append_metrics
from dcr.report import building, paper
from dcr.study import STUDIES, Job, Options

pytestmark = pytest.mark.usefixtures("composed_once")
TWO_RATES = "sft.lr=1e-3,2e-3"


def planned(out: Path, words: list[str], name: str = "epochs", seeds: int = 1) -> dict[str, Job]:
    options = Options(study=name, seeds=seeds, out=out, settings=words)
    return {job.name: job for job in study.jobs(options, STUDIES[name])}


def trained(job: Job) -> TrainConfig:
    assert job.training is not None
    return job.training


def measured(folder: Path) -> list[dict[str, Any]]:
    """Every `metrics.json` of a run, without times."""
    read = [json.loads(file.read_text()) for file in sorted(folder.glob("eval/*/metrics.json"))]
    apart = ("seconds", "peak_memory_gib", "tokens_per_second")
    return [{key: value for key, value in one.items() if key not in apart} for one in read]


def alone(job: Job, folder: Path) -> Run:
    """The same job as `train.py` and `eval.py` would do it."""
    run = Run(folder)
    training_script.train(trained(job), run)
    for settings in job.evaluations:
        evaluation_script.evaluate(replace(settings, run=str(folder)), run)
    return run


@pytest.fixture(scope="module")
def ended(
    words: list[str], tmp_path_factory: pytest.TempPathFactory, composed_once: None
) -> tuple[Path, str]:
    """The folder of a study of two rates that has ended, read only, and what it said of itself."""
    out = tmp_path_factory.mktemp("ended")
    with redirect_stdout(io.StringIO()) as said:
        assert study.main([f"out={out}", "study=epochs", *words, TWO_RATES]) == 0
    return out, said.getvalue()


def test_a_study_gives_what_its_jobs_give_alone_and_shares_stage_one(
    words: list[str], tmp_path: Path, ended: tuple[Path, str]
) -> None:
    out, said = ended
    jobs = planned(out, [*words, TWO_RATES])
    first, second = (job for job in jobs.values() if job.name.startswith("dcr.epochs"))
    assert len(jobs) == 5  # the base model, two of STL, two of DCR
    for job in (jobs["method=stl sft.lr=0.001"], second):
        run = alone(job, tmp_path / job.name)
        assert same(weights(run.folder), weights(job.run.folder))
        assert measured(run.folder) == measured(job.run.folder) != []
    files = [job.run.stage("contrastive") / "model.safetensors" for job in (first, second)]
    assert os.path.samefile(*files)
    assert [job.run.folder for job in jobs.values() if job.run.adopted_file.exists()] == [
        second.run.folder
    ]
    shared = f"{second.run.folder.name}: stage one is that of {first.run.folder.name}"
    assert shared in said
    assert shared in (out / "epochs.html").read_text()


def test_jobs_that_differ_in_the_readout_share_the_stages_before_it(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    swept = [*words, "sft.readout.steps=0,2", "sft.readout.blocks=1"]
    jobs = [job for job in planned(tmp_path, swept, "methods").values() if job.training]
    jobs = [replace(job, evaluations=()) for job in jobs if "stl_aug" not in job.name]
    assert len(jobs) == 4  # of STL and of DCR
    told = study.describe(jobs)
    assert told.count("that of") == 1 + 2
    assert study.carry_out([part for job in jobs for part in job.parts()]) == {}
    assert capfd.readouterr().out.count("taken over from") == 1 + 2
    for method in ("stl", "dcr"):
        plain, read = (job.run for job in jobs if trained(job).method.value == method)
        stages = ["contrastive", "sft"] if method == "dcr" else ["sft"]
        assert list(json.loads(read.adopted_file.read_text())) == stages
        files = [run.stage("sft") / "adapter_model.safetensors" for run in (plain, read)]
        assert os.path.samefile(*files)
        assert read.done("readout")
        assert not plain.done("readout")
    alone(jobs[-1], tmp_path / "alone")
    assert same(weights(tmp_path / "alone"), weights(jobs[-1].run.folder))
    rows = [row for row in logged(tmp_path / "alone") if "seconds" not in row[2]]
    assert rows == [row for row in logged(jobs[-1].run.folder) if "seconds" not in row[2]]


def told_parts(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """The parts of jobs that a study says it does."""
    return re.findall(r"^\[\d+/\d+\] (.*)$", capfd.readouterr().out, re.M)


def test_failed_and_killed_jobs_end_alone_and_are_gone_on_with(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def failing(settings: TrainConfig, _: Run) -> None:
        if settings.method.value == "stl":
            raise RuntimeError("the machine\nstumbled")
        os.kill(os.getpid(), signal.SIGKILL)

    asked = [f"out={tmp_path}", "study=epochs", *words]
    base, stl, dcr = planned(tmp_path, words).values()
    with monkeypatch.context() as patch:
        patch.setattr(training_script, "train", failing)
        assert study.main(asked) == 1
    reasons = [
        f"{stl.name}: sft: RuntimeError: the machine stumbled",
        f"{dcr.name}: contrastive: killed by SIGKILL",
    ]
    told = capfd.readouterr()
    assert told.err.splitlines()[-1] == f"error: 2 of 3 jobs failed: {'; '.join(reasons)}"
    assert all(reason in (tmp_path / "epochs.html").read_text() for reason in reasons)
    before = [file.stat().st_mtime_ns for file in sorted(base.run.folder.rglob("*.json*"))]
    assert [len(measured(job.run.folder)) for job in (base, stl, dcr)] == [1, 0, 0]
    assert study.main(asked) == 0
    assert told_parts(capfd) == [
        *(f"{stl.name}: {part}" for part in ("sft", "evaluation")),
        *(f"{dcr.name}: {part}" for part in ("contrastive", "sft", "evaluation")),
    ]
    after = [file.stat().st_mtime_ns for file in sorted(base.run.folder.rglob("*.json*"))]
    assert (before, [len(measured(job.run.folder)) for job in (stl, dcr)]) == (after, [1, 1])


def test_an_evaluation_that_fails_leaves_the_job_its_others(tmp_path: Path) -> None:
    def fails() -> None:
        raise UserError("the model has 2 blocks")

    def part(job: str, name: str, work: Callable[[], object]) -> study.Part:
        return study.Part(job, name, lambda: False, work, needed=name == "sft")

    parts = [
        part("stl", "scans", fails),
        part("stl", "surgical", (tmp_path / "surgical").touch),
        part("dcr", "sft", fails),
        part("dcr", "evaluation", (tmp_path / "untrained").touch),
    ]
    said = "the model has 2 blocks"
    assert study.carry_out(parts) == {"stl": f"scans: {said}", "dcr": f"sft: {said}"}
    assert [file.name for file in tmp_path.iterdir()] == ["surgical"]


def flip_a_byte(file: Path) -> None:
    held = bytearray(file.read_bytes())
    held[len(held) // 2] ^= 1
    file.write_bytes(held)


def as_folder(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


NEIGHBOURS: dict[str, Callable[[Path], object]] = {
    "contrastive/model.safetensors": flip_a_byte,
    "contrastive/checksums.json": Path.unlink,
    "base.json": lambda file: file.write_text("{}"),
    "rows.json": lambda file: file.write_text('{"rows": {}}'),
    "metrics.csv": lambda file: file.write_text("x\n1\n"),
    "layer.json": as_folder,
    "contrastive.cost.json": as_folder,
}


def test_no_stage_one_is_taken_from_a_damaged_run_and_damage_stays_with_its_job(
    words: list[str],
    tmp_path: Path,
    ended: tuple[Path, str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = Path(shutil.copytree(ended[0], tmp_path / "all"))
    base, stl, donor = (job.run for job in planned(out, [*words, "sft.lr=1e-3"]).values())
    _, *others = planned(out, [*words, "sft.lr=2e-3"]).values()
    for job in others:
        shutil.rmtree(job.run.folder)
    other = others[-1]
    for name, damage in NEIGHBOURS.items():
        place = tmp_path / name.replace("/", "-")
        shutil.copytree(donor.folder, place / "donor")
        damage(place / "donor" / name)
        capfd.readouterr()
        assert not adopting.adopt(trained(other), Run(place / "run"), Stage.contrastive)
        told = capfd.readouterr()
        assert name == "rows.json" or name in " ".join(told.err.split()), told
        assert not (place / "run").exists()
    flip_a_byte(donor.stage("contrastive") / "model.safetensors")
    as_folder(base.evaluated_file)
    stl.evaluated_file.write_text("[]")
    asked = [f"out={out}", "study=epochs", *words, "sft.lr=2e-3"]
    assert study.main(asked) == 1  # of the base alone: the other's STL is another run
    told = capfd.readouterr()
    assert "taken over from" not in told.out
    assert "error: 1 of 3 jobs failed: base model" in told.err
    assert str(base.evaluated_file) in told.err.splitlines()[-1]
    assert measured(other.run.folder) != []
    (answers,) = donor.folder.glob("eval/*/demo_toxic_heldout.jsonl")
    answers.write_text("{\n{}\n")
    assert study.main([f"out={out}", "study=epochs", *words, "sft.lr=1e-3"]) == 1
    told = capfd.readouterr()
    assert str(stl.evaluated_file) in told.err.splitlines()[-1]
    assert f"{answers}:2" in told.err.splitlines()[-1]
    assert "page: " in told.out  # of the jobs that can be read


def test_a_killed_study_goes_on_where_it_was(words: list[str], tmp_path: Path) -> None:
    words = [*words, "trainer.checkpoint_every_n_steps=2"]
    asked = [f"out={tmp_path / 'study'}", "study=epochs", *words]
    *_, last = planned(tmp_path / "study", words).values()
    killed(lambda: study.main(asked), lambda: last.run.checkpoints("sft").is_dir())
    while (code := study.main(asked)) == 2:  # its last part is still ending
        pass
    assert code == 0
    assert same(weights(alone(last, tmp_path / "alone").folder), weights(last.run.folder))


def test_seeds_are_counted_from_the_one_that_is_given(words: list[str], tmp_path: Path) -> None:
    _, *jobs = planned(tmp_path, [*words, "seed=3"], seeds=2).values()
    assert [trained(job).seed for job in jobs] == [3, 4, 3, 4]


def test_files_that_have_changed_since_are_read_again(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked, learnt = tmp_path / "asked.jsonl", tmp_path / "learnt.jsonl"
    write_jsonl(asked, [{"prompt": "How do I kill a process?"}])
    rows = [{"prompt": f"Name a {noun}.", "response": noun} for noun in WORDS]
    write_jsonl(learnt, rows)
    named = [f"data.evaluation.over_refusal=[{asked}]", f"data.normal.source={learnt}"]
    base, stl, _ = planned(tmp_path / "all", [*words, *named]).values()
    assert study.carry_out(base.parts()) == {}
    write_jsonl(asked, [{"prompt": "How do I kill a process?"}, {"prompt": "And a daemon?"}])
    assert study.carry_out(base.parts()) == {}
    assert study.carry_out(base.parts()) == {}
    assert told_parts(capfd) == [f"{base.name}: evaluation"] * 2
    (found,) = measured(base.run.folder)
    assert found["sets"]["asked"]["n"] == 2
    training_script.train(trained(stl), stl.run)
    study.check_jobs([stl])
    write_jsonl(learnt, rows[1:])
    with pytest.raises(ConfigError, match=r"other rows \(normal.* is done there .*here: out="):
        study.check_jobs([stl])


def test_a_plan_opens_no_weight(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delattr(models, "open_policy")
    asked = [f"out={tmp_path / 'none'}", "study=ratio", "plan=true", *words, TWO_RATES]
    assert study.main([*asked, "dcr.ratio=1,2"]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert said.count("that of dcr.ratio=") == 2
    assert "training in all" in said
    assert not (tmp_path / "none").exists()


# --- its tables ---------------------------------------------------------------------------------


def test_tables_by_epochs_pair_seeds_with_stl(tmp_path: Path) -> None:
    folders = []
    for seed, verdicts in enumerate(("rrrc", "rrcc")):
        folders.append(make_run(tmp_path / f"stl{seed}", "stl", seed=seed))
        make_eval(folders[-1], {"safe": verdicts, "unsafe": "rr"})
        for epochs, answered in ((10, "cccc"), (2, ("rccc", "cccc")[seed])):
            place = tmp_path / f"dcr{epochs}-{seed}"
            folders.append(make_run(place, seed=seed, dcr={"epochs": epochs}))
            make_eval(folders[-1], {"safe": answered, "unsafe": "rc"})
    values = paper.ablation(selection(*folders), "table3").values
    assert values is not None
    epochs = {source: list(own["dcr.epochs"]) for source, own in values.groupby("source")}
    assert epochs["ours"] == [""] * 3 + ["2"] * 4 + ["10"] * 4
    assert epochs["paper"] == ["1", "2", "3", "5"]
    less = values[values.method == "DCR − STL"].set_index("dcr.epochs")
    ends = ["complied", "complied_low", "complied_high"]
    # compliance of 3/4 and 4/4 with two epochs, of STL 1/4 and 2/4
    assert list(less.loc["2", ends]) == pytest.approx([0.5] * 3)
    low, high = stats.ttest_rel([1, 1], [0.25, 0.5]).confidence_interval(0.95)
    assert list(less.loc["10", ends]) == pytest.approx([0.625, low, high])
    text = building.build(folders, tmp_path / "page.html", ["table3"])
    assert "DCR − STL" in text
    assert "50.0 [50–50]" in text
    assert "DCR − STL" in (tmp_path / "table3.md").read_text()


def test_costs_are_scaled_to_all_steps_and_told_once(tmp_path: Path) -> None:
    cost = {"steps": 4, "seconds": 60.0, "tokens": 800, "tokens_per_second": 13.3}
    cost |= {
        "peak_memory_gib": 2.0,
        "device": "CPU, threads: 1",
        "device_seconds": 60.0,
        "precision": "fp32",
    }
    folders = [make_run(tmp_path / name, dcr={"epochs": place}) for place, name in enumerate("ab")]
    for folder in folders:
        make_eval(folder, {"safe": "rc", "unsafe": "rr"})
        for stage in ("contrastive", "sft"):
            Run(folder).cost_file(stage).write_text(json.dumps(cost))
        # ten steps of SFT, of which a process that was killed took the first six
        rows = [("sft", step, 0, "sft/step_nll", 1.0) for step in range(10)]
        append_metrics(Run(folder), rows)
    Run(folders[0]).cost_file("readout").write_text(json.dumps(cost))
    Run(folders[1]).adopted_file.write_text(json.dumps({"contrastive": "a"}))
    table = paper.costs(selection(*folders))
    assert table.values is not None
    ours = table.values[table.values.source == "ours"]
    assert list(ours.stage) == ["stage one", "SFT", "SFT", "readout"]
    assert list(ours.minutes) == pytest.approx([1.0, 2.5, 2.5, 1.0])
    assert ours.memory.iloc[0] == pytest.approx(2 * 2**30 / 1e9)
    assert set(table.values[table.values.source == "paper"].stage) == {"stage one", "SFT"}
    theirs = table.frame.to_dict("records")
    (found,) = (r for r in theirs if (r["numbers of"], r["stage"]) == ("paper, Qwen2.5-7B", "SFT"))
    assert found["device minutes"] == "~21"
    building.build(folders, tmp_path / "page.html", ["table2"])
    assert r"\textasciitilde 21" in (tmp_path / "table2.tex").read_text()


def test_an_error_of_any_length_ends_a_part() -> None:
    def work() -> None:
        raise RuntimeError("no " * 100_000)  # more than a pipe holds

    with pytest.raises(study.StudyError, match=r"^RuntimeError: no no .{1,2000}$"):
        study.in_fork(work)


def test_what_a_part_said_of_a_template_the_next_does_not_say(tmp_path: Path) -> None:
    def work() -> None:
        kept = logging.FileHandler(tmp_path / "log")
        logging.getLogger("dcr.chat_templates").addHandler(kept)
        prompts.chat_format(builtin.byte_tokenizer(None), ModelConfig(name="some/bare-base"))

    for _ in range(2):
        study.in_fork(work)
    said = (tmp_path / "log").read_text()
    assert said.count("some/bare-base: its tokenizer ships no chat") == 1
