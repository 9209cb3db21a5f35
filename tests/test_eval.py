"""From a run folder to completions, verdicts and one page, as `eval.py` and `dcr.report` do it."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM

from dcr import cli, keywords
from dcr import eval as eval_entry
from dcr.core import models, storage
from dcr.core.config import ConfigError, DataError, Precision, SourcesByKind, UserError
from dcr.core.evaluation import subjects
from dcr.core.refusal import opening as refusal
from dcr.core.runs import Run
from dcr.extensions import EvalSettings
from dcr.judges import pairwise
from dcr.report import __main__ as report
from dcr.results.file import stored_answers
from dcr.steering import methods
from dcr.steering import prompts as steering_prompts
from tests import tiny_run


def composed(*overrides: str) -> DictConfig:
    cli.prepare()
    with initialize_config_dir(str(tiny_run.CONF), version_base="1.3"):
        plain = ("precision=fp32", "trainer.progress=false", "wandb.mode=disabled")
        return compose("eval", ["gen.max_new_tokens=4", *plain, *overrides])


def resolved(*overrides: str) -> tuple[EvalSettings, Run]:
    return cli.resolved(composed(*overrides), EvalSettings)


def test_naming_one_source_leaves_its_sisters() -> None:
    plain, named = (
        cli.completed(composed("model=tiny", *more), {}).data
        for more in ((), ("data.extraction.toxic=[demo_toxic_matched]",))
    )
    assert named.extraction.toxic == ["demo_toxic_matched"]
    assert named.extraction.normal == plain.extraction.normal == ["demo_normal"]
    assert named.evaluation == plain.evaluation


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run, _ = tiny_run.trained(tmp_path_factory.mktemp("runs"), "tracking.snapshots=2")
    return run


@pytest.fixture
def fresh(trained: Run, tmp_path: Path) -> Run:
    """The trained run without an evaluation, to be changed at will."""
    run = Run(tmp_path / "fresh")
    shutil.copytree(trained.folder, run.folder, ignore=shutil.ignore_patterns("eval"))
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
    told = [keywords.recommended(r["response"]) for r in rows]
    assert counts["partial"] == {"paper": 0, "recommended": told.count("partial")}
    assert counts["in_distribution"]  # stage one was trained on this very file
    assert found["method"] == "dcr"
    assert found["model"] == "tiny"


def test_discernment_reads_each_prompt_once_and_generates_nothing(
    fresh: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tiny_run.write_rows(fresh.folder / "rows")
    common = [f"run={fresh.folder}", f"data.evaluation.safety=[{rows['toxic']}]", "precision=fp32"]
    common += [f"data.evaluation.over_refusal=[{rows['seemingly_toxic']}]", "limit=6"]
    settings, run = resolved(*common)
    eval_entry.evaluate(settings, run)  # what is decoded, and its refusal mass
    (said,) = (metrics_of(run)[0]["discernment"],)
    folder = answers_of(settings, run)
    masses = {
        row.id + name: row.refusal_mass
        for name in ("toxic", "seemingly_toxic")
        for row in stored_answers(folder / f"{name}.jsonl").values()
    }
    settings, _ = resolved(*common, "tasks=[discernment]")

    def fail(*_: object) -> None:
        raise AssertionError("an answer was generated, or the weights were opened for nothing")

    monkeypatch.setattr("dcr.core.generation.continued", fail)
    eval_entry.evaluate(settings, run)
    read = {
        row.id + file.stem: row.mass
        for file in sorted((folder / "openings").iterdir())
        for row in storage.read_lines(file, subjects.Opening)
    }
    assert read == pytest.approx(masses, rel=1e-4)
    (found,) = metrics_of(run)
    assert found["sets"]["toxic"]["n"] == 6, "what another command counted stays"
    assert found["discernment"]["pooled"]["auroc"] == pytest.approx(said["pooled"]["auroc"])
    kinds = {name: of["kind"] for name, of in found["discernment"]["sets"].items()}
    assert kinds == {"seemingly_toxic": "seemingly_toxic", "toxic": "toxic"}
    # killed while the last line was written: the next command reads that prompt alone
    file = folder / "openings" / "toxic.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    again: list[int] = []
    first = refusal.first_logits
    monkeypatch.setattr(refusal, "first_logits", lambda m, p: again.append(len(p)) or first(m, p))
    eval_entry.evaluate(settings, run)
    assert again == [1]
    monkeypatch.setattr(subjects, "opened", fail)
    eval_entry.evaluate(settings, run)
    assert metrics_of(run)[0]["discernment"] == found["discernment"]


def test_two_commands_measure_what_one_for_both_kinds_does(fresh: Run, tmp_path: Path) -> None:
    """Counts, other judges' words, their agreement and the ranking come to the same."""
    rows = [f"data.evaluation.safety=[{tiny_run.write_rows(tmp_path)['toxic']}]", "limit=6"]
    told = [*rows, "judge=[keyword,outcome]"]
    apart = Run(tmp_path / "apart")
    shutil.copytree(fresh.folder, apart.folder)
    commands = (fresh, "over_refusal,safety"), (apart, "over_refusal"), (apart, "safety")
    for run, tasks in commands:
        eval_entry.evaluate(*resolved(f"run={run.folder}", f"tasks=[{tasks}]", *told))
    (whole,), (parts,) = metrics_of(fresh), metrics_of(apart)
    for found in (whole, parts):
        found["agreement"].sort(key=str)
        for key in ("seconds", "peak_memory_gib", "decoding"):
            del found[key]
    assert len(whole["sets"]) == 2
    assert whole["discernment"]["pooled"]["toxic"] == 6
    assert parts == whole
    eval_entry.evaluate(*resolved(f"run={apart.folder}", "tasks=[safety]", *told, "data=paper"))
    (other,) = metrics_of(apart)
    assert [*other["sets"]] == ["toxic"], "of other data nothing is taken over"
    assert other["discernment"] is None, "nor the ranking"
    (aside,) = (json.loads(file.read_text()) for file in apart.folder.glob("eval/*/metrics-*.json"))
    assert (aside["sets"], aside["discernment"]) == (whole["sets"], whole["discernment"])
    told[-1:] = ["judge=[keyword]", "data=demo"]
    eval_entry.evaluate(*resolved(f"run={apart.folder}", "tasks=[discernment,over_refusal]", *told))
    (last,) = metrics_of(apart)
    assert {of["kind"] for of in last["sets"].values()} == {"seemingly_toxic"}


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


def test_threads_and_batches_of_the_answers_are_told_and_name_no_folder(
    fresh: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for limit, size in ((2, 2), (5, 3)):
        asked = (f"run={fresh.folder}", "tasks=[over_refusal]", f"limit={limit}")
        settings, _ = resolved(*asked, f"gen.batch_size={size}")
        eval_entry.evaluate(settings, fresh)
    (now,) = metrics_of(fresh)
    assert now["decoding"] == {"threads": [torch.get_num_threads()], "batch_size": [2, 3]}
    assert json.loads(fresh.threads_file.read_text())["threads"] >= 1, "of training, however given"


def test_a_stage_and_some_snapshots_can_be_named(trained: Run, tmp_path: Path) -> None:
    def named(run: Path, *overrides: str) -> Any:
        return subjects.subjects(*resolved(f"run={run}", *overrides))

    saved = [int(f.name.removeprefix("step-")) for f in sorted(trained.snapshots.iterdir())]
    found = named(trained.folder, "snapshots=true", f"steps=[{saved[-1]},{saved[0]}]")
    assert [subject.step for subject in found] == [saved[-1], saved[0]]
    (subject,) = named(trained.folder, "stage=contrastive")
    assert (subject.weights, subject.source) == ("contrastive", trained.stage("contrastive"))
    (tmp_path / "config.yaml").write_text((trained.folder / "config.yaml").read_text())
    choices = ", ".join(map(str, saved))
    for run, asked, says in (
        (
            trained.folder,
            ("snapshots=true", "steps=[999]"),
            f"no snapshot of step 999; choose from {choices}$",
        ),
        (tmp_path, ("stage=sft",), "stage=sft: .* holds no sft/; train that stage first"),
        (tmp_path, (), "no stage is done"),
        (tmp_path, ("snapshots=true",), "no snapshots"),
    ):
        with pytest.raises(ConfigError, match=says):
            named(run, *asked)
    with pytest.raises(ConfigError, match="is the folder of a trained run"):
        eval_entry.evaluate(*resolved("model=tiny", f"output={trained.folder}", "data=demo"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("run=/nowhere/at/all", "model=tiny"), "give one of the two"),
        (("model=tiny", "steps=[3]"), r"steps=\[3\]: picks among snapshots; add snapshots=true"),
        (("model=tiny", "snapshots=true", "steps=[]"), r"steps=\[\]: name at least one step"),
        *(
            (("model=tiny", "gen.self_cd=1", f"tasks=[{task}]"), rf"self_cd=1.0 tasks=\[{task}\]")
            for task in ("ability", "claims")
        ),
        (
            ("model=tiny", "steering=ablation", "steering.validation=true", "tasks=[quality]"),
            r"steering\.validation=true tasks=\[quality\]: asks other prompts",
        ),
        (
            (
                "model=tiny",
                "steering=ablation",
                "steering.validation=true",
                "calibration.toxic=[harmfulqa]",
                "data.extraction.toxic=[demo_toxic,harmfulqa]",
            ),
            r"steering\.validation=true calibration\.toxic: harmfulqa is extracted from as well",
        ),
        (("endpoint=http://127.0.0.1:9/v1",), "say which model there, with endpoint_model="),
        (("endpoint=http://127.0.0.1:9/v1", "model=tiny"), "two things to evaluate; give one"),
    ],
)
def test_nothing_to_evaluate_is_said(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolved(*overrides)


# --- whose answers, and under what --------------------------------------------------------------


STEERED = ("steering=scans", "steering.scans.layers=middle_third", "steering.scans.anchors=6")


@pytest.mark.parametrize(
    "changed",
    [
        ("gen.self_cd=1.5",),
        ("gen.repetition_penalty=1.5",),
        (*STEERED, "steering.strength=30"),
    ],
    ids=["self_cd", "repetition_penalty", "steering"],
)
def test_the_reference_of_alpaca_eval_answers_plainly(
    fresh: Run, changed: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The STL run itself under an edit, against what it says without."""
    compared: list[pairwise.Pair] = []

    def annotate(pairs: Sequence[pairwise.Pair], *_: object) -> list[pairwise.Annotation]:
        compared.extend(pairs)
        return []

    monkeypatch.setattr(pairwise, "annotate", annotate)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    asked = tiny_run.write_rows(fresh.folder / "rows")["normal"]
    common = (f"run={fresh.folder}", "tasks=[quality]", f"quality.source={asked}", "limit=4")
    common = (*common, f"quality.reference={fresh.folder}", "data=demo")
    settings, run = resolved(*common, *changed)
    eval_entry.evaluate(settings, run)
    plain, _ = resolved(*common)
    own, other = (
        stored_answers(answers_of(one, run) / f"{asked.stem}.jsonl") for one in (settings, plain)
    )
    assert len(own) == len(other) == len(compared) == 4
    for pair in compared:
        assert (pair.reference, pair.answer) == (other[pair.id].response, own[pair.id].response)
    rows = [row for b in eval_entry.read(plain).sets for row in b.rows]
    answered = subjects.final(plain, run).answer(rows)
    assert {c.id: c for batch in answered for c in batch} == other


def test_the_record_of_an_edit_outlives_a_command_that_opens_nothing(
    fresh: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, run = resolved(
        *(f"run={fresh.folder}", "data=demo", "tasks=[over_refusal]", "limit=2"),
        *STEERED,
    )
    eval_entry.evaluate(settings, run)
    (before,) = metrics_of(run)
    assert before["steering"]["prompts"]["toxic"]["count"] == 6
    (file,) = run.folder.glob("eval/*/metrics.json")
    file.unlink()  # as where a kill came between the last answer and the counts
    monkeypatch.delattr(subjects, "opened")
    for _ in range(2):
        eval_entry.evaluate(settings, run)
        (after,) = metrics_of(run)
        assert after["steering"] == before["steering"]


def test_prompts_of_vectors_are_drawn_once_an_evaluation(
    fresh: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, draw = [], methods.extraction
    monkeypatch.setattr(methods, "extraction", lambda *given: drawn.append(given) or draw(*given))
    file = tiny_run.write_rows(tmp_path)["toxic"]
    told = (f"data.extraction.toxic=[{file}]", "data=demo", "tasks=[over_refusal]", "limit=2")
    settings, run = resolved(f"run={fresh.folder}", *told, *STEERED)
    eval_entry.evaluate(settings, run)
    file.write_text(file.read_text().replace("now", "today"))
    eval_entry.evaluate(settings, run)
    assert len(drawn) == 2
    assert len(metrics_of(run)) == 2, "a file that has changed gives other answers"


def test_sets_that_hold_prompts_of_the_released_code_say_so(
    fresh: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = SourcesByKind(toxic=["demo_toxic_heldout"], normal=["demo_normal"])
    monkeypatch.setitem(steering_prompts.RELEASED, "scans", named)
    common = (f"run={fresh.folder}", "data=demo", "data.near_duplicate=1", *STEERED)
    common = (*common, "tasks=[over_refusal,safety]", "limit=12")
    seen = {}
    for released in ("true", "false"):
        settings, run = resolved(*common, f"steering.released_data={released}")
        eval_entry.evaluate(settings, run)
        (found,) = (
            m
            for m in metrics_of(run)
            if m["steering"]["released_data"] is settings.steering.released_data
        )
        used = set(found["steering"]["prompts"]["toxic"]["ids"])
        for name, counts in found["sets"].items():
            seen[name, released] = counts["seen_by_steering"]
            if counts["kind"] == "toxic" and released == "true":
                assert counts["seen_by_steering"] == len(used & set(counts["ids"])) > 0
    assert sorted(seen.values())[:-1] == [0, 0, 0]


def in_folder(folder: Path, *overrides: str) -> tuple[EvalSettings, Run]:
    output = folder.parent / "output"
    common = (f"model.name={folder}", f"output={output}", "limit=2", "precision=fp32")
    return resolved(*common, "tasks=[over_refusal]", *overrides)


def answers_of(settings: EvalSettings, run: Run) -> Path:
    (subject,) = subjects.subjects(settings, run)
    return subject.folder


def test_a_folder_is_known_by_what_it_holds(tiny_folder: Path, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "moved" / "model"
    for place in (folder, elsewhere):
        shutil.copytree(tiny_folder, place)
    before = answers_of(*in_folder(folder))
    assert answers_of(*in_folder(folder)) == before
    assert answers_of(*in_folder(elsewhere)).name == before.name
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[0].mlp.up_proj.weight.data += 1
    model.save_pretrained(folder)
    after = answers_of(*in_folder(folder))
    assert after != before
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    assert answers_of(*in_folder(folder)) not in (before, after)


def test_a_template_is_known_by_what_it_says(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[-1].content }}")
    settings = f"model.template={file}"
    before = answers_of(*in_folder(tiny_folder, settings))
    file.write_text("Q: {{ messages[-1].content }}")
    assert answers_of(*in_folder(tiny_folder, settings)) != before
    moved = tmp_path / "moved.jinja"
    file.rename(moved)
    assert answers_of(*in_folder(tiny_folder, f"model.template={moved}")) != before


def test_a_template_that_is_no_text_is_named_before_weights_open(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_bytes(b"{{ messages }} caf\xe9")
    monkeypatch.delattr(subjects, "opened")
    settings, run = in_folder(tiny_folder, f"model.template={template}")
    says = rf"model\.template={template}: is not UTF-8; save the file as UTF-8"
    with pytest.raises(ConfigError, match=says):
        answers_of(settings, run)
    with pytest.raises(ConfigError, match=says):
        eval_entry.evaluate(settings, run)


def test_an_adapter_by_its_folder_stands_on_its_own_base(fresh: Run) -> None:
    settings, run = in_folder(fresh.stage("sft"), "data=demo")
    eval_entry.evaluate(settings, run)
    base = models.open_folder(str(fresh.stage("contrastive")), Precision.fp32)
    base.model.model.layers[0].mlp.up_proj.weight.data += 1
    base.model.save_pretrained(fresh.stage("contrastive"))
    settings, run = in_folder(fresh.stage("sft"), "data=demo")
    with pytest.raises(UserError, match="contrastive"):
        eval_entry.evaluate(settings, run)


# --- what fails leaves nothing ------------------------------------------------------------------


def test_a_model_that_cannot_be_opened_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    settings, run = in_folder(broken, "data=demo")
    with pytest.raises(ConfigError, match="cannot be opened"):
        eval_entry.evaluate(settings, run)
    assert not run.folder.exists()
    # and a folder that holds another model's answers stays as it is
    good = (f"output={run.folder}", "data=demo", "tasks=[over_refusal]", "limit=1")
    eval_entry.evaluate(*resolved("model=tiny", *good))
    before = _contents(run)
    with pytest.raises(ConfigError, match="cannot be opened"):
        eval_entry.evaluate(settings, run)
    assert _contents(run) == before


def _contents(run: Run) -> dict[Path, bytes]:
    """All files but W&B's logs, which a process of its own still writes."""
    files = [f for f in run.folder.rglob("*") if f.is_file() and "wandb" not in f.parts]
    return {file: file.read_bytes() for file in files}


def test_no_bar_stands_before_the_line_of_a_model_that_cannot_be_opened(
    fresh: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = fresh.stage("contrastive") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="contrastive"):
        eval_entry.evaluate(
            *resolved(f"run={fresh.folder}", "gen.max_new_tokens=3", "trainer.progress=true")
        )
    assert "prompt" not in capsys.readouterr().err


@pytest.mark.parametrize("task", ["discernment", "safety"])
def test_no_bar_stands_before_the_line_of_a_prompt_beyond_the_context(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "a" * 5000}))
    told = ("model=tiny", f"output={tmp_path / 'out'}", f"tasks=[{task}]", "trainer.progress=true")
    with pytest.raises(DataError, match=r"the model's context of 2048; shorten it$"):
        eval_entry.evaluate(*resolved(*told, f"data.evaluation.safety=[{long}]"))
    assert "prompt" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tasks", "empty"),
    [
        ("[over_refusal,safety]", ["over_refusal", "safety"]),
        ("[safety]", ["safety"]),
        ("[discernment]", ["over_refusal", "safety"]),
    ],
)
def test_tasks_without_a_prompt_are_refused(tasks: str, empty: list[str], tmp_path: Path) -> None:
    told = ["model=tiny", f"output={tmp_path / 'out'}", f"tasks={tasks}"]
    told += [f"data.evaluation.{name}=[]" for name in empty]
    keys = " ".join(f"data.evaluation.{name}=[]" for name in empty)
    with pytest.raises(ConfigError, match=re.escape(f"tasks={tasks} {keys}: no prompts to ask")):
        eval_entry.evaluate(*resolved(*told))
    assert not (tmp_path / "out").exists()


def test_tasks_that_need_no_prompts_go_on_without_any() -> None:
    told = ("model=tiny", "data.evaluation.over_refusal=[]", "data.evaluation.safety=[]")
    assert len(eval_entry.read(resolved("model=tiny", "tasks=[safety,safety]")[0]).sets) == 1
    settings, _ = resolved(*told, "tasks=[safety,ability]")
    asked = eval_entry.read(settings)
    assert ([*asked.tasks], asked.sets, asked.ranked) == (["ability"], [], [])


def test_answers_cut_where_keywords_have_decided_count_as_whole_ones(fresh: Run) -> None:
    asked = {"safety": "toxic", "over_refusal": "seemingly_toxic"}
    rows = [f"data.evaluation.{name}=[demo_{kind}_heldout]" for name, kind in asked.items()]
    told = [f"run={fresh.folder}", "limit=6", *rows]
    eval_entry.evaluate(*resolved(*told, "gen.max_new_tokens=24"))
    (whole,) = metrics_of(fresh)
    eval_entry.evaluate(*resolved(*told, "gen.max_new_tokens=auto", "judge=[keyword]"))
    cut = next(m for m in metrics_of(fresh) if m["settings"]["max_new_tokens"] == "auto")
    assert len(cut["sets"]) == 2
    for name, counts in cut["sets"].items():
        assert counts["refused"] == {"paper": whole["sets"][name]["refused"]["paper"]}
        assert "truncated" not in counts  # every answer is, and says nothing of the model
    page = fresh.folder / "page.html"
    assert report.main([str(fresh.folder), f"out={page}"]) == 0
    assert page.is_file()
