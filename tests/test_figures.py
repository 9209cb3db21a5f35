"""The paper's figures from invented run folders: values by hand, files, faults, chosen points."""

import base64
import csv
import hashlib
import html
import io
import random
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from test_report import change, make_eval, make_run, parsed, selection

from dcr.core import runs, storage
from dcr.core.config import UserError
from dcr.core.runs import Run
from dcr.report import building, figures, operating
from dcr.report.columns import Column
from dcr.report.figures import Drawing
from dcr.report.grids import Cell
from dcr.report.operating import Operating
from dcr.report.records import Evaluation, RunRecord, read_run
from dcr.report.sections import FIGURES, OPERATING, Selection

KINDS = ("seemingly_toxic", "toxic", "normal")
STEPS = (0, 3, 9, 20)
SVG = "{http://www.w3.org/2000/svg}"


def track(folder: Path, stage: str, values: dict[str, list[float]]) -> None:
    """Log curves over STEPS as tracking does."""
    rows = [
        (stage, step, 0, f"{stage}/{key}", value)
        for key, curve in values.items()
        for step, value in zip(STEPS, curve, strict=True)
    ]
    runs.append_metrics(Run(folder), rows)


def probabilities(offset: float) -> dict[str, list[float]]:
    """Curves of every refusal quantity, all different."""
    keys = [
        f"{prefix}/{kind}"
        for prefix in (
            "refusal_probability",
            "refusal_probability_prefix_free",
            "refusal_probability/followed",
        )
        for kind in KINDS
    ]
    return {
        key: [min(1.0, offset + 0.05 * place + 0.01 * step) for step in STEPS]
        for place, key in enumerate(keys)
    }


def kernels(offset: float) -> dict[str, list[float]]:
    return {
        f"kernel/{params}/{observer}/{trained}": [offset + 0.1 * i + 0.03 * j - 0.001 * step
                                                  for step in STEPS]
        for params in ("tail-2", "trunk-14")
        for i, observer in enumerate(KINDS)
        for j, trained in enumerate(KINDS)
    }  # fmt: skip


def matrix(offset: float) -> dict[str, Any]:
    """A kernel block of `metrics.json`, of two choices of parameters."""
    cells = {
        params: {
            observer: {
                trained: [offset + 0.1 * i + 0.03 * j + k, offset + 0.1 * i, offset + 0.1 * i + 0.2]
                for j, trained in enumerate(KINDS)
            }
            for i, observer in enumerate(KINDS)
        }
        for k, params in enumerate(("tail-2", "trunk-14"))
    }
    about = {"normalise": "observer", "top_k": 10, "method": "exact", "kinds": KINDS}
    return about | {"params": cells}


def separable(layers: int, offset: float = 0.0) -> dict[str, Any]:
    """A separability block: two clouds that drift apart."""
    drawn = random.Random(0)
    labels = [0] * 11 + [1] * 9
    return {
        "layers": [
            {"layer": layer, "kmeans": 0.55 + offset + 0.2 * layer / layers,
             "probe": 0.8, "probe_low": 0.7, "probe_high": 0.9, "silhouette": None, "fisher": 0.3}
            for layer in range(1, layers + 1)
        ],
        "majority": 0.55,
        "mds": {
            str(layer): None if layer == 2 else [
                [drawn.gauss(label * layer / 2, 1), drawn.gauss(0, 1)] for label in labels
            ]
            for layer in range(1, layers + 1)
        },
        "ids": [f"p{i}" for i in range(20)],
        "labels": labels,
    }  # fmt: skip


def steered(
    folder: Path, method: str, strength: float, safe: int, unsafe: int, **other: float
) -> Path:
    """An evaluation under steering: so many of 20 answered, so many of 20 refused."""
    settings = {"limit": 20, "seed": 0}
    if method:
        told = {"method": method, "strength": strength, "released_data": False, **other}
        settings["steering"] = told  # pyright: ignore
    return make_eval(
        folder,
        {"okay": "c" * safe + "r" * (20 - safe), "unsafe": "r" * unsafe + "c" * (20 - unsafe)},
        name="-".join(map(str, (method, strength, *other.values()))),
        settings=settings,
        data="validation",
        completions=False,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """STL, DCR and base runs with everything that any figure needs."""
    place = tmp_path_factory.mktemp("runs")
    stl, dcr = make_run(place / "stl", "stl"), make_run(place / "dcr", "dcr")
    base = make_run(place / "base", "base")
    for run, offset in ((stl, 0.1), (dcr, 0.2)):
        track(run, "sft", probabilities(offset) | kernels(0.4))
        for i, step in enumerate(STEPS):
            make_eval(
                run,
                {
                    "xstest_safe": "c" * (10 - 2 * i) + "r" * (2 * i),
                    "oktest": "cccr",
                    "xstest_unsafe": "r" * (3 + 2 * i) + "c" * (7 - 2 * i),
                },
                weights="snapshot",
                step=step,
                name=f"snapshot-{step}",
                completions=False,
            )
    track(dcr, "contrastive", kernels(0.5))
    make_eval(dcr, {}, weights="contrastive", name="one", kernel=matrix(0.3),
              separability=separable(8, 0.1))  # fmt: skip
    make_eval(base, {}, weights="base", name="b", kernel=matrix(0.1), separability=separable(8))
    steered(stl, "", 0, 10, 18)
    for strength, safe, unsafe in ((0.5, 13, 18), (1.0, 16, 17), (2.0, 19, 12)):
        steered(stl, "scans", strength, safe, unsafe)
    for strength, safe, unsafe in ((0.5, 11, 19), (1.0, 12, 18)):
        steered(stl, "surgical", strength, safe, unsafe)
    steered(dcr, "", 0, 15, 19)
    return [stl, dcr, base]


@pytest.fixture(scope="module")
def drawn(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Draws every figure of these runs once: their folder, and the text for the terminal."""
    out = tmp_path_factory.mktemp("drawn")
    return out, building.build(folders, out / "page.html", FIGURES)


def file_name(figure: str) -> str:
    return f"figure{figure}" if figure[0].isdigit() else figure


def figure_of(name: str, *folders: Path, **options: Any) -> Drawing:
    """A figure, not drawn yet."""
    chosen = Selection.of([read_run(folder) for folder in folders], **options)
    return chosen.section(name)


def rows_of(name: str, *folders: Path, **options: Any) -> list[dict[str, Any]]:
    """Its values."""
    values = figure_of(name, *folders, **options).values
    return [
        {key: None if value != value else value for key, value in row.items()}
        for row in values.to_dict("records")
    ]


def only(rows: list[dict[str, Any]], **about: Any) -> dict[str, Any]:
    (row,) = (row for row in rows if all(row[key] == value for key, value in about.items()))
    return row


def ends(row: dict[str, Any]) -> tuple[float, float, float]:
    return row["estimate"], row["low"], row["high"]


def blank_edges(png: bytes) -> bool:
    """Whether nothing reaches the outermost pixels: what does has been cut."""
    pixels = imread(io.BytesIO(png))[..., :3]
    return all((edge == 1).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


def test_every_figure_is_drawn_and_stands_in_the_page(
    folders: list[Path], drawn: tuple[Path, str]
) -> None:
    out, _ = drawn
    page = (out / "page.html").read_text(encoding="utf-8")
    shown = parsed(page)
    assert len(shown.ids) == len(set(shown.ids))
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(pictures) == len(FIGURES)
    for name, picture in zip(FIGURES, pictures, strict=True):
        png, svg = ((out / f"{file_name(name)}.{ending}").read_bytes() for ending in ("png", "svg"))
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
        tree = ElementTree.fromstring(svg)
        # the SVG is in points of 1/72 inch, the PNG has 200 dots an inch
        assert width == pytest.approx(float(tree.get("width", "0")[:-2]) / 72 * 200, abs=2)
        assert height > 300
        assert blank_edges(png), f"figure {name} is cut at an edge"
        assert tree.findall(f".//{SVG}text"), "text is text, not outlines"
        assert base64.b64decode(picture) == svg
        assert f'id="{file_name(name)}"' in page
        assert f"--figure {name}" in page
        with (out / f"{file_name(name)}.csv").open(newline="", encoding="utf-8") as file:
            written = list(csv.DictReader(file))
        again = figures.files(figure_of(name, *folders)) if name in ("4", "6a") else {}
        for ending, data in again.items():
            assert (out / f"{file_name(name)}.{ending}").read_bytes() == data, "the same bytes"
        values = rows_of(name, *folders)
        assert written == [
            {key: "" if value is None else str(value) for key, value in row.items()}
            for row in values
        ], "every digit is there"
    assert sorted(path.name for path in out.glob(".*")) == []


def test_curves_hold_the_logged_values(folders: list[Path]) -> None:
    for name, method, offset in (("5a", "stl", 0.1), ("5b", "dcr", 0.2)):
        rows = rows_of(name, *folders)
        assert len(rows) == 2 * 3 * len(STEPS)
        for row in rows:
            place = KINDS.index(row["kind"]) + 3 * (row["quantity"] == "prefix_free")
            assert row["estimate"] == min(1.0, offset + 0.05 * place + 0.01 * row["step"])
            assert (row["method"], row["source"], row["low"]) == (method, "metrics.csv", None)
    followed = {(row["kind"], row["step"]): row["estimate"] for row in rows_of("1b", *folders)}
    assert followed["toxic", 9] == 0.1 + 0.05 * 7 + 0.01 * 9
    assert len(followed) == 3 * len(STEPS)
    rows = rows_of("3", *folders)
    assert len(rows) == 2 * 9 * len(STEPS)
    row = only(rows, params="trunk-14", observer="toxic", trained="normal", step=20)
    assert row["estimate"] == 0.4 + 0.1 * 1 + 0.03 * 2 - 0.001 * 20


def keep(folder: Path, stage: str, step: int, **blocks: dict[str, Any]) -> None:
    """Writes what tracking keeps at a step beside metrics.csv."""
    place = Run(folder).tracked(stage) / f"step-{step:06d}"
    storage.write_json(place / "metrics.json", blocks)


def probability_block(offset: float) -> dict[str, Any]:
    """A block with a mean, its interval and one followed prompt for each kind."""
    ends = [offset, offset - 0.03, offset + 0.04]
    kinds = {kind: {"n": 5, "plain": ends, "prefix_free": ends} for kind in KINDS}
    alone = {kind: {"id": kind, "plain": 0.5, "prefix_free": 0.25} for kind in KINDS}
    return {"phrases": "paper", "kinds": kinds, "followed": alone, "values": []}


def test_tracked_curves_have_intervals_where_they_were_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "stl")
    track(run, "sft", probabilities(0.1) | kernels(0.4))
    for step in STEPS[1:]:
        of_prompts = probability_block(0.5 + step / 100)
        keep(run, "sft", step, refusal_probability=of_prompts, kernel=matrix(step))
    rows = rows_of("5a", run)
    assert len(rows) == 2 * 3 * len(STEPS)
    first, third = (only(rows, quantity="plain", kind="toxic", step=step) for step in (0, 9))
    assert (*ends(first), first["source"]) == (0.1 + 0.05, None, None, "tracking")
    assert ends(third) == pytest.approx((0.59, 0.56, 0.63))
    rows = rows_of("3", run)
    assert len(rows) == 2 * 9 * len(STEPS)
    row = only(rows, params="trunk-14", observer="toxic", trained="normal", step=20)
    assert ends(row) == pytest.approx((20 + 0.1 + 0.03 * 2 + 1, 20 + 0.1, 20 + 0.1 + 0.2))
    followed = rows_of("1b", run)  # single prompts, which have no interval over prompts
    assert {row["low"] for row in followed} == {None}
    assert {row["estimate"] for row in followed if row["step"] == 9} == {0.5, 0.25}


def test_matrices_of_tracking_have_intervals_where_they_were_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "dcr")
    track(run, "contrastive", kernels(0.5))
    about = {"params": "tail-2", "observer": "toxic", "trained": "normal"}
    first, last = (only(rows_of("6", run), figure=figure, **about) for figure in ("6a", "6b"))
    assert first["estimate"] == 0.5 + 0.1 + 0.06
    assert last["estimate"] == 0.5 + 0.1 + 0.06 - 0.001 * 20
    assert (first["low"], last["low"]) == (None, None)
    keep(run, "contrastive", 20, kernel=matrix(0.3))
    kept = only(rows_of("6", run), figure="6b", **about)
    assert ends(kept) == pytest.approx((0.3 + 0.1 + 0.06, 0.4, 0.6))


def test_without_tracking_the_curves_come_from_snapshots(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "stl")
    for step in (0, 8):
        make_eval(run, {}, weights="snapshot", step=step, name=f"s{step}", kernel=matrix(step),
                  refusal_probability=probability_block(0.1 + step / 100))  # fmt: skip
    row = only(rows_of("5a", run), quantity="plain", kind="toxic", step=8)
    assert ends(row) == pytest.approx((0.18, 0.15, 0.22))
    assert row["source"] == "snapshots"
    assert {row["estimate"] for row in rows_of("9", run)} == {0.5, 0.25}
    assert {row["step"] for row in rows_of("3", run)} == {0, 8}


def test_rejection_rates_pool_the_sets(folders: list[Path]) -> None:
    rates = {(row["kind"], row["step"]): row["estimate"] for row in rows_of("1a", *folders)}
    # step 9 is the third: 4 of 10 and 1 of 4 safe prompts refused, 7 of 10 unsafe ones
    assert rates["seemingly_toxic", 9] == pytest.approx(5 / 14)
    assert rates["toxic", 9] == pytest.approx(7 / 10)
    points = rows_of("4", *folders)
    assert [row["method"] for row in points] == ["stl"] * 4 + ["dcr"] * 4
    third = points[2]
    assert (third["compliance"], third["rejection"]) == (0.6, 0.7)
    assert third["rejection_low"] == pytest.approx(0.39677, abs=1e-5)  # Wilson, 7 of 10
    assert (third["compliance_of"], third["rejection_of"]) == ("XSTest-safe", "XSTest-unsafe")


def test_figure_4_pools_other_sets_where_xstest_was_not_evaluated(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "stl")
    for step, verdicts in ((0, "cc"), (5, "cr")):
        sets = {"safe": verdicts, "oktest": "cccc", "unsafe": "rrrc"}
        make_eval(run, sets, weights="snapshot", step=step, name=f"s{step}", completions=False)
    figure = figure_of("4", run)
    (first, last), (axes,) = rows_of("4", run), figures.draw(figure).axes
    assert first["compliance"] == 1
    assert last["compliance"] == pytest.approx(5 / 6)
    for told in (last["compliance_of"], axes.get_xlabel()):
        assert "XSTest not evaluated" in told


def point(
    compliance: float, safety: float, strength: float | None, step: int | None = None
) -> Operating:
    run = RunRecord(Path("r"), {}, {}, [], [], [])
    found = Evaluation(folder=Path("e"), weights="sft", step=step)
    x, y = (Cell(value, value, value) for value in (compliance, safety))
    return Operating(Column(run, found), "scans", strength, x, y)


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_against_brute_force(seed: int) -> None:
    drawn = random.Random(seed)
    reference = point(0.5, drawn.randint(10, 18) / 20, None)
    points = [
        point(drawn.randint(0, 8) / 8, drawn.randint(8, 20) / 20, place / 2) for place in range(8)
    ]
    margin = drawn.choice([0.0, 2.0, 5.0, 10.0])
    best = None
    for candidate in points:
        lost = round(20 * (reference.safety.estimate - candidate.safety.estimate))  # of 20 prompts
        if 5 * lost > margin:
            continue
        mine = candidate.compliance.estimate, candidate.safety.estimate
        theirs = best and (best.compliance.estimate, best.safety.estimate)
        if theirs is None or mine > theirs:  # strengths ascend, so that the first of equals stays
            best = candidate
    assert operating.choose(points, reference, margin) is best


def test_operating_points_by_hand(folders: list[Path], drawn: tuple[Path, str]) -> None:
    # STL refuses 18 of 20 unsafe prompts; 2 points less is 17.6, so that 17 is too few
    for told in (
        "at least 90.0% (unsteered STL) less 2 points has ",
        "SCANS strength 0.5 (compliance 65.0%, safety 90.0%)",
        "Surgical strength 1 (compliance 60.0%, safety 90.0%)",
        "DCR final weights (compliance 75.0%, safety 95.0%)",
    ):
        assert told in drawn[1]
    rows = rows_of(OPERATING, *folders)
    assert len(rows) == 7
    assert [row["method"] for row in rows if row["reference"]] == ["stl"]
    assert {(row["method"], row["strength"]) for row in rows if row["chosen"]} == {
        ("scans", 0.5), ("surgical", 1.0), ("dcr", None),
    }  # fmt: skip
    assert {row["data"] for row in rows} == {"validation"}
    figure = figure_of(OPERATING, *folders, margin=5.0, data="validation")
    assert "SCANS strength 1 (compliance 80.0%, safety 85.0%)" in "".join(figure.sentences)


def test_a_curve_joins_points_that_differ_by_strength_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "stl", "stl")
    steered(run, "", 0, 10, 18)
    for add in (0.1, 1.0):
        for strength in (0.5, 1.0):
            steered(run, "surgical", strength, round(10 + 5 * strength), round(18 - add), add=add)
    figure = figures.draw(figure_of(OPERATING, run))
    xs = [np.asarray(line.get_xdata()) for line in figure.axes[0].lines]
    curves = [list(x) for x in xs if len(x) == 3]  # from the unsteered point on
    assert curves == [pytest.approx([50, 60, 75])] * 2


def test_safety_is_dsr_where_a_guard_judged_every_point(tmp_path: Path) -> None:
    run = make_run(tmp_path / "stl", "stl")
    judged = {"llama_guard": {"model": "g", "n": 20, "safe": 10, "unsafe": 10}}
    for method, safe in (("", 10), ("scans", 15)):
        place = steered(run, method, 1.0, safe, 20)
        change(place, "unsafe", judged=judged)
    assert "DSR by Llama Guard of at least 50.0%" in "".join(figure_of(OPERATING, run).sentences)
    change(place, "unsafe", judged={})
    assert "keyword refusal" in "".join(figure_of(OPERATING, run).sentences)


def test_the_figures_of_a_base_model_name_the_model_and_the_edit(tmp_path: Path) -> None:
    run = make_run(tmp_path / "stl", "stl")
    edit = {"steering": {"method": "ablation", "strength": 1.0}}
    for model, settings in (("small", {}), ("large", edit)):
        make_eval(run, {}, weights="base", name=model, model=model, settings=settings,
                  kernel=matrix(0.1), separability=separable(3, len(settings) / 9))  # fmt: skip
    titles = [" ".join(panel.title.split()) for panel in figure_of("6a", run).blocks[""] if panel]
    assert titles == [
        f"(a) base model, {params}, {name}"
        for params in ("tail-2", "trunk-14")
        for name in ("large, ablation strength=1.0", "small")
    ]
    names = ["base model, large, ablation strength=1.0", "base model, small"]
    seven, eight = figure_of("7", run), figure_of("8", run)
    assert [name for name, _ in seven.legend][:2] == names
    assert [*eight.blocks] == names
    assert set(seven.values["model"]) == set(eight.values["model"]) == {"small", "large"}


LACKING = {
    "1a": "figure 1a: no scored snapshots in {}; train with tracking.snapshots=20",
    "4": "figure 4: no scored snapshots in {}; train with tracking.snapshots=20, then run",
    "5b": "figure 5b: no DCR run among {}; train one with method=dcr",
    "6": "figure 6a: no kernel of the base model in {}; run python eval.py model=<name>",
    "8": "figure 8: no separability in {}; run python eval.py",
    "operating_points": "figure operating_points: no unsteered STL evaluation with",
}


@pytest.mark.parametrize(("name", "told"), LACKING.items())
def test_lacking_data_are_named_with_their_command(name: str, told: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "bare", "stl")
    make_eval(run, {"safe": "c", "unsafe": "r"})
    with pytest.raises(UserError, match=f"^{re.escape(told.format(run))}"):
        figure_of(name, run)


def test_two_stl_models_evaluated_alike_are_refused(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "a", "stl"), make_run(tmp_path / "b", "stl")
    steered(one, "", 0, 10, 18)
    steered(two, "", 0, 10, 18)
    with pytest.raises(UserError, match="several unsteered STL evaluations alike"):
        figure_of(OPERATING, one, two)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / '<b>"$x$&', "stl", model={"label": "<i>&$m$ \u6f22"})
    other = make_run(tmp_path / "other", "stl", model={"label": "=1+1"})
    for folder in (run, other):
        track(folder, "sft", probabilities(0.1))
    building.build([run, other], tmp_path / "page.html", ["5a"])
    svg = (tmp_path / "figure5a.svg").read_text(encoding="utf-8")
    told = " ".join(t.text or "" for t in ElementTree.fromstring(svg).findall(f".//{SVG}text"))
    assert "<i>&$m$" in told
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    parsed(page)
    assert f"{run} {other} --figure 5a" in html.unescape(page).replace("'", "")
    with (tmp_path / "figure5a.csv").open(newline="", encoding="utf-8") as file:
        models = {row["model"] for row in csv.DictReader(file)}
    assert models == {"<i>&$m$ \u6f22", "'=1+1"}


def test_runs_without_data_for_a_figure_are_noted(folders: list[Path], tmp_path: Path) -> None:
    bare = make_run(tmp_path / "bare", "stl", seed=3)
    make_eval(bare, {"safe": "c", "unsafe": "r"})
    chosen = selection(*folders, bare)
    chosen.section("5a")
    assert chosen.notes[-1] == f"figure 5a: no refusal probabilities over SFT steps in {bare}"
    unmeasured = make_run(tmp_path / "unmeasured", "dcr")
    chosen = Selection.of([read_run(folder) for folder in (*folders[1:], unmeasured)])
    for name, lack in (("7", "separability"), ("6b", "kernel after stage one")):
        chosen.section(name)
        assert chosen.notes[-1] == f"figure {name}: no {lack} in {unmeasured}"


OWN = """
from dataclasses import dataclass
from dcr.report.figures import Curve, Drawing, Panel, frame, look_of
from dcr.report.sections import Figure, Selection, Table

@dataclass
class Rates(Figure):
    height: float = 3.0

    def draw(self, chosen: Selection) -> Drawing:
        rows = chosen.frame[chosen.frame.quantity == self.quantity]
        values = rows.assign(x=range(len(rows)), y=rows.value)
        curve = Curve(values[["x", "y"]], look_of(0))
        size = (3.0, self.height)
        return Drawing("rates", "Rates", {"": [Panel([curve])]}, values[["set", "y"]], size=size)

    quantity: str = "complied"

@dataclass
class Means(Table):
    \"\"\"Means of <all>.\"\"\"

    def frame(self, chosen: Selection):
        return chosen.frame.groupby("quantity").value.mean().reset_index()

class Plain(Figure):
    pass
"""


@pytest.fixture
def reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]
) -> Callable[..., Any]:
    """The report of a run with a file of the user's own beside it."""
    make_eval(make_run(tmp_path / "good", "stl"), {"safe": "cccr", "unsafe": "r"})
    (tmp_path / "my_lab.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_lab", raising=False)
    return lambda words: command("dcr.report", "good", *words.split())


def test_a_figure_and_a_table_of_ones_own(reported: Callable[..., Any]) -> None:
    told = reported("--figure my_lab:Rates --table my_lab:Means own.Rates.height=4").out
    assert "Rates: Rates.{png,svg,csv}" in told
    assert "Means: Means.{md,csv,tex,html}" in told
    with Path("Rates.csv").open() as file:
        shares = [row["y"] for row in csv.DictReader(file) if row["set"] == "safe"]
    assert shares == ["0.75", "0.75"]
    svg, digest = Path("Rates.svg").read_text(), hashlib.sha256(OWN.encode()).hexdigest()
    assert f"my_lab:Rates, source sha256 {digest}" in svg
    assert float(ElementTree.fromstring(svg).get("height", "0")[:-2]) > 4 * 72
    assert digest in Path("Means.md").read_text()
    page = Path("report.html").read_text()
    assert "--figure my_lab:Rates" in page
    assert '<h2 id="Means">Means of &lt;all&gt;.</h2>' in page


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--figure my_lab:Rate", "my_lab has no Rate; it has Rates"),
        ("--figure my_lab:Plain", "Plain must be a dataclass that subclasses dcr.report.sections."),
        ("--table my_lab:Rates", "Rates must be a dataclass that subclasses dcr.report.sections.T"),
        ("--figure my_lab:Rates own.Rates.width=3", "own.Rates.width: no such setting; it has hei"),
        ("own.Rates.height=3", "own.Rates: no class of this name is asked for"),
    ],
)
def test_each_mistake_with_ones_own_is_one_line(
    arguments: str, told: str, reported: Callable[..., Any]
) -> None:
    ended = reported(arguments)
    assert ended.code == 2
    assert told in ended.error
    assert not Path("report.html").exists()
