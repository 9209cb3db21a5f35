"""Export a run's result: merged weights with a model card."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dcr import entry, extensions, gating, resolving, robustness
from dcr.core import config, machine, prompts, storage
from dcr.core.config import EMBEDDED_MODEL, STAGES, ConfigError, Precision, Quantization
from dcr.core.config.training import AUTO_LAYER, ContrastiveConfig, block_of
from dcr.core.evaluation import APART, check_names
from dcr.core.prompts import ChatFormat
from dcr.core.runs import Run
from dcr.extensions import EvalSettings
from dcr.gating import GatingConfig
from dcr.public import SOURCES
from dcr.stages import last_stage, stages_behind

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from dcr.core.models import Policy

ROUNDED = (
    "the weights are in bfloat16, rounded from a merge in float32: logits differ from those of the "
    "run's adapter by about 1%; precision=fp32 keeps them"
)
PROCESSOR = "dcr_logits.py"  # in a calibrated export: `dcr.serving`, for vLLM
GATED = "dcr_gate.py"  # in one with a gate: `dcr.gating.serving`, for transformers
COMPARED = 64  # validation prompts of either kind whose logits tell what an export changes
HUB_NAMES = {EMBEDDED_MODEL: "HuggingFaceTB/SmolLM2-135M-Instruct"}
FRONT = {  # front matter of every card, which the hub reads
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "license": "other",
    "license_name": "base-model-and-data",
    "tags": ["over-refusal", "safety", "dcr"],
}
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
READ_OUT = (
    " Before the merge came a readout, which is no part of the paper: the adapter's last blocks "
    "were trained on for how an answer to either kind of prompt begins."
)
UNTUNED = "The model as it came, without any safety training: what is refused, a gate refuses."
BASE = "base"  # as a stage: the model before training
LEARNT = {"contrastive": ("seemingly_toxic", "toxic"), "sft": ("safety", "normal")}
LEARNT |= {"readout": LEARNT["contrastive"]}
CARD = ("refused", "toxic", "answered", "seemingly_toxic")  # the columns of attacks
SETTINGS = {  # the settings that a card names, by stage
    "contrastive": (
        "dcr.layer", "dcr.epochs", "dcr.margin", "dcr.scale", "dcr.ratio", "dcr.batch_size",
        "dcr.optim.lr", "dcr.nll.weight", "dcr.nll.source", "dcr.precision",
    ),
    "sft": (
        "sft.epochs", "sft.batch_size", "sft.lr", "sft.lora.rank", "sft.lora.alpha",
        "sft.lora.targets", "sft.max_len", "sft.precision",
    ),
    "readout": ("sft.readout.steps", "sft.readout.greedy"),
}  # fmt: skip


@dataclass
class Options:
    """python -m dcr.export run=<folder> out=<folder> [stage=readout|sft|contrastive|base]

    Writes merged safetensors weights, tokenizer, model card and metrics.csv: transformers loads
    them by themselves.
    """

    run: Path = entry.option("the run folder")
    out: Path = entry.option("a new folder for the export")
    stage: str | None = entry.option(
        "the stage to export, base being the model before training, behind a gate; by default the "
        "run's last",
        None,
        choices=[*(s.value for s in STAGES), BASE],
    )
    precision: str = entry.option(
        "of the weights; fp32 gives the logits of the run's adapter, bf16 differs by about 1%; "
        "auto: that of the run's evaluations",
        "auto",
        choices=("auto", "bf16", "fp32"),
    )
    calibrate: str | None = entry.option(
        "the share of toxic prompts to refuse, or a run whose share is to be reached, by a bias on "
        "the first token of refusals in the generation config",
        None,
    )
    gate: Path | None = entry.option(
        "the folder of a gate that python -m dcr.gate trained: it goes along, and calibrate "
        "chooses its threshold",
        None,
    )
    threshold: float | None = entry.option(
        "the gate's threshold; none: its own", None, least=0, most=1, key="gating.threshold"
    )
    alone: bool = entry.option(
        "the gate alone decides: answers do not begin with a refusal", True, key="gating.alone"
    )
    trust_remote_code: bool = entry.option(
        "run code that comes with the weights; a run's own settings never switch it on", False
    )


@entry.command(Options)
def main(options: Options) -> None:
    run = Run(options.run)
    precision = _evaluated_in(run)
    if options.precision != "auto":
        precision = Precision(options.precision)
    asked = (options.stage, precision, options.calibrate, options.trust_remote_code)
    gated = GatingConfig(options.threshold, options.alone)
    print(export(run, options.out, *asked, options.gate, gated))
    if precision is not Precision.fp32 and BASE not in (options.stage, run.config()["method"]):
        print(ROUNDED)


def export(
    run: Run,
    out: Path,
    stage: str | None = None,
    precision: Precision | None = None,
    calibrate: str | None = None,
    trust_remote_code: bool = False,
    gate: Path | None = None,
    gated: GatingConfig | None = None,
    evaluated_by: EvalSettings | None = None,
) -> Path:
    """Write a stage's weights, merged in fp32 and then cast, with tokenizer and card into `out`.

    `stage` is by default the run's last; of an evaluation of a model that no run trained it is
    `base`, the model as it came, which goes along with a gate alone. `precision` is by default that
    of the run's evaluations. `calibrate`, as that of `eval.py`, chooses a bias on these very
    weights and writes it into the generation config, or the threshold of a `gate`, which goes along
    as `gated` has it. The prompts that it is chosen on are those of `evaluated_by`, by default
    those of `eval.py`.

    Raises ConfigError when `out` holds anything, the stage is not done or not one of the method's,
    or its base is gone or not the one it was trained on.
    """
    made_with, stage = _exportable(run, out, stage, gate)
    dtype = "bfloat16" if (precision or _evaluated_in(run)) is Precision.bf16 else "float32"
    model = resolving.model_of(made_with, trust_remote_code)
    chosen_by = evaluated_by or EvalSettings()
    settings = EvalSettings(
        calibration=chosen_by.calibration,
        data=chosen_by.data,
        model=model,
        calibrate=calibrate,
        precision=_evaluated_in(run),
        gate=None if gate is None else str(gate),
        gating=gated or GatingConfig(),
    )
    for fault in gating.relations(settings):
        raise ConfigError(fault)

    import torch
    from peft import PeftModel

    from dcr import results, serving
    from dcr.calibration import biases
    from dcr.core import models
    from dcr.core.models import folders, structure
    from dcr.gating import answers
    from dcr.gating import serving as gate_serving

    if gate is not None:
        answers.check(settings, made_with)
    elif calibrate is not None:
        biases.check(settings, made_with)
    if calibrate is not None:
        check_names(biases.validation(settings))
    machine.use_threads()
    extensions.hand_in_passes()
    # evaluations or a template that cannot be read end the command before weights are opened
    evaluated(run, stage, {})
    if stage == BASE:
        in_full = replace(model, quantization=Quantization.none)
        policy = models.open_policy(in_full, Precision.fp32)
    else:
        prompts.chat_format(models.result_tokenizer(run.stage(stage), trust_remote_code), model)
        policy = folders.open_result(run.stage(stage), Precision.fp32, trust_remote_code)
    chat = prompts.chat_format(policy.tokenizer, model)
    narrow = structure.is_quantised(policy.model)
    lost = _put_in_full(policy, chat, settings, run.stage(stage)) if narrow else None
    if isinstance(policy.model, PeftModel):
        policy = models.Policy(policy.model.merge_and_unload(), policy.tokenizer, policy.name)
    prompts.keep_template(chat)
    replaced = _set_decoding(policy, chat, settings.gen.most)
    policy.model.to(getattr(torch, dtype))
    rounded = _rounded(*lost, _first_logits(policy, chat, settings)) if lost else None
    record, rule, change = None, None, dict[str, Any]()
    if gate is not None:
        rule, record = answers.rule(policy, chat, settings)
        change = answers.Gated().recorded(settings)
    elif calibrate is not None:
        bias, record = biases.calibrated(policy, chat, settings)
        policy.model.generation_config.sequence_bias = bias.sequences
        change = {"calibrate": biases.label(settings)}
    depth = policy.model.config.num_hidden_layers
    weights = Weights(dtype, depth, record, replaced, rounded, rule, change)
    with storage.replaced_folder(out) as staging:
        policy.model.save_pretrained(staging)
        policy.tokenizer.save_pretrained(staging)
        card = model_card(run, stage, made_with, weights)
        (staging / "README.md").write_text(card, encoding="utf-8")
        if gate is not None:
            shutil.copytree(gate, staging / "gate")
            storage.write_json(staging / "gate" / gating.RECORD, rule)
            storage.write_checksums(staging / "gate")
            shutil.copyfile(gate_serving.__file__, staging / GATED)
        elif record:
            shutil.copyfile(serving.__file__, staging / PROCESSOR)
        measured, _, _ = evaluated(run, stage, change)
        if len(measured):
            numbers = results.csv_text(measured.drop(columns=["run", "edit", "file"]))  # no paths
            (staging / "metrics.csv").write_text(numbers, encoding="utf-8")
    return out


def _evaluated_in(run: Run) -> Precision:
    """The precision of the run's evaluations. Raises ConfigError where there is no run."""
    run.config()
    return run.precisions().get("evaluation", Precision.bf16)


def _exportable(
    run: Run, out: Path, stage: str | None, gate: Path | None
) -> tuple[dict[str, Any], str]:
    """The run's configuration, and its stage. Raises ConfigError where `out` cannot hold that."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out}: is not empty; name a new folder")
    made_with = run.config()
    untuned = made_with["method"] == BASE
    stage = stage or (BASE if untuned else last_stage(made_with))
    if stage == BASE:
        if gate is None:
            raise ConfigError(
                "stage=base: the model as it came needs no export; name gate=<folder>"
            )
        return made_with, stage
    if not run.done(stage):
        raise ConfigError(f"run={run.folder}: stage {stage} is not done there; train it first")
    run.record()  # the card needs it: damage is found before weights are opened
    if made_with["method"] not in config.Method.__members__ or not stages_behind(made_with, stage):
        raise ConfigError(f"run={run.folder}: method={made_with['method']} has no stage {stage}")
    return made_with, stage


def _set_decoding(policy: "Policy", chat: ChatFormat, most: int) -> dict[str, Any]:
    """Write greedy decoding of at most `most` new tokens into the generation config.

    Returns the base's own settings that this replaces, such as a temperature.
    """
    from transformers import GenerationConfig

    tokenizer, own = policy.tokenizer, policy.model.generation_config or GenerationConfig()
    ends = own.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chat.stop[0])
    policy.model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=most,
        eos_token_id=list(dict.fromkeys([*chat.stop, *ends])),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=own.bos_token_id,
    )
    same = {"_from_model_config", "transformers_version", "eos_token_id", "pad_token_id"}
    return {name: value for name, value in own.to_diff_dict().items() if name not in same}


def _put_in_full(
    policy: "Policy", chat: ChatFormat, settings: EvalSettings, folder: Path
) -> "tuple[list[float], Tensor]":
    """Put a base in four bits in full.

    Returns how far each of its layers is from the base's own, and the first logits before.
    """
    from dcr import quantising

    whole = quantising.open_base(folder, settings.model.trust_remote_code)
    errors = quantising.rounding_errors(policy.model, whole)
    del whole
    before = _first_logits(policy, chat, settings)
    quantising.dequantise(policy.model)
    return errors, before


def _rounded(errors: Sequence[float], before: "Tensor", after: "Tensor") -> dict[str, float]:
    moved, same = (after - before).abs(), after.argmax(-1) == before.argmax(-1)
    return {
        "mean": sum(errors) / len(errors),
        "most": max(errors),
        "logits": float(moved.mean()),
        "logits_most": float(moved.max()),
        "n": len(after),
        "same": int(same.sum()),
    }


def _first_logits(policy: "Policy", chat: ChatFormat, settings: EvalSettings) -> "Tensor":
    """The logits of the first answer token of validation prompts, in fp32."""
    import torch

    from dcr.calibration import biases
    from dcr.core.refusal import opening

    rows = [row for asked in biases.validation(settings, COMPARED) for row in asked.rows]
    encoded = [chat.prompt_ids(row.prompt) for row in rows]
    found = list(opening.first_logits(policy.model, encoded))
    order = torch.tensor([place for places, _ in found for place in places]).argsort()
    return torch.cat([logits.float().cpu() for _, logits in found])[order]


# --- the card -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """The exported weights, as their card tells of them."""

    dtype: str
    depth: int  # blocks of the model
    # the record of the bias in their generation config, or of the gate's threshold
    calibrated: Mapping[str, Any] | None = None
    # the settings that the base's own generation config had
    decoding: Mapping[str, Any] = field(default_factory=dict)
    rounded: Mapping[str, float] | None = None  # errors of four bits, and of putting them in full
    gate: Mapping[str, Any] | None = None  # what `gate.json` says of the gate that goes along
    # the settings that evaluations of plain weights do not have
    change: Mapping[str, Any] = field(default_factory=dict)


def model_card(run: Run, stage: str, made_with: Mapping[str, Any], weights: Weights) -> str:
    """README.md of the export, in Markdown: method, settings, data with licences, and scores.

    Raises DataError for an evaluation that cannot be read.
    """
    from dcr.report.writing import templates

    untuned = stage == BASE
    name, method = made_with["model"]["name"], BASE if untuned else made_with["method"]
    front: dict[str, Any] = {"base_model": HUB_NAMES.get(name, name)}
    if Path(name).is_absolute() or Path(name).is_dir():
        front = {}  # a folder on the training machine means nothing elsewhere
        name = Path(name).name
    front |= {**FRONT, "tags": list(dict.fromkeys([*FRONT["tags"], method]))}
    stages = stages_behind(made_with, stage)
    read = " + readout" if "readout" in stages else ""
    record = {} if untuned else run.record()
    rows = {n: part for n, part in record.get("rows", {}).items() if part["count"]}
    measured, silences, others = evaluated(run, stage, weights.change)
    attacked = _under_attack(measured).drop_duplicates(["kind", "set"])
    return (
        templates(escaping=False)
        .get_template("model_card.md")
        .render(
            front=yaml.safe_dump(front, sort_keys=False),
            title=f"{made_with['model'].get('label') or name}, "
            + ("behind a gate" if untuned else f"{method}{read}, stage {stage}"),
            base=HUB_NAMES.get(name, name),
            method=UNTUNED
            if untuned
            else METHODS[method, "sft" if read else stage] + (READ_OUT if read else ""),
            system=made_with["model"].get("system_prompt"),
            settings=_settings(run, made_with, stages, weights.depth),
            rows=rows,
            fingerprint=storage.fingerprint({n: part["fingerprint"] for n, part in rows.items()}),
            sources=_sources(made_with, stages, weights.gate or {}),
            scores=measured.query(
                "quantity == 'refused' and judge == 'keyword:paper' and n > 0"
            ).drop_duplicates(["set", "kind", "n", "count"]),
            attacked=_attacked(measured),
            pooled=[*attacked.loc[attacked.duplicated("kind", keep=False), "set"]],
            silences=silences,
            trained_on=record.get("in_distribution", []),
            others=others,
            **vars(weights),
        )
    )


def _attacked(measured: "pd.DataFrame") -> list[dict[str, str]]:
    """A line for each attack of each evaluation: its words, and by kind the share that is wanted.

    Two evaluations in other settings may ask the same prompts, so that they are never added up.
    """
    from dcr import inference

    rows = _under_attack(measured)
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for kind, wanted in (("toxic", "refused"), ("seemingly_toxic", "answered")):
        named = rows["quantity"].str.endswith(f"/{wanted}") & (rows["judge"] == "outcome")
        of_kind = rows.loc[named & (rows["kind"] == kind)]
        for (file, quantity), of in of_kind.groupby(["file", "quantity"], sort=False):
            found = inference.wilson(int(of["count"].sum()), int(of["n"].sum()))
            share = f"{found.estimate:.0%} ({found.low:.0%} to {found.high:.0%})"
            attack = robustness.words(str(quantity).split("/")[1])
            empty = {"attack": attack} | dict.fromkeys(CARD, "–")
            line = lines.setdefault((file, attack), empty)
            line |= {wanted: share, kind: str(int(of["n"].sum()))}
    return [*lines.values()]


def _under_attack(measured: "pd.DataFrame") -> "pd.DataFrame":
    """The measures under attack, without those of sets that are never pooled with others."""
    rows = measured.loc[measured["quantity"].str.startswith("robustness/")]
    return rows.loc[~rows["set"].isin(APART)]


def _settings(
    run: Run, made_with: Mapping[str, Any], stages: Sequence[str], depth: int
) -> dict[str, str]:
    if not stages:  # nothing was trained
        return {}
    keys = ["preset_name", "seed", *(key for each in stages for key in SETTINGS.get(each, ()))]
    settings = {key: _leaf(made_with, key) for key in keys}
    if "dcr.layer" in settings:
        stage_one = made_with["dcr"]
        block = run.block() if stage_one.get("layer") == AUTO_LAYER else None
        if block is None:
            named = {key: stage_one[key] for key in ("layer", "depth") if key in stage_one}
            block = block_of(ContrastiveConfig(**named), depth)
        settings["dcr.layer"] = f"block {block} of {depth}, counted from 1"
    return settings


def _leaf(node: Any, path: str) -> str:
    for key in path.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    if isinstance(node, list):
        return ", ".join(map(str, node))
    return "default" if node is None else str(node)


def _sources(
    made_with: Mapping[str, Any], stages: Sequence[str], gate: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """Use, name and licence of each source of the stages and of the pairs that a gate has learnt.

    A user's file is named without its folders.
    """
    used: list[tuple[str, Any]] = []
    for stage in stages:
        for use in LEARNT[stage]:
            if stage == "readout":
                used.append((use, made_with["sft"]["readout"].get(use)))
            else:
                used.append((use, made_with.get("data", {}).get(use, {}).get("source")))
    pairs = gate.get("made_with", {}).get("pairs", {}).items()
    used += [(f"gate: {k}", part["sources"]) for k, part in pairs if not k.endswith("heldout")]
    rows = []
    for use, named in used:
        for source in [named] if isinstance(named, str) else named or []:
            known = SOURCES.get(source)
            licence = known.licence if known else "a file of the user's"
            rows.append((use, source if known else Path(source).name, licence))
    return list(dict.fromkeys(rows))


def evaluated(
    run: Run, stage: str, change: Mapping[str, Any]
) -> "tuple[pd.DataFrame, list[str], int]":
    """Scores of the stage as it is exported, warnings of many empty answers, and a count.

    `change` has the settings of its evaluations that differ from those of plain weights. The other
    evaluations are counted: under an edit, with another calibration or on validation prompts.
    """
    import pandas as pd

    from dcr import results

    if not any(run.folder.glob("eval/*/metrics.json")):
        return pd.DataFrame(columns=list(results.COLUMNS)), [], 0
    table = results.load(run.folder)
    table = table.loc[table["weights"] == stage]
    measured = table.loc[table["edit"] == results.edit(change)]
    files = dict.fromkeys(measured["file"])
    silences = [silence for file in files if (silence := results.read(Path(file)).silence)]
    return measured, silences, len(set(table["file"]) - set(files))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
