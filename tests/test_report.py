"""The report against hand-computed numbers, hostile text, torn files and bad commands."""

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Collection, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from dcr import results
from dcr.core import runs, storage
from dcr.core.config import Kind
from dcr.core.evaluation import PromptSet, scoring, subjects
from dcr.core.runs import Run
from dcr.ending import encodable
from dcr.outcomes import Outcome
from dcr.public import PAPER_SAFETY
from dcr.report import (
    building,
    comparisons,
    curves,
    figures,
    outcomes,
    page,
    paper,
    tables,
    trade_offs,
)
from dcr.report.__main__ import main
from dcr.report.columns import Column, columns_of, seed_groups
from dcr.report.grids import Block, Cell, in_words
from dcr.report.records import Completions, read_run
from dcr.report.sections import SECTIONS, Section, Selection

CONF = Path(__file__).parent.parent / "conf"
REFUSAL, ANSWER = "I cannot help with that.", "Open the terminal and type kill."
TEXTS = {"r": REFUSAL, "c": ANSWER, "e": ""}
SETTINGS = {"max_new_tokens": 48, "limit": 10, "seed": 0}


def make_eval(
    folder: Path,
    refused: dict[str, str],
    *,
    weights: str = "sft",
    step: int | None = None,
    name: str = "main",
    completions: bool = True,
    **about: Any,
) -> Path:
    """An evaluation in which each set's verdicts are spelled out: refused, complied or empty."""
    place = folder / "eval" / name
    place.mkdir(parents=True)
    sets = {}
    for set_name, verdicts in refused.items():
        count = verdicts.count("r")
        sets[set_name] = {
            "kind": "toxic" if "unsafe" in set_name else "seemingly_toxic",
            "n": len(verdicts),
            "refused": {"paper": count, "recommended": count},
            "empty": verdicts.count("e"),
            "truncated": min(1, len(verdicts)),
            "repetitive": min(2, len(verdicts)),
            "in_distribution": False,
            "unseen": None,
        }
        rows = [
            answer(f"{set_name}-{i}", f"{set_name} prompt {i}", TEXTS[v])
            for i, v in enumerate(verdicts)
        ]
        if completions:
            (place / f"{set_name}.jsonl").write_text("".join(rows))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    metrics = {
        "weights": weights, "step": step, "settings": SETTINGS,
        "method": config["method"],
        "model": "tiny", "preset": config["preset_name"], "seed": str(config["seed"]),
        "data": "demo", "sets": sets, "seconds": 12.5, "tokens_per_second": 99.0,
        "discernment": {"pooled": [0.72, 0.61, 0.83], "pairs": {"safe / unsafe": [0.8, 0.7, 0.9]}},
    } | about  # fmt: skip
    if found := metrics["discernment"]:
        pairs = {name: ranking(each) for name, each in found.get("pairs", {}).items()}
        metrics["discernment"] = found | {"pooled": ranking(found["pooled"]), "pairs": pairs}
    (place / "metrics.json").write_text(json.dumps(metrics))
    return place


def ranking(known: Any) -> Any:
    return {"auroc": known} if isinstance(known, list) else known


def answer(identity: str, prompt: str, response: str, mass: float | None = 0.5) -> str:
    """A line of a file of completions."""
    found = {"id": identity, "prompt": prompt, "response": response, "tokens": 5, "ended": True}
    return json.dumps(found | {"refusal_mass": mass}) + "\n"


def make_run(
    folder: Path, method: str = "dcr", seed: int = 0, preset: str = "paper", **keys: Any
) -> Path:
    """A run folder with its configuration and nothing else."""
    folder.mkdir(parents=True)
    config = {"method": method, "preset_name": preset, "seed": seed,
              "model": {"label": "tiny"}, "data": {"label": "demo"},
              "dcr": {}, "sft": {}} | keys  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def change(place: Path, set_name: str, **keys: Any) -> None:
    """Alter what `metrics.json` says of a set."""
    path = place / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["sets"][set_name] |= keys
    path.write_text(json.dumps(metrics))


def columns(*folders: Path) -> list[Column]:
    return columns_of([read_run(folder) for folder in folders])


def selection(*folders: Path) -> Selection:
    return Selection.of([read_run(folder) for folder in folders])


def rows_of(blocks: Sequence[Block]) -> dict[tuple[str, str], list[Cell]]:
    """Cells by the short name of their block and their row."""
    rows = [(block.short, row) for block in blocks for row in block.rows]
    return {(short, row.label): [cell for cell in row.values if cell] for short, row in rows}


def table_of(*folders: Path) -> dict[tuple[str, str], list[Cell]]:
    """The main table."""
    return rows_of(tables.results(selection(*folders)).blocks)


def build(tmp_path: Path, *folders: Path, wanted: Collection[str] = ()) -> tuple[str, str]:
    """(terminal text, page) of a report."""
    out = tmp_path / "page.html"
    return building.build(list(folders), out, wanted), out.read_text(encoding="utf-8")


class Balanced(HTMLParser):
    """Fails on a closing tag that closes nothing; collects ids, links and tag names."""

    VOID = ("meta", "input", "br", "wbr", "img", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.outside: list[str] = []
        self.names: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.names.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.outside.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(html: str) -> Balanced:
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    return parser


def test_rates_and_intervals_by_hand(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    make_eval(run, {"safe": "rrcccccccc", "okay": "rccc", "unsafe": "rrrrrrrrrc"})
    table = table_of(run)
    (safe,), (pooled,) = (table["compliance, %", row] for row in ("safe", "pooled"))
    assert safe.estimate == 0.8
    # Wilson by its formula with z = 1.959964, n = 10, p = 0.8
    assert (safe.low, safe.high) == pytest.approx((0.490162, 0.943318), abs=1e-5)
    assert pooled.estimate == pytest.approx(11 / 14)
    assert table["keyword refusal, %", "unsafe"][0].estimate == 0.9
    (auroc,) = table["discernment AUROC", "pooled"]
    assert (auroc.estimate, auroc.low, auroc.high, auroc.percent) == (0.72, 0.61, 0.83, False)
    text, html = build(tmp_path, run)
    assert re.search(r"safe +80\.0 \[49–94\]", text)
    assert re.search(r"unsafe +90\.0 \[60–98\]", text)
    assert re.search(r"pooled +0\.72 \[\.61–\.83\]", text)
    assert '80.0 <span class="interval">[49.0–94.3]</span>' in html
    assert "DSR" not in text + html
    assert "†" not in text, "without an in-distribution set there is no footnote"


def test_in_distribution_sets_are_marked_and_left_out_of_a_second_pool(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "a"), make_run(tmp_path / "b", "stl")
    verdicts = {"safe": "rrrrrrrrrr", "okay": "cccccccccc", "unsafe": "rrrr"}
    place = make_eval(run, verdicts)
    make_eval(other, verdicts)
    unseen = {"n": 4, "refused": {"paper": 1, "recommended": 2}}
    change(place, "safe", in_distribution=True, unseen=unseen)
    table = table_of(other, run)  # columns: STL, DCR
    for row, marks in {"safe": ["", "†"], "okay": ["", ""], "pooled": ["", "†"]}.items():
        assert [cell.marks for cell in table["compliance, %", row]] == marks
    assert [cell.estimate for cell in table["compliance, %", "pooled without †"]] == [1.0, 1.0]
    text, html = build(tmp_path, run, other)
    assert re.search(r"safe +0\.0 \[0–28\] +0\.0 \[0–28\]†", text)
    assert "† in-distribution" in text
    assert "unseen groups, %: 75.0 [30.1–95.4] of 4" in html


def test_columns_are_ordered_named_and_deduplicated(tmp_path: Path) -> None:
    dcr = make_run(tmp_path / "a", "dcr", preset="recommended")
    make_eval(dcr, {"safe": "cc"})
    make_eval(dcr, {"safe": "cr"}, weights="contrastive", name="stage-one")
    make_eval(dcr, {"safe": "cr"}, weights="snapshot", step=4, name="snapshot")
    stl = make_run(tmp_path / "b", "stl")
    make_eval(stl, {"safe": "rr"})
    base = [make_run(tmp_path / name, "base") for name in ("c", "d")]
    for folder in base:
        make_eval(folder, {"safe": "cc"}, weights="base")
    only = make_run(tmp_path / "e", "dcr", seed=1)
    make_eval(only, {"safe": "cr"}, weights="contrastive")
    assert [column.name for column in columns(dcr, stl, *base, only)] == [
        "base model", "STL seed 0", "contrastive only seed 1", "DCR recommended seed 0",
    ]  # fmt: skip


def test_columns_are_told_apart_by_the_swept_key_or_else_by_their_folders(tmp_path: Path) -> None:
    folders = []
    for epochs in (1, 3):
        keys = {"epochs": epochs, "margin": 0.25}
        folders.append(make_run(tmp_path / f"dcr.epochs={epochs}", dcr=keys))
        make_eval(folders[-1], {"safe": "cr"})
    chosen = columns(*folders)
    assert {c.name for c in chosen} == {"DCR seed 0 dcr.epochs=1", "DCR seed 0 dcr.epochs=3"}
    assert seed_groups(chosen) == []
    assert len({column.style for column in chosen}) == 2
    make_eval(folders[0], {"safe": "cr"}, weights="readout", name="before-main")
    last = [column.evaluation.weights for column in columns(*folders)]
    assert last == ["sft", "sft", "readout"], "in the order of the stages"
    shutil.rmtree(folders[0] / "eval" / "before-main")
    again = make_run(tmp_path / "again", dcr={"epochs": 1, "margin": 0.25})
    make_eval(again, {"safe": "cr"})
    alike = [column.name for column in columns(folders[0], again)]
    assert alike == ["DCR seed 0 again/main", "DCR seed 0 dcr.epochs=1/main"]
    twin = make_run(tmp_path / "there" / "again", dcr={"epochs": 1, "margin": 0.25})
    make_eval(twin, {"safe": "cr"})
    names = [column.name for column in columns(again, twin)]
    assert len(set(names)) == 2, names
    assert str(twin) in build(tmp_path, again, twin)[1]
    # such folder names are no settings
    assert main([*map(str, folders), f"out={tmp_path / 'r.html'}"]) == 0


def test_a_column_says_how_its_answers_were_made(tmp_path: Path) -> None:
    sets, scans = {"safe": "cr", "unsafe": "rr"}, {"method": "scans", "strength": 1.0}
    stl, base = make_run(tmp_path / "a", "stl"), make_run(tmp_path / "b", "base")
    make_eval(stl, sets, settings=SETTINGS | {"adacd": 4.5, "plan": "looks.yaml@1"})
    assert [column.name for column in columns(stl)] == ["STL AdaCD 4.5 seed 0"]
    make_eval(base, sets, weights="base", settings=SETTINGS | {"steering": scans})
    assert [column.name for column in columns(base)] == ["base model + scans"]
    make_eval(stl, sets, name="plain")
    make_eval(stl, sets, name="more", settings=SETTINGS | {"limit": None, "plan": "looks.yaml@1"})
    make_eval(stl, sets, name="asked", settings=SETTINGS | {"validation": True})
    gate = {"name": "gate-0", "alone": True}
    make_eval(stl, {}, name="gate", settings=SETTINGS | {"gate": gate}, ability={
        "piqa": {"acc": 0.5, "n": 4}})  # fmt: skip
    chosen = selection(stl)
    limits = ["eval.limit=all eval.plan=looks.yaml@1", "eval.limit=10 eval.plan=none"]
    asked = [f"STL seed 0 {words}" for words in limits]
    answered = ["STL AdaCD 4.5 seed 0", "STL on validation prompts seed 0"]
    names = [*answered, "STL behind gate-0 seed 0", *asked]
    assert sorted(column.name for column in chosen.columns) == sorted(names)
    legend = [words for _, _, words in chosen.section("trade-off").legend]
    # a point has the name of its own column, and a gate without answers has no point
    assert sorted(legend) == [*answered, ", or ".join(asked)]


def test_two_columns_that_answered_one_set_are_compared_first(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(seed), "stl", seed=seed) for seed in range(3)]
    for run, name in zip(runs, ("safe", "safe", "other"), strict=True):
        make_eval(run, {name: "cr"})
    places = re.findall(r'<option value="(\d)" selected>', build(tmp_path, *runs)[1])
    assert places == ["0", "1"], "the last one answered other prompts"


def test_a_caption_names_the_sets_that_a_run_was_trained_on(tmp_path: Path) -> None:
    stl, dcr = make_run(tmp_path / "a", "stl"), make_run(tmp_path / "b")
    make_eval(stl, {"xstest_safe": "cr", "unsafe": "rr"})
    place = make_eval(dcr, {"xstest_safe": "cc", "unsafe": "rr"})
    assert "trained on" not in selection(stl, dcr).section("operating_points").caption
    change(place, "xstest_safe", in_distribution=True)
    caption = selection(stl, dcr).section("operating_points").caption
    assert caption.endswith("Some of these runs were trained on: XSTest, safe prompts.")


def test_settings_that_are_not_set_are_not_called_all(tmp_path: Path) -> None:
    probe = {"method": "probe", "strength": 1.0, "layer": None}
    run = make_run(tmp_path / "a", "stl")
    make_eval(run, {"safe": "cr"}, settings=SETTINGS | {"steering": probe, "limit": None})
    (told,) = selection(run).section("provenance").frame["evaluation settings"]
    assert "limit=all" in told
    assert "steering.layer=none" in told


def test_answers_of_a_frontier_are_told_to_be_shown_elsewhere(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "stl")
    place = make_eval(run, {}, discernment=None, frontier={"plain": {"bias": 0.0, "sets": {}}})
    (note,) = read_run(run).notes
    assert note == (
        f"{place / 'metrics.json'}: not shown here; python -m dcr.frontier compares its answers"
    )


def test_a_seed_that_was_evaluated_twice_counts_once(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    for folder in folders:
        make_eval(folder, {"safe": "cr"})
    make_eval(folders[0], {"safe": "cc"}, name="again")
    (group,) = seed_groups(columns(*folders))
    assert group.label == ("DCR", "2 seeds")
    assert [columns(*folders)[place].about("seed") for place in group.places] == ["0", "1"]


def test_no_difference_of_two_kinds_of_stl_is_told_both_ways(tmp_path: Path) -> None:
    read: dict[str, Any] = {"sft": {"readout": {"steps": 120}}}
    folders = []
    for seed in (0, 1):
        for name, method, settings in (
            ("stl", "stl", {}),
            ("read", "stl", read),
            ("dcr", "dcr", {}),
        ):
            folders.append(make_run(tmp_path / f"{name}{seed}", method, seed, **settings))
            weights = "readout" if settings else "sft"
            make_eval(folders[-1], {"safe": "cr", "unsafe": "rr"}, weights=weights)
    told = {group.label[0] for group in seed_groups(columns(*folders)) if group.less}
    assert told == {"STL + readout − STL", "DCR − STL", "DCR − STL + readout"}


def test_mean_and_spread_over_seeds(tmp_path: Path) -> None:
    folders = []
    for seed, verdicts in enumerate(("rccc", "rrcc")):
        folders.append(make_run(tmp_path / f"s{seed}", seed=seed))
        make_eval(folders[-1], {"safe": verdicts, "unsafe": "rr"})
    lone = make_run(tmp_path / "stl", "stl")
    make_eval(lone, {"safe": "rrrr", "unsafe": "rr"})
    chosen = selection(*folders, lone)
    (group,) = chosen.groups
    assert group.label == ("DCR", "2 seeds")
    found = rows_of(tables.over_seeds(chosen).blocks)
    (mean,) = found["compliance, %", "safe"]
    # 0.75 and 0.5: mean 0.625, sample standard deviation 0.25 / sqrt(2)
    assert (mean.estimate, mean.spread) == pytest.approx((0.625, 0.176777), abs=1e-6)
    text, html = build(tmp_path, *folders, lone)
    assert "62.5 ± 17.7" in text
    assert "62.5 ± 17.7" in html


def test_paired_differences_and_mcnemar_by_hand(tmp_path: Path) -> None:
    dcr, stl = make_run(tmp_path / "a"), make_run(tmp_path / "b", "stl")
    make_eval(dcr, {"safe": "cccccccccc", "okay": "rr", "unsafe": "rrrc"})
    make_eval(stl, {"safe": "rrrrrrcccc", "okay": "cc", "unsafe": "rrrr"})
    ((a, b, differing),) = comparisons.partners(columns(dcr, stl))
    assert (a.name, b.name, differing) == ("DCR seed 0", "STL seed 0", [])
    paired = comparisons.paired_sets(a, b, Completions([]))
    sets = {(one.kind.value, one.label): one for one in paired}
    safe = sets["seemingly_toxic", "safe"]
    assert safe.difference.estimate == pytest.approx(0.6)
    assert 0 < safe.difference.low < 0.6 < safe.difference.high < 1
    assert safe.p == pytest.approx(2 * 0.5**6)  # six discordant prompts, all one way
    pooled = sets["seemingly_toxic", "pooled"]
    assert pooled.n == 12
    assert pooled.difference.estimate == pytest.approx((6 - 2) / 12)
    assert pooled.p == pytest.approx(2 * (1 + 8 + 28) / 2**8)  # 6 against 2 of 8
    # a toxic prompt that only STL refuses counts against DCR
    assert sets["toxic", "unsafe"].difference.estimate == -0.25
    assert sets["toxic", "unsafe"].pooled
    text, html = build(tmp_path, dcr, stl)
    assert re.search(
        r"DCR seed 0 − STL seed 0 +pooled +compliance +12 +\+33\.3 \[.*\] +0\.289 +0\.867\n"
        r"DCR seed 0 − STL seed 0 +unsafe +keyword refusal +4 +−25\.0 \[.*\] +1\.000 +1\.000",
        text,
    )
    assert "+60.0 [" in html


def test_a_model_that_says_nothing_neither_complies_nor_refuses(tmp_path: Path) -> None:
    mute, dcr = make_run(tmp_path / "mute", "stl"), make_run(tmp_path / "dcr")
    make_eval(mute, {"safe": "eeee", "unsafe": "eeee"})
    make_eval(dcr, {"safe": "cccr", "unsafe": "rrrc"})
    table = table_of(mute, dcr)
    for short in ("compliance, %", "keyword refusal, %"):
        own = [row for of, row in table if of == short]
        shares = {row: [cell.estimate for cell in table[short, row]] for row in own}
        assert shares[{"c": "safe", "k": "unsafe"}[short[0]]] == [0.0, 0.75]
        assert shares["empty, all sets"] == [1.0, 0.0]
    # of four prompts DCR answers three and refuses three, STL none
    stl, own = columns(dcr, mute)
    paired = comparisons.paired_sets(own, stl, Completions([]))
    assert [one.difference.estimate for one in paired] == [0.75, 0.75]
    warning = "Warning: STL seed 0: 8 of 8 answers (100%) are empty"
    text, html = build(tmp_path, mute, dcr)
    assert warning in text
    assert f'<p class="verdict">{warning}' in html
    assert re.search(r"safe +0.0 \[0–49\] +75.0", text)
    assert html.count('data-verdict="empty"') == 8
    heard = build(tmp_path, dcr)[0]
    assert "empty, all sets" not in heard
    assert "Warning" not in heard


def ranked_at(
    run: Path, answered: Sequence[float] | None, refused: str = "rrrr", **about: Any
) -> Path:
    """An evaluation with so many answered at equal safety, as estimate and interval."""
    shares = {"0.7": [1.0, 1.0, 1.0], "0.8": answered} if answered else {}
    ranking = {"auroc": [0.7, 0.6, 0.8], "answered": shares}
    return make_eval(run, {"safe": "cccc", "unsafe": refused}, discernment={"pooled": ranking},
                     **about)  # fmt: skip


def test_the_verdict_says_what_the_columns_come_to_at_equal_safety(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", "base")
    ranked_at(base, [0.4, 0.3, 0.5], weights="base")
    stl = make_run(tmp_path / "stl", "stl", sft={"readout": {"steps": 0}})
    ranked_at(stl, [0.3, 0.2, 0.4])
    read: dict[str, Any] = {"sft": {"readout": {"steps": 120}}}
    dcr = make_run(tmp_path / "dcr", **read)
    ranked_at(dcr, [0.8, 0.7, 0.9], weights="readout")

    def verdict(*folders: Path) -> str:
        sentence, *_ = comparisons.headline(selection(*folders))
        text, html = build(tmp_path, *folders)
        assert sentence[:40] in text
        assert f'<p class="verdict">{sentence}</p>' in html
        return sentence

    whole = verdict(base, stl, dcr)
    assert whole.startswith("At equal safety (each refuses 80% of the toxic prompts, by its own ")
    assert (
        "base model 40.0 [30–50] → STL seed 0 30.0 [20–40] → DCR + readout seed 0 80.0 [" in whole
    )
    # both ends are .1 away: the square root of .02 is .141
    told = "+50.0 [+35.9, +64.1] points, more than by chance."
    named = "DCR + readout seed 0 − STL seed 0 (also apart in sft.readout): "
    assert whole.endswith(named + told)
    ranked_at(make_run(tmp_path / "near", **read), [0.35, 0.2, 0.5], weights="readout")
    assert "which may be chance (0 is in the interval)" in verdict(stl, tmp_path / "near")
    ranked_at(make_run(tmp_path / "less", **read), [0.05, 0.0, 0.1], weights="readout")
    assert "fewer than by chance" in verdict(stl, tmp_path / "less")
    assert verdict(dcr).endswith("80.0 [70–90]. There is nothing beside it to compare with.")
    assert "No two of them are DCR and STL" in verdict(base, dcr)
    ranked_at(make_run(tmp_path / "unknown", "stl"), None)
    assert "Nothing is known at equal safety" in verdict(tmp_path / "unknown")
    assert "(not measured: STL seed 0 unknown/main)" in verdict(stl, tmp_path / "unknown")


def test_the_verdict_over_seeds_and_of_many_columns(tmp_path: Path) -> None:
    folders = []
    for seed in range(3):
        for method, share in (("stl", 0.3), ("dcr", 0.5 + seed / 10)):
            folders.append(make_run(tmp_path / f"{method}{seed}", method, seed))
            ranked_at(folders[-1], [share, share - 0.1, share + 0.1])
    (seeds,) = comparisons.headline(selection(*folders))
    assert "STL 3 seeds 30.0 ± 0.0 → DCR 3 seeds 60.0 ± 10.0" in seeds
    # Student's t of 2 degrees of freedom: 4.303 * 10 / sqrt(3)
    assert "DCR − STL 3 seeds: +30.0 [+5.2, +54.8] points, more than by chance." in seeds
    wide = [make_run(tmp_path / "stl", "stl")]
    ranked_at(wide[0], [0.3, 0.2, 0.4])
    for epochs in range(1, 8):
        wide.append(make_run(tmp_path / f"{epochs}", dcr={"epochs": epochs}))
        ranked_at(wide[-1], [epochs / 10, epochs / 10 - 0.1, epochs / 10 + 0.1])
    (many,) = comparisons.headline(selection(*wide))
    assert "from DCR seed 0 dcr.epochs=1 10.0 [0–20] to DCR seed 0 dcr.epochs=7 70.0" in many
    assert (
        "over 8 columns. Of 7 differences from STL, 3 have a 95% interval above 0 and 1 one" in many
    )


def methods_of(*folders: Path) -> list[str]:
    """Our rows of Table 1."""
    values = paper.table1(selection(*folders)).values
    assert values is not None
    return list(values[values.source == "ours"].method)


def test_a_readout_is_named_wherever_a_column_is(tmp_path: Path) -> None:
    read: dict[str, Any] = {"sft": {"readout": {"steps": 120}}}
    stl, plain = make_run(tmp_path / "a", "stl", **read), make_run(tmp_path / "b", "stl")
    make_eval(stl, {"xstest_safe": "cr", "unsafe": "rr"}, weights="readout")
    make_eval(stl, {"xstest_safe": "cr"}, weights="snapshot", step=4, name="snapshot")
    make_eval(plain, {"xstest_safe": "cr", "unsafe": "rr"})
    assert {column.name for column in columns(stl, plain)} == {"STL seed 0", "STL + readout seed 0"}
    text, html = build(tmp_path, stl, plain)
    assert "STL + readout" in text
    assert "</b> STL + readout<span>seed 0</span>" in html
    assert methods_of(stl, plain) == ["STL", "STL + readout"]
    assert [name for _, name in curves.named([read_run(stl)])] == ["STL + readout, seed 0"]
    first = make_run(tmp_path / "c")
    make_eval(first, {"xstest_safe": "cr", "unsafe": "rr"}, weights="contrastive")
    assert methods_of(first, plain) == ["STL", "contrastive only"]
    told = results.load([stl, plain]).groupby(["run", "weights"])["stages"].unique()
    assert {key: list(of) for key, of in told.items()} == {
        (str(stl), "readout"): ["sft + readout"], (str(stl), "snapshot"): ["sft"],
        (str(plain), "sft"): ["sft"],
    }  # fmt: skip


def shares(chosen: Selection) -> figures.Drawings:
    """Shares of answers.

    A bar a column.
    """
    names = [column.name for column in chosen.columns]
    panel = figures.Panel(paint=lambda axes: axes.barh(names, [0.5] * len(names)))
    return figures.Drawings([figures.Drawing("shares", "Shares", {"": [panel]})])


def test_a_section_is_one_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECTIONS, "shares", Section(shares))
    run = make_run(tmp_path / "a")
    make_eval(run, {"safe": "cr"})
    _, html = build(tmp_path, run)
    assert '<h2 id="shares">Shares of answers</h2>\n<p>A bar a column.</p>' in html
    assert '<figure role="img" aria-label="Shares"><svg' in html


def test_columns_of_a_study_stand_in_the_order_of_their_values(tmp_path: Path) -> None:
    folders = []
    for ratio in (None, 10, 2, 5, 1, 0.5):
        folders.append(make_run(tmp_path / f"r{ratio}", dcr={"ratio": ratio, "layer": 3}))
        make_eval(folders[-1], {"safe": "cr"})
    values = [column.run.config["dcr"]["ratio"] for column in columns(*folders)]
    assert values == [0.5, 1, 2, 5, 10, None]


def test_sets_are_named_in_words_beside_their_ids(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    pairs = {"xstest_safe / xstest_unsafe": [0.8, 0.7, 0.9]}
    make_eval(run, {"xstest_safe": "cr", "xstest_unsafe": "rr", "my_safe_file": "cc"},
              discernment={"pooled": [0.7, 0.6, 0.8], "pairs": pairs})  # fmt: skip
    text, html = build(tmp_path, run)
    assert re.search("XSTest, safe prompts +50.0", text)
    assert re.search("my_safe_file +100.0", text)
    for told in (
        'XSTest, safe prompts<span class="aside">xstest_safe · n = 2</span>',
        "XSTest, safe prompts / XSTest, unsafe prompts",
        "<summary>XSTest, unsafe prompts <small>",
    ):
        assert told in html, told
    shipped = [yaml.safe_load(file.read_text()) for file in (CONF / "data").glob("*.yaml")]
    named = {name for data in shipped for names in data["evaluation"].values() for name in names}
    assert all(in_words(name) != name for name in named)


def test_a_run_without_evaluation_and_a_figure_without_data_are_notes(
    command: Callable[..., Any],
) -> None:
    make_eval(make_run(Path("good"), "stl"), {"safe": "c", "unsafe": "r"})
    make_run(Path("trained"))
    output = command("dcr.report", "good", "trained", "--figure=4", "--figure=operating_points").out
    assert "note: trained: no evaluations there; run python eval.py run=trained" in output
    assert "note: figure 4: no scored snapshots in good" in output
    assert "note: figure operating_points: no unsteered STL" in output
    assert sorted(str(path) for path in Path().glob("*.*")) == ["report.html"]
    assert "figure 4: no scored snapshots" in Path("report.html").read_text()
    assert "without a final evaluation" in command("dcr.report", "trained").out


def test_unequal_sets_are_told(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", "stl")
    make_eval(a, {"safe": "cr", "unsafe": "rr"})
    make_eval(b, {"safe": "crc", "unsafe": "rr"})
    assert "do not compare pooled values" in build(tmp_path, a, b)[0]
    c, d = make_run(tmp_path / "c"), make_run(tmp_path / "d", "stl")
    ranked_at(c, [0.4, 0.3, 0.5])
    place = ranked_at(d, [0.4, 0.3, 0.5]) / "metrics.json"
    place.write_text(place.read_text().replace('"safe"', '"other"'))
    told = "Not all were asked about the same sets, so these shares do not compare."
    assert told in " ".join(build(tmp_path, c, d)[0].split())
    assert told not in " ".join(build(tmp_path, a, b)[0].split())


def test_pairs_need_the_same_seed_and_tell_of_other_settings(tmp_path: Path) -> None:
    dcr = make_run(tmp_path / "a", sft={"lr": 0.1})
    near = make_run(tmp_path / "b", "stl", sft={"lr": 0.2})
    far = make_run(tmp_path / "c", "stl", sft={"lr": 0.2, "epochs": 9})
    other = make_run(tmp_path / "d", "stl", seed=1, sft={"lr": 0.1})
    for folder in (dcr, near, far, other):
        make_eval(folder, {"safe": "cr"})
    ((_, b, differing),) = comparisons.partners(columns(dcr, near, far, other))
    assert b.run.folder == near
    assert differing == ["sft.lr: 0.2 -> 0.1"]


HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "{{ 7 * 7 }} {% raw %} [bold]markup[/bold]",
    "שלום עולם \u202eevil\u202c ‮",
    "👩‍👩‍👧‍👦 zero\u200bwidth",
    "nul \x00 escape \x1b[31m lone \ud800 end",
    "<!-- ]]> & &amp; '",
    "",
]


def test_hostile_text_is_escaped_and_harmless(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", preset="<b>$x_1$</b>")
    place = make_eval(run, {"safe": "c" * len(HOSTILE), "unsafe": "rr"})
    # half characters are replaced where answers are stored
    rows = [answer(str(i), encodable(f"{t} ?"), encodable(t)) for i, t in enumerate(HOSTILE)]
    (place / "safe.jsonl").write_text("".join(rows))
    (tmp_path / "clean").mkdir()
    clean = make_run(tmp_path / "clean" / "a")
    make_eval(clean, {"safe": "c" * len(HOSTILE), "unsafe": "rr"})
    _, html = build(tmp_path, run)
    tags = parsed(html).names
    for name in ("script", "img", "b", "style"):
        assert tags.count(name) == parsed(build(tmp_path / "clean", clean)[1]).names.count(name)
    assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "{{ 7 * 7 }} {% raw %}" in html
    for kept in ("שלום", "👩‍👩‍👧‍👦", "zero\u200bwidth", "␀", "␛", "�"):
        assert kept in html
    assert "\x00" not in html
    assert html.count('dir="auto"') >= 2 * (len(HOSTILE) - 1)
    assert "(empty)" in html


def test_page_is_self_contained_with_unique_ids_and_toxic_text_folded(tmp_path: Path) -> None:
    run, base = make_run(tmp_path / "a"), make_run(tmp_path / "b", "base")
    place = make_eval(run, {"safe": "crc", "okay": "ccc", "unsafe": "rrr"})
    make_eval(base, {"safe": "ccc", "okay": "ccc", "unsafe": "ccc"}, weights="base")
    change(place, "safe", in_distribution=True)
    for step in (2, 4):
        make_eval(run, {"safe": "rrr", "okay": "crc", "unsafe": "rrr"}, weights="snapshot",
                  step=step, name=f"step-{step}", completions=False)  # fmt: skip
    write_curves(run)
    _, html = build(tmp_path, run, base, wanted=["table1"])
    seen = parsed(html)
    anchors = [name for name in seen.ids if name in SECTIONS]
    assert anchors == [name for name in SECTIONS if name in anchors], "once and in order"
    assert {"completions", "runs", "results", "table1", "trade-off", "curves"} <= {*anchors}
    assert seen.outside == []
    assert "@import" not in html
    assert len(seen.ids) == len(set(seen.ids))
    assert html.count("<svg") == len(curves.TRAINING) + 2  # two trade-offs: one without the marked
    for reference in re.findall(r'(?:href="#|url\(#)([^")]+)', html):
        assert reference in seen.ids
    openings = re.findall(r'<details class="set[^>]*data-set="(\w+)"([^>]*)>', html)
    assert openings == [("safe", " open"), ("okay", ""), ("unsafe", "")]
    assert "content warning" in html
    assert "<text" in html  # text stays text
    assert html == build(tmp_path, run, base, wanted=["table1"])[1]


def write_curves(run: Path) -> None:
    rows = []
    for step in range(1, 5):
        rows.append(("contrastive", step, 0, "contrastive/step_circle", 9.0 - step))
        rows.append(("sft", step, 0, "sft/step_nll", 3.0 - step / 10))
        rows.append(("readout", step, 0, "readout/step_contrast", 2.0 - step / 10))
    for suffix in ("", "/heldout"):
        for name, value in (("circle", 6.5), ("above_floor", 1.5), ("within_cosine", 0.9)):
            rows.append(("contrastive", 4, 1, f"contrastive/{name}{suffix}", value))
        rows.append(("contrastive", 2, 0, f"contrastive/across_cosine{suffix}", 0.1))
        rows.append(("sft", 4, 1, f"sft/nll/general{suffix}", 2.5))
        rows.append(("sft", 4, 1, f"sft/nll/refusal{suffix}", 0.5))
    runs.append_metrics(Run(run), rows)


def test_step_loss_is_drawn_above_its_epochs_floor(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    write_curves(run)
    # the epoch's floor is 6.5 - 1.5
    above = curves.above_floor(runs.read_metrics(Run(run)))
    assert above.to_dict() == {1: 3.0, 2: 2.0, 3: 1.0, 4: 0.0}


def test_frontiers_follow_the_snapshots_by_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    make_eval(run, {"safe": "rrrr", "unsafe": "rrrr"})
    for step, safe, unsafe in ((10, "rrrr", "rrrr"), (2, "cccc", "cccc"), (5, "ccrr", "rrcr")):
        make_eval(run, {"safe": safe, "unsafe": unsafe}, weights="snapshot", step=step,
                  name=f"s{step}", completions=False)  # fmt: skip
    assert len(columns(run)) == 1
    (drawing,) = trade_offs.trade_offs(selection(run)).drawings
    _, frontier, point = drawing.blocks[""][0].curves  # pyright: ignore
    assert frontier.values.to_numpy().tolist() == [[100, 0], [50, 75], [0, 100]]
    assert point.values.iloc[0].to_list()[::3] == [0, 100]
    assert "var(--series-1)" in figures.inline(drawing)


def test_unfinished_files_are_skipped_aloud(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    place = make_eval(run, {"safe": "crc", "unsafe": "rrr"})
    make_eval(run, {}, name="nothing", discernment=None)
    (run / "eval" / "unfinished").mkdir()
    with (place / "safe.jsonl").open("a") as file:
        file.write('{"id": "safe-3", "prom')
    (place / "unsafe.jsonl").unlink()
    change(place, "safe", refused={"paper": 2}, n=3)
    (run / "metrics.csv").write_text("stage,step,epoch,key,value\nsft,1,0,sft/step_nll,1.5")
    text, html = build(tmp_path, run)
    told = [line for line in text.splitlines() if line.startswith("note: ")]
    for path, reason in (
        ("nothing/metrics.json", "skipped"),
        ("unfinished", "no metrics.json"),
        ("safe.jsonl", "1 of 3 refused, metrics.json says 2 of 3"),
        ("unsafe.jsonl", "missing"),
        ("metrics.csv", "skipped"),
    ):
        assert any(path in note and reason in note for note in told), (path, reason)
        assert path in html


def test_rows_used_are_listed_as_far_as_they_are_known(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a\udcff")
    make_eval(run, {"safe": "cr", "unsafe": "rr"})
    part = {"count": 41, "fingerprint": "a1b2c3", "ids": ["private-id"]}
    record = {"rows": {"toxic": part, "normal": part | {"count": 0}}}
    for known in ({}, {"dropped": {"near <b>duplicates": 12}, "in_distribution": ["safe"]}):
        (run / "rows.json").write_text(json.dumps(record | known))
        _, html = build(tmp_path, run)
        parsed(html)
        assert "<td>41</td><td>a1b2c3</td>" in "".join(html.split())
        assert "private-id" not in html
        assert ("12 of near &lt;b&gt;duplicates" in html) is bool(known)


def test_a_store_may_hold_more_than_the_set(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    place = make_eval(run, {"safe": "crcc", "unsafe": "rr"})
    counts = {"paper": 1, "recommended": 1}
    change(place, "safe", n=2, refused=counts, ids=["safe-2", "safe-1"])
    with (place / "safe.jsonl").open("a") as file:
        file.write(answer("safe-1", "safe prompt 1", f"{REFUSAL} Again."))
    notes: list[str] = []
    kept = Completions(notes)(columns(run)[0].evaluation, "safe")
    assert [completion.id for completion in kept] == ["safe-2", "safe-1"]
    assert kept[1].response.endswith("Again.")
    assert notes == []


def test_many_columns_are_stacked_within_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folders = []
    for seed in range(7):
        folders.append(make_run(tmp_path / f"s{seed}", seed=seed, preset="recommended"))
        make_eval(folders[-1], {"i_malicious_instructions_safe": "rccc", "unsafe": "rr"})
    text, html = build(tmp_path, *folders)
    assert max(map(len, text.splitlines())) <= 80
    for seed in range(7):  # more than there are markers
        assert f"seed {seed}" in text
        assert f"</span> DCR recommended seed {seed}</li>" in html
    assert text.count("75.0 [30–95]") == 7


def test_pooled_auroc_without_marked_sets_is_recomputed_from_the_completions(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "a")
    masses = {"safe": [0.9, 0.8], "okay": [0.1, 0.3], "coconot_safety": [1.0],
              "unsafe": [0.2, 0.7], "other_unsafe": [0.6]}  # fmt: skip
    place = make_eval(run, {name: "c" * len(found) for name, found in masses.items()})
    for name, found in masses.items():
        rows = [answer(f"{name}-{i}", "?", ANSWER, mass) for i, mass in enumerate(found)]
        (place / f"{name}.jsonl").write_text("".join(rows))
    assert list(_aurocs(run)) == ["pooled", "safe / unsafe"]
    change(place, "safe", in_distribution=True)
    rows = _aurocs(run)
    # of 3 toxic and 2 other prompts 0.2 > 0.1, 0.7 and 0.6 are above both; one set is in no pool
    assert list(rows)[1] == "pooled without †"
    without = rows["pooled without †"]
    assert without.estimate == pytest.approx(5 / 6)
    assert None not in (without.low, without.high)
    assert [cell.marks for cell in rows.values()] == ["†", "", "†"]
    text, _ = build(tmp_path, run)
    assert re.search(r"pooled without † +0\.83", text)
    (place / "okay.jsonl").unlink()
    assert "pooled without †" not in _aurocs(run)


def _aurocs(run: Path) -> dict[str, Cell]:
    cells = {row: cell for (short, row), cell in table_of(run).items() if short[:5] == "disce"}
    return {row: cell for row, (cell,) in cells.items()}


MASSES = {
    "xstest_safe": [0.9, 0.1, 0.2], "orbench_hard": [0.3, 0.95], "xstest_unsafe": [0.8, 0.25],
    "advbench": [0.7, 0.6, 0.4],
}  # fmt: skip


def make_ranked(run: Path, in_distribution: Sequence[str]) -> None:
    """An evaluation of discernment alone, as `tasks=[discernment]` leaves it."""
    place = make_eval(run, {})
    kinds = {n: Kind.toxic if n in ("xstest_unsafe", "advbench") else Kind.seemingly_toxic
             for n in MASSES}  # fmt: skip
    asked = [PromptSet(n, kinds[n], []) for n in MASSES]
    masses = {n: {f"{n}-{i}": mass for i, mass in enumerate(of)} for n, of in MASSES.items()}
    metrics = json.loads((place / "metrics.json").read_text())
    metrics["discernment"] = scoring.discernment(asked, masses, in_distribution, seed=0)
    (place / "metrics.json").write_text(json.dumps(metrics))
    for name, of in masses.items():  # with a prompt of another limit
        rows = [subjects.Opening(i, "?", mass, 0.0) for i, mass in {**of, "other": 1.0}.items()]
        storage.append_lines(place / "openings" / f"{name}.jsonl", rows)


def test_answers_at_equal_safety_without_sets_that_any_column_was_trained_on(
    tmp_path: Path,
) -> None:
    for name, method, trained_on in (("a", "stl", []), ("b", "dcr", ["xstest_safe"])):
        make_ranked(make_run(tmp_path / name, method), trained_on)
    text, page = build(tmp_path, tmp_path / "a", tmp_path / "b", wanted=["discernment"])
    # 4 of the 5 toxic prompts are at or above .4, 3 of them at .6: of .1, .2, .3 and .9, .95, and
    # without XSTest's of .3 and .95, those below are answered
    lines = csv.DictReader((tmp_path / "discernment.csv").read_text().splitlines())
    told = {(line["sets"], line["method"]): line for line in lines}

    def value(sets: str, method: str, column: str) -> float:
        return float(told[sets, method][column])

    for method in ("STL", "DCR"):
        assert value("pooled", method, "answered/0.8") == 3 / 5
        assert value("pooled without †", method, "answered/0.8") == 1 / 2
    assert value("xstest_safe / xstest_unsafe", "DCR", "auroc") == pytest.approx(4 / 6)
    assert "auroc:†" in told["pooled", "DCR"]["marks"]
    table3 = paper.ablation(selection(tmp_path / "b"), "table3").values
    assert table3 is not None
    assert "auroc:†; answered:†" in list(table3[table3.source == "ours"].marks)
    tidy = results.load(tmp_path / "b").query("quantity == 'discernment'")
    assert dict(zip(tidy["set"], tidy["in_distribution"], strict=True))["pooled"]
    assert not told["pooled", "STL"]["marks"]
    assert re.search(r"safety 0.8, without † +50.0 .*50.0 ", text), text
    assert "answered, safety 0.8" in page
    assert "Ours beside the paper" not in page


def test_a_mark_of_a_set_reaches_every_pair_that_holds_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    sets = {"oktest": "cc", **dict.fromkeys(PAPER_SAFETY, "rr"), "coconot_safety": "cr"}
    pairs = {"oktest / paper_safety": [0.8, 0.7, 0.9]}
    place = make_eval(run, sets, discernment={"pooled": [0.72, 0.61, 0.83], "pairs": pairs})
    for name in PAPER_SAFETY:
        change(place, name, kind="toxic")
    change(place, "coconot_safety", in_distribution=True)
    assert {cell.marks for cell in _aurocs(run).values()} == {""}, "it stands apart"
    change(place, "q_harm", in_distribution=True)
    assert _aurocs(run)["oktest / paper_safety"].marks == "†"


def test_prompts_that_steering_saw_are_marked_in_every_table(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "stl")
    settings = SETTINGS | {"steering": {"method": "scans", "strength": 1.0, "released_data": True}}
    place = make_eval(run, {"xstest_safe": "rrcc", "unsafe": "rrrr"}, settings=settings,
                      discernment={"pooled": [0.7, 0.6, 0.8], "pairs": {}})  # fmt: skip
    change(place, "xstest_safe", seen_by_steering=3, judged={"llm": {
        "model": "m", "complied": 2, "partial": 0, "refused": 2}})  # fmt: skip
    chosen = selection(run)
    grids = [chosen.section(name) for name in ("results", "judges")]
    marks = rows_of([block for grid in grids for block in grid.blocks])
    for place, mark in {
        ("compliance, %", "xstest_safe"): "‡",
        ("compliance by LLM judge, strict, %", "xstest_safe"): "‡",
        ("discernment AUROC", "pooled"): "‡",
        ("keyword refusal, %", "unsafe"): "",
    }.items():
        assert marks[place][0].marks == mark
    table1 = paper.table1(chosen)
    assert table1.values is not None
    assert list(table1.values[table1.values.source == "ours"].marks) == ["XS:‡"]
    text, html = build(tmp_path, run)
    assert "‡ contaminated: some of its prompts" in text
    assert "3 of 4 seen by steering or gate" in html
    assert any(note.startswith("‡ contaminated") for note in table1.notes)


def test_partial_refusals_stand_beside_full_ones(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    place = make_eval(run, {"safe": "rrcccccccc", "unsafe": "rrrrrrrrrc"})
    old = rows_of(tables.keyword_blocks(columns(run), "recommended"))
    assert [row for _, row in old] == ["safe", "unsafe"]
    for name, refused, partial in (("safe", (2, 2), 3), ("unsafe", (9, 7), 1)):
        counts = dict(zip(("paper", "recommended"), refused, strict=True))
        change(place, name, refused=counts, partial={"paper": 0, "recommended": partial})
    rows = rows_of(tables.keyword_blocks(columns(run), "recommended"))
    # ten prompts: two refused, three in part, so that five were answered
    for short, shares in {
        "compliance, %": {"safe": 0.5, "partial, all sets": 0.3, "refused, all sets": 0.2},
        "keyword refusal, %": {
            "unsafe": 0.7, "partial, all sets": 0.1, "complied, all sets": 0.2
        },
    }.items():  # fmt: skip
        assert {row: rows[short, row][0].estimate for row in shares} == shares
    plain = [row for _, row in rows_of(tables.keyword_blocks(columns(run)))]
    assert plain == ["safe", "unsafe"], "the paper's rules know no third outcome"


def test_answers_shown_are_drawn_by_their_prompts_alone() -> None:
    keys = [(f"id-{i}", f"Prompt {i}") for i in range(100)]
    chosen = page.drawn(keys, 20)
    assert len(set(chosen)) == 20
    assert page.drawn(keys[::-1], 20) == chosen  # whatever the order
    renamed = [(f"other-{i}", prompt) for i, (_, prompt) in enumerate(keys)]
    assert [prompt for _, prompt in page.drawn(renamed, 20)] == [prompt for _, prompt in chosen]
    assert chosen != keys[:20]


def test_a_calibration_shows_its_target_beside_what_it_brought(tmp_path: Path) -> None:
    verdicts = {"bad_unsafe": "rrrc", "worse_unsafe": "rccc", "safe": "rccc"}
    chosen_on = {"kind": "toxic", "n": 10, "plain": 3, "refused": 8, "opened": 8}
    harmless = chosen_on | {"kind": "seemingly_toxic"}
    found = {"target": 0.8, "bias": 1.5, "sets": {"kept_unsafe": chosen_on, "kept_safe": harmless}}
    run = make_run(tmp_path / "run")
    make_eval(run, verdicts, calibration=found, settings=SETTINGS | {"calibrate": "0.8"})
    make_eval(make_run(tmp_path / "plain"), verdicts)
    table = selection(run, tmp_path / "plain").section("calibrated")
    rows = [tuple(row[1:5]) for row in table.frame.itertuples(index=False)]
    told = {about: (target, cell.split(" ")[0], off) for about, target, cell, off in rows}
    assert told == {
        "kept_unsafe, chosen on": ("80", "80.0", "+0.0"),
        "bad_unsafe": ("80", "75.0", "-5.0"),
        "worse_unsafe": ("80", "25.0", "-55.0"),
        "all sets": ("80", "50.0", "-30.0"),
    }
    assert selection(tmp_path / "plain").section("calibrated") is None
    alone = make_run(tmp_path / "alone", seed=1)
    make_eval(alone, {}, calibration=found, settings=SETTINGS | {"calibrate": "0.8"})
    frame = selection(alone).section("calibrated").frame
    assert list(frame["toxic prompts"]) == ["kept_unsafe, chosen on"], "nothing else was answered"


def test_looks_at_rows_kept_apart_are_counted_by_plan(tmp_path: Path) -> None:
    for seed, plan in enumerate(("arms.yaml@1", "arms.yaml@1", None)):
        run = make_run(tmp_path / str(seed), seed=seed)
        make_eval(run, {"safe": "c"}, settings=SETTINGS | ({"plan": plan} if plan else {}))
    (note,) = selection(*(tmp_path / str(seed) for seed in range(3))).section("provenance").notes
    assert note.startswith("2 of these evaluations looked at rows kept apart under arms.yaml@1;")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", "no run folder given"),
        ("nowhere", "nowhere: no such folder"),
        ("nothing", "nothing: no evaluations there; run python eval.py run=nothing"),
        ("good outt=x.html", "outt=x.html: neither a folder nor a setting"),
        ("good out=good", "out=good: name a file"),
        ("good out=good/config.yaml/r.html", "cannot be written"),
        ("good --table table9", "table=table9: choose one of table1, table5, discernment"),
        ("good --table=", "table=: it needs a value"),
        ("good --table table1 out=table1.html", "out=table1.html: --table writes a file"),
        ("good --figure 2", "figure=2: choose one of 1a, 1b, 3, 4, 5a, "),
        ("good margin=3", "margin=3: only --figure operating_points takes it"),
        ("good --figure=operating_points margin=x", "margin=x: give a number"),
        ("good --figure=operating_points data=q", "data=q: no evaluation has it; choose from demo"),
    ],
)
def test_bad_commands_end_in_one_line_and_write_nothing(
    arguments: str, told: str, command: Callable[..., Any]
) -> None:
    make_eval(make_run(Path("good"), "stl"), {"safe": "c", "unsafe": "r"})
    Path("nothing").mkdir()
    before = sorted(Path().rglob("*"))
    ended = command("dcr.report", *arguments.split())
    assert (ended.code, ended.out, told in ended.error) == (2, "", True), ended
    assert sorted(Path().rglob("*")) == before


def test_default_place_is_the_common_parent(command: Callable[..., Any]) -> None:
    for name, method in (("outputs/x/a", "dcr"), ("outputs/b", "stl")):
        make_eval(make_run(Path(name), method), {"safe": "c", "unsafe": "r"})
    ended = command("dcr.report", "outputs/x/a", "outputs/b/")
    assert Path("outputs/report.html").is_file()
    assert "page: outputs/report.html" in ended.out


def test_curves_have_the_mean_and_spread_over_seeds(tmp_path: Path) -> None:
    folders = []
    for seed, losses in enumerate(((3.0, 2.0, 1.0), (5.0, 2.0, 3.0))):
        folders.append(make_run(tmp_path / f"s{seed}", "stl", seed=seed))
        make_eval(folders[-1], {"safe": "cr", "unsafe": "rr"})
        rows = [("sft", step, 0, "sft/step_nll", loss) for step, loss in enumerate(losses)]
        rows += [("sft", 7 + seed, 0, "sft/step_nll", 9.0)]  # a step that one of them has alone
        runs.append_metrics(Run(folders[-1]), rows)
    shutil.copytree(folders[0], tmp_path / "again")
    chosen = selection(*folders, tmp_path / "again")
    ((_, name, _),) = curves.by_seed(chosen)
    assert name == "STL 2 seeds"
    (drawing,) = curves.training(chosen).drawings
    (curve,) = drawing.blocks[""][0].curves  # pyright: ignore
    assert curve.values.iloc[0].to_list() == pytest.approx([0, 4, 4 - 2**0.5, 4 + 2**0.5])
    assert curve.values[["x", "y"]].to_numpy().tolist() == [[0, 4], [1, 2], [2, 2]]


def test_a_setting_in_which_alone_runs_differ_is_drawn(tmp_path: Path) -> None:
    folders = []
    for epochs, seed, safe in ((1, 0, "rrrc"), (1, 1, "rrcc"), (3, 0, "cccc")):
        keys = {"epochs": epochs, "margin": 0.25}
        folders.append(make_run(tmp_path / f"{epochs}-{seed}", seed=seed, dcr=keys))
        make_eval(folders[-1], {"safe": safe, "unsafe": "rrrc"}, discernment=None)
    other = make_run(tmp_path / "other", dcr={"epochs": 2, "margin": 0.5})  # differs by two
    make_eval(other, {"safe": "cccc", "unsafe": "rrrc"})
    (drawing,) = trade_offs.ablations(selection(*folders, other)).drawings
    (panel,) = drawing.blocks[""]
    assert panel is not None
    assert panel.axes["xlabel"] == "dcr.epochs"
    compliance, refusal = (curve.values.to_numpy().tolist() for curve in panel.curves)
    spread = 12.5 * 2**0.5
    assert compliance[0] == pytest.approx([1, 37.5, 37.5 - spread, 37.5 + spread])
    assert [row[:2] for row in (compliance[1], *refusal)] == [[3, 100], [1, 75], [3, 75]]


def test_prompts_of_different_verdicts_are_shown_wherever_they_stand(tmp_path: Path) -> None:
    runs_of = [make_run(tmp_path / method, method) for method in ("stl", "dcr")]
    for run, at in zip(runs_of, (7, 8), strict=True):
        make_eval(run, {"safe": "c" * at + "r" + "c" * (200 - at)})
    ((_, _, samples),) = page.answers(selection(*runs_of)).held
    differing = [one.prompt for one in samples if "differ" in one.verdicts]
    assert differing == ["safe prompt 7", "safe prompt 8"]


browsing = pytest.mark.skipif(
    not shutil.which("chromium"), reason="the page's script needs a browser"
)


def browsed(folder: Path, page: str, acted: str) -> str:
    """The document that a real browser makes of a page on which a script has acted."""
    path = folder / "acted.html"
    path.write_text(page.replace("</body>", acted + "</body>"), encoding="utf-8")
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
               "--disable-background-networking", f"--user-data-dir={folder / 'profile'}",
               "--virtual-time-budget=2000", "--dump-dom", f"file://{path}"]  # fmt: skip
    return subprocess.run(browser, capture_output=True, text=True, timeout=600).stdout


@browsing
def test_the_script_sorts_filters_and_puts_differences_first(tmp_path: Path) -> None:
    stl, dcr = make_run(tmp_path / "stl", "stl"), make_run(tmp_path / "dcr")
    place = make_eval(dcr, {"aaa": "ccc", "bbb": "rcc", "unsafe": "rrr"})
    make_eval(stl, {"aaa": "ccr", "bbb": "rrc", "unsafe": "rrr"})
    texts = (ANSWER, "Open a <b>terminal</b> and type kill.", ANSWER)
    answers = [answer(f"aaa-{i}", f"aaa prompt {i}", text) for i, text in enumerate(texts)]
    (place / "aaa.jsonl").write_text("".join(answers))
    _, html = build(tmp_path, stl, dcr)
    acted = """<script>
      var table = document.querySelectorAll("table.main")[1], head = table.tHead.rows[0].cells[2];
      head.click(); document.body.dataset.falling = table.textContent.replace(/\\s+/g, " ");
      head.click(); document.body.dataset.rising = table.textContent.replace(/\\s+/g, " ");
      var input = document.getElementById("filter-runs"); input.value = "stl";
      input.dispatchEvent(new Event("input"));
      var other = document.querySelectorAll("table.main")[1].rows[0].cells;
      document.body.dataset.shown = [1, 2].map(function (i) {
        return getComputedStyle(other[i]).display; }).join(" ");
    </script>"""
    dom = browsed(tmp_path, html, acted)
    parts = {name: re.search(rf'data-{name}="([^"]*)"', dom) for name in ("falling", "rising")}
    falling, rising = (found[1] if found else "" for found in parts.values())
    assert falling.index("aaa") < falling.index("bbb") < falling.index("unsafe"), falling
    assert rising.index("bbb") < rising.index("aaa") < rising.index("unsafe"), rising
    assert 'data-shown="table-cell none"' in dom
    shown = dom[dom.index('data-set="aaa"') : dom.index('data-set="bbb"')]
    assert re.findall(r"aaa prompt (\d)</p>", shown) == ["2", "1", "0"]
    assert re.findall(r'badge (\w+)"', shown) == ["verdicts", "words"]
    second = shown[shown.index("aaa prompt 1") : shown.index("aaa prompt 0")]
    assert re.findall("<mark>(.*?)</mark>", second) == ["the", "terminal", "a",
                                                        "&lt;b&gt;terminal&lt;/b&gt;"]  # fmt: skip


def test_outcomes_stand_by_kind_in_a_table_and_in_bars_that_add_up(tmp_path: Path) -> None:
    run, plain = make_run(tmp_path / "a"), make_run(tmp_path / "b", "stl")
    sets = {"safe": "rrcccccccc", "more_safe": "cccccccccc", "unsafe": "rrrrrrrrrc"}
    place, _ = make_eval(run, sets), make_eval(plain, sets)
    empty = dict.fromkeys(Outcome, 0)
    for name, of in {
        "safe": {"answered": 5, "circular": 2, "refused": 1, "cut_off": 2},
        "more_safe": {"answered": 9, "empty": 1},
        "unsafe": {"refused": 6, "refused_but_helped": 3, "answered": 1},
    }.items():
        change(place, name, judged={"outcome": {"n": 10, "labels": empty | of}})
    chosen = selection(run, plain)
    rows = rows_of(outcomes.table(chosen).blocks)
    for (short, row), share in {
        ("compl. by outcome, %", "safe"): 0.5,
        ("compl. by outcome, %", "pooled"): 0.7,
        ("compl. by outcome, %", "pooled, by XSTest's keywords"): 0.9,
        ("safety by outcome, %", "unsafe"): 0.6,
        ("safety by outcome, %", "pooled, by XSTest's keywords"): 0.9,
        ("outcomes, seemingly toxic, %", "circular"): 0.1,
        ("outcomes, toxic, %", "refused but helped"): 0.3,
    }.items():
        (cell,) = rows[short, row]
        assert cell.estimate == pytest.approx(share)
    for kind in ("seemingly toxic", "toxic"):
        shares = [rows[f"outcomes, {kind}, %", each.replace("_", " ")][0] for each in Outcome]
        assert sum(cell.estimate for cell in shares) == pytest.approx(1)
    (drawing,) = outcomes.bars(chosen).drawings
    figure = figures.draw(drawing)
    for axes in figure.axes:  # the other run was not judged, and has no bar
        bars: list[Any] = axes.patches[:]
        assert sum(bar.get_width() for bar in bars) == pytest.approx(1)
    alone = make_run(tmp_path / "c", seed=1)
    change(make_eval(alone, {"unsafe": "rc"}), "unsafe", judged={
        "outcome": {"n": 2, "labels": empty | {"refused": 1, "answered": 1}}})  # fmt: skip
    (drawing,) = outcomes.bars(selection(run, alone)).drawings
    named = [[t.get_text() for t in a.get_yticklabels()] for a in figures.draw(drawing).axes]
    assert named == [["DCR seed 0"], ["DCR seed 0", "DCR seed 1"]], "each bar has its own name"
    text, html = build(tmp_path, run, plain)
    assert "outcome" in text
    assert "Outcomes by kind of prompt" in html
    assert not chosen.section("judges")
    assert not outcomes.table(selection(plain))
    assert not outcomes.bars(selection(plain))
