"""A search over settings as figures: its trials with their Pareto front, and what matters."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dcr.report import figures
from dcr.report.figures import INK, PALETTE, Curve, Drawing, Look, Panel

PALE: Look = {"color": PALETTE[0], "marker": "o", "linestyle": "", "alpha": 0.5, "markersize": 3}
FRONT: Look = {"color": PALETTE[1], "marker": "o", "linestyle": "", "markersize": 5}
CONFIGURED: Look = {"color": PALETTE[2], "marker": "s", "linestyle": "", "markersize": 4}
CHOSEN: Look = {"color": INK, "marker": "o", "linestyle": "", "markersize": 11,
                "markerfacecolor": "none", "markeredgewidth": 1.2}  # fmt: skip


@dataclass(frozen=True)
class EndedTrial:
    """A trial that has ended, with the value of each objective if it did not fail."""

    number: int
    settings: Mapping[str, object]
    values: tuple[float, ...] = ()
    fault: str = ""
    front: bool = False
    configured: bool = False
    chosen: bool = False

    @property
    def ended(self) -> str:
        return "complete" if self.values else "failed"


def front(tried: Sequence[EndedTrial], heads: Mapping[str, str]) -> Drawing:
    """Every pair of objectives against each other; a single one over the trials' numbers.

    `heads` names the axis of each objective.
    """
    whole = [trial for trial in tried if trial.values]
    pairs: list[tuple[int | None, int]] = [*itertools.combinations(range(len(heads)), 2)]
    words = list(heads.values())
    panels = []
    for x, y in pairs or [(None, 0)]:
        axes = {"xlabel": "trial" if x is None else words[x], "ylabel": words[y]}
        drawn = [
            _points(whole, x, y, PALE),
            _points([t for t in whole if t.front], x, y, FRONT, numbered=True),
            _points([t for t in whole if t.configured], x, y, CONFIGURED),
            _points([t for t in whole if t.chosen], x, y, CHOSEN),
        ]
        margins = {"xmargin": 0.12, "ymargin": 0.12}
        panels.append(Panel([curve for curve in drawn if len(curve.values)], axes=axes | margins))
    keys = list(dict.fromkeys(key for trial in tried for key in trial.settings))
    rows = [
        (t.number, t.ended, *map(int, (t.front, t.configured, t.chosen)),
         *(t.settings.get(key) for key in keys), *(t.values or [None] * len(heads)))
        for t in tried
    ]  # fmt: skip
    columns = ("trial", "ended", "front", "configured", "chosen", *keys, *heads)
    legend = [("trial", PALE), ("Pareto front", FRONT), ("as configured", CONFIGURED)]
    if any(trial.chosen for trial in tried):
        legend.append(("chosen", {**CHOSEN, "markersize": 7}))
    return Drawing(
        "front",
        "Pareto front",
        {"": panels},
        figures.frame(rows, *columns),
        "Validation prompts; numbers are those of the trials.",
        legend,
        size=(2.6, 2.3),
    )


def _points(
    tried: Sequence[EndedTrial], x: int | None, y: int, look: Look, numbered: bool = False
) -> Curve:
    places = [(t.number if x is None else t.values[x], t.values[y]) for t in tried]
    words = [(place, str(t.number), (4.0, 4.0)) for place, t in enumerate(tried)]
    return Curve(pd.DataFrame(places, columns=["x", "y"]), look, words=words if numbered else ())


def importances(explained: Mapping[str, Mapping[str, float]]) -> Drawing:
    """A panel for each objective, with a bar for the share of its variance by setting (fANOVA)."""
    keys = sorted({key for shares in explained.values() for key in shares})[::-1]
    bar: dict[str, Any] = {"color": PALETTE[1], "linewidth": 6, "solid_capstyle": "butt"}
    panels = []
    for place, (objective, shares) in enumerate(explained.items()):
        drawn = [
            Curve(pd.DataFrame({"x": [0, share], "y": [keys.index(key)] * 2}), bar)
            for key, share in shares.items()
        ]
        axes = {"xlim": (0, 1), "ylim": (-0.6, len(keys) - 0.4), "yticks": range(len(keys)),
                "yticklabels": [] if place else keys, "xlabel": "share of variance"}  # fmt: skip
        panels.append(Panel(drawn, figures.folded(objective, 30), axes))
    rows = [
        (objective, key, share) for objective, by in explained.items() for key, share in by.items()
    ]
    return Drawing(
        "importances",
        "Importance of settings",
        {"": panels},
        figures.frame(rows, "objective", "setting", "importance"),
        "fANOVA over the trials that came to their end; a rough guide if they are few.",
        size=(2.6, 0.6 + 0.25 * len(keys)),
    )
