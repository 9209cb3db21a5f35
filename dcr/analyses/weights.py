"""The paper's analyses, measured on the weights themselves.

Refusal probability, empirical NTK and separability take prompts by kind and give a block of
`metrics.json`; evaluation calls them on a finished model, `tracking` the first two while one
trains.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from dcr import inference
from dcr.analyses import ClaimsConfig, SeparabilityConfig, claims, ntk, probability, separability
from dcr.core import config, models, refusal, sources, statistics, storage
from dcr.core.config import (
    ConfigError,
    ContrastiveConfig,
    DataConfig,
    KernelConfig,
    Kind,
    Phrases,
    RefusalProbabilityConfig,
)
from dcr.core.config.evaluation import EvalConfig
from dcr.core.evaluation import sets
from dcr.core.evaluation.protocols import Task, Work
from dcr.core.evaluation.sets import ByKind, PromptSet
from dcr.core.evaluation.subjects import Among, Local, trained_texts
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
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
        name: list(astuple(inference.mean_interval([row[name] for row in of_kind], seed=seed)))
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
        rank = inference.weighted_spearman(x, y, np.ones((1, len(x))))
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


def _collected(subject: Local, *given: Any) -> Any:
    return ntk.collected(subject.policy().model.float(), *given)


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


def _drawn(work: Work, count: int | None) -> dict[Kind, list[Example]]:
    """So many prompts of each kind of `data.analysis`; None: all."""
    return sets.drawn(work.kinds, count, work.settings.seed)


def _trained_on(run: Run, rows: Mapping[Kind, list[Example]]) -> dict[str, int]:
    """How many of the prompts of each kind the run has learnt from, in whichever stage."""
    learnt = {normalise(text) for part in trained_texts(run).values() for text in part}
    return {
        kind.value: sum(normalise(row.prompt) in learnt for row in part)
        for kind, part in rows.items()
    }


def _widened(work: Work) -> Policy:
    """In fp32, which products of gradients need."""
    work.policy().model.float()
    return work.policy()


class RefusalProbability(Task):
    """A.5 of prompts of each kind, beside the mass of refusals' first tokens."""

    by_kind = True

    def measure(self, work: Work) -> dict[str, Any]:
        options, seed = work.settings.node(RefusalProbabilityConfig), work.settings.seed
        alone, rows = sets.followed(work.kinds), _drawn(work, options.prompts)
        read = functools.partial(_shared, work.subject)
        block = refusal_probability(read, rows, alone, options.phrases, seed)
        flat = [row for part in rows.values() for row in part]
        beside = first_token(work.policy(), work.chat(), flat, block["values"], seed)
        log.info("refusals' first tokens: %s", {k: v for k, v in beside.items() if k != "mass"})
        return block | {"first_token": beside, "trained_on": _trained_on(work.run, rows)}


def _shared(subject: Local, prompts: list[str]) -> list[Probability]:
    """Refusal probabilities, read here or by the processes."""
    found = dict(chain.from_iterable(subject.shared(_cut, _read, list(enumerate(prompts)))))
    return [found[place] for place in range(len(prompts))]


def _cut(subject: Local, numbered: list[Numbered], _processes: int) -> list[list[Numbered]]:
    chat, policy = subject.plain_chat(), subject.policy()
    chosen = probability.PHRASES[subject.settings.node(RefusalProbabilityConfig).phrases.value]
    encoded = [chat.prompt_ids(prompt) for _, prompt in numbered]
    batches = probability.probability_batches(policy.model, chat.tokenizer, encoded, chosen)
    return [[numbered[place] for place in places] for places in batches]


def _read(subject: Local, numbered: list[Numbered]) -> Iterator[list[tuple[int, Probability]]]:
    phrases = subject.settings.node(RefusalProbabilityConfig).phrases
    prompts = [prompt for _, prompt in numbered]
    values = probabilities(subject.policy(), subject.plain_chat(), phrases, prompts)
    yield [(place, value) for (place, _), value in zip(numbered, values, strict=True)]


class Separability(Task):
    """A.9: how well both kinds come apart, block by block."""

    by_kind = True

    def measure(self, work: Work) -> dict[str, Any]:
        options = work.settings.node(SeparabilityConfig)
        rows = _drawn(work, options.prompts)
        measured = separability.analyse(
            work.policy(),
            work.chat(),
            rows[Kind.seemingly_toxic],
            rows[Kind.toxic],
            work.settings.seed,
            pooling=options.pooling,
        )
        return measured | {"trained_on": _trained_on(work.run, rows)}


class Kernel(Task):
    """A.6: norms of the empirical NTK between prompts of each kind."""

    by_kind = widens = True

    def check(self, settings: EvalConfig, run: Run) -> None:
        params = settings.node(KernelConfig).params
        config.parameters("entk.params", params, models.facts(settings.model).depth)

    def measure(self, work: Work) -> dict[str, Any]:
        options, policy, seed = work.settings.node(KernelConfig), _widened(work), work.settings.seed
        rows, among = _drawn(work, options.prompts), work.subject.among
        block = kernel(policy, work.chat(), rows, options, seed, work.folder, among)
        before = work.before.get("kernel", {})
        alike = all(before.get(key) == value for key, value in block.items() if key != "params")
        params = before["params"] | block["params"] if alike else block["params"]
        return block | {"params": params, "trained_on": _trained_on(work.run, rows)}


class Claims(Task):
    """The paper's Eq. 2 and 3 and Proposition 1, by one step on each of a few toxic pairs."""

    by_kind = widens = True
    refused: Sequence[Example] = ()

    def check(self, settings: EvalConfig, run: Run) -> None:
        options, depth = settings.node(ClaimsConfig), models.facts(settings.model).depth
        if (layer := options.layer) is not None and not 1 <= layer <= depth:
            raise ConfigError(f"claims.layer={layer}: the model has blocks 1 to {depth}")
        named = [f"trunk:{depth}" if p == TRUNK else p for p in options.params]
        config.parameters("claims.params", named, depth)

    def prompts(self, settings: EvalConfig) -> list[PromptSet]:
        """None that are answered; the pairs are read here, before weights are opened."""
        self.refused = refused_pairs(settings.data, settings.seed)
        return []

    def measure(self, work: Work) -> dict[str, Any]:
        options, kernel, chat = (
            work.settings.node(ClaimsConfig),
            work.settings.node(KernelConfig),
            work.chat(),
        )
        layer = _layer(work.settings, work.run)
        rows = _drawn(work, options.prompts)
        seen = {normalise(row.prompt) for part in rows.values() for row in part}
        apart = [pair for pair in self.refused if normalise(pair.prompt) not in seen]
        pairs = claims.alike(chat, apart)
        chosen = claims.Settings(
            top_k=kernel.top_k,
            params=tuple(f"trunk:{layer}" if p == TRUNK else p for p in options.params),
            drop=options.drop,
            budget_gib=kernel.budget_gib,
            layer=layer,
        )
        trained, seed = pairs[: options.pairs], work.settings.seed
        measured = claims.measure(_widened(work), chat, rows, trained, chosen, seed, work.folder)
        return measured | {"trained_on": _trained_on(work.run, rows)}


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


def _layer(settings: EvalConfig, run: Run) -> int:
    """The block that the run's stage one reads, or would read."""
    if (named := settings.node(ClaimsConfig).layer) is not None:
        return named
    if (known := run.block()) is not None:
        return known
    made = run.config().get("dcr", {"layer": settings.model.layer})
    given = {key: made[key] for key in ("layer", "depth") if key in made}
    depth = models.facts(settings.model).depth
    return config.block_of(ContrastiveConfig(**given), depth)
