"""README.md of an export: what the model is, made from what, how it scored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dcr import results, statistics, storage
from dcr.config import (
    AUTO_LAYER,
    EMBEDDED_MODEL,
    ContrastiveConfig,
    LayerBase,
    block_of,
)
from dcr.runs import Run
from dcr.sources import SOURCES

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
# Settings of an evaluation that was not of the exported model, or not on the test sets.
EDITS = ("steering", "self_cd", "validation")
SETTINGS = {  # what a reader must know to judge a result, by stage
    "contrastive": (
        "dcr.layer", "dcr.epochs", "dcr.margin", "dcr.scale", "dcr.ratio", "dcr.batch_size",
        "dcr.optim.lr", "dcr.nll.weight", "dcr.nll.source", "dcr.precision",
    ),
    "sft": (
        "sft.epochs", "sft.batch_size", "sft.lr", "sft.lora.rank", "sft.lora.alpha",
        "sft.lora.targets", "sft.max_len", "sft.precision",
    ),
}  # fmt: skip
USE = """## Intended use and limits

For research on over-refusal. The model refuses some harmful requests and answers others; it also
refuses some harmless ones. It has no other safeguard and has not been red-teamed: do not put it
before users unattended. Refusal in the scores is judged by keywords, which says nothing about what
an answer is worth. Nothing was measured in languages other than those of the data.
"""


def model_card(
    run: Run, stage: str, made_with: Mapping[str, Any], *, dtype: str, depth: int
) -> str:
    """README.md of the export: what it is, made from what, how it scored. Markdown.

    `dtype` is that of the exported weights, `depth` the model's number of blocks. Raises DataError
    for an evaluation that cannot be read.
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
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {made_with['model'].get('label') or name}, {method}, stage {stage}",
        f"Made from {HUB_NAMES.get(name, name)}. {METHODS[method, stage]}",
        _spoken_to(made_with["model"]),
        f"The weights are in {dtype}; they were merged in float32.",
        _settings_section(run, stage, made_with, depth),
        _data_section(run, stage, made_with),
        _scores_section(run, stage),
        USE,
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _spoken_to(model: Mapping[str, Any]) -> str:
    text = "Use the tokenizer's chat template; the generation config stops on every end token."
    system = model.get("system_prompt")
    return f"{text} Trained with the system prompt: {system}" if system else text


def _settings_section(run: Run, stage: str, made_with: Mapping[str, Any], depth: int) -> str:
    stages = ["contrastive"] if made_with["method"] == "dcr" else []
    stages += ["sft"] if stage == "sft" else []
    keys = ["preset_name", "seed", *(key for name in stages for key in SETTINGS[name])]
    values = {key: _leaf(made_with, key) for key in keys}
    if "dcr.layer" in values:
        block = _block(run, made_with["dcr"], depth)
        values["dcr.layer"] = f"block {block} of {depth}, counted from 1"
    lines = [f"| `{key}` | {value} |" for key, value in values.items()]
    return "\n".join(["## Settings", "", "| setting | value |", "| --- | --- |", *lines])


def _block(run: Run, made: Mapping[str, Any], depth: int) -> int:
    """The block ℓ that stage one read."""
    if made.get("layer") == AUTO_LAYER and (chosen := run.block()) is not None:
        return chosen
    named = {key: made[key] for key in ("layer", "depth") if key in made}
    base = LayerBase(made.get("layer_base", LayerBase.one_based.value))
    return block_of(ContrastiveConfig(**named, layer_base=base), depth)


def _leaf(node: Any, path: str) -> str:
    for key in path.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    if isinstance(node, list):
        return ", ".join(map(str, node))
    return "default" if node is None else str(node)


def _data_section(run: Run, stage: str, made_with: Mapping[str, Any]) -> str:
    record, data = run.record(), made_with.get("data", {})
    drawn = {name: part for name, part in record.get("rows", {}).items() if part["count"]}
    marks = {name: part["fingerprint"] for name, part in drawn.items()}
    lines = ["## Data", ""]
    if drawn:
        lines += [f"Fingerprint of all rows: `{storage.fingerprint(marks)}`", ""]
        lines += ["| list | rows | fingerprint |", "| --- | ---: | --- |"]
        lines += [f"| {n} | {p['count']} | `{p['fingerprint']}` |" for n, p in drawn.items()]
        lines += [""]
    nodes = ["seemingly_toxic", "toxic"] if made_with["method"] == "dcr" else []
    nodes += ["safety", "normal"] if stage == "sft" else []
    lines += ["| used as | source | licence |", "| --- | --- | --- |"]
    for node in nodes:
        named = data.get(node, {}).get("source") or []
        for source in [named] if isinstance(named, str) else named:
            known = SOURCES.get(source)
            licence = known.licence if known else "a file of the user's"
            lines.append(f"| {node} | {source if known else Path(source).name} | {licence} |")
    lines += [
        "",
        "The licences of the base model and of these sources bind whoever uses the model.",
    ]
    return "\n".join(lines)


def _scores_section(run: Run, stage: str) -> str:
    """Refusals in the stage's evaluations as it is exported, with 95% Wilson intervals."""
    lines: list[str] = []
    others = 0
    known = set(run.record().get("in_distribution", []))
    for file in sorted(run.folder.glob("eval/*/metrics.json")):
        found = results.read(file)
        if found.weights != stage:
            continue
        if any(key in found.settings for key in EDITS):
            others += 1
            continue
        for name, counts in found.sets.items():
            if counts.n:
                rate = statistics.wilson(counts.refused["paper"], counts.n)
                trained_on = counts.in_distribution or name in known
                lines.append(
                    f"| {name}{' (trained on)' if trained_on else ''} | {counts.kind.value} | "
                    f"{counts.n} | {rate.estimate:.0%} ({rate.low:.0%} to {rate.high:.0%}) |"
                )
    left_out = (
        f"{others} evaluation{'s' if others > 1 else ''} under an edit or on validation prompts "
        f"{'are' if others > 1 else 'is'} left out."
        if others
        else ""
    )
    if not lines:
        told = f"Not evaluated as it is exported; {left_out}" if others else "Not evaluated."
        return f"## Scores\n\n{told}"
    head = [
        "## Scores",
        "",
        "| set | prompts | n | refused (keywords) |",
        "| --- | --- | ---: | --- |",
    ]
    return "\n".join([*head, *dict.fromkeys(lines), *(["", left_out] if others else [])])
