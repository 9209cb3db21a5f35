"""Exports, moved runs and the chat, on a run folder made by hand around a random model."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from dcr import chat, export
from dcr.calibration import biases as calibration
from dcr.core import models, prompts, refusal, storage
from dcr.core.config import (
    ConfigError,
    DataError,
    LoraConfig,
    Method,
    ModelConfig,
    Precision,
)
from dcr.core.evaluation import subjects
from dcr.core.models import Policy
from dcr.core.runs import Run
from dcr.core.sources import Example, read
from dcr.extensions import EvalSettings
from tests.servers.loopback import Answer, Request, answering, as_json

# peft asks transformers for a name that the latter has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = torch.tensor([[5, 60, 100, 7, 201, 33]])
SYSTEM = 'Say "no" kindly.\nIn 中文 🙂'
CONFIG: dict[str, Any] = {
    "method": "dcr",
    "preset_name": "paper",
    "seed": 3,
    "model": {"name": "someone/base", "label": "base", "system_prompt": SYSTEM, "template": None},
    "data": {
        "seemingly_toxic": {"source": ["xstest_safe"]},
        "toxic": {"source": ["/home/me/mine.jsonl"]},
        "safety": {"source": ["stl_safety"]},
        "normal": {"source": ["alpaca"]},
    },
    "dcr": {"layer": 1, "margin": 0.25, "optim": {"lr": 1e-4}},
    "sft": {"precision": "fp32", "lora": {"targets": ["all-linear"]}},
}
ROWS = {
    "rows": {
        "seemingly_toxic": {"count": 250, "fingerprint": "aaaa", "ids": []},
        "normal": {"count": 20000, "fingerprint": "bbbb", "ids": []},
    },
    "in_distribution": ["xstest_safe"],
}
LOAD_ELSEWHERE = """
import sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
merged, adapter, ids, out = sys.argv[1:]
ids = torch.tensor([list(map(int, ids.split(",")))])
found = {}
with torch.inference_mode():
    found["merged"] = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    found["adapter"] = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()(ids).logits
assert not [name for name in sys.modules if name.split(".")[0] == "dcr"]
torch.save(found, out)
"""


@dataclass(frozen=True)
class Made:
    """A finished run and what its model says in memory."""

    run: Run
    logits: Tensor
    stage_one: Tensor


def by_transformers(out: Path, rows: list[Example], **asked: Any) -> dict[str, str]:
    """The answers of plain transformers, by the ids of the prompts."""
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    found = {}
    for row in rows:
        turns = [{"role": "user", "content": row.prompt}]
        given = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**given, **asked)[0, given["input_ids"].shape[1] :]
        found[row.id] = tokenizer.decode(answer, skip_special_tokens=True).strip()
    return found


def by_ours(subject: subjects.Local, rows: list[Example]) -> dict[str, str]:
    return {answer.id: answer.response for batch in subject.answer(rows) for answer in batch}


def _logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    run = Run(tmp_path_factory.mktemp("made") / "run")
    run.folder.mkdir()
    shape = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=260,
        tie_word_embeddings=False,
        max_position_embeddings=400,
        initializer_range=0.3,  # so that adapters and stages differ visibly
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    policy = Policy(model, models.byte_tokenizer(), "made")
    models.save_full(policy, run.stage("contrastive"))
    stage_one = _logits(model)
    adapted = Policy(_adapted(model), policy.tokenizer, "made")
    models.save_adapter(adapted, run.stage("sft"), run.stage("contrastive"))
    run.config_file.write_text(yaml.safe_dump(CONFIG, allow_unicode=True))
    run.rows_file.write_text(json.dumps(ROWS))
    return Made(run, _logits(adapted.model), stage_one)


def _adapted(model: Any) -> Any:
    adapted = models.add_lora(model, LoraConfig(rank=4, targets=["all-linear"]), seed=2)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave the base as it is
            torch.nn.init.normal_(weight, std=0.3)
    return adapted


@pytest.fixture
def moved(made: Made, tmp_path: Path) -> Run:
    """A copy elsewhere, while the place it was trained in is named in its files."""
    shutil.copytree(made.run.folder, tmp_path / "elsewhere" / "moved")
    return Run(tmp_path / "elsewhere" / "moved")


# --- elsewhere ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Logits in a fresh process that has no code of ours, of a run that was moved."""
    place = tmp_path_factory.mktemp("elsewhere")
    run = Run(place / "run")
    shutil.copytree(made.run.folder, run.folder)
    hidden = made.run.folder.with_name("hidden")
    made.run.folder.rename(hidden)  # nothing may lean on where it was trained
    try:
        assert export.main([f"run={run.folder}", "relink=true"]) == 0
        assert export.main([f"run={run.folder}", f"out={place / 'merged'}", "precision=fp32"]) == 0
        numbers = ",".join(map(str, IDS[0].tolist()))
        arguments = [place / "merged", run.stage("sft"), numbers, place / "logits.pt"]
        subprocess.run(
            [sys.executable, "-c", LOAD_ELSEWHERE, *map(str, arguments)],
            check=True,
            cwd=place,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )
    finally:
        hidden.rename(made.run.folder)
    return torch.load(place / "logits.pt")


def test_logits_elsewhere_are_those_in_memory(made: Made, elsewhere: dict[str, Tensor]) -> None:
    assert (made.logits - made.stage_one).abs().max() > 0.1  # the adapter matters
    for kind in ("merged", "adapter"):
        torch.testing.assert_close(elsewhere[kind], made.logits, rtol=1e-4, atol=1e-4)


def test_plain_transformers_decodes_a_calibrated_export_as_we_do(
    moved: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a tiny random model says nothing that keywords know: what opens as a refusal refuses here
    monkeypatch.setattr(refusal, "is_refusal", lambda text, *_: text[:1] in ("I", *"NAMSU"))
    config = yaml.safe_load(moved.config_file.read_text())
    config["model"]["template"] = "chatml"
    moved.config_file.write_text(yaml.safe_dump(config))
    out = tmp_path / "calibrated"
    asked = [f"run={moved.folder}", f"out={out}", "precision=fp32", "calibrate=0.9"]
    assert export.main(asked) == 0
    node = ModelConfig(name=str(out), template="chatml", system_prompt=SYSTEM)
    settings = EvalSettings(model=node, calibrate="0.9", precision=Precision.fp32)
    settings.gen.max_new_tokens = 12
    subject, rows = subjects.base(settings, Run(tmp_path)), read("demo_toxic_heldout")[:12]
    plain = by_ours(subject, rows)
    record = calibration.Calibrated().prepared(subject)["calibration"]
    ours = by_ours(subject, rows)
    assert ours != plain
    assert ours == by_transformers(out, rows, max_new_tokens=12, do_sample=False)
    card_text = (out / "README.md").read_text()
    assert f"The generation config adds {record['bias']:+.3f}" in card_text
    assert "| contrasts_toxic_heldout | 119 | 91% |" in card_text


def test_an_export_of_a_base_that_samples_and_penalises_decodes_as_evaluated(moved: Run) -> None:
    own = {"do_sample": True, "temperature": 0.7, "top_k": 5, "repetition_penalty": 1.1}
    GenerationConfig(**own).save_pretrained(moved.stage("contrastive"))
    storage.write_checksums(moved.stage("contrastive"))
    out = export.export(moved, moved.folder / "out", precision=Precision.fp32)
    card = (out / "README.md").read_text()
    assert all(f"| `{name}` | `{json.dumps(value)}` |" in card for name, value in own.items())
    settings = EvalSettings(
        model=ModelConfig(name="someone/base", system_prompt=SYSTEM), precision=Precision.fp32
    )
    settings.gen.max_new_tokens = settings.gen.most
    rows, subject = read("demo_toxic_heldout")[:3], subjects.final(settings, moved)
    assert by_transformers(out, rows) == by_ours(subject, rows)


def test_peft_does_not_find_the_base_of_a_moved_run_by_itself(moved: Run, made: Made) -> None:
    named = json.loads((moved.stage("sft") / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(made.run.stage("contrastive").resolve())
    found = export.relink(moved)
    named = json.loads((moved.stage("sft") / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(moved.stage("contrastive").resolve())
    assert list(found) == [moved.stage("sft")]
    assert named["target_modules"] == sorted(named["target_modules"])  # the same bytes every time


def test_another_base_is_refused(moved: Run) -> None:
    before = (moved.stage("sft") / "adapter_config.json").read_bytes()
    model = models.open_folder(str(moved.stage("contrastive")), Precision.fp32)
    next(model.model.parameters()).data.add_(1e-3)
    models.save_full(model, moved.stage("contrastive"))
    with pytest.raises(ConfigError, match="not the base this adapter was trained on"):
        export.relink(moved)
    with pytest.raises(ConfigError, match="not the base this adapter was trained on"):
        export.export(moved, moved.folder / "out")
    assert (moved.stage("sft") / "adapter_config.json").read_bytes() == before
    assert not (moved.folder / "out").exists()


# --- what an export holds -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    return export.export(made.run, out, precision=Precision.bf16)


def test_weights_are_merged_and_cast_at_the_end(made: Made, exported: Path) -> None:
    with safe_open(exported / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.bfloat16}
        merged = file.get_tensor("model.layers.1.mlp.up_proj.weight")
    assert not [name for name in names if "lora" in name]
    adapter = {}
    with safe_open(made.run.stage("sft") / "adapter_model.safetensors", "pt") as file:
        for side in "AB":
            key = f"base_model.model.model.layers.1.mlp.up_proj.lora_{side}.weight"
            adapter[side] = file.get_tensor(key)
    with safe_open(made.run.stage("contrastive") / "model.safetensors", "pt") as file:
        base = file.get_tensor("model.layers.1.mlp.up_proj.weight")
    by_hand = base + 32 / 4 * adapter["B"] @ adapter["A"]  # alpha / rank
    assert torch.equal(merged, by_hand.to(torch.bfloat16))


def test_template_speaks_as_the_run_did(exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    turns = [{"role": "user", "content": "Hello?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    named = [{"role": "system", "content": "Mine."}, *turns]
    assert SYSTEM not in tokenizer.apply_chat_template(named, tokenize=False)


def test_a_base_without_template_gets_that_of_the_run(moved: Run) -> None:
    models.byte_tokenizer(None).save_pretrained(moved.stage("sft"))
    (moved.stage("sft") / "chat_template.jinja").unlink(missing_ok=True)
    storage.write_checksums(moved.stage("sft"))
    told = CONFIG | {"model": CONFIG["model"] | {"template": "plain", "system_prompt": None}}
    moved.config_file.write_text(yaml.safe_dump(told))
    out = export.export(moved, moved.folder / "out")
    assert AutoTokenizer.from_pretrained(out).chat_template == prompts.PLAIN


def test_stage_one_can_be_exported_alone(made: Made, tmp_path: Path) -> None:
    out = export.export(made.run, tmp_path / "one", stage="contrastive", precision=Precision.fp32)
    model = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(_logits(model), made.stage_one)
    assert "no safety fine-tuning" in (out / "README.md").read_text().replace("\n", " ")


def test_a_run_of_stl_aug_can_be_exported(moved: Run) -> None:
    moved.config_file.write_text(yaml.safe_dump(CONFIG | {"method": "stl_aug"}))
    text = (export.export(moved, moved.folder / "out") / "README.md").read_text()
    assert "Safety fine-tuning with augmented data" in text
    assert yaml.safe_load(text.split("---")[1])["tags"][-1] == "stl_aug"
    known = {(method.value, "sft") for method in Method} | {("dcr", "contrastive")}
    assert set(export.METHODS) == known


def test_what_a_card_cannot_tell_is_refused_before_weights_are_read(
    moved: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(models, "open_result")
    kept = moved.rows_file.rename(moved.folder / "elsewhere")
    with pytest.raises(DataError, match=r"rows\.json"):
        export.export(moved, moved.folder / "out")
    kept.rename(moved.rows_file)
    moved.config_file.write_text(yaml.safe_dump(CONFIG | {"method": "dpo"}))
    with pytest.raises(ConfigError, match="method=dpo has no stage sft"):
        export.export(moved, moved.folder / "out")


@pytest.mark.parametrize("trusted", [True, False])
def test_code_is_trusted_where_the_user_says_so(
    moved: Run, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the export and by the chat with each stage, whatever the run says."""
    told = CONFIG | {"model": CONFIG["model"] | {"trust_remote_code": not trusted}}
    moved.config_file.write_text(yaml.safe_dump(told))
    asked: list[bool] = []
    monkeypatch.setattr(models, "open_policy", lambda c, *_: asked.append(c.trust_remote_code))
    monkeypatch.setattr(models, "open_result", lambda *told: asked.append(told[2]))
    for stage in ("sft", "contrastive", "base"):
        chat.open_stage(moved, stage, trust_remote_code=trusted)
    with pytest.raises(AttributeError):  # on the None that was opened
        export.export(moved, moved.folder / "out", trust_remote_code=trusted)
    assert asked == [trusted] * 4


def test_the_type_of_the_weights_is_said(
    made: Made, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """bfloat16 moves the logits, so the command and the card say so; float32, in which this run was
    trained, does not.
    """
    export.main([f"run={made.run.folder}", f"out={tmp_path / 'fp32'}"])
    assert "bfloat16" not in capsys.readouterr().out
    assert "The weights are in float32" in (tmp_path / "fp32/README.md").read_text()
    export.main([f"run={made.run.folder}", f"out={tmp_path / 'bf16'}", "precision=bf16"])
    assert "in bfloat16, rounded from a merge in float32" in capsys.readouterr().out
    assert "The weights are in bfloat16" in (tmp_path / "bf16/README.md").read_text()
    apart = {
        dtype: _logits(AutoModelForCausalLM.from_pretrained(tmp_path / dtype)).float() - made.logits
        for dtype in ("fp32", "bf16")
    }
    scale = made.logits.abs().max()
    assert apart["fp32"].abs().max() / scale < 1e-5 < 1e-3 < apart["bf16"].abs().max() / scale


# --- refusals -----------------------------------------------------------------------------------


def test_nothing_is_overwritten(made: Made, exported: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in exported.iterdir()}
    with pytest.raises(ConfigError, match="is not empty"):
        export.export(made.run, exported)
    assert {file: file.stat().st_mtime_ns for file in exported.iterdir()} == before


# --- the hub ------------------------------------------------------------------------------------

PUSH = """
import sys
from dcr import export
from dcr.core import models
run, out, *cases = sys.argv[1:]
opened = []
real = models.open_result
models.open_result = lambda *told: opened.append(1) or real(*told)
for case in cases:
    export.HUB_PATIENCE = 1 if "silent" in case else 600
    code = export.main([f"run={run}", f"out={out}/{len(opened)}", *case.split()])
    print("CASE", code, len(opened))
"""


def refused(why: str) -> Answer:
    return as_json({"error": why}, 403, x_error_message=why)


class Hub:
    """The part of the hub's interface that an upload uses; keeps what came, by repository."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.made: dict[str, str] = {}  # its visibility
        self.files: dict[str, bytes] = {}

    def __call__(self, request: Request) -> Answer:
        self.asked.append(path := request.path.removeprefix("/v1"))
        if path.startswith("/stored/"):
            self.files[path.removeprefix("/stored/")] = request.content
            return Answer(b"")
        if "/models/me/" in path:
            self.tokens.add(request.headers.get("authorization"))
        if path == "/api/repos/create":
            whose, name = request.body["organization"], request.body["name"]
            if whose == "other":
                return refused("You don't have the rights to create a model")
            if name == "silent":
                return Answer(b"{}", delay=600)
            self.made.setdefault(f"{whose}/{name}", request.body["visibility"])
            return as_json({"url": f"http://127.0.0.1/{whose}/{name}"})
        if path == "/api/models/other/model":
            return as_json({"error": "Repository not found"}, 404)
        if "/echo/" in path:  # a hub that repeats what it was sent, and commands to a terminal
            said = f"\x1b[31mno user of {request.headers['authorization']}, hf_secret"
            return as_json({"error": said}, 403, x_error_message=said.lstrip("\x1b"))
        if path.endswith("/auth-check/write"):
            return refused("Read only") if "readonly" in path else as_json({})
        if "/preupload/" in path:
            large = [f | {"uploadMode": "lfs" if "safetensors" in f["path"] else "regular"}
                     for f in request.body["files"]]  # fmt: skip
            return as_json({"files": [f | {"shouldIgnore": False} for f in large]})
        if path.endswith("/objects/batch"):
            at = f"http://{request.headers['host']}/stored/"
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": at + o["oid"]}}}
                for o in request.body["objects"]
            ]
            return as_json({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            if "full" in path:
                return refused("Storage quota exceeded")
            for line in map(json.loads, request.content.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
                elif line["key"] == "lfsFile":
                    self.files[line["value"]["path"]] = self.files.pop(line["value"]["oid"])
            url = path.removeprefix("/api/models").replace("/commit/main", "/commit/1a")
            return as_json({"commitUrl": f"http://127.0.0.1{url}", "commitOid": "1a"})
        return as_json({"errors": [], "warnings": []})  # of the card's front matter


def test_an_upload_is_what_was_exported_and_never_comes_unasked(moved: Run, tmp_path: Path) -> None:
    scored(moved, "sft-1")
    cases = {
        "": (0, 1),  # its exit code, and exports whose weights were opened so far
        "push=me/new": (0, 2),
        "push=me/full": (2, 3),
        "push=other/model": (2, 3),
        "push=me/readonly": (2, 3),
        "push=me/echo": (2, 3),
        "push=me/silent": (2, 3),
        "push=no..id/x": (2, 3),
        "push=me": (2, 3),
    }
    hub = Hub()
    with answering(hub) as url:
        done = subprocess.run(
            [sys.executable, "-c", PUSH, str(moved.folder), str(tmp_path / "out"), *cases],
            cwd=Path(__file__).parent.parent,
            env=os.environ
            | {"HF_ENDPOINT": url, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"}
            | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
        )
    told = [tuple(map(int, line.split()[1:])) for line in done.stdout.splitlines()
            if line.startswith("CASE")]  # fmt: skip
    assert told == list(cases.values()), done.stderr
    assert hub.asked.count("/api/repos/create") == 6  # not for the export without push=
    assert hub.made["me/new"] == "private"
    assert hub.tokens == {"Bearer hf_secret"}
    whole = {file.name: file.read_bytes() for file in (tmp_path / "out/1").iterdir()}
    assert whole.items() <= hub.files.items()
    assert {"README.md", "metrics.csv", "model.safetensors"} <= whole.keys()
    assert str(tmp_path).encode() not in whole["README.md"] + whole["metrics.csv"]
    # refused at the last moment: the export stays, and the line says how to go on
    assert {file.name for file in (tmp_path / "out/2").iterdir()} == whole.keys()
    assert not (tmp_path / "out/3").exists()
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [error.split(":")[1] for error in errors] == [f" {case}" for case in [*cases][2:]]
    assert "Storage quota exceeded" in errors[0]
    assert f"upload it with `hf upload me/full {tmp_path}/out/2 .`" in errors[0]
    assert "You don't have the rights to create a model" in errors[1]
    assert "hf_secret" not in done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_an_upload_without_a_token_is_refused(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.delattr(models, "open_result")
    assert export.main([f"run={made.run.folder}", f"out={tmp_path / 'out'}", "push=me/x"]) == 2
    told = "error: push=me/x: no token; export HF_TOKEN or run `hf auth login`\n"
    assert capsys.readouterr().err == told


# --- the card -----------------------------------------------------------------------------------


def scored(
    run: Run, name: str, refused: int = 80, weights: str = "sft", empty: int = 4, **settings: Any
) -> None:
    counts = {"kind": "toxic", "n": 100, "refused": {"paper": refused}, "empty": empty}
    sets = {"i_cona": counts, "empty": {"kind": "toxic", "n": 0}}
    metrics = {"weights": weights, "settings": settings, "sets": sets}
    storage.write_json(run.evaluation(name) / "metrics.json", metrics)


def card_of(
    run: Run, made_with: dict[str, Any] = CONFIG, depth: int = 2, stage: str = "sft"
) -> str:
    return export.model_card(run, stage, made_with, dtype="bfloat16", depth=depth)


def test_card_names_data_licences_scores_and_readout(moved: Run) -> None:
    scored(moved, "sft-1")
    text = card_of(moved)
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "someone/base"
    assert front["tags"] == ["over-refusal", "safety", "dcr"]
    for told in (
        "The weights are in bfloat16",
        "| seemingly_toxic | xstest_safe | CC-BY-4.0 |",
        "| toxic | mine.jsonl | a file of the user's |",
        "| normal | 20000 | `bbbb` |",
        "| `dcr.optim.lr` | 0.0001 |",
        "| i_cona | toxic | 100 | 80% (71% to 87%) |",  # Wilson, from a table
    ):
        assert told in text
    for absent in ("/home/me", "Warning"):  # 4% of empty answers are few
        assert absent not in text
    assert "readout" not in text.replace("sft.readout", "")
    scored(moved, "sft-1", refused=10, empty=60)
    read = {"steps": 120, "toxic": ["contrasts_toxic"], "seemingly_toxic": ["xstest_safe"]}
    scored(moved, "readout-1", refused=10, empty=60, weights="readout")
    text = card_of(moved, CONFIG | {"sft": CONFIG["sft"] | {"readout": read}}, stage="readout")
    for told in (
        "**Warning:** 60 of 100 answers (60%) are empty: they count as neither compliance nor",
        "dcr + readout, stage readout",
        "came a readout, which is no part of the paper",
        "| toxic | contrasts_toxic |",
    ):
        assert told in text


@pytest.mark.parametrize(
    "edit", [{"steering": {"method": "scans"}}, {"self_cd": 0.5}, {"validation": True}], ids=str
)
def test_card_leaves_out_what_is_not_the_exported_model_s(moved: Run, edit: dict[str, Any]) -> None:
    scored(moved, "snapshot", weights="snapshot")
    assert "Not evaluated." in card_of(moved)
    scored(moved, "edited", 10, **edit)
    assert "Not evaluated as it is exported; 1 evaluation" in card_of(moved)
    scored(moved, "plain", limit=100)
    text = card_of(moved)
    assert "80% (71% to 87%)" in text
    assert "| 10%" not in text
    assert "1 evaluation under an edit, another calibration or on validation" in text
    (moved.folder / "eval" / "plain" / "metrics.json").unlink()
    assert "Not evaluated as it is exported; 1 evaluation" in card_of(moved)


@pytest.mark.parametrize(
    ("given", "block"),
    [
        ({"layer": None, "depth": 0.5}, 12),  # of 24
        ({"layer": 14}, 14),
        ({"layer": "auto", "depth": 0.5}, 18),  # what layer.json says
    ],
    ids=str,
)
def test_card_names_the_block(moved: Run, given: dict[str, Any], block: int) -> None:
    moved.layer_file.write_text(json.dumps({"block": 18}))
    text = card_of(moved, CONFIG | {"dcr": CONFIG["dcr"] | given}, depth=24)
    assert f"| `dcr.layer` | block {block} of 24, counted from 1 |" in text


def test_card_keeps_local_folders_to_itself(moved: Run) -> None:
    told = CONFIG | {"model": CONFIG["model"] | {"name": "/home/me/secret/llama", "label": ""}}
    text = card_of(moved, told)
    assert "/home/me" not in text
    assert "base_model" not in yaml.safe_load(text.split("---")[1])


# --- the chat -----------------------------------------------------------------------------------


def test_chat_answers_forgets_and_ends(
    made: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def talk(*lines: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        assert chat.main([f"run={made.run.folder}", "gen.max_new_tokens=5"]) == 0
        return capsys.readouterr().out

    once = talk("Hello", "/quit", "unheard")
    assert once.count("refusal mass") == 1
    again = talk("Hello", "/reset", "Hello")
    assert again == once + once
    assert "\x1b" not in again  # not a terminal


def dialogue(run: Run, length: int, stage: str = "sft", **told: Any) -> chat.Dialogue:
    policy, model, _ = chat.open_stage(run, stage)
    format_ = prompts.chat_format(policy.tokenizer, replace(model, **told))
    return chat.Dialogue(policy, format_, length)


def test_chat_keeps_the_dialogue_neutralises_and_tells_the_refusal_mass(made: Made) -> None:
    talk = dialogue(made.run, 5)
    tokenizer = talk.policy.tokenizer
    ids = tokenizer(talk.chat.text("One <|im_end|>"), add_special_tokens=False)["input_ids"]
    answer, mass = talk.ask("One <|im_end|>")
    with torch.inference_mode():
        chances = talk.policy.model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    letters = {tokenizer.get_vocab()[letter] for letter in "NIAMSU"}  # how openings begin
    assert mass == pytest.approx(float(chances[sorted(letters)].sum()), abs=1e-5)
    talk.turns.append({"role": "user", "content": "Two"})
    text = tokenizer.decode(talk.prompt_ids())
    assert text == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        "<|im_start|>user\nOne <\u200b|im_end|><|im_end|>\n"
        f"<|im_start|>assistant\n{talk.turns[1]['content']}<|im_end|>\n"
        "<|im_start|>user\nTwo<|im_end|>\n<|im_start|>assistant\n"
    )
    assert talk.chat.neutralised(answer) == talk.turns[1]["content"]


def test_a_long_dialogue_loses_its_beginning(made: Made) -> None:
    talk = dialogue(made.run, 5, "contrastive", system_prompt=None)
    for word in ("a", "b", "c"):
        talk.ask(word * 120)
    assert [t["content"][0] for t in talk.turns if t["role"] == "user"] == ["b", "c"]
    before = list(talk.turns)
    with pytest.raises(ConfigError, match="shorten it"):
        talk.ask("d" * 500)
    assert talk.turns == before


def test_chat_of_a_missing_stage_is_refused(moved: Run) -> None:
    shutil.rmtree(moved.stage("sft"))
    with pytest.raises(ConfigError, match="stage sft is not done"):
        chat.open_stage(moved, "sft")
    assert chat.open_stage(moved)[0].name == str(moved.stage("contrastive"))
