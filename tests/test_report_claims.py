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

from dcr import ntk, report, statistics
from dcr.config import DataError
from dcr.report import claims
from dcr.report.__main__ import main
from dcr.report.claims import ABSENT, CLAIMS, FAILS, HOLDS, OPEN, number
from dcr.report.records import read_run
from dcr.statistics import Interval

SEEMING, TOXIC, NORMAL = KINDS = ("seemingly_toxic", "toxic", "normal")
STEPS = (0, 2, 5, 9, 14)
EACH = 4  # prompts of a kind
OF = [kind for kind in KINDS for _ in range(EACH)]
IDS = [f"{kind}-{i}" for kind in KINDS for i in range(EACH)]
Curve = Callable[[str, int, int], float]  # kind, prompt, step


def kept_step(
    run: Path, stage: str, step: int, curve: Curve | None = None, matrix: np.ndarray | None = None
) -> Path:
    """What tracking keeps at a step: every prompt's probability, a whole kernel."""
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
    text = report.build(list(runs), out, with_claims=True)
    with (out.parent / "claims.csv").open(newline="", encoding="utf-8") as file:
        return text, list(csv.DictReader(file)), out.read_text(encoding="utf-8")


def of(rows: Sequence[dict[str, str]], claim: str) -> list[dict[str, str]]:
    return [row for row in rows if row["claim"] == claim]


def interval(row: Mapping[str, str]) -> tuple[float, float, float]:
    return float(row["estimate"]), float(row["low"]), float(row["high"])


def rising(kind: str, prompt: int, step: int) -> float:
    """Toxic and seemingly toxic prompts on one line each, normal ones against them."""
    slope = {SEEMING: 0.01, TOXIC: 0.03, NORMAL: -0.02}[kind]
    return 0.3 + 0.02 * prompt + slope * (1 + prompt) * step / EACH


def test_planted_curves_correlate_by_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "stl")
    for step in STEPS:
        kept_step(run, "sft", step, rising)
    text, rows, _ = told(tmp_path, run)
    (row,) = of(rows, "joint_movement")
    assert interval(row) == pytest.approx((1, 1, 1))
    assert (row["verdict"], row["beside"]) == (HOLDS, "seemingly toxic with normal")
    assert [float(row[f"beside_{end}"]) for end in ("estimate", "low", "high")] == pytest.approx(
        [-1, -1, -1]
    )
    assert "holds          STL, seed 0: at 5 steps of SFT" in text
    assert "of 4 toxic and 4 seemingly toxic prompts" in " ".join(text.split())
    assert row["source"] == "tracking"


def test_planted_curves_correlate_by_minus_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "stl")
    sign = {SEEMING: 1, TOXIC: -1, NORMAL: 0}
    for step in STEPS:
        kept_step(run, "sft", step, lambda kind, i, at: 0.5 + sign[kind] * 0.02 * (at + i))
    _, rows, _ = told(tmp_path, run)
    (row,) = of(rows, "joint_movement")
    assert interval(row) == pytest.approx((-1, -1, -1))
    assert row["verdict"] == FAILS
    assert row["beside_estimate"] == "", "a flat curve has no correlation"
    assert "with normal: r = undefined" in row["sentence"]


def test_unrelated_curves_are_undecided(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "stl")
    drawn = random.Random(3)
    for step in STEPS:
        kept_step(run, "sft", step, lambda *_: drawn.random())
    _, rows, _ = told(tmp_path, run)
    (row,) = of(rows, "joint_movement")
    _, low, high = interval(row)
    assert low < 0 < high
    assert row["verdict"] == OPEN


def test_flat_curves_cannot_be_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "stl")
    for step in STEPS:
        kept_step(run, "sft", step, lambda kind, i, _: 0.1 * (1 + i) / 3)
    _, rows, _ = told(tmp_path, run)
    (row,) = of(rows, "joint_movement")
    assert (row["verdict"], row["estimate"]) == (OPEN, "")
    assert "cannot be told" in row["sentence"]


def test_curves_come_from_snapshots_where_nothing_was_tracked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "stl")
    for step in STEPS:
        block = probability(rising, step)
        make_eval(run, {}, weights="snapshot", step=step, name=f"s{step}",
                  refusal_probability=block)  # fmt: skip
    _, rows, _ = told(tmp_path, run)
    (row,) = of(rows, "joint_movement")
    assert (row["verdict"], row["source"]) == (HOLDS, "snapshots")


def test_two_steps_are_no_curve(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "stl")
    for step in STEPS[:2]:
        kept_step(run, "sft", step, rising)
    _, rows, _ = told(tmp_path, run)
    (row,) = of(rows, "joint_movement")
    assert row["verdict"] == ABSENT
    assert "tracking.quantities=[refusal_probability]" in row["command"]


def test_prompts_that_a_step_lacks_are_left_out(tmp_path: Path) -> None:
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
    _, rows, _ = told(tmp_path, run)
    (row,) = of(rows, "joint_movement")
    assert interval(row) == pytest.approx((1, 1, 1))
    assert "3 toxic and 4 seemingly toxic" in row["sentence"]


@pytest.mark.parametrize("seed", range(3))
def test_correlation_against_loops_with_the_same_draws(seed: int) -> None:
    drawn = np.random.default_rng(seed)
    first, second = drawn.random((6, 5)), drawn.random((6, 3))
    draws = claims.draws(["a"] * 5 + ["b"] * 3)
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
    found = claims.correlation(first, second, (draws["a"][:400], draws["b"][:400]))
    whole = np.corrcoef(first.mean(1), second.mean(1))[0, 1]
    wanted = (whole, *np.quantile(sampled, [0.025, 0.975]))
    assert tuple(vars(found).values()) == pytest.approx(wanted, abs=1e-12)


def test_contrasts_against_mean_by_kind_and_loops() -> None:
    drawn = np.random.default_rng(1)
    of_kind = ["t", "s", "t", "n", "s", "s", "n", "t"]
    matrix = drawn.random((8, 8))
    draws = claims.draws(of_kind, seed=5)
    cells_found = ntk.mean_by_kind(torch.tensor(matrix), of_kind, seed=5)
    for observer in "tsn":
        for trained in "tsn":
            found = claims.contrast(matrix, of_kind, {(observer, trained): 1.0}, draws)
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
    found = claims.contrast(matrix, of_kind, weights, draws)
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
    _, rows, _ = told(tmp_path, *runs)
    rises, falls = of(rows, "within_rises"), of(rows, "cross_falls")
    assert len(rises) == len(falls) == 2
    for row in rises:
        assert interval(row) == pytest.approx((0.1, 0.1, 0.1))
        assert (row["verdict"], row["claimed_side"]) == (HOLDS, "above")
    for row in falls:
        assert interval(row) == pytest.approx((-0.2, -0.2, -0.2))
        assert (row["verdict"], row["claimed_side"]) == (HOLDS, "below")
    (more,) = of(rows, "cross_falls_more")
    assert interval(more) == pytest.approx((-0.3, -0.3, -0.3))
    assert more["verdict"] == HOLDS
    assert {row["params"] for row in rises + falls} == {"tail-2"}
    after = "step 24" if where == "tracking" else "contrastive"
    assert ("up to its step 24" in rises[0]["sentence"]) == (where == "tracking")
    assert rises[0]["source"].endswith(after.replace("step 24", "step-000024"))


def test_matrices_are_normalised_as_their_block_says(tmp_path: Path) -> None:
    run, base = make_run(tmp_path / "dcr", "dcr"), make_run(tmp_path / "base", "base")
    scales = np.linspace(1, 4, len(IDS))
    # symmetric: norms / √(own of both), so that these scales go out again
    scaled = np.sqrt(np.outer(scales, scales))
    evaluated(base, "base", cells(BEFORE) * scaled, normalise="symmetric")
    evaluated(run, "contrastive", cells(AFTER) * scaled * 3, normalise="symmetric")
    _, rows, _ = told(tmp_path, run, base)
    assert [interval(r)[0] for r in of(rows, "within_rises")] == pytest.approx([0.1, 0.1])


def test_the_opposite_does_not_hold_and_noise_is_undecided(tmp_path: Path) -> None:
    run, base = make_run(tmp_path / "dcr", "dcr"), make_run(tmp_path / "base", "base")
    noisy = AFTER | {(TOXIC, TOXIC): BEFORE[TOXIC, TOXIC], (SEEMING, SEEMING): 0.1}
    evaluated(base, "base", cells(BEFORE))
    evaluated(run, "contrastive", cells(noisy, 0.05, seed=2))
    _, rows, _ = told(tmp_path, run, base)
    seeming, toxic = of(rows, "within_rises")
    assert seeming["verdict"] == FAILS
    _, low, high = interval(toxic)
    assert low < 0 < high
    assert toxic["verdict"] == OPEN


def test_normal_prompts_in_the_base_model(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", "base")
    evaluated(base, "base", cells({(SEEMING, NORMAL): 0.3, (NORMAL, NORMAL): 0.5}))
    again = make_run(tmp_path / "again", "base")
    evaluated(again, "base", cells({(SEEMING, NORMAL): 0.3, (NORMAL, NORMAL): 0.5}))
    _, rows, _ = told(tmp_path, base, again)
    (row,) = of(rows, "base_asymmetry")
    assert interval(row) == pytest.approx((-0.2, -0.2, -0.2))
    assert row["verdict"] == FAILS
    assert "K(seemingly toxic, normal) is 0.30 and K(normal, normal) is 0.50" in row["sentence"]


def test_the_base_kernel_of_tracking_is_an_untrained_one(tmp_path: Path) -> None:
    stl, dcr = make_run(tmp_path / "stl", "stl"), make_run(tmp_path / "dcr", "dcr")
    kept_step(dcr, "sft", 0, matrix=cells({(SEEMING, NORMAL): 0.9}))  # stage one came before
    _, rows, _ = told(tmp_path, dcr)
    assert of(rows, "base_asymmetry")[0]["verdict"] == ABSENT
    kept_step(stl, "sft", 0, matrix=cells({(SEEMING, NORMAL): 0.6}))
    _, rows, _ = told(tmp_path, stl, dcr)
    assert interval(of(rows, "base_asymmetry")[0]) == pytest.approx((0.2, 0.2, 0.2))


def one_step(**change: list[float]) -> dict[str, Any]:
    """The block `claims`."""
    tail = {"norm": [0.7, 0.5, 0.8], "signed": [-0.3, -0.5, -0.1], "slope": [0.9, 0.8, 1.2],
            "dot": [0.9, 0.8, 0.95], "cosine": [0.9, 0.8, 0.95]}  # fmt: skip
    trunk = {"norm": [0.1, -0.1, 0.3], "signed": [0.2, 0.1, 0.4], "slope": [0.9, 0.8, 1.2],
             "dot": [0.4, 0.2, 0.6], "cosine": [-0.3, -0.4, -0.2]}  # fmt: skip
    means = {SEEMING: [0.5, 0.4, 0.6], TOXIC: [0.7, 0.6, 0.8], NORMAL: [0.2, 0.1, 0.3]} | change
    return {"layer": 14, "trained": 6, "drop": 0.02, "target": " I", "nonlinearity": 0.01,
            "params": {"tail-2": tail, "trunk-14": trunk}, "change": means}  # fmt: skip


def stepped(run: Path, weights: str, block: Any) -> None:
    make_eval(run, {}, weights=weights, name=weights, claims=block)


def test_one_step_is_told_as_it_was_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path / "dcr", "dcr")
    stepped(run, "base", one_step())
    stepped(run, "contrastive", one_step())
    text, rows, _ = told(tmp_path, run)
    verdicts = {
        (row["claim"], row["run"], row["params"]): row["verdict"]
        for row in rows
        if row["run"] and row["claim"] != "proposition_1"
    }
    for name in ("base model, tiny", "DCR, seed 0, after stage one"):
        assert verdicts["size_of_change", name, "tail-2"] == HOLDS
        assert verdicts["size_of_change", name, "trunk-14"] == OPEN
        assert verdicts["signed_change", name, "tail-2"] == FAILS
        assert verdicts["signed_change", name, "trunk-14"] == HOLDS
        assert verdicts["refusal_spreads", name, ""] == HOLDS
    states = of(rows, "proposition_1")
    assert [row["verdict"] for row in states] == [HOLDS, FAILS] * 2
    assert {row["params"] for row in states} == {"trunk-14"}, "it is about the trunk"
    signed = of(rows, "signed_change")[0]
    assert (signed["beside"], signed["beside_estimate"]) == ("slope", "0.9")
    flat = " ".join(text.split())
    assert (
        "by +0.50 [+0.40, +0.60] on seemingly toxic and by +0.20 [+0.10, +0.30] on normal" in flat
    )


def test_statistics_may_stand_in_groups(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "dcr", "dcr"), make_run(tmp_path / "other", "dcr")
    block = one_step()
    stepped(run, "sft", block)
    grouped = {
        params: {
            "norm": {"within": s["norm"], "pooled": [0, 0, 0]},
            "prediction": {"pearson": s["signed"], "slope": s["slope"]},
            "states": {"dot": s["dot"], "cosine": s["cosine"]},
        }
        for params, s in block["params"].items()
    }
    stepped(other, "sft", block | {"params": grouped, "trained": ["a", "b", "c", "d", "e", "f"]})
    blocks = (read_run(folder).evaluations[0].claims for folder in (run, other))
    first, second = (claims.step_scores(block) for block in blocks if block)
    assert first == second
    assert first.trained == 6
    assert first.params["trunk-14"]["signed"] == Interval(0.2, 0.1, 0.4)


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
    run = make_run(tmp_path / "dcr", "dcr")
    stepped(run, "sft", one_step(seemingly_toxic=seeming, normal=normal))
    _, rows, _ = told(tmp_path, run)
    assert of(rows, "refusal_spreads")[0]["verdict"] == verdict


def test_missing_statistics_are_noted_and_the_others_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "dcr", "dcr")
    block = one_step()
    del block["params"]["tail-2"]["signed"]
    block["params"]["trunk-14"]["norm"] = None
    block["change"][NORMAL] = [None, None, None]
    stepped(run, "sft", block)
    text, rows, _ = told(tmp_path, run)
    assert [row["params"] for row in of(rows, "size_of_change")] == ["tail-2"]
    assert [row["params"] for row in of(rows, "signed_change")] == ["trunk-14"]
    assert of(rows, "refusal_spreads")[0]["verdict"] == ABSENT
    for lacking in ("tail-2 has no readable signed", "trunk-14 has no readable norm",
                    "claims.change has no readable normal"):  # fmt: skip
        assert lacking in text
    assert len(of(rows, "proposition_1")) == 4  # two of this evaluation, before and after lacking


def test_without_data_every_claim_names_its_command(tmp_path: Path) -> None:
    run = make_run(tmp_path / "dcr", "dcr")
    make_eval(run, {"safe": "cr", "unsafe": "rr"})
    text, rows, page = told(tmp_path, run)
    assert {row["claim"] for row in rows} == set(CLAIMS)
    assert {row["verdict"] for row in rows} == {ABSENT}
    assert all("python " in row["command"] for row in rows)
    assert (
        f"python eval.py run={run} stage=contrastive tasks=[kernel]"
        in of(rows, "within_rises")[0]["command"]
    )
    assert {row["estimate"] + row["low"] + row["boundary"] for row in rows} == {""}
    assert "not measured" in text
    assert "not measured" in page


def test_what_others_have_is_noted_as_lacking(tmp_path: Path) -> None:
    stl, dcr = make_run(tmp_path / "stl", "stl"), make_run(tmp_path / "dcr", "dcr")
    for step in STEPS:
        kept_step(stl, "sft", step, rising)
    make_eval(dcr, {"safe": "cr", "unsafe": "rr"})
    text, rows, _ = told(tmp_path, stl, dcr)
    assert len(of(rows, "joint_movement")) == 1
    assert f"3 or more steps of SFT in {dcr}" in text


@pytest.mark.parametrize("fault", ["torn", "absent", "others", "infinite"])
def test_a_faulty_matrix_is_named(tmp_path: Path, fault: str) -> None:
    run, base = make_run(tmp_path / "dcr", "dcr"), make_run(tmp_path / "base", "base")
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
            told(tmp_path, run, base)
        return
    text, rows, _ = told(tmp_path, run, base)
    assert of(rows, "within_rises")[0]["verdict"] == ABSENT
    assert text.count(f"{path}: missing") == 1
    assert of(rows, "base_asymmetry")[0]["verdict"] != ABSENT


def test_other_prompts_are_no_pair(tmp_path: Path) -> None:
    run, base = make_run(tmp_path / "dcr", "dcr"), make_run(tmp_path / "base", "base")
    evaluated(run, "contrastive", cells(AFTER))
    place = evaluated(base, "base", cells(BEFORE))
    block = json.loads((place / "metrics.json").read_text())["kernel"]
    change(place, kernel=block | {"top_k": 5})
    text, rows, _ = told(tmp_path, run, base)
    assert of(rows, "within_rises")[0]["verdict"] == ABSENT
    assert "no kernel of the base model over tail-2 and the same prompts" in text


def test_of_several_base_models_the_first_is_taken(tmp_path: Path) -> None:
    run = make_run(tmp_path / "dcr", "dcr")
    evaluated(run, "contrastive", cells(AFTER))
    bases = [make_run(tmp_path / name, "base") for name in ("one", "two")]
    for base, values in zip(bases, (BEFORE, AFTER), strict=True):
        evaluated(base, "base", cells(values))
    other = make_run(tmp_path / "other", "base", model={"label": "large"})
    change(evaluated(other, "base", cells(AFTER)), model="large")
    text, rows, _ = told(tmp_path, other, run, *bases)
    assert [interval(r)[0] for r in of(rows, "within_rises")] == pytest.approx([0.1, 0.1])
    assert f"{bases[0] / 'eval/base'} is the base model for" in text
    assert f"{bases[1] / 'eval/base'} would do as well" in text


def test_unfinished_tracking_is_noted_and_the_rest_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "stl")
    for step in STEPS:
        kept_step(run, "sft", step, rising)
    (run / "tracking/sft/step-000005/metrics.json").unlink()
    text, rows, _ = told(tmp_path, run)
    (row,) = of(rows, "joint_movement")
    assert "at 4 steps of SFT" in row["sentence"]
    assert interval(row) == pytest.approx((1, 1, 1))
    assert "step-000005: skipped, no metrics.json" in text.replace("\n", " ")


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
    assert "A claim holds where its whole 95% bootstrap interval" in page
    assert "A claim holds where its whole 95% bootstrap interval" in " ".join(text.split())
    assert CLAIMS["base_asymmetry"] in page
    assert "&lt;s&gt;, seed 0: at 5 steps of SFT" in page
    assert {row["model"] for row in of(rows, "joint_movement")} == {"<i>&"}
    assert max(map(len, text.splitlines())) <= 140


def test_without_the_flag_there_are_no_claims(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "stl")
    make_eval(run, {"safe": "cr", "unsafe": "rr"})
    text = report.build([run], tmp_path / "page.html")
    assert "Claims of the paper" not in text
    assert 'id="claims"' not in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not (tmp_path / "claims.csv").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a", "stl")
    for step in STEPS:
        kept_step(run, "sft", step, rising)
    out = tmp_path / "r.html"
    assert main([str(run), "--claims", f"out={out}"]) == 0
    assert f"claims: {tmp_path / 'claims'}.csv" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"a", "r.html", "claims.csv"}
    assert main([str(run), "--claims", f"out={tmp_path / 'claims.csv'}"]) == 2
    assert "--claims writes a file of this name" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "--claims" in capsys.readouterr().out
    assert main([str(run), f"out={out}"]) == 2, "tracking alone is no evaluation"


def test_a_run_that_was_tracked_needs_no_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "stl")
    kept_step(run, "sft", 0, rising)
    (tracked,) = read_run(run, curves_suffice=True).tracked
    assert (tracked.stage, tracked.step, tracked.kernel) == ("sft", 0, None)


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
    assert claims.verdict(measured) == above
    assert claims.verdict(measured, above=False) == below
