"""Numbers of run folders, or of a comparison of arms, as the rows of a record."""

import csv
import functools
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import Field
from typing_extensions import TypedDict

from dcr import results
from dcr.core import storage
from dcr.core.config import ConfigError, DataError
from dcr.record import Options, origins

RECORDS = Path("docs/records")
# what tells one number from another, the number, and where it comes from
OF = ("name", "stages", "seed", "step", "data", "edit", "set", "kind", "judge", "metric")
NUMBER = ("value", "low", "high", "n")
FROM = ("prompts", "model", "trained_on", "command", "commit", "machine", "date", "measured_by")
PLACE = re.compile(r"(?:^|[\s='\"\[,:@])(?:~?/\w|[A-Za-z]:\\)")  # of a machine

Row = dict[str, Any]  # of a file all values are text


class Arm(TypedDict):
    """A row of a comparison, see `dcr.frontier`."""

    arm: str
    seed: int
    auroc: float
    answered: float | None
    most: float
    by_set: dict[str, float | None]
    plain: tuple[float, float]
    bias: float | None
    calibrated: tuple[float, float] | None
    outcomes: dict[str, dict[str, float]] | None
    origin: origins.Origin


class Arms(TypedDict):
    verdict: str
    safety: float
    prompts: dict[str, int]
    rows: Annotated[list[Arm], Field(min_length=1)]
    comparisons: list[dict[str, Any]]


def write(options: Options) -> None:
    """Writes the record that the options name. Raises UserError for what cannot be recorded."""
    out = options.out or RECORDS / f"{options.name}.csv"
    if not re.fullmatch(r"[\w.-]+", options.name):
        raise ConfigError(f"name={options.name}: give letters, digits, dots, dashes, underscores")
    if not options.runs:
        raise ConfigError("nothing to record: give run folders, or a .json file of dcr.frontier")
    if out.exists() and not options.replace:
        raise ConfigError(f"{out}: is there; give replace=true to write it anew, or another name")
    only = tuple(f"{words}/" for words in options.only)
    rows = [
        row
        for word in options.runs
        for row in (_of_arms if word.endswith(".json") else _of_run)(Path(word))
        if pd.notna(row["value"]) and (not only or f"{row['metric']}/".startswith(only))
    ]
    if not rows:
        raise DataError(f"{' '.join(options.runs)}: no number there of {' '.join(options.only)}")
    keep(rows, out, " && ".join(options.command), options.commit)


def read(file: Path) -> list[Row]:
    """The rows of a record. DataError if it is absent or damaged."""
    cure = "restore it, or write it with python -m dcr.record"
    rows = list(csv.DictReader(io.StringIO(storage.read_text(file, cure))))
    if not rows or {*OF, *NUMBER, *FROM} - rows[0].keys():
        raise DataError(f"{file}: no record; {cure}")
    return rows


def keep(rows: list[Row], out: Path, command: str, commit: str | None = None) -> None:
    """Writes a record of rows that have columns of `OF`, `NUMBER` and `FROM`, all that apply.

    `date` is when a row was measured, by the commit named or else the last one before. Raises
    DataError for a row that nothing tells from another or that names a place on this machine.
    """
    commit_of, code_at = functools.cache(origins.commit_of), functools.cache(origins.code_at)
    measured_by: dict[tuple[str, str], str] = {}
    for row in rows:
        made_by = commit_of(commit, row["date"])
        key = made_by, row["metric"]
        if key not in measured_by:
            measured_by[key] = origins.measured_by(row["metric"], code_at(made_by))
        row |= {"command": command, "commit": made_by}
        row |= {"date": row["date"][:10], "measured_by": measured_by[key]}
    table = pd.DataFrame(rows, columns=[*OF, *NUMBER, *FROM], dtype=object)  # gaps make floats
    twice = table[table.duplicated(list(OF), keep=False)]
    if len(twice):
        first = twice.iloc[0]
        told = " ".join(f"{key}={first[key]}" for key in OF if pd.notna(first[key]) and first[key])
        raise DataError(f"{told}: two evaluations tell it; record the run with one of them")
    for key in (*OF, *FROM):
        for value in dict.fromkeys(table[key]):
            if isinstance(value, str) and PLACE.search(value):
                raise DataError(f"{key}={value}: names a place on this machine; write <data> there")
    storage.write_text(out, results.csv_text(table))
    print(f"{len(table)} numbers: {out}")


def _of_run(folder: Path) -> Iterator[Row]:
    """Every number of a run's evaluations but times."""
    table = results.load(folder)
    of = {file: origins.of(Path(file).parent) for file in dict.fromkeys(table.file)}
    for number in table.astype(object).to_dict("records"):
        if number["quantity"] in results.TIMES:
            continue
        about = {key: _whole(number.get(key)) for key in (*OF, *NUMBER, "model")}
        about |= {"name": folder.resolve().name, "metric": number["quantity"]}
        yield about | {"value": number["value"]} | _from(of[number["file"]], number["set"])


def _of_arms(file: Path) -> Iterator[Row]:
    """Every number of a comparison of arms, with metrics that begin with `frontier/`."""
    found = storage.read_json(file, Arms, "write it anew with python -m dcr.frontier out=")
    at, sets = f"answered_at/{found['safety']:g}", found["prompts"]
    counted = origins.date_of(file)  # answers may be older
    for arm in found["rows"]:
        origin = replace(arm["origin"], date=counted)
        numbers = [
            ("auroc", "", arm["auroc"]),
            (at, "", arm["answered"]),
            ("most_refused", "", arm["most"]),
        ]
        numbers += [(at, name, value) for name, value in arm["by_set"].items()]
        for bias in ("plain", "calibrated"):
            refused, answered = arm[bias] or (None, None)
            numbers += [(f"{bias}/refused", "", refused), (f"{bias}/answered", "", answered)]
        numbers += [("calibrated/bias", "", arm["bias"])]
        for name, shares in (arm["outcomes"] or {}).items():
            numbers += [(f"outcome/{outcome}", name, share) for outcome, share in shares.items()]
        for metric, of_set, value in numbers:
            about: Row = {"name": arm["arm"], "seed": arm["seed"], "judge": found["verdict"]}
            about["metric"] = f"frontier/{metric}"
            about |= {"set": of_set, "value": value}
            yield about | {"n": sets.get(of_set, sum(sets.values()))} | _from(origin, of_set)
    for each in found["comparisons"]:
        about = {"name": each["arms"], "judge": found["verdict"], "n": sum(sets.values())}
        about |= _from(replace(found["rows"][0]["origin"], trained_on="", date=counted), "")
        at_share = f"frontier/difference/{found['safety']:g}"
        for way in ("over_seeds", "over_prompts"):
            ends = {"low": each[way]["low"], "high": each[way]["high"]}
            yield about | {"metric": f"{at_share}/{way}", "value": each[way]["estimate"]} | ends
        for p in ("p", "p_holm"):
            yield about | {"metric": f"{at_share}/{p}", "value": each[p]}


def _whole(value: Any) -> Any:
    """Turns a whole number into an int, since pandas keeps a column with gaps as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _from(origin: origins.Origin, of_set: str) -> Row:
    """The origin of a number of one set, or of all sets."""
    prompts = origin.prompts.get(of_set, origin.prompts[""])
    return vars(origin) | {"prompts": prompts}
