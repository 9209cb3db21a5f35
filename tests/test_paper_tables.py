"""The suite's numbers and the paper's tables against hand counts, and every format's escaping."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_report import build, change, columns, make_eval, make_run, parsed, rows_of, selection

from dcr import inference
from dcr.judges import section as judges
from dcr.report import comparisons, grids, paper, tables, writing
from dcr.report.grids import Cell, text_of
from dcr.report.paper import PaperRow, facts
from dcr.report.records import read_run
from dcr.report.writing import TextTable

GUARD, MODEL = "meta-llama/Llama-Guard-3-8B", "qwen2_5_1_5b"
# by set: prompts, of them refused by keywords; complied, partial, refused by the LLM judge
SAFE = {
    "xstest_safe": (10, 2, (7, 1, 2)),
    "coconot_contrast": (20, 5, (14, 0, 5)),
    "orbench_hard": (8, 2, (6, 1, 1)),
    "oktest": (4, 1, (3, 0, 1)),
    "phtest_harmless": (5, 0, (5, 0, 0)),
}
# by set: prompts, refused by keywords, safe, unreadable
UNSAFE = {
    "i_malicious_instructions": (10, 9, 8, 1),
    "i_cona": (20, 10, 15, 0),
    "i_controversial": (4, 1, 2, 0),
    "q_harm": (10, 10, 10, 0),
    "advbench": (50, 40, 45, 2),
}


def suite(
    folder: Path, method: str = "dcr", *, judge: bool = True, unsafe: Any = None, **about: Any
) -> Path:
    """A run evaluated on everything, with the counts above."""
    unsafe = UNSAFE if unsafe is None else unsafe
    run = make_run(folder, method, seed=about.pop("run_seed", 0))
    verdicts = {name: "r" * r + "c" * (n - r) for name, (n, r, *_) in {**SAFE, **unsafe}.items()}
    name = about.pop("name", "main")
    about = {"model": MODEL, "discernment": None} | about
    place = make_eval(run, verdicts, completions=False, name=name, **about)
    path = place / "metrics.json"
    metrics = json.loads(path.read_text())
    for name, (n, _, (complied, partial, refused)) in SAFE.items():
        left = n - complied - partial - refused
        counts = {"complied": complied, "partial": partial, "refused": refused}
        found = {"model": "gpt-4o", "n": n, **counts, "invalid": 0, "error": left}
        metrics["sets"][name] |= {"judged": {"llm": found}} if judge else {}
    for name, (n, _, safe, invalid) in unsafe.items():
        guard = {"safe": safe, "unsafe": n - safe - invalid, "invalid": invalid, "error": 3}
        found = {"llama_guard": {"model": GUARD, "n": n} | guard}
        metrics["sets"][name] |= {"kind": "toxic"} | ({"judged": found} if judge else {})
    path.write_text(json.dumps(metrics))
    return run


MEASURED = {
    "agreement": [
        {"judges": ["keyword:paper", "llm"], "kind": "seemingly_toxic", "n": 46, "kappa": 0.625,
         "labels": ["complied", "refused"], "confusion": [[31, 4], [2, 9]]},
        {"judges": ["llm", "llama_guard"], "kind": "toxic", "n": 94, "kappa": None,
         "labels": ["refused", "complied"], "confusion": [[90, 1], [2, 1]]},
        {"judges": ["llama_guard", "moderation"], "kind": "toxic", "n": 10, "kappa": 0.5,
         "labels": ["unsafe", "safe"], "confusion": [[5, 2], [1, 3]]},
    ],
    "ability": {
        "mmlu": {"acc": 0.5, "acc_stderr": 0.01, "acc_norm": None, "acc_norm_stderr": None,
                 "n": 100, "version": "2", "shots": 0, "limit": None},
        "arc_easy": {"acc": 0.7, "acc_stderr": 0.02, "acc_norm": 0.6, "acc_norm_stderr": 0.03,
                     "n": 50, "version": "1.0", "shots": 0, "limit": 50},
    },
    "quality": {"win_rate": 51.5, "standard_error": 2.0, "length_controlled": 50.0,
                "discrete": 52.0, "n": 100, "invalid": 1, "error": 2,
                "annotator": "some/Model-7B", "reference": "stl", "mean_length": 10.0,
                "reference_length": 11.0},
    "contamination": {"q_harm": {"n": 10, "exact": 3, "near": 2, "ngram": 1,
                                 "by_source": {"hh": 6}},
                      "advbench": {"n": 50, "exact": 0, "near": 0, "ngram": 0, "by_source": {}}},
}  # fmt: skip


def rows_by(table: TextTable, source: str = "ours") -> list[dict[str, Any]]:
    assert table.values is not None
    return [row for row in table.values.to_dict("records") if row["source"] == source]


def test_what_judges_counted_by_hand(tmp_path: Path) -> None:
    rows = rows_of(judges.judged(selection(suite(tmp_path / "a"))).blocks)
    by = "compliance by LLM judge, strict, %"
    for row, share in {
        "xstest_safe": 0.7,
        "coconot_contrast": 14 / 19,  # one of 20 was not answered: 14 of the 19 that were
        "pooled": 35 / 46,
        "partial, all sets": 2 / 46,
        "lenient, all sets": 37 / 46,
    }.items():
        assert rows[by, row][0].estimate == pytest.approx(share)
    assert text_of(rows[by, "invalid / error"][0]) == "0 / 1"
    # unreadable verdicts are not safe, errors are outside
    by, wilson = "DSR by Llama Guard, %", inference.wilson(8, 10)
    (cell,) = rows[by, "i_malicious_instructions"]
    assert (cell.estimate, cell.low, cell.high) == (0.8, wilson.low, wilson.high)
    assert rows[by, "the paper's five pooled"][0].estimate == pytest.approx(80 / 94)
    mean = sum((0.8, 0.75, 0.5, 1.0, 0.9)) / 5
    assert rows[by, "mean of the paper's five"][0].estimate == pytest.approx(mean)
    assert text_of(rows[by, "invalid / error"][0]) == "3 / 15"
    assert (by, "pooled") not in rows, "the five are all there is"
    assert rows[by, "i_cona"][0].n == 20


def test_interval_of_a_mean_by_squaring_and_adding(tmp_path: Path) -> None:
    (column,) = columns(suite(tmp_path / "a"))
    found = grids.rate(column.evaluation, tuple(UNSAFE), "refused", mean=True)
    assert found is not None
    ends = [inference.wilson(r, n) for n, r, *_ in UNSAFE.values()]
    mean = sum(end.estimate for end in ends) / 5
    below = sum((end.estimate - end.low) ** 2 for end in ends) ** 0.5 / 5
    above = sum((end.high - end.estimate) ** 2 for end in ends) ** 0.5 / 5
    assert found.estimate == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx((mean - below, mean + above))


def test_it_is_called_dsr_only_where_a_guard_judged(tmp_path: Path) -> None:
    plain = build(tmp_path / "a", suite(tmp_path / "a" / "run", judge=False))
    assert "DSR" not in plain[0] + plain[1]
    assert "keyword refusal, %" in plain[0]
    guarded = build(tmp_path / "b", suite(tmp_path / "b" / "run"))
    assert "DSR by Llama Guard, %" in guarded[0]
    assert f"judged safe by Llama Guard ({GUARD}), %" in guarded[1]
    for name, head in (("a", "Safety (DSR, paper only)"), ("b", "Safety (DSR)")):
        heads = paper.table1(selection(tmp_path / name / "run")).frame.columns
        assert head in heads
        assert ("keyword refusal" in heads) is (name == "a")


def test_agreement_ability_and_quality(tmp_path: Path) -> None:
    run = suite(tmp_path / "a", **MEASURED)
    text, html = build(tmp_path, run)
    parsed(html)
    assert re.search(r"keyword:paper / llm, +0\.62\n", text)
    assert "llm / llama_guard, toxic" not in text, "their agreement is undefined"
    rows = "".join(html.split())  # each cell stands on a line of its own
    assert "<td>10</td><td>5</td><td>2</td><td>1</td><td>3</td><td>0.50</td>" in rows
    # the second one's labels come in the other order: both complied comes first all the same
    assert [1, 2, 1, 90] in map(judges.confusion, read_run(run).evaluations[0].agreement)
    assert "<td>46</td><td>31</td><td>4</td><td>2</td><td>9</td><td>0.62</td>" in rows
    assert re.search(r"arc_easy acc +70\.0 \[66–74\]\n +arc_easy acc_norm +60\.0 \[54–66\]", text)
    assert "mmlu acc_norm" not in text
    assert re.search(r"win rate +51\.5 ± 2\.0\n", text)
    assert "annotator: some/Model-7B (local annotator, not GPT-4o-mini)" in html
    quality = read_run(run).evaluations[0].quality
    assert quality is not None
    named = {"gpt-4o-mini-2024-07-18": False, "openai/gpt-oss-20b": True, "some/gpt": True}
    for annotator, local in named.items():
        told = paper.annotator_name(quality.model_copy(update={"annotator": annotator}))
        assert ("local annotator" in told) is local


def test_contamination_stands_with_the_score_it_touches(tmp_path: Path) -> None:
    text, html = build(tmp_path, suite(tmp_path / "a", **MEASURED), wanted=("table1",))
    assert re.search(r"Q-Harm +100\.0 \[72–100\]‡\n", text)
    assert re.search(r"Q-Harm +3 / 2 / 1 of 10\n", text)
    assert re.search(r"AdvBench +80\.0 \[67–89\]\n", text)
    assert "‡ contaminated" in text
    assert "3 / 2 / 1 in training" in html
    assert "hh 6" in html


def test_faulty_completions_are_counted_apart(tmp_path: Path) -> None:
    run = suite(tmp_path / "a")
    place = run / "eval" / "main"

    def counted() -> dict[str, str]:
        found = rows_of(tables.faults(selection(run)).blocks)
        return {row: text_of(cell) for (_, row), (cell,) in found.items()}

    assert "not English" not in counted(), "an old file does not say"
    change(place, "q_harm", unanswered=0)
    assert "unanswered" not in counted(), "told where there are any"
    for count, name in enumerate((*SAFE, *UNSAFE)):
        change(place, name, non_english=min(count, 4), unanswered=2)
    found = counted()
    # ten sets of 141 prompts, each with one cut off and two repetitive answers
    for label, count in {
        "empty": "0 of 141", "cut off at the limit": "10 of 141", "repetitive": "20 of 141",
        "not English": "30 of 141", "unanswered": "20 of 161",
    }.items():  # fmt: skip
        assert found[label] == count
    text, html = build(tmp_path, run)
    assert re.search(r"unanswered +20 of 161\n", text)
    assert "30 of 141" in html


def test_sets_that_stand_apart_are_in_no_sum(tmp_path: Path) -> None:
    sets = {"oktest": "cc", "xstest_safe": "cr", "coconot_safety": "rrrrr", "unsafe": "rr"}
    folders = [make_run(tmp_path / method, method) for method in ("dcr", "stl")]
    for folder in folders:
        make_eval(folder, sets)
    chosen = selection(*folders)
    rows = rows_of(tables.keyword_blocks(chosen.columns))
    assert text_of(rows["compliance, %", "coconot_safety"][0]) == "0.0 [0–43]"
    assert rows["compliance, %", "pooled"][0].estimate == 0.75
    table = comparisons.paired(chosen)
    assert table is not None
    assert list(table.frame[table.frame.set == "pooled"].prompts) == [4]
    assert (
        text_of(rows_of(tables.faults(chosen).blocks)["faulty completions", "empty"][0]) == "0 of 6"
    )


def test_methods_are_ordered_and_steering_is_told(tmp_path: Path) -> None:
    folders = [
        suite(tmp_path / method, method, judge=False)
        for method in ("dcr", "scans", "surgical", "stl_aug", "stl", "else")
    ]
    stl = tmp_path / "stl"
    for alpha in (1, 2):
        settings = {"limit": 10, "seed": 0, "steering": {"name": "scans", "alpha": alpha}}
        make_eval(stl, {"xstest_safe": "cr"}, name=f"steered{alpha}", model=MODEL,
                  discernment=None, settings=settings)  # fmt: skip
    endpoint = suite(tmp_path / "z", "endpoint", weights="endpoint", model="some/served")
    chosen = selection(endpoint, *folders)
    assert [column.name for column in chosen.columns] == [
        "STL seed 0 qwen2_5_1_5b",
        "STL-aug seed 0 qwen2_5_1_5b",
        "Surgical seed 0 qwen2_5_1_5b",
        "SCANS seed 0 qwen2_5_1_5b",
        "STL + scans seed 0 qwen2_5_1_5b eval.steering.alpha=1",
        "STL + scans seed 0 qwen2_5_1_5b eval.steering.alpha=2",
        "DCR seed 0 qwen2_5_1_5b",
        "else seed 0 qwen2_5_1_5b",
        "endpoint some/served",
    ]
    assert len({column.style for column in chosen.columns}) == len(chosen.columns)
    assert chosen.groups == []
    methods = [row["method"] for row in rows_by(paper.table1(chosen))]
    assert methods == ["STL", "STL-aug", "Surgical", "SCANS", "SCANS", "SCANS", "DCR", "else",
                       "endpoint"]  # fmt: skip


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_table1_in_csv_by_hand(tmp_path: Path) -> None:
    run = suite(tmp_path / "a", **MEASURED)
    change(run / "eval" / "main", "xstest_safe", in_distribution=True)
    build(tmp_path, run, wanted=("table1",))
    rows = csv_rows(tmp_path / "table1.csv")
    (own,) = (row for row in rows if row["source"] == "ours")
    assert (own["method"], own["model"], own["run"]) == ("DCR", MODEL, "seed 0")
    low, high = 0.490162, 0.943318  # Wilson of 8 in 10 by its formula
    got = [float(own[key]) for key in ("XS", "XS_low", "XS_high", "XS_n")]
    assert got == pytest.approx([0.8, low, high, 10], abs=1e-5)
    expected = {"CoCo": 0.75, "OR": 0.75, "OK": 0.75, "PH": 1.0, "Safety": 3.95 / 5,
                "Safety_pooled": 80 / 94, "Safety_n": 94, "MMLU": 0.5, "ARC_e": 0.6,
                "ARC_e_low": 0.6 - 1.959964 * 0.03, "ARC_e_n": 50, "AlpacaEval": 51.5,
                "AlpacaEval_high": 51.5 + 2 * 1.959964}  # fmt: skip
    assert {key: float(own[key]) for key in expected} == pytest.approx(expected)
    assert own["PIQA"] == own["PIQA_low"] == own["XS_spread"] == ""
    assert own["marks"] == "XS:†; Safety:‡; Safety_pooled:‡"
    theirs = {row["method"]: row for row in rows if row["source"] == "paper"}
    assert list(theirs) == ["STL", "STL-aug", "Surgical", "SCANS", "DCR"]
    assert {row["model"] for row in theirs.values()} == {"Qwen2.5-1.5B"}
    for method, values in facts()["table1_main"]["Qwen2.5-1.5B"].items():
        assert {key: float(theirs[method][key]) for key in values} == values
    marks = {method: row["marks"] for method, row in theirs.items() if row["marks"]}
    assert marks == {"DCR": "XS:†", "STL-aug": "XS:†"}


def test_table5_has_a_row_a_judge(tmp_path: Path) -> None:
    build(tmp_path, suite(tmp_path / "a", "stl"), wanted=("table5",))
    rows = [row for row in csv_rows(tmp_path / "table5.csv") if row["method"] == "STL"]
    cells = {(row["source"], row["judge"]): row for row in rows}
    assert [judge for source, judge in cells if source == "ours"] == [
        "keyword", "LLM judge: gpt-4o", f"Llama Guard: {GUARD}"
    ]  # fmt: skip
    assert float(cells["ours", "keyword"]["XS"]) == 0.8
    assert cells["ours", "keyword"]["Safety"] == ""
    assert float(cells["ours", "keyword"]["keyword_refusal"]) == pytest.approx(3.45 / 5)
    assert float(cells["ours", "LLM judge: gpt-4o"]["CoCo"]) == pytest.approx(14 / 19)
    assert float(cells["ours", f"Llama Guard: {GUARD}"]["Safety"]) == pytest.approx(3.95 / 5)
    assert float(cells["paper", "gpt-5.1"]["OR"]) == 0.65
    assert float(cells["paper", "openai moderation"]["Safety"]) == 0.86
    assert cells["paper", "gpt-5.1"]["Safety"] == ""


def test_all_models_of_the_paper_where_ours_is_none_of_them(tmp_path: Path) -> None:
    other = suite(tmp_path / "a", model="smollm2_135m")
    table = paper.table1(selection(other))
    shown = [row["model"] for row in rows_by(table, "paper") if row["method"] == "DCR"]
    assert shown == list(facts()["table1_main"])
    for label, model in (("llama3_8b", "LLaMA-3-8B"), ("Qwen/Qwen2.5-7B", "Qwen2.5-7B")):
        run = suite(tmp_path / model, model=label)
        rows = rows_by(paper.table1(selection(run)), "paper")
        assert {row["model"] for row in rows} == {model}


def test_fewer_than_five_safety_sets_are_named(tmp_path: Path) -> None:
    few = {name: UNSAFE[name] for name in ("i_cona", "q_harm")}
    table = paper.table1(selection(suite(tmp_path / "a", unsafe=few)))
    (own,) = rows_by(table)
    assert own["Safety"] == pytest.approx((0.75 + 1) / 2)
    assert "Safety_pooled" not in own
    notes = table.notes
    assert "Safety of DCR seed 0 is the mean over i_cona, q_harm only, not over five." in notes
    assert "OR: ours orbench_hard 8; the paper 1319." in notes
    assert not any("mean over the paper's five" in note for note in notes)


def test_seeds_have_a_row_of_means(tmp_path: Path) -> None:
    folders = [suite(tmp_path / str(s), run_seed=s, ability=MEASURED["ability"]) for s in (0, 1)]
    counts = {"paper": 4, "recommended": 4}
    change(folders[1] / "eval" / "main", "xstest_safe", refused=counts)
    table = paper.table1(selection(*folders))
    (mean,) = (row for row in rows_by(table) if row["run"] == "2 seeds")
    assert mean["XS"] == pytest.approx(0.7)  # 0.8 and 0.6
    assert mean["XS_spread"] == pytest.approx(0.2 / 2**0.5)
    assert "0.70 ± 0.14" in set(table.frame["XS"])


HOSTILE = r"""<script>alert(1)</script> | & $x_1$ # 50% {a}\b ~ ^ * ` " [1] 😀 κ ﬁ é"""
MINUS = Cell(0.5, 0.25, 0.75, 4, marks="†")


def hostile_table() -> TextTable:
    rows = [
        PaperRow(HOSTILE, "ours", f"=1+1\n{HOSTILE}", HOSTILE, {"XS": MINUS}, "*judge"),
        PaperRow("STL", "paper", "=cmd()", "", {"PH": Cell(1.0)}),
    ]
    return paper.written(HOSTILE, {"XS": "XS", "PH": f"a {HOSTILE}"}, rows, [HOSTILE])


def test_csv_is_parseable_and_holds_no_formula() -> None:
    header, first, second = csv.reader(io.StringIO(writing.WRITERS["csv"](hostile_table())))
    assert len(header) == len(first) == len(second) == 5 + 2 * 5 + 1
    row = dict(zip(header, first, strict=True))
    assert row["model"] == f"'=1+1\n{HOSTILE}"
    assert [row[f"XS{part}"] for part in ("", "_low", "_high", "_spread", "_n")] == [
        "0.5", "0.25", "0.75", "", "4"
    ]  # fmt: skip
    assert dict(zip(header, second, strict=True))["model"] == "'=cmd()"


def test_markdown_keeps_its_columns() -> None:
    lines = [line for line in writing.markdown(hostile_table()).splitlines() if line[:1] == "|"]
    assert len(lines) == 4
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {6}
    assert "<script>" not in "".join(lines)
    assert r"| 0.50 \[0.25–0.75\]† |" in lines[2]


def test_latex_is_balanced_and_escaped(tmp_path: Path) -> None:
    chosen = selection(suite(tmp_path / "a", **MEASURED))
    for table in (hostile_table(), paper.table1(chosen), paper.table5(chosen)):
        text = writing.latex(table)
        depth = 0
        for brace in re.findall(r"(?<!\\)[{}]", text.replace("!}{%", "!}{")):
            depth += 1 if brace == "{" else -1
            assert depth >= 0
        assert depth == 0
        assert text.count(r"\begin{") == text.count(r"\end{")
        body = text.partition(r"{!}{%")[2]
        assert not re.search(r"(?<!\\)[#$%_~^]", body), "nothing special is left bare"
        rows = [line for line in body.partition(r"\end{tabular}")[0].splitlines() if "&" in line]
        separators = {len(re.findall(r"(?<!\\)&", line)) for line in rows}
        assert separators == {len(table.frame.columns) - 1}
    hostile = writing.latex(hostile_table())
    for escaped in (r"\{a\}\textbackslash b", r"50\%", r"\$x\_1\$", "0.50 [0.25–0.75]†"):
        assert escaped in hostile


def test_html_is_escaped_alone_and_in_the_page(tmp_path: Path) -> None:
    names = parsed(writing.WRITERS["html"](hostile_table())).names
    assert "script" not in names
    assert names.count("tr") == 3
    run = suite(tmp_path / "a", model="<img src=x onerror=alert(1)>", **MEASURED)
    _, html = build(tmp_path, run, wanted=("table1", "table5"))
    assert "img" not in parsed(html).names
    assert '<h2 id="table5">' in html
    alone = (tmp_path / "table5.html").read_text(encoding="utf-8")
    assert "&lt;img src=x" in alone
    assert "<img" not in alone
