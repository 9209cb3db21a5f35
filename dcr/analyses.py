"""The paper's measurements on one model: refusal probability, empirical NTK, separability.

Each takes prompts by kind and gives a block of `metrics.json`; evaluation calls them on a finished
model, `tracking` the first two while one trains.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from dcr import ntk, refusal, separability, sources
from dcr.config import (
    ConfigError,
    DataConfig,
    KernelConfig,
    Kind,
    RefusalProbabilityConfig,
    SeparabilityConfig,
)
from dcr.models import Policy
from dcr.prompts import ChatFormat
from dcr.sources import Example
from dcr.text import normalise

Prompts = Mapping[Kind, Sequence[Example]]
# The prompts that Figures 1(b) and 9 of the paper follow stand in XSTest and Alpaca, whose rows are
# not ours to print: hashes of the normalised prompts find them there.
FOLLOWED = {
    Kind.normal: "18ab3ef4c3463f67",
    Kind.seemingly_toxic: "0be02537e93cc530",
    Kind.toxic: "760a3721eb1a485b",
}
RESAMPLES = 2000


def every(data: DataConfig) -> dict[Kind, list[Example]]:
    """All rows of each kind of `data.analysis`, each prompt once.

    Raises ConfigError where a kind has no source.
    """
    found = {}
    for kind in (Kind.seemingly_toxic, Kind.toxic, Kind.normal):
        names = getattr(data.analysis, kind.value)
        if not names:
            raise ConfigError(
                f"data.analysis.{kind.value}=[]: name a source to measure on, or choose a data "
                "file that does, such as data=demo"
            )
        rows = [row for n in names for row in sources.read(n, root=data.root, kind=kind)]
        found[kind], _ = sources.drop_duplicates(rows)
    return found


def drawn(rows: Prompts, count: int | None, seed: int) -> dict[Kind, list[Example]]:
    """Up to `count` of each kind, drawn by seed; None: all."""
    return {
        kind: list(of) if count is None else sources.draw(of, min(count, len(of)), seed)
        for kind, of in rows.items()
    }


def followed(rows: Prompts) -> dict[Kind, Example]:
    """One prompt of each kind to follow alone: the paper's, or the first where it is not there."""
    found = {}
    for kind, of in rows.items():
        same = (row for row in of if _hash(row.prompt) == FOLLOWED[kind])
        found[kind] = next(same, of[0])
    return found


def refused_pairs(data: DataConfig, seed: int, refuses: Callable[[str], bool]) -> list[Example]:
    """Every pair of `data.safety` whose response refuses, in an order drawn by seed.

    Raises ConfigError where there is none.
    """
    rows = [
        row
        for name in data.safety.source
        for row in sources.read(name, root=data.root, kind=Kind.toxic, pairs=True)
    ]
    rows, _ = sources.drop_duplicates(rows)
    found = [row for row in rows if row.response and refuses(row.response)]
    if not found:
        raise ConfigError(
            f"data.safety.source={data.safety.source}: no pair whose response refuses; name "
            "another source"
        )
    return sources.draw(found, len(found), seed)


def apart(pairs: Sequence[Example], observers: Prompts) -> list[Example]:
    """The pairs whose prompts are no observer's."""
    seen = {normalise(row.prompt) for part in observers.values() for row in part}
    return [pair for pair in pairs if normalise(pair.prompt) not in seen]


def _hash(prompt: str) -> str:
    return hashlib.sha256(normalise(prompt).encode()).hexdigest()[:16]


def refusal_probability(
    policy: Policy,
    chat: ChatFormat,
    rows: Prompts,
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
        name: found.tolist() for name, found in zip(("plain", "prefix_free"), both, strict=True)
    }
    kinds: dict[str, Any] = {}
    for kind in rows:
        places = [i for i, (of, _, _) in enumerate(flat) if of is kind]
        kinds[kind.value] = {"n": len(places)} | {
            name: _mean([found[i] for i in places], seed) for name, found in values.items()
        }
    return {
        "phrases": settings.phrases.value,
        "kinds": kinds,
        "followed": {
            kind.value: {"id": row.id, **{n: found[len(flat) + i] for n, found in values.items()}}
            for i, (kind, row) in enumerate(alone.items())
        },
        "values": [
            {"id": identity, "kind": kind.value, **{n: found[i] for n, found in values.items()}}
            for i, (kind, identity, _) in enumerate(flat)
        ],
    }


def _mean(values: Sequence[float], seed: int) -> list[float]:
    """Mean with its percentile bootstrap interval over prompts."""
    found = np.asarray(values)
    drawn = np.random.default_rng(seed).choice(found, (RESAMPLES, len(found))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return [float(found.mean()), float(low), float(high)]


def kernel(
    policy: Policy,
    chat: ChatFormat,
    rows: Prompts,
    settings: KernelConfig,
    seed: int,
    folder: Path | None = None,
) -> dict[str, Any]:
    """A.6 for every choice of parameters: 3×3 means by kind, `[observer][trained]`.

    Needs weights in fp32 or wider. The whole matrices, with the ids of their prompts, go to
    `folder`/kernel/<params>.safetensors.
    """
    flat = [(kind, row) for kind, part in rows.items() for row in part]
    encoded = [chat.prompt_ids(row.prompt) for _, row in flat]
    kinds, ids = [kind.value for kind, _ in flat], [row.id for _, row in flat]
    blocks = {}
    for params in settings.params:
        chosen = kernel_settings(settings, params)
        found = ntk.measure(policy.model, encoded, chosen, ids=ids)
        if folder is not None:
            _keep(folder / "kernel" / f"{_file_name(params, settings.head)}.safetensors", found)
        blocks[_file_name(params, settings.head)] = by_kind(found.norms, kinds, settings, seed)
    return {
        "top_k": settings.top_k,
        "method": settings.method.value,
        "normalise": settings.normalise.value,
        "kinds": [kind.value for kind in rows],
        "ids": ids,
        "of": kinds,
        "params": blocks,
    }


def kernel_settings(settings: KernelConfig, params: str) -> ntk.Settings:
    return ntk.Settings(
        top_k=settings.top_k,
        params=params,
        head=settings.head,
        method=settings.method.value,
        budget_gib=settings.budget_gib,
    )


def by_kind(norms: Tensor, kinds: Sequence[str], settings: KernelConfig, seed: int) -> Any:
    """Mean normalised norms, `[observer kind][trained kind] = [mean, low, high]`."""
    matrix = ntk.normalised(norms, settings.normalise.value)
    means = ntk.mean_by_kind(matrix, kinds, settings.self_pairs, seed=seed)
    return {
        observer: {
            trained: [value if math.isfinite(value) else None for value in vars(cell).values()]
            for trained, cell in row.items()
        }
        for observer, row in means.items()
    }


def _file_name(params: str, head: bool) -> str:
    return params.replace(":", "-") + ("" if head else "-headless")


def _keep(path: Path, found: ntk.Kernel) -> None:
    """Every N×N norm and each prompt's tokens; the ids stand in the file's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    tensors = {"norms": found.norms, "tokens": found.tokens.to(torch.int64)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, part, {"ids": "\n".join(found.ids)})
    part.replace(path)


def separate(
    policy: Policy, chat: ChatFormat, rows: Prompts, settings: SeparabilityConfig, seed: int
) -> dict[str, Any]:
    """A.9: how well seemingly toxic and toxic prompts come apart after every block."""
    return separability.analyse(
        policy,
        chat,
        rows[Kind.seemingly_toxic],
        rows[Kind.toxic],
        seed,
        pooling=settings.pooling,
        standardise=settings.standardise,
    )
