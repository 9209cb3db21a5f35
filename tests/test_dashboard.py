"""Runs in W&B, read back from its offline files, and the dashboard made for them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import wandb
from wandb_files import records

from dcr import dashboard, wandb_run, wandb_scores
from dcr.core import runs, storage
from dcr.core.config import Kind
from dcr.core.generation import Completion
from dcr.core.runs import Run
from dcr.judges import verdicts
from dcr.report import columns, figures
from tests.servers.loopback import Answer, Request, answering, as_json

# of W&B's library for workspaces and reports
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")

ROOT = Path(__file__).parent.parent
EVALUATION = """
import sys
from pathlib import Path
from hydra import compose, initialize_config_dir
from dcr import eval as entry
from dcr import train
from dcr import dashboard
from dcr import cli
from dcr.extensions import EvalSettings
from dcr.core.runs import Run
from tests import tiny_run
folder = Path(sys.argv[1])
rows = tiny_run.write_rows(folder / "rows")
run = Run(folder / "run")
made = tiny_run.settings(folder / "rows", "sft.epochs=1", "dcr.epochs=1", "wandb.mode=offline")
train.train(made, run)
cli.prepare()
with initialize_config_dir(str(tiny_run.CONF), version_base="1.3"):
    composed = compose("eval", [
        f"run={run.folder}", "limit=4", "gen.max_new_tokens=4", "trainer.progress=false",
        "wandb.mode=offline", f"data.evaluation.over_refusal=[{rows['seemingly_toxic']}]",
        f"data.evaluation.safety=[{rows['toxic']}]"])
for _ in range(2):
    entry.evaluate(*cli.resolved(composed, EvalSettings))
assert dashboard.main([str(run.folder), f"out={folder / 'board.json'}"]) == 0
"""


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run trained and evaluated twice, in a process of its own, for W&B keeps a service alive."""
    place = tmp_path_factory.mktemp("evaluated")
    done = subprocess.run(
        [sys.executable, "-c", EVALUATION, str(place)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return Run(place / "run")


def test_scores_and_answers_go_to_the_run_s_own_w_and_b_run(evaluated: Run) -> None:
    run, read = evaluated, records(evaluated.folder)
    started = [record.run for record in read if record.HasField("run")]
    assert {each.run_id for each in started} == {wandb_run.run_id(run)}
    assert [each.job_type for each in started] == ["all", "eval", "eval"]
    (file,) = run.folder.glob("eval/*/metrics.json")
    variant = "max_new_tokens-4_limit-4"
    scores = wandb_scores.scored(json.loads(file.read_text()))
    expected = {f"eval/{variant}/{key}": value for key, value in scores.items()}
    summary = {
        "/".join(item.nested_key) or item.key: json.loads(item.value_json)
        for record in read
        if record.HasField("summary")
        for item in record.summary.update
    }
    assert {key: summary[key] for key in expected} == expected
    assert {"over_refusal/compliance", "safety/keyword_refusal"} <= scores.keys()
    assert not {f"eval/{key}" for key in scores} & summary.keys()
    assert summary[f"eval/{variant}/completions/nrows"] == 8


def test_artifacts_lead_from_settings_to_the_evaluation_and_never_twice(evaluated: Run) -> None:
    found = [record.artifact for record in records(evaluated.folder) if record.HasField("artifact")]
    of = wandb_run.run_id(evaluated)
    ours = [made for made in found if made.type != "run_table"]
    lineage = [(made.name.removesuffix(f"-{of}"), made.use_after_commit) for made in ours]
    evaluation = next(made.name for made in ours if made.type == "evaluation")
    assert lineage == [
        ("settings", True), ("contrastive", False),
        ("settings", True), ("contrastive", True), ("sft", False),
        ("sft", True), (evaluation, False),
        ("sft", True), (evaluation, False),
    ]  # fmt: skip
    # what is logged again is the same version to the server, which keeps it once
    assert (
        len({(made.name, made.digest) for made in ours}) == len({made.name for made in ours}) == 4
    )
    files = {made.type: [each.path for each in made.manifest.contents] for made in ours}
    assert files == {
        "settings": ["config.yaml"],
        "weights": ["checksums.json"],
        "adapter": ["adapter_config.json", "adapter_model.safetensors", "checksums.json"],
        "evaluation": ["metrics.csv"],
    }
    adapter = next(made for made in ours if made.type == "adapter").manifest.contents
    assert {Path(each.local_path).parent for each in adapter} == {evaluated.stage("sft")}  # no copy
    rows = json.loads(ours[0].metadata)["rows"]
    assert rows == {n: of["fingerprint"] for n, of in evaluated.record()["rows"].items()}


class Summary:
    """Stands in for W&B's run: what its summary holds and what was logged."""

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}
        self.logged: list[dict[str, Any]] = []

    def define_metric(self, *_: object, **__: object) -> None:
        pass

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    offline = False

    def use_artifact(self, _: object) -> None:
        pass

    log_artifact = use_artifact


@pytest.fixture
def of_dcr(tmp_path: Path) -> Run:
    """A folder of a run with two epochs of stage one and every toxic row that is left."""
    stages = {"dcr": {"epochs": 2, "ratio": None}, "sft": {"precision": "bf16"}}
    nodes = {"model": {"name": "tiny"}, "data": {}} | stages
    (run := Run(tmp_path)).config_file.write_text(
        json.dumps({"method": "dcr", "seed": 0, "preset_name": "paper"} | nodes)
    )
    return run


def metrics(weights: str = "sft", refused: int = 1, **told: Any) -> dict[str, Any]:
    plain = {"max_new_tokens": 256, "limit": None, "seed": 0, "precision": "bf16"}
    counts = {"kind": "seemingly_toxic", "n": 20, "refused": {"paper": refused}}
    step = told.pop("step", None)
    return {"weights": weights, "step": step, "settings": plain | told, "sets": {"a": counts}}


def test_no_evaluation_overwrites_another_s_scores(of_dcr: Run) -> None:
    run, shown = of_dcr, Summary()
    run.stage("sft").mkdir()
    edit = {"method": "surgical", "strength": 1.0, "released_data": False, "train": 8}
    others = [
        metrics("contrastive"),
        metrics(steering=edit),
        metrics(steering=edit | {"strength": 2.0}),
        metrics(steering=edit | {"train": 9}),
        metrics(steering=edit, validation=True),
        metrics(self_cd=1.5),
        metrics(limit=100),
        metrics(max_new_tokens=64),
        metrics(seed=1),
        metrics(precision="fp32"),
        metrics() | {"data": "dev"},
    ]
    every = [metrics(), *others]
    for refused, made in enumerate(every):
        made["sets"]["a"]["refused"]["paper"] = refused
        wandb_scores.show(cast(Any, shown), run, made, {})
    key = "over_refusal/compliance"
    kept = {name: value for name, value in shown.summary.items() if name.endswith(key)}
    assert sorted(kept.values()) == [round(i / 20, 2) for i in range(9, 21)]
    assert kept[f"eval/{key}"] == 1.0
    assert kept[f"eval/contrastive/{key}"] == 0.95
    assert kept[f"eval/data-dev/{key}"] == 0.45
    # the plain one is a point of the ablation as well
    assert [made for made in shown.logged if "dcr.epochs" in made] == [
        {"dcr.epochs": 2.0, f"eval/{key}": 1.0, "eval/a/compliance": 1.0}
    ]
    # snapshots stand at their steps, each variant under its own key
    for step, made in ((2, metrics("snapshot", step=2)), (4, metrics("snapshot", step=4, limit=5))):
        wandb_scores.show(cast(Any, shown), run, made, {})
        assert shown.logged[-1]["snapshot/step"] == step
    assert f"snapshot/{key}" in shown.logged[-2]
    assert f"snapshot/limit-5/{key}" in shown.logged[-1]


def test_a_gate_is_named_in_keys_of_letters(of_dcr: Run) -> None:
    gates = [{"name": "mine", "alone": alone} for alone in (True, False)]
    named = [wandb_scores.variant(metrics(gate=gate, limit=5), of_dcr) for gate in gates]
    assert all(re.fullmatch("gate-mine-[0-9a-f]{4}_limit-5", name) for name in named)
    assert named[0] != named[1]


def test_the_last_stage_that_is_done_has_the_plain_keys(of_dcr: Run) -> None:
    run, shown = of_dcr, Summary()
    for weights in ("contrastive", "base", "endpoint", "sft"):
        wandb_scores.show(cast(Any, shown), run, metrics(weights), {})
    assert all(name.count("/") == 2 for name in shown.summary)


def test_rates_are_those_of_the_counts() -> None:
    judged = {"llm": {"complied": 3, "partial": 1, "refused": 1, "invalid": 2, "error": 1}}
    guarded = {"llama_guard": {"safe": 6, "unsafe": 2, "invalid": 2, "error": 4}}
    judged |= {"outcome": {"n": 8, "labels": {"answered": 6, "circular": 2}}}
    found = {
        "sets": {
            "a": {
                "kind": "seemingly_toxic", "n": 8, "refused": {"paper": 2}, "judged": judged,
            },
            "coconot_safety": {"kind": "seemingly_toxic", "n": 2, "refused": {"paper": 2}},
            "b": {"kind": "toxic", "n": 14, "refused": {"paper": 7}, "judged": guarded},
            "empty": {"kind": "toxic", "n": 0, "refused": {"paper": 0}},
        },
        "discernment": {"pooled": {"auroc": [0.7, 0.6, 0.8]}},
        "ability": {"piqa": {"acc": 0.6, "acc_norm": None}},
        "quality": {"win_rate": 52.0},
    }  # fmt: skip
    assert wandb_scores.scored(found) == {
        "a/compliance": 6 / 8,
        "a/compliance_llm": 3 / 5,
        "a/answered_outcome": 6 / 8,
        "a/circular_outcome": 2 / 8,
        "coconot_safety/compliance": 0.0,
        "b/keyword_refusal": 0.5,
        "b/defence_llama_guard": 6 / 10,
        "over_refusal/compliance": 6 / 8,  # without the set shown apart
        "over_refusal/compliance_llm": 3 / 5,
        "over_refusal/answered_outcome": 6 / 8,
        "over_refusal/circular_outcome": 2 / 8,
        "safety/keyword_refusal": 0.5,
        "safety/defence_llama_guard": 6 / 10,
        "discernment": 0.7,
        "piqa/acc": 0.6,
        "alpaca_eval/win_rate": 0.52,
    }


def test_the_table_has_every_verdict_beside_the_answer(tmp_path: Path) -> None:
    run = Run(tmp_path)
    answers = [
        Completion(str(i), f"Question {i}", text, 9, True, 0.5)
        for i, text in enumerate(["I'm sorry, but I can't help.", "Sure: first, water the rose."])
    ]
    of = [verdicts.answer_fingerprint(answer) for answer in answers]
    storage.append_lines(
        run.evaluation("sft-1") / "verdicts/wildguard-aa/a.jsonl",
        [verdicts.Verdict("0", of[0], "ok", compliance="refused", safety="safe")],
    )
    helped = verdicts.Verdict("0", of[0], "ok", "partial", raw="refused_but_helped", asked=False)
    storage.append_lines(run.evaluation("sft-1") / "verdicts/outcome-bb/a.jsonl", [helped])
    counts = {"a": {"kind": "toxic", "judged": {"wildguard": {}, "outcome": {}}}}
    table = wandb_scores.completions(run, {"sets": counts}, {"a": answers})
    assert list(table)[-4:] == ["keyword:paper", "keyword:recommended", "wildguard", "outcome"]
    assert table.iloc[:, -4:].to_numpy().tolist() == [
        ["refused", "refused", "refused, safe", "refused_but_helped"],
        ["complied", "complied", "", ""],
    ]


# --- the dashboard ------------------------------------------------------------------------------

SAVING = """
from dcr import dashboard
for _ in range(2):
    assert dashboard.main(["project=study"]) == 0
"""


class Server:
    """W&B's GraphQL interface as far as a dashboard asks for it; keeps every mutation."""

    def __init__(self) -> None:
        self.saved: list[dict[str, Any]] = []

    def __call__(self, request: Request) -> Answer:
        if not request.path.endswith("/graphql"):
            return as_json({})  # telemetry
        asked, given = request.body["query"], request.body.get("variables") or {}
        page = {"endCursor": None, "hasNextPage": False}
        if "upsertView(" in asked:
            self.saved.append(given)
            view = {"id": given.get("id") or f"id of {given['type']}", "description": ""}
            view |= {"project": {"id": "p", "name": given["projectName"], "entityName": "me"}}
            view |= {key: given[key] for key in ("name", "displayName", "spec", "type")}
            view |= {"updatedAt": "2026-01-01T00:00:00"}
            return as_json({"data": {"upsertView": {"view": view, "inserted": True}}})
        if "allViews" in asked:
            user = {"username": "me", "photoUrl": None, "email": None}
            edges = [
                {"node": {key: view[key] for key in ("name", "displayName", "spec")}
                 | {"id": f"id of {view['type']}", "description": "", "user": user}
                 | {"createdAt": "2026-01-01T00:00:00", "updatedAt": "2026-01-01T00:00:00"}}
                for view in self.saved if view["type"] == given.get("viewType", "runs")
            ]  # fmt: skip
            return as_json({"data": {"project": {"allViews": {"edges": edges, "pageInfo": page}}}})
        if "models(" in asked:
            made = {"id": "p", "name": "study", "entityName": "me", "user": None}
            node = made | {"createdAt": "2026-01-01T00:00:00", "isBenchmark": False}
            edges = [{"node": node, "cursor": "c"}] if self.saved else []
            return as_json({"data": {"models": {"edges": edges, "pageInfo": page}}})
        if "upsertModel" in asked:
            made = {"id": "p", "name": "study", "entityName": "me"}
            return as_json({"data": {"upsertModel": {"project": made, "model": made}}})
        return as_json({"data": {"viewer": {"id": "u", "entity": "me"}}})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    """W&B's server after the command has run twice with a key."""
    made = Server()
    with answering(made) as url:
        told = {"WANDB_BASE_URL": url.removesuffix("/v1"), "WANDB_API_KEY": "a" * 40}
        home = {"HOME": str(tmp_path_factory.mktemp("home")), "WANDB_MODE": "online"}
        done = subprocess.run(
            [sys.executable, "-c", SAVING],
            cwd=ROOT,
            env=os.environ | told | home | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    return made


def without_ids(spec: Any) -> Any:
    """Panels and sets of runs have random names."""
    if isinstance(spec, dict):
        return {k: without_ids(v) for k, v in spec.items() if k not in ("__id__", "id")}
    return [without_ids(each) for each in spec] if isinstance(spec, list) else spec


def written(place: Path, *words: str) -> dict[str, Any]:
    assert dashboard.main(["project=study", f"out={place}", *words]) == 0
    return json.loads(place.read_text())


def test_what_is_saved_is_what_the_file_says(server: Server, tmp_path: Path) -> None:
    assert [view["type"] for view in server.saved] == ["runs", "project-view"] * 2
    first, second = server.saved[:2], server.saved[2:]
    # the second time both are found again
    assert [view.get("id") for view in first] == [None, None]
    assert [view["id"] for view in second] == ["id of runs", "id of project-view"]
    assert {view["projectName"] for view in server.saved} == {"study"}
    told = written(tmp_path / "board.json")
    for name, saved in zip(("report", "workspace"), first, strict=True):
        assert without_ids(told[name]["spec"]) == without_ids(json.loads(saved["spec"]))


def test_without_an_account_the_file_says_how_to_apply_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    assert dashboard.main([]) == 0
    assert "wandb login" in capsys.readouterr().out
    assert json.loads((tmp_path / "dashboard.json").read_text())["project"] == "dcr"


def test_panels_show_keys_that_runs_log(evaluated: Run, tmp_path: Path) -> None:
    """Every key of stages that were trained, and scores under the names that `show` gives them."""
    told = json.dumps(written(tmp_path / "board.json")["workspace"])
    logged = {row["key"] for row in runs.read_metrics(evaluated)}
    named = set(re.findall(r'"((?:contrastive|sft)/[\w/]+)"', told))
    tracked = {key for key in named if "/refusal_probability/" in key}
    assert tracked == {
        f"{stage}/refusal_probability/{kind.value}"
        for stage in ("contrastive", "sft")
        for kind in Kind
    }
    assert named - tracked <= logged
    (file,) = evaluated.folder.glob("eval/*/metrics.json")
    scores = {f"eval/{key}" for key in wandb_scores.scored(json.loads(file.read_text()))}
    assert set(re.findall(r"eval/(?!completions)[\w/]+", told)) <= scores
    assert {"dcr.epochs", "dcr.ratio", "eval/completions"} <= set(re.findall(r'"([\w./]+)"', told))


def test_runs_have_the_colour_of_their_method(of_dcr: Run, tmp_path: Path) -> None:
    told = written(tmp_path / "board.json", str(of_dcr.folder))
    colour = {wandb_run.run_id(of_dcr): figures.PALETTE[list(columns.METHODS).index("dcr")]}
    assert told["workspace"]["spec"]["section"]["customRunColors"] == colour
