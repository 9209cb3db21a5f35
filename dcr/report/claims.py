"""The statistics of the paper's claims: correlations, contrasts of kernel means, verdicts.

All intervals are 95% percentile bootstrap intervals over prompts, which are drawn anew within each
kind. A draw says how often each prompt was drawn; quantities that are compared share their draws.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from dcr.statistics import Interval

RESAMPLES = 2000
SEED = 0  # of the bootstrap, fixed so that a report is reproducible
FLAT = 1e-12  # of its own size: a curve that moves less than that is rounding, not a movement
HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"
Cell = tuple[str, str]  # observer kind, trained kind

Draws = Int[np.ndarray, "resamples prompts"]
Curves = Float[np.ndarray, "steps prompts"]


def draws(kinds: Sequence[str], seed: int = SEED) -> dict[str, Draws]:
    """Draws for each kind, in the order in which kinds appear: those of `ntk.mean_by_kind`."""
    generator = np.random.default_rng(seed)
    counts = {kind: list(kinds).count(kind) for kind in dict.fromkeys(kinds)}
    return {
        kind: generator.multinomial(n, [1 / n] * n, size=RESAMPLES) for kind, n in counts.items()
    }


def correlation(first: Curves, second: Curves, drawn: tuple[Draws, Draws]) -> Interval:
    """Pearson's r over steps of two mean curves, each over prompts of its own.

    nan where a curve is flat; draws in which one is flat are left out.
    """
    means = [
        np.concatenate([curves.mean(1)[None], rows @ curves.T / curves.shape[1]])
        for curves, rows in zip((first, second), drawn, strict=True)
    ]
    estimate, *sampled = _pearson(*means)
    return Interval(float(estimate), *_ends(np.asarray(sampled)))


def _pearson(
    first: Float[np.ndarray, "rows steps"], second: Float[np.ndarray, "rows steps"]
) -> Float[np.ndarray, "rows"]:
    """Row by row."""
    moved = [_normed(values) for values in (first, second)]
    return np.clip((moved[0] * moved[1]).sum(1), -1, 1)


def _normed(values: Float[np.ndarray, "rows steps"]) -> Float[np.ndarray, "rows steps"]:
    centred = values - values.mean(1, keepdims=True)
    sizes = np.linalg.norm(centred, axis=1, keepdims=True)
    flat = sizes <= FLAT * np.linalg.norm(values, axis=1, keepdims=True)
    return np.divide(centred, sizes, out=np.full_like(centred, np.nan), where=~flat)


def contrast(
    matrix: Float[np.ndarray, "observer trained"],
    kinds: Sequence[str],
    weights: Mapping[Cell, float],
    drawn: Mapping[str, Draws],
) -> Interval:
    """A weighted sum of means by kind, a prompt's pair with itself left out.

    The means are those of `ntk.mean_by_kind`, whose draws all cells share here: of one cell with
    weight 1 it is the same interval. Since means are linear, the difference of two matrices over
    the same prompts gives a paired comparison. nan where a kind has no pair; draws of a single
    prompt, which have none, are left out.
    """
    estimate, sampled = 0.0, np.zeros(len(next(iter(drawn.values()))))
    for (observer, trained), weight in weights.items():
        mean, means = _cell(matrix, kinds, (observer, trained), drawn)
        estimate, sampled = estimate + weight * mean, sampled + weight * means
    return Interval(estimate, *_ends(sampled))


def _cell(
    matrix: Float[np.ndarray, "observer trained"],
    kinds: Sequence[str],
    cell: Cell,
    drawn: Mapping[str, Draws],
) -> tuple[float, Float[np.ndarray, "resamples"]]:
    rows, columns = ([i for i, kind in enumerate(kinds) if kind == wanted] for wanted in cell)
    values, allowed = matrix[np.ix_(rows, columns)], np.ones((len(rows), len(columns)))
    if cell[0] == cell[1]:
        np.fill_diagonal(allowed, 0)
    if not allowed.any():
        return math.nan, np.full(len(drawn[cell[0]]), np.nan)
    kept = np.where(allowed, values, 0.0)
    totals, counts = (((drawn[cell[0]] @ part) * drawn[cell[1]]).sum(1) for part in (kept, allowed))
    means = np.divide(totals, counts, out=np.full(len(totals), np.nan), where=counts > 0)
    return float(kept.sum() / allowed.sum()), means


def _ends(sampled: Float[np.ndarray, "resamples"]) -> tuple[float, float]:
    known = sampled[np.isfinite(sampled)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def verdict(measured: Interval, boundary: float = 0.0, *, above: bool = True) -> str:
    """Whether the whole interval lies on the claimed side of the boundary."""
    sides = (measured.low > boundary, measured.high < boundary)
    claimed, other = sides if above else sides[::-1]
    return HOLDS if claimed else FAILS if other else OPEN


def exceeds(first: Interval, second: Interval) -> str:
    """Whether the first lies above the second, by intervals that do not meet."""
    return HOLDS if first.low > second.high else FAILS if first.high < second.low else OPEN


def all_of(verdicts: Sequence[str]) -> str:
    """The verdict on a claim that asks for several things at once."""
    return next((found for found in (FAILS, OPEN) if found in verdicts), HOLDS)
