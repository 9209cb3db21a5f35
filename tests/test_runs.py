import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dcr import adopting, continuing
from dcr.core import machine, runs, storage
from dcr.core.config import ConfigError, DataError, Stage, UserError
from dcr.core.runs import Run
from tests.tiny_run import failing

CONFIG = {
    "method": "dcr",
    "seed": 0,
    "preset_name": "paper",
    "stage": "all",
    "model": {"name": "tiny"},
    "data": {"label": "demo"},
    "dcr": {"margin": 0.25, "nll": {"weight": 0.001}},
    "sft": {},
}


def record(count: int, fingerprint: str) -> dict[str, Any]:
    rows = {"count": count, "fingerprint": fingerprint * 8, "ids": ["a"] * count}
    return {"rows": {"toxic": rows}, "dropped": {}}


# --- what a folder was made with ---


def claim(run: Run, made_with: dict[str, Any], force: bool) -> None:
    continuing.check_config(run, made_with, force)
    runs.write_config(run, made_with)


def claim_rows(run: Run, record: dict[str, Any], force: bool) -> None:
    continuing.check_rows(run, record, force)
    storage.write_json(run.rows_file, record)


def test_a_claim_writes_plain_yaml_that_reads_back(tmp_path: Path) -> None:
    run = Run(tmp_path / "new" / "run")
    claim(run, CONFIG, force=False)
    assert run.config() == CONFIG == yaml.safe_load(run.config_file.read_text())
    claim(run, CONFIG, force=False)
    claim(run, CONFIG | dict.fromkeys(continuing.FREE_KEYS, "other"), force=False)


def test_another_configuration_is_refused_with_the_differences(tmp_path: Path) -> None:
    run = Run(tmp_path)
    claim(run, CONFIG, force=False)
    other = {**CONFIG, "seed": 1, "dcr": {"margin": 0.25, "nll": {"weight": 0.1}}}
    with pytest.raises(ConfigError) as refused:
        claim(run, other, force=False)
    for part in (str(tmp_path), "dcr.nll.weight: 0.001 -> 0.1", "seed: 0 -> 1", "force=true"):
        assert part in str(refused.value)
    assert "margin" not in str(refused.value)
    assert run.config() == CONFIG, "nothing was written"
    claim(run, other, force=True)
    assert run.config() == other


@pytest.mark.parametrize(
    ("nll", "shared"),
    [
        ({"source": "prompt_tokens", "weight": 0.1}, True),
        ({"source": "general", "weight": 0.0}, True),
        ({"source": "general", "weight": 0.1}, False),  # whose pairs are laid out as SFT's
    ],
)
@pytest.mark.parametrize("key", ["max_len", "train_on_prompt"])
def test_a_stage_one_with_general_pairs_depends_on_their_length(
    nll: dict[str, Any], shared: bool, key: str, tmp_path: Path
) -> None:
    run, before = Run(tmp_path), {**CONFIG, "dcr": {"nll": nll}, "sft": {key: 512, "epochs": 1}}
    run.stage("contrastive").mkdir()
    claim(run, before, force=False)
    longer = {**before, "sft": {key: 1024, "epochs": 1}}
    made = [adopting.made_of(each, Stage.contrastive) for each in (before, longer)]
    assert (made[0] == made[1]) is shared
    if shared:
        return claim(run, longer, force=True)
    with pytest.raises(ConfigError, match=f"sft.{key}: 512 -> 1024.*contrastive is done there"):
        claim(run, longer, force=True)
    claim(run, {**before, "sft": {key: 512, "epochs": 2}}, force=True)


def test_differences_name_every_leaf() -> None:
    old = {"a": 1, "b": {"c": [1], "d": None}, "gone": True, "t": {"x": 1}}
    new = {"a": 1, "b": {"c": [1, 2], "d": 0}, "came": 2, "t": 3}
    assert storage.differences(old, new) == [
        "b.c: [1] -> [1, 2]",
        "b.d: None -> 0",
        "came: None -> 2",
        "gone: True -> None",
        "t: {'x': 1} -> 3",
    ]


def test_other_rows_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    claim_rows(run, record(2, "a"), force=False)
    claim_rows(run, record(2, "a"), force=False)
    for other in (record(3, "a"), record(2, "b")):
        with pytest.raises(ConfigError, match=r"other rows \(toxic: 2 rows"):
            claim_rows(run, other, force=False)
    assert run.record() == record(2, "a")
    claim_rows(run, record(2, "b"), force=True)
    assert run.record() == record(2, "b")


def test_other_base_weights_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    continuing.claim_base(run, "contrastive", "one", force=False)
    with pytest.raises(ConfigError, match=r"other weights \(contrastive: one -> two\)"):
        continuing.claim_base(run, "contrastive", "two", force=False)
    run.stage("contrastive").mkdir()
    continuing.claim_base(run, "sft", "stage one", force=False)
    assert json.loads(run.base_file.read_text()) == {"contrastive": "one", "sft": "stage one"}
    with pytest.raises(ConfigError, match="sft: stage one -> other"):
        continuing.claim_base(run, "sft", "other", force=False)
    run.stage("contrastive").rmdir()  # stage one is made anew, and with it what SFT starts from
    continuing.claim_base(run, "contrastive", "one", force=False)
    assert json.loads(run.base_file.read_text()) == {"contrastive": "one"}


def test_rows_that_are_gone_or_a_pipe_are_named(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(ConfigError, match=r"no config\.yaml there"):
        run.config()
    assert run.record() == {}
    assert not run.done("sft")
    run.stage("sft").mkdir()
    with pytest.raises(DataError, match=r"rows\.json: cannot be read \(No such file"):
        run.record()
    claim_rows(run, {"rows": {}}, force=False)  # training draws them again
    run.rows_file.unlink()
    os.mkfifo(run.rows_file)  # to open it would wait for a writer
    with pytest.raises(DataError, match=r"rows\.json: cannot be read \(a pipe or device"):
        run.record()


# --- metrics ---

ROWS = [
    ("contrastive", 0, 0, "contrastive/circle", 1.5),
    ("contrastive", 1, 0, "contrastive/circle", 1.25),
    ("sft", 0, 0, 'odd, "key"', 1e-30),
    ("sft", 1, 0, "sft/step_nll", 2.0),
    ("sft", 2, 1, "sft/step_nll", 1.0),
]


def read(run: Run) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in runs.METRIC_FIELDS) for row in runs.read_metrics(run)]


def test_metrics_read_back_as_written(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert runs.read_metrics(run) == []
    runs.append_metrics(run, ROWS[:2])
    runs.append_metrics(run, ROWS[2:])
    assert read(run) == ROWS
    assert run.metrics_file.read_text().count("stage,step") == 1


@pytest.mark.parametrize(
    "torn",
    [
        *("sft,3,1,sft/step", "sft,3,1,sft/step_nll,", "sft", "sft,x,1,a,1"),
        "sft,3,1,sft/step_nll,1.2",  # of 1.25
    ],
)
def test_a_line_torn_by_a_kill_is_left_out_and_said(
    tmp_path: Path, torn: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    runs.append_metrics(run, ROWS)
    with run.metrics_file.open("a") as file:
        file.write(torn)
    assert read(run) == ROWS
    runs.forget_metrics_beyond(run, "sft", 3)
    assert "metrics.csv: its last line broke off" in caplog.text
    runs.append_metrics(run, [("sft", 3, 1, "sft/step_nll", 0.5)])
    assert read(run) == [*ROWS, ("sft", 3, 1, "sft/step_nll", 0.5)]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        *(("sft,3,1,a,inf", "not finite"), ("sft,3,1,a,nan", "not finite")),
        *(("sft,inf,1,a,1", "inf"), ("sft,3,inf,a,1", "inf"), ("sft,3,1,a", "not enough")),
        *(("sft,3,1,a,1,2", "too many"), ("sft,3,1," + "a" * 200_000 + ",1", "field larger")),
        *(("", ""), ("sft,x,1,a,1", "'x'")),
    ],
)
def test_a_row_that_training_did_not_write_is_named(tmp_path: Path, line: str, says: str) -> None:
    run = Run(tmp_path)
    runs.append_metrics(run, ROWS)
    with run.metrics_file.open("a") as file:
        file.write(f"{line}\r\n")
    with pytest.raises(DataError, match=rf"metrics\.csv:7: row: .*{says}.*; remove the line"):
        runs.read_metrics(run)


def test_what_came_after_the_checkpoint_is_forgotten(tmp_path: Path) -> None:
    run = Run(tmp_path)
    runs.forget_metrics_beyond(run, "sft", 1)
    assert not run.metrics_file.exists()
    runs.append_metrics(run, ROWS)
    text = run.metrics_file.read_text()
    runs.forget_metrics_beyond(run, "sft", 1)  # one step was made: step 0
    assert read(run) == ROWS[:3]
    assert text.startswith(run.metrics_file.read_text()), "the rows that stay, to the byte"


def test_forgetting_never_loses_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    runs.append_metrics(run, ROWS)
    monkeypatch.setattr(os, "replace", failing(OSError(28, "No space left on device")))
    with pytest.raises(UserError):
        runs.forget_metrics_beyond(run, "sft", 0)
    assert read(run) == ROWS
    run.metrics_file.unlink()
    run.metrics_file.mkdir()
    with pytest.raises(UserError, match=r"metrics\.csv: cannot be written"):
        runs.append_metrics(run, ROWS)


def test_peak_memory_is_that_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # else it is the GPU's
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert machine.peak_memory_gib() == pytest.approx(peak / 2**20, rel=0.05)
