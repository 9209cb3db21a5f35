"""The command of dcr.search: its trials, and their front as a table and a file."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from dcr import cli, entry, resolving, search, study
from dcr.core import config, storage
from dcr.core.config import ConfigError, Method
from dcr.extensions import TrainSettings
from dcr.search import OBJECTIVES, Search
from dcr.study import StudyError

if TYPE_CHECKING:
    import pandas as pd

ENOUGH = 4  # trials that importances are computed from


@dataclass
class Options:
    """python -m dcr.search [trials=20] [workers=1] [any setting of train.py or eval.py]

    Searches layer, margin, scale, epochs, ratio, NLL weight and learning rate of stage one, and
    every setting that is given as a space: dcr.margin=0.1..0.4, dcr.optim.lr=1e-5..1e-3:log,
    dcr.scale=8,16,32; a setting with one value is fixed. Trials are measured on validation prompts
    of another origin than the training rows. The same command continues after a fault or a
    kill.
    """

    trials: int = entry.option("trials of all workers together", 20, least=1)
    workers: int = entry.option("processes, each one trial at a time", 1, least=1)
    objectives: str = entry.option(f"some of {', '.join(OBJECTIVES)}", "auroc,nll,seconds")
    validation: str | None = entry.option(
        "pairs of sets, <seemingly toxic>:<toxic>,...; not given: the first usual pair that is "
        "neither tested on nor of the origin of the training rows",
        None,
    )
    out: Path = entry.option("where journal, runs and trials.csv lie", Path("outputs/search"))
    plan: bool = entry.option("say what would be searched, and stop", False)
    settings: list[str] = entry.settings_of("train.py or eval.py")


@entry.command(Options, goes_on=True)
def main(options: Options) -> None:
    config.check_installed("optuna", "search", "python -m dcr.search")
    with study.notices_once():
        asked, point = _resolved(options)
        study.in_fork(lambda: study.check_jobs(asked.corners()))
        print(*search.words_of(asked.spaces))
        print(f"validation: {', '.join(map(str, asked.validation))}")
        if outside := [key for key in asked.spaces if key not in point]:
            print(f"not tried as configured: {', '.join(outside)} outside of what is searched")
        if options.plan:
            return
        from dcr.search import trials

        with storage.locked(asked.out):
            shared = trials.carry_out(asked, options.workers, point)
    tried = trials.table(asked, shared)
    whole = tried[tried["ended"] == "complete"]
    if not len(whole):
        raise StudyError(f"no trial came to its end: {tried['fault'].iloc[0]}")
    file = asked.out / "trials.csv"
    from dcr import results  # with pandas, which help and a user's error need not wait for

    storage.write_text(file, results.csv_text(tried))
    explained = trials.importances(shared, asked.objectives) if len(whole) >= ENOUGH else {}
    print(_summary(asked, tried, explained), file, sep="\n")


def _resolved(options: Options) -> tuple[Search, dict[str, object]]:
    """The search that the options ask for, checked, and its point as configured."""
    given, fixed = search.parsed(options.settings)
    training, evaluating = study.split_settings(fixed)
    for key in given:
        if not study.split_settings([f"{key}=0"])[0]:
            raise ConfigError(f"{key}: no setting of train.py, which alone are searched")
    settings = resolving.resolve(cli.compose("train", training, Options), TrainSettings)
    resolving.check_extras(settings)  # before each trial fails by it
    if settings.method is not Method.dcr:
        raise ConfigError(f"method={settings.method.value}: only dcr has a stage one to search")
    objectives, fixed_keys = options.objectives.split(","), {w.partition("=")[0] for w in training}
    usual, _ = search.parsed(search.usual(settings))
    spaces = {key: space for key, space in usual.items() if key not in fixed_keys} | given
    search.check_search(settings, spaces, objectives)
    asked = Search(
        options.out, spaces, tuple(objectives), settings, tuple(training), tuple(evaluating),
        tuple(search.validation_of(settings, options.validation)), options.trials,
    )  # fmt: skip
    return asked, search.configured(settings, spaces)


def _summary(
    asked: Search, tried: "pd.DataFrame", explained: Mapping[str, Mapping[str, float]]
) -> str:
    """The front and the configured trial, the importance of settings, and how trials ended."""
    heads = ["trial", "settings", *asked.objectives]
    tables = [entry.table("Pareto front, validation prompts", heads, names=2)]
    shown = tried[tried["front"] | (tried["configured"] & tried["fault"].eq(""))]
    rows: list[dict[str, Any]] = shown.to_dict("records")  # pyright: ignore[reportCallIssue]
    for row in rows:
        marks = [] if row["front"] else ["not on it"]
        marks = ["configured", *marks] if row["configured"] else marks
        words = " ".join(search.words_of({key: row[key] for key in asked.spaces}, short=True))
        values = (f"{row[name]:.4g}" for name in asked.objectives)
        tables[0].add_row(f"{row['trial']} {', '.join(marks)}".strip(), words, *values)
    if explained:
        tables.append(_importances(explained, list(asked.spaces)))
    absent = [name for name in asked.objectives if name not in explained]
    notes = [f"no importances for {', '.join(absent)}"] if absent else []
    ends = ", ".join(f"{count} {ended}" for ended, count in Counter(tried["ended"]).items())
    faults = {fault for fault in tried["fault"] if fault}
    return entry.plain_text(
        *tables, f"trials: {ends}", *notes, *(f"failed: {fault}" for fault in faults)
    )


def _importances(explained: Mapping[str, Mapping[str, float]], keys: Sequence[str]) -> Table:
    table = entry.table("Share of variance that a setting explains (fANOVA)", ["", *explained])
    for key in keys:
        table.add_row(key, *(f"{shares.get(key, 0):.2f}" for shares in explained.values()))
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
