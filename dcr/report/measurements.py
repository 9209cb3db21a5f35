"""What `metrics.json` says of the paper's quantities, checked part by part.

Every reader raises ValueError, KeyError, TypeError or AttributeError for what cannot be.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dcr.report.printing import printable
from dcr.statistics import Interval

QUANTITIES = ("plain", "prefix_free")
STEP_SCORES = {  # where each may stand among those of a choice of parameters
    "norm": (("norm",), ("norm", "within")),
    "signed": (("signed",), ("prediction", "pearson")),
    "slope": (("slope",), ("prediction", "slope")),
    "dot": (("dot",), ("states", "dot")),
    "cosine": (("cosine",), ("states", "cosine")),
}
LAYER_SCORES = ("kmeans", "probe", "probe_low", "probe_high", "silhouette", "fisher")


@dataclass(frozen=True)
class Probability:
    """Refusal probabilities by quantity and kind: means with intervals, and of single prompts.

    `values` has every prompt by its id; it is empty where only means were kept.
    """

    kinds: dict[str, dict[str, Interval]]
    followed: dict[str, dict[str, float]]
    values: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Kernel:
    """Mean norms, `[params][observer][trained]`; nan where a kind has no pair.

    `ids` and `of` are the prompts and their kinds, row by row of the whole matrices.
    """

    normalise: str
    params: dict[str, dict[str, dict[str, Interval]]]
    top_k: int | None = None
    ids: tuple[str, ...] = ()
    of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Separability:
    """By layer: scores, None where undefined, and plane coordinates; labels are 1 for toxic."""

    layers: dict[int, dict[str, float | None]]
    majority: float | None
    mds: dict[int, list[tuple[float, float]]]
    ids: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class OneStep:
    """What one SGD step on a toxic pair does, against the kernel (Eq. 2, 3; Proposition 1).

    `params` has the statistics STEP_SCORES that could be told, by choice of parameters; `change`
    the mean change of log p(first refusal token) by kind of observer.
    """

    trained: int | None  # how many pairs
    params: dict[str, dict[str, Interval]]
    change: dict[str, Interval]


def probability(raw: Mapping[str, Any]) -> Probability:
    """The entry `refusal_probability`."""
    return Probability(
        {q: {_name(k): _interval(v[q]) for k, v in raw["kinds"].items()} for q in QUANTITIES},
        {
            q: {_name(k): float(v[q]) for k, v in (raw.get("followed") or {}).items()}
            for q in QUANTITIES
        },
        {q: _by_prompt(raw.get("values") or (), q) for q in QUANTITIES},
    )


def _by_prompt(rows: Iterable[Mapping[str, Any]], quantity: str) -> dict[str, dict[str, float]]:
    """Finite values, `[kind][id]`."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        value = _number(row[quantity])
        if value is not None:
            found.setdefault(_name(row["kind"]), {})[str(row["id"])] = value
    return found


def kernel(raw: Mapping[str, Any]) -> Kernel:
    """The entry `kernel`."""
    ids, of = tuple(map(str, raw.get("ids") or ())), tuple(map(_name, raw.get("of") or ()))
    if len(ids) != len(of):
        raise ValueError(f"{len(ids)} ids and {len(of)} kinds of prompts")
    return Kernel(
        _name(raw.get("normalise") or ""),
        {
            _name(params): {
                _name(observer): {_name(trained): _interval(cell) for trained, cell in row.items()}
                for observer, row in matrix.items()
            }
            for params, matrix in raw["params"].items()
        },
        None if raw.get("top_k") is None else int(raw["top_k"]),
        ids,
        of,
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


def one_step(raw: Mapping[str, Any]) -> OneStep:
    """The entry `claims`; a statistic that is absent, null or not finite is left out."""
    trained = raw.get("trained")
    return OneStep(
        trained if trained is None or isinstance(trained, int) else len(trained),
        {
            _name(params): _intervals({key: _score(found, key) for key in STEP_SCORES})
            for params, found in raw["params"].items()
        },
        _intervals(raw["change"]),
    )


def _score(raw: Mapping[str, Any], key: str) -> Any:
    for place in STEP_SCORES[key]:
        found: Any = raw
        for part in place:
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is not None and not isinstance(found, Mapping):
            return found
    return None


def _intervals(raw: Mapping[str, Any]) -> dict[str, Interval]:
    read = {_name(key): _interval(found) for key, found in raw.items() if found is not None}
    return {
        key: found for key, found in read.items() if all(map(math.isfinite, vars(found).values()))
    }


def _name(text: object) -> str:
    return printable(str(text))


def _interval(raw: Sequence[float | None]) -> Interval:
    estimate, low, high = (math.nan if end is None else float(end) for end in raw)
    return Interval(estimate, low, high)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(float(value)) else float(value)
