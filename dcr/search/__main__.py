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
from dcr.core.config import ConfigError, Method, TrainConfig
from dcr.core.text import single_line
from dcr.search import OBJECTIVES, Search
from dcr.study import Told

if TYPE_CHECKING:
    from dcr.report.searches import Tried

KNEE = "knee"
ENOUGH = 4  # trials that importances are computed from


@dataclass
class Options:
    """python -m dcr.search [trials=20] [workers=1] [any setting of train.py or eval.py]

    Searches layer, margin, scale, epochs, ratio, NLL weight and learning rate of stage one, and
    what is given as a space: dcr.margin=0.1..0.4, dcr.optim.lr=1e-5..1e-3:log, dcr.scale=8,16,32;
    a setting with one value is fixed. Trials are measured on validation prompts of another origin
    than the training rows. What is done is found: the same command goes on after
    a fault or a kill, and joins in where it is started on another machine with the same storage.
    """

    trials: int = entry.option("how many in all, of all workers", 20, least=1)
    workers: int = entry.option("processes of this command, each one trial at a time", 1, least=1)
    objectives: str = entry.option(f"some of {', '.join(OBJECTIVES)}", "auroc,nll,seconds")
    validation: str | None = entry.option(
        "pairs of sets, <seemingly toxic>:<toxic>,...; not given: the first usual pair that is "
        "neither tested on nor of the origin of what is trained on",
        None,
    )
    storage: str | None = entry.option(
        "an URL of Optuna; not given: sqlite:///<out>/search.db", None
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
    with study.told_once():
        asked, point = _asked(options)
        study.in_fork(lambda: study.check([*asked.corners(), asked.base()]))
        validation, spaces = ", ".join(map(str, asked.validation)), search.words_of(asked.spaces)
        print(
            f"{' '.join(spaces)}\nvalidation: {validation}\n{single_line(asked.url)}, {asked.name}"
        )
        if options.plan:
            return
        from dcr.report import figures, searches
        from dcr.search import trials

        asked.out.mkdir(parents=True, exist_ok=True)
        try:
            known = trials.carry_out(asked, options.workers, point)
        finally:
            cli.forget_empty(asked.out)  # where the storage cannot be opened
        tried = trials.tried(asked, known)
        if not any(trial.values for trial in tried):
            raise Told(f"no trial came to its end: {tried[0].fault or tried[0].ended}", 1)
        chosen = None if options.chosen is None else _chosen(options.chosen, tried, asked)
        tried = [replace(t, is_of=t.is_of | {"chosen"}) if t is chosen else t for t in tried]
        heads = {name: OBJECTIVES[name].words for name in asked.objectives}
        drawings, whole = [searches.front(tried, heads)], sum(bool(t.values) for t in tried)
        shares = trials.importances(known, asked.objectives) if whole >= ENOUGH else {}
        drawings += [searches.importances(shares)] if shares else []
        absent = ", ".join(words for words in heads.values() if words not in shares)
        why = "the same in every trial" if whole >= ENOUGH else f"{whole} of {ENOUGH} trials ended"
        notes = [f"no importances for {absent}: {why}"] if absent else []
        for drawing in drawings:
            for ending, content in figures.files(drawing).items():
                storage.write_bytes(asked.out / f"{drawing.name}.{ending}", content)
        files = [f"{asked.out / drawing.name}.png" for drawing in drawings]
        print(_told(asked, tried), *notes, *files, sep="\n")
        if chosen is not None:
            with storage.locked(asked.out / "chosen"):
                print(_anew(asked, chosen, options.seeds, whole, notes))


def _asked(options: Options) -> tuple[Search, dict[str, object]]:
    """What is searched, checked, and the point that the settings are."""
    given, fixed = search.parsed(options.settings)
    training, evaluating = study.sorted_words(fixed)
    if options.chosen not in (None, KNEE) and not str(options.chosen).isdecimal():
        raise ConfigError(f"chosen={options.chosen}: give {KNEE} or the number of a trial")
    for key in given:
        if not study.sorted_words([f"{key}=0"])[0]:
            raise ConfigError(f"{key}: no setting of train.py, which alone are searched")
    url = options.storage or f"sqlite:///{options.out / 'search.db'}"
    if "://" not in url or url in ("sqlite://", "sqlite:///:memory:"):
        raise ConfigError(
            f"storage={single_line(url)}: give an URL of what processes can share, such as "
            "sqlite:///search.db"
        )
    settings = config.resolve(cli.compose("train", training, Options), TrainConfig)
    if settings.method is not Method.dcr:
        raise ConfigError(f"method={settings.method.value}: only dcr has a stage one to search")
    named, fixed_keys = options.objectives.split(","), {w.partition("=")[0] for w in training}
    usual, _ = search.parsed(search.usual(settings))
    spaces = {key: space for key, space in usual.items() if key not in fixed_keys} | given
    search.check(settings, spaces, named)
    asked = Search(
        options.out, url, spaces, tuple(named), settings, tuple(training), tuple(evaluating),
        tuple(search.validation_of(settings, options.validation)), options.trials,
    )  # fmt: skip
    return asked, search.configured(settings, spaces)


# --- front and choice ---------------------------------------------------------------------------


def knee(points: Sequence[Sequence[float]], maximised: Sequence[bool]) -> int:
    """Where on a front, each objective scaled to 0 to 1 over it, the best of all is nearest.

    The first of equals.
    """
    losses = np.where(maximised, -1, 1) * np.array(points)
    lacks, spread = losses - losses.min(0), np.ptp(losses, 0)
    return int(np.linalg.norm(lacks / np.where(spread, spread, 1), axis=1).argmin())


def _chosen(choice: str, tried: "Sequence[Tried]", asked: Search) -> "Tried":
    whole = [trial for trial in tried if trial.values]
    if choice == KNEE:
        front = [trial for trial in whole if "front" in trial.is_of]
        up = [OBJECTIVES[name].maximised for name in asked.objectives]
        return front[knee([trial.values for trial in front], up)]
    for trial in whole:
        if trial.number == int(choice):
            return trial
    numbers = ", ".join(str(trial.number) for trial in whole)
    raise ConfigError(f"chosen={choice}: no trial that came to its end; choose from {numbers}")


def _told(asked: Search, tried: "Sequence[Tried]") -> str:
    """The front and what stands beside it as a table, and how the trials ended."""
    heads = ["trial", "settings", *asked.objectives]
    table = entry.table("Pareto front, validation prompts", heads, names=2)
    for trial in tried:
        if trial.is_of and trial.values:
            marks = [mark for mark in ("configured", "chosen") if mark in trial.is_of]
            marks += [] if "front" in trial.is_of else ["not on it"]
            settings = " ".join(search.words_of(trial.settings, short=True))
            named = f"{trial.number} {', '.join(marks)}".strip()
            table.add_row(named, settings, *(f"{value:.4g}" for value in trial.values))
    counts = Counter(trial.ended for trial in tried)
    ends = ", ".join(f"{count} {ended}" for ended, count in counts.items())
    faults = {trial.fault for trial in tried if trial.fault}
    return entry.plain_text(table, f"trials: {ends}", *(f"failed: {fault}" for fault in faults))


def _anew(asked: Search, chosen: "Tried", seeds: int, whole: int, notes: Sequence[str] = ()) -> str:
    """The chosen point and the settings as they are with fresh seeds, on test sets: one page."""
    from dcr.report import discernment

    words, first = search.words_of(chosen.settings), asked.settings.seed + 1
    jobs = [asked.base()]
    for seed in range(first, first + seeds):
        for name, more in (("as configured", []), (f"trial {chosen.number}", words)):
            jobs.append(asked.final(f"{name}, seed {seed}", [*more, f"seed={seed}"]))
    by_folder = {job.run.folder: job for job in jobs}
    parts = [part for job in by_folder.values() for part in job.parts()]
    study.all_done(parts)
    note = (
        f"trial {chosen.number}, {' '.join(words)}: chosen from {whole} that came to their end, on "
        f"{', '.join(map(str, asked.validation))} with seed {first - 1}, trained anew with others"
    )
    page = asked.out / "search.html"
    text = report.build(list(by_folder), page, [discernment.NAME], notes=[note, *notes])
    return f"\n{text}\n\npage: {page}\npython train.py {' '.join([*asked.training, *words])}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
