"""The tasks that measure the paper's analyses on the weights themselves.

Refusal probability, empirical NTK, separability and claims take prompts by kind and give a block of
`metrics.json`. Evaluation measures a finished model; `tracking` measures the first two during
training.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from dcr import contamination, inference, workers
from dcr.analyses import (
    ClaimsConfig,
    KernelConfig,
    Phrases,
    RefusalProbabilityConfig,
    SeparabilityConfig,
    check_parameters,
    claims,
    kinds,
    ntk,
    probability,
    separability,
)
from dcr.core import models, sources, statistics, storage
from dcr.core.config import ConfigError, DataConfig, Kind
from dcr.core.config import training as config
from dcr.core.config.evaluation import EvalConfig
from dcr.core.config.training import ContrastiveConfig
from dcr.core.evaluation import PromptSet
from dcr.core.evaluation.protocols import Task, Work
from dcr.core.evaluation.subjects import Local
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
from dcr.core.refusal import opening as refusal
from dcr.core.runs import Run
from dcr.core.sources import Example
from dcr.core.text import normalise
from dcr.workers import Workers

log = logging.getLogger(__name__)

SCORES = ("mass", "plain", "prefix_free")  # the mass of first tokens, and both sums over phrases
Probability = dict[str, float]  # one prompt's `plain` and `prefix_free`


def probabilities(
    policy: Policy, chat: ChatFormat, phrases: Phrases, prompts: Sequence[str]
) -> list[Probability]:
    """The plain sum and the prefix-free probability (A.5) of every prompt."""
    encoded = [chat.prompt_ids(prompt) for prompt in prompts]
    chosen = probability.PHRASES[phrases.value]
    both = probability.probabilities(policy.model, chat.tokenizer, encoded, chosen)
    pairs = zip(*(each.tolist() for each in both), strict=True)
    return [{"plain": plain, "prefix_free": prefix_free} for plain, prefix_free in pairs]


def refusal_probability(
    read: Callable[[list[str]], list[Probability]],
    rows: kinds.ByKind,
    alone: Mapping[Kind, Example],
    phrases: Phrases,
    seed: int,
) -> dict[str, Any]:
    """The probabilities that `read` gives for every prompt, as `probabilities` does.

    `kinds` has means with 95% bootstrap intervals over prompts, `followed` the prompts `alone`,
    `values` every prompt by id.
    """
    flat = [(kind.value, row) for kind, part in rows.items() for row in part]
    values = read([row.prompt for row in (*(row for _, row in flat), *alone.values())])
    every = [
        {"id": row.id, "kind": kind} | own
        for (kind, row), own in zip(flat, values[: len(flat)], strict=True)
    ]
    return {
        "phrases": phrases.value,
        "kinds": {kind.value: _means(every, kind.value, seed) for kind in rows},
        "followed": {
            kind.value: {"id": row.id} | own
            for (kind, row), own in zip(alone.items(), values[len(flat) :], strict=True)
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
    """Compares the mass of refusals' first tokens with the probabilities of whole phrases.

    `every` has these probabilities. Over toxic and seemingly toxic prompts the result has
    Spearman's rank correlation of the mass with either sum, and the AUROC of toxic prompts by each
    of the three with its 95% bootstrap interval, or None if a kind is absent. If phrases rank the
    prompts better than first tokens do, first tokens hide what the model would answer.
    """
    openings, mass = refusal.refusal_openings(chat), torch.zeros(len(rows))
    for places, logits in refusal.first_logits(
        policy.model, [chat.prompt_ids(row.prompt) for row in rows]
    ):
        mass[places] = refusal.refusal_mass(logits, openings).cpu()
    scored = [{**row, "mass": m} for row, m in zip(every, mass.tolist(), strict=True)]
    toxic, safe = (
        [row for row in scored if row["kind"] == kind.value]
        for kind in (Kind.toxic, Kind.seemingly_toxic)
    )

    def correlation(name: str) -> float | None:
        x, y = (np.array([row[key] for row in (*toxic, *safe)]) for key in ("mass", name))
        rank = inference.weighted_spearman(x, y, np.ones((1, len(x))))
        return inference.finite(float(rank[0]))

    def auroc(name: str) -> list[float]:
        sides = [row[name] for row in toxic], [row[name] for row in safe]
        return list(astuple(statistics.auroc_interval(*sides, seed=seed)))

    return {
        "n": len(toxic) + len(safe),
        "rank_correlation": {name: correlation(name) for name in ("plain", "prefix_free")},
        "auroc": {name: auroc(name) for name in SCORES} if toxic and safe else None,
        "mass": {row["id"]: row["mass"] for row in scored},
    }


def kernel(
    policy: Policy,
    chat: ChatFormat,
    rows: kinds.ByKind,
    settings: KernelConfig,
    seed: int,
    folder: Path,
    helpers: Workers | None = None,
) -> dict[str, Any]:
    """The kernel (A.6) of every choice of parameters: 3×3 means `[observer][trained]` by kind.

    It needs weights in fp32 or wider. The whole matrices, with the tokens and ids of their prompts,
    go to `folder`/kernel/<params>.safetensors.
    """
    flat = [(kind.value, row) for kind, part in rows.items() for row in part]
    encoded = [chat.prompt_ids(row.prompt) for _, row in flat]
    kinds, ids = [kind for kind, _ in flat], [row.id for _, row in flat]
    top_k, head, budget = settings.top_k, settings.head, settings.budget_gib
    method, normalise = settings.method.value, settings.normalise.value
    share = None if helpers is None else functools.partial(helpers.each, _collected)
    means = {}
    for params in settings.params:
        chosen = ntk.Settings(top_k, params, head, method=method, budget_gib=budget)
        measured = ntk.measure(policy.model, encoded, chosen, ids=ids, share=share)
        name = ntk.label(params, head)
        tokens = measured.tokens.to(torch.int64)
        whole = {"norms": measured.norms.contiguous(), "tokens": tokens.contiguous()}
        file = folder / "kernel" / f"{name}.safetensors"
        storage.write_bytes(file, save(whole, {"ids": "\n".join(measured.ids)}))
        matrix = ntk.normalised(measured.norms, normalise)
        by_kind = ntk.mean_by_kind(matrix, kinds, settings.self_pairs, seed=seed)
        means[name] = {
            observer: {
                trained: [inference.finite(value) for value in vars(cell).values()]
                for trained, cell in row.items()
            }
            for observer, row in by_kind.items()
        }
    return {
        **{"top_k": top_k, "method": method, "normalise": normalise},
        "kinds": [kind.value for kind in rows],
        "ids": ids,
        "of": kinds,
        "params": means,
    }


def _collected(subject: Local, *job: Any) -> Any:
    return ntk.collected(subject.policy().model.float(), *job)


# --- task by task ---------------------------------------------------------------------------------


Numbered = tuple[int, str]  # a prompt and its place
TRUNK = "trunk"  # among claims.params: the blocks up to the layer whose states are read


def _trained_on(run: Run, rows: Mapping[Kind, list[Example]]) -> dict[str, int]:
    """Counts the prompts of each kind that any stage of the run was trained on."""
    learnt = {
        normalise(text) for part in contamination.trained_texts(run).values() for text in part
    }
    return {
        kind.value: sum(normalise(row.prompt) in learnt for row in part)
        for kind, part in rows.items()
    }


def _widened(work: Work) -> Policy:
    """The policy with its weights in fp32, which products of gradients need."""
    work.policy().model.float()
    return work.policy()


class OfKinds(Task):
    """An analysis of prompts of each kind, which are read before weights open."""

    rows: kinds.ByKind = MappingProxyType({})

    def prompts(self, settings: EvalConfig) -> list[PromptSet]:
        """Reads the rows of `data.analysis`; no prompt of them is answered."""
        self.rows = kinds.every(settings.data)
        return []

    def drawn(self, work: Work, count: int | None) -> dict[Kind, list[Example]]:
        """Draws `count` prompts of each kind; None takes all."""
        return kinds.drawn(self.rows, count, work.settings.seed)


class RefusalProbability(OfKinds):
    """Refusal probability (A.5) by kind of prompt, and the mass of refusals' first tokens."""

    def measure(self, work: Work) -> dict[str, Any]:
        options, seed = work.settings.node(RefusalProbabilityConfig), work.settings.seed
        alone, rows = kinds.followed(self.rows), self.drawn(work, options.prompts)
        read = functools.partial(_shared, work.subject)
        block = refusal_probability(read, rows, alone, options.phrases, seed)
        flat = [row for part in rows.values() for row in part]
        beside = first_token(work.policy(), work.chat(), flat, block["values"], seed)
        log.info("refusals' first tokens: %s", {k: v for k, v in beside.items() if k != "mass"})
        return block | {"first_token": beside, "trained_on": _trained_on(work.run, rows)}


def _shared(subject: Local, prompts: list[str]) -> list[Probability]:
    """The refusal probabilities, computed in this process or in the worker processes."""
    numbered = list(enumerate(prompts))
    parts = workers.shared(subject, _numbered_batches, _numbered_values, numbered)
    by_place = dict(chain.from_iterable(parts))
    return [by_place[place] for place in range(len(prompts))]


def _numbered_batches(
    subject: Local, numbered: list[Numbered], _processes: int
) -> list[list[Numbered]]:
    chat, policy = subject.plain_chat(), subject.policy()
    chosen = probability.PHRASES[subject.settings.node(RefusalProbabilityConfig).phrases.value]
    encoded = [chat.prompt_ids(prompt) for _, prompt in numbered]
    batches = probability.probability_batches(policy.model, chat.tokenizer, encoded, chosen)
    return [[numbered[place] for place in places] for places in batches]


def _numbered_values(
    subject: Local, numbered: list[Numbered]
) -> Iterator[list[tuple[int, Probability]]]:
    phrases = subject.settings.node(RefusalProbabilityConfig).phrases
    prompts = [prompt for _, prompt in numbered]
    values = probabilities(subject.policy(), subject.plain_chat(), phrases, prompts)
    yield [(place, value) for (place, _), value in zip(numbered, values, strict=True)]


class Separability(OfKinds):
    """The separability (A.9) of toxic and seemingly toxic prompts, block by block."""

    def measure(self, work: Work) -> dict[str, Any]:
        options = work.settings.node(SeparabilityConfig)
        rows = self.drawn(work, options.prompts)
        sides, seed = (rows[Kind.seemingly_toxic], rows[Kind.toxic]), work.settings.seed
        measured = separability.analyse(
            work.policy(), work.chat(), *sides, seed, pooling=options.pooling
        )
        return measured | {"trained_on": _trained_on(work.run, rows)}


class Kernel(OfKinds):
    """The empirical NTK (A.6): its norms between prompts of each kind."""

    widens = True

    def check(self, settings: EvalConfig, run: Run) -> None:
        params = settings.node(KernelConfig).params
        check_parameters("entk.params", params, models.facts(settings.model).depth)

    def measure(self, work: Work) -> dict[str, Any]:
        options, policy, seed = work.settings.node(KernelConfig), _widened(work), work.settings.seed
        rows, helpers = self.drawn(work, options.prompts), getattr(work.subject, "workers", None)
        block = kernel(policy, work.chat(), rows, options, seed, work.folder, helpers)
        before = work.before.get("kernel", {})
        alike = all(before.get(key) == value for key, value in block.items() if key != "params")
        params = before["params"] | block["params"] if alike else block["params"]
        return block | {"params": params, "trained_on": _trained_on(work.run, rows)}


class Claims(OfKinds):
    """The paper's Eq. 2 and 3 and Proposition 1, by one step on each of a few toxic pairs."""

    widens = True
    refused: Sequence[Example] = ()

    def check(self, settings: EvalConfig, run: Run) -> None:
        options, depth = settings.node(ClaimsConfig), models.facts(settings.model).depth
        if (layer := options.layer) is not None and not 1 <= layer <= depth:
            raise ConfigError(f"claims.layer={layer}: the model has blocks 1 to {depth}")
        named = [f"trunk:{depth}" if p == TRUNK else p for p in options.params]
        check_parameters("claims.params", named, depth)

    def prompts(self, settings: EvalConfig) -> list[PromptSet]:
        """Reads the pairs as well."""
        self.refused = refused_pairs(settings.data, settings.seed)
        return super().prompts(settings)

    def measure(self, work: Work) -> dict[str, Any]:
        options, kernel = work.settings.node(ClaimsConfig), work.settings.node(KernelConfig)
        chat, layer = work.chat(), _layer(work.settings, work.run)
        rows = self.drawn(work, options.prompts)
        observed = {normalise(row.prompt) for part in rows.values() for row in part}
        others = [pair for pair in self.refused if normalise(pair.prompt) not in observed]
        pairs = claims.alike(chat, others)
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

    Raises ConfigError if there is none.
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
    """The block whose output the run's stage one trains, or would train."""
    if (named := settings.node(ClaimsConfig).layer) is not None:
        return named
    if (known := run.block()) is not None:
        return known
    trained = run.config().get("dcr", {"layer": settings.model.layer})
    given = {key: trained[key] for key in ("layer", "depth") if key in trained}
    depth = models.facts(settings.model).depth
    return config.block_of(ContrastiveConfig(**given), depth)
