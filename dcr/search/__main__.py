"""The command of dcr.search: its trials, their front and figures, and the chosen point anew."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dcr import entry, report, search, study
from dcr.core import cli, config, storage
from dcr.core.config import ConfigError, Method, resolving
from dcr.core.text import single_line
from dcr.extensions import TrainSettings
from dcr.search import OBJECTIVES, Search
from dcr.study import StudyError

if TYPE_CHECKING:
    from dcr.search.drawings import EndedTrial

KNEE = "knee"
ENOUGH = 4  # trials that importances are computed from


@dataclass
class Options:
    """python -m dcr.search [trials=20] [workers=1] [any setting of train.py or eval.py]

    Searches layer, margin, scale, epochs, ratio, NLL weight and learning rate of stage one, and
    every setting that is given as a space: dcr.margin=0.1..0.4, dcr.optim.lr=1e-5..1e-3:log,
    dcr.scale=8,16,32; a setting with one value is fixed. Trials are measured on validation prompts
    of another origin than the training rows. The same command goes on after a fault or a kill, and
    joins in where it is started on another machine with the same storage.
    """

    trials: int = entry.option("how many in all, of all workers", 20, least=1)
    workers: int = entry.option("processes of this command, each one trial at a time", 1, least=1)
    objectives: str = entry.option(f"some of {', '.join(OBJECTIVES)}", "auroc,nll,seconds")
    validation: str | None = entry.option(
        "pairs of sets, <seemingly toxic>:<toxic>,...; not given: the first usual pair that is "
        "neither tested on nor of the origin of the training rows",
        None,
    )
    storage: str | None = entry.option(
        "a URL of Optuna; not given: sqlite:///<out>/search.db", None
    )
    chosen: str | None = entry.option(
        f"{KNEE} or a trial: train it anew, evaluate on test sets", None
    )
    seeds: int = entry.option("how many fresh ones the chosen point is trained with", 2, least=1)
    out: Path = entry.option("where storage, runs, figures and page lie", Path("outputs/search"))
    plan: bool = entry.option("say what would be searched, and stop", False)
    settings: list[str] = entry.option(
        "any setting of train.py or eval.py; python train.py --cfg job lists them", [], rest=True
    )


@entry.command(Options, goes_on=True)
def main(options: Options) -> None:
    config.check_installed("optuna", "search", "python -m dcr.search")
    with study.notices_once():
        asked, point = _resolved(options)
        study.in_fork(lambda: study.check_jobs([*asked.corners(), asked.base()]))
        print(*search.words_of(asked.spaces))
        print(f"validation: {', '.join(map(str, asked.validation))}")
        print(f"{single_line(asked.url)}, {asked.name}")
        if options.plan:
            return
        from dcr.report import figures
        from dcr.search import trials
        from dcr.search.drawings import front, importances

        asked.out.mkdir(parents=True, exist_ok=True)
        try:
            shared = trials.carry_out(asked, options.workers, point)
        finally:
            cli.forget_empty(asked.out)  # where the storage cannot be opened
        tried = trials.ended_trials(asked, shared)
        whole = [trial for trial in tried if trial.values]
        if not whole:
            raise StudyError(f"no trial came to its end: {tried[0].fault}")
        chosen = None
        if options.chosen is not None:
            chosen = _chosen(options.chosen, whole, asked)
            tried = [replace(t, chosen=t.number == chosen.number) for t in tried]
        heads = {name: OBJECTIVES[name].words for name in asked.objectives}
        enough, drawings = len(whole) >= ENOUGH, [front(tried, heads)]
        shares = trials.importances(shared, asked.objectives) if enough else {}
        drawings += [importances(shares)] if shares else []
        absent = ", ".join(words for words in heads.values() if words not in shares)
        why = "the same in every trial" if enough else f"{len(whole)} of {ENOUGH} trials ended"
        notes = [f"no importances for {absent}: {why}"] if absent else []
        for drawing in drawings:
            for ending, content in figures.files(drawing).items():
                storage.write_bytes(asked.out / f"{drawing.name}.{ending}", content)
        files = [f"{asked.out / drawing.name}.png" for drawing in drawings]
        print(_summary(asked, tried), *notes, *files, sep="\n")
        if chosen is not None:
            with storage.locked(asked.out / "chosen"):
                print(_retrained(asked, chosen, options.seeds, len(whole), notes))


def _resolved(options: Options) -> tuple[Search, dict[str, object]]:
    """The search that the options ask for, checked, and its point as configured."""
    given, fixed = search.parsed(options.settings)
    training, evaluating = study.split_settings(fixed)
    if options.chosen not in (None, KNEE) and not str(options.chosen).isdecimal():
        raise ConfigError(f"chosen={options.chosen}: give {KNEE} or the number of a trial")
    for key in given:
        if not study.split_settings([f"{key}=0"])[0]:
            raise ConfigError(f"{key}: no setting of train.py, which alone are searched")
    url = options.storage or f"sqlite:///{options.out / 'search.db'}"
    if "://" not in url or url in ("sqlite://", "sqlite:///:memory:"):
        raise ConfigError(
            f"storage={single_line(url)}: give a URL of a database that processes can share, such "
            "as sqlite:///search.db"
        )
    settings = resolving.resolve(cli.compose("train", training, Options), TrainSettings)
    if settings.method is not Method.dcr:
        raise ConfigError(f"method={settings.method.value}: only dcr has a stage one to search")
    objectives, fixed_keys = options.objectives.split(","), {w.partition("=")[0] for w in training}
    usual, _ = search.parsed(search.usual(settings))
    spaces = {key: space for key, space in usual.items() if key not in fixed_keys} | given
    search.check_search(settings, spaces, objectives)
    asked = Search(
        options.out, url, spaces, tuple(objectives), settings, tuple(training), tuple(evaluating),
        tuple(search.validation_of(settings, options.validation)), options.trials,
    )  # fmt: skip
    return asked, search.configured(settings, spaces)


# --- front and choice ---------------------------------------------------------------------------


def knee(points: Sequence[Sequence[float]], maximised: Sequence[bool]) -> int:
    """The place of the point of a front that is nearest to the best value of every objective.

    Each objective is scaled to 0 to 1 over the front; of equals the first is taken.
    """
    losses = np.where(maximised, -1, 1) * np.array(points)
    lacks, spread = losses - losses.min(0), np.ptp(losses, 0)
    return int(np.linalg.norm(lacks / np.where(spread, spread, 1), axis=1).argmin())


def _chosen(choice: str, whole: "Sequence[EndedTrial]", asked: Search) -> "EndedTrial":
    if choice == KNEE:
        front = [trial for trial in whole if trial.front]
        up = [OBJECTIVES[name].maximised for name in asked.objectives]
        return front[knee([trial.values for trial in front], up)]
    for trial in whole:
        if trial.number == int(choice):
            return trial
    numbers = ", ".join(str(trial.number) for trial in whole)
    raise ConfigError(f"chosen={choice}: no trial that came to its end; choose from {numbers}")


def _summary(asked: Search, tried: "Sequence[EndedTrial]") -> str:
    """The front, the configured and the chosen trial as a table, and how the trials ended."""
    heads = ["trial", "settings", *asked.objectives]
    table = entry.table("Pareto front, validation prompts", heads, names=2)
    for trial in tried:
        marks = [mark for mark in ("configured", "chosen") if getattr(trial, mark)]
        if trial.values and (marks or trial.front):
            marks += [] if trial.front else ["not on it"]
            settings = " ".join(search.words_of(trial.settings, short=True))
            named = f"{trial.number} {', '.join(marks)}".strip()
            table.add_row(named, settings, *(f"{value:.4g}" for value in trial.values))
    counts = Counter(trial.ended for trial in tried)
    ends = ", ".join(f"{count} {ended}" for ended, count in counts.items())
    faults = {trial.fault for trial in tried if trial.fault}
    return entry.plain_text(table, f"trials: {ends}", *(f"failed: {fault}" for fault in faults))


def _retrained(
    asked: Search, chosen: "EndedTrial", seeds: int, number: int, notes: Sequence[str]
) -> str:
    """Train the chosen point and the configured one with fresh seeds; one page on the test sets."""
    words, first = search.words_of(chosen.settings), asked.settings.seed + 1
    jobs = [asked.base()]
    for seed in range(first, first + seeds):
        for name, more in (("as configured", []), (f"trial {chosen.number}", words)):
            jobs.append(asked.final(f"{name}, seed {seed}", [*more, f"seed={seed}"]))
    by_folder = {job.run.folder: job for job in jobs}
    study.do_all([part for job in by_folder.values() for part in job.parts()])
    validation = ", ".join(map(str, asked.validation))
    note = (
        f"trial {chosen.number}, {' '.join(words)}: chosen from {number} that came to their end, "
        f"on {validation} with seed {first - 1}, trained anew with others"
    )
    page = asked.out / "search.html"
    text = report.build(list(by_folder), page, ["discernment"], notes=[note, *notes])
    return f"\n{text}\n\npage: {page}\npython train.py {' '.join([*asked.training, *words])}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
