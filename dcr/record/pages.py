"""The command that writes numbers of records into pages, between marks that a reader does not see.

Its syntax stands in docs/evidence.md: a mark with lines is a table, one without a number in a
sentence; `<!-- records -->` lists all records, and `<!-- looks -->` all looks at rows kept apart.
"""

import functools
import math
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dcr import entry, inference
from dcr.core import storage
from dcr.core.config import ConfigError, DataError
from dcr.looks import counting
from dcr.record import origins, unchanged
from dcr.record.writing import OF, RECORDS, Row, read

CODE = r"^```.*?^```"  # is left as it is
MARKED = re.compile(
    rf"{CODE}|(<!-- record (\S+) (.*?)-->).*?(<!-- /record -->)", re.DOTALL | re.MULTILINE
)
BEGINS = re.compile(r"<!-- record .*")
ALL = "*"  # sets, together
LISTED = re.compile(r"(<!-- (records|looks) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
LEDGERS = "evidence"  # the folder beside the records
# a metric's first word -> hashes of the code that decides it, and of code that measures the same
Deciding = Callable[[str], set[str]]


@dataclass
class Options:
    """python -m dcr.record.pages <page> ...

    Writes the numbers of records into Markdown pages, between their marks. Numbers whose measure
    has changed since are told to be stale.
    """

    records: Path = entry.option("the folder of the records", RECORDS)
    pages: list[str] = entry.option("Markdown files", [], rest=True)


@entry.command(Options)
def main(options: Options) -> None:
    for page in map(Path, options.pages):
        before = storage.read_text(page)
        try:
            after = rendered(before, options.records)
        except (ConfigError, DataError) as error:
            raise type(error)(f"{page}: {error}") from None
        if after != before:
            storage.write_text(page, after)
            print(page)


def rendered(text: str, records: Path) -> str:
    """A page with the numbers of records between its marks; a table without a record is empty.

    The ledgers of looks are those of the folder beside `records`. Raises DataError for a number
    that no record has, or several, ConfigError for a wrong mark.
    """
    now = _deciding_now(records)

    def written(mark: re.Match[str]) -> str:
        begins, _, _, ends = mark.groups()
        if not begins:
            return mark[0]
        called = begins.splitlines()[0]
        if BEGINS.search(mark[0], len(begins)):
            raise ConfigError(f"{called}: no {ends} before the next mark")
        try:
            return f"{begins}{numbers(mark)}{ends}"
        except (ConfigError, DataError) as error:
            raise type(error)(f"{called}: {error}") from None
        except ValueError as error:  # of words, or of how a number is shown
            raise ConfigError(f"{called}: {error}") from None

    def numbers(mark: re.Match[str]) -> str:
        _, name, asked, _ = mark.groups()
        head, *lines = asked.strip().split("\n")
        file = records / f"{name}.csv"
        if lines:
            return "\n" + (_table(records, name, head, lines, now) if file.is_file() else "")
        if text[: mark.start()].rpartition("\n")[2] == "":
            raise ConfigError("begins a line, where Markdown takes it for a block")
        words = _words(head)
        interval = words.pop("interval", None) is not None
        found, how = _found(read(file), words)
        return _shown(found, how, ends=interval) + (" (stale)" if stale(found, now) else "")

    def listed(mark: re.Match[str]) -> str:
        rows = _list(records, now) if mark[2] == "records" else _looks(records.parent / LEDGERS)
        return f"{mark[1]}{rows}{mark[3]}"

    if alone := BEGINS.search(MARKED.sub("", text)):
        raise ConfigError(f"{alone[0]}: no <!-- /record --> behind it")
    return LISTED.sub(listed, MARKED.sub(written, text))


def stale(rows: list[Row], now: Deciding) -> list[str]:
    """The metrics among rows that other code decides now than when they were measured."""
    words = ((row, row["metric"].split("/")[0]) for row in rows)
    return sorted({row["metric"] for row, word in words if row["measured_by"] not in now(word)})


def _deciding_now(records: Path) -> Deciding:
    """The code as it is, read once and hashed once for each word: a page has hundreds of marks."""
    code, told = functools.cache(origins.code_now), unchanged.told(records)

    @functools.cache
    def deciding(word: str) -> set[str]:
        return unchanged.alike(origins.measured_by(word, code()), word, told)

    return deciding


def _words(text: str) -> dict[str, str]:
    parts = (word.partition("=") for word in shlex.split(text))
    return {key: value for key, _, value in parts}


def _found(rows: list[Row], asked: dict[str, str]) -> tuple[list[Row], str]:
    """The rows that conditions name, one or one a seed, and the format to show them in."""
    how = asked.pop("as", ".2f")
    if wrong := [key for key in asked if key not in OF]:
        raise ConfigError(f"{wrong[0]}={asked[wrong[0]]}: no such column; give {', '.join(OF)}, as")
    wanted = {(key, value) for key, value in asked.items() if (key, value) != ("set", ALL)}
    found = [row for row in rows if wanted <= row.items()]
    found = _pooled(found) if asked.get("set") == ALL else found
    # runs of several seeds may have names of their own
    alike = {tuple(row[key] for key in OF if key not in ("name", "seed")) for row in found}
    if len(alike) != 1 or len({row["seed"] for row in found}) != len(found):
        told = " ".join(f"{key}={value}" for key, value in asked.items())
        raise DataError(f"{told}: {len(found) or 'no'} numbers in the record; name other columns")
    return found, how


def _pooled(rows: list[Row]) -> list[Row]:
    """Rates of several sets as those of all their answers, with Wilson's interval."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in OF if key != "set"), []).append(row)
    made: list[Row] = []
    for of in found.values():
        n = sum(int(row["n"]) for row in of)
        over = inference.wilson(round(sum(float(r["value"]) * int(r["n"]) for r in of)), n)
        number = {"value": over.estimate, "low": over.low, "high": over.high, "n": n}
        made.append(of[0] | {"set": ALL, **{key: str(value) for key, value in number.items()}})
    return made


def _shown(rows: list[Row], how: str, ends: bool = False) -> str:
    """A number as a page shows it, the mean of several seeds; with `ends` also its interval."""
    values = [float(row["value"]) for row in rows]
    if how == "count":
        asked = [float(row["n"]) for row in rows]
        count = sum(value * n for value, n in zip(values, asked, strict=True))
        return f"{count:.0f} of {sum(asked):.0f}"
    over = inference.paired_over_seeds(values, [0.0] * len(values))
    low, high = over.low, over.high
    if len(rows) == 1 and rows[0]["low"]:
        low, high = float(rows[0]["low"]), float(rows[0]["high"])
    between = ", " if "+" in how else "–"
    interval = f" [{low:{how}}{between}{high:{how}}]" if ends and math.isfinite(low) else ""
    return f"{over.estimate:{how}}{interval}"


def _table(records: Path, name: str, head: str, lines: list[str], now: Deciding) -> str:
    """A Markdown table with a row for each line, and below it where its numbers come from.

    A line may name another record than the table's.
    """
    common = _words(head)
    key = common.pop("columns", "name")
    columns = [part.partition("=>")[::2] for part in common.pop(key, "").split(",")]
    cells, used = [["", *(label or value for value, label in columns)]], dict[str, list[Row]]()
    for line in lines:
        label, _, words = line.rpartition("|")
        own = _words(words)
        record = own.pop("record", name)
        rows = read(records / f"{record}.csv")
        found = [_found(rows, common | own | {key: value}) for value, _ in columns]
        cells.append([label.strip(), *(_shown(of, how, ends=True) for of, how in found)])
        used.setdefault(record, []).extend(row for of, _ in found for row in of)
    late = sorted({metric for of in used.values() for metric in stale(of, now)})
    told = f" **Stale**: what measures {', '.join(late)} has changed since." if late else ""
    links = ", ".join(f"[{each}]({records.name}/{each}.csv)" for each in used)
    origin = "; ".join(_origin(used[name])) if {*used} == {name} else f"Records: {links}"
    return f"\n{_lines(cells)}\n\n*{origin}.*{told}\n\n"


def _list(records: Path, now: Deciding) -> str:
    """A table of all records, with the metrics of which each is stale."""
    cells = [["record", "made by", "commit", "date", "machine", "numbers", "stale"]]
    for file in sorted(records.glob("*.csv")):
        rows = read(file)
        late = ", ".join(f"`{metric}`" for metric in stale(rows, now))
        link = f"[{file.stem}]({records.name}/{file.name})"
        cells.append([link, *_origin(rows), str(len(rows)), late or "none"])
    return f"\n{_lines(cells)}\n\n" if cells[1:] else ""


def _looks(ledgers: Path) -> str:
    """A table of the looks that each plan led to, and of all looks."""
    cells = [["plan", "looks", "models and gates", "rows asked at most", "first, UTC", "last, UTC"]]
    every: list[counting.Look] = []
    for file in sorted(ledgers.glob(f"*{counting.LEDGER}")):
        name = file.name.removesuffix(counting.LEDGER)
        looks = storage.read_lines(file, counting.Look)
        every += looks
        weights = str(len({look.weights for look in looks}))
        asked, first, last = _extent(looks)
        link = f"[{name}]({ledgers.name}/{name}.yaml)"
        cells.append([link, str(len(looks)), weights, asked, first, last])
    # no number of models: one may stand under several plans, and gates of two plans share a name
    total = ["all", str(len(every)), "", *_extent(every)] if every else []
    return f"\n{_lines([*cells, total])}\n\n" if total else ""


def _extent(looks: Sequence[counting.Look]) -> tuple[str, str, str]:
    """The most rows that a look asked, and when the first and the last look began."""
    times = sorted(look.at[:16].replace("T", " ") for look in looks)
    return str(max(sum(look.sets.values()) for look in looks)), times[0], times[-1]


def _origin(rows: list[Row]) -> list[str]:
    """Command, commit, date and machine of numbers."""
    keys = "command", "commit", "date", "machine"
    command, *rest = (", ".join(dict.fromkeys(row[key] for row in rows)) for key in keys)
    return [f"`{command}`", *rest]


def _lines(cells: list[list[str]]) -> str:
    head, *rest = (f"| {' | '.join(line)} |" for line in cells)
    return "\n".join([head, f"| --- |{' ---: |' * (len(cells[0]) - 1)}", *rest])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
