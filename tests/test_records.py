"""Records against a run folder, pages against records, both made by hand; and our documents."""

import csv
import hashlib
import json
import re
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scipy
import yaml

from dcr.core import storage
from dcr.core.config import ConfigError
from dcr.record import __main__ as command
from dcr.record import origins, pages, unchanged, writing

ROOT = Path(__file__).parent.parent
RULES = "dcr/core/refusal/keywords.py"
MADE = "command=python -m dcr.demo data.root=<data>"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one commit, with the file that decides refusals."""
    place = tmp_path / "repository"
    file = place / RULES
    file.parent.mkdir(parents=True)
    file.write_text("def refused(text):\n    return 'sorry' in text\n")
    commit(place)
    monkeypatch.setattr(origins, "ROOT", place)
    return place


def commit(place: Path) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "Rules"]):
        subprocess.run(["git", "-C", str(place), *words], check=True)
    words = ["git", "-C", str(place), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that refused one of four toxic prompts, with a set's answers and their ranking."""
    folder = tmp_path / "stl"
    made_with = {"method": "stl", "seed": 3, "preset_name": "paper", "model": {"label": "m"}}
    storage.write_text(folder / "config.yaml", yaml.safe_dump(made_with | {"data": {"label": "d"}}))
    rows = {"normal": {"count": 1, "fingerprint": "f", "ids": ["n"]}}
    storage.write_json(folder / "rows.json", {"rows": rows})
    answers = [{"id": f"a-{i}", "prompt": f"Prompt {i}?", "response": "…"} for i in (2, 1, 3, 4, 9)]
    storage.append_lines(folder / "eval/one/bad.jsonl", answers)
    counted = {"kind": "toxic", "n": 4, "ids": ["a-1", "a-2", "a-3", "a-4"]}
    metrics: dict[str, Any] = {"version": 2, "weights": "sft", "method": "stl", "seed": 3}
    metrics |= {"model": "m", "data": "paper", "seconds": 3.0}
    metrics |= {"settings": {"precision": "fp32"}, "decoding": {"threads": [2], "batch_size": [4]}}
    metrics["sets"] = {"bad": counted | {"refused": {"paper": 1}, "truncated": 2}}
    ranking = {"toxic": 4, "seemingly_toxic": 4, "auroc": [0.75, 0.5, None]}
    metrics["discernment"] = {"pooled": ranking}
    storage.write_json(folder / "eval/one/metrics.json", metrics)
    return folder


def recorded(*words: object) -> int:
    return command.main(["name=one", *map(str, words)])


def rows_of(file: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    rows = list(csv.DictReader(file.read_text().splitlines()))
    found = {(row["name"], row["metric"], row["set"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def test_a_record_holds_every_number_with_where_it_comes_from(
    repository: Path, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "one.csv"
    assert recorded(run, f"out={out}", "commit=HEAD", MADE) == 0
    rows = rows_of(out)
    assert {metric for _, metric, _ in rows} == {"refused", "complied", "truncated", "discernment"}
    refused, ranked = rows["stl", "refused", "bad"], rows["stl", "discernment", "pooled"]
    of = {"seed": "3", "stages": "sft", "kind": "toxic", "judge": "keyword:paper", "n": "4"}
    assert of.items() <= refused.items()
    assert float(refused["value"]) == 0.25
    # Wilson's interval of 1 of 4
    assert float(refused["low"]) == pytest.approx(0.0456, abs=1e-4)
    assert float(refused["high"]) == pytest.approx(0.6994, abs=1e-4)
    assert [ranked[key] for key in ("value", "low", "high", "n")] == ["0.75", "0.5", "", "8"]
    asked = [[f"a-{i}", f"Prompt {i}?"] for i in (1, 2, 3, 4)]
    assert refused["prompts"] == hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    assert refused["command"] == MADE.removeprefix("command=")
    assert refused["commit"] == commit_of(repository)
    assert refused["trained_on"].startswith("d ")
    assert refused["machine"].endswith(", 2 threads, fp32")
    assert "Prompt" not in out.read_text()
    assert str(tmp_path) not in out.read_text()


def commit_of(place: Path) -> str:
    words = ["git", "-C", str(place), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def test_a_record_is_written_over_only_when_asked(
    repository: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "one.csv"
    assert recorded(run, f"out={out}", MADE, "only=refused") == 0
    assert {metric for _, metric, _ in rows_of(out)} == {"refused"}
    before = out.read_bytes()
    assert recorded(run, f"out={out}", MADE) == 2
    assert "replace=true" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert recorded(run, f"out={out}", MADE, "replace=true") == 0
    assert len(rows_of(out)) > 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["command=python eval.py data.root=/home/me/data"], "names a place on this machine"),
        ([], "command: nothing given"),
        ([MADE, "only=nothing"], "no number there of nothing"),
        ([MADE, "commit=nowhere"], "commit=<one>"),
    ],
)
def test_what_cannot_be_recorded_is_one_line(
    repository: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    out = tmp_path / "one.csv"
    assert recorded(run, f"out={out}", *words) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_two_evaluations_of_one_number_are_refused(
    repository: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage.write_bytes(run / "eval/two/metrics.json", (run / "eval/one/metrics.json").read_bytes())
    assert recorded(run, f"out={tmp_path / 'one.csv'}", MADE) == 2
    assert "two evaluations tell it" in capsys.readouterr().err


def test_a_comparison_of_arms_is_recorded(repository: Path, tmp_path: Path) -> None:
    origin = {"prompts": {"safe": "s", "bad": "b", "": "all"}, "trained_on": "d 1", "machine": "m"}
    arm: dict[str, Any] = {
        "arm": "STL + readout",
        "seed": 2,
        "auroc": 0.8,
        "answered": 0.5,
        "most": 0.85,
    }
    arm |= {"bias": 0.25, "by_set": {"safe": 0.5}, "plain": [0.9, 0.4], "calibrated": [0.8, 0.5]}
    arm |= {"outcomes": {"bad": {"refused": 0.75}}, "origin": origin | {"date": "2026-01-01"}}
    ends = {"estimate": 0.1, "low": -0.1, "high": 0.3}
    difference = {"arms": "a - b", "over_seeds": ends, "over_prompts": ends, "p": 0.5}
    found: dict[str, Any] = {
        "verdict": "outcome",
        "safety": 0.8,
        "prompts": {"safe": 10, "bad": 20},
        "rows": [arm],
    }
    found["comparisons"] = [difference | {"p_holm": 1.0}]
    storage.write_json(tmp_path / "arms.json", found)
    out = tmp_path / "one.csv"
    assert recorded(tmp_path / "arms.json", f"out={out}", "commit=HEAD", MADE) == 0
    rows = rows_of(out)
    by_set = rows["STL + readout", "frontier/answered_at/0.8", "safe"]
    assert [by_set[key] for key in ("seed", "value", "n", "prompts")] == ["2", "0.5", "10", "s"]
    pooled = rows["STL + readout", "frontier/answered_at/0.8", ""]
    assert [pooled[key] for key in ("value", "n", "prompts")] == ["0.5", "30", "all"]
    assert rows["STL + readout", "frontier/calibrated/refused", ""]["value"] == "0.8"
    assert rows["STL + readout", "frontier/outcome/refused", "bad"]["value"] == "0.75"
    over = rows["a - b", "frontier/difference/0.8/over_seeds", ""]
    assert [over[key] for key in ("value", "low", "high")] == ["0.1", "-0.1", "0.3"]
    fewer, arms = tmp_path / "fewer.csv", tmp_path / "arms.json"
    assert recorded(arms, f"out={fewer}", "commit=HEAD", MADE, "only=frontier/calibrated") == 0
    kept = {metric for _, metric, _ in rows_of(fewer)}
    assert kept == {f"frontier/calibrated/{name}" for name in ("refused", "answered", "bias")}
    part = tmp_path / "part.csv"  # of a word is no word
    assert recorded(arms, f"out={part}", "commit=HEAD", MADE, "only=frontier/cal") == 2


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ('"""What it says."""\n\ndef refused(text):  # so\n    return "sorry" in text\n', True),
        ("import re\n\n\ndef refused(text):\n    'Told.'\n    return (\n'sorry' in text)\n", True),
        ("def refused(text):\n    return 'Sorry' in text\n", False),
        ("def refused(text):\n    return 'sorry' not in text\n", False),
    ],
)
def test_only_statements_make_a_record_stale(text: str, same: bool) -> None:
    one = origins.measured_by("refused", {RULES: "def refused(text):\n    return 'sorry' in text"})
    assert (origins.measured_by("refused", {RULES: text}) == one) == same


def test_the_files_that_decide_a_metric_are_there() -> None:
    for place in {origins.RULES, *origins.MEASURED_BY.values()}:
        assert [name for name in place if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("folder", "metrics", "shown"),
    [
        ("ability", ["acc"], ["section.py"]),
        ("quality", ["win_rate"], ["section.py"]),
        ("robustness", ["robustness"], ["section.py"]),
        (
            "analyses",
            ["kernel", "separability", "claims", "refusal_probability"],
            ["drawings.py", "verdicts.py"],
        ),
    ],
)
def test_all_files_of_a_measure_but_those_that_show_it_decide_it(
    folder: str, metrics: list[str], shown: list[str]
) -> None:
    place = f"dcr/{folder}/"
    there = [file for file in (ROOT / place).iterdir() if file.name != "__pycache__"]
    there = [file for file in there if file.is_dir() or file.suffix in origins.KINDS]
    there = [file for file in there if file.name != "harness"]  # the questions' wording, in YAML
    deciding = {each for metric in metrics for each in origins.MEASURED_BY[metric]}
    assert {each for each in deciding if each.startswith(place)} == {
        file.relative_to(ROOT).as_posix() for file in there
    } - {f"{place}{name}" for name in shown}


# --- pages --------------------------------------------------------------------------------------


@pytest.fixture
def records(repository: Path, tmp_path: Path) -> Path:
    """The record `one`: two methods, of which one has three seeds."""
    measured = origins.measured_by("refused", origins.code_now())
    lines = [
        {"name": name, "seed": seed, "metric": "refused", "set": "bad", "value": value, "n": 50}
        | {"command": "dcr demo", "commit": "abc", "date": "2026-01-01", "machine": "m"}
        | {"measured_by": measured, "low": low, "high": high}
        for name, seed, value, low, high in [
            ("stl", 0, 0.5, 0.4, 0.6),
            ("dcr", 0, 0.7, 0.6, 0.8),
            ("dcr", 1, 0.8, "", ""),
            ("dcr", 2, 0.9, "", ""),
        ]
    ]
    place = tmp_path / "records"
    place.mkdir()
    with (place / "one.csv").open("w") as file:
        columns = [*writing.OF, *writing.NUMBER, *writing.FROM]
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(lines)
    return place


def test_a_number_in_a_sentence_is_that_of_the_record(records: Path) -> None:
    mark = "It refuses <!-- record one name=stl metric=refused as={} -->1<!-- /record -->."
    shown = {how: pages.rendered(mark.format(how), records) for how in (".0%", "count", "+.3f")}
    assert shown[".0%"] == mark.format(".0%").replace(">1<", ">50%<")
    assert ">25 of 50<" in shown["count"]
    assert ">+0.500<" in shown["+.3f"]
    assert pages.rendered(shown[".0%"], records) == shown[".0%"]
    code = f"```text\n{mark}\n```\n"
    assert pages.rendered(code, records) == code


def test_a_table_has_means_over_seeds_with_students_interval(records: Path) -> None:
    text = (
        "before\n\n<!-- record one columns=name name=stl=>STL,dcr metric=refused\n"
        "refuses | set=bad as=.3f\n-->\nold\n<!-- /record -->\n"
    )
    shown = pages.rendered(text, records)
    reach = scipy.stats.t.ppf(0.975, 2) * statistics.stdev([0.7, 0.8, 0.9]) / 3**0.5
    mean = f"0.800 [{0.8 - reach:.3f}–{0.8 + reach:.3f}]"
    assert "|  | STL | dcr |\n| --- | ---: | ---: |\n" in shown
    assert f"| refuses | 0.500 [0.400–0.600] | {mean} |" in shown
    assert "*`dcr demo`; abc; 2026-01-01; m.*" in shown
    assert "old" not in shown
    assert "Stale" not in shown
    assert pages.rendered(shown, records) == shown


def test_a_line_of_a_table_may_be_of_another_record(records: Path) -> None:
    rows = (records / "one.csv").read_text()
    (records / "two.csv").write_text(rows.replace(",0.5,", ",0.25,").replace("dcr demo", "other"))
    text = (
        "<!-- record one columns=name name=stl metric=refused as=.2f\n"
        "here | set=bad\nthere | record=two set=bad\n-->\n<!-- /record -->\n"
    )
    shown = pages.rendered(text, records)
    assert "| here | 0.50 [" in shown
    assert "| there | 0.25 [" in shown
    assert "*Records: [one](records/one.csv), [two](records/two.csv).*" in shown
    assert pages.rendered(shown, records) == shown


def test_a_number_in_a_sentence_has_its_interval_where_the_mark_asks(records: Path) -> None:
    mark = "It is <!-- record one name=stl metric=refused as={} interval -->1<!-- /record -->."
    assert ">0.50 [0.40–0.60]<" in pages.rendered(mark.format(".2f"), records)
    assert ">+0.50 [+0.40, +0.60]<" in pages.rendered(mark.format("+.2f"), records)


def test_looks_are_listed_from_their_ledgers(records: Path) -> None:
    place = records.parent / pages.LEDGERS
    place.mkdir()
    looks = {
        "one": [
            ("2026-01-02T03:04:05+00:00", "a", {"bad": 3, "safe": 4}),
            ("2026-01-01T09:00:00+00:00", "a", {"bad": 3}),
            ("2026-01-01T10:00:00+00:00", "b", {"safe": 5}),
        ],
        "two": [("2026-01-03T00:00:00+00:00", "a", {"bad": 20})],
    }
    for name, lines in looks.items():
        rows = [
            {"at": at, "plan": "p", "run": "r", "weights": weights, "tasks": [], "sets": sets}
            for at, weights, sets in lines
        ]
        storage.append_lines(place / f"{name}.looks.jsonl", rows)
    text = "Looks:\n\n<!-- looks -->\n| old |\n<!-- /looks -->\n"
    shown = pages.rendered(text, records)
    assert "| [one](evidence/one.yaml) | 3 | 2 | 7 | 2026-01-01 09:00 | 2026-01-02 03:04 |" in shown
    assert (
        "| [two](evidence/two.yaml) | 1 | 1 | 20 | 2026-01-03 00:00 | 2026-01-03 00:00 |" in shown
    )
    assert "| all | 4 |  | 20 | 2026-01-01 09:00 | 2026-01-03 00:00 |" in shown
    assert "old" not in shown
    assert pages.rendered(shown, records) == shown
    # a look that the page does not have
    (place / "two.looks.jsonl").write_text((place / "one.looks.jsonl").read_text())
    assert pages.rendered(shown, records) != shown


def test_rates_of_all_sets_are_those_of_all_their_answers(records: Path) -> None:
    text = (records / "one.csv").read_text().splitlines()
    (line,) = [line for line in text if ",bad," in line and line.startswith("stl,")]
    cells = dict(zip(text[0].split(","), line.split(","), strict=True))
    other = cells | {"set": "worse", "value": "0.9", "n": "10"}
    (records / "one.csv").write_text("\n".join([*text, ",".join(other.values())]) + "\n")
    mark = "It refuses <!-- record one name=stl metric=refused set=* as={} -->1<!-- /record -->."
    count = round(float(cells["value"]) * int(cells["n"])) + 9
    total = int(cells["n"]) + 10
    assert f">{count} of {total}<" in pages.rendered(mark.format("count"), records)
    low, high = scipy.stats.binomtest(count, total).proportion_ci(method="wilson")
    head = "<!-- record one columns=name name=stl metric=refused as=.3f"
    table = f"{head}\nx | set=*\n-->\n<!-- /record -->"
    shown = f"| x | {count / total:.3f} [{low:.3f}–{high:.3f}] |"
    assert shown in pages.rendered(table, records)


def test_a_table_without_its_record_is_left_out(records: Path) -> None:
    text = "<!-- record none columns=name name=a\nx | metric=refused\n-->{}<!-- /record -->"
    assert pages.rendered(text.format("\n| old |\n"), records) == text.format("\n")


def test_stale_numbers_are_told(records: Path, repository: Path) -> None:
    (repository / RULES).write_text("def refused(text):\n    return False\n")
    text = (
        "It is <!-- record one name=stl metric=refused -->0.50<!-- /record -->.\n\n"
        "<!-- record one name=stl\nx | metric=refused\n-->\n<!-- /record -->\n\n"
        "<!-- records -->\n<!-- /records -->\n"
    )
    shown = pages.rendered(text, records)
    assert "-->0.50 (stale)<!--" in shown
    assert "**Stale**: what measures refused has changed since." in shown
    assert "| [one](records/one.csv) | `dcr demo` | abc | 2026-01-01 | m | 4 | `refused` |" in shown


def rewritten(file: Path, **cells: str) -> None:
    """The file with these cells in every row."""
    rows = [row | cells for row in csv.DictReader(file.read_text().splitlines())]
    with file.open("w") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_numbers_that_a_run_keeps_are_not_counted_by_reading_them(
    records: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    again = tmp_path / "one.csv"
    again.write_text((records / "one.csv").read_text())
    rewritten(records / "one.csv", measured_by="older")
    assert unchanged.main([f"records={records}", str(again), "because=it was said"]) == 2
    assert "refused: stands in metrics.json" in capsys.readouterr().err


def test_code_that_moves_no_number_makes_none_stale(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = origins.measured_by("frontier", origins.code_now())
    rewritten(records / "one.csv", metric="frontier/auroc", measured_by=now)
    again = tmp_path / "one.csv"
    again.write_text((records / "one.csv").read_text())
    rewritten(records / "one.csv", measured_by="older")
    mark = "It is <!-- record one name=stl metric=frontier/auroc -->0.50<!-- /record -->."
    assert "(stale)" in pages.rendered(mark, records)
    words = [f"records={records}", str(again), "because=an error has one line"]
    assert unchanged.main(words) == 0
    assert "frontier: 4 numbers of one are as they were" in capsys.readouterr().out
    assert pages.rendered(mark, records) == mark
    said = (records / unchanged.FILE).read_text()
    assert unchanged.main([*words[:2], "because=it is given again"]) == 0
    assert "are as they were, which is recorded already" in capsys.readouterr().out
    assert (records / unchanged.FILE).read_text() == said
    rewritten(records / "one.csv", measured_by="oldest")
    assert "(stale)" in pages.rendered(mark, records)
    rewritten(again, measured_by="older")  # the code of a change before
    assert unchanged.main(words) == 0
    assert pages.rendered(mark, records) == mark


@pytest.mark.parametrize("loses", [False, True])
def test_code_that_moves_a_number_is_not_said_to_be_as_before(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], loses: bool
) -> None:
    rewritten(records / "one.csv", metric="frontier/auroc")
    again, text = tmp_path / "one.csv", (records / "one.csv").read_text()
    rewritten(records / "one.csv", measured_by="older")
    *most, last = text.splitlines()
    again.write_text("\n".join(most if loses else [*most, last.replace("0.9", "0.91")]) + "\n")
    assert unchanged.main([f"records={records}", str(again), "because=it was said"]) == 2
    error = capsys.readouterr().err
    assert f"dcr 2 bad frontier/auroc: {'none' if loses else '0.91 50'}" in error
    assert "and 0.9" in error
    assert not (records / unchanged.FILE).exists()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("a <!-- record one metric=refused -->", "metric=refused: 4 numbers"),
        ("a <!-- record one name=base -->", "name=base: no numbers"),
        ("a <!-- record one sets=bad -->", "sets=bad: no such column"),
        ("a <!-- record none name=stl -->", "none.csv: cannot be read"),
        ("<!-- record one name=stl -->", "begins a line"),
        ("a <!-- record one name='stl -->", "name='stl -->: No closing quotation"),
        ("a <!-- record one name=stl as=.2q -->", "as=.2q -->: Unknown format code 'q'"),
        ("a <!-- record one name=stl -->0 <!-- record one name=dcr -->", "before the next mark"),
    ],
)
def test_a_wrong_mark_is_one_line(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: str, says: str
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{asked}0<!-- /record -->")
    assert pages.main([f"records={records}", str(page)]) == 2
    error = capsys.readouterr().err
    assert f"{page}: " in error
    assert says in error
    assert error.count("\n") == 1


def test_a_mark_that_does_not_end_is_told(records: Path) -> None:
    with pytest.raises(ConfigError, match=r"^<!-- record one name=dcr -->: no <!-- /record --> be"):
        pages.rendered(
            "a <!-- record one name=stl -->0<!-- /record --> <!-- record one name=dcr -->", records
        )


# --- our documents ------------------------------------------------------------------------------

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CITED = re.compile(r"<!-- history: (\S+) -->(.*?)<!-- /history -->", re.DOTALL)
# not prose: code, what a record bears, marks, addresses, the numbers of list items
APART = (
    re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE),
    re.compile(r"^ {4,}.*$", re.MULTILINE),
    re.compile(r"`[^`]*`"),
    re.compile(r"<!-- (records?|looks) .*?<!-- /\1 -->", re.DOTALL),
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"\]\([^)]*\)"),
    re.compile(r"^\d+\. ", re.MULTILINE),
)
# numbers that name a thing: Figure 5, Python 3.11 to 3.13
NAMES = re.compile(
    r"\b(?:Figures?|Tables?|Eq\.|Proposition|Python|arXiv|Guard|Zen|[Ss]eeds?|[Ss]tep|[Bb]lock)\s"
    r"(?:(?:, | and | to )?\d[\d.]*)+"
)
# neither in a word, such as SmolLM2-135M, nor in a name
NUMBER = re.compile(r"(?<![\w./-])\.?\d(?:[\d.,]*\d)?(?![\w-])")


# such a number looks measured: two decimals, or what a share, a count or an interval looks like
DECIMALS = re.compile(r"[\d,]*\.\d\d+")
BEHIND = re.compile(
    r"\s?[%±]|\s\[[-+−.\d]|\sof\s\d"
    r"|\s(?:nats|points|ms|s|min|minutes|hours|[KMG]i?B|tokens a second)\b"
)
CONFIDENCE = re.compile(r"\b95%\s")
STRICT = ("README.md", "results.md")  # where any number counts as measured


def prose(text: str) -> str:
    for pattern in (*APART, NAMES):
        text = pattern.sub(" ", text)
    return text


def numbers(text: str) -> list[str]:
    return NUMBER.findall(prose(text))


def measured(text: str) -> list[str]:
    """The numbers that look measured."""
    text = CONFIDENCE.sub(" ", prose(text))
    return [
        found[0]
        for found in NUMBER.finditer(text)
        if DECIMALS.fullmatch(found[0])
        or BEHIND.match(text, found.end())
        or text[: found.start()].rstrip().endswith("±")
    ]


def unborne(page: str, text: str) -> list[str]:
    """The numbers of a page that no record bears, nor the section of the history that is cited."""
    history = dict(sections((ROOT / "docs/history.md").read_text()))
    found = []
    for anchor, cited in CITED.findall(text):
        there = set(NUMBER.findall(history[anchor]))
        found += [number for number in numbers(cited) if number not in there]
    return found + (numbers if page in STRICT else measured)(CITED.sub("", text))


def sections(text: str) -> Iterator[tuple[str, str]]:
    """The sections of a page by their anchors."""
    for part in re.split(r"^##+ ", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        yield re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-"), body


def test_documents_show_what_their_records_hold() -> None:
    """If this fails, `make docs` writes numbers and looks, and marks what became stale."""
    differ = [
        page.name
        for page in DOCUMENTS
        if pages.rendered(page.read_text(), ROOT / writing.RECORDS) != page.read_text()
    ]
    assert differ == []


@pytest.mark.parametrize(
    "page", [page for page in DOCUMENTS if page.name != "history.md"], ids=lambda page: page.name
)
def test_every_measured_number_is_borne_by_a_record_or_cited_from_history(page: Path) -> None:
    text = page.read_text()
    assert unborne(page.name, text) == []
    planted = "\n\nIt refuses 0.73 of them and answers 81%.\n"
    assert unborne(page.name, text + planted) == ["0.73", "81"]
    cited = "<!-- history: the-demo -->It refuses 0.123 of them.<!-- /history -->\n\n"
    assert unborne(page.name, cited + text) == ["0.123"]  # a page may show such a mark as code


def test_what_looks_measured_is_told_from_a_setting() -> None:
    prose = "It answers 72 %, .81, 1,026 of 2,000, 0.5 ± .1 and 0.9 [.8, 1] in 3.4 GiB and 12 s."
    assert measured(prose) == ["72", ".81", "1,026", "0.5", ".1", "0.9", "3.4", "12"]
    prose = "Block 14 of 30, 938 prompts, at most `0.05`, 95% intervals, hydra 1.2.0, at safety .8."
    assert measured(prose) == []


def test_a_number_is_told_from_a_name() -> None:
    prose = "Of 280 prompts SmolLM2-135M (Python 3.11 to 3.13, Table 2) refuses .72, 5% and 1,026."
    assert numbers(prose) == ["280", ".72", "5", "1,026"]
    assert numbers("`lr=2e-3`\n\n    steps=120\n\n1. [it](a-2.md)") == []
    assert numbers("a <!-- record x as=.2f -->0.8<!-- /record --> and 0.9") == ["0.9"]
    assert numbers("<!-- records -->\n| 1 |\n<!-- /records -->") == []
