"""What is measured on the weights themselves: ability, and the paper's analyses.

Refusal probability, empirical NTK and separability take prompts by kind and give a block of
`metrics.json`; evaluation calls them on a finished model, `tracking` the first two while one
trains. `MEASURED` is the table of tasks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from dcr import claims, config, models, ntk, refusal, separability, statistics, storage
from dcr.config import (
    ContrastiveConfig,
    EvalConfig,
    KernelConfig,
    Kind,
    RefusalProbabilityConfig,
    Task,
)
from dcr.evaluation import ability, sets, subjects
from dcr.evaluation.sets import ByKind
from dcr.models import Policy
from dcr.prompts import ChatFormat, chat_format
from dcr.runs import Run
from dcr.sources import Example
from dcr.text import normalise


def refusal_probability(
    policy: Policy,
    chat: ChatFormat,
    rows: ByKind,
    alone: Mapping[Kind, Example],
    settings: RefusalProbabilityConfig,
    seed: int,
) -> dict[str, Any]:
    """A.5 on every prompt: the plain sum and the prefix-free probability.

    `kinds` has means with 95% bootstrap intervals over prompts, `followed` the prompts `alone`,
    `values` every prompt by id.
    """
    flat = [(kind.value, row) for kind, part in rows.items() for row in part]
    prompts = [row.prompt for row in (*(row for _, row in flat), *alone.values())]
    phrases = refusal.PHRASES[settings.phrases.value]
    plain, prefix_free = refusal.probabilities(
        policy.model, chat.tokenizer, [chat.prompt_ids(prompt) for prompt in prompts], phrases
    )
    both = zip(plain.tolist(), prefix_free.tolist(), strict=True)
    values = [{"plain": one, "prefix_free": other} for one, other in both]
    every = [
        {"id": row.id, "kind": kind} | of
        for (kind, row), of in zip(flat, values[: len(flat)], strict=True)
    ]
    return {
        "phrases": settings.phrases.value,
        "kinds": {kind.value: _means(every, kind.value, seed) for kind in rows},
        "followed": {
            kind.value: {"id": row.id} | of
            for (kind, row), of in zip(alone.items(), values[len(flat) :], strict=True)
        },
        "values": every,
    }


def _means(every: Sequence[Mapping[str, Any]], kind: str, seed: int) -> dict[str, Any]:
    of_kind = [row for row in every if row["kind"] == kind]
    return {"n": len(of_kind)} | {
        name: list(astuple(statistics.mean_interval([row[name] for row in of_kind], seed=seed)))
        for name in ("plain", "prefix_free")
    }


def kernel(
    policy: Policy, chat: ChatFormat, rows: ByKind, settings: KernelConfig, seed: int, folder: Path
) -> dict[str, Any]:
    """A.6 for every choice of parameters: 3×3 means by kind, `[observer][trained]`, with intervals.

    Needs weights in fp32 or wider. The whole matrices, with the tokens and ids of their prompts, go
    to `folder`/kernel/<params>.safetensors.
    """
    flat = [(kind.value, row) for kind, part in rows.items() for row in part]
    encoded = [chat.prompt_ids(row.prompt) for _, row in flat]
    kinds, ids = [kind for kind, _ in flat], [row.id for _, row in flat]
    method, normalise = settings.method.value, settings.normalise.value
    means = {}
    for params in settings.params:
        chosen = ntk.Settings(
            settings.top_k,
            params,
            settings.head,
            method=method,
            budget_gib=settings.budget_gib,
        )
        measured = ntk.measure(policy.model, encoded, chosen, ids=ids)
        name = params.replace(":", "-") + ("" if settings.head else "-headless")
        _keep(measured, folder / "kernel" / f"{name}.safetensors")
        matrix = ntk.normalised(measured.norms, normalise)
        by_kind = ntk.mean_by_kind(matrix, kinds, settings.self_pairs, seed=seed)
        means[name] = {
            observer: {trained: _finite(cell) for trained, cell in row.items()}
            for observer, row in by_kind.items()
        }
    return {
        "top_k": settings.top_k,
        "method": method,
        "normalise": normalise,
        "kinds": [kind.value for kind in rows],
        "ids": ids,
        "of": kinds,
        "params": means,
    }


def _keep(measured: ntk.Kernel, file: Path) -> None:
    tensors = {"norms": measured.norms, "tokens": measured.tokens.to(torch.int64)}
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    storage.write_bytes(file, save(whole, {"ids": "\n".join(measured.ids)}))


def _finite(cell: object) -> list[float | None]:
    """A mean with its interval as JSON holds them."""
    return [value if math.isfinite(value) else None for value in vars(cell).values()]


# --- task by task ---------------------------------------------------------------------------------


TRUNK = "trunk"  # among claims.params: the blocks up to the layer whose states are read


@dataclass(frozen=True)
class Work:
    """One subject to measure: `policy` opens it when it is first needed."""

    settings: EvalConfig
    run: Run
    policy: Callable[[], Policy]
    folder: Path
    kinds: ByKind
    refused: Sequence[Example]
    before: Mapping[str, Any]  # what `metrics.json` holds of an earlier command

    def drawn(self, count: int | None) -> dict[Kind, list[Example]]:
        """So many prompts of each kind of `data.analysis`; None: all."""
        return sets.drawn(self.kinds, count, self.settings.seed)

    def trained_on(self, rows: Mapping[Kind, list[Example]]) -> dict[str, int]:
        """How many of the prompts of each kind the run has learnt from, in whichever stage."""
        texts = subjects.trained_texts(self.run).values()
        learnt = {normalise(text) for part in texts for text in part}
        return {
            kind.value: sum(normalise(row.prompt) in learnt for row in part)
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
    return work.before.get("ability", {}) | ability.ability(
        work.policy(),
        work.settings.ability,
        work.settings.data.root,
        work.folder,
        work.settings.seed,
        work.settings.trainer.progress,
    )


def _refusal_probability(work: Work) -> dict[str, Any]:
    options, seed = work.settings.refusal_prob, work.settings.seed
    alone, rows = sets.followed(work.kinds), work.drawn(options.prompts)
    block = refusal_probability(work.policy(), work.chat(), rows, alone, options, seed)
    return block | {"trained_on": work.trained_on(rows)}


def _kernel(work: Work) -> dict[str, Any]:
    options, policy = work.settings.entk, work.widened()
    rows = work.drawn(options.prompts)
    block = kernel(policy, work.chat(), rows, options, work.settings.seed, work.folder)
    before = work.before.get("kernel", {})
    alike = all(before.get(key) == value for key, value in block.items() if key != "params")
    params = before["params"] | block["params"] if alike else block["params"]
    return block | {"params": params, "trained_on": work.trained_on(rows)}


def _separability(work: Work) -> dict[str, Any]:
    options = work.settings.sep
    rows = work.drawn(options.prompts)
    measured = separability.analyse(
        work.policy(),
        work.chat(),
        rows[Kind.seemingly_toxic],
        rows[Kind.toxic],
        work.settings.seed,
        pooling=options.pooling,
    )
    return measured | {"trained_on": work.trained_on(rows)}


def _claims(work: Work) -> dict[str, Any]:
    options, chat = work.settings.claims, work.chat()
    layer = _layer(work.settings, work.run)
    rows = work.drawn(options.prompts)
    seen = {normalise(row.prompt) for part in rows.values() for row in part}
    apart = [pair for pair in work.refused if normalise(pair.prompt) not in seen]
    pairs = claims.alike(chat, apart)
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
    depth = models.facts(settings.model).depth
    return config.block_of(ContrastiveConfig(**named), depth)


# What is measured on the weights themselves; kernels last, since they widen them to fp32.
MEASURED = {
    Task.ability: _ability,
    Task.refusal_probability: _refusal_probability,
    Task.separability: _separability,
    Task.kernel: _kernel,
    Task.claims: _claims,
}
