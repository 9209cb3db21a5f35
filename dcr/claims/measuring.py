"""Both claims on one model, as a block of `metrics.json`.

The prompts that observe and those that are stepped on, what is measured between them, and the
correlations of kernels with changes and with states that are read off.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save
from torch import Tensor

from dcr import models, ntk, statistics, storage
from dcr.claims import stepping
from dcr.claims.stepping import Before, Steps
from dcr.config import ConfigError, Kind
from dcr.models import Policy
from dcr.prompts import ChatFormat
from dcr.sources import Example


@dataclass(frozen=True)
class Subjects:
    """Observers first, by kind, then the trained prompts; `of` has the observers' kinds alone.

    `target` is the token that every trained prompt is answered with, `left_out` the ids of pairs
    that begin with another one.
    """

    sequences: tuple[tuple[int, ...], ...]
    ids: tuple[str, ...]
    of: tuple[str, ...]
    target: int
    left_out: tuple[str, ...]

    @property
    def observers(self) -> int:
        return len(self.of)

    @property
    def trained(self) -> range:
        """Where the trained prompts stand."""
        return range(self.observers, len(self.ids))

    def others(self) -> Bool[np.ndarray, "observers trained"]:
        """Whether the observer is another prompt than the trained one, whatever the two ids."""
        return self._differ()[: self.observers, self.observers :]

    def couples(self) -> Bool[np.ndarray, "observers observers"]:
        """Every pair of two different observers once."""
        return np.triu(self._differ()[: self.observers, : self.observers], k=1)

    def _differ(self) -> Bool[np.ndarray, "prompts prompts"]:
        number = {sequence: i for i, sequence in enumerate(self.sequences)}
        places = np.array([number[sequence] for sequence in self.sequences])
        return places[:, None] != places


def subjects(
    chat: ChatFormat, rows: Mapping[Kind, Sequence[Example]], trained: Sequence[Example]
) -> Subjects:
    """All prompts in the model's chat template.

    Steps are compared by what they do to the log-probability of one token, so of the pairs only
    those stay whose response begins with the token that most of them begin with (of equally many,
    the first). Raises ConfigError where there is no observer, no pair or no response.
    """
    flat = [(kind.value, row) for kind, part in rows.items() for row in part]
    if not flat or not trained:
        missing = "trained pair" if flat else "prompt to observe"
        raise ConfigError(f"claims: there is no {missing}; give at least one")
    begins, target = _begins(chat, trained)
    kept = [row for row, token in zip(trained, begins, strict=True) if token == target]
    every = [*(row for _, row in flat), *kept]
    return Subjects(
        sequences=tuple(tuple(chat.prompt_ids(row.prompt)) for row in every),
        ids=tuple(row.id for row in every),
        of=tuple(kind for kind, _ in flat),
        target=target,
        left_out=tuple(r.id for r, token in zip(trained, begins, strict=True) if token != target),
    )


def alike(chat: ChatFormat, pairs: Sequence[Example]) -> list[Example]:
    """The pairs, in their order, that `subjects` keeps. ConfigError as `first_token`."""
    if not pairs:
        return []
    begins, target = _begins(chat, pairs)
    return [row for row, token in zip(pairs, begins, strict=True) if token == target]


def _begins(chat: ChatFormat, pairs: Sequence[Example]) -> tuple[list[int], int]:
    """First tokens, and the most common of them (of equally many, the first)."""
    begins = [first_token(chat, row) for row in pairs]
    return begins, Counter(begins).most_common(1)[0][0]


def first_token(chat: ChatFormat, row: Example) -> int:
    """The token that the row's response begins with behind its prompt.

    Raises ConfigError where the row has no response.
    """
    if not (row.response or "").strip():
        raise ConfigError(
            f"claims: {row.source}: {row.id} has no response; give pairs of a prompt and a refusal"
        )
    room = len(chat.prompt_ids(row.prompt)) + 1
    ids, _ = chat.pair(row.prompt, row.response or "", room)
    return ids[-1]


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
    observers = statistics.redrawn(chosen.of, generator)
    trained = statistics.redrawn(["trained"] * len(chosen.trained), generator)
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
    """How far a kernel tells the changes over the pairs in `others`; `statistics.redrawn` draws."""
    size = np.linalg.norm(actual, axis=2)
    over = partial(statistics.over_pairs, left=observers, right=trained, allowed=others)
    given, got = predicted[others], actual[others]
    return {
        "norm": {
            "within": _told(_within(norms, size, others, observers, trained)),
            "pooled": _told(
                over(partial(statistics.weighted_spearman, norms[others], size[others]))
            ),
        },
        "prediction": {
            "pearson": _told(over(partial(statistics.weighted_pearson, given, got))),
            "slope": _told(over(partial(statistics.weighted_slope, given, got))),
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
        statistic = partial(statistics.weighted_spearman, norms[kept, place], size[kept, place])
        once = np.ones((len(observers), 1), dtype=np.int64)
        own.append(statistics.over_pairs(statistic, observers, once, kept[:, None]))
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
    over = partial(statistics.over_pairs, left=observers, right=observers, allowed=couples)
    return {
        name: _told(
            over(partial(statistics.weighted_spearman, norms[couples], of[:n, :n].numpy()[couples]))
        )
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
        mean = partial(statistics.weighted_mean, taught[allowed])
        told[kind] = _told(statistics.over_pairs(mean, observers, trained, allowed))
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
    return [_finite(value) for value in vars(statistics.of_draws(values)).values()]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Of each prompt the `top_k` most likely tokens count, and the one that refusals begin with;
    `params` are the kernels' parameters, `head=False` leaves the head's matrix out of them; `drop`
    is what one step takes off its pair's loss to first order, in nats, and of a loss below one nat
    the share of it; `layer` is the block whose output the states are, from 1.
    """

    top_k: int
    params: tuple[str, ...]
    drop: float
    budget_gib: float
    layer: int
    head: bool = True


def measure(
    policy: Policy,
    chat: ChatFormat,
    rows: Mapping[Kind, Sequence[Example]],
    trained: Sequence[Example],
    settings: Settings,
    seed: int,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Eq. 2 and 3 and Proposition 1 on one model; every number is [estimate, low, high].

    `rows` are the prompts that are observed, `trained` pairs of a toxic prompt and its refusal, of
    which only the response's first token is in the loss, since Eq. 2 is about one position; pairs
    that begin with another token than most are left out (`left_out`). What a step does is compared
    with the kernel at its own weights: to first order -ηAKG over all parameters is the change
    itself, up to the tokens that are left out, and over fewer parameters their share.

    `change` is the mean change of log p(the refusals' first token) by kind of observer, in nats,
    beside `falls`, that of the trained prompts themselves. `params` has for each choice: `norm`,
    the rank correlation of ‖K(x',x)‖_F with the size ‖Δ log p(x')‖ of the change, `within` each
    trained prompt and then averaged, so that a step's own scale makes none of it, and `pooled`;
    `prediction`, the correlation of the signed prediction with the change over all tokens, and the
    slope of the change on it through the origin (1 where it is exact); `states`, the rank
    correlation over pairs of observers of ‖K(x',x)‖_F with the inner product and with the cosine
    of their states. A prompt's pair with itself counts nowhere. The intervals are 95% percentile
    bootstraps over prompts: observers within their kind and trained prompts are drawn anew.
    `nonlinearity` is the relative difference of the plain steps to the symmetric ones measured,
    `covered` the observers' mean probability on the tokens that count. Undefined values are null.

    Whole arrays go to `folder`/claims.safetensors. Weights, modes and flags are left as they were.
    Raises ConfigError for a setting, a row or a model that cannot be.
    """
    _check(policy.model, settings)
    chosen = subjects(chat, rows, trained)
    found = _found(policy.model, chosen, settings)
    if folder is not None:
        _keep(folder / "claims.safetensors", chosen, found)
    return {
        "layer": settings.layer,
        "top_k": settings.top_k,
        "head": settings.head,
        "drop": settings.drop,
        "target": chosen.target,
        "ids": list(chosen.ids[: chosen.observers]),
        "of": list(chosen.of),
        "trained": [chosen.ids[place] for place in chosen.trained],
        "left_out": list(chosen.left_out),
        **summary(chosen, found, seed),
    }


def _found(model: Any, chosen: Subjects, settings: Settings) -> Found:
    start = stepping.before(model, chosen.sequences, chosen.target, settings.top_k, settings.layer)
    taken = stepping.steps(
        model, chosen.sequences, chosen.trained, start, chosen.target, settings.drop
    )
    norms, predicted = {}, {}
    for params in settings.params:
        kernel_settings = ntk.Settings(
            top_k=settings.top_k + 1,
            params=params,
            head=settings.head,
            budget_gib=settings.budget_gib,
        )
        kernel = ntk.measure(
            model, chosen.sequences, kernel_settings, ids=chosen.ids, tokens=start.tokens
        )
        label = params.replace(":", "-") + ("" if settings.head else "-headless")
        norms[label] = kernel.norms.double()
        predicted[label] = predictions(kernel.blocks.double(), start, taken, chosen)
    unit = torch.nn.functional.normalize(start.states, dim=1)
    dots, cosines = start.states @ start.states.T, unit @ unit.T
    return Found(start, taken, norms, predicted, dots, cosines)


def predictions(
    blocks: Float[Tensor, "prompts rank prompts rank"],
    start: Before,
    taken: Steps,
    chosen: Subjects,
) -> Float[Tensor, "prompts rank trained"]:
    """-ηAKG for every trained prompt; G is the probability less one for the target."""
    log_p, tokens = start.log_probabilities, start.tokens
    residuals = log_p.exp() - (tokens == chosen.target).double()
    return torch.stack(
        [
            ntk.log_probability_change(blocks[:, :, place], log_p, residuals[place], float(rate))
            for place, rate in zip(chosen.trained, taken.rates, strict=True)
        ],
        2,
    )


def _keep(path: Path, chosen: Subjects, found: Found) -> None:
    """Every array, prompts in the order of the `ids` in the file's metadata, and those trained."""
    tensors = {
        "tokens": found.before.tokens,
        "log_probabilities": found.before.log_probabilities,
        "rates": found.steps.rates,
        "changes": found.steps.changes,
        "dots": found.dots,
        "cosines": found.cosines,
        **{f"norms.{label}": norms for label, norms in found.norms.items()},
        **{f"predicted.{label}": values for label, values in found.predicted.items()},
    }
    told = {
        "ids": "\n".join(chosen.ids),
        "trained": "\n".join(chosen.ids[place] for place in chosen.trained),
    }
    plain = {key: value.contiguous() for key, value in tensors.items()}
    storage.write_bytes(path, save(plain, told))


def _check(model: Any, settings: Settings) -> None:
    """What no other module would refuse by name."""
    depth = len(models.decoder_blocks(model))
    vocabulary = models.unwrapped(model).config.get_text_config().vocab_size
    if not 1 <= settings.layer <= depth:
        raise ConfigError(f"claims.layer={settings.layer}: the model has blocks 1 to {depth}")
    if not 1 <= settings.top_k < vocabulary:
        raise ConfigError(
            f"claims.top_k={settings.top_k}: choose 1 to {vocabulary - 1}, one less than the "
            "vocabulary"
        )
    if not settings.drop > 0:
        raise ConfigError(f"claims.drop={settings.drop}: give a positive number of nats")
