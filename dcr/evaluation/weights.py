"""What is measured on the weights themselves: ability, and the paper's analyses.

Refusal probability, empirical NTK and separability take prompts by kind and give a block of
`metrics.json`; evaluation calls them on a finished model, `tracking` the first two while one
trains. `MEASURED` is the table of tasks.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from dcr import claims, config, models, ntk, refusal, separability, sources, statistics, storage
from dcr.config import (
    ConfigError,
    ContrastiveConfig,
    DataConfig,
    EvalConfig,
    KernelConfig,
    Kind,
    RefusalProbabilityConfig,
    Task,
)
from dcr.evaluation import ability, subjects
from dcr.models import Policy
from dcr.prompts import ChatFormat, chat_format
from dcr.runs import Run
from dcr.sources import Example
from dcr.text import normalise

ByKind = Mapping[Kind, Sequence[Example]]
# The prompts that Figures 1(b) and 9 of the paper follow stand in XSTest and Alpaca, whose rows are
# not ours to print: hashes of the normalised prompts find them there.
FOLLOWED = {
    Kind.normal: "18ab3ef4c3463f67",
    Kind.seemingly_toxic: "0be02537e93cc530",
    Kind.toxic: "760a3721eb1a485b",
}


def every(data: DataConfig) -> dict[Kind, list[Example]]:
    """All rows of each kind of `data.analysis`, each prompt once.

    Raises ConfigError where a kind has no source.
    """
    rows = {}
    for kind in (Kind.seemingly_toxic, Kind.toxic, Kind.normal):
        names = getattr(data.analysis, kind.value)
        if not names:
            raise ConfigError(
                f"data.analysis.{kind.value}=[]: name a source to measure on, or choose a data "
                "file that does, such as data=demo"
            )
        read = [row for n in names for row in sources.read(n, root=data.root, kind=kind)]
        rows[kind], _ = sources.drop_duplicates(read)
    return rows


def drawn(rows: ByKind, count: int | None, seed: int) -> dict[Kind, list[Example]]:
    """Up to `count` of each kind, drawn by seed; None: all."""
    return {
        kind: list(of) if count is None else sources.draw(of, min(count, len(of)), seed)
        for kind, of in rows.items()
    }


def followed(rows: ByKind) -> dict[Kind, Example]:
    """One prompt of each kind to follow alone: the paper's, or the first where it is not there."""

    def digest(prompt: str) -> str:
        return hashlib.sha256(normalise(prompt).encode()).hexdigest()[:16]

    return {
        kind: next((row for row in of if digest(row.prompt) == FOLLOWED[kind]), of[0])
        for kind, of in rows.items()
    }


def refused_pairs(data: DataConfig, seed: int) -> list[Example]:
    """Every pair of `data.safety` whose response refuses, in an order drawn by seed.

    Raises ConfigError where there is none.
    """
    rows = [
        row
        for name in data.safety.source
        for row in sources.read(name, root=data.root, kind=Kind.toxic, pairs=True)
    ]
    rows, _ = sources.drop_duplicates(rows)
    refused = [row for row in rows if row.response and refusal.is_refusal(row.response)]
    if not refused:
        raise ConfigError(
            f"data.safety.source={data.safety.source}: no pair whose response refuses; name "
            "another source"
        )
    return sources.draw(refused, len(refused), seed)


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
    flat = [(kind, row.id, row.prompt) for kind, part in rows.items() for row in part]
    encoded = [chat.prompt_ids(prompt) for _, _, prompt in flat]
    encoded += [chat.prompt_ids(row.prompt) for row in alone.values()]
    both = refusal.probabilities(
        policy.model, chat.tokenizer, encoded, refusal.PHRASES[settings.phrases.value]
    )
    values = {
        name: of_all.tolist() for name, of_all in zip(("plain", "prefix_free"), both, strict=True)
    }
    kinds: dict[str, Any] = {}
    for kind in rows:
        places = [i for i, (of, _, _) in enumerate(flat) if of is kind]
        kinds[kind.value] = {"n": len(places)} | {
            name: list(astuple(statistics.mean_interval([of_all[i] for i in places], seed=seed)))
            for name, of_all in values.items()
        }
    return {
        "phrases": settings.phrases.value,
        "kinds": kinds,
        "followed": {
            kind.value: {"id": row.id, **{n: of_all[len(flat) + i] for n, of_all in values.items()}}
            for i, (kind, row) in enumerate(alone.items())
        },
        "values": [
            {"id": identity, "kind": kind.value, **{n: of_all[i] for n, of_all in values.items()}}
            for i, (kind, identity, _) in enumerate(flat)
        ],
    }


def kernel(
    policy: Policy,
    chat: ChatFormat,
    rows: ByKind,
    settings: KernelConfig,
    seed: int,
    folder: Path | None = None,
) -> dict[str, Any]:
    """A.6 for every choice of parameters: 3×3 means by kind, `[observer][trained]`, with intervals.

    Needs weights in fp32 or wider. The whole matrices, with the tokens and ids of their prompts, go
    to `folder`/kernel/<params>.safetensors.
    """
    flat = [(kind, row) for kind, part in rows.items() for row in part]
    encoded = [chat.prompt_ids(row.prompt) for _, row in flat]
    kinds, ids = [kind.value for kind, _ in flat], [row.id for _, row in flat]
    blocks = {}
    for params in settings.params:
        chosen = ntk.Settings(
            top_k=settings.top_k,
            params=params,
            head=settings.head,
            method=settings.method.value,
            budget_gib=settings.budget_gib,
        )
        measured = ntk.measure(policy.model, encoded, chosen, ids=ids)
        name = params.replace(":", "-") + ("" if settings.head else "-headless")
        if folder is not None:
            tensors = {"norms": measured.norms, "tokens": measured.tokens.to(torch.int64)}
            content = save(
                {key: tensor.contiguous() for key, tensor in tensors.items()},
                {"ids": "\n".join(measured.ids)},
            )
            storage.write_bytes(folder / "kernel" / f"{name}.safetensors", content)
        matrix = ntk.normalised(measured.norms, settings.normalise.value)
        means = ntk.mean_by_kind(matrix, kinds, settings.self_pairs, seed=seed)
        blocks[name] = {
            observer: {
                trained: [value if math.isfinite(value) else None for value in vars(cell).values()]
                for trained, cell in row.items()
            }
            for observer, row in means.items()
        }
    return {
        "top_k": settings.top_k,
        "method": settings.method.value,
        "normalise": settings.normalise.value,
        "kinds": [kind.value for kind in rows],
        "ids": ids,
        "of": kinds,
        "params": blocks,
    }


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
        return drawn(self.kinds, count, self.settings.seed)

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
    options = work.settings.refusal_prob
    alone, rows = followed(work.kinds), work.drawn(options.prompts)
    return refusal_probability(
        work.policy(), work.chat(), rows, alone, options, work.settings.seed
    ) | {"trained_on": work.trained_on(rows)}


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
