"""A search over settings as figures: its trials with their Pareto front, and what matters."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dcr.report import figures
from dcr.report.figures import INK, PALETTE, Drawing, Line, Look, Panel

PALE: Look = {"color": PALETTE[0], "marker": "o", "linestyle": "", "alpha": 0.5, "markersize": 3}
FRONT: Look = {"color": PALETTE[1], "marker": "o", "linestyle": "", "markersize": 5}
CONFIGURED: Look = {"color": PALETTE[2], "marker": "s", "linestyle": "", "markersize": 4}
CHOSEN: Look = {"color": INK, "marker": "o", "linestyle": "", "markersize": 11,
                "markerfacecolor": "none", "markeredgewidth": 1.2}  # fmt: skip


@dataclass(frozen=True)
class Tried:
    """A trial: what was set, how it ended, and the value of each objective if it came to its end.

    `is_of` says whether it is of the front, the point as configured, or chosen.
    """

    number: int
    ended: str
    settings: Mapping[str, object]
    values: tuple[float, ...] = ()
    is_of: frozenset[str] = frozenset()
    fault: str = ""


def front(tried: Sequence[Tried], heads: Mapping[str, str]) -> Drawing:
    """Every pair of objectives against each other; one alone over the trials' numbers.

    `heads` are the axes' words by objective.
    """
    whole = [trial for trial in tried if trial.values]
    pairs: list[tuple[int | None, int]] = [*itertools.combinations(range(len(heads)), 2)]
    words = list(heads.values())
    panels = []
    for x, y in pairs or [(None, 0)]:
        axes = {"xlabel": "trial" if x is None else words[x], "ylabel": words[y]}
        lines = [
            _points(whole, x, y, PALE),
            _points([t for t in whole if "front" in t.is_of], x, y, FRONT, numbered=True),
            _points([t for t in whole if "configured" in t.is_of], x, y, CONFIGURED),
            _points([t for t in whole if "chosen" in t.is_of], x, y, CHOSEN),
        ]
        margins = {"xmargin": 0.12, "ymargin": 0.12}
        panels.append(Panel([line for line in lines if len(line.values)], axes=axes | margins))
    keys = list(dict.fromkeys(key for trial in tried for key in trial.settings))
    rows = [
        (t.number, t.ended, *(int(of in t.is_of) for of in ("front", "configured", "chosen")),
         *(t.settings.get(key) for key in keys), *(t.values or [None] * len(heads)))
        for t in tried
    ]  # fmt: skip
    columns = ("trial", "ended", "front", "configured", "chosen", *keys, *heads)
    legend = [("trial", PALE), ("Pareto front", FRONT), ("as configured", CONFIGURED)]
    if any("chosen" in trial.is_of for trial in tried):
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
    tried: Sequence[Tried], x: int | None, y: int, look: Look, numbered: bool = False
) -> Line:
    places = [(t.number if x is None else t.values[x], t.values[y]) for t in tried]
    words = [(place, str(t.number), (4.0, 4.0)) for place, t in enumerate(tried)]
    return Line(pd.DataFrame(places, columns=["x", "y"]), look, words=words if numbered else ())


def importances(of: Mapping[str, Mapping[str, float]]) -> Drawing:
    """A bar for each setting: its share of an objective's variance, in a panel each (fANOVA)."""
    keys = sorted({key for shares in of.values() for key in shares})[::-1]
    bar: dict[str, Any] = {"color": PALETTE[1], "linewidth": 6, "solid_capstyle": "butt"}
    panels = []
    for place, (objective, shares) in enumerate(of.items()):
        lines = [
            Line(pd.DataFrame({"x": [0, share], "y": [keys.index(key)] * 2}), bar)
            for key, share in shares.items()
        ]
        axes = {"xlim": (0, 1), "ylim": (-0.6, len(keys) - 0.4), "yticks": range(len(keys)),
                "yticklabels": [] if place else keys, "xlabel": "share of variance"}  # fmt: skip
        panels.append(Panel(lines, figures.folded(objective, 30), axes))
    rows = [(objective, key, share) for objective, by in of.items() for key, share in by.items()]
    return Drawing(
        "importances",
        "Importance of settings",
        {"": panels},
        figures.frame(rows, "objective", "setting", "importance"),
        "fANOVA over the trials that came to their end; of few trials a rough guide.",
        size=(2.6, 0.6 + 0.25 * len(keys)),
    )
