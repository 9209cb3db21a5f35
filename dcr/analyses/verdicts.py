"""The report's section on the paper's claims: one rule judges each, and a sentence tells it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open

from dcr.analyses import ntk
from dcr.core.config import DataError
from dcr.core.results.schema import Estimate, Kernel, RefusalProbability, interval
from dcr.core.statistics import Interval, percentiles
from dcr.core.text import printable, single_line
from dcr.inference import resampled_groups
from dcr.report.curves import KEPT, SCORED, STAGES, folders, name_of_weights, named, snapshots
from dcr.report.records import Evaluation, RunRecord, about, config_of, unedited
from dcr.report.sections import Selection
from dcr.report.writing import TextTable

SEED = 0  # of the bootstrap, fixed so that a report is reproducible
FLAT = 1e-12  # of a curve's size: a smaller movement is rounding
HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"
KindPair = tuple[str, str]  # observer kind, trained kind

Draws = Int[np.ndarray, "resamples prompts"]
ByPrompt = Float[np.ndarray, "steps prompts"]


def draws(kinds: Sequence[str], seed: int = SEED) -> dict[str, Draws]:
    """The draws of `ntk.mean_by_kind` for each kind, in the order in which kinds appear."""
    return resampled_groups(kinds, np.random.default_rng(seed))


def correlation(first: ByPrompt, second: ByPrompt, drawn: tuple[Draws, Draws]) -> Interval:
    """Pearson's r over steps of two mean curves, each over prompts of its own.

    A flat curve gives nan; draws in which one is flat are left out.
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

    The means are those of `ntk.mean_by_kind`, with draws that all cells share: one cell with weight
    1 has the same interval there. Since means are linear, the difference of two matrices over the
    same prompts gives a paired comparison. A kind without a pair gives nan; draws of a single
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
    """HOLDS if the whole interval lies on the claimed side of 0, FAILS on the other, else OPEN."""
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
    """A kernel whose whole matrix is in `folder`, with its run and weights."""

    run: RunRecord
    weights: str  # in words
    model: str
    folder: Path
    kernel: Kernel

    @property
    def terms(self) -> tuple[object, ...]:
        """The settings that two kernels must share to be compared."""
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
    """Reads the curves from tracking or else from snapshots; None with fewer than three steps."""
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
    """The kernels of a run's unsteered evaluations of these weights."""
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
    """Kernels of base models, from evaluations or else from tracking before a first step.

    Each model and choice of prompts has one: the first.
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
    """Kernels before and after stage one, from evaluations or else tracking's first and last."""
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
    """The whole matrix as its evaluation normalised it; None, with a note, if it is missing.

    Raises DataError for a damaged one.
    """
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
STAGE_ONE = (
    "python eval.py model=<name> tasks=[kernel], then "
    "python eval.py run={run} stage=contrastive tasks=[kernel]"
)
ONE_STEP = "python eval.py run={run} tasks=[claims]"
COMMANDS = {  # what measures a claim
    "joint_movement": "python train.py tracking.quantities=[refusal_probability]",
    **dict.fromkeys(("within_rises", "cross_falls", "cross_falls_more"), STAGE_ONE),
    "base_asymmetry": "python eval.py model=<name> tasks=[kernel]",
    **dict.fromkeys(("size_of_change", "signed_change", "refusal_spreads"), ONE_STEP),
}
STATES = {  # Proposition 1 is measured before and after stage one
    "base": "python eval.py model=<name> tasks=[claims]",
    "contrastive": "python eval.py run={run} stage=contrastive tasks=[claims]",
}


@dataclass(frozen=True)
class ClaimRow:
    """A claim of one run or evaluation; without data its `command` makes them."""

    claim: str
    quantity: str  # in words, what was measured
    measured: Interval | None = None
    run: str = ""
    model: str = ""
    params: str = ""
    source: str = ""
    above: bool = True  # the claimed side of 0
    beside: tuple[str, Interval] | None = None
    command: str = ""
    judged: str = ""  # instead of by the rule

    @property
    def known(self) -> bool:
        return bool(self.measured and all(map(math.isfinite, vars(self.measured).values())))

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return ABSENT
        return (self.judged or verdict(self.measured, above=self.above)) if self.known else OPEN

    @property
    def sentence(self) -> str:
        """Says whose quantity it is, which, and how much."""
        own = ", ".join(filter(None, (self.run, self.params)))
        if self.measured is None:
            return f"run {self.command}"
        if not self.known:
            return f"{own}: cannot be told, since a curve is flat or a kind has too few prompts"
        text = f"{own}: {self.quantity} is {number(self.measured)}"
        return text + (f"; {self.beside[0]}: {number(self.beside[1])}" if self.beside else "")


def kernel_of(cell: KindPair) -> str:
    """`K(toxic, normal)`: observer, then trained."""
    return f"K({', '.join(kind.replace('_', ' ') for kind in cell)})"


def number(measured: Interval) -> str:
    """`0.52 [0.41, 0.63]`, with two digits of the interval's width and at least two decimals."""
    if not all(map(math.isfinite, vars(measured).values())):
        return "undefined"
    width = measured.high - measured.low or abs(measured.estimate) or 1.0
    places = min(max(2, 1 - math.floor(math.log10(width))), 8)
    estimate, low, high = (f"{end:.{places}f}" for end in vars(measured).values())
    return f"{estimate} [{low}, {high}]".replace("-", "−")


SEEMING, TOXIC, NORMAL = "seemingly_toxic", "toxic", "normal"
WITHIN: tuple[KindPair, ...] = ((SEEMING, SEEMING), (TOXIC, TOXIC))
CROSS: tuple[KindPair, ...] = ((SEEMING, TOXIC), (TOXIC, SEEMING))
# Within and across count alike, whatever their number of pairs.
MORE = {**dict.fromkeys(CROSS, 0.5), **dict.fromkeys(WITHIN, -0.5)}


def claim_rows(records: Sequence[RunRecord], notes: list[str]) -> list[ClaimRow]:
    """Every claim in the order of CLAIMS; `notes` gets a line for each missing measurement."""
    name_of = {run.folder: name for run, name in named(records)}
    curves = [(run, prompt_curves(run)) for run in records]
    rows = [_movement(run, own, name_of[run.folder]) for run, own in curves if own]
    for pair in pairs(records, notes):
        rows += _stage_one(pair, name_of[pair.after.run.folder])
    for base in base_kernels(records):
        rows += _base(base, notes)
    steps = [(run, e) for run in records for e in run.evaluations if e.claims and unedited(e)]
    for run, evaluation in steps:
        rows += _one_step(name_of_weights(name_of[run.folder], run, evaluation), evaluation, notes)
    # one base model may have been measured in several folders
    rows = list({(row.claim, row.sentence): row for row in rows}.values())
    for claim, methods in (
        ("joint_movement", ("stl", "stl_aug", "dcr")),
        ("within_rises", ("dcr",)),
    ):
        have = {row.run for row in rows if row.claim == claim}
        notes += [  # on every run that lacks what others have
            f"claims: {CLAIMS[claim]}: {ABSENT} in {folders([run])}"
            for run in records
            if have and config_of(run, "method") in methods and name_of[run.folder] not in have
        ]
    have = {row.claim for row in rows}
    lacking = [(claim, command) for claim, command in COMMANDS.items() if claim not in have]
    over_trunk = {
        e.weights
        for _, e in steps
        if e.claims and any(params.startswith("trunk") for params in e.claims.params)
    }
    lacking += [("proposition_1", STATES[w]) for w in STATES if w not in over_trunk]
    dcr = [run for run in records if config_of(run, "method") == "dcr"]
    for claim, command in lacking:
        # a run of another method has no stage one
        able = dcr if "stage=contrastive" in command else dcr or list(records)
        rows.append(
            ClaimRow(claim, "", command=command.format(run=folders(able[:1]) or "<dcr run>"))
        )
    return sorted(rows, key=lambda row: list(CLAIMS).index(row.claim))


def _movement(run: RunRecord, curves: PromptCurves, name: str) -> ClaimRow:
    kinds = [kind for kind, values in curves.values.items() for _ in range(values.shape[1])]
    drawn = draws(kinds)

    def together(first: str, second: str) -> Interval:
        both = curves.values[first], curves.values[second]
        return correlation(*both, (drawn[first], drawn[second]))

    beside = None
    if NORMAL in curves.values:
        beside = ("seemingly toxic with normal", together(SEEMING, NORMAL))
    return ClaimRow(
        "joint_movement",
        f"over {len(curves.steps)} steps of SFT the correlation of the mean probabilities of "
        f"{kinds.count(TOXIC)} toxic and {kinds.count(SEEMING)} seemingly toxic prompts",
        together(TOXIC, SEEMING), name, config_of(run, "model"), source=curves.source,
        beside=beside,
    )  # fmt: skip


def _stage_one(pair: BeforeAfter, name: str) -> Iterator[ClaimRow]:
    kinds, (before, after) = pair.after.kernel.of, pair.matrices
    if not {SEEMING, TOXIC} <= set(kinds):
        return
    drawn, until = draws(kinds), pair.after.weights
    over = "stage one" if until in STAGES else f"stage one, up to its {until},"
    source = " → ".join(printable(str(m.folder)) for m in (pair.before, pair.after))
    about_pair = (name, pair.after.model, pair.params, source)
    for claim, cells in (("within_rises", WITHIN), ("cross_falls", CROSS)):
        for cell in cells:
            was = contrast(before, kinds, {cell: 1.0}, drawn).estimate
            change = contrast(after - before, kinds, {cell: 1.0}, drawn)
            what = f"the change of mean ‖{kernel_of(cell)}‖ from {was:.2f} over {over}"
            yield ClaimRow(claim, what, change, *about_pair, above=claim == "within_rises")
    change = contrast(after - before, kinds, MORE, drawn)
    what = f"the change across less that within a class over {over}"
    yield ClaimRow("cross_falls_more", what, change, *about_pair, above=False)


def _base(base: MeasuredKernel, notes: list[str]) -> Iterator[ClaimRow]:
    kinds = base.kernel.of
    if not {SEEMING, NORMAL} <= set(kinds):
        return
    name = ", ".join(filter(None, (STAGES["base"], base.model)))
    drawn, cells = draws(kinds), ((SEEMING, NORMAL), (NORMAL, NORMAL))
    what = f"mean ‖{kernel_of(cells[0])}‖ − ‖{kernel_of(cells[1])}‖"
    for params in base.kernel.params:
        matrix = normalised(base, params, notes)
        if matrix is not None:
            measured = contrast(matrix, kinds, dict(zip(cells, (1.0, -1.0), strict=True)), drawn)
            source = printable(str(base.folder))
            yield ClaimRow("base_asymmetry", what, measured, name, base.model, params, source)


ONE_STEP_STATISTICS = {  # claim and quantity by the place in the block `claims`
    ("norm", "within"): (
        "size_of_change",
        "after one step on {} the rank correlation of ‖K‖ with the size of other prompts' changes",
    ),
    ("prediction", "pearson"): (
        "signed_change",
        "after one step on {} the correlation of −ηAKG with the actual signed change",
    ),
    ("states", "dot"): (
        "proposition_1",
        "the rank correlation of ‖K‖ with the inner product h′ᵀh of two prompts' states",
    ),
    ("states", "cosine"): (
        "proposition_1",
        "the rank correlation of ‖K‖ with the cosine of two prompts' states",
    ),
}


def _finite(estimate: Estimate | None) -> Interval | None:
    ends = interval(estimate) if estimate else None
    return ends if ends and all(map(math.isfinite, vars(ends).values())) else None


def _one_step(name: str, evaluation: Evaluation, notes: list[str]) -> Iterator[ClaimRow]:
    """One row a statistic and choice of parameters; `notes` names the statistics that lack."""
    block, source = evaluation.claims, printable(str(evaluation.folder))
    assert block is not None
    about_step, file = (name, evaluation.model or ""), f"{source}/metrics.json"
    on = f"each of {len(block.trained)} toxic prompts"
    for (part, key), (claim, quantity) in ONE_STEP_STATISTICS.items():
        for params, own in block.params.items():
            measured = _finite(getattr(getattr(own, part), key))
            if measured is None:
                notes.append(f"{file}: claims.params.{params}.{part} has no readable {key}")
            elif claim != "proposition_1" or params.startswith("trunk"):
                slope = _finite(own.prediction.slope) if claim == "signed_change" else None
                beside = ("slope", slope) if slope else None
                quantity = quantity.format(on)
                yield ClaimRow(claim, quantity, measured, *about_step, params, source, True, beside)
    change = {kind: _finite(estimate) for kind, estimate in block.change.items()}
    seeming, normal = change.get(SEEMING), change.get(NORMAL)
    lacking = [kind for kind in (SEEMING, NORMAL) if not change.get(kind)]
    notes += [f"{file}: claims.change has no readable {kind}" for kind in lacking]
    if seeming and normal:
        more = HOLDS if seeming.low > normal.high else FAILS if seeming.high < normal.low else OPEN
        both = {more, verdict(seeming)}
        yield ClaimRow(
            "refusal_spreads",
            "the change of the refusal token's log p by one step, on seemingly toxic prompts,",
            seeming, *about_step, source=source, beside=("normal", normal),
            judged=next((worse for worse in (FAILS, OPEN) if worse in both), HOLDS),
        )  # fmt: skip


HEADER = ("claim", "verdict", "run", "model", "params", "estimate", "low", "high", "boundary",
          "claimed_side", "beside", "beside_estimate", "beside_low", "beside_high", "source",
          "sentence", "command")  # fmt: skip


def claims(chosen: Selection) -> TextTable:
    """A row for each claim of each run or evaluation."""
    rows = claim_rows(chosen.records, chosen.notes)
    shown, before = [], ""
    for row in rows:
        shown.append((CLAIMS[row.claim] if row.claim != before else "", row.verdict, row.sentence))
        before = row.claim
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
    return TextTable(
        "",
        pd.DataFrame(shown, columns=["claim", "verdict", "measured"], dtype=object),
        values=pd.DataFrame(values, columns=list(HEADER), dtype=object),
    )
