"""A run folder of a stranger's: it runs no code, reads no environment and makes nothing wait."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dcr import cli, resolving, train
from dcr.core import config, models, storage
from dcr.core.config import ModelConfig, Precision, UserError
from dcr.core.config.training import TrainConfig
from dcr.core.models import folders
from dcr.core.runs import Run
from dcr.extensions import EvalSettings, TrainSettings

Command = Callable[..., Any]
ASKED = (
    *("tasks=[over_refusal]", "data.evaluation.over_refusal=[demo_seemingly_toxic_heldout]"),
    *("limit=2", "wandb.mode=disabled", "gen.max_new_tokens=2", "trainer.accelerator=cpu"),
)


@pytest.fixture
def stranger(whole: Path, tmp_path: Path) -> Run:
    """A finished run, to be made hostile."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    return Run(run)


def changed(run: Run, **settings: object) -> None:
    """The run's own file with other settings of its model."""
    made_with = yaml.safe_load(run.config_file.read_text())
    made_with["model"] |= settings
    run.config_file.write_text(yaml.safe_dump(made_with))


# --- code ---


def with_code(run: Run, marker: Path) -> None:
    """Both results name code beside their weights, with checksums that agree."""
    for folder in (run.stage("contrastive"), run.stage("sft")):
        (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').write('ran')\n")
        file = folder / "config.json"
        shape = json.loads(file.read_text()) if file.exists() else {}
        parts = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
        shape |= {"model_type": "evil", "auto_map": dict.fromkeys(parts, "evil.Evil")}
        file.write_text(json.dumps(shape))
        storage.write_checksums(folder)
    file = run.stage("sft") / "dcr.json"
    base = storage.running_sha256(
        sorted(run.stage("contrastive").glob("*.safetensors")), named=True
    )[-1]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fingerprint": base[:16]}))
    storage.write_checksums(run.stage("sft"))
    changed(run, trust_remote_code=True)


def test_a_run_cannot_switch_trust_in_code_on(
    command: Command, stranger: Run, tmp_path: Path, tiny: TrainConfig
) -> None:
    marker, run = tmp_path / "ran", f"run={stranger.folder}"
    with_code(stranger, marker)
    commands = [
        *(("eval.py", run, f"stage={stage}", *ASKED) for stage in ("sft", "contrastive")),
        *(("dcr.chat", run, f"stage={stage}") for stage in ("sft", "contrastive")),
        *(("dcr.export", run, "out=out", f"stage={stage}") for stage in ("sft", "contrastive")),
    ]
    for words in commands:
        ended = command(*words)
        assert ended.code == 2, words
        assert "needs code that comes with it" in ended.error, words
        assert "trust_remote_code=true" in ended.error
    shutil.rmtree(stranger.stage("sft"))
    with pytest.raises(UserError, match="needs code that comes with it"):
        train.train(tiny, stranger)
    assert not marker.exists()


def test_an_adapter_names_no_module_to_import(stranger: Run) -> None:
    """As PEFT would for Megatron."""
    file = stranger.stage("sft") / "adapter_config.json"
    named = {"megatron_config": {"a": 1}, "megatron_core": "antigravity"}
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    storage.write_checksums(file.parent)
    with pytest.raises(UserError, match="its megatron_config names a module to import"):
        folders.open_result(file.parent, Precision.fp32)


def test_an_evaluation_of_a_run_takes_trust_and_no_other_model(
    command: Command, whole: Path
) -> None:
    run = f"run={whole}"
    ended = command("eval.py", run, *ASKED, "model.template=chatml")
    assert ended.code == 2
    assert "model.template=chatml: a run brings its own; leave it out" in ended.error
    composed = cli.compose("eval", [run, "model.trust_remote_code=true"])
    settings, _ = cli.resolved(composed, EvalSettings)
    assert settings.model.trust_remote_code
    settings, _ = cli.resolved(cli.compose("eval", [run]), EvalSettings)
    assert not settings.model.trust_remote_code


def test_a_template_that_leaves_its_sandbox_is_refused_before_weights_are_read(
    command: Command, stranger: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, folder = tmp_path / "ran", stranger.stage("sft")
    call = f"cycler.__init__.__globals__.os.popen('touch {marker}').read()"
    for file in (folder / "chat_template.jinja", folder / "tokenizer_config.json"):
        file.write_text(
            f"{{{{ {call} }}}}"
            if file.suffix == ".jinja"
            else json.dumps(json.loads(file.read_text()) | {"chat_template": f"{{{{ {call} }}}}"})
        )
    storage.write_checksums(folder)
    monkeypatch.setattr(models, "whole_model", lambda *_, **__: pytest.fail("opened"))
    for words in (("dcr.chat",), ("dcr.export", "out=out")):
        ended = command(*words, f"run={stranger.folder}")
        assert ended.code == 2
        assert "template" in ended.error
        assert not marker.exists()


def test_a_device_in_the_place_of_answers_is_refused_before_weights_are_read(
    command: Command, stranger: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(stranger.folder / "eval", ignore_errors=True)
    (stranger.folder / "eval").symlink_to("/dev/zero")
    monkeypatch.setattr(models, "whole_model", lambda *_, **__: pytest.fail("opened"))
    ended = command("eval.py", f"run={stranger.folder}", *ASKED)
    assert ended.code == 2
    assert "eval: a file or a device, not a folder; move it away" in ended.error


def test_a_damaged_evaluation_ends_an_export_before_weights_are_read(
    command: Command, stranger: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = stranger.evaluation("sft-damaged") / "metrics.json"
    storage.write_text(file, "{")
    monkeypatch.setattr(models, "whole_model", lambda *_, **__: pytest.fail("opened"))
    ended = command("dcr.export", f"run={stranger.folder}", "out=out")
    assert ended.code == 2
    assert str(file) in ended.error


# --- text that looks like a reference ---


TOKEN = "hf_" + "s3cret" * 6


def test_a_runs_settings_are_text_and_read_no_environment(
    command: Command, stranger: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By an export, whose template holds the system prompt, and by an evaluation."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    written = "${oc.env:HF_TOKEN} \\${model.name} ${"
    changed(stranger, system_prompt=written)
    run = f"run={stranger.folder}"
    assert command("dcr.export", run, "out=out", "stage=contrastive").code == 0
    assert command("eval.py", run, *ASKED).code == 0
    files = [file for file in tmp_path.rglob("*") if file.suffix in (".json", ".jinja", ".yaml")]
    assert not [file for file in files if TOKEN in file.read_text()]
    assert written in json.loads(
        f'"{(tmp_path / "out/chat_template.jinja").read_text().split(chr(34))[1]}"'
    )
    changed(stranger, system_prompt=None, name="${oc.env:HF_TOKEN}")
    ended = command("dcr.chat", run, "stage=base")
    assert ended.code == 2
    assert "model.name=${oc.env:HF_TOKEN}" in ended.error
    changed(stranger, name="x", layer="${oc.env:LAYER,1}")
    ended = command("dcr.chat", run, "stage=base")
    assert ended.code == 2
    assert "config.yaml: model: layer" in ended.error


def test_a_users_escaped_reference_is_resolved_once() -> None:
    composed = cli.compose("train", ["model=tiny", r"model.system_prompt='\${oc.env:HOME}'"])
    settings = resolving.resolve(composed, TrainSettings)
    assert settings.model.system_prompt == "${oc.env:HOME}"
    assert config.plain(settings)["model"]["system_prompt"] == "${oc.env:HOME}"
    renamed = ["model.name=/other", r"model.system_prompt='\${oc.env:HOME}'"]
    settings = resolving.resolve(cli.compose("train", renamed), TrainSettings)
    assert settings.model.system_prompt == "${oc.env:HOME}"


# --- files that never end, and weights that are none ---


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model in a folder, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    return folder


def opened(folder: Path) -> object:
    return models.open_policy(ModelConfig(name=str(folder)), Precision.fp32)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json"])
@pytest.mark.parametrize("special", ["pipe", "device"])
def test_only_regular_files_are_read(model: Path, name: str, special: str) -> None:
    file = model / name
    file.unlink(missing_ok=True)
    os.mkfifo(file) if special == "pipe" else file.symlink_to("/dev/zero")
    for command in (lambda: opened(model), lambda: models.open_folder(str(model), Precision.fp32)):
        with pytest.raises(UserError, match=f"{name}: cannot be read .a pipe or device"):
            command()
    if name == "model.safetensors":
        with pytest.raises(UserError, match="a pipe or device"):
            storage.weights_fingerprint(model)


def reweighed(model: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: change(tensors[name])}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weight: weight * float("nan"), "is not finite"),
        (lambda weight: weight * float("inf"), "is not finite"),
        (lambda weight: (100 * weight).to(torch.int8), "is of type I8, quantised"),
    ],
)
def test_base_weights_that_are_no_numbers_are_named_before_training(
    model: Path, change: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    reweighed(model, change)
    with pytest.raises(
        UserError, match=rf"model: weight model\.layers\.0\.mlp\.\S+ {said}"
    ) as told:
        opened(model)
    assert "learning rate" not in str(told.value)


def test_a_tokenizer_without_tokens_is_refused_as_it_is_opened(model: Path) -> None:
    empty = Tokenizer(BPE({"<pad>": 0}, []))
    PreTrainedTokenizerFast(tokenizer_object=empty, pad_token="<pad>").save_pretrained(model)
    with pytest.raises(UserError, match="its tokenizer makes no token of"):
        models.open_tokenizer(ModelConfig(name=str(model)))
    storage.write_checksums(model)
    with pytest.raises(UserError, match="its tokenizer makes no token of"):
        models.open_folder(str(model), Precision.fp32)
