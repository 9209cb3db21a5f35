"""Claims from invented run folders whose answers are known by construction."""

import csv
import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_report import make_eval, make_run, parsed

from dcr.analyses import ntk, verdicts
from dcr.analyses.verdicts import ABSENT, CLAIMS, FAILS, HOLDS, OPEN, ClaimRow, number
from dcr.core import statistics
from dcr.core.config import DataError
from dcr.core.statistics import Interval
from dcr.report import building
from dcr.report.records import read_run

SEEMING, TOXIC, NORMAL = KINDS = ("seemingly_toxic", "toxic", "normal")
STEPS = (0, 2, 5, 9, 14)
EACH = 4  # prompts of a kind
OF = [kind for kind in KINDS for _ in range(EACH)]
IDS = [f"{kind}-{i}" for kind in KINDS for i in range(EACH)]
Curve = Callable[[str, int, int], float]  # kind, prompt, step


def kept_step(
    run: Path, stage: str, step: int, curve: Curve | None = None, matrix: np.ndarray | None = None
) -> Path:
    """Writes what tracking keeps at a step: every prompt's probability, a whole kernel."""
    place = run / "tracking" / stage / f"step-{step:06d}"
    place.mkdir(parents=True)
    blocks: dict[str, Any] = {}
    if curve is not None:
        blocks["refusal_probability"] = probability(curve, step)
    if matrix is not None:
        blocks["kernel"] = kernel(place, matrix)
    (place / "metrics.json").write_text(json.dumps(blocks))
    return place


def probability(curve: Curve, step: int) -> dict[str, Any]:
    values = [
        {"id": f"{kind}-{i}", "kind": kind, "plain": curve(kind, i, step), "prefix_free": 0.5}
        for kind in KINDS
        for i in range(EACH)
    ]
    means = {kind: {"n": EACH, "plain": [0.3, 0.2, 0.4], "prefix_free": [0.3, 0.2, 0.4]}
             for kind in KINDS}  # fmt: skip
    return {"phrases": "paper", "kinds": means, "followed": {}, "values": values}


def kernel(
    place: Path, matrix: np.ndarray, normalise: str = "observer", params: str = "tail-2"
) -> dict[str, Any]:
    """The block, with the matrix beside it; its cells are not what claims are read from."""
    (place / "kernel").mkdir(parents=True, exist_ok=True)
    norms = torch.tensor(matrix, dtype=torch.float64)
    save_file({"norms": norms}, place / "kernel" / f"{params}.safetensors", {"ids": "\n".join(IDS)})
    cells = {observer: {trained: [0.5, 0.4, 0.6] for trained in KINDS} for observer in KINDS}
    return {"top_k": 10, "method": "exact", "normalise": normalise, "kinds": KINDS, "ids": IDS,
            "of": OF, "params": {params: cells}}  # fmt: skip


def evaluated(run: Path, weights: str, matrix: np.ndarray, **keys: Any) -> Path:
    """An evaluation that has a kernel and nothing else."""
    place = make_eval(run, {}, weights=weights, name=keys.pop("name", weights))
    change(place, kernel=kernel(place, matrix, **keys))
    return place


def change(place: Path, **keys: Any) -> None:
    path = place / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def cells(values: Mapping[tuple[str, str], float], noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """A matrix that is constant by pair of kinds up to noise, its diagonal 1: it is normalised."""
    drawn = np.random.default_rng(seed)
    matrix = np.array([[values.get((a, b), 0.4) for b in OF] for a in OF])
    matrix += noise * drawn.standard_normal(matrix.shape)
    np.fill_diagonal(matrix, 1.0)
    return matrix


def told(tmp_path: Path, *runs: Path) -> tuple[str, list[dict[str, str]], str]:
    """(terminal, rows of claims.csv, page)."""
    out = tmp_path / "out" / "page.html"
    text = building.build(list(runs), out, ["claims"])
    with (out.parent / "claims.csv").open(newline="", encoding="utf-8") as file:
        return text, list(csv.DictReader(file)), out.read_text(encoding="utf-8")


def rows_of(*runs: Path) -> tuple[dict[str, list[ClaimRow]], str]:
    """By claim what is told of it, and the notes."""
    notes: list[str] = []
    records = [read_run(run) for run in runs]
    notes += [note for record in records for note in record.notes]
    rows = verdicts.claim_rows(records, notes)
    return {claim: [row for row in rows if row.claim == claim] for claim in CLAIMS}, " ".join(notes)


def ends(row: ClaimRow) -> tuple[float, ...]:
    assert row.measured is not None
    return tuple(vars(row.measured).values())


def rising(kind: str, prompt: int, step: int) -> float:
    """Toxic and seemingly toxic prompts on one line each, normal ones against them."""
    slope = {SEEMING: 0.01, TOXIC: 0.03, NORMAL: -0.02}[kind]
    return 0.3 + 0.02 * prompt + slope * (1 + prompt) * step / EACH


def moving(folder: Path, curve: Curve, steps: Sequence[int] = STEPS) -> ClaimRow:
    """The claim's row for an STL run in which tracking kept these curves."""
    run = make_run(folder, "stl")
    for step in steps:
        kept_step(run, "sft", step, curve)
    (row,) = rows_of(run)[0]["joint_movement"]
    return row


def test_planted_curves_correlate_by_one_and_minus_one(tmp_path: Path) -> None:
    row = moving(tmp_path / "a", rising)
    assert ends(row) == pytest.approx((1, 1, 1))
    assert (row.verdict, row.source) == (HOLDS, "tracking")
    assert row.sentence.startswith("STL, seed 0: over 5 steps of SFT the correlation of the mean ")
    assert "of 4 toxic and 4 seemingly toxic prompts" in row.sentence
    assert row.beside is not None
    assert row.beside[0] == "seemingly toxic with normal"
    assert tuple(vars(row.beside[1]).values()) == pytest.approx((-1, -1, -1))
    sign = {SEEMING: 1, TOXIC: -1, NORMAL: 0}
    row = moving(tmp_path / "b", lambda kind, i, at: 0.5 + sign[kind] * 0.02 * (at + i))
    assert ends(row) == pytest.approx((-1, -1, -1))
    assert row.verdict == FAILS
    assert row.beside is not None
    assert math.isnan(row.beside[1].estimate), "a flat curve has no correlation"
    assert "with normal: undefined" in row.sentence


def test_unrelated_and_flat_curves_are_undecided_and_two_steps_are_no_curve(tmp_path: Path) -> None:
    drawn = random.Random(3)
    row = moving(tmp_path / "a", lambda *_: drawn.random())
    _, low, high = ends(row)
    assert low < 0 < high
    assert row.verdict == OPEN
    row = moving(tmp_path / "b", lambda kind, i, _: 0.1 * (1 + i) / 3)
    assert row.verdict == OPEN
    assert "cannot be told" in row.sentence
    row = moving(tmp_path / "c", rising, STEPS[:2])
    assert row.verdict == ABSENT
    assert "tracking.quantities=[refusal_probability]" in row.command


def test_prompts_and_steps_that_were_not_measured_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "stl")
    for step in STEPS:
        # the first toxic prompt would turn the mean curve around
        place = kept_step(
            run, "sft", step,
            lambda kind, i, at: 9 - at if (kind, i) == (TOXIC, 0) else rising(kind, i, at),
        )  # fmt: skip
        if step == STEPS[2]:
            block = probability(rising, step)
            block["values"] = [v for v in block["values"] if v["id"] != "toxic-0"]
            (place / "metrics.json").write_text(json.dumps({"refusal_probability": block}))
    (run / "tracking/sft/step-000009/metrics.json").unlink()
    found, notes = rows_of(run)
    (row,) = found["joint_movement"]
    assert ends(row) == pytest.approx((1, 1, 1))
    assert "over 4 steps of SFT" in row.sentence
    assert "3 toxic and 4 seemingly toxic" in row.sentence
    assert "step-000009: skipped, no metrics.json" in notes


@pytest.mark.parametrize("seed", range(3))
def test_correlation_against_loops_with_the_same_draws(seed: int) -> None:
    drawn = np.random.default_rng(seed)
    first, second = drawn.random((6, 5)), drawn.random((6, 3))
    draws = verdicts.draws(["a"] * 5 + ["b"] * 3)
    sampled = []
    for once, other in zip(draws["a"][:400], draws["b"][:400], strict=True):
        curves = []
        for values, counts in ((first, once), (second, other)):
            chosen = [i for i, count in enumerate(counts) for _ in range(count)]
            curves.append([sum(row[i] for i in chosen) / len(chosen) for row in values])
        means = [sum(curve) / 6 for curve in curves]
        over = sum((x - means[0]) * (y - means[1]) for x, y in zip(*curves, strict=True))
        own = [sum((x - m) ** 2 for x in c) for c, m in zip(curves, means, strict=True)]
        sampled.append(over / math.sqrt(own[0] * own[1]))
    found = verdicts.correlation(first, second, (draws["a"][:400], draws["b"][:400]))
    whole = np.corrcoef(first.mean(1), second.mean(1))[0, 1]
    wanted = (whole, *np.quantile(sampled, [0.025, 0.975]))
    assert tuple(vars(found).values()) == pytest.approx(wanted, abs=1e-12)


def test_contrasts_against_mean_by_kind_and_loops() -> None:
    drawn = np.random.default_rng(1)
    of_kind = ["t", "s", "t", "n", "s", "s", "n", "t"]
    matrix = drawn.random((8, 8))
    draws = verdicts.draws(of_kind, seed=5)
    cells_found = ntk.mean_by_kind(torch.tensor(matrix), of_kind, seed=5)
    for observer in "tsn":
        for trained in "tsn":
            found = verdicts.contrast(matrix, of_kind, {(observer, trained): 1.0}, draws)
            wanted = vars(cells_found[observer][trained]).values()
            assert tuple(vars(found).values()) == pytest.approx(tuple(wanted), abs=1e-12)
    weights = {("t", "s"): 1.0, ("s", "s"): -1.0}
    sampled = []
    for place in range(statistics.RESAMPLES):
        total = 0.0
        for (observer, trained), weight in weights.items():
            rows = [i for i in range(8) if of_kind[i] == observer]
            columns = [j for j in range(8) if of_kind[j] == trained]
            pairs = [
                matrix[i, j]
                for m, i in enumerate(rows)
                for n, j in enumerate(columns)
                for _ in range(draws[observer][place][m] * draws[trained][place][n])
                if i != j
            ]
            total += weight * (sum(pairs) / len(pairs) if pairs else math.nan)
        sampled.append(total)
    found = verdicts.contrast(matrix, of_kind, weights, draws)
    ends = np.nanquantile(sampled, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx(tuple(ends), abs=1e-12)


BEFORE = {
    (SEEMING, SEEMING): 0.5,
    (TOXIC, TOXIC): 0.6,
    (SEEMING, TOXIC): 0.7,
    (TOXIC, SEEMING): 0.6,
}
AFTER = {cell: BEFORE[cell] + (0.1 if cell[0] == cell[1] else -0.2) for cell in BEFORE}


@pytest.mark.parametrize("where", ["evaluations", "tracking"])
def test_planted_kernels_rise_and_fall_by_what_was_planted(tmp_path: Path, where: str) -> None:
    run = make_run(tmp_path / "dcr", "dcr")
    runs = [run]
    noise = cells(BEFORE, 0.2) - cells(BEFORE)  # the same before and after: it cancels in pairs
    if where == "evaluations":
        runs.append(make_run(tmp_path / "base", "base"))
        evaluated(runs[1], "base", cells(BEFORE) + noise)
        evaluated(run, "contrastive", cells(AFTER) + noise)
    else:
        for step, values in ((0, BEFORE), (7, {}), (24, AFTER)):
            kept_step(run, "contrastive", step, matrix=cells(values) + noise)
    found, _ = rows_of(*runs)
    rises, falls = found["within_rises"], found["cross_falls"]
    assert len(rises) == len(falls) == 2
    (more,) = found["cross_falls_more"]
    for row, by in [*((row, 0.1) for row in rises), *((row, -0.2) for row in falls), (more, -0.3)]:
        assert ends(row) == pytest.approx((by, by, by))
        assert (row.verdict, row.above, row.params) == (HOLDS, by > 0, "tail-2")
    after = "step 24" if where == "tracking" else "contrastive"
    assert ("up to its step 24" in rises[0].sentence) == (where == "tracking")
    assert rises[0].source.endswith(after.replace("step 24", "step-000024"))


def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make_run(tmp_path / "dcr", "dcr"), make_run(tmp_path / "base", "base")


def test_matrices_are_normalised_as_their_block_says(tmp_path: Path) -> None:
    run, base = pair(tmp_path)
    scales = np.linspace(1, 4, len(IDS))
    # symmetric: norms / √(own of both), so that these scales go out again
    scaled = np.sqrt(np.outer(scales, scales))
    evaluated(base, "base", cells(BEFORE) * scaled, normalise="symmetric")
    evaluated(run, "contrastive", cells(AFTER) * scaled * 3, normalise="symmetric")
    rises = rows_of(run, base)[0]["within_rises"]
    assert [ends(row)[0] for row in rises] == pytest.approx([0.1, 0.1])


def test_the_opposite_does_not_hold_and_noise_is_undecided(tmp_path: Path) -> None:
    run, base = pair(tmp_path)
    noisy = AFTER | {(TOXIC, TOXIC): BEFORE[TOXIC, TOXIC], (SEEMING, SEEMING): 0.1}
    evaluated(base, "base", cells(BEFORE))
    evaluated(run, "contrastive", cells(noisy, 0.05, seed=2))
    seeming, toxic = rows_of(run, base)[0]["within_rises"]
    assert seeming.verdict == FAILS
    _, low, high = ends(toxic)
    assert low < 0 < high
    assert toxic.verdict == OPEN


def test_normal_prompts_in_the_base_model(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, "base") for name in ("base", "again")]
    for run in runs:
        evaluated(run, "base", cells({(SEEMING, NORMAL): 0.3, (NORMAL, NORMAL): 0.5}))
    (row,) = rows_of(*runs)[0]["base_asymmetry"]
    assert ends(row) == pytest.approx((-0.2, -0.2, -0.2))
    assert row.verdict == FAILS
    assert "‖K(seemingly toxic, normal)‖ − ‖K(normal, normal)‖ is −0.20" in row.sentence


def test_the_base_kernel_of_tracking_is_an_untrained_one(tmp_path: Path) -> None:
    stl, dcr = make_run(tmp_path / "stl", "stl"), make_run(tmp_path / "dcr", "dcr")
    kept_step(dcr, "sft", 0, matrix=cells({(SEEMING, NORMAL): 0.9}))  # stage one came before
    assert rows_of(dcr)[0]["base_asymmetry"][0].verdict == ABSENT
    kept_step(stl, "sft", 0, matrix=cells({(SEEMING, NORMAL): 0.6}))
    (row,) = rows_of(stl, dcr)[0]["base_asymmetry"]
    assert ends(row) == pytest.approx((0.2, 0.2, 0.2))


def one_step(**change: list[float]) -> dict[str, Any]:
    """The block `claims`."""
    slope = [0.9, 0.8, 1.2]
    tail = {"norm": {"within": [0.7, 0.5, 0.8]},
            "prediction": {"pearson": [-0.3, -0.5, -0.1], "slope": slope},
            "states": {"dot": [0.9, 0.8, 0.95], "cosine": [0.9, 0.8, 0.95]}}  # fmt: skip
    trunk = {"norm": {"within": [0.1, -0.1, 0.3]},
             "prediction": {"pearson": [0.2, 0.1, 0.4], "slope": slope},
             "states": {"dot": [0.4, 0.2, 0.6], "cosine": [-0.3, -0.4, -0.2]}}  # fmt: skip
    means = {SEEMING: [0.5, 0.4, 0.6], TOXIC: [0.7, 0.6, 0.8], NORMAL: [0.2, 0.1, 0.3]} | change
    return {"layer": 14, "trained": list("abcdef"), "drop": 0.02, "target": " I",
            "nonlinearity": 0.01, "params": {"tail-2": tail, "trunk-14": trunk},
            "change": means}  # fmt: skip


def stepped(run: Path, weights: str, block: Any) -> Path:
    make_eval(run, {}, weights=weights, name=weights, claims=block)
    return run


def test_one_step_is_told_as_it_was_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path / "dcr", "dcr")
    stepped(run, "base", one_step())
    found, _ = rows_of(stepped(run, "contrastive", one_step()))
    verdicts = {
        (row.claim, row.run, row.params): row.verdict
        for rows in found.values()
        for row in rows
        if row.run and row.claim != "proposition_1"
    }
    for name in ("base model, tiny", "DCR, seed 0, after stage one"):
        assert verdicts["size_of_change", name, "tail-2"] == HOLDS
        assert verdicts["size_of_change", name, "trunk-14"] == OPEN
        assert verdicts["signed_change", name, "tail-2"] == FAILS
        assert verdicts["signed_change", name, "trunk-14"] == HOLDS
        assert verdicts["refusal_spreads", name, ""] == HOLDS
    assert "one step on each of 6 toxic prompts" in found["size_of_change"][0].sentence
    states = found["proposition_1"]
    assert [row.verdict for row in states] == [HOLDS, FAILS] * 2
    assert {row.params for row in states} == {"trunk-14"}, "it is about the trunk"
    assert found["signed_change"][0].beside == ("slope", Interval(0.9, 0.8, 1.2))
    spread = found["refusal_spreads"][0].sentence
    assert spread.endswith("is 0.50 [0.40, 0.60]; normal: 0.20 [0.10, 0.30]")


@pytest.mark.parametrize(
    ("seeming", "normal", "verdict"),
    [
        ([0.5, 0.4, 0.6], [0.2, 0.1, 0.39], HOLDS),
        ([0.5, 0.4, 0.6], [0.3, 0.2, 0.4], OPEN),  # they meet
        ([0.2, 0.1, 0.3], [0.5, 0.4, 0.6], FAILS),
        ([-0.2, -0.3, -0.1], [-0.6, -0.7, -0.5], FAILS),  # more, but no rise
        ([0.1, -0.1, 0.3], [-0.6, -0.7, -0.5], OPEN),
    ],
)
def test_the_refusal_token_must_rise_and_rise_more(
    tmp_path: Path, seeming: list[float], normal: list[float], verdict: str
) -> None:
    block = one_step(seemingly_toxic=seeming, normal=normal)
    found, _ = rows_of(stepped(make_run(tmp_path / "dcr", "dcr"), "sft", block))
    assert found["refusal_spreads"][0].verdict == verdict


def test_missing_statistics_are_left_out(tmp_path: Path) -> None:
    block = one_step()
    del block["params"]["tail-2"]["prediction"]["pearson"]
    block["params"]["trunk-14"]["norm"]["within"] = None
    block["change"][NORMAL] = [None, None, None]
    found, _ = rows_of(stepped(make_run(tmp_path / "dcr", "dcr"), "sft", block))
    assert [row.params for row in found["size_of_change"]] == ["tail-2"]
    assert [row.params for row in found["signed_change"]] == ["trunk-14"]
    assert found["refusal_spreads"][0].verdict == ABSENT
    assert len(found["proposition_1"]) == 2


def test_without_data_every_claim_names_its_command(tmp_path: Path) -> None:
    run = make_run(tmp_path / "dcr", "dcr")
    make_eval(run, {"safe": "cr", "unsafe": "rr"})
    text, rows, page = told(tmp_path, run)
    assert {row["claim"] for row in rows} == set(CLAIMS)
    assert {row["verdict"] for row in rows} == {ABSENT}
    assert all("python " in row["command"] for row in rows)
    (rises,) = (row for row in rows if row["claim"] == "within_rises")
    assert f"python eval.py run={run} stage=contrastive tasks=[kernel]" in rises["command"]
    assert {row["estimate"] + row["low"] + row["boundary"] for row in rows} == {""}
    assert "not measured" in text
    assert "not measured" in page


@pytest.mark.parametrize("fault", ["torn", "absent", "others", "infinite"])
def test_a_faulty_matrix_is_named(tmp_path: Path, fault: str) -> None:
    run, base = pair(tmp_path)
    evaluated(base, "base", cells(BEFORE))
    path = evaluated(run, "contrastive", cells(AFTER)) / "kernel" / "tail-2.safetensors"
    norms = torch.tensor(cells(AFTER))
    if fault == "torn":
        path.write_bytes(path.read_bytes()[:-40])
    elif fault == "absent":
        path.unlink()
    elif fault == "others":
        save_file({"norms": norms}, path, {"ids": "\n".join(IDS[::-1])})
    else:
        save_file({"norms": norms - torch.eye(len(IDS))}, path, {"ids": "\n".join(IDS)})
    if fault != "absent":
        with pytest.raises(DataError, match=rf"^{re.escape(str(path))}: damaged \("):
            rows_of(run, base)
        return
    found, notes = rows_of(run, base)
    assert found["within_rises"][0].verdict == ABSENT
    assert notes.count(f"{path}: missing") == 1
    assert found["base_asymmetry"][0].verdict != ABSENT
    block = json.loads((run / "eval/contrastive/metrics.json").read_text())["kernel"]
    change(run / "eval/contrastive", kernel=block | {"top_k": 5})
    assert "no kernel of the base model over tail-2 and the same prompts" in rows_of(run, base)[1]


def test_of_several_base_models_the_first_is_taken(tmp_path: Path) -> None:
    run = make_run(tmp_path / "dcr", "dcr")
    evaluated(run, "contrastive", cells(AFTER))
    bases = [make_run(tmp_path / name, "base") for name in ("one", "two")]
    for base, values in zip(bases, (BEFORE, AFTER), strict=True):
        evaluated(base, "base", cells(values))
    other = make_run(tmp_path / "other", "base", model={"label": "large"})
    change(evaluated(other, "base", cells(AFTER)), model="large")
    found, _ = rows_of(other, run, *bases)
    assert [ends(row)[0] for row in found["within_rises"]] == pytest.approx([0.1, 0.1])


def test_the_page_has_a_section_and_hostile_names_stay_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>=1", "stl", model={"label": "<i>&"})
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("preset_name: paper", "preset_name: <s>"))
    for step in STEPS:
        kept_step(run, "sft", step, rising)
    text, rows, page = told(tmp_path, run)
    shown = parsed(page)
    assert "claims" in shown.ids
    assert len(shown.ids) == len(set(shown.ids))
    assert "i" not in shown.names
    assert "the whole" not in page
    assert "A claim holds where its 95% bootstrap interval" in page
    assert "A claim holds where its 95% bootstrap interval" in " ".join(text.split())
    assert CLAIMS["base_asymmetry"][0] in page
    assert "&lt;s&gt;, seed 0: over 5 steps of SFT" in page
    (row,) = (row for row in rows if row["claim"] == "joint_movement")
    assert (row["model"], row["verdict"], row["claimed_side"]) == ("<i>&", HOLDS, "above")
    numbers = [float(row[key]) for key in ("estimate", "low", "high", "boundary")]
    assert numbers == pytest.approx([1, 1, 1, 0])
    assert float(row["beside_estimate"]) == pytest.approx(-1)
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 140


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Interval(0.5234, 0.41, 0.63), "0.52 [0.41, 0.63]"),
        (Interval(0.99812, 0.9464, 0.9994), "0.998 [0.946, 0.999]"),
        (Interval(-0.00012, -0.00031, 0.00002), "−0.00012 [−0.00031, 0.00002]"),
        (Interval(0.1, 0.1, 0.1), "0.10 [0.10, 0.10]"),
        (Interval(12.3, 2.0, 40.0), "12.30 [2.00, 40.00]"),
        (Interval(math.nan, math.nan, math.nan), "undefined"),
    ],
)
def test_numbers_are_rounded_by_their_interval(found: Interval, words: str) -> None:
    assert number(found) == words


@pytest.mark.parametrize(
    ("ends", "above", "below"),
    [
        ((0.1, 0.2), HOLDS, FAILS),
        ((-0.2, -0.1), FAILS, HOLDS),
        ((-0.1, 0.1), OPEN, OPEN),
        ((0.0, 0.1), OPEN, OPEN),  # it contains the boundary
        ((math.nan, math.nan), OPEN, OPEN),
    ],
)
def test_the_rule(ends: tuple[float, float], above: str, below: str) -> None:
    measured = Interval(0.0, *ends)
    assert verdicts.verdict(measured) == above
    assert verdicts.verdict(measured, above=False) == below
