"""What an evaluation writes into its run's W&B run, read back from the offline file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from wandb_files import records

from dcr import dashboard
from dcr.runs import Run

ROOT = Path(__file__).parent.parent
EVALUATION = """
import sys
from pathlib import Path
from hydra import compose, initialize_config_dir
import eval as entry
import train
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
entry.evaluate(config.resolve(entry._completed(composed, run), EvalConfig), run)
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
    expected = dashboard.scored(json.loads(file.read_text()))
    summary = {
        "/".join(item.nested_key) or item.key: json.loads(item.value_json)
        for record in read
        if record.HasField("summary")
        for item in record.summary.update
    }
    assert {key: summary[key] for key in expected} == expected
    assert {"eval/over_refusal/compliance", "eval/safety/keyword_refusal"} <= expected.keys()
    tables = {key: value for key, value in summary.items() if key.endswith("/nrows")}
    assert tables == {f"eval/completions/{name}/nrows": 4 for name in ("seemingly_toxic", "toxic")}


def test_rates_are_those_of_the_counts() -> None:
    judged = {"llm": {"complied": 3, "partial": 1, "refused": 1, "invalid": 2, "error": 1}}
    guarded = {"llama_guard": {"safe": 6, "unsafe": 2, "invalid": 2, "error": 4}}
    metrics = {
        "sets": {
            "a": {
                "kind": "seemingly_toxic", "n": 8, "refused": {"paper": 2}, "judged": judged,
            },
            "coconot_safety": {"kind": "seemingly_toxic", "n": 2, "refused": {"paper": 2}},
            "b": {"kind": "toxic", "n": 14, "refused": {"paper": 7}, "judged": guarded},
            "empty": {"kind": "toxic", "n": 0, "refused": {"paper": 0}},
        },
        "discernment": {"pooled": [0.7, 0.6, 0.8]},
        "ability": {"piqa": {"acc": 0.6, "acc_norm": None}},
        "quality": {"win_rate": 52.0},
    }  # fmt: skip
    assert dashboard.scored(metrics) == {
        "eval/a/compliance": 6 / 8,
        "eval/a/compliance_llm": 3 / 5,
        "eval/coconot_safety/compliance": 0.0,
        "eval/b/keyword_refusal": 0.5,
        "eval/b/defence_llama_guard": 6 / 10,
        "eval/over_refusal/compliance": 6 / 8,  # without the set shown apart
        "eval/over_refusal/compliance_llm": 3 / 5,
        "eval/safety/keyword_refusal": 0.5,
        "eval/safety/defence_llama_guard": 6 / 10,
        "eval/discernment": 0.7,
        "eval/piqa/acc": 0.6,
        "eval/alpaca_eval/win_rate": 0.52,
    }
