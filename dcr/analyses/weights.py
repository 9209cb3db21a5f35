"""What is measured on the weights themselves: ability, and the paper's analyses.

Refusal probability, empirical NTK and separability take prompts by kind and give a block of
`metrics.json`; evaluation calls them on a finished model, `tracking` the first two while one
trains. `MEASURED` is the table of tasks.
"""

import functools
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from dcr import ability
from dcr.analyses import claims, ntk, probability, separability
from dcr.core import config, models, refusal, statistics, storage
from dcr.core.config import ContrastiveConfig, EvalConfig, KernelConfig, Kind, Phrases, Task
from dcr.core.evaluation import sets, subjects
from dcr.core.evaluation.sets import ByKind
from dcr.core.evaluation.subjects import Among
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat, chat_format
from dcr.core.runs import Run
from dcr.core.sources import Example
from dcr.core.text import normalise

log = logging.getLogger(__name__)

SCORES = ("mass", "plain", "prefix_free")  # of a refusal: its first token's, and whole phrases'
Probability = dict[str, float]  # `plain` and `prefix_free`, of one prompt


def probabilities(
    policy: Policy, chat: ChatFormat, phrases: Phrases, prompts: Sequence[str]
) -> list[Probability]:
    """A.5 of every prompt: the plain sum and the prefix-free probability."""
    encoded, chosen = (
        [chat.prompt_ids(prompt) for prompt in prompts],
        probability.PHRASES[phrases.value],
    )
    both = probability.probabilities(policy.model, chat.tokenizer, encoded, chosen)
    pairs = zip(*(each.tolist() for each in both), strict=True)
    return [{"plain": plain, "prefix_free": prefix_free} for plain, prefix_free in pairs]


def refusal_probability(
    read: Callable[[list[str]], list[Probability]],
    rows: ByKind,
    alone: Mapping[Kind, Example],
    phrases: Phrases,
    seed: int,
) -> dict[str, Any]:
    """What `read` says of every prompt, as `probabilities` does.

    `kinds` has means with 95% bootstrap intervals over prompts, `followed` the prompts `alone`,
    `values` every prompt by id.
    """
    flat = [(kind.value, row) for kind, part in rows.items() for row in part]
    values = read([row.prompt for row in (*(row for _, row in flat), *alone.values())])
    every = [
        {"id": row.id, "kind": kind} | of
        for (kind, row), of in zip(flat, values[: len(flat)], strict=True)
    ]
    return {
        "phrases": phrases.value,
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


def first_token(
    policy: Policy,
    chat: ChatFormat,
    rows: Sequence[Example],
    every: Sequence[Mapping[str, Any]],
    seed: int,
) -> dict[str, Any]:
    """The mass of refusals' first tokens beside the probabilities of `every` over whole phrases.

    Over toxic and seemingly toxic prompts: Spearman's rank correlation of the mass with either sum,
    and the AUROC of toxic prompts by each of the three with its 95% bootstrap interval, None where
    a kind is absent. Phrases that rank the prompts better than their first tokens do say that
    first tokens hide what the model would answer.
    """
    openings, mass = refusal.refusal_openings(chat), torch.zeros(len(rows))
    for places, logits in refusal.first_logits(
        policy.model, [chat.prompt_ids(row.prompt) for row in rows]
    ):
        mass[places] = refusal.refusal_mass(logits, openings).cpu()
    scored = [{**of, "mass": m} for of, m in zip(every, mass.tolist(), strict=True)]
    toxic, safe = (
        [of for of in scored if of["kind"] == kind.value]
        for kind in (Kind.toxic, Kind.seemingly_toxic)
    )

    def correlation(name: str) -> float | None:
        x, y = (np.array([of[key] for of in (*toxic, *safe)]) for key in ("mass", name))
        rank = statistics.weighted_spearman(x, y, np.ones((1, len(x))))
        return statistics.finite(float(rank[0]))

    def auroc(name: str) -> list[float]:
        sides = [of[name] for of in toxic], [of[name] for of in safe]
        return list(astuple(statistics.auroc_interval(*sides, seed=seed)))

    return {
        "n": len(toxic) + len(safe),
        "rank_correlation": {name: correlation(name) for name in ("plain", "prefix_free")},
        "auroc": {name: auroc(name) for name in SCORES} if toxic and safe else None,
        "mass": {of["id"]: of["mass"] for of in scored},
    }


def kernel(
    policy: Policy,
    chat: ChatFormat,
    rows: ByKind,
    settings: KernelConfig,
    seed: int,
    folder: Path,
    among: Among | None = None,
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
        share = None if among is None else functools.partial(among.each, _collected)
        measured = ntk.measure(policy.model, encoded, chosen, ids=ids, share=share)
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


def _collected(policy: Callable[[], Policy], *given: Any) -> Any:
    return ntk.collected(policy().model.float(), *given)


def _keep(measured: ntk.Kernel, file: Path) -> None:
    tensors = {"norms": measured.norms, "tokens": measured.tokens.to(torch.int64)}
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    storage.write_bytes(file, save(whole, {"ids": "\n".join(measured.ids)}))


def _finite(cell: object) -> list[float | None]:
    """A mean with its interval as JSON holds them."""
    return [value if math.isfinite(value) else None for value in vars(cell).values()]


# --- task by task ---------------------------------------------------------------------------------


Numbered = tuple[int, str]  # a prompt and its place
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
    among: Among | None = None  # the processes that prompts are shared among

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

    def probabilities(self, prompts: list[str]) -> list[Probability]:
        """Refusal probabilities, read here or by the processes."""
        if self.among is None:
            phrases = self.settings.refusal_prob.phrases
            return probabilities(self.policy(), self.chat(), phrases, prompts)
        cut, read = (functools.partial(function, self.settings) for function in (_cut, _read))
        found = dict(itertools.chain(*self.among.shared(cut, read, list(enumerate(prompts)))))
        return [found[place] for place in range(len(prompts))]

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
    block = refusal_probability(work.probabilities, rows, alone, options.phrases, seed)
    flat = [row for part in rows.values() for row in part]
    beside = first_token(work.policy(), work.chat(), flat, block["values"], seed)
    log.info("refusals' first tokens: %s", {k: v for k, v in beside.items() if k != "mass"})
    return block | {"first_token": beside, "trained_on": work.trained_on(rows)}


def _cut(
    settings: EvalConfig, policy: Callable[[], Policy], numbered: list[Numbered], _processes: int
) -> list[list[Numbered]]:
    chat, phrases = chat_format(policy().tokenizer, settings.model), settings.refusal_prob.phrases
    encoded = [chat.prompt_ids(prompt) for _, prompt in numbered]
    chosen = probability.PHRASES[phrases.value]
    batches = probability.probability_batches(policy().model, chat.tokenizer, encoded, chosen)
    return [[numbered[place] for place in places] for places in batches]


def _read(
    settings: EvalConfig, policy: Callable[[], Policy], numbered: list[Numbered]
) -> list[tuple[int, Probability]]:
    chat, phrases = chat_format(policy().tokenizer, settings.model), settings.refusal_prob.phrases
    values = probabilities(policy(), chat, phrases, [prompt for _, prompt in numbered])
    return [(place, value) for (place, _), value in zip(numbered, values, strict=True)]


def _kernel(work: Work) -> dict[str, Any]:
    options, policy = work.settings.entk, work.widened()
    rows = work.drawn(options.prompts)
    seed = work.settings.seed
    block = kernel(policy, work.chat(), rows, options, seed, work.folder, work.among)
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
        top_k=work.settings.entk.top_k,
        params=tuple(f"trunk:{layer}" if p == TRUNK else p for p in options.params),
        drop=options.drop,
        budget_gib=work.settings.entk.budget_gib,
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
