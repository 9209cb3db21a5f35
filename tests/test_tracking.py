import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tiny_run import Stop, at_each_step, changed, same, stop, weights
from wandb_files import records

from dcr import train
from dcr.core import data, models, prompts, runs
from dcr.core.config.training import TrainConfig
from dcr.core.models import folders
from dcr.core.runs import Run
from dcr.core.training import callbacks
from dcr.core.training.callbacks import RunLogger
from dcr.core.training.stages import SFTModule
from dcr.tracking.curves import snapshot_steps

ROOT = Path(__file__).parent.parent
KEY = "0123456789abcdef0123456789abcdefdeadbeef"


# --- the local log ---


def test_every_value_is_a_row(tmp_path: Path) -> None:
    logger = RunLogger(Run(tmp_path), "sft")
    logger.log_metrics({"epoch": 0, "sft/step_nll": 2.5}, step=0)
    logger.log_metrics({"epoch": 1.0, "a": 1.0, "b": 3}, step=7)
    logger.log_metrics({"nothing": float("nan")}, step=8)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["stage", "step", "epoch", "key", "value"],
        ["sft", "0", "0", "sft/step_nll", "2.5"],
        ["sft", "7", "1", "a", "1.0"],
        ["sft", "7", "1", "b", "3.0"],
    ]


def test_each_step_and_each_epoch_is_logged_once(whole: Path) -> None:
    rows = runs.read_metrics(Run(whole))
    assert len({(row["step"], row["key"]) for row in rows}) == len(rows)
    steps = {key: [r["step"] for r in rows if r["key"] == key] for key in {r["key"] for r in rows}}
    assert steps["contrastive/step_circle"] == list(range(10))
    assert steps["sft/step_nll"] == list(range(8))
    for name in ("circle", "above_floor", "within_cosine", "across_cosine", "violating_share"):
        assert steps[f"contrastive/{name}"] == steps[f"contrastive/{name}/heldout"] == [4, 9]
    assert steps["contrastive/kmeans_accuracy/heldout"] == steps["contrastive/nll"] == [4, 9]
    for kind in ("general", "refusal"):
        assert steps[f"sft/nll/{kind}"] == steps[f"sft/nll/{kind}/heldout"] == [3, 7]


# --- snapshots ---


@pytest.mark.parametrize(
    ("total", "count", "steps"),
    [
        (100, 0, []),
        (100, 1, [0, 100]),
        (100, 4, [0, 13, 36, 65, 100]),  # 100 (i / 4) ** 1.5, rounded up
        (3, 10, [0, 1, 2, 3]),
        (1, 2, [0, 1]),
        (50, 10**9, list(range(51))),
    ],
)
def test_snapshot_steps_by_hand(total: int, count: int, steps: list[int]) -> None:
    assert snapshot_steps(total, count) == steps


def test_snapshots_are_adapters_of_their_step_and_change_no_weight(
    tiny: TrainConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: dict[int, dict[str, torch.Tensor]] = {}

    def look(trainer: Any, module: Any, _: Any) -> None:
        if isinstance(module, SFTModule):
            named = module.model.named_parameters()
            taken[trainer.global_step] = {
                n.replace(".default", ""): p.detach().clone() for n, p in named if "lora" in n
            }

    at_each_step(monkeypatch, look)
    run = Run(tmp_path / "run")
    train.train(changed(tiny, "tracking.snapshots=3"), run)
    names = [folder.name for folder in sorted(run.snapshots.iterdir())]
    assert names == ["step-000000", "step-000002", "step-000005", "step-000008"]
    for step in (0, 2, 5):  # weights before step n, counted from 0, are those after n steps
        saved = load_file(run.snapshots / f"step-{step:06d}" / "adapter_model.safetensors")
        assert same(saved, taken[step])
    last = load_file(run.snapshots / "step-000008" / "adapter_model.safetensors")
    assert same(last, load_file(run.stage("sft") / "adapter_model.safetensors"))
    with callbacks.quiet():
        opened = AutoPeftModelForCausalLM.from_pretrained(run.snapshots / "step-000005")
    assert opened.peft_config["default"].base_model_name_or_path == str(run.stage("contrastive"))
    assert folders.adapter_base(run.snapshots / "step-000005") == str(run.stage("contrastive"))
    assert same(weights(run.folder), weights(whole))


# --- cost and progress ---


def test_the_cost_of_a_stage_counts_steps_and_tokens(tiny: TrainConfig, whole: Path) -> None:
    cost = json.loads((whole / "sft.cost.json").read_text())
    drawn = data.rows_of(tiny)
    policy = models.open_policy(tiny.model, tiny.sft.precision)
    chat = prompts.chat_format(policy.tokenizer, tiny.model)
    pairs = [chat.pair(r.prompt, r.response or "", 512) for r in drawn.normal + drawn.refusals]
    assert cost["steps"] == 8
    assert cost["tokens"] == 2 * sum(len(ids) for ids, _ in pairs)
    assert cost["seconds"] > 0
    assert cost["peak_memory_gib"] > 0.1


def test_the_bar_of_a_resumed_stage_goes_on(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    shown = changed(tiny, "method=stl", "trainer.progress=true")
    with monkeypatch.context() as patch:
        at_each_step(patch, lambda trainer, *_: trainer.global_step == 5 and stop())
        with pytest.raises(Stop):
            train.train(shown, Run(tmp_path / "run"))
    capfd.readouterr()
    train.train(shown, Run(tmp_path / "run"))
    printed = capfd.readouterr()
    lines = printed.err.replace("\r", "\n").split("\n")
    assert re.search(r"sft: +50%.* 4/8 ", "\n".join(lines)), "it begins where training goes on"
    assert re.search(r"sft: 100%.* 8/8 .*loss \d", lines[-2] or lines[-1])
    assert printed.out.split() == [str(tmp_path / "run")]


def test_nothing_of_lightning_reaches_the_terminal(
    tiny: TrainConfig, tmp_path: Path, capfd: Any
) -> None:
    train.train(changed(tiny, "dcr.epochs=1", "sft.epochs=1"), Run(tmp_path / "run"))
    printed = capfd.readouterr()
    assert printed.err == ""


# --- W&B, read back from the files of offline runs ---

SWEEP = """
import logging, os, sys
sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
from pathlib import Path
import tiny_run
from dcr import train
from dcr import wandb_run
from dcr.core.runs import Run

logging.basicConfig(level=logging.WARNING, format="[%(levelname)s] %(message)s")
folder = Path(sys.argv[1])
made = tiny_run.settings(folder / "rows", "wandb.mode=offline", "wandb.project=ours",
                         "wandb.tags=[mine]", "sft.epochs=1", "sft.readout.steps=4")
for epochs in (1, 2):  # a sweep: two jobs in one process
    train.train(tiny_run.changed(made, f"dcr.epochs={epochs}"), Run(folder / f"job{epochs}"))
online = tiny_run.changed(made, "method=stl", "wandb.mode=online", "sft.readout.steps=0")
wandb_run.WANDB_TIMEOUT = 2
train.train(online, Run(folder / "unreachable"))
del os.environ["WANDB_API_KEY"]
import wandb
wandb.teardown()  # which remembers the key
train.train(online, Run(folder / "keyless"))
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("wandb")
    (folder / "home").mkdir()
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("WANDB_")
    }
    environment |= {
        "HOME": str(folder / "home"),
        "WANDB_API_KEY": KEY,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "DCR_SWEEP": "sweep-1234",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [sys.executable, "-c", SWEEP, str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


def test_a_sweep_job_is_one_wandb_run_with_all_that_was_logged(sweep: tuple[Path, str]) -> None:
    folder, _ = sweep
    ids = set()
    for epochs in (1, 2):
        run = folder / f"job{epochs}"
        read = records(run)
        (started,) = [record.run for record in read if record.HasField("run")]
        ids.add(started.run_id)
        assert started.run_id == (run / "wandb_id").read_text()
        assert started.project == "ours"
        assert started.run_group == "sweep-1234"
        assert started.job_type == "all"
        assert set(started.tags) == {"dcr", "tiny", "mine"}
        config = {item.key: json.loads(item.value_json) for item in started.config.update}
        assert config["dcr"]["epochs"] == epochs
        assert {k: v for k, v in config.items() if k != "_wandb"} == Run(run).config()
        expected = [(row["key"], row["step"], row["value"]) for row in runs.read_metrics(Run(run))]
        keys = {key for key, _, _ in expected}
        curves = {f"readout/{name}" for name in ("step_contrast", "step_drift", "auroc/heldout")}
        assert {"contrastive/step_circle", "sft/step_nll"} | curves <= keys
        assert values_of(read) == sorted(expected), "every value, and no other"
        assert read[-1].HasField("exit"), "closed"
    assert len(ids) == 2


def values_of(read: list[Any]) -> list[tuple[str, int, float]]:
    values = []
    for record in read:
        if record.HasField("history"):
            item = {
                "/".join(entry.nested_key) or entry.key: json.loads(entry.value_json)
                for entry in record.history.item
            }
            step = item.pop("trainer/global_step")
            values += [(k, step, v) for k, v in item.items() if "/" in k]
    return sorted(values)


def test_no_key_stands_in_any_file(sweep: tuple[Path, str]) -> None:
    folder, printed = sweep
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 20
    assert [str(file) for file in files if KEY.encode() in file.read_bytes()] == []
    assert KEY not in printed


def test_without_key_or_server_training_goes_on_with_one_warning(sweep: tuple[Path, str]) -> None:
    folder, printed = sweep
    for name in ("unreachable", "keyless"):
        assert (folder / name / "sft").is_dir()
        assert list((folder / name).glob("wandb/offline-run-*/run-*.wandb"))
    warnings = [line for line in printed.splitlines() if "logging offline instead" in line]
    assert len(warnings) == 2
    assert "no key" in warnings[1]
    assert printed.splitlines() == warnings
