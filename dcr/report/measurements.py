"""What `metrics.json` says of refusal probability, kernel and separability, checked part by part.

Every reader raises ValueError, KeyError, TypeError or AttributeError for what cannot be.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dcr.report.printing import printable
from dcr.statistics import Interval

QUANTITIES = ("plain", "prefix_free")
LAYER_SCORES = ("kmeans", "probe", "probe_low", "probe_high", "silhouette", "fisher")


@dataclass(frozen=True)
class Probability:
    """Refusal probabilities by quantity and kind: means with intervals, and of single prompts."""

    kinds: dict[str, dict[str, Interval]]
    followed: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Kernel:
    """Mean norms, `[params][observer][trained]`; nan where a kind has no pair."""

    normalise: str
    params: dict[str, dict[str, dict[str, Interval]]]


@dataclass(frozen=True)
class Separability:
    """By layer: scores, None where undefined, and plane coordinates; labels are 1 for toxic."""

    layers: dict[int, dict[str, float | None]]
    majority: float | None
    mds: dict[int, list[tuple[float, float]]]
    ids: tuple[str, ...]
    labels: tuple[int, ...]


def probability(raw: Mapping[str, Any]) -> Probability:
    """The entry `refusal_probability`."""
    return Probability(
        {q: {_name(k): _interval(v[q]) for k, v in raw["kinds"].items()} for q in QUANTITIES},
        {
            q: {_name(k): float(v[q]) for k, v in (raw.get("followed") or {}).items()}
            for q in QUANTITIES
        },
    )


def kernel(raw: Mapping[str, Any]) -> Kernel:
    """The entry `kernel`."""
    return Kernel(
        _name(raw.get("normalise") or ""),
        {
            _name(params): {
                _name(observer): {_name(trained): _interval(cell) for trained, cell in row.items()}
                for observer, row in matrix.items()
            }
            for params, matrix in raw["params"].items()
        },
    )


def separability(raw: Mapping[str, Any]) -> Separability:
    """The entry `separability`."""
    labels = tuple(int(label) for label in raw["labels"])
    ids = tuple(map(str, raw.get("ids") or range(len(labels))))
    mds = {
        int(layer): [(float(x), float(y)) for x, y in points]
        for layer, points in (raw.get("mds") or {}).items()
        if points is not None
    }
    if any(len(points) != len(labels) for points in (*mds.values(), ids)):
        raise ValueError(f"coordinates or ids of other than {len(labels)} prompts")
    return Separability(
        layers={
            int(found["layer"]): {key: _number(found.get(key)) for key in LAYER_SCORES}
            for found in raw["layers"]
        },
        majority=_number(raw.get("majority")),
        mds=mds,
        ids=ids,
        labels=labels,
    )


def _name(text: object) -> str:
    return printable(str(text))


def _interval(raw: Sequence[float | None]) -> Interval:
    estimate, low, high = (math.nan if end is None else float(end) for end in raw)
    return Interval(estimate, low, high)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(float(value)) else float(value)
