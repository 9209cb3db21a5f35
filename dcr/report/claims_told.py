"""The paper's claims, each in one sentence with its verdict, or with the command that it lacks."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dcr.report import claim_data, claims
from dcr.report.claim_data import Measured, Pair, PromptCurves
from dcr.report.claims import Cell
from dcr.report.finding import (
    ABSENT,
    CLAIMS,
    LACKING,
    LACKING_STATES,
    Finding,
    kernel_of,
    number,
)
from dcr.report.measurements import STEP_SCORES, OneStep
from dcr.report.printing import printable
from dcr.report.records import Evaluation, RunRecord
from dcr.report.trajectories import STAGES, config_of, folders, name_of_weights, names
from dcr.statistics import Interval

SEEMING, TOXIC, NORMAL = "seemingly_toxic", "toxic", "normal"
WITHIN: tuple[Cell, ...] = ((SEEMING, SEEMING), (TOXIC, TOXIC))
CROSS: tuple[Cell, ...] = ((SEEMING, TOXIC), (TOXIC, SEEMING))
# Within and across count alike, whatever their number of pairs.
MORE = {**dict.fromkeys(CROSS, 0.5), **dict.fromkeys(WITHIN, -0.5)}


def findings(records: Sequence[RunRecord], notes: list[str]) -> list[Finding]:
    """Every claim in the order of CLAIMS; what could not be read or is missing goes to `notes`."""
    called = {run.folder: name for run, name in zip(records, names(records), strict=True)}
    found = list(_movements(records, called))
    for pair in claim_data.pairs(records, notes):
        found += _stage_one(pair, called[pair.after.run.folder])
    for base in claim_data.base_kernels(records):
        found += _base(base, notes)
    steps = [
        (run, e, e.one_step)
        for run in records
        for e in run.evaluations
        if e.one_step and claim_data.unedited(e)
    ]
    for run, evaluation, block in steps:
        found += _one_step(name_of_weights(called[run.folder], run, evaluation), evaluation, block)
        notes += _incomplete(evaluation, block)
    # one base model may have been measured in several folders
    found = list({(f.claim, f.sentence): f for f in map(_of_numbers, found)}.values())
    notes += _without(found, records, called)
    have = {finding.claim for finding in found}
    absent = [_absent(key, *LACKING[key], records) for key in LACKING if key not in have]
    told = {
        e.weights for _, e, step in steps if any(key.startswith("trunk") for key in step.params)
    }
    absent += [
        _absent("proposition_1", *LACKING_STATES[weights], records)
        for weights in LACKING_STATES
        if weights not in told
    ]
    return sorted(found + absent, key=lambda finding: list(CLAIMS).index(finding.claim))


def _without(
    found: Sequence[Finding], records: Sequence[RunRecord], called: Mapping[Path, str]
) -> list[str]:
    """A note on every run that lacks what others have."""
    notes = []
    for claim, methods in (
        ("joint_movement", ("stl", "stl_aug", "dcr")),
        ("within_rises", ("dcr",)),
    ):
        have = {finding.run for finding in found if finding.claim == claim}
        notes += [
            f"claims: {LACKING[claim][0]} in {folders([run])}"
            for run in records
            if have and config_of(run, "method") in methods and called[run.folder] not in have
        ]
    return notes


def _absent(claim: str, lack: str, command: str, records: Sequence[RunRecord]) -> Finding:
    dcr = [run for run in records if config_of(run, "method") == "dcr"]
    # stage one is what a run of another method lacks
    able = dcr if "stage=contrastive" in command else dcr or list(records)
    command = command.format(run=folders(able[:1]) or "<dcr run>")
    return Finding(claim, ABSENT, f"{lack}; run {command}", command)


def _of_numbers(finding: Finding) -> Finding:
    """Without an interval of numbers there is nothing to judge by."""
    measured = finding.measured
    if measured and all(map(math.isfinite, vars(measured).values())):
        return finding
    own = ", ".join(filter(None, (finding.run, finding.params)))
    sentence = f"{own}: cannot be told, since a curve is flat or a kind has too few prompts"
    return replace(finding, verdict=claims.OPEN, sentence=sentence, beside=None)


def _movements(records: Sequence[RunRecord], called: Mapping[Path, str]) -> Iterator[Finding]:
    for run in records:
        if curves := claim_data.prompt_curves(run):
            yield _movement(curves, called[run.folder])


def _movement(curves: PromptCurves, name: str) -> Finding:
    of = [kind for kind, values in curves.values.items() for _ in range(values.shape[1])]
    drawn = claims.draws(of)

    def together(*kinds: str) -> Interval:
        first, second = (curves.values[kind] for kind in kinds)
        return claims.correlation(first, second, (drawn[kinds[0]], drawn[kinds[1]]))

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
    return Finding(
        "joint_movement", claims.verdict(measured), sentence, run=name,
        model=config_of(curves.run, "model"), measured=measured, beside=beside,
        source=curves.source,
    )  # fmt: skip


def _stage_one(pair: Pair, name: str) -> Iterator[Finding]:
    kinds = pair.after.kernel.of
    before, after = pair.matrices
    if not {SEEMING, TOXIC} <= set(kinds):
        return
    drawn = claims.draws(kinds)
    over = "stage one" if pair.after.told in STAGES else f"stage one, up to its {pair.after.told}"
    own = f"{name}, {pair.params}"
    source = " → ".join(printable(str(m.folder)) for m in (pair.before, pair.after))

    def finding(claim: str, weights: dict[Cell, float], told: str, above: bool) -> Finding:
        measured = claims.contrast(after - before, kinds, weights, drawn)
        words = "rise" if above else "fall"
        wanted = f"{told} {number(measured, signed=True)} over {over} (claimed: a {words})"
        return Finding(
            claim, claims.verdict(measured, above=above), f"{own}: {wanted}", run=name,
            model=pair.after.model, params=pair.params, measured=measured, above=above,
            source=source,
        )  # fmt: skip

    for claim, cells, above in (("within_rises", WITHIN, True), ("cross_falls", CROSS, False)):
        for cell in cells:
            was, now = (
                claims.contrast(matrix, kinds, {cell: 1.0}, drawn).estimate
                for matrix in (before, after)
            )
            told = f"mean normalised ‖{kernel_of(cell)}‖ goes from {was:.2f} to {now:.2f}, by"
            yield finding(claim, {cell: 1.0}, told, above)
    told = "beyond the mean of the two kernels within a class, the two across change by"
    yield finding("cross_falls_more", MORE, told, above=False)


def _base(base: Measured, notes: list[str]) -> Iterator[Finding]:
    kinds = base.kernel.of
    name = ", ".join(filter(None, (STAGES["base"], base.model)))
    if not {SEEMING, NORMAL} <= set(kinds):
        return
    drawn = claims.draws(kinds)
    cells = (SEEMING, NORMAL), (NORMAL, NORMAL)
    for params in base.kernel.params:
        matrix = claim_data.normalised(base, params, notes)
        if matrix is None:
            continue
        means = [claims.contrast(matrix, kinds, {cell: 1.0}, drawn) for cell in cells]
        measured = claims.contrast(matrix, kinds, dict(zip(cells, (1.0, -1.0), strict=True)), drawn)
        told = " and ".join(
            f"{kernel_of(cell)} is {mean.estimate:.2f}"
            for cell, mean in zip(cells, means, strict=True)
        )
        yield Finding(
            "base_asymmetry", claims.verdict(measured),
            f"{name}, {params}: {told}, a difference of {number(measured, signed=True)} "
            "(claimed: above 0)",
            run=name, model=base.model, params=params, measured=measured,
            source=printable(str(base.folder)),
        )  # fmt: skip


def _one_step(name: str, evaluation: Evaluation, block: OneStep) -> Iterator[Finding]:
    model, source = evaluation.about.get("model", ""), printable(str(evaluation.folder))

    def finding(claim: str, score: str, told: str) -> Iterator[Finding]:
        for params, found in block.params.items():
            if score in found and (claim != "proposition_1" or params.startswith("trunk")):
                measured, slope = found[score], found.get("slope")
                beside = ("slope", slope) if score == "signed" and slope else None
                more = f"; {number(slope)} of change per predicted" if beside and slope else ""
                yield Finding(
                    claim, claims.verdict(measured),
                    f"{name}, {params}: {told} {number(measured)} (claimed: above 0){more}",
                    run=name, model=model, params=params, measured=measured, beside=beside,
                    source=source,
                )  # fmt: skip

    on = "a toxic prompt" if block.trained is None else f"each of {block.trained} toxic prompts"
    yield from finding(
        "size_of_change", "norm",
        f"after one step on {on}, the rank correlation of ‖K‖ with the size of other prompts' "
        "changes is",
    )  # fmt: skip
    yield from finding(
        "signed_change", "signed", "the correlation of −ηAKG with the actual signed change is"
    )
    if {SEEMING, NORMAL} <= block.change.keys():
        yield _spread(name, model, source, block)
    for score, states in (("dot", "the inner product h′ᵀh"), ("cosine", "the cosine")):
        told = f"the rank correlation of ‖K‖ with {states} of two prompts' states is"
        yield from finding("proposition_1", score, told)


def _spread(name: str, model: str, source: str, block: OneStep) -> Finding:
    seeming, normal = block.change[SEEMING], block.change[NORMAL]
    found = claims.all_of([claims.exceeds(seeming, normal), claims.verdict(seeming)])
    return Finding(
        "refusal_spreads", found,
        f"{name}: one step on a toxic prompt changes log p of the refusal token by "
        f"{number(seeming, signed=True)} on seemingly toxic and by {number(normal, signed=True)} "
        "on normal prompts (claimed: a rise, and more on the first)",
        run=name, model=model, measured=seeming, beside=("normal", normal), source=source,
    )  # fmt: skip


def _incomplete(evaluation: Evaluation, block: OneStep) -> list[str]:
    """A note on every statistic that the block `claims` lacks."""
    path = printable(str(evaluation.folder / "metrics.json"))
    lacking = [
        f"{path}: claims.params.{params} has no readable {key}"
        for params, found in block.params.items()
        for key in STEP_SCORES
        if key not in found
    ]
    return lacking + [
        f"{path}: claims.change has no readable {kind}"
        for kind in (SEEMING, NORMAL)
        if kind not in block.change
    ]
