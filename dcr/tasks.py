"""What is measured of one subject: answers, verdicts, ability, quality and the paper's analyses."""

import functools
import itertools
import json
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from dcr import (
    activations,
    analyses,
    benchmarks,
    config,
    contamination,
    data,
    endpoints,
    judges,
    prompts,
    runs,
    steering,
    subjects,
)
from dcr.benchmarks import Benchmark, ability, quality
from dcr.config import DataError, EvalConfig, Judge, Kind, Task
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
MEASURED_KEYS = ("ability", "refusal_probability", "kernel", "separability")


def sets(settings: EvalConfig) -> list[Benchmark]:
    """The prompts of every task that has a model answer prompts."""
    if settings.steering.validation:
        return _validation(settings)
    found = benchmarks.read(settings.tasks, settings.data, settings.limit, settings.seed)
    if Task.quality in settings.tasks:
        source = settings.quality.source
        found.append(
            benchmarks.read_set(
                source, Kind.normal, settings.data.root, settings.limit, settings.seed
            )
        )
    return found


def _validation(settings: EvalConfig) -> list[Benchmark]:
    """The prompts that extraction leaves, the same first ones for every method of steering."""
    left = steering.extraction(settings.data, settings.steering, settings.seed)
    return [
        Benchmark(f"validation_{name}", kind, rows[: settings.limit])
        for name, kind, rows in (
            ("seemingly_toxic", Kind.seemingly_toxic, left.validation_seemingly_toxic),
            ("harmful", Kind.toxic, left.validation_harmful),
        )
    ]


def check(settings: EvalConfig) -> None:
    """Raises a UserError for all that can be known wrong before a model is loaded."""
    judges.check(settings.judge, settings)
    if settings.endpoint is not None:
        endpoints.check(subjects.server_of(settings), "endpoint")
    if Task.ability in settings.tasks:
        ability.check(settings.ability, settings.data.root)
    if Task.quality in settings.tasks:
        quality.check(settings)


def measure(
    settings: EvalConfig, run: Run, subject: Subject, asked: list[Benchmark]
) -> tuple[dict[str, Any], Answers]:
    """What `metrics.json` of one subject now says, and its answers to the prompts of `asked`."""
    folder = subjects.answers_folder(settings, run, subject)
    began = time.perf_counter()
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        policy = _opener(settings, run, subject, stack, found)
        answers = _answers(settings, subject, asked, folder, policy)
        for task, measured in MEASURED.items():
            if task in settings.tasks:
                found[task.value] = measured(settings, policy, folder)
        policy.cache_clear()  # before a guard of eight billion parameters needs the room
    if Task.quality in settings.tasks:
        found["quality"] = _quality(settings, run, answers, folder)
    judged = [b for b in asked if b.kind is not Kind.normal]
    if judged:
        found |= _scores(settings, run, judged, answers, folder)
    origin = _origin(settings, run, subject)
    metrics = origin | _kept(folder, origin["settings"]) | found
    metrics["seconds"] = round(time.perf_counter() - began, 1)
    metrics["peak_memory_gib"] = round(runs.peak_memory_gib(), 2)
    _set_aside(folder, origin["settings"])
    runs.write_json(folder / "metrics.json", metrics)
    print(f"{subject.weights}: {folder}")
    return metrics, answers


def _opener(
    settings: EvalConfig, run: Run, subject: Subject, stack: ExitStack, found: dict[str, Any]
) -> Any:
    """Opens the weights, under the edits asked for, when they are first needed; then remembers."""

    @functools.cache
    def opened() -> Policy:
        policy = subjects.opened(settings, subject)
        if steering.acts(settings.steering):
            steered = subjects.steered(settings, policy, run.folder / "steering")
            stack.enter_context(activations.edited(policy.model, steered.edits))
            found["steering"] = steered.record
        return policy

    return opened


Opened = Callable[[], Policy]


def _ability(settings: EvalConfig, policy: Opened, folder: Path) -> dict[str, Any]:
    """What the harness says of the tasks asked, beside what it said of others before."""
    return _kept(folder, {}).get("ability", {}) | ability.ability(
        policy(),
        settings.ability,
        settings.data.root,
        folder,
        settings.seed,
        settings.trainer.progress,
    )


def _refusal_probability(settings: EvalConfig, policy: Opened, folder: Path) -> dict[str, Any]:
    rows = analyses.prompts(settings.data, settings.refusal_prob.prompts, settings.seed)
    alone = analyses.followed(settings.data)
    chat = prompts.chat_format(policy().tokenizer, settings.model)
    return analyses.refusal_probability(
        policy(), chat, rows, alone, settings.refusal_prob, settings.seed
    )


def _kernel(settings: EvalConfig, policy: Opened, folder: Path) -> dict[str, Any]:
    rows = analyses.prompts(settings.data, settings.entk.prompts, settings.seed)
    chat = prompts.chat_format(policy().tokenizer, settings.model)
    policy().model.float()  # products of gradients need it
    block = analyses.kernel(policy(), chat, rows, settings.entk, settings.seed, folder)
    before = _kept(folder, {}).get("kernel", {})
    alike = all(before.get(key) == value for key, value in block.items() if key != "params")
    return block | {"params": before["params"] | block["params"]} if alike else block


def _separability(settings: EvalConfig, policy: Opened, folder: Path) -> dict[str, Any]:
    rows = analyses.prompts(settings.data, settings.sep.prompts, settings.seed)
    chat = prompts.chat_format(policy().tokenizer, settings.model)
    return analyses.separate(policy(), chat, rows, settings.sep, settings.seed)


# What is measured on the weights themselves; the kernel last, since it widens them to fp32.
MEASURED = {
    Task.ability: _ability,
    Task.refusal_probability: _refusal_probability,
    Task.separability: _separability,
    Task.kernel: _kernel,
}


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
    beside = replace(settings, model=config.model_of(reference.config()), run=str(reference.folder))
    subject = subjects.final(reference)
    if subjects.answers_folder(beside, reference, subject).resolve() == folder.resolve():
        others = answers
    else:
        policy = functools.cache(functools.partial(subjects.opened, beside, subject))
        rows = [b for b in sets(settings) if b.name == name]
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
    asked = {b.name: [row.prompt for row in b.rows] for b in sets}
    return contamination.report(trained, asked, near=made_with["data"]["near_duplicate"])


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
            **_decoded_otherwise(settings),
        },
    }


def _decoded_otherwise(settings: EvalConfig) -> dict[str, Any]:
    """Settings that are told only where they change something, so that old and new records meet."""
    told: dict[str, Any] = {}
    if steering.acts(settings.steering):
        told["steering"] = steering.told(settings.steering)
    if settings.steering.validation:
        told["validation"] = True
    if settings.gen.self_cd is not None:
        told["self_cd"] = settings.gen.self_cd
    return told


def _set_aside(folder: Path, settings: dict[str, Any]) -> None:
    """Renames metrics of the same answers under other settings, such as another limit."""
    file = folder / "metrics.json"
    if not file.is_file():
        return
    before = json.loads(file.read_text())["settings"]
    if before != settings:
        aside = folder / f"metrics-{runs.fingerprint(before)}.json"
        file.replace(aside)
        changed = "; ".join(runs.differences(before, settings))
        log.warning("%s: metrics of other settings (%s) are now in %s", folder, changed, aside.name)


def _kept(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier command measured of the same answers, and this one did not ask for."""
    file = folder / "metrics.json"
    if not file.is_file():
        return {}
    before = json.loads(file.read_text())
    kept = {key: before[key] for key in (*MEASURED_KEYS, "quality") if key in before}
    if before["settings"] == settings:
        kept |= {key: before[key] for key in SCORES if key in before}
    return kept
