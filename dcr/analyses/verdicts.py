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
from dcr.core.statistics import Interval, percentiles
from dcr.ending import printable, single_line
from dcr.inference import resampled_groups
from dcr.report import columns
from dcr.report.columns import WEIGHTS, named
from dcr.report.curves import KEPT, SCORED
from dcr.report.records import Evaluation, RunRecord, folders
from dcr.report.sections import Selection
from dcr.report.writing import TextTable
from dcr.results.schema import Estimate, Kernel, interval

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
        """The model and the settings that two kernels must share to be compared."""
        kernel = self.kernel
        return self.model, tuple(kernel.ids), tuple(kernel.of), kernel.top_k, kernel.normalise


def prompt_curves(run: RunRecord) -> tuple[int, dict[str, np.ndarray], str] | None:
    """Plain refusal probabilities `[step, prompt]` by kind, their number of steps and source.

    They are tracking's or else those of snapshots, of the prompts that every step measured. None
    with fewer than three steps, since two points always lie on a line.
    """
    tracked = [step for step in run.tracked if step.stage == "sft"]
    scored = run.snapshots(lambda e: e.refusal_probability)
    for source, measures in ((KEPT, tracked), (SCORED, scored)):
        by_step = {m.step or 0: m.refusal_probability for m in measures if m.refusal_probability}
        steps: list[dict[tuple[str, str], float]] = [
            {(p.kind, p.id): p.plain for p in by_step[step].values if p.plain is not None}
            for step in sorted(by_step)
        ]
        shared = [key for key in (steps[0] if steps else ()) if all(key in of for of in steps)]
        values = {
            kind: np.array([[of[key] for key in shared if key[0] == kind] for of in steps])
            for kind in dict.fromkeys(kind for kind, _ in shared)
        }
        if len(steps) > 2 and {TOXIC, SEEMING} <= values.keys():
            return len(steps), values, source
    return None


def evaluated(records: Sequence[RunRecord], weights: str) -> list[MeasuredKernel]:
    """The kernels of unsteered evaluations of these weights."""
    return [
        MeasuredKernel(column.run, weights, column.about("model"), e.folder, e.kernel)
        for column in columns.evaluated(records)
        for e in [column.evaluation]
        if e.weights == weights and e.kernel and e.kernel.ids and e.unedited
    ]


def tracked(run: RunRecord, stage: str) -> list[MeasuredKernel]:
    """Kernels that tracking kept over a stage, by step."""
    return [
        MeasuredKernel(run, f"step {t.step}", run.about("model"), t.folder, t.kernel)
        for t in run.tracked
        if t.stage == stage and t.kernel and t.kernel.ids
    ]


def base_kernels(records: Sequence[RunRecord]) -> list[MeasuredKernel]:
    """Kernels of base models, from evaluations or else from tracking before a first step.

    Each model and choice of prompts has one: the first.
    """
    bases = evaluated(records, "base")
    for run in records if not bases else ():
        first = tracked(run, "contrastive")[:1]
        if not first and run.about("method") != "dcr":
            first = tracked(run, "sft")[:1]
        bases += [measured for measured in first if measured.weights == "step 0"]
    distinct: dict[tuple[object, ...], MeasuredKernel] = {}
    for measured in bases:
        distinct.setdefault((*measured.terms, *measured.kernel.params), measured)
    return list(distinct.values())


def pairs(
    records: Sequence[RunRecord], notes: list[str]
) -> Iterator[tuple[MeasuredKernel, MeasuredKernel, str]]:
    """Kernels before and after stage one with what both are over, from evaluations or tracking."""
    bases = evaluated(records, "base")
    for run in records:
        found, steps = False, tracked(run, "contrastive")
        for after in evaluated([run], "contrastive"):
            for params in after.kernel.params:
                before = [b for b in bases if b.terms == after.terms and params in b.kernel.params]
                if before:
                    found = True
                    yield before[0], after, params
                else:
                    notes.append(
                        f"claims: {printable(str(after.folder))}: beside it no kernel of the base "
                        f"model over {params} and the same prompts, entk.top_k and "
                        "entk.normalise; run python eval.py model=<name> tasks=[kernel] with the "
                        "same data and entk settings"
                    )
        if not found and len(steps) > 1 and steps[0].weights == "step 0":
            for params in steps[-1].kernel.params:
                if steps[0].terms == steps[-1].terms and params in steps[0].kernel.params:
                    yield steps[0], steps[-1], params


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
TRACK = "python train.py tracking.quantities=[refusal_probability]"
BASE = "python eval.py model=<name> tasks=[kernel]"
STAGE_ONE = f"{BASE}, then python eval.py run={{run}} stage=contrastive tasks=[kernel]"
ONE_STEP = "python eval.py run={run} tasks=[claims]"
CLAIMS = {  # in words, and the command that measures it
    "joint_movement": (
        "Refusal of toxic and of seemingly toxic prompts moves together over SFT",
        TRACK,
    ),
    "within_rises": ("The kernel within a class rises in stage one", STAGE_ONE),
    "cross_falls": ("The kernel across the two classes falls in stage one", STAGE_ONE),
    "cross_falls_more": (
        "The kernel across the classes falls more than the kernel within them",
        STAGE_ONE,
    ),
    "base_asymmetry": (
        "In the base model K(seemingly toxic, normal) exceeds K(normal, normal)",
        BASE,
    ),
    "size_of_change": (
        "‖K‖ predicts how much one SGD step changes other prompts (Eq. 2, 3)",
        ONE_STEP,
    ),
    "signed_change": ("−ηAKG predicts the signed change by one SGD step (Eq. 2, 3)", ONE_STEP),
    "refusal_spreads": (
        "One step on a toxic prompt raises the refusal token on seemingly toxic prompts more than "
        "on normal ones",
        ONE_STEP,
    ),
    "proposition_1": (
        "Proposition 1: ‖K‖ over the trunk follows the states at block ℓ",
        "python eval.py run={run} stage=contrastive tasks=[claims]",
    ),
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
    def verdict(self) -> str:
        if self.measured is None:
            return ABSENT
        return self.judged or verdict(self.measured, above=self.above)

    @property
    def sentence(self) -> str:
        """Says whose quantity it is, which, and how much."""
        if self.measured is None:
            return f"run {self.command}"
        own = ", ".join(filter(None, (self.run, self.params)))
        if not _known(self.measured):
            return f"{own}: cannot be told, since a curve is flat or a kind has too few prompts"
        text = f"{own}: {self.quantity} is {number(self.measured)}"
        return text + (f"; {self.beside[0]}: {number(self.beside[1])}" if self.beside else "")


def _known(measured: Interval) -> bool:
    return all(map(math.isfinite, vars(measured).values()))


def number(measured: Interval) -> str:
    """`0.52 [0.41, 0.63]`, with two digits of the interval's width and at least two decimals."""
    if not _known(measured):
        return "undefined"
    width = measured.high - measured.low or abs(measured.estimate) or 1.0
    places = min(max(2, 1 - math.floor(math.log10(width))), 8)
    estimate, low, high = (f"{end:.{places}f}" for end in vars(measured).values())
    return f"{estimate} [{low}, {high}]".replace("-", "−")


def kernel_of(cell: KindPair) -> str:
    """`K(toxic, normal)`: observer, then trained."""
    return f"K({', '.join(kind.replace('_', ' ') for kind in cell)})"


SEEMING, TOXIC, NORMAL = "seemingly_toxic", "toxic", "normal"
WITHIN: tuple[KindPair, ...] = ((SEEMING, SEEMING), (TOXIC, TOXIC))
CROSS: tuple[KindPair, ...] = ((SEEMING, TOXIC), (TOXIC, SEEMING))
# Within and across count alike, whatever their number of pairs.
MORE = {**dict.fromkeys(CROSS, 0.5), **dict.fromkeys(WITHIN, -0.5)}


def claim_rows(records: Sequence[RunRecord], notes: list[str]) -> list[ClaimRow]:
    """Every claim in the order of CLAIMS; `notes` gets a line for each missing measurement."""
    name_of = {run.folder: name for run, name in named(records)}
    rows = [row for run in records for row in _movement(run, name_of[run.folder])]
    for before, after, params in pairs(records, notes):
        rows += _stage_one(before, after, params, name_of[after.run.folder], notes)
    for base in base_kernels(records):
        rows += _base(base, notes)
    for column in columns.evaluated(records):
        if column.evaluation.claims and column.evaluation.unedited:
            name = columns.name_of_weights(name_of[column.run.folder], column)
            rows += _one_step(name, column.evaluation)
    # one base model may have been measured in several folders
    rows = list({(row.claim, row.sentence): row for row in rows}.values())
    dcr = [run for run in records if run.about("method") == "dcr"]
    for claim in CLAIMS.keys() - {row.claim for row in rows}:
        command = CLAIMS[claim][1]
        # a run of another method has no stage one
        able = dcr if "stage=contrastive" in command else dcr or list(records)
        command = command.format(run=folders(able[:1]) or "<dcr run>")
        rows.append(ClaimRow(claim, "", command=command))
    return sorted(rows, key=lambda row: list(CLAIMS).index(row.claim))


def _movement(run: RunRecord, name: str) -> Iterator[ClaimRow]:
    if (measured := prompt_curves(run)) is None:
        return
    steps, values, source = measured
    kinds = [kind for kind, curves in values.items() for _ in range(curves.shape[1])]
    drawn = draws(kinds)

    def together(first: str, second: str) -> Interval:
        return correlation(values[first], values[second], (drawn[first], drawn[second]))

    beside = None
    if NORMAL in values:
        beside = ("seemingly toxic with normal", together(SEEMING, NORMAL))
    what = (
        f"over {steps} steps of SFT the correlation of the mean probabilities of "
        f"{kinds.count(TOXIC)} toxic and {kinds.count(SEEMING)} seemingly toxic prompts"
    )
    about_run, both = (name, run.about("model")), together(TOXIC, SEEMING)
    yield ClaimRow("joint_movement", what, both, *about_run, source=source, beside=beside)


def _stage_one(
    before: MeasuredKernel, after: MeasuredKernel, params: str, name: str, notes: list[str]
) -> Iterator[ClaimRow]:
    kinds, drawn = after.kernel.of, draws(after.kernel.of)
    was, now = (normalised(kernel, params, notes) for kernel in (before, after))
    if was is None or now is None or not {SEEMING, TOXIC} <= set(kinds):
        return
    over = "stage one" if after.weights in WEIGHTS else f"stage one, up to its {after.weights},"
    source = " → ".join(printable(str(m.folder)) for m in (before, after))
    about_pair = (name, after.model, params, source)
    for claim, cells in (("within_rises", WITHIN), ("cross_falls", CROSS)):
        for cell in cells:
            start = contrast(was, kinds, {cell: 1.0}, drawn).estimate
            change = contrast(now - was, kinds, {cell: 1.0}, drawn)
            what = f"the change of mean ‖{kernel_of(cell)}‖ from {start:.2f} over {over}"
            yield ClaimRow(claim, what, change, *about_pair, above=claim == "within_rises")
    change = contrast(now - was, kinds, MORE, drawn)
    what = f"the change across less that within a class over {over}"
    yield ClaimRow("cross_falls_more", what, change, *about_pair, above=False)


def _base(base: MeasuredKernel, notes: list[str]) -> Iterator[ClaimRow]:
    kinds = base.kernel.of
    if not {SEEMING, NORMAL} <= set(kinds):
        return
    name = ", ".join(filter(None, (WEIGHTS["base"], base.model)))
    drawn, cells = draws(kinds), ((SEEMING, NORMAL), (NORMAL, NORMAL))
    what = f"mean ‖{kernel_of(cells[0])}‖ − ‖{kernel_of(cells[1])}‖"
    for params in base.kernel.params:
        matrix = normalised(base, params, notes)
        if matrix is not None:
            measured = contrast(matrix, kinds, dict(zip(cells, (1.0, -1.0), strict=True)), drawn)
            source = printable(str(base.folder))
            yield ClaimRow("base_asymmetry", what, measured, name, base.model, params, source)


ONE_STEP_STATISTICS = (  # claim, its place in the block `claims`, and the quantity in words
    ("size_of_change", "norm", "within",
     "rank correlation of ‖K‖ with the size of other prompts' changes"),
    ("signed_change", "prediction", "pearson",
     "correlation of −ηAKG with the actual signed change"),
    ("proposition_1", "states", "dot",
     "the rank correlation of ‖K‖ with the inner product h′ᵀh of two prompts' states"),
    ("proposition_1", "states", "cosine",
     "the rank correlation of ‖K‖ with the cosine of two prompts' states"),
)  # fmt: skip


def _one_step(name: str, evaluation: Evaluation) -> Iterator[ClaimRow]:
    """One row a readable statistic and choice of parameters."""
    block, source = evaluation.claims, printable(str(evaluation.folder))
    assert block is not None

    def finite(estimate: Estimate | None) -> Interval | None:
        known = interval(estimate) if estimate else None
        return known if known and _known(known) else None

    about_step = (name, evaluation.model or "")
    after = f"after one step on each of {len(block.trained)} toxic prompts the "
    for claim, part, key, quantity in ONE_STEP_STATISTICS:
        for params, own in block.params.items():
            measured, of_states = finite(getattr(own, part).get(key)), part == "states"
            if measured and (params.startswith("trunk") or not of_states):
                slope = finite(own.prediction.get("slope")) if claim == "signed_change" else None
                beside, what = slope and ("slope", slope), ("" if of_states else after) + quantity
                yield ClaimRow(claim, what, measured, *about_step, params, source, True, beside)
    seeming, normal = (finite(block.change.get(kind)) for kind in (SEEMING, NORMAL))
    if seeming and normal:
        more = HOLDS if seeming.low > normal.high else FAILS if seeming.high < normal.low else OPEN
        both = {more, verdict(seeming)}
        judged = FAILS if FAILS in both else OPEN if OPEN in both else HOLDS
        what = "the change of the refusal token's log p by one step, on seemingly toxic prompts,"
        beside = {"source": source, "beside": ("normal", normal), "judged": judged}
        yield ClaimRow("refusal_spreads", what, seeming, *about_step, **beside)


HEADER = ("claim", "verdict", "run", "model", "params", "estimate", "low", "high", "boundary",
          "claimed_side", "beside", "beside_estimate", "beside_low", "beside_high", "source",
          "sentence", "command")  # fmt: skip


def claims(chosen: Selection) -> TextTable:
    """Claims of the paper.

    A claim holds where its 95% bootstrap interval over prompts lies on the claimed side of 0, does
    not hold where it lies on the other side, and is undecided where it contains 0; two means differ
    where their intervals do not meet.
    """
    rows = claim_rows(chosen.records, chosen.notes)
    shown, before = [], ""
    for row in rows:
        words = CLAIMS[row.claim][0] if row.claim != before else ""
        shown.append((words, row.verdict, row.sentence))
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
