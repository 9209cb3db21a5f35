import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import Stop, changed, drawn, failing, same, settings, stop, weights, write_rows

from dcr import continuing, train, wandb_run
from dcr.choice import transfer
from dcr.core import models
from dcr.core.config import ConfigError, Precision
from dcr.core.config.training import TrainConfig
from dcr.core.models.training import save_full
from dcr.core.runs import Run
from dcr.core.training.stages import SFTModule

# --- what a run folder holds ---


def test_the_stages_of_a_method(tiny: TrainConfig, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.train(changed(tiny, "stage=contrastive"), Run(run))
    assert not (run / "sft").exists()
    train.train(changed(tiny, "stage=sft"), Run(run))
    assert same(weights(run), weights(whole)), "two commands end where one does"


# --- refusals, before anything is written ---


@pytest.mark.parametrize("folder", ["new", "of another's"])
def test_a_model_that_cannot_be_opened_leaves_the_folder_as_it_was(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    run = tmp_path / "run"
    if folder != "new":
        run.mkdir()
        (run / "notes.txt").write_text("mine")

    monkeypatch.setattr(models, "open_policy", failing(ConfigError("cannot be opened")))
    with pytest.raises(ConfigError, match="cannot be opened"):
        train.train(changed(tiny, "wandb.mode=offline"), Run(run))
    kept = [file.name for file in run.rglob("*")] if run.exists() else None
    assert kept == (None if folder == "new" else ["notes.txt"])


def test_other_rows_in_the_same_files(tmp_path: Path) -> None:
    made = settings(tmp_path / "rows", "method=stl")
    train.train(made, Run(tmp_path / "run"))
    files = write_rows(tmp_path / "rows")
    text = files["normal"].read_text()
    files["normal"].write_text(text.replace("A lamp A lamp", "An oven", 1))
    with pytest.raises(ConfigError, match=r"made with other rows \(normal"):
        train.train(made, Run(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"sft\.warmup: 0\.03 -> 0\.1"):
        train.train(changed(made, "sft.warmup=0.1"), Run(tmp_path / "run"))
    run = Run(tmp_path / "run")
    before = run.record(), continuing.binding(run.config())
    for forced in (replace(made, force=True), changed(made, "sft.warmup=0.1", "force=true")):
        with pytest.raises(ConfigError, match="sft is done there and would not be trained anew"):
            train.train(forced, run)
    assert (run.record(), continuing.binding(run.config())) == before


def test_force_begins_anew_what_is_not_done(
    tiny: TrainConfig, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage one stays where it does not depend on the change; the rest is as trained at once."""
    run, slower = Run(half), changed(tiny, "sft.lr=1e-4", "force=true")
    with monkeypatch.context() as patch:
        patch.setattr(SFTModule, "validation_step", stop)
        with pytest.raises(Stop):
            train.train(tiny, run)
    assert any(run.checkpoints("sft").iterdir())
    with pytest.raises(ConfigError, match="contrastive is done there and would not be trained"):
        train.train(changed(tiny, "dcr.margin=0.3", "force=true"), run)
    train.train(slower, run)
    at_once = Run(tmp_path / "at_once")
    shutil.copytree(half, at_once.folder, ignore=shutil.ignore_patterns("sft*", "checkpoints"))
    train.train(slower, at_once)
    named = "sft/adapter_model.safetensors"
    assert (run.folder / named).read_bytes() == (at_once.folder / named).read_bytes()
    assert run.config()["sft"]["lr"] == 1e-4


def test_a_forced_command_that_is_refused_leaves_the_configuration(tmp_path: Path) -> None:
    """Stage one, which is done, does not depend on SFT's rate, but on rows that are others now."""
    made, run = settings(tmp_path / "rows"), Run(tmp_path / "run")
    train.train(changed(made, "stage=contrastive"), run)
    before = run.config_file.read_bytes(), run.rows_file.read_bytes()
    (begun := run.checkpoints("sft") / "last.ckpt").parent.mkdir(parents=True)
    begun.touch()  # of an SFT that was stopped
    toxic = write_rows(tmp_path / "rows")["toxic"]
    toxic.write_text(toxic.read_text().replace("ow", "Ow"))
    with pytest.raises(ConfigError, match="contrastive is done there and would not be trained"):
        train.train(changed(made, "sft.lr=1e-4", "force=true"), run)
    assert (run.config_file.read_bytes(), run.rows_file.read_bytes()) == before
    assert begun.exists()


def test_other_weights_under_the_same_name(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    policy = models.open_policy(tiny.model, Precision.fp32)
    save_full(policy, base)
    made = replace(tiny, model=replace(tiny.model, name=str(base), architecture=None))
    made = changed(made, "method=stl")

    with monkeypatch.context() as patch:
        patch.setattr(SFTModule, "validation_step", stop)  # when an epoch was trained
        with pytest.raises(Stop):
            train.train(made, Run(tmp_path / "run"))
    policy.model.get_input_embeddings().weight.data[5] += 1
    save_full(policy, base)
    with pytest.raises(ConfigError, match="made from other weights"):
        train.train(made, Run(tmp_path / "run"))


# --- faults ---


def test_pairs_that_do_not_fit_are_counted(
    tiny: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = drawn(tiny.data)
    every = [row.prompt for name in ("normal", "refusals") for row in rows.parts()[name]]
    unseen = [row.prompt for row in rows.normal_heldout + rows.refusals_heldout]
    around = len("_user\n") + len("_\n_assistant\n")  # bytes, and one for each control token
    longest = sorted(len(prompt) + around for prompt in every)[-5]
    left_out = sum(len(prompt) + around >= longest for prompt in every + unseen)
    with caplog.at_level(logging.WARNING):
        few = changed(tiny, "method=stl", "sft.epochs=1", f"sft.max_len={longest}")
        train.train(few, Run(tmp_path / "run"))
    (message,) = [r.message for r in caplog.records if "were left out" in r.message]
    assert message.startswith(f"{left_out} pairs have no room")


def test_the_wandb_id_moves_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first = wandb_run.run_id(Run(tmp_path / "one"))
    assert first != wandb_run.run_id(Run(tmp_path / "two"))
    (tmp_path / "one").rename(tmp_path / "three")
    assert wandb_run.run_id(Run(tmp_path / "three")) == first


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device that must be missing")
def test_a_device_that_is_not_there_is_said_before_a_model_loads(tmp_path: Path) -> None:
    wanted = settings(tmp_path / "rows", "trainer.accelerator=gpu")
    with pytest.raises(ConfigError, match=r"trainer.accelerator=gpu.* has 0 GPUs; lower"):
        train.train(wanted, Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_auto_measures_the_layer_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def best(settings: TrainConfig) -> int:
        measured.append(settings.model.label)
        return 2

    monkeypatch.setattr(transfer, "best_layer", best)
    made = settings(tmp_path / "rows", "dcr.layer=auto", "stage=contrastive")
    named = settings(tmp_path / "rows", "dcr.layer=2", "stage=contrastive")
    auto, given = Run(tmp_path / "auto"), Run(tmp_path / "given")
    train.train(made, auto)
    train.train(made, auto)
    assert measured == ["tiny"]
    assert json.loads(auto.layer_file.read_text()) == {"block": 2}
    train.train(named, given)
    assert same(weights(auto.folder), weights(given.folder))
    with pytest.raises(ConfigError, match=r"dcr\.layer=deep: give a block's number, auto"):
        settings(tmp_path / "rows", "dcr.layer=deep")
