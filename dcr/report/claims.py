"""The paper's claims, each measured, judged by one rule and told in a sentence."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open

from dcr.analyses import ntk
from dcr.core import results
from dcr.core.config import DataError
from dcr.core.results.schema import Estimate, Kernel, OneStep, RefusalProbability, interval
from dcr.core.statistics import Interval, percentiles, resampled_groups
from dcr.core.text import printable, single_line
from dcr.report.curves import KEPT, SCORED, STAGES, folders, name_of_weights, names, snapshots
from dcr.report.records import Evaluation, RunRecord, about, config_of, unedited

SEED = 0  # of the bootstrap, fixed so that a report is reproducible
FLAT = 1e-12  # of its own size: a curve that moves less than that is rounding, not a movement
HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"
KindPair = tuple[str, str]  # observer kind, trained kind

Draws = Int[np.ndarray, "resamples prompts"]
ByPrompt = Float[np.ndarray, "steps prompts"]


def draws(kinds: Sequence[str], seed: int = SEED) -> dict[str, Draws]:
    """Draws for each kind, in the order in which kinds appear: those of `ntk.mean_by_kind`."""
    return resampled_groups(kinds, np.random.default_rng(seed))


def correlation(first: ByPrompt, second: ByPrompt, drawn: tuple[Draws, Draws]) -> Interval:
    """Pearson's r over steps of two mean curves, each over prompts of its own.

    nan where a curve is flat; draws in which one is flat are left out.
    """
    means = [
        np.concatenate([curves.mean(1)[None], rows @ curves.T / curves.shape[1]])
        for curves, rows in zip((first, second), drawn, strict=True)
    ]
    moved, other = map(_normed, means)
    estimate, *sampled = np.clip((moved * other).sum(1), -1, 1)
    return Interval(float(estimate), *_ends(np.asarray(sampled)))


def _normed(values: Float[np.ndarray, "rows steps"]) -> Float[np.ndarray, "rows steps"]:
    centred = values - values.mean(1, keepdims=True)
    sizes = np.linalg.norm(centred, axis=1, keepdims=True)
    flat = sizes <= FLAT * np.linalg.norm(values, axis=1, keepdims=True)
    return np.divide(centred, sizes, out=np.full_like(centred, np.nan), where=~flat)


def contrast(
    matrix: Float[np.ndarray, "observer trained"],
    kinds: Sequence[str],
    weights: Mapping[KindPair, float],
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
        mean, means = ntk.kind_mean(matrix, kinds, (observer, trained), drawn)
        estimate, sampled = estimate + weight * mean, sampled + weight * means
    return Interval(estimate, *_ends(sampled))


def _ends(sampled: Float[np.ndarray, "resamples"]) -> tuple[float, float]:
    known = sampled[np.isfinite(sampled)]
    return percentiles(known) if len(known) else (math.nan, math.nan)


def verdict(measured: Interval, *, above: bool = True) -> str:
    """Whether the whole interval lies on the claimed side of 0."""
    sides = (measured.low > 0, measured.high < 0)
    claimed, other = sides if above else sides[::-1]
    return HOLDS if claimed else FAILS if other else OPEN


FEWEST_STEPS = 3  # two points always lie on a line


@dataclass(frozen=True)
class PromptCurves:
    """The plain refusal probability of single prompts: `values[kind][step, prompt]`."""

    steps: tuple[int, ...]
    values: dict[str, np.ndarray]
    source: str


@dataclass(frozen=True)
class MeasuredKernel:
    """A kernel that was kept whole: which run's, at which weights, in which folder."""

    run: RunRecord
    weights: str  # in words
    model: str
    folder: Path
    kernel: Kernel

    @property
    def terms(self) -> tuple[object, ...]:
        """What two kernels must share to be compared."""
        kernel = self.kernel
        return tuple(kernel.ids), tuple(kernel.of), kernel.top_k, kernel.normalise


@dataclass(frozen=True)
class BeforeAfter:
    """A kernel before and after stage one over the same prompts, as normalised matrices."""

    before: MeasuredKernel
    after: MeasuredKernel
    params: str
    matrices: tuple[np.ndarray, np.ndarray]


def prompt_curves(run: RunRecord) -> PromptCurves | None:
    """Over SFT, from tracking or else from snapshots; None of fewer than three steps."""
    measured = {
        KEPT: [tracked for tracked in run.tracked if tracked.stage == "sft"],
        SCORED: snapshots(run, lambda e: e.refusal_probability),
    }
    for source, steps in measured.items():
        by_step = {s.step or 0: s.refusal_probability for s in steps if s.refusal_probability}
        values = _followed(by_step)
        if len(by_step) >= FEWEST_STEPS and {"toxic", "seemingly_toxic"} <= values.keys():
            return PromptCurves(tuple(sorted(by_step)), values, source)
    return None


def _followed(by_step: Mapping[int, RefusalProbability]) -> dict[str, np.ndarray]:
    """The plain probabilities of the prompts that were measured at every step, by kind."""
    steps: list[dict[tuple[str, str], float]] = [
        {
            (prompt.kind, prompt.id): prompt.plain
            for prompt in by_step[step].values
            if prompt.plain is not None
        }
        for step in sorted(by_step)
    ]
    shared = [key for key in (steps[0] if steps else ()) if all(key in step for step in steps)]
    return {
        kind: np.array([[step[key] for key in shared if key[0] == kind] for step in steps])
        for kind in dict.fromkeys(kind for kind, _ in shared)
    }


def evaluated(run: RunRecord, weights: str) -> list[MeasuredKernel]:
    """Kernels of unsteered evaluations of certain weights."""
    return [
        MeasuredKernel(run, weights, about(run, e, "model"), e.folder, e.kernel)
        for e in run.evaluations
        if e.weights == weights and e.kernel and e.kernel.ids and unedited(e)
    ]


def tracked(run: RunRecord, stage: str) -> list[MeasuredKernel]:
    """Kernels that tracking kept over a stage, by step."""
    return [
        MeasuredKernel(run, f"step {t.step}", config_of(run, "model"), t.folder, t.kernel)
        for t in run.tracked
        if t.stage == stage and t.kernel and t.kernel.ids
    ]


def base_kernels(records: Sequence[RunRecord]) -> list[MeasuredKernel]:
    """Of base models: evaluations, or else what tracking kept before a stage took a step.

    One a model and choice of prompts, the first.
    """
    bases = [measured for run in records for measured in evaluated(run, "base")]
    for run in records if not bases else ():
        first = tracked(run, "contrastive")[:1]
        if not first and config_of(run, "method") != "dcr":
            first = tracked(run, "sft")[:1]
        bases += [measured for measured in first if measured.weights == "step 0"]
    distinct: dict[tuple[object, ...], MeasuredKernel] = {}
    for measured in bases:
        key = (measured.model, *measured.terms, tuple(measured.kernel.params))
        distinct.setdefault(key, measured)
    return list(distinct.values())


def pairs(records: Sequence[RunRecord], notes: list[str]) -> list[BeforeAfter]:
    """Before and after stage one of every run: evaluations, or else tracking's first and last."""
    bases = [measured for run in records for measured in evaluated(run, "base")]
    both: list[BeforeAfter] = []
    for run in records:
        own = [p for after in evaluated(run, "contrastive") for p in _paired(after, bases, notes)]
        steps = tracked(run, "contrastive")
        if not own and len(steps) > 1 and steps[0].weights == "step 0":
            own = _paired(steps[-1], steps[:1], notes)
        both += own
    return both


def _paired(
    after: MeasuredKernel, bases: Sequence[MeasuredKernel], notes: list[str]
) -> list[BeforeAfter]:
    alike = [base for base in bases if (base.model, base.terms) == (after.model, after.terms)]
    place, both = printable(str(after.folder)), []
    for params in after.kernel.params:
        having = [base for base in alike if params in base.kernel.params]
        if not having:
            notes.append(
                f"claims: {place}: beside it no kernel of the base model over {params} and the "
                "same prompts, entk.top_k and entk.normalise; run python eval.py model=<name> "
                "tasks=[kernel] with the same data and entk settings"
            )
            continue
        if others := ", ".join(printable(str(base.folder)) for base in having[1:]):
            first = printable(str(having[0].folder))
            note = f"claims: {first} is the base model for {place}; {others} would do as well"
            notes += [note] if note not in notes else []
        before, now = (normalised(kernel, params, notes) for kernel in (having[0], after))
        if before is not None and now is not None:
            both.append(BeforeAfter(having[0], after, params, (before, now)))
    return both


def normalised(measured: MeasuredKernel, params: str, notes: list[str]) -> np.ndarray | None:
    """The whole matrix as its evaluation normalised it; None, with a note, if it is missing."""
    path = measured.folder / "kernel" / f"{params}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            norms = file.get_tensor("norms").double()
            ids = tuple((file.metadata() or {}).get("ids", "").split("\n"))
        if list(ids) != measured.kernel.ids or norms.shape != (len(ids), len(ids)):
            raise ValueError("it is of other prompts than metrics.json tells")
        matrix = ntk.normalised(norms, measured.kernel.normalise).numpy()
        if not np.isfinite(matrix).all():
            raise ValueError("it has values that are not finite")
    except FileNotFoundError:
        note = f"{printable(str(path))}: missing; no claim is measured on it"
        notes += [note] if note not in notes else []
        return None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        why = single_line(error, longest=160)
        raise DataError(f"{path}: damaged ({why}); delete it, or evaluate again") from error
    return matrix


ABSENT = "not measured"
CLAIMS = {
    "joint_movement": "Refusal of toxic and of seemingly toxic prompts moves together over SFT",
    "within_rises": "The kernel within a class rises in stage one",
    "cross_falls": "The kernel across the two classes falls in stage one",
    "cross_falls_more": "The kernel across the classes falls more than the kernel within them",
    "base_asymmetry": "In the base model K(seemingly toxic, normal) exceeds K(normal, normal)",
    "size_of_change": "‖K‖ predicts how much one SGD step changes other prompts (Eq. 2, 3)",
    "signed_change": "−ηAKG predicts the signed change by one SGD step (Eq. 2, 3)",
    "refusal_spreads": "One step on a toxic prompt raises the refusal token on seemingly toxic "
    "prompts more than on normal ones",
    "proposition_1": "Proposition 1: ‖K‖ over the trunk follows the states at block ℓ",
}
COMMANDS = {  # what measures a claim
    "joint_movement": "python train.py tracking.quantities=[refusal_probability]",
    **dict.fromkeys(
        ("within_rises", "cross_falls", "cross_falls_more"),
        "python eval.py model=<name> tasks=[kernel], then "
        "python eval.py run={run} stage=contrastive tasks=[kernel]",
    ),
    "base_asymmetry": "python eval.py model=<name> tasks=[kernel]",
    **dict.fromkeys(
        ("size_of_change", "signed_change", "refusal_spreads"),
        "python eval.py run={run} tasks=[claims]",
    ),
}
STATES = {  # Proposition 1 is told before and after stage one
    "base": "python eval.py model=<name> tasks=[claims]",
    "contrastive": "python eval.py run={run} stage=contrastive tasks=[claims]",
}


@dataclass(frozen=True)
class ClaimRow:
    """A claim of one run or evaluation; without data its `command` makes them."""

    claim: str
    verdict: str
    sentence: str
    command: str = ""
    run: str = ""
    model: str = ""
    params: str = ""
    measured: Interval | None = None
    above: bool = True  # the claimed side of 0
    beside: tuple[str, Interval] | None = None
    source: str = ""


def kernel_of(cell: KindPair) -> str:
    """`K(toxic, normal)`: observer, then trained."""
    return f"K({', '.join(kind.replace('_', ' ') for kind in cell)})"


def number(measured: Interval, *, signed: bool = False) -> str:
    """`0.52 [0.41, 0.63]`, with two digits of the interval's width and at least two decimals."""
    if not all(map(math.isfinite, vars(measured).values())):
        return "undefined"
    width = measured.high - measured.low or abs(measured.estimate) or 1.0
    places = min(max(2, 1 - math.floor(math.log10(width))), 8)
    sign = "+" if signed else ""
    estimate, low, high = (f"{end:{sign}.{places}f}" for end in vars(measured).values())
    return f"{estimate} [{low}, {high}]".replace("-", "−")


SEEMING, TOXIC, NORMAL = "seemingly_toxic", "toxic", "normal"
WITHIN: tuple[KindPair, ...] = ((SEEMING, SEEMING), (TOXIC, TOXIC))
CROSS: tuple[KindPair, ...] = ((SEEMING, TOXIC), (TOXIC, SEEMING))
# Within and across count alike, whatever their number of pairs.
MORE = {**dict.fromkeys(CROSS, 0.5), **dict.fromkeys(WITHIN, -0.5)}


def claim_rows(records: Sequence[RunRecord], notes: list[str]) -> list[ClaimRow]:
    """Every claim in the order of CLAIMS; what could not be read or is missing goes to `notes`."""
    called = {run.folder: name for run, name in zip(records, names(records), strict=True)}
    curves = [(run, prompt_curves(run)) for run in records]
    rows = [_movement(run, own, called[run.folder]) for run, own in curves if own]
    for pair in pairs(records, notes):
        rows += _stage_one(pair, called[pair.after.run.folder])
    for base in base_kernels(records):
        rows += _base(base, notes)
    steps = [(run, e) for run in records for e in run.evaluations if e.claims and unedited(e)]
    for run, evaluation in steps:
        rows += _one_step(name_of_weights(called[run.folder], run, evaluation), evaluation, notes)
    # one base model may have been measured in several folders
    rows = list({(row.claim, row.sentence): row for row in map(_of_numbers, rows)}.values())
    for claim, methods in (
        ("joint_movement", ("stl", "stl_aug", "dcr")),
        ("within_rises", ("dcr",)),
    ):
        have = {row.run for row in rows if row.claim == claim}
        notes += [  # on every run that lacks what others have
            f"claims: {CLAIMS[claim]}: {ABSENT} in {folders([run])}"
            for run in records
            if have and config_of(run, "method") in methods and called[run.folder] not in have
        ]
    have = {row.claim for row in rows}
    lacking = [(claim, command) for claim, command in COMMANDS.items() if claim not in have]
    of_trunk = {e.weights for _, e in steps if any(p.startswith("trunk") for p in scores(e)[0])}
    lacking += [("proposition_1", STATES[w]) for w in STATES if w not in of_trunk]
    dcr = [run for run in records if config_of(run, "method") == "dcr"]
    for claim, command in lacking:
        # stage one is what a run of another method lacks
        able = dcr if "stage=contrastive" in command else dcr or list(records)
        command = command.format(run=folders(able[:1]) or "<dcr run>")
        rows.append(ClaimRow(claim, ABSENT, f"run {command}", command))
    return sorted(rows, key=lambda row: list(CLAIMS).index(row.claim))


def _of_numbers(row: ClaimRow) -> ClaimRow:
    """Without an interval of numbers there is nothing to judge by."""
    measured = row.measured
    if measured and all(map(math.isfinite, vars(measured).values())):
        return row
    own = ", ".join(filter(None, (row.run, row.params)))
    sentence = f"{own}: cannot be told, since a curve is flat or a kind has too few prompts"
    return replace(row, verdict=OPEN, sentence=sentence, beside=None)


def _movement(run: RunRecord, curves: PromptCurves, name: str) -> ClaimRow:
    of = [kind for kind, values in curves.values.items() for _ in range(values.shape[1])]
    drawn = draws(of)

    def together(*kinds: str) -> Interval:
        first, second = (curves.values[kind] for kind in kinds)
        return correlation(first, second, (drawn[kinds[0]], drawn[kinds[1]]))

    measured = together(TOXIC, SEEMING)
    sentence = (
        f"{name}: at {len(curves.steps)} steps of SFT the mean refusal probabilities of "
        f"{of.count(TOXIC)} toxic and {of.count(SEEMING)} seemingly toxic prompts correlate with "
        f"r = {number(measured)} (claimed: above 0)"
    )
    beside = None
    if NORMAL in curves.values:
        beside = ("seemingly toxic with normal", together(SEEMING, NORMAL))
        sentence += f"; as a control, seemingly toxic with normal: r = {number(beside[1])}"
    return ClaimRow(
        "joint_movement", verdict(measured), sentence, run=name,
        model=config_of(run, "model"), measured=measured, beside=beside,
        source=curves.source,
    )  # fmt: skip


def _stage_one(pair: BeforeAfter, name: str) -> Iterator[ClaimRow]:
    kinds = pair.after.kernel.of
    before, after = pair.matrices
    if not {SEEMING, TOXIC} <= set(kinds):
        return
    drawn = draws(kinds)
    until = pair.after.weights
    over = "stage one" if until in STAGES else f"stage one, up to its {until}"
    own = f"{name}, {pair.params}"
    source = " → ".join(printable(str(m.folder)) for m in (pair.before, pair.after))

    def row(claim: str, weights: dict[KindPair, float], change: str, above: bool) -> ClaimRow:
        measured = contrast(after - before, kinds, weights, drawn)
        words = "rise" if above else "fall"
        wanted = f"{change} {number(measured, signed=True)} over {over} (claimed: a {words})"
        return ClaimRow(
            claim, verdict(measured, above=above), f"{own}: {wanted}", run=name,
            model=pair.after.model, params=pair.params, measured=measured, above=above,
            source=source,
        )  # fmt: skip

    for claim, cells, above in (("within_rises", WITHIN, True), ("cross_falls", CROSS, False)):
        for cell in cells:
            was, now = (
                contrast(matrix, kinds, {cell: 1.0}, drawn).estimate for matrix in (before, after)
            )
            change = f"mean normalised ‖{kernel_of(cell)}‖ goes from {was:.2f} to {now:.2f}, by"
            yield row(claim, {cell: 1.0}, change, above)
    change = "beyond the mean of the two kernels within a class, the two across change by"
    yield row("cross_falls_more", MORE, change, above=False)


def _base(base: MeasuredKernel, notes: list[str]) -> Iterator[ClaimRow]:
    kinds = base.kernel.of
    name = ", ".join(filter(None, (STAGES["base"], base.model)))
    if not {SEEMING, NORMAL} <= set(kinds):
        return
    drawn = draws(kinds)
    cells = (SEEMING, NORMAL), (NORMAL, NORMAL)
    for params in base.kernel.params:
        matrix = normalised(base, params, notes)
        if matrix is None:
            continue
        means = [contrast(matrix, kinds, {cell: 1.0}, drawn) for cell in cells]
        measured = contrast(matrix, kinds, dict(zip(cells, (1.0, -1.0), strict=True)), drawn)
        means_text = " and ".join(
            f"{kernel_of(cell)} is {mean.estimate:.2f}"
            for cell, mean in zip(cells, means, strict=True)
        )
        yield ClaimRow(
            "base_asymmetry", verdict(measured),
            f"{name}, {params}: {means_text}, a difference of {number(measured, signed=True)} "
            "(claimed: above 0)",
            run=name, model=base.model, params=params, measured=measured,
            source=printable(str(base.folder)),
        )  # fmt: skip


STATISTICS = {  # of single steps, by choice of parameters: where the block `claims` has them
    "norm": ("norm", "within"),
    "signed": ("prediction", "pearson"),
    "slope": ("prediction", "slope"),
    "dot": ("states", "dot"),
    "cosine": ("states", "cosine"),
}


def scores(evaluation: Evaluation) -> tuple[dict[str, dict[str, Interval]], dict[str, Interval]]:
    """STATISTICS by choice of parameters, and the change by kind; without what is not finite."""

    def finite(estimates: Mapping[str, Estimate | None]) -> dict[str, Interval]:
        known = {key: interval(ends) for key, ends in estimates.items() if ends}
        return {key: i for key, i in known.items() if all(map(math.isfinite, vars(i).values()))}

    block = evaluation.claims or OneStep(params={})
    by_params = {
        params: finite({key: getattr(getattr(of, k), n) for key, (k, n) in STATISTICS.items()})
        for params, of in block.params.items()
    }
    return by_params, finite(block.change)


def _one_step(name: str, evaluation: Evaluation, notes: list[str]) -> Iterator[ClaimRow]:
    """What one step shows; what the block lacks is noted."""
    params_scores, change = scores(evaluation)
    model, source = evaluation.model or "", printable(str(evaluation.folder))
    place = printable(str(evaluation.folder / "metrics.json"))
    for params, known in params_scores.items():
        lacking = [key for key in STATISTICS if key not in known]
        notes += [f"{place}: claims.params.{params} has no readable {key}" for key in lacking]
    lacking = [kind for kind in (SEEMING, NORMAL) if kind not in change]
    notes += [f"{place}: claims.change has no readable {kind}" for kind in lacking]

    def row(claim: str, score: str, statistic: str) -> Iterator[ClaimRow]:
        for params, known in params_scores.items():
            if score in known and (claim != "proposition_1" or params.startswith("trunk")):
                measured, slope = known[score], known.get("slope")
                beside = ("slope", slope) if score == "signed" and slope else None
                more = f"; {number(slope)} of change per predicted" if beside and slope else ""
                yield ClaimRow(
                    claim, verdict(measured),
                    f"{name}, {params}: {statistic} {number(measured)} (claimed: above 0){more}",
                    run=name, model=model, params=params, measured=measured, beside=beside,
                    source=source,
                )  # fmt: skip

    trained = evaluation.claims.trained if evaluation.claims else None
    count = len(trained) if isinstance(trained, list) else trained
    on = "a toxic prompt" if count is None else f"each of {count} toxic prompts"
    yield from row(
        "size_of_change", "norm",
        f"after one step on {on}, the rank correlation of ‖K‖ with the size of other prompts' "
        "changes is",
    )  # fmt: skip
    yield from row(
        "signed_change", "signed", "the correlation of −ηAKG with the actual signed change is"
    )
    if {SEEMING, NORMAL} <= change.keys():
        seeming, normal = change[SEEMING], change[NORMAL]
        more = HOLDS if seeming.low > normal.high else FAILS if seeming.high < normal.low else OPEN
        both = {more, verdict(seeming)}
        yield ClaimRow(
            "refusal_spreads", next((worse for worse in (FAILS, OPEN) if worse in both), HOLDS),
            f"{name}: one step on a toxic prompt changes log p of the refusal token by "
            f"{number(seeming, signed=True)} on seemingly toxic and by "
            f"{number(normal, signed=True)} on normal prompts (claimed: a rise, and more on the "
            "first)",
            run=name, model=model, measured=seeming, beside=("normal", normal), source=source,
        )  # fmt: skip
    for score, states in (("dot", "the inner product h′ᵀh"), ("cosine", "the cosine")):
        statistic = f"the rank correlation of ‖K‖ with {states} of two prompts' states is"
        yield from row("proposition_1", score, statistic)


FILE = "claims.csv"
RULE = (
    "A claim holds where its 95% bootstrap interval over prompts lies on the claimed side of 0, "
    "does not hold where it lies on the other side, and is undecided where it contains 0; two "
    "means differ where their intervals do not meet."
)
HEADER = ("claim", "verdict", "run", "model", "params", "estimate", "low", "high", "boundary",
          "claimed_side", "beside", "beside_estimate", "beside_low", "beside_high", "source",
          "sentence", "command")  # fmt: skip


def by_claim(rows: Sequence[ClaimRow]) -> list[tuple[str, list[ClaimRow]]]:
    """Each claim's words with its rows."""
    of_claim = [(words, [r for r in rows if r.claim == claim]) for claim, words in CLAIMS.items()]
    return [(words, own) for words, own in of_claim if own]


def lines(rows: Sequence[ClaimRow], width: int) -> list[str]:
    """For the terminal, folded to its width."""
    longest = max(map(len, (HOLDS, FAILS, OPEN, ABSENT)))
    folded = ["", "Claims of the paper", *textwrap.wrap(RULE, width)]
    for words, own in by_claim(rows):
        folded += ["", *textwrap.wrap(words, width)]
        for row in own:
            folded += textwrap.wrap(
                f"  {row.verdict.ljust(longest)}  {row.sentence}",
                width,
                subsequent_indent=" " * (longest + 4),
                break_long_words=False,
                break_on_hyphens=False,
            )
    return folded


def csv_text(rows: Sequence[ClaimRow]) -> str:
    """One claim of one run or evaluation a line, in full precision."""
    values = [
        (
            row.claim, row.verdict, row.run, row.model, row.params,
            *(vars(row.measured).values() if row.measured else ("",) * 3),
            *((0, "above" if row.above else "below") if row.measured else ("", "")),
            *((row.beside[0], *vars(row.beside[1]).values()) if row.beside else ("",) * 4),
            row.source, row.sentence, row.command,
        )
        for row in rows
    ]  # fmt: skip
    return results.csv_text(pd.DataFrame(values, columns=list(HEADER), dtype=object))
