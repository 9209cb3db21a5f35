"""A task of one's own: python eval.py run=<run> tasks=[over_refusal,safety,examples.tasks:Style]

Safety tuning can shorten answers, or let them go in circles, while every rate looks fine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from dcr.core.config import ConfigError, Kind
from dcr.core.config.evaluation import EvalConfig
from dcr.core.evaluation.protocols import Task, Work
from dcr.core.runs import Run


@dataclass
class Style(Task):
    """Words an answer, and the share of n-grams that repeat an earlier one, by kind of prompt."""

    closed = True  # it reads answers alone, so the weights may be closed

    gram: int = 3  # words of an n-gram
    shortest: int = 8  # answers of fewer n-grams say nothing of repetition

    def check(self, settings: EvalConfig, run: Run) -> None:
        if self.gram < 1:
            raise ConfigError(f"own.Style.gram={self.gram}: give words of an n-gram, 1 or more")

    def measure(self, work: Work) -> dict[str, dict[str, list[float]]]:
        measured = {}
        for kind in Kind:
            names = [asked.name for asked in work.asked if asked.kind is kind]
            texts = [answer.response.split() for name in names for answer in work.answers[name]]
            grams = [[*zip(*(t[i:] for i in range(self.gram)), strict=False)] for t in texts]
            shares = [1 - len(set(g)) / len(g) for g in grams if len(g) >= max(1, self.shortest)]
            of_kind = {"words": [float(len(text)) for text in texts], "repeated": shares}
            measured[kind.value] = {name: _mean(of) for name, of in of_kind.items() if of}
        return measured


def _mean(values: Sequence[float]) -> list[float]:
    """With its 95% interval, by the normal approximation."""
    mean = fmean(values)
    half = 1.96 * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return [mean, mean - half, mean + half]
