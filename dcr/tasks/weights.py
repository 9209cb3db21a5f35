"""What is measured on the weights of a subject themselves: ability and the paper's analyses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcr import analyses, claims, config, contamination, models
from dcr.benchmarks import ability
from dcr.config import ContrastiveConfig, EvalConfig, Kind, LayerBase, Task
from dcr.models import Policy
from dcr.prompts import ChatFormat, chat_format
from dcr.runs import Run
from dcr.sources import Example
from dcr.tasks import records
from dcr.tasks.reading import Prompts

TRUNK = "trunk"  # among claims.params: the blocks up to the layer whose states are read


@dataclass(frozen=True)
class Work:
    """One subject to measure: `policy` opens it when it is first needed."""

    settings: EvalConfig
    run: Run
    policy: Callable[[], Policy]
    folder: Path
    prompts: Prompts

    def drawn(self, count: int | None) -> dict[Kind, list[Example]]:
        """So many prompts of each kind of `data.analysis`; None: all."""
        return analyses.drawn(self.prompts.kinds, count, self.settings.seed)

    def trained_on(self, rows: Mapping[Kind, list[Example]]) -> dict[str, int]:
        """How many of the prompts of each kind the run has learnt from, in whichever stage."""
        texts = records.trained_texts(self.run).values()
        learnt = {contamination.normalise(text) for part in texts for text in part}
        return {
            kind.value: sum(contamination.normalise(row.prompt) in learnt for row in part)
            for kind, part in rows.items()
        }

    def chat(self) -> ChatFormat:
        return chat_format(self.policy().tokenizer, self.settings.model)

    def widened(self) -> Policy:
        """In fp32, which products of gradients need."""
        self.policy().model.float()
        return self.policy()


def _ability(work: Work) -> dict[str, Any]:
    """What the harness says of the tasks asked, beside what it said of others before."""
    return records.kept(work.folder, {}).get("ability", {}) | ability.ability(
        work.policy(),
        work.settings.ability,
        work.settings.data.root,
        work.folder,
        work.settings.seed,
        work.settings.trainer.progress,
    )


def _refusal_probability(work: Work) -> dict[str, Any]:
    options = work.settings.refusal_prob
    alone, rows = analyses.followed(work.prompts.kinds), work.drawn(options.prompts)
    return analyses.refusal_probability(
        work.policy(), work.chat(), rows, alone, options, work.settings.seed
    ) | {"trained_on": work.trained_on(rows)}


def _kernel(work: Work) -> dict[str, Any]:
    options, policy = work.settings.entk, work.widened()
    rows = work.drawn(options.prompts)
    block = analyses.kernel(policy, work.chat(), rows, options, work.settings.seed, work.folder)
    before = records.kept(work.folder, {}).get("kernel", {})
    alike = all(before.get(key) == value for key, value in block.items() if key != "params")
    params = before["params"] | block["params"] if alike else block["params"]
    return block | {"params": params, "trained_on": work.trained_on(rows)}


def _separability(work: Work) -> dict[str, Any]:
    options = work.settings.sep
    rows = work.drawn(options.prompts)
    measured = analyses.separate(work.policy(), work.chat(), rows, options, work.settings.seed)
    return measured | {"trained_on": work.trained_on(rows)}


def _claims(work: Work) -> dict[str, Any]:
    options, chat = work.settings.claims, work.chat()
    layer = _layer(work.settings, work.run)
    rows = work.drawn(options.prompts)
    pairs = claims.alike(chat, analyses.apart(work.prompts.refused, rows))
    chosen = claims.Settings(
        top_k=options.top_k,
        params=tuple(f"trunk:{layer}" if p == TRUNK else p for p in options.params),
        drop=options.drop,
        budget_gib=options.budget_gib,
        layer=layer,
    )
    trained, seed = pairs[: options.pairs], work.settings.seed
    measured = claims.measure(work.widened(), chat, rows, trained, chosen, seed, work.folder)
    return measured | {"trained_on": work.trained_on(rows)}


def _layer(settings: EvalConfig, run: Run) -> int:
    """The block that the run's stage one reads, or would read."""
    if settings.claims.layer is not None:
        return settings.claims.layer
    if (known := run.block()) is not None:
        return known
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
