"""The command of dcr.search: its trials, and their front as a table and a file."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcr import cli, entry, resolving, search, study
from dcr.core import config, data, storage
from dcr.core.config import ConfigError, Method
from dcr.extensions import TrainSettings
from dcr.search import OBJECTIVES, Search
from dcr.study import StudyError


@dataclass
class Options:
    """python -m dcr.search [trials=20] [workers=1] [any setting of train.py or eval.py]

    Searches layer, margin, scale, epochs, ratio, NLL weight and learning rate of stage one, and
    every setting that is given as a space: dcr.margin=0.1..0.4, dcr.optim.lr=1e-5..1e-3:log,
    dcr.scale=8,16,32; a setting with one value is fixed. Trials are measured on validation prompts
    of another origin than the training rows. The same command continues after a fault or kill.
    """

    trials: int = entry.option("trials of all workers together", 20, least=1)
    workers: int = entry.option("processes, each one trial at a time", 1, least=1)
    objectives: str = entry.option(f"some of {', '.join(OBJECTIVES)}", "auroc,nll,seconds")
    validation: str | None = entry.option(
        "<seemingly toxic>:<toxic>; not given: the first usual pair that is neither tested on nor "
        "of the origin of the training rows",
        None,
    )
    out: Path = entry.option("where journal, runs and trials.csv lie", Path("outputs/search"))
    plan: bool = entry.option("say what would be searched, and stop", False)
    settings: list[str] = entry.settings_of("train.py or eval.py")


@entry.command(Options, goes_on=True)
def main(options: Options) -> None:
    config.check_installed("optuna", "search", "python -m dcr.search")
    with study.notices_once():
        asked = resolved(options)
        study.in_fork(lambda: study.check_jobs(asked.corners()))
        print(*(f"{key}={space.written}" for key, space in asked.spaces.items()))
        print(f"validation: {asked.validation}")
        if outside := [key for key in asked.spaces if key not in asked.configured]:
            print(f"not tried as configured: {', '.join(outside)} outside of what is searched")
        if options.plan:
            return
        with storage.locked(asked.out):
            tried = search.carry_out(asked, options.workers)
    if all(row["fault"] for row in tried):
        raise StudyError(f"no trial came to its end: {tried[0]['fault']}")
    import pandas as pd  # here, since help and a user's error need not wait for it

    from dcr import results

    file = asked.out / "trials.csv"
    storage.write_text(file, results.csv_text(pd.DataFrame(tried)))
    print(_summary(asked, tried), file, sep="\n")


def resolved(options: Options) -> Search:
    """The search that the options ask for. Raises UserError for a fault in them."""
    given, fixed = search.parsed(options.settings)
    training, evaluating = study.split_settings(fixed)
    for key in given:
        if key.split(".")[0] in search.FIXED or not study.split_settings([f"{key}=0"])[0]:
            raise ConfigError(f"{key}: not searched, since it decides no weights or is the seed")
    settings = resolving.resolve(cli.compose("train", training, Options), TrainSettings)
    resolving.check_extras(settings)  # before each trial fails by it
    if settings.method is not Method.dcr:
        raise ConfigError(f"method={settings.method.value}: only dcr has a stage one to search")
    spaces, _ = search.parsed([*search.usual(settings), *options.settings])
    if not spaces:
        raise ConfigError("nothing to search: every setting has one value; leave one out")
    objectives = options.objectives.split(",")
    if len({*objectives} & {*OBJECTIVES}) < len(objectives):
        known = ", ".join(OBJECTIVES)
        raise ConfigError(f"objectives={options.objectives}: choose from {known}, each once")
    if "nll" in objectives and not data.rows_of(settings).normal_heldout:
        fault = f"objectives=nll: data.validation={settings.data.validation} holds out no row"
        raise ConfigError(f"{fault}; raise it, lower data.normal.count, or leave nll out")
    validation = search.validation_of(settings, options.validation)
    return Search(
        options.out, spaces, tuple(objectives), settings, tuple(training), tuple(evaluating),
        validation, options.trials,
    )  # fmt: skip


def _summary(asked: Search, tried: Sequence[Mapping[str, Any]]) -> str:
    """The front and the configured trial, and how many trials ended in which way."""
    heads = ["trial", "settings", *asked.objectives]
    front = entry.table("Pareto front, validation prompts", heads, names=2)
    for row in tried:
        if row["front"] or (row["configured"] and not row["fault"]):
            marks = ["configured"] * row["configured"] + ["not on it"] * (not row["front"])
            point = search.shown({key: row[key] for key in asked.spaces})
            values = (f"{row[name]:.4g}" for name in asked.objectives)
            front.add_row(f"{row['trial']} {', '.join(marks)}".strip(), point, *values)
    counts = Counter(row["ended"] for row in tried)
    ends = ", ".join(f"{count} {ended}" for ended, count in counts.items())
    faults = dict.fromkeys(row["fault"] for row in tried if row["fault"])
    return entry.plain_text(front, f"trials: {ends}", *(f"failed: {fault}" for fault in faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
