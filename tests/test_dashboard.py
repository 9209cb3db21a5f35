"""What an evaluation writes into its run's W&B run, read back from the offline file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from wandb_files import records

from dcr import dashboard
from dcr.runs import Run

ROOT = Path(__file__).parent.parent
EVALUATION = """
import sys
from pathlib import Path
from hydra import compose, initialize_config_dir
from dcr import eval as entry
from dcr import train
from dcr import cli, config
from dcr.config import EvalConfig
from dcr.runs import Run
from tests import tiny_run
folder = Path(sys.argv[1])
rows = tiny_run.write_rows(folder / "rows")
run = Run(folder / "run")
train.train(tiny_run.settings(folder / "rows", "stage=contrastive"), run)
cli.prepare()
with initialize_config_dir(str(tiny_run.CONF), version_base="1.3"):
    composed = compose("eval", [
        f"run={run.folder}", "limit=4", "gen.max_new_tokens=4", "trainer.progress=false",
        "wandb.mode=offline", f"data.evaluation.over_refusal=[{rows['seemingly_toxic']}]",
        f"data.evaluation.safety=[{rows['toxic']}]"])
entry.evaluate(*entry.resolved(composed))
"""


@pytest.mark.timeout(300)  # a process of its own, for W&B keeps a service alive
def test_scores_and_answers_go_to_the_run_s_own_w_and_b_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EVALUATION, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "run")
    read = records(run.folder)
    (started,) = [record.run for record in read if record.HasField("run")]
    assert started.run_id == dashboard.run_id(run)
    assert started.job_type == "eval"
    (file,) = run.folder.glob("eval/*/metrics.json")
    variant = "max_new_tokens-4_limit-4"
    scores = dashboard.scored(json.loads(file.read_text()))
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
    tables = {key: value for key, value in summary.items() if key.endswith("/nrows")}
    names = [f"eval/{variant}/completions/{name}" for name in ("seemingly_toxic", "toxic")]
    assert tables == {f"{name}/nrows": 4 for name in names}


class Summary:
    """Stands in for W&B's run: what its summary holds and what was logged."""

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}
        self.logged: list[dict[str, Any]] = []

    def define_metric(self, *_: object, **__: object) -> None:
        pass

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)


def metrics(weights: str = "sft", refused: int = 1, **told: Any) -> dict[str, Any]:
    plain = {"max_new_tokens": 256, "limit": None, "seed": 0, "precision": "bf16"}
    counts = {"kind": "seemingly_toxic", "n": 10, "refused": {"paper": refused}}
    step = told.pop("step", None)
    return {"weights": weights, "step": step, "settings": plain | told, "sets": {"a": counts}}


def test_no_evaluation_overwrites_another_s_scores(tmp_path: Path) -> None:
    run, shown = Run(tmp_path), Summary()
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
    ]
    every = [metrics(), *others]
    for refused, made in enumerate(every):
        made["sets"]["a"]["refused"]["paper"] = refused
        dashboard.show(cast(Any, shown), run, made, {})
    key = "over_refusal/compliance"
    kept = {name: value for name, value in shown.summary.items() if name.endswith(key)}
    assert sorted(kept.values()) == [round(i / 10, 1) for i in range(11)]
    assert kept[f"eval/{key}"] == 1.0
    assert kept[f"eval/contrastive/{key}"] == 0.9
    # snapshots stand at their steps, each variant under its own key
    for step, made in ((2, metrics("snapshot", step=2)), (4, metrics("snapshot", step=4, limit=5))):
        dashboard.show(cast(Any, shown), run, made, {})
        assert shown.logged[-1]["snapshot/step"] == step
    assert f"snapshot/{key}" in shown.logged[-2]
    assert f"snapshot/limit-5/{key}" in shown.logged[-1]


def test_the_last_stage_that_is_done_has_the_plain_keys(tmp_path: Path) -> None:
    run, shown = Run(tmp_path), Summary()
    for weights in ("contrastive", "base", "endpoint", "sft"):
        dashboard.show(cast(Any, shown), run, metrics(weights), {})
    assert all(name.count("/") == 2 for name in shown.summary)


def test_rates_are_those_of_the_counts() -> None:
    judged = {"llm": {"complied": 3, "partial": 1, "refused": 1, "invalid": 2, "error": 1}}
    guarded = {"llama_guard": {"safe": 6, "unsafe": 2, "invalid": 2, "error": 4}}
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
    assert dashboard.scored(found) == {
        "a/compliance": 6 / 8,
        "a/compliance_llm": 3 / 5,
        "coconot_safety/compliance": 0.0,
        "b/keyword_refusal": 0.5,
        "b/defence_llama_guard": 6 / 10,
        "over_refusal/compliance": 6 / 8,  # without the set shown apart
        "over_refusal/compliance_llm": 3 / 5,
        "safety/keyword_refusal": 0.5,
        "safety/defence_llama_guard": 6 / 10,
        "discernment": 0.7,
        "piqa/acc": 0.6,
        "alpaca_eval/win_rate": 0.52,
    }
