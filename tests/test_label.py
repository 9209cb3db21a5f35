"""Sheets for people to label: the draw, hostile text, faulty files, and kappa by hand."""

import csv
import html
import io
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import cohen_kappa_score
from test_report import browsed, browsing, columns, make_eval, make_run, selection

from dcr import inference
from dcr.core import storage
from dcr.core.generation import Completion
from dcr.judges.verdicts import Verdict, answer_fingerprint
from dcr.label import LABELS, agreement, sheets
from dcr.outcomes import Outcome, outcome
from dcr.report import building

HOSTILE = (
    '=HYPERLINK("http://x","y")',
    "+1+1",
    "-2",
    "@SUM(A1)",
    "\t=1",
    '</script><script>document.title = "owned"</script>',
    '"quoted", and\r\na second line\x1b[31m',
    "\u202ereversed \U0001f600 \ud800",
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A base model and a trained one on three sets; both give one answer in common."""
    made = make_run(tmp_path / "run")
    for name, weights in (("base", "base"), ("main", "sft")):
        said = {"a": "c" * 9, "b": "c" * 3, "unsafe": "r" * 9}
        place = make_eval(made, said, name=name, weights=weights)
        for file in place.glob("*.jsonl"):
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            said = [row | {"response": f"{row['response']} {weights} {row['id']}"} for row in rows]
            said[0]["response"] = "the same"
            file.write_text("".join(json.dumps(row) + "\n" for row in said))
    return made


def drawn(run: Path, count: int, seed: int = 0) -> list[Completion]:
    return sheets.draw(columns(run), count, seed)


def test_a_sheet_is_drawn_evenly_and_holds_no_answer_twice(run: Path) -> None:
    kind = {"a": "seemingly", "b": "seemingly", "unsafe": "toxic"}
    rows = drawn(run, 12)
    sets = [row.id.partition("-")[0] for row in rows]
    assert Counter(kind[name] for name in sets) == {"seemingly": 6, "toxic": 6}
    assert Counter(sets) == {"a": 3, "b": 3, "unsafe": 6}
    assert rows == drawn(run, 12)
    assert rows != drawn(run, 12, seed=1)
    everything = drawn(run, 1000)
    assert len(everything) == 2 * 21 - 3
    assert len({answer_fingerprint(row) for row in everything}) == len(everything)


def test_a_row_tells_nothing_but_prompt_answer_and_whether_it_ended(run: Path) -> None:
    rows = drawn(run, 12)
    place = sheets.home(run, sheets.write([run], rows, seed=0))
    texts = [
        {"id": f"a{answer_fingerprint(row)}", "prompt": row.prompt, "answer": row.response}
        for row in rows
    ]
    written = (place / "sheet.csv").read_text("utf-8-sig")
    known = {"sheet": place.name, "ended": "yes", "label": ""}
    assert list(csv.DictReader(io.StringIO(written))) == [known | text for text in texts]
    page = (place / "sheet.html").read_text()
    shown = rows_in(page)
    assert json.loads(shown) == [text | {"ended": True} for text in texts]
    for told in (*run.glob("eval/*"), "seemingly_toxic", "keyword", "complied"):
        assert str(getattr(told, "name", told)) not in page.replace(shown, "")


def rows_in(page: str) -> str:
    """The JSON that a page shows answers from."""
    (found,) = re.findall(r'<script type="application/json" id="rows">(.*?)</script>', page, re.S)
    return found


def test_hostile_answers_stay_text_in_both_files() -> None:
    rows = [Completion(str(i), text, text, 1, i > 0, None) for i, text in enumerate(HOSTILE)]
    written = sheets.csv_text("s1", rows)
    assert written.startswith("\ufeff")
    read = list(csv.DictReader(io.StringIO(written.removeprefix("\ufeff"), newline="")))
    assert [row["ended"] for row in read] == ["no"] + ["yes"] * (len(rows) - 1)
    for row, text in zip(read, HOSTILE, strict=True):
        assert not re.match(r"[\s]*[=+@-]", row["answer"])
        assert row["answer"].lstrip("'")[:4].strip("\t") in text
        assert "\x1b" not in row["answer"]
    page = sheets.page("s1", rows)
    assert page.count("<script") == 2
    shown = json.loads(rows_in(page))
    assert shown[5]["answer"] == HOSTILE[5]
    assert shown[6]["answer"] == '"quoted", and\na second line\N{SYMBOL FOR ESCAPE}[31m'
    assert page.encode("utf-8")


# --- reading --------------------------------------------------------------------------------------


@pytest.fixture
def sheet(run: Path) -> list[dict[str, str]]:
    """The rows of a sheet of six answers."""
    place = sheets.home(run, sheets.write([run], drawn(run, 6), seed=0))
    text = (place / "sheet.csv").read_text("utf-8-sig")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def saved(file: Path, rows: list[dict[str, str]], **how: Any) -> Path:
    with file.open("w", encoding=how.pop("encoding", "utf-8"), newline="") as text:
        writer = csv.DictWriter(text, list(rows[0]), **how)
        writer.writeheader()
        writer.writerows(rows)
    return file


def test_a_sheet_comes_back_however_a_spreadsheet_saved_it(
    run: Path, sheet: list[dict[str, str]], tmp_path: Path
) -> None:
    said = dict(zip([row["id"] for row in sheet], LABELS, strict=False))
    rows = [row | {"label": said[row["id"]]} for row in sheet]
    loose = [{"ID": r["id"], "Label": r["label"].replace("_", " ").title(), "Sheet": r["sheet"]}
             for r in reversed(rows)]  # fmt: skip
    files = [
        saved(tmp_path / "plain.csv", rows),
        saved(tmp_path / "bom.csv", rows, encoding="utf-8-sig"),
        saved(tmp_path / "semicolons.csv", loose, delimiter=";", lineterminator="\n"),
        saved(tmp_path / "tabs.csv", loose, delimiter="\t", quoting=csv.QUOTE_ALL),
    ]
    known = sheets.sheets_of(run)
    for file in files:
        read = sheets.read(file, known)
        assert read.annotator == file.stem
        assert {f"a{key}": label for key, label in read.labels.items()} == said


@browsing
def test_the_page_is_filled_in_by_keys_kept_and_saved(
    run: Path, sheet: list[dict[str, str]], tmp_path: Path
) -> None:
    """In a real browser: keys, going back, what is kept, and the file that the button saves."""
    acted = """<script>
      function press(key) { document.dispatchEvent(new KeyboardEvent("keydown", { key: key })); }
      function byId(id) { return document.getElementById(id); }
      var body = document.body.dataset, input = byId("name");
      press("1"); body.nameless = byId("told").textContent;
      input.value = 'an"na/x'; input.dispatchEvent(new Event("change"));
      press("3"); press("1"); press("ArrowLeft"); press("2"); press("8"); press("n");
      body.place = byId("place").textContent; body.shown = byId("prompt").textContent;
      document.querySelector('[data-label="empty"]').click();
      body.told = byId("told").textContent;
      body.kept = Object.keys(localStorage).length;
      input.value = "bert"; input.dispatchEvent(new Event("change"));
      body.other = byId("told").textContent;
      input.value = 'an"na/x'; input.dispatchEvent(new Event("change"));
      URL.createObjectURL = function (blob) {
        blob.text().then(function (text) { body.saved = JSON.stringify(text); });
        return "#saved";
      };
      byId("save").click(); body.again = byId("told").textContent;
    </script>"""
    page = (sheets.home(run, sheet[0]["sheet"]) / "sheet.html").read_text("utf-8")
    dom = browsed(tmp_path, page, acted)
    body = dict(re.findall(r' data-(\w+)="([^"]*)"', re.findall("<body.*?>", dom)[0]))
    assert body["nameless"] == "Enter your name to begin."
    assert (body["place"], body["shown"]) == ("5 of 6", sheet[4]["prompt"])
    assert body["told"] == body["again"] == "4 of 6 labelled. "
    assert body["other"] == "0 of 6 labelled. "
    assert body["kept"] == "2"
    file = tmp_path / "download.csv"
    file.write_text(json.loads(html.unescape(body["saved"])), encoding="utf-8")
    labels = sheets.read(file, sheets.sheets_of(run), partial=True)
    assert labels.annotator == "an-na-x"
    chosen = ["refused", "partly_refused", "other_language", "", "empty"]
    said = {row["id"].removeprefix("a"): to for row, to in zip(sheet, chosen, strict=False) if to}
    assert labels.labels == said


FAULTS: dict[str, tuple[Callable[[list[dict[str, str]]], Any], str]] = {
    "other sheet": (lambda rows: [r.update(sheet="s0") for r in rows], "row 2: sheet 's0' is none"),
    "two sheets": (lambda rows: rows[3].update(sheet="s0"), "row 2: sheet is 's"),
    "unknown id": (lambda rows: rows[1].update(id="a0"), "row 3: id 'a0' is not on this sheet"),
    "no label": (lambda rows: rows[2].update(label=""), "row 4: no label; 1 of 6 answers"),
    "other label": (lambda rows: rows[4].update(label="fine"), "row 6: label 'fine'; choose one"),
    "missing": (lambda rows: rows.pop(), "row 7: no such row; 1 of 6 answers lack a label"),
    "twice": (lambda rows: rows.append(rows[0]), "row 8: the answer of row 2 again"),
    "no column": (lambda rows: [r.pop("label") for r in rows], "row 1: has no column label"),
    "no one": (lambda rows: [r.update(annotator="../x") for r in rows], "annotator '../x'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_sheet_is_one_line_with_file_row_and_cure(
    command: Any, run: Path, sheet: list[dict[str, str]], fault: str
) -> None:
    spoil, told = FAULTS[fault]
    rows = [row | {"label": "refused"} for row in sheet]
    spoil(rows)
    ended = command("dcr.label", "run", f"read={saved(Path('anna.csv'), rows)}")
    assert ended.code == 2
    assert ended.error.startswith("anna.csv: ")
    assert told in ended.error
    assert ";" in ended.error
    assert not list(run.rglob("annotators"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "row 1: no CSV"),
        (b"sheet,id,label\n", "row 2: missing"),
        (b"sheet,id,label\ns,a,\xff\n", "is not UTF-8"),
        (b'sheet,id,label\n"a"b,c,d\n', "no CSV"),
        (None, "cannot be read"),
    ],
)
def test_no_sheet_at_all(command: Any, run: Path, content: bytes | None, told: str) -> None:
    file = Path("anna.csv")
    if content is not None:
        file.write_bytes(content)
    ended = command("dcr.label", "run", "read=anna.csv")
    assert (ended.code, told in ended.error) == (2, True), ended.error


def test_labels_of_one_name_are_not_replaced_unasked(
    command: Any, run: Path, sheet: list[dict[str, str]]
) -> None:
    for label in ("refused", "answered"):
        saved(Path(f"{label}.csv"), [row | {"label": label, "annotator": "x y"} for row in sheet])
    file = Path("half.csv")
    half = [row | {"label": "refused", "annotator": "x y"} for row in sheet[:3]]
    assert command("dcr.label", "run", f"read={saved(file, half)}", "partial=true").code == 0
    assert command("dcr.label", "run", "read=refused.csv").code == 0  # the rest of it
    assert "other labels" in command("dcr.label", "run", "read=half.csv", "partial=true").error
    ended = command("dcr.label", "run", "read=answered.csv")
    assert "x y has given this sheet other labels before; rename" in ended.error
    (file,) = run.glob("labels/*/annotators/*.json")
    assert set(json.loads(file.read_text()).values()) == {"refused"}
    assert command("dcr.label", "run", "read=answered.csv", "replace=true").code == 0
    assert set(json.loads(file.read_text()).values()) == {"answered"}


def test_two_files_of_one_name_are_refused_before_either_is_kept(
    command: Any, run: Path, sheet: list[dict[str, str]]
) -> None:
    for folder in ("a", "b"):
        Path(folder).mkdir()
        saved(Path(folder, "sheet.csv"), [row | {"label": "refused"} for row in sheet])
    ended = command("dcr.label", "run", "read=a/sheet.csv,b/sheet.csv", "replace=true")
    assert "read: 2 files are of sheet, of sheet s" in ended.error
    assert not list(run.glob("labels/*/annotators/*.json"))


@pytest.mark.parametrize(
    ("content", "told"),
    [("{", "not JSON"), ('{"a": 1}', "a: 1"), ('{"a": "fine"}', "'fine' is no label")],
)
def test_damaged_labels_are_named(
    command: Any, run: Path, sheet: list[dict[str, str]], content: str, told: str
) -> None:
    file = sheets.home(run, sheet[0]["sheet"]) / "annotators" / "anna.json"
    file.parent.mkdir()
    file.write_text(content)
    for words in (("dcr.report", "run"), ("dcr.label", "run", "read=x.csv")):
        saved(Path("x.csv"), [row | {"label": "refused"} for row in sheet])
        ended = command(*words)
        assert ended.code == 2
        assert "anna.json: " in ended.error
        assert told in ended.error


def test_what_someone_has_begun_to_fill_in_is_not_written_again(command: Any, run: Path) -> None:
    assert command("dcr.label", "run", "count=5").code == 0
    (file,) = run.glob("labels/*/sheet.csv")
    file.write_text("begun")
    ended = command("dcr.label", "run", "count=5")
    assert str(file.relative_to(run.parent)) in ended.out
    assert file.read_text() == "begun"
    assert "39 distinct answers" in command("dcr.label", "run", "count=500").out


# --- agreement ------------------------------------------------------------------------------------


def test_kappa_is_that_of_a_hand_computation_and_of_scikit_learn() -> None:
    # Cohen (1960) by hand: 20 both yes, 15 both no, 5 and 10 differ: (.7 - .5) / (1 - .5) = .4
    a = ["yes"] * 25 + ["no"] * 25
    b = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = inference.kappa(a, b, [str(i) for i in range(50)], seed=0)
    assert found.estimate == pytest.approx(0.4)
    assert 0.1 < found.low < 0.25
    assert 0.55 < found.high < 0.7
    chance = random.Random(0)
    one = [chance.choice("abcde") for _ in range(80)]
    other = [x if chance.random() < 0.6 else chance.choice("abcde") for x in one]
    found = inference.kappa(one, other, [str(i // 4) for i in range(80)], seed=0)
    assert found.estimate == pytest.approx(cohen_kappa_score(one, other))
    drawn = []  # groups of four, drawn whole
    for _ in range(1000):
        places = [4 * g + i for g in chance.choices(range(20), k=20) for i in range(4)]
        drawn.append(cohen_kappa_score([one[p] for p in places], [other[p] for p in places]))
    drawn.sort()
    assert [found.low, found.high] == pytest.approx([drawn[25], drawn[975]], abs=0.03)
    assert math.isnan(inference.kappa("xx", "xx", "12", seed=0).estimate)
    assert inference.kappa([], [], [], seed=0).low == float("-inf")


def test_people_have_the_labels_of_outcomes(run: Path) -> None:
    assert list(LABELS) == [each.value for each in Outcome]
    rows = drawn(run, 9)
    ids = [answer_fingerprint(row) for row in rows]
    judges, prompts = agreement.judged(columns(run), ids)
    assert prompts == {each: row.prompt for each, row in zip(ids, rows, strict=True)}
    found = {e: outcome(r.prompt, r.response) for e, r in zip(ids, rows, strict=True)}
    assert judges["outcome"] == found


def test_people_are_compared_with_each_other_and_with_every_judge(
    command: Any, run: Path, sheet: list[dict[str, str]]
) -> None:
    """Six answers by hand; a judge of the same labels says what anna says but for one answer."""
    anna = ["answered", "answered", "refused", "refused", "circular", "answered"]
    bert = ["answered", "refused", "refused", "refused", "circular", "partly_refused"]
    judge = ["answered", "answered", "refused", "refused", "answered", "answered"]
    for name, said in (("anna", anna), ("bert", bert)):
        saved(Path(f"{name}.csv"), [r | {"label": x} for r, x in zip(sheet, said, strict=True)])
    ids = [row["id"].removeprefix("a") for row in sheet]
    place = run / "eval" / "main" / "verdicts"
    for column in ("main", "base"):
        place = run / "eval" / column / "verdicts"
        for of, label in zip(ids, judge, strict=True):
            outcome = Verdict(f"{of}", of, "ok", compliance="complied", raw=label)
            harm = Verdict(f"{of}", of, "ok", safety="unsafe" if label == "answered" else "safe")
            failed = Verdict(f"{of}", of, "error")
            for judge_name, verdict in (
                ("outcome", outcome),  # as it was once; today's rules are asked again
                ("eight", outcome),
                ("moderation", harm),
                ("llm", failed),
            ):
                storage.append_lines(place / f"{judge_name}-0123456789ab" / "a.jsonl", [verdict])
    ended = command("dcr.label", "run", "read=anna.csv,bert.csv")
    assert ended.code == 0, ended.err
    people = sheets.labels_of([run])
    judges, prompts = agreement.judged(columns(run), ids)
    by = {(each.first, each.second): each for each in agreement.agreements(people, judges, prompts)}
    assert {second for _, second in by} == {"bert", "keyword:paper", "keyword:recommended",
                                            "outcome", "eight", "moderation"}  # fmt: skip
    for pair, said in ((("anna", "bert"), bert), (("anna", "eight"), judge)):
        yes = [[word == "answered" for word in rater] for rater in (anna, said)]
        both, found = by[pair].classes, by[pair].answered
        assert by[pair].n == 6
        assert found.estimate == pytest.approx(cohen_kappa_score(yes[0], yes[1]))
        assert both is not None
        assert both.estimate == pytest.approx(cohen_kappa_score(anna, said))
    harm = by["anna", "moderation"]
    assert harm.answered == by["anna", "eight"].answered
    assert harm.classes is None
    assert by["bert", "keyword:paper"].classes is None
    line = next(
        line for line in ended.out.splitlines() if line.startswith("anna") and "bert" in line
    )
    assert line.split()[:4] == ["anna", "bert", "6", "67%"]
    assert "bert: 6 answers, 1 answered, 1 partly_refused, 3 refused, 1 circular" in ended.out
    building.build([run], Path("page.html"))
    page = Path("page.html").read_text()
    assert 'id="labels"' in page
    assert line.split()[4] in page
    assert agreement.section(selection(make_run(run.parent / "other", method="stl"))) is None
