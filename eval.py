"""Evaluate: a run, a model or an endpoint -> completions, verdicts, metrics.

python eval.py run=outputs/<folder> tasks=[over_refusal,safety,ability]
python eval.py model=smollm2_135m data=paper data.root=<data> limit=100
python eval.py endpoint=http://127.0.0.1:8000/v1 endpoint_model=<name> tasks=[over_refusal]
"""

import functools
import itertools
import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import MISSING, DictConfig, OmegaConf

from dcr import (
    benchmarks,
    cli,
    config,
    contamination,
    dashboard,
    data,
    endpoints,
    judges,
    runs,
    subjects,
)
from dcr.benchmarks import Benchmark, ability, quality
from dcr.config import ConfigError, DataError, EvalConfig, Judge, Kind, Task
from dcr.generation import Completion
from dcr.judges import Verdict
from dcr.models import Policy
from dcr.runs import Run
from dcr.subjects import Subject

log = logging.getLogger(__name__)

Answers = dict[str, list[Completion]]
Verdicts = dict[Judge, dict[str, list[Verdict]]]
# What the prompts of over-refusal and safety are counted into.
SCORES = ("sets", "discernment", "agreement", "usage", "contamination")


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
@cli.job
def main(composed: DictConfig) -> None:
    run = _run_of(composed)
    evaluate(config.resolve(_completed(composed, run), EvalConfig), run)


def _run_of(composed: DictConfig) -> Run:
    """The folder to evaluate: the user's run, or one for a model or endpoint without a run."""
    if composed.endpoint is not None:
        _refuse_two_subjects(composed)
    if composed.run is not None:
        if not OmegaConf.is_missing(composed.model, "name"):
            raise ConfigError(
                f"run={composed.run} model={composed.model.name}: a run brings its own model; "
                "give one of the two"
            )
        run = Run(Path(str(composed.run)))
        run.config()  # names a folder without a run before anything else does
        return run
    if composed.endpoint is None and OmegaConf.is_missing(composed.model, "name"):
        raise ConfigError("nothing to evaluate: give run=<folder>, model=<name> or endpoint=<url>")
    return Run(Path(str(composed.output)))


def _refuse_two_subjects(composed: DictConfig) -> None:
    for key, named in (
        ("run", composed.run),
        ("model", None if OmegaConf.is_missing(composed.model, "name") else composed.model.name),
    ):
        if named is not None:
            raise ConfigError(
                f"endpoint={composed.endpoint} {key}={named}: two things to evaluate; give one"
            )


def _completed(composed: DictConfig, run: Run) -> DictConfig:
    """The user's settings, with model and data of the run where they are not named."""
    merged = OmegaConf.create(OmegaConf.to_container(composed, resolve=False))
    assert isinstance(merged, DictConfig)
    made_with: dict[str, Any] = run.config() if composed.run is not None else {}
    if made_with:
        merged.model = made_with["model"]
    if composed.endpoint is not None and composed.endpoint_model is not None:
        named = str(composed.endpoint_model)
        merged.model.name, merged.model.label = named, config.label_of(named)
    if OmegaConf.is_missing(composed.data, "label"):
        base = made_with.get("data") or OmegaConf.load(_demo_data())
        merged.data = OmegaConf.merge(base, _named(composed.data))
    return merged


def _demo_data() -> Path:
    return Path(__file__).parent / "conf" / "data" / "demo.yaml"


def _named(node: DictConfig) -> dict[str, Any]:
    """What a user set in a node that no file filled: everything unlike the schema's default."""
    default = OmegaConf.to_container(OmegaConf.structured(config.DataConfig), resolve=False)
    given = OmegaConf.to_container(node, resolve=False)
    assert isinstance(default, dict)
    assert isinstance(given, dict)
    return {
        str(key): value
        for key, value in given.items()
        if value != default.get(key) and value != MISSING
    }


def evaluate(settings: EvalConfig, run: Run) -> None:
    """Answer what is unanswered, judge what is unjudged, count, and write `metrics.json`."""
    found = subjects.subjects(settings, run)
    sets = _sets(settings)
    _check(settings, run)
    if settings.trainer.threads:
        torch.set_num_threads(settings.trainer.threads)
    with runs.locked(run):
        if settings.run is None:
            method = "endpoint" if settings.endpoint else "base"
            made = {"method": method, "seed": settings.seed, "preset_name": "-"}
            whole = made | {"model": cli.plain(settings.model), "data": cli.plain(settings.data)}
            runs.claim(run, whole, force=True)
        tags = [run.config()["method"], settings.model.label]
        with dashboard.opened(settings.wandb, run, "eval", tags, None) as shown:
            for subject in found:
                metrics, answers = _evaluate_one(settings, run, subject, sets)
                dashboard.show(shown, metrics, answers)


def _sets(settings: EvalConfig) -> list[Benchmark]:
    """The prompts of every task that has a model answer prompts."""
    found = benchmarks.read(settings.tasks, settings.data, settings.limit, settings.seed)
    if Task.quality in settings.tasks:
        source = settings.quality.source
        found.append(
            benchmarks.read_set(
                source, Kind.normal, settings.data.root, settings.limit, settings.seed
            )
        )
    return found


def _check(settings: EvalConfig, run: Run) -> None:
    """Raises a UserError for all that can be known wrong before a model is loaded."""
    judges.check(settings.judge, settings)
    if settings.endpoint is not None:
        endpoints.check(subjects.server_of(settings), "endpoint")
    if Task.ability in settings.tasks:
        ability.check(settings.ability, settings.data.root)
    if Task.quality in settings.tasks:
        quality.check(settings)


def _evaluate_one(
    settings: EvalConfig, run: Run, subject: Subject, sets: list[Benchmark]
) -> tuple[dict[str, Any], Answers]:
    """What `metrics.json` of one subject now says, and its answers."""
    folder = subjects.answers_folder(settings, run, subject)
    began = time.perf_counter()
    policy = functools.cache(functools.partial(subjects.opened, settings, subject))
    answers = _answers(settings, subject, sets, folder, policy)
    found: dict[str, Any] = {}
    if Task.ability in settings.tasks:
        found["ability"] = _kept(folder, {}).get("ability", {}) | ability.ability(
            policy(),
            settings.ability,
            settings.data.root,
            folder,
            settings.seed,
            settings.trainer.progress,
        )
    policy.cache_clear()  # before a guard of eight billion parameters needs the room
    if Task.quality in settings.tasks:
        found["quality"] = _quality(settings, run, answers, folder)
    asked = [b for b in sets if b.kind is not Kind.normal]
    if asked:
        found |= _scores(settings, run, asked, answers, folder)
    origin = _origin(settings, run, subject)
    metrics = origin | _kept(folder, origin["settings"]) | found
    metrics["seconds"] = round(time.perf_counter() - began, 1)
    metrics["peak_memory_gib"] = round(runs.peak_memory_gib(), 2)
    runs.write_json(folder / "metrics.json", metrics)
    print(f"{subject.weights}: {folder}")
    return metrics, answers


def _answers(
    settings: EvalConfig,
    subject: Subject,
    sets: list[Benchmark],
    folder: Path,
    policy: Callable[[], Policy],
) -> Answers:
    asked = functools.partial(subjects.answer, settings, subject, policy)
    return benchmarks.complete(sets, asked, folder, settings.trainer.progress)


def _scores(
    settings: EvalConfig, run: Run, sets: list[Benchmark], answers: Answers, folder: Path
) -> dict[str, Any]:
    """Counts by keywords and by every judge asked, agreement, discernment, contamination."""
    verdicts = {
        name: judges.judge(
            name,
            settings,
            {b.name: answers[b.name] for b in sets if b.kind in judges.KINDS[name]},
            folder,
            settings.trainer.progress,
        )
        for name in settings.judge
        if name is not Judge.keyword
    }
    record = run.record()
    metrics = benchmarks.score(
        sets,
        answers,
        record.get("in_distribution", []),
        record.get("unseen_groups", []),
        settings.seed,
    )
    for name, by_set in verdicts.items():
        for set_name, rows in by_set.items():
            counted = judges.counts(rows, judges.model_of(name, settings), name)
            metrics["sets"][set_name].setdefault("judged", {})[name.value] = counted
    return metrics | {
        "agreement": _agreement(sets, answers, verdicts),
        "usage": {
            name.value: judges.usage(
                itertools.chain(*by_set.values()), judges.server_of(name, settings)
            )
            for name, by_set in verdicts.items()
        },
        "contamination": _contamination(run, sets),
    }


def _quality(settings: EvalConfig, run: Run, answers: Answers, folder: Path) -> dict[str, Any]:
    """Win rate against the answers of the reference run, which are written there if missing."""
    name = benchmarks.set_name(settings.quality.source)
    reference = Run(Path(str(settings.quality.reference)))
    beside = replace(
        settings, model=config.model_of(reference.config()), run=str(reference.folder)
    )
    subject = subjects.final(reference)
    if subjects.answers_folder(beside, reference, subject).resolve() == folder.resolve():
        others = answers
    else:
        policy = functools.cache(functools.partial(subjects.opened, beside, subject))
        rows = [b for b in _sets(settings) if b.name == name]
        with runs.locked(reference):
            place = subjects.answers_folder(beside, reference, subject)
            others = _answers(beside, subject, rows, place, policy)
    labels = (_label(run), _label(reference))
    return quality.quality(
        answers[name], others[name], settings, folder, labels, settings.trainer.progress
    )


def _contamination(run: Run, sets: list[Benchmark]) -> dict[str, Any]:
    """How many prompts of each set stand in what the run was trained on, exactly or nearly."""
    record, made_with = run.record(), run.config()
    try:
        trained = data.trained_texts(made_with["data"], record)
    except DataError as error:
        log.warning("contamination not checked: %s", error)
        return {}
    if not trained:
        return {}
    prompts = {b.name: [row.prompt for row in b.rows] for b in sets}
    return contamination.report(trained, prompts, near=made_with["data"]["near_duplicate"])


def _label(run: Run) -> str:
    made_with = run.config()
    return f"{made_with['model']['label']}-{made_with['method']}-seed{made_with['seed']}"


def _agreement(sets: list[Benchmark], answers: Answers, verdicts: Verdicts) -> list[dict[str, Any]]:
    by_keywords = {
        f"keyword:{rules}": {b.name: judges.by_keywords(answers[b.name], rules) for b in sets}
        for rules in benchmarks.RULES
    }
    asked = {name.value: by_set for name, by_set in verdicts.items()}
    return judges.agreements({b.name: b.kind for b in sets}, by_keywords | asked)


def _origin(settings: EvalConfig, run: Run, subject: Subject) -> dict[str, Any]:
    made_with = run.config()
    return {
        "weights": subject.weights,
        "step": subject.step,
        "method": made_with["method"],
        "model": made_with["model"]["label"],
        "preset": made_with["preset_name"],
        "seed": made_with["seed"],
        "data": settings.data.label,
        "settings": {
            "max_new_tokens": settings.gen.max_new_tokens,
            "limit": settings.limit,
            "seed": settings.seed,
            "precision": settings.precision.value,
        },
    }


def _kept(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier command measured of the same answers, and this one did not ask for."""
    file = folder / "metrics.json"
    if not file.is_file():
        return {}
    before = json.loads(file.read_text())
    kept = {key: before[key] for key in ("ability", "quality") if key in before}
    if before["settings"] == settings:
        kept |= {key: before[key] for key in SCORES if key in before}
    return kept


if __name__ == "__main__":
    cli.run(main)
