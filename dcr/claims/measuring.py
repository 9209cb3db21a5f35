"""Both claims on one model, as a block of `metrics.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from dcr import models, ntk
from dcr.claims import stepping
from dcr.claims.pairs import Subjects, subjects
from dcr.claims.stepping import Before, Steps
from dcr.claims.summary import Found, summary
from dcr.config import ConfigError, Kind
from dcr.models import Policy
from dcr.prompts import ChatFormat
from dcr.sources import Example


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
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({key: value.contiguous() for key, value in tensors.items()}, part, told)
    part.replace(path)


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
