"""The command that says of changed code that it measures what it measured before.

A record names the code that decided its numbers by a hash. Where that code is mended without moving
a recorded number, training and answering everything again would show nothing. So numbers are
counted again by the code as it is, from answers that were kept, and if all of them are as recorded,
a line in docs/records/unchanged.jsonl says that both hashes measure the same.
"""

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dcr import entry
from dcr.core import storage
from dcr.core.config import ConfigError, DataError
from dcr.record.writing import NUMBER, OF, RECORDS, read

FILE = "unchanged.jsonl"
# Metrics that their command counts from answers, each time it is given. Other numbers of a run
# stand in its metrics.json: reading them again would show nothing about the code that counted them.
COUNTED = ("frontier", "gates", "agreement", "balance")


@dataclass(frozen=True)
class Unchanged:
    """Two hashes of the code that decides a metric, by its first word, and what shows them alike.

    `numbers` of the record were counted again by the later code and are the same.
    """

    metric: str
    was: str
    now: str
    record: str
    numbers: int
    because: str


@dataclass
class Options:
    """python -m dcr.record.unchanged <record counted again> ... because=<text>

    Compares each file with the record of its name in docs/records, both written from what
    dcr.frontier or a benchmark counted from answers, and says in docs/records/unchanged.jsonl that
    the code which counted the one measures what that of the other does. It says nothing if a
    single number differs.
    """

    because: str = entry.option("what was changed, and why it moves no number")
    records: Path = entry.option("the folder of the records", RECORDS)
    files: list[str] = entry.option("records counted again: .csv files", [], rest=True)


@entry.command(Options)
def main(options: Options) -> None:
    if not options.files:
        raise ConfigError("nothing to compare: give records that were counted again")
    found = list[Unchanged]()
    for word in options.files:
        found += compared(Path(word), options.records, options.because)
    if not found:
        raise ConfigError("no number there is of code that has changed since")
    before = told(options.records)
    known = [replace(each, because=options.because) for each in before]
    if new := [each for each in found if each not in known]:
        lines = [json.dumps(asdict(each), ensure_ascii=False) for each in [*before, *new]]
        storage.write_text(options.records / FILE, "\n".join([*lines, ""]))
    for each in found:
        already = "" if each in new else ", which is recorded already"
        print(f"{each.metric}: {each.numbers} numbers of {each.record} are as they were{already}")


def told(records: Path) -> list[Unchanged]:
    """The lines that were written so far beside records."""
    return storage.read_lines(records / FILE, Unchanged)


def compared(again: Path, records: Path, because: str) -> list[Unchanged]:
    """Compares a record that was counted again with the one of its name.

    Raises DataError for a number that is another one than recorded, and for one that was not
    counted again; others, which the record never had, do not matter.
    """
    known, anew = ({_of(row): row for row in read(file)} for file in (records / again.name, again))
    changed = {
        (row["metric"].split("/")[0], known[of]["measured_by"], row["measured_by"])
        for of, row in anew.items()
        if of in known and known[of]["measured_by"] != row["measured_by"]
    }
    words, counts = {word for word, _, _ in changed}, Counter[str]()
    if read_only := sorted(words - {*COUNTED}):
        raise DataError(
            f"{again}: {', '.join(read_only)}: stands in metrics.json, and was not counted again; "
            "evaluate and record anew, with replace=true"
        )
    for of, row in sorted(known.items()):
        if (word := of[-1].split("/")[0]) in words:
            counts[word] += 1
            was, now = _number(row), _number(anew.get(of))
            if was != now:
                raise DataError(
                    f"{again}: {' '.join(filter(None, of))}: {now or 'none'}, and {was} in the "
                    "record; what the change decides has to be recorded anew, with replace=true"
                )
    return [Unchanged(*each, again.stem, counts[each[0]], because) for each in sorted(changed)]


def _of(row: dict[str, str]) -> tuple[str, ...]:
    """The cells that tell a number from another; the metric comes last."""
    return tuple(row[key] for key in OF)


def _number(row: dict[str, str] | None) -> str:
    """A number with its interval, n and the hash of what was asked."""
    return " ".join(row[key] for key in (*NUMBER, "prompts") if row[key]) if row else ""


def alike(measured_by: str, word: str, said: list[Unchanged]) -> set[str]:
    """All hashes of a metric's code that measure what one of them does, with itself."""
    found, pairs = {measured_by}, [{each.was, each.now} for each in said if each.metric == word]
    while more := {end for pair in pairs if pair & found for end in pair} - found:
        found |= more
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
