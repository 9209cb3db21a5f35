"""What is measured on the weights of a subject themselves: ability and the paper's analyses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dcr import analyses, claims, config, models, prompts, refusal
from dcr.benchmarks import ability
from dcr.config import ContrastiveConfig, EvalConfig, LayerBase, Task
from dcr.models import Policy
from dcr.runs import Run
from dcr.tasks import records

Opened = Callable[[], Policy]
TRUNK = "trunk"  # among claims.params: the blocks up to the layer whose states are read


def _ability(settings: EvalConfig, run: Run, policy: Opened, folder: Path) -> dict[str, Any]:
    """What the harness says of the tasks asked, beside what it said of others before."""
    return records.kept(folder, {}).get("ability", {}) | ability.ability(
        policy(),
        settings.ability,
        settings.data.root,
        folder,
        settings.seed,
        settings.trainer.progress,
    )


def _refusal_probability(
    settings: EvalConfig, run: Run, policy: Opened, folder: Path
) -> dict[str, Any]:
    every = analyses.every(settings.data)
    rows = analyses.drawn(every, settings.refusal_prob.prompts, settings.seed)
    chat = prompts.chat_format(policy().tokenizer, settings.model)
    return analyses.refusal_probability(
        policy(), chat, rows, analyses.followed(every), settings.refusal_prob, settings.seed
    )


def _kernel(settings: EvalConfig, run: Run, policy: Opened, folder: Path) -> dict[str, Any]:
    rows = analyses.prompts(settings.data, settings.entk.prompts, settings.seed)
    chat = prompts.chat_format(policy().tokenizer, settings.model)
    policy().model.float()  # products of gradients need it
    block = analyses.kernel(policy(), chat, rows, settings.entk, settings.seed, folder)
    before = records.kept(folder, {}).get("kernel", {})
    alike = all(before.get(key) == value for key, value in block.items() if key != "params")
    return block | {"params": before["params"] | block["params"]} if alike else block


def _separability(settings: EvalConfig, run: Run, policy: Opened, folder: Path) -> dict[str, Any]:
    rows = analyses.prompts(settings.data, settings.sep.prompts, settings.seed)
    chat = prompts.chat_format(policy().tokenizer, settings.model)
    return analyses.separate(policy(), chat, rows, settings.sep, settings.seed)


def _claims(settings: EvalConfig, run: Run, policy: Opened, folder: Path) -> dict[str, Any]:
    options, chat = settings.claims, prompts.chat_format(policy().tokenizer, settings.model)
    layer = _layer(settings, run)
    rows = analyses.prompts(settings.data, options.prompts, settings.seed)
    pairs = analyses.refused_pairs(settings.data, settings.seed, refusal.is_refusal, rows)
    trained = claims.alike(chat, pairs)[: options.pairs]
    policy().model.float()
    chosen = claims.Settings(
        top_k=options.top_k,
        params=tuple(f"trunk:{layer}" if p == TRUNK else p for p in options.params),
        drop=options.drop,
        budget_gib=options.budget_gib,
        layer=layer,
    )
    return claims.measure(policy(), chat, rows, trained, chosen, settings.seed, folder)


def _layer(settings: EvalConfig, run: Run) -> int:
    """The block that the run's stage one reads, or would read."""
    if settings.claims.layer is not None:
        return settings.claims.layer
    if run.layer_file.is_file():
        return json.loads(run.layer_file.read_text())["block"]
    made = run.config().get("dcr", {"layer": settings.model.layer})
    named = {key: made[key] for key in ("layer", "depth") if key in made}
    base = LayerBase(made.get("layer_base", LayerBase.one_based.value))
    depth = models.facts(settings.model).depth
    return config.block_of(ContrastiveConfig(**named, layer_base=base), depth)


# What is measured on the weights themselves; kernels last, since they widen them to fp32.
MEASURED = {
    Task.ability: _ability,
    Task.refusal_probability: _refusal_probability,
    Task.separability: _separability,
    Task.kernel: _kernel,
    Task.claims: _claims,
}
