"""Measure layers and pairs of sources by the transfer of a linear probe, and find the best."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dcr import balance
from dcr.analyses import separability
from dcr.balance import Balance
from dcr.choice import origins
from dcr.choice.origins import FEWEST, LIMIT, Material, SourcePair
from dcr.core import machine, models, prompts
from dcr.core.config import ConfigError, Kind
from dcr.core.config.training import TrainConfig, block_of
from dcr.core.data.rows import SEEMINGLY_TOXIC, TOXIC, prompt_rows
from dcr.core.models import Policy
from dcr.core.statistics import Interval
from dcr.overlaps import overlaps

log = logging.getLogger(__name__)

RESAMPLES = 500  # of each of some hundred intervals
LABELS = {Kind.seemingly_toxic: SEEMINGLY_TOXIC, Kind.toxic: TOXIC}

Features = Mapping[tuple[Kind, tuple[str, ...]], Float[Tensor, "layers prompts width"]]
Labelled = tuple[Float[Tensor, "layers prompts width"], Int[Tensor, " prompts"]]


@dataclass(frozen=True)
class LayerTransfer:
    """AUROC of a probe at one layer: within its sources, on each test set, and their mean."""

    layer: int
    within: Interval
    tests: dict[str, Interval]
    transfer: Interval


@dataclass(frozen=True)
class PairTransfer:
    """All layers of one pair of sources, and how far its form alone tells the kinds apart."""

    pair: SourcePair
    rows: tuple[int, int]
    balance: Balance
    layers: list[LayerTransfer]

    @property
    def best(self) -> LayerTransfer:
        """The layer of highest transfer, of equals the earliest."""
        return max(self.layers, key=lambda layer: layer.transfer.estimate)

    def on(self, names: Sequence[str]) -> Interval | None:
        """Transfer of the best layer to these test sets alone; None without any."""
        return mean([self.best.tests[name] for name in names]) if names else None


@dataclass(frozen=True)
class Choice:
    """The transfer of each pair of sources, the configured pair first.

    `configured` is the block that the settings name. Blocks are counted from 1.
    """

    model: str
    pairs: list[PairTransfer]
    configured: int
    notes: list[str]

    @property
    def layer(self) -> int:
        """The best block for the configured sources."""
        return self.pairs[0].best.layer

    @property
    def common(self) -> list[str]:
        """The test sets that all pairs share: the only ones that compare pairs."""
        first, *others = (list(pair.best.tests) for pair in self.pairs)
        return [name for name in first if all(name in tests for tests in others)]

    def by_transfer(self) -> list[PairTransfer]:
        """Pairs by falling transfer to the common sets; in their own order without such sets."""
        shared = {id(pair): pair.on(self.common) for pair in self.pairs}
        return sorted(self.pairs, key=lambda p: -of.estimate if (of := shared[id(p)]) else 0.0)

    def record(self) -> dict[str, Any]:
        """The choice as JSON holds it."""

        def pair_record(pair: PairTransfer) -> dict[str, Any]:
            shared = pair.on(self.common)
            return {
                "seemingly_toxic": list(pair.pair.seemingly_toxic),
                "toxic": list(pair.pair.toxic),
                "rows": list(pair.rows),
                "balance": pair.balance.record(),
                "best_block": pair.best.layer,
                "transfer_on_common_tests": shared and asdict(shared),
                "blocks": [
                    {
                        "block": at.layer,
                        "within": None if math.isnan(at.within.estimate) else asdict(at.within),
                        "transfer": asdict(at.transfer),
                        "tests": {name: asdict(interval) for name, interval in at.tests.items()},
                    }
                    for at in pair.layers
                ],
            }

        return {
            "model": self.model,
            "layer": self.layer,
            "block": self.layer,
            "configured_block": self.configured,
            "common_tests": self.common,
            "pairs": [pair_record(pair) for pair in self.by_transfer()],
            "notes": self.notes,
        }


def choose(
    settings: TrainConfig,
    *,
    limit: int = LIMIT,
    pairs: str | None = None,
    tests: str | None = None,
    policy: Policy | None = None,
) -> Choice:
    """Measure layers and pairs of sources on the model of the settings, or on `policy`.

    For `limit`, `pairs` and `tests` see `origins.gathered`. Raises UserError, where possible before
    weights are loaded.
    """
    facts = models.facts(settings.model)
    configured = block_of(settings.dcr, facts.depth)
    material = origins.gathered(settings.data, settings.seed, limit, pairs, tests)
    tokenizer = policy.tokenizer if policy else models.open_tokenizer(settings.model)
    chat = prompts.chat_format(tokenizer, settings.model)
    rows = {
        (kind, names): prompt_rows(chat, part, LABELS[kind], facts.context, settings.dcr.pooling)
        for (kind, names), part in material.used.items()
    }
    if policy is None:
        policy = models.open_policy(settings.model, settings.dcr.precision)
        machine.to_gpu(policy.model, settings.trainer.accelerator)
    log.info("reading %d prompts in %d blocks", sum(map(len, rows.values())), facts.depth)
    features = {side: separability.features(policy, part) for side, part in rows.items()}
    transfers = ranked(material, features, settings.seed, settings.data.near_duplicate)
    return Choice(settings.model.name, transfers, configured, material.notes)


def best_layer(settings: TrainConfig, limit: int = LIMIT, policy: Policy | None = None) -> int:
    """The block, from 1, whose probe on the configured sources transfers best: `dcr.layer=auto`.

    Logs which test sets chose it, since their labels were looked at. Raises UserError as `choose`.
    """
    choice = choose(settings, limit=limit, pairs="none", policy=policy)
    best = choice.pairs[0].best
    log.warning(
        "dcr.layer=auto: block %d of %d, transfer AUROC %.2f [%.2f, %.2f], chosen on prompts of %s",
        best.layer,
        len(choice.pairs[0].layers),
        best.transfer.estimate,
        best.transfer.low,
        best.transfer.high,
        ", ".join(best.tests),
    )
    return best.layer


# --- transfer ---


def ranked(material: Material, features: Features, seed: int, near: float) -> list[PairTransfer]:
    """The transfer of every candidate, in the given order.

    Test prompts equal to or as close as `near` to a training prompt are left out.
    """
    return [_measured(pair, material, features, seed, near) for pair in material.candidates]


def mean(intervals: Sequence[Interval]) -> Interval:
    """The mean of independent estimates, its ends recovered from theirs (Zou and Donner 2008)."""
    count = len(intervals)
    estimate = sum(part.estimate for part in intervals) / count
    below = math.sqrt(sum((part.estimate - part.low) ** 2 for part in intervals)) / count
    above = math.sqrt(sum((part.high - part.estimate) ** 2 for part in intervals)) / count
    return Interval(estimate, estimate - below, estimate + above)


def _measured(
    pair: SourcePair, material: Material, features: Features, seed: int, near: float
) -> PairTransfer:
    safe, toxic = (material.rows[side] for side in pair.sides)
    balanced = balance.balance(safe, toxic)
    assert balanced is not None
    points, labels = _labelled(pair, features)
    groups = separability.group_names([*safe, *toxic])
    tests = _tests(pair, material, features, near)
    layers = []
    for place, train in enumerate(points):
        on = {
            name: separability.transfer_auroc(
                train, labels, others[place], kinds, seed=seed, resamples=RESAMPLES
            )
            for name, (others, kinds) in tests.items()
        }
        within = separability.probe_auroc(train, labels, groups, seed, RESAMPLES)
        layers.append(LayerTransfer(place + 1, within, on, mean(list(on.values()))))
    if not any(math.isfinite(layer.transfer.estimate) for layer in layers):
        raise ConfigError("model.name: its hidden states are not finite; choose other weights")
    return PairTransfer(
        pair,
        (len(safe), len(toxic)),
        balanced,
        [layer for layer in layers if math.isfinite(layer.transfer.estimate)],
    )


def _labelled(pair: SourcePair, features: Features) -> Labelled:
    safe, toxic = (features[side] for side in pair.sides)
    labels = torch.tensor([0] * safe.shape[1] + [1] * toxic.shape[1], dtype=torch.long)
    return torch.cat([safe, toxic], 1), labels


def _tests(
    pair: SourcePair, material: Material, features: Features, near: float
) -> dict[str, Labelled]:
    """The prompts of each test set that are no near copies of the pair's, by name.

    Raises ConfigError where too few are left of every set.
    """
    trained = [row.prompt for side in pair.sides for row in material.rows[side]]
    tests = {}
    for name, test in material.tests_of(pair).items():
        points, labels = _labelled(test, features)
        prompts = [row.prompt for side in test.sides for row in material.rows[side]]
        close = overlaps(prompts, {"train": trained}, near=near)
        fresh = torch.tensor([overlap is None for overlap in close])
        if torch.bincount(labels[fresh], minlength=2).min() >= FEWEST:
            tests[name] = (points[:, fresh], labels[fresh])
    if not tests:
        raise ConfigError(
            f"tests: too few prompts of {', '.join(material.tests_of(pair))} differ from those "
            f"of {pair}; name others with tests=<seemingly toxic>:<toxic>"
        )
    return tests
