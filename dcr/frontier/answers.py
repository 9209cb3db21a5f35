"""Both whole answers of every prompt, from which every bias can be judged without asking again.

`calibrate` chooses a bias on other prompts; what a model answers under it, or under any other, is
for each prompt one of two greedy answers (`biases`). The task keeps both, so that models can be
compared on generated answers at equal achieved safety.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import FiniteFloat

from dcr.calibration import biases
from dcr.core import evaluation as sets
from dcr.core import generation
from dcr.core.config import ConfigError, Kind
from dcr.core.config.evaluation import EvalConfig
from dcr.core.evaluation.protocols import Task, Work
from dcr.core.refusal import keywords as refusal
from dcr.core.runs import Run
from dcr.core.sources import Example

PLACE = "frontier"  # the folder of the answers, a file a set


@dataclass(frozen=True)
class Pair:
    """The two answers of a prompt: begun with a refusal's first token, and with another."""

    id: str
    prompt: str
    group: str | None  # prompts of one template share one
    mass: FiniteFloat
    margin: FiniteFloat
    refusing: str
    refusing_ended: bool
    answering: str
    answering_ended: bool

    def under(self, bias: float) -> tuple[str, bool]:
        """The greedy answer under a bias, and whether it ended by itself."""
        if self.margin + bias > 0:
            return self.refusing, self.refusing_ended
        return self.answering, self.answering_ended


class Frontier(Task):
    """How many prompts of each set are refused without a bias and at the calibrated one."""

    def check(self, settings: EvalConfig, run: Run) -> None:
        """Raises ConfigError for what decodes otherwise than greedily from the first token on."""
        if settings.endpoint is not None:
            raise ConfigError(
                "tasks=[frontier]: begins answers with tokens of its own choice, which an endpoint "
                "does not take; name the model with model= or run="
            )
        if settings.gen.contrast or settings.gen.prefill:
            raise ConfigError(
                "tasks=[frontier]: reads both greedy answers of a prompt; leave gen.self_cd, "
                "gen.adacd and gen.prefill out"
            )

    def measure(self, work: Work) -> dict[str, Any]:
        settings, chat = work.settings, work.chat()
        asked = sets.of_tasks(list(sets.TASKS), settings.data, settings.limit, settings.seed)

        def ask(rows: list[Example]) -> Iterator[list[Pair]]:
            for batch in biases.both_answers(work.policy(), chat, rows, settings.gen.most):
                yield [_pair(two, chat) for two in batch]

        place, progress = work.folder / PLACE, settings.trainer.progress
        given = sets.kept(asked, ask, place, Pair, "answering twice", progress)
        bias = work.subject.bias.bias if work.subject.bias else None
        return {
            name: counted({b.name: b.kind for b in asked}, given, value)
            for name, value in {"plain": 0.0, "calibrated": bias}.items()
            if value is not None
        }


def _pair(two: biases.Two, chat: Any) -> Pair:
    texts = (generation.text(chat, ids) for ids in (two.refusing, two.answering))
    ended = (any(i in chat.stop for i in ids) for ids in (two.refusing, two.answering))
    refusing, answering = texts
    refusing_ended, answering_ended = ended
    return Pair(
        two.row.id,
        two.row.prompt,
        two.row.group,
        two.mass,
        two.margin,
        refusing,
        refusing_ended,
        answering,
        answering_ended,
    )


def counted(
    kinds: Mapping[str, Kind], given: Mapping[str, Sequence[Pair]], bias: float
) -> dict[str, Any]:
    """The answers under a bias that XSTest's keywords call refusals, by set."""
    return {
        "bias": bias,
        "sets": {
            name: {
                "kind": kinds[name].value,
                "n": len(pairs),
                "refused": sum(refusal.is_refusal(pair.under(bias)[0]) for pair in pairs),
            }
            for name, pairs in given.items()
        },
    }
