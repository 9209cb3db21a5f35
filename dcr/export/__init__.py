"""A run's result for use elsewhere.

python -m dcr.export run=<folder> out=<folder> [stage=sft|contrastive] [dtype=bfloat16|float32]
    merged safetensors weights, tokenizer and model card; transformers loads them by themselves
    (float32 gives the logits of the run's adapter, bfloat16 differs by about 1%)
python -m dcr.export run=<folder> relink=true
    after a run folder has moved: its adapters name their base weights where they lie now
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dcr import config, models, prompts, storage
from dcr.config import STAGES, ConfigError, Precision
from dcr.export.card import model_card
from dcr.models import Policy
from dcr.prompts import ChatFormat
from dcr.runs import Run

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ROUNDED = (
    "the weights are in bfloat16, rounded from a merge in float32: logits differ from those of the "
    "run's adapter by about 1%; dtype=float32 keeps them"
)


def export(run: Run, out: Path, stage: str = "sft", dtype: str = "bfloat16") -> Path:
    """Weights of a stage, merged in fp32 and cast at the end, with tokenizer and card, in `out`.

    Raises ConfigError when `out` holds anything, the stage is not done, or its base is gone or
    not the one it was trained on, and for a run of a method that it does not know.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out}: is not empty; name a new folder")
    made_with = run.config()
    if not run.done(stage):
        raise ConfigError(f"run={run.folder}: stage {stage} is not done there; train it first")
    known = {(m.value, each.value) for m, stages in STAGES.items() for each in stages}
    if (made_with["method"], stage) not in known:
        raise ConfigError(f"run={run.folder}: method={made_with['method']} has no stage {stage}")
    model = config.model_of(made_with)
    policy = models.open_result(run.stage(stage), Precision.fp32, model.trust_remote_code)
    if isinstance(policy.model, PeftModel):
        policy = Policy(policy.model.merge_and_unload(), policy.tokenizer, policy.name)
    chat = prompts.chat_format(policy.tokenizer, model)
    _speak_as_trained(chat)
    _stop_as_evaluated(policy, chat)
    policy.model.to(DTYPES[dtype])
    with storage.replaced_folder(out) as staging:
        policy.model.save_pretrained(staging)
        policy.tokenizer.save_pretrained(staging)
        depth = policy.model.config.num_hidden_layers
        card = model_card(run, stage, made_with, dtype=dtype, depth=depth)
        (staging / "README.md").write_text(card, encoding="utf-8")
    return out


def _speak_as_trained(chat: ChatFormat) -> None:
    """Give the tokenizer the run's template, and its system turn where none is given."""
    tokenizer = chat.tokenizer
    tokenizer.chat_template = chat.template
    if _templated(tokenizer, "x") != chat.text("x"):
        system = json.dumps(chat.system_prompt, ensure_ascii=False)  # a Jinja string as well
        turn = f"{{'role': 'system', 'content': {system}}}"
        tokenizer.chat_template = (
            "{% if messages[0]['role'] != 'system' %}"
            f"{{% set messages = [{turn}] + messages %}}{{% endif %}}{chat.template}"
        )
    assert _templated(tokenizer, "x") == chat.text("x"), "the export speaks otherwise than the run"


def _templated(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Any:
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _stop_as_evaluated(policy: Policy, chat: ChatFormat) -> None:
    """Every end token in the generation config; a base's own lists only its end of text."""
    tokenizer = policy.tokenizer
    settings = policy.model.generation_config or GenerationConfig()
    named = settings.eos_token_id
    base = [named] if isinstance(named, int) else list(named or [])
    settings.eos_token_id = list(dict.fromkeys([*chat.stop, *base]))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chat.stop[0])
    settings.pad_token_id = tokenizer.pad_token_id
    policy.model.generation_config = settings


# --- adapters after a move ----------------------------------------------------------------------


def relink(run: Run) -> dict[Path, str]:
    """Make every adapter of a run name its base where that lies now, as peft itself opens it.

    Returns the base of each adapter folder. Raises ConfigError when there is no adapter, a base is
    gone, or it is not the one the adapter was trained on; no file is then changed.
    """
    folders = [run.stage("sft"), *sorted(run.snapshots.glob("step-*"))]
    folders = [folder for folder in folders if (folder / "adapter_config.json").is_file()]
    if not folders:
        raise ConfigError(f"run={run.folder}: holds no adapter; train stage=sft first")
    bases = {folder: models.adapter_base(folder) for folder in folders}
    for folder, base in bases.items():
        place = str(Path(base).resolve()) if Path(base).is_dir() else base
        with storage.replaced_folder(folder) as staging:
            shutil.copytree(folder, staging, dirs_exist_ok=True)
            file = staging / "adapter_config.json"
            named = storage.read_json(file, dict[str, Any])
            storage.write_json(file, named | {"base_model_name_or_path": place})
            storage.write_checksums(staging)
    return bases
