"""What claims are measured on: curves of single prompts, whole kernels over the same prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from dcr import ntk
from dcr.report.blocks import UNREADABLE, damaged
from dcr.report.entries import about, steering
from dcr.report.measurements import Kernel, Probability
from dcr.report.printing import printable
from dcr.report.records import Evaluation, RunRecord
from dcr.report.trajectories import KEPT, SCORED, config_of, snapshots

FEWEST_STEPS = 3  # two points always lie on a line


@dataclass(frozen=True)
class PromptCurves:
    """The plain refusal probability of single prompts: `values[kind][step, prompt]`."""

    run: RunRecord
    steps: tuple[int, ...]
    values: dict[str, np.ndarray]
    source: str


@dataclass(frozen=True)
class Measured:
    """A kernel that was kept whole: which run's, at which weights, in which folder."""

    run: RunRecord
    told: str  # the weights, in words
    model: str
    folder: Path
    kernel: Kernel

    @property
    def terms(self) -> tuple[object, ...]:
        """What two kernels must share to be compared."""
        return self.kernel.ids, self.kernel.of, self.kernel.top_k, self.kernel.normalise


@dataclass(frozen=True)
class Pair:
    """A kernel before and after stage one over the same prompts, as normalised matrices."""

    before: Measured
    after: Measured
    params: str
    matrices: tuple[np.ndarray, np.ndarray]


def prompt_curves(run: RunRecord) -> PromptCurves | None:
    """Over SFT, from tracking or else from snapshots; None of fewer than three steps."""
    tracked = {
        t.step: t.refusal_probability
        for t in run.tracked
        if t.stage == "sft" and t.refusal_probability
    }
    scored = {
        e.step or 0: e.refusal_probability
        for e in snapshots(run, lambda e: e.refusal_probability)
        if e.refusal_probability
    }
    for source, by_step in ((KEPT, tracked), (SCORED, scored)):
        values = _followed(by_step)
        if len(by_step) >= FEWEST_STEPS and {"toxic", "seemingly_toxic"} <= values.keys():
            return PromptCurves(run, tuple(sorted(by_step)), values, source)
    return None


def _followed(by_step: Mapping[int, Probability]) -> dict[str, np.ndarray]:
    """The prompts that were measured at every step, by kind."""
    found = {}
    parts = [by_step[step].values.get("plain", {}) for step in sorted(by_step)]
    for kind in dict.fromkeys(kind for part in parts for kind in part):
        rows = [part.get(kind, {}) for part in parts]
        shared = [identity for identity in rows[0] if all(identity in row for row in rows)]
        if shared:
            found[kind] = np.array([[row[identity] for identity in shared] for row in rows])
    return found


def unedited(evaluation: Evaluation) -> bool:
    """Whether it is of the weights as they are, without steering or another decoding."""
    return not (steering(evaluation) or "self_cd" in evaluation.settings)


def evaluated(run: RunRecord, weights: str) -> list[Measured]:
    """Kernels of unsteered evaluations of certain weights."""
    return [
        Measured(run, weights, about(run, e, "model"), e.folder, e.kernel)
        for e in run.evaluations
        if e.weights == weights and e.kernel and e.kernel.ids and unedited(e)
    ]


def tracked(run: RunRecord, stage: str) -> list[Measured]:
    """Kernels that tracking kept over a stage, by step."""
    return [
        Measured(run, f"step {t.step}", config_of(run, "model"), t.folder, t.kernel)
        for t in run.tracked
        if t.stage == stage and t.kernel and t.kernel.ids
    ]


def base_kernels(records: Sequence[RunRecord]) -> list[Measured]:
    """Of base models: evaluations, or else what tracking kept before a stage took a step.

    One a model and choice of prompts, the first.
    """
    found = [measured for run in records for measured in evaluated(run, "base")]
    if not found:
        for run in records:
            first = tracked(run, "contrastive")[:1]
            if not first and config_of(run, "method") != "dcr":
                first = tracked(run, "sft")[:1]
            found += [m for m in first if m.told == "step 0"]
    distinct: dict[tuple[object, ...], Measured] = {}
    for measured in found:
        key = (measured.model, *measured.terms, tuple(measured.kernel.params))
        distinct.setdefault(key, measured)
    return list(distinct.values())


def pairs(records: Sequence[RunRecord], notes: list[str]) -> list[Pair]:
    """Before and after stage one of every run: evaluations, or else tracking's first and last."""
    bases = [measured for run in records for measured in evaluated(run, "base")]
    found: list[Pair] = []
    for run in records:
        own: list[Pair] = []
        for after in evaluated(run, "contrastive"):
            own += _paired(after, bases, notes)
        if not own:
            steps = tracked(run, "contrastive")
            if len(steps) > 1 and steps[0].told == "step 0":
                own = _paired(steps[-1], steps[:1], notes)
        found += own
    return found


def _paired(after: Measured, bases: Sequence[Measured], notes: list[str]) -> list[Pair]:
    alike = [base for base in bases if (base.model, base.terms) == (after.model, after.terms)]
    place, found = printable(str(after.folder)), []
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
        matrices = (normalised(having[0], params, notes), normalised(after, params, notes))
        if matrices[0] is not None and matrices[1] is not None:
            found.append(Pair(having[0], after, params, (matrices[0], matrices[1])))
    return found


def normalised(measured: Measured, params: str, notes: list[str]) -> np.ndarray | None:
    """The whole matrix as its evaluation normalised it; None, with a note, if it is missing."""
    path = measured.folder / "kernel" / f"{params}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            norms = file.get_tensor("norms").double()
            ids = tuple((file.metadata() or {}).get("ids", "").split("\n"))
        if ids != measured.kernel.ids or norms.shape != (len(ids), len(ids)):
            raise ValueError("it is of other prompts than metrics.json tells")
        matrix = ntk.normalised(norms, measured.kernel.normalise).numpy()
        if not np.isfinite(matrix).all():
            raise ValueError("it has values that are not finite")
    except FileNotFoundError:
        note = f"{printable(str(path))}: missing; no claim is measured on it"
        notes += [note] if note not in notes else []
        return None
    except (*UNREADABLE, SafetensorError) as error:
        raise damaged(path, error) from error
    return matrix
