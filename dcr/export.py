"""A run's result for use elsewhere: whole weights with a model card, or adapters after a move."""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dcr import cli, config, models, prompts, results, statistics, storage
from dcr.config import (
    AUTO_LAYER,
    EMBEDDED_MODEL,
    STAGES,
    ConfigError,
    ContrastiveConfig,
    EvalConfig,
    Precision,
    block_of,
)
from dcr.evaluation import calibration
from dcr.models import Policy
from dcr.prompts import ChatFormat
from dcr.runs import Run
from dcr.sources import SOURCES

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ROUNDED = (
    "the weights are in bfloat16, rounded from a merge in float32: logits differ from those of the "
    "run's adapter by about 1%; dtype=float32 keeps them"
)
HUB_NAMES = {EMBEDDED_MODEL: "HuggingFaceTB/SmolLM2-135M-Instruct"}
METHODS = {
    ("dcr", "sft"): (
        "Discernment via contrastive refinement (arXiv 2603.03323): blocks 1 to ℓ were trained "
        "with a Circle loss that parts toxic from seemingly toxic prompts at the output of block "
        "ℓ; then a LoRA adapter was trained on instructions and refusals, and merged into those "
        "weights."
    ),
    ("dcr", "contrastive"): (
        "The first stage of discernment via contrastive refinement (arXiv 2603.03323) alone: "
        "blocks 1 to ℓ were trained with a Circle loss that parts toxic from seemingly toxic "
        "prompts at the output of block ℓ. It has had no safety fine-tuning."
    ),
    ("stl", "sft"): (
        "Safety fine-tuning (STL): a LoRA adapter was trained on instructions and refusals, and "
        "merged into the base model."
    ),
    ("stl_aug", "sft"): (
        "Safety fine-tuning with augmented data (STL-aug): a LoRA adapter was trained on "
        "instructions, refusals and answers to seemingly toxic prompts, and merged into the base "
        "model."
    ),
}
LEARNT = {"contrastive": ("seemingly_toxic", "toxic"), "sft": ("safety", "normal")}
# Settings of an evaluation that was not of the exported model, or not on the test sets.
EDITS = ("steering", "self_cd", "validation")
SETTINGS = {  # what a reader must know to judge a result, by stage
    "contrastive": (
        "dcr.layer", "dcr.epochs", "dcr.margin", "dcr.scale", "dcr.ratio", "dcr.batch_size",
        "dcr.optim.lr", "dcr.nll.weight", "dcr.nll.source", "dcr.precision",
    ),
    "sft": (
        "sft.epochs", "sft.batch_size", "sft.lr", "sft.lora.rank", "sft.lora.alpha",
        "sft.lora.targets", "sft.max_len", "sft.precision", "sft.readout.steps",
    ),
}  # fmt: skip


@dataclass
class Options:
    """python -m dcr.export run=<folder> out=<folder> [stage=sft|contrastive] [dtype=float32]
    python -m dcr.export run=<folder> relink=true

    Writes merged safetensors weights, tokenizer and model card: transformers loads them by
    themselves. With relink, the adapters of a run folder that has moved name their base weights
    where they lie now.
    """

    run: Path = cli.option("the run folder")
    out: Path | None = cli.option("a new folder for the export", None)
    stage: str = cli.option("whose result", "sft", choices=("sft", "contrastive"))
    dtype: str = cli.option(
        "of the weights; float32 gives the logits of the run's adapter, bfloat16 differs by about "
        "1%",
        "bfloat16",
        choices=tuple(DTYPES),
    )
    calibrate: str | None = cli.option(
        "a share of toxic prompts to refuse, or a run to be as safe as: a bias on the first token "
        "of refusals in the generation config",
        None,
    )
    relink: bool = cli.option("mend the adapters' paths instead of exporting", False)


@cli.command(Options)
def main(options: Options) -> None:
    run = Run(options.run)
    if options.relink:
        for folder, base in relink(run).items():
            print(f"{folder} stands on {base}")
        return
    if options.out is None:
        raise ConfigError("out: nothing given; name a new folder with out=, or give relink=true")
    print(export(run, options.out, options.stage, options.dtype, options.calibrate))
    if DTYPES[options.dtype] is not torch.float32:
        print(ROUNDED)


def export(
    run: Run, out: Path, stage: str = "sft", dtype: str = "bfloat16", calibrate: str | None = None
) -> Path:
    """Weights of a stage, merged in fp32 and cast at the end, with tokenizer and card, in `out`.

    `calibrate` as that of `eval.py`, chosen on these very weights; its bias stands in the
    generation config.

    Raises ConfigError when `out` holds anything, the stage is not done, or its base is gone or
    not the one it was trained on, and for a run of a method that it does not know.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out}: is not empty; name a new folder")
    made_with = run.config()
    if not run.done(stage):
        raise ConfigError(f"run={run.folder}: stage {stage} is not done there; train it first")
    run.record()  # of which the card tells; damaged, it is named before weights are opened
    known = {(m.value, each.value) for m, stages in STAGES.items() for each in stages}
    if (made_with["method"], stage) not in known:
        raise ConfigError(f"run={run.folder}: method={made_with['method']} has no stage {stage}")
    model = config.model_of(made_with)
    settings = EvalConfig(model=model, calibrate=calibrate)
    if calibrate is not None:
        calibration.check(settings, made_with)
    policy = models.open_result(run.stage(stage), Precision.fp32, model.trust_remote_code)
    if isinstance(policy.model, PeftModel):
        policy = Policy(policy.model.merge_and_unload(), policy.tokenizer, policy.name)
    chat = prompts.chat_format(policy.tokenizer, model)
    _speak_as_trained(chat)
    _stop_as_evaluated(policy, chat)
    policy.model.to(DTYPES[dtype])
    record = _calibrate(policy, chat, settings) if calibrate is not None else None
    with storage.replaced_folder(out) as staging:
        policy.model.save_pretrained(staging)
        policy.tokenizer.save_pretrained(staging)
        depth = policy.model.config.num_hidden_layers
        card = model_card(run, stage, made_with, dtype=dtype, depth=depth, calibrated=record)
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


def _calibrate(policy: Policy, chat: ChatFormat, settings: EvalConfig) -> dict[str, Any]:
    """The bias in the generation config, and its record."""
    where = calibration.place(chat)
    new = settings.gen.max_new_tokens
    read = {
        asked.name: [f for batch in calibration.forks(policy, chat, asked.rows, new) for f in batch]
        for asked in calibration.asked(settings)
    }
    bias, record = calibration.chosen(settings, where, read)
    policy.model.generation_config.sequence_bias = bias.sequences
    return record


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


# --- the card -----------------------------------------------------------------------------------


def model_card(
    run: Run,
    stage: str,
    made_with: Mapping[str, Any],
    *,
    dtype: str,
    depth: int,
    calibrated: Mapping[str, Any] | None = None,
) -> str:
    """README.md of the export: what it is, made from what, how it scored. Markdown.

    `dtype` is that of the exported weights, `depth` the model's number of blocks, `calibrated` the
    record of the bias in its generation config. Raises DataError for an evaluation that cannot be
    read.
    """
    name, method = made_with["model"]["name"], made_with["method"]
    front = {"base_model": HUB_NAMES.get(name, name)}
    if Path(name).is_absolute() or Path(name).is_dir():
        front = {}  # a folder of the machine that trained it means nothing elsewhere
        name = Path(name).name
    front |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "base-model-and-data",
        "tags": list(dict.fromkeys(["over-refusal", "safety", "dcr", method])),
    }
    stages = [*(["contrastive"] if method == "dcr" else []), *(["sft"] if stage == "sft" else [])]
    keys = ["preset_name", "seed", *(key for each in stages for key in SETTINGS[each])]
    settings = {key: _leaf(made_with, key) for key in keys}
    if "dcr.layer" in settings:
        block = _block(run, made_with["dcr"], depth)
        settings["dcr.layer"] = f"block {block} of {depth}, counted from 1"
    rows = {n: part for n, part in run.record().get("rows", {}).items() if part["count"]}
    scores, others = _scores(run, stage, calibrated)
    left_out = f"{others} evaluation{'s' if others > 1 else ''} under an edit, another calibration "
    left_out += f"or on validation prompts {'are' if others > 1 else 'is'} left out."
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("dcr"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    ).get_template("model_card.md")
    return template.render(
        front=yaml.safe_dump(front, sort_keys=False),
        title=f"{made_with['model'].get('label') or name}, {method}, stage {stage}",
        base=HUB_NAMES.get(name, name),
        method=METHODS[method, stage],
        system=made_with["model"].get("system_prompt"),
        dtype=dtype,
        calibrated=calibrated,
        settings=settings,
        rows=rows,
        fingerprint=storage.fingerprint({n: part["fingerprint"] for n, part in rows.items()}),
        sources=[row for each in stages for row in _sources(made_with, LEARNT[each])],
        scores=scores,
        left_out=left_out if others else "",
    )


def _block(run: Run, made: Mapping[str, Any], depth: int) -> int:
    """The block ℓ that stage one read."""
    if made.get("layer") == AUTO_LAYER and (chosen := run.block()) is not None:
        return chosen
    named = {key: made[key] for key in ("layer", "depth") if key in made}
    return block_of(ContrastiveConfig(**named), depth)


def _leaf(node: Any, path: str) -> str:
    for key in path.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    if isinstance(node, list):
        return ", ".join(map(str, node))
    return "default" if node is None else str(node)


def _sources(made_with: Mapping[str, Any], uses: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """What each source was used as, its name and its licence."""
    for use in uses:
        named = made_with.get("data", {}).get(use, {}).get("source") or []
        for source in [named] if isinstance(named, str) else named:
            known = SOURCES.get(source)
            licence = known.licence if known else "a file of the user's"
            yield use, source if known else Path(source).name, licence


def _scores(run: Run, stage: str, calibrated: Mapping[str, Any] | None) -> tuple[list[str], int]:
    """Refusals in the stage's evaluations as it is exported, with 95% Wilson intervals.

    Lines of a table, and how many other evaluations of the stage there are.
    """
    target = calibrated and (calibrated["run"] or f"{calibrated['target']:g}")
    lines: list[str] = []
    others, trained_on = 0, set(run.record().get("in_distribution", []))
    for file in sorted(run.folder.glob("eval/*/metrics.json")):
        metrics = results.read(file)
        if metrics.weights != stage:
            continue
        edited = any(key in metrics.settings for key in EDITS)
        if edited or metrics.settings.get("calibrate") != target:
            others += 1
            continue
        for name, counts in metrics.sets.items():
            if counts.n:
                rate = statistics.wilson(counts.refused["paper"], counts.n)
                mark = " (trained on)" if counts.in_distribution or name in trained_on else ""
                lines.append(
                    f"| {name}{mark} | {counts.kind.value} | {counts.n} | "
                    f"{rate.estimate:.0%} ({rate.low:.0%} to {rate.high:.0%}) |"
                )
    return list(dict.fromkeys(lines)), others


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
