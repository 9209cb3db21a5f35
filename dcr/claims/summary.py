"""What is read off the arrays: correlations of kernels with changes and with states."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dcr.claims import bootstrap
from dcr.claims.pairs import Subjects
from dcr.claims.stepping import Before, Steps


@dataclass(frozen=True)
class Found:
    """All that the statistics are of; prompts stand as in Subjects, kernels by their label."""

    before: Before
    steps: Steps
    norms: Mapping[str, Float[Tensor, "prompts prompts"]]
    predicted: Mapping[str, Float[Tensor, "prompts rank trained"]]
    dots: Float[Tensor, "prompts prompts"]
    cosines: Float[Tensor, "prompts prompts"]


def summary(chosen: Subjects, found: Found, seed: int) -> dict[str, Any]:
    """The numbers that `measure` documents."""
    n, others = chosen.observers, chosen.others()
    generator = np.random.default_rng(seed)
    # one draw for all numbers: two kernels are compared over the same prompts
    observers = bootstrap.drawn(chosen.of, generator)
    trained = bootstrap.drawn(["trained"] * len(chosen.trained), generator)
    actual, plain = _by_pair(found.steps.changes[:n]), _by_pair(found.steps.plain[:n])
    off = np.linalg.norm((plain - actual)[others])
    params = {}
    for label, norms in found.norms.items():
        predicted = _by_pair(found.predicted[label][:n])
        params[label] = agreement(
            norms[:n, n:].numpy(), predicted, actual, others, observers, trained
        ) | {"states": _proposition(norms[:n, :n].numpy(), chosen, found, observers)}
    return {
        "rates": found.steps.rates.tolist(),
        "falls": _taught(chosen, found)[n:].diagonal().tolist(),
        "nonlinearity": _finite(float(off / (np.linalg.norm(actual[others]) or math.nan))),
        "covered": float(found.before.log_probabilities[:n].exp().sum(1).mean()),
        "change": _change(chosen, found, observers, trained),
        "params": params,
    }


def agreement(
    norms: Float[np.ndarray, "observers trained"],
    predicted: Float[np.ndarray, "observers trained rank"],
    actual: Float[np.ndarray, "observers trained rank"],
    others: Bool[np.ndarray, "observers trained"],
    observers: Int[np.ndarray, "draws observers"],
    trained: Int[np.ndarray, "draws trained"],
) -> dict[str, dict[str, list[float | None]]]:
    """How far a kernel tells the changes, over the pairs in `others`; draws as bootstrap gives."""
    size = np.linalg.norm(actual, axis=2)
    over = partial(bootstrap.over_pairs, left=observers, right=trained, allowed=others)
    given, got = predicted[others], actual[others]
    return {
        "norm": {
            "within": _told(_within(norms, size, others, observers, trained)),
            "pooled": _told(over(partial(bootstrap.spearman, norms[others], size[others]))),
        },
        "prediction": {
            "pearson": _told(over(partial(bootstrap.pearson, given, got))),
            "slope": _told(over(partial(bootstrap.slope, given, got))),
        },
    }


def _within(
    norms: Float[np.ndarray, "observers trained"],
    size: Float[np.ndarray, "observers trained"],
    others: Bool[np.ndarray, "observers trained"],
    observers: Int[np.ndarray, "draws observers"],
    trained: Int[np.ndarray, "draws trained"],
) -> Float[np.ndarray, "draws"]:
    """The rank correlation over the observers of each trained prompt, then the mean of those."""
    own = []
    for place, kept in enumerate(others.T):
        statistic = partial(bootstrap.spearman, norms[kept, place], size[kept, place])
        once = np.ones((len(observers), 1), dtype=np.int64)
        own.append(bootstrap.over_pairs(statistic, observers, once, kept[:, None]))
    every = np.stack(own, 1)
    weights = trained * np.isfinite(every)
    total = weights.sum(1)
    sums = (weights * np.nan_to_num(every)).sum(1)
    return np.divide(sums, total, out=np.full(len(total), math.nan), where=total > 0)


def _proposition(
    norms: Float[np.ndarray, "observers observers"],
    chosen: Subjects,
    found: Found,
    observers: Int[np.ndarray, "draws observers"],
) -> dict[str, list[float | None]]:
    n, couples = chosen.observers, chosen.couples()
    over = partial(bootstrap.over_pairs, left=observers, right=observers, allowed=couples)
    return {
        name: _told(over(partial(bootstrap.spearman, norms[couples], of[:n, :n].numpy()[couples])))
        for name, of in (("dot", found.dots), ("cosine", found.cosines))
    }


def _change(
    chosen: Subjects,
    found: Found,
    observers: Int[np.ndarray, "draws observers"],
    trained: Int[np.ndarray, "draws trained"],
) -> dict[str, list[float | None]]:
    taught, others = _taught(chosen, found)[: chosen.observers], chosen.others()
    told = {}
    for kind in dict.fromkeys(chosen.of):
        allowed = others & np.array([[of == kind] for of in chosen.of])
        mean = partial(bootstrap.mean, taught[allowed])
        told[kind] = _told(bootstrap.over_pairs(mean, observers, trained, allowed))
    return told


def _taught(chosen: Subjects, found: Found) -> Float[np.ndarray, "prompts trained"]:
    """Changes of log p(target), which is one of the tokens of every prompt."""
    aimed = (found.before.tokens == chosen.target).double()
    return torch.einsum("prt,pr->pt", found.steps.changes, aimed).numpy()


def _by_pair(
    values: Float[Tensor, "prompts rank trained"],
) -> Float[np.ndarray, "prompts trained rank"]:
    return values.permute(0, 2, 1).numpy()


def _told(values: Float[np.ndarray, "draws"]) -> list[float | None]:
    return [_finite(value) for value in vars(bootstrap.interval(values)).values()]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
