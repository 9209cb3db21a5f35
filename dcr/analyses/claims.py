"""The paper's claims on small steps and on states, measured on one model.

Eq. 2 and 3 predict from the kernel what one SGD step on one (toxic prompt, refusal) pair does to
every other prompt; Proposition 1 relates the inner product of two prompts' states to the trunk's
kernel. Neither claim is taken as proven: the bound in A.7 does not follow from its steps, and only
the kernel over all parameters is that of the step. Log-probabilities are computed in float64 on
the CPU, because fp32 rounds the rest of the probability away when a model refuses almost surely.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save
from torch import Tensor, nn

from dcr import inference
from dcr.analyses import ntk
from dcr.analyses.ntk import Batch, batches, last_logits, still
from dcr.core import learning as passes
from dcr.core import machine, statistics, storage
from dcr.core.config import ConfigError, Kind
from dcr.core.models import Policy, structure
from dcr.core.prompts import ChatFormat
from dcr.core.sources import Example

BATCH_SIZE = 8


@dataclass(frozen=True)
class Settings:
    """The settings of a measurement.

    Each prompt's `top_k` most likely tokens count, and the token that refusals begin with.
    `params` are the kernels' parameters; `head=False` leaves the head's matrix out of them. One
    step lowers its pair's loss by `drop` nats to first order, or by the share `drop` of a loss
    below one nat. The states are the output of block `layer`, counted from 1.
    """

    top_k: int
    params: tuple[str, ...]
    drop: float
    budget_gib: float
    layer: int
    head: bool = True


@dataclass(frozen=True)
class Prompts:
    """The observers by kind, then the trained prompts; `kinds` are those of the observers alone.

    Every trained prompt is answered with the token `target`; `left_out` has the ids of the pairs
    whose response begins with another token.
    """

    sequences: tuple[tuple[int, ...], ...]
    ids: tuple[str, ...]
    kinds: tuple[str, ...]
    target: int
    left_out: tuple[str, ...]

    @property
    def observers(self) -> int:
        return len(self.kinds)

    @property
    def trained(self) -> range:
        """The places of the trained prompts."""
        return range(self.observers, len(self.ids))

    def others(self) -> Bool[np.ndarray, "observers trained"]:
        """Whether the observer's tokens differ from the trained prompt's, whatever the two ids."""
        return self._differ()[: self.observers, self.observers :]

    def couples(self) -> Bool[np.ndarray, "observers observers"]:
        """Every pair of two different observers once."""
        return np.triu(self._differ()[: self.observers, : self.observers], k=1)

    def _differ(self) -> Bool[np.ndarray, "prompts prompts"]:
        number = {sequence: i for i, sequence in enumerate(self.sequences)}
        places = np.array([number[sequence] for sequence in self.sequences])
        return places[:, None] != places


@dataclass(frozen=True)
class Baseline:
    """The tokens of every prompt before any step, their log-probabilities, and its state.

    The tokens are the most likely ones, most likely first, with the target among them; the state
    is the output of one block at the prompt's last token.
    """

    tokens: Int[Tensor, "prompts rank"]
    log_probabilities: Float[Tensor, "prompts rank"]
    states: Float[Tensor, "prompts width"]


@dataclass(frozen=True)
class StepChanges:
    """Changes of log-probabilities by one step on each trained prompt alone, from the same weights.

    `changes` are log p at θ - (η/2)∇L less log p at θ + (η/2)∇L, in which the second order cancels;
    `plain` are those of the step itself, log p at θ - η∇L less log p at θ.
    """

    changes: Float[Tensor, "prompts rank trained"]
    plain: Float[Tensor, "prompts rank trained"]
    rates: Float[Tensor, "trained"]  # η


@dataclass(frozen=True)
class Measurements:
    """Everything that `summary` reads; prompts stand as in Prompts, kernels by their label."""

    start: Baseline
    steps: StepChanges
    norms: Mapping[str, Float[Tensor, "prompts prompts"]]
    predicted: Mapping[str, Float[Tensor, "prompts rank trained"]]
    dots: Float[Tensor, "prompts prompts"]
    cosines: Float[Tensor, "prompts prompts"]


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
    which those count that begin with the commonest token (the others are `left_out`): only the
    response's first token is in the loss, since Eq. 2 is about one position. A step's change is
    compared with the kernel at its own weights: to first order -ηAKG over all parameters is the
    change itself, up to the tokens that are left out, and over fewer parameters their share.

    `change` is the mean change of log p(that token) by kind of observer, in nats, beside `falls`,
    that of the trained prompts themselves. `params` has for each choice `norm`, the rank
    correlation of ‖K(x',x)‖_F with the size ‖Δ log p(x')‖ of the change, `within` each trained
    prompt and then averaged, and `pooled`; `prediction`, the correlation of the signed prediction
    with the change, and the slope of the change on it (1 where it is exact); `states`, the rank
    correlation over pairs of observers of ‖K(x',x)‖_F with the inner product and the cosine of
    their states. A prompt's pair with itself counts nowhere. The intervals are 95% percentile
    bootstraps over prompts. `nonlinearity` is the relative difference of the plain steps to the
    symmetric ones measured, `covered` the observers' mean probability on the tokens that count.
    Undefined values are null.

    Whole arrays go to `folder`/claims.safetensors. Weights, modes and flags are left as they were.
    Raises ConfigError for a setting, a row or a model that cannot be.
    """
    vocabulary = structure.unwrapped(policy.model).config.get_text_config().vocab_size
    if settings.top_k >= vocabulary:
        raise ConfigError(
            f"entk.top_k={settings.top_k}: choose 1 to {vocabulary - 1}, one less than the "
            "vocabulary"
        )
    model, chosen = policy.model, template(chat, rows, trained)
    start = baseline(model, chosen, settings.top_k, settings.layer)
    steps = sgd_steps(model, chosen, start, settings.drop)
    norms, predicted = _kernels(model, chosen, start, steps, settings)
    unit = torch.nn.functional.normalize(start.states, dim=1)
    dots, cosines = start.states @ start.states.T, unit @ unit.T
    measured = Measurements(start, steps, norms, predicted, dots, cosines)
    if folder is not None:
        storage.write_bytes(folder / "claims.safetensors", _arrays(chosen, measured))
    return {
        "layer": settings.layer,
        "top_k": settings.top_k,
        "head": settings.head,
        "drop": settings.drop,
        "target": chosen.target,
        "ids": list(chosen.ids[: chosen.observers]),
        "of": list(chosen.kinds),
        "trained": [chosen.ids[place] for place in chosen.trained],
        "left_out": list(chosen.left_out),
        **summary(chosen, measured, seed),
    }


def _kernels(
    model: Any, chosen: Prompts, start: Baseline, steps: StepChanges, settings: Settings
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The kernels' norms and the changes that they predict, each by the kernel's label."""
    norms, predicted, tokens = {}, {}, settings.top_k + 1
    for params in settings.params:
        asked = ntk.Settings(tokens, params, settings.head, budget_gib=settings.budget_gib)
        kernel = ntk.measure(model, chosen.sequences, asked, ids=chosen.ids, tokens=start.tokens)
        label = ntk.label(params, settings.head)
        norms[label] = kernel.norms.double()
        predicted[label] = predictions(kernel.blocks.double(), start, steps, chosen)
    return norms, predicted


def template(
    chat: ChatFormat, rows: Mapping[Kind, Sequence[Example]], trained: Sequence[Example]
) -> Prompts:
    """All prompts in the model's chat template; only the trained pairs that are `alike` count.

    Steps are compared by the change of one token's log-probability. Raises ConfigError if there is
    no observer, no pair or no response.
    """
    flat = [(kind.value, row) for kind, part in rows.items() for row in part]
    if not flat or not trained:
        missing = "trained pair" if flat else "prompt to observe"
        raise ConfigError(f"claims: there is no {missing}; give at least one")
    pairs = alike(chat, trained)
    every = [*(row for _, row in flat), *pairs]
    return Prompts(
        sequences=tuple(tuple(chat.prompt_ids(row.prompt)) for row in every),
        ids=tuple(row.id for row in every),
        kinds=tuple(kind for kind, _ in flat),
        target=first_token(chat, pairs[0]),
        left_out=tuple(row.id for row in trained if row not in pairs),
    )


def alike(chat: ChatFormat, pairs: Sequence[Example]) -> list[Example]:
    """The pairs, in their order, whose response begins with the commonest first token.

    A tie goes to the token that comes first. Raises ConfigError as `first_token` does.
    """
    begins = [first_token(chat, row) for row in pairs]
    common = [token for token, _ in Counter(begins).most_common(1)]
    return [row for row, token in zip(pairs, begins, strict=True) if token in common]


def first_token(chat: ChatFormat, row: Example) -> int:
    """The token that the row's response begins with. Raises ConfigError if it has no response."""
    if not (row.response or "").strip():
        raise ConfigError(
            f"claims: {row.source}: {row.id} has no response; give pairs of a prompt and a refusal"
        )
    room = len(chat.prompt_ids(row.prompt)) + 1
    ids, _ = chat.pair(row.prompt, row.response or "", room)
    return ids[-1]


def baseline(model: Any, chosen: Prompts, top_k: int, layer: int) -> Baseline:
    """Measures `top_k` + 1 tokens of each prompt: its top k and the target, or its top k + 1."""
    tokens, log_p, states = [], [], []
    rows, back = _rows(model, chosen.sequences)
    with still(model), torch.no_grad():
        for batch in rows:
            with passes.captured(model, layer) as captured:
                every = _log_softmax(last_logits(model, batch))
            (hidden,) = captured
            places = torch.arange(len(hidden), device=hidden.device)
            states.append(hidden[places, batch.ends.to(hidden.device)].cpu().double())
            likely = every.topk(top_k + 1, 1).indices
            likely[~(likely == chosen.target).any(1), -1] = chosen.target
            tokens.append(likely)
            log_p.append(every.gather(1, likely))
    return Baseline(*(torch.cat(each)[back] for each in (tokens, log_p, states)))


def sgd_steps(model: Any, chosen: Prompts, start: Baseline, drop: float) -> StepChanges:
    """Takes one plain SGD step on the cross-entropy of the target for each trained prompt.

    A step moves all base weights, a tied matrix once and an adapter not at all, as the kernel over
    `all` does. Its rate lowers the pair's own loss L to first order by `drop` nats, or by L·`drop`
    if L is below one nat, since a loss cannot fall by more than it is. The steps take two copies of
    the weights beside the model, and for each trained prompt a backward pass and three forward
    passes over all prompts. Weights are restored to the bit, also after an exception; modes, flags
    and gradients are left as they were. Raises ConfigError below fp32 and if a loss has no
    gradient.
    """
    changes, plain, rates = [], [], []
    rows, back = _rows(model, chosen.sequences)
    by_batch = start.tokens[back.argsort()].split([len(batch.ids) for batch in rows])

    def log_probabilities() -> Float[Tensor, "prompts rank"]:
        parts = [
            _log_softmax(last_logits(model, batch)).gather(1, tokens)
            for batch, tokens in zip(rows, by_batch, strict=True)
        ]
        return torch.cat(parts)[back]

    with still(model):
        moved = ntk.parameters(model, "all", True)
        if any(parameter.dtype.itemsize < 4 for parameter in moved):
            raise ConfigError(
                f"claims: the model is in {moved[0].dtype}, in which a small step is lost to "
                "rounding; open it with precision=fp32"
            )
        for place in chosen.trained:
            (alone,), _ = _rows(model, [chosen.sequences[place]])
            gradient, rate = _gradient_and_rate(model, moved, alone, chosen.target, drop)
            rates.append(rate)
            ends = []
            with ntk.restored(moved) as saved, torch.no_grad():
                for share in (0.5, -0.5, 1.0):
                    ntk.move(moved, saved, gradient, -share * rate)
                    ends.append(log_probabilities())
            changes.append(ends[0] - ends[1])
            plain.append(ends[2] - start.log_probabilities)
    all_rates = torch.tensor(rates, dtype=torch.float64)
    return StepChanges(torch.stack(changes, 2), torch.stack(plain, 2), all_rates)


def _gradient_and_rate(
    model: Any, moved: Sequence[nn.Parameter], alone: Batch, target: int, drop: float
) -> tuple[list[Tensor], float]:
    """The gradient of one pair's loss, and the rate η of the step that lowers it by `drop`."""
    loss, gradient = ntk.gradient(model, moved, alone, lambda z: -_log_softmax(z)[target])
    squared = sum(float(part.square().sum()) for part in gradient)
    if not squared > 0:
        raise ConfigError(
            f"claims: a refusal's loss of {loss:.3g} nats has no gradient, so no step on it can be "
            "measured; choose other pairs"
        )
    return gradient, drop * min(1.0, loss) / squared


def _rows(model: Any, sequences: Sequence[Sequence[int]]) -> tuple[list[Batch], Tensor]:
    """The batches by length, and the place in them of each sequence."""
    device = next(model.parameters()).device
    back = torch.tensor(machine.by_length(sequences)).argsort()
    return batches(sequences, BATCH_SIZE, device), back


def _log_softmax(logits: Float[Tensor, "*batch vocabulary"]) -> Float[Tensor, "*batch vocabulary"]:
    return logits.cpu().double().log_softmax(-1)


def predictions(
    blocks: Float[Tensor, "prompts rank prompts rank"],
    start: Baseline,
    steps: StepChanges,
    chosen: Prompts,
) -> Float[Tensor, "prompts rank trained"]:
    """-ηAKG for every trained prompt; G is the probability less one for the target."""
    log_p, tokens = start.log_probabilities, start.tokens
    residuals = log_p.exp() - (tokens == chosen.target).double()
    return torch.stack(
        [
            ntk.log_probability_change(blocks[:, :, place], log_p, residuals[place], float(rate))
            for place, rate in zip(chosen.trained, steps.rates, strict=True)
        ],
        2,
    )


def summary(chosen: Prompts, measured: Measurements, seed: int) -> dict[str, Any]:
    """The numbers that `measure` documents."""
    n, others, couples = chosen.observers, chosen.others(), chosen.couples()
    generator = np.random.default_rng(seed)
    # one draw for all numbers: two kernels are compared over the same prompts
    observers = inference.redrawn(chosen.kinds, generator)
    trained = inference.redrawn(["trained"] * len(chosen.trained), generator)
    steps = measured.steps
    actual, plain = (changes[:n].mT.numpy() for changes in (steps.changes, steps.plain))
    off = np.linalg.norm((plain - actual)[others])
    params = {}
    for label, norms in measured.norms.items():
        predicted = measured.predicted[label][:n].mT.numpy()
        params[label] = agreement(
            norms[:n, n:].numpy(), predicted, actual, others, observers, trained
        )
        x = norms[:n, :n].numpy()[couples]
        params[label]["states"] = {
            name: _estimate(
                inference.over_pairs(
                    partial(inference.weighted_spearman, x, of[:n, :n].numpy()[couples]),
                    observers,
                    observers,
                    couples,
                )
            )
            for name, of in (("dot", measured.dots), ("cosine", measured.cosines))
        }
    changes, means = _target_changes(chosen, measured), {}
    for kind in dict.fromkeys(chosen.kinds):
        allowed = others & np.array([[own == kind] for own in chosen.kinds])
        mean = partial(inference.weighted_mean, changes[:n][allowed])
        means[kind] = _estimate(inference.over_pairs(mean, observers, trained, allowed))
    return {
        "rates": steps.rates.tolist(),
        "falls": changes[n:].diagonal().tolist(),
        "nonlinearity": inference.finite(float(off / (np.linalg.norm(actual[others]) or math.nan))),
        "covered": float(measured.start.log_probabilities[:n].exp().sum(1).mean()),
        "change": means,
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
    """Agreement of a kernel with the changes over the pairs in `others`, with its intervals.

    `observers` and `trained` are draws of `inference.redrawn`.
    """
    size = np.linalg.norm(actual, axis=2)

    def over(statistic: Callable[..., Any], x: np.ndarray, y: np.ndarray) -> list[float | None]:
        of_pairs = partial(statistic, x[others], y[others])
        return _estimate(inference.over_pairs(of_pairs, observers, trained, others))

    return {
        "norm": {
            "within": _estimate(_within(norms, size, others, observers, trained)),
            "pooled": over(inference.weighted_spearman, norms, size),
        },
        "prediction": {
            "pearson": over(inference.weighted_pearson, predicted, actual),
            "slope": over(inference.weighted_slope, predicted, actual),
        },
    }


def _within(
    norms: Float[np.ndarray, "observers trained"],
    size: Float[np.ndarray, "observers trained"],
    others: Bool[np.ndarray, "observers trained"],
    observers: Int[np.ndarray, "draws observers"],
    trained: Int[np.ndarray, "draws trained"],
) -> Float[np.ndarray, "draws"]:
    """The mean over trained prompts of the rank correlation over their observers."""
    own = []
    for place, allowed in enumerate(others.T):
        pairs = allowed, place
        statistic = partial(inference.weighted_spearman, norms[pairs], size[pairs])
        once = np.ones((len(observers), 1), dtype=np.int64)
        own.append(inference.over_pairs(statistic, observers, once, allowed[:, None]))
    every = np.stack(own, 1)
    weights = trained * np.isfinite(every)
    return statistics.ratio((weights * np.nan_to_num(every)).sum(1), weights.sum(1))


def _target_changes(
    chosen: Prompts, measured: Measurements
) -> Float[np.ndarray, "prompts trained"]:
    """Changes of log p(target), which is one of the tokens of every prompt."""
    is_target = (measured.start.tokens == chosen.target).double()
    return torch.einsum("prt,pr->pt", measured.steps.changes, is_target).numpy()


def _estimate(values: Float[np.ndarray, "draws"]) -> list[float | None]:
    return [inference.finite(value) for value in vars(statistics.of_draws(values)).values()]


def _arrays(chosen: Prompts, measured: Measurements) -> bytes:
    """A safetensors file of every array; its metadata has the prompts' `ids` in their order."""
    tensors = {
        "tokens": measured.start.tokens,
        "log_probabilities": measured.start.log_probabilities,
        "rates": measured.steps.rates,
        "changes": measured.steps.changes,
        "dots": measured.dots,
        "cosines": measured.cosines,
        **{f"norms.{label}": norms for label, norms in measured.norms.items()},
        **{f"predicted.{label}": values for label, values in measured.predicted.items()},
    }
    trained = (chosen.ids[place] for place in chosen.trained)
    metadata = {"ids": "\n".join(chosen.ids), "trained": "\n".join(trained)}
    return save({key: value.contiguous() for key, value in tensors.items()}, metadata)
