"""From settings to a measured choice: rows first, then the model, then the comparison."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dcr import config, models, prompts, separability
from dcr.choice import origins, ranking
from dcr.choice.origins import LIMIT
from dcr.choice.ranking import LayerTransfer, PairTransfer
from dcr.config import LayerBase, TrainConfig
from dcr.data import SEEMINGLY_TOXIC, TOXIC
from dcr.models import Policy
from dcr.statistics import Interval

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """What was measured of each pair of sources; the first pair is the configured one.

    `configured` is the block that the settings name; blocks are counted from 1, whereas `offset`
    is what `dcr.layer` adds to that count.
    """

    model: str
    pairs: list[PairTransfer]
    configured: int
    offset: int
    notes: list[str]

    @property
    def layer(self) -> int:
        """The best block for the configured sources."""
        return self.pairs[0].best.layer

    @property
    def common(self) -> list[str]:
        """Test sets that all pairs share: the only ones that compare pairs."""
        return ranking.common(self.pairs)

    def by_transfer(self) -> list[PairTransfer]:
        """Pairs in order of their transfer on the common sets, as given without such sets."""
        names = self.common
        if not names:
            return self.pairs
        return sorted(self.pairs, key=lambda pair: -_on(pair, names))

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "model": self.model,
            "layer": self.layer + self.offset,
            "block": self.layer,
            "configured_block": self.configured,
            "common_tests": self.common,
            "pairs": [_pair_record(pair, self.common) for pair in self.by_transfer()],
            "notes": self.notes,
        }


def _on(pair: PairTransfer, names: list[str]) -> float:
    found = ranking.on_common(pair, names)
    assert found is not None
    return found.estimate


def choose(
    settings: TrainConfig,
    *,
    limit: int = LIMIT,
    pairs: str | None = None,
    tests: str | None = None,
    policy: Policy | None = None,
) -> Choice:
    """Measure layers and pairs of sources on the model of the settings, or on `policy`.

    For `limit`, `pairs` and `tests` see `origins.gathered`. Raises UserError for whatever a user
    can mend, before weights are loaded where it can be known.
    """
    facts = models.facts(settings.model)
    configured = config.block_of(settings.dcr, facts.depth)
    material = origins.gathered(settings.data, settings.seed, limit, pairs, tests)
    tokenizer = policy.tokenizer if policy else models.open_tokenizer(settings.model)
    chat = prompts.chat_format(tokenizer, settings.model)
    labels = {config.Kind.seemingly_toxic: SEEMINGLY_TOXIC, config.Kind.toxic: TOXIC}
    rows = {
        (kind, names): separability.encoded(
            chat, part, labels[kind], facts.context, settings.dcr.template, settings.dcr.pooling
        )
        for (kind, names), part in material.used.items()
    }
    opened = policy or _opened(settings)
    log.info("reading %d prompts in %d blocks", sum(map(len, rows.values())), facts.depth)
    features = {side: separability.features(opened, part) for side, part in rows.items()}
    found = ranking.ranked(material, features, settings.seed, settings.data.near_duplicate)
    offset = -1 if settings.dcr.layer_base is LayerBase.zero_based else 0
    return Choice(settings.model.name, found, configured, offset, material.notes)


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


def _opened(settings: TrainConfig) -> Policy:
    """The weights in memory, in the precision of stage one, on the device they run on."""
    if settings.trainer.threads:
        torch.set_num_threads(settings.trainer.threads)
    policy = models.open_policy(settings.model, settings.dcr.precision, settings.seed)
    wanted = settings.trainer.accelerator in ("auto", "gpu", "cuda")
    if wanted and torch.cuda.is_available():
        policy.model.to("cuda")
    return policy


def _pair_record(pair: PairTransfer, names: list[str]) -> dict[str, Any]:
    shared = ranking.on_common(pair, names)
    return {
        "seemingly_toxic": list(pair.pair.seemingly_toxic),
        "toxic": list(pair.pair.toxic),
        "rows": list(pair.rows),
        "questions": list(pair.questions),
        "form_gap": pair.form_gap,
        "best_block": pair.best.layer,
        "transfer_on_common_tests": shared and asdict(shared),
        "blocks": [_layer_record(layer) for layer in pair.layers],
    }


def _layer_record(layer: LayerTransfer) -> dict[str, Any]:
    return {
        "block": layer.layer,
        "within": _interval_record(layer.within),
        "transfer": asdict(layer.transfer),
        "tests": {name: asdict(interval) for name, interval in layer.tests.items()},
    }


def _interval_record(interval: Interval) -> dict[str, float] | None:
    return asdict(interval) if interval.estimate == interval.estimate else None  # NaN is unequal
