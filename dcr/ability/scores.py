"""General ability: tasks of the lm-evaluation-harness, run by the harness on the model in memory.

Prompts, requests, scores and standard errors are the harness's own: no chat template, no cache. If
`data.root` is given, the task files in `harness/` read MMLU, ARC, OpenBookQA and PIQA from it and
ask the same questions; every other task comes from the hub.
"""

import copy
import difflib
import hashlib
import importlib.metadata
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from typing_extensions import TypedDict

from dcr.ability import AbilityConfig, questions
from dcr.core import models, storage
from dcr.core.config import ConfigError, check_installed
from dcr.core.config.evaluation import EvalConfig
from dcr.core.evaluation.protocols import Task, Work
from dcr.core.models import Policy
from dcr.core.runs import Run
from dcr.core.text import label_of

log = logging.getLogger(__name__)

TASK_FILES = Path(__file__).parent / "harness"


class Stored(TypedDict):
    """A task's stored scores, and the settings, rows and harness they depend on."""

    made_with: dict[str, Any]
    scores: dict[str, dict[str, Any]]


class Ability(Task):
    """The harness's scores of the tasks named, beside earlier scores of other tasks."""

    def check(self, settings: EvalConfig, run: Run) -> None:
        check(settings.node(AbilityConfig), settings.data.root)

    def measure(self, work: Work) -> dict[str, Any]:
        settings, options = work.settings, work.settings.node(AbilityConfig)
        root, seed, progress = settings.data.root, settings.seed, settings.trainer.progress
        scores = ability(work.policy(), options, root, work.folder, seed, progress)
        return work.before.get("ability", {}) | scores


def check(settings: AbilityConfig, root: str | None) -> None:
    """Raises for every fault that shows without a model: names, files, rows, examples for shots.

    A group from the hub is checked by its first task. A local file with another number of questions
    than the harness asks gives a warning.

    Raises:
        ConfigError: no harness; a name that it does not know; a task that cannot be loaded, that
            runs code that the model writes, or that wants images; more shots than examples.
        DataError: a file of `root` that is missing or malformed.
    """
    check_installed("lm_eval", "ability", "tasks=[ability]")
    if root is not None and not Path(root).is_dir():
        raise ConfigError(f"data.root={root}: not a folder; name the one with the data files")
    for name in settings.tasks:
        if name not in questions.SETS and name not in _harness().task_index:
            near = difflib.get_close_matches(name, _harness().task_index, n=3, cutoff=0.6)
            cure = "`lm_eval ls tasks` lists them all"
            if near:
                cure = f"did you mean {' or '.join(near)}?"
            raise ConfigError(f"ability.tasks={name}: the harness has no such task; {cure}")
    for name in settings.tasks:
        with _quiet(progress=False):
            part = name if _is_local(name, root) else _first_part(name)
            tasks = list(_loaded(part, root, name)["tasks"].values()) if part else []
        for task in tasks:
            _check_task(name, task, settings.shots)
        if _is_local(name, root):
            questions.compare(name, sum(len(task.eval_docs) for task in tasks))


def ability(
    policy: Policy,
    settings: AbilityConfig,
    root: str | None,
    folder: Path,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """{task: scores} of every task in `settings`: the block `ability` of `metrics.json`.

    Scores are `acc`, `acc_norm` with their standard errors (None if the task has none), `n`
    questions, the task's `version`, `shots`, `limit` (the first questions of each task or subject,
    as the harness takes them) and `truncated`: questions longer than the model's context, which the
    harness cuts from the left. Other scores stand under `metrics`, the members of a group under
    `subjects`. A tag, which has no score of its own, gives its tasks.

    `folder/ability/<task>-<fingerprint>.json` keeps the scores, the `.jsonl` beside it each
    question's; a task stored with the same settings, data and harness is not run again.

    Args:
        policy: keeps its mode, tokenizer and generation settings.
        root: local folder of the five tasks' rows; the hub if None.
        seed: draws the examples of shots above 0 if the harness draws them (not for MMLU). The
            harness's command line seeds the rest; with 1234 its prompts are the same.
    """
    scores: dict[str, Any] = {}
    model = None
    for name in settings.tasks:
        made_with = _made_with(name, settings, root, seed)
        file = folder / "ability" / f"{label_of(name)}-{storage.fingerprint(made_with)}.json"
        if not file.exists():
            log.info("ability: %s", name)
            with models.evaluating(policy.model), _harness_seeds(), _quiet(progress):
                model = model or _wrapped(policy, settings.batch_size)
                whole = _run(model, _loaded(name, root, name), settings, seed)
                cut = {t: _truncated(model, asked) for t, asked in whole["samples"].items()}
            storage.write_text(file.with_suffix(".jsonl"), _lines(whole["samples"]))
            measured = _scores(name, whole, cut, settings.limit)
            storage.write_json(file, {"made_with": made_with, "scores": measured})
        scores |= storage.read_json(file, Stored)["scores"]
    for name, score in scores.items():
        if score["truncated"]:
            log.warning(
                "ability.%s: %d of %d questions exceed the model's context; cut from the left",
                *(name, score["truncated"], score["n"]),
            )
    return scores


# --- tasks by name ------------------------------------------------------------------------------


def _is_local(name: str, root: str | None) -> bool:
    return root is not None and name in questions.SETS


@cache  # thousands of files, the same ones for as long as the process lives
def _harness() -> Any:
    """The harness's TaskManager of its own tasks."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _loaded(name: str, root: str | None, asked_as: str) -> Any:
    """The harness's TaskDict of one task, group or tag, with its data."""
    from lm_eval.tasks import TaskManager

    if _is_local(asked_as, root):
        where: Any = {"root": root}
        manager = TaskManager(include_path=TASK_FILES, include_defaults=False, metadata=where)
        return manager.load([name])
    try:
        return _harness().load([name])
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        local = asked_as in questions.SETS
        cure = "give data.root=<folder with its rows>" if local else "leave it out"
        raise ConfigError(
            f"ability.tasks={asked_as}: cannot be loaded ({reason[:160]}); install what it "
            f"needs, let this machine reach the hub, or {cure}"
        ) from error


def _first_part(name: str) -> str | None:
    """The first task of a group or tag, a task itself; None for a group without named members."""
    entry = _harness().task_index.get(name)
    if entry is None:
        return None
    if entry.kind.name == "TAG":
        return _first_part(min(entry.tags))
    if entry.kind.name != "GROUP":
        return name
    members = (entry.cfg or {}).get("task") or []
    named = [m if isinstance(m, str) else m.get("task") for m in members]
    return _first_part(named[0]) if named and isinstance(named[0], str) else None


def _check_task(name: str, task: Any, shots: int) -> None:
    """Raises ConfigError for a task that cannot run here or has too few examples for `shots`."""
    from lm_eval.api.samplers import FirstNSampler

    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(f"ability.tasks={name}: runs code that the model writes; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"ability.tasks={name}: asks about images or sound; leave it out")
    if not shots or task.get_config("num_fewshot") == 0 or not hasattr(task, "sampler"):
        return
    # then the harness draws one more, lest it shows the question itself
    spare = task.fewshot_cfg.split == task.get_config("test_split")
    wanted = shots + (spare and not isinstance(task.sampler, FirstNSampler))
    if (examples := len(task.sampler.df)) < wanted:
        shown = questions.SETS[name].shown if name in questions.SETS else None
        also = f", or put the examples into data.root as {shown}" if shown else ""
        raise ConfigError(
            f"ability.shots={shots}: {task.task_name} has {examples} examples to show, {wanted} "
            f"are wanted; lower ability.shots, leave {name} out of ability.tasks{also}"
        )


def _made_with(name: str, settings: AbilityConfig, root: str | None, seed: int) -> dict[str, Any]:
    """Everything that a score depends on, but the weights."""
    local = questions.files(name, root) if root is not None and _is_local(name, root) else []
    return {
        "task": name,
        "shots": settings.shots,
        "limit": settings.limit,
        "seed": seed if settings.shots else None,
        "rows": [hashlib.sha256(file.read_bytes()).hexdigest() for file in local] or "hub",
        "lm_eval": importlib.metadata.version("lm_eval"),
    }


# --- running ------------------------------------------------------------------------------------


def _wrapped(policy: Policy, batch_size: int) -> Any:
    """The harness's HFLM around this model, adapter included, with a copy of its tokenizer."""
    from lm_eval.models.huggingface import HFLM

    tokenizer: Any = copy.deepcopy(policy.tokenizer)  # HFLM gives it a padding token
    untyped: Any = HFLM
    return untyped(pretrained=policy.model, tokenizer=tokenizer, batch_size=batch_size)


def _run(model: Any, loaded: Any, settings: AbilityConfig, seed: int) -> dict[str, Any]:
    """The harness's results. A task whose file sets 0 shots keeps them, as in its command line."""
    from lm_eval.evaluator import evaluate

    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") != 0:
            task.set_config("num_fewshot", settings.shots)
        task.set_fewshot_seed(seed)
    whole: Any = evaluate(lm=model, task_dict=loaded, limit=settings.limit)
    return whole


@contextmanager
def _harness_seeds() -> Iterator[None]:
    """Sets the seeds of the harness's command line, for tasks that sample; then restores states."""
    import numpy as np
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Silences the harness's log lines below an error, and its bars but the model's, if `progress`.

    Its logs and bars, one a subject, have no switch. `_truncated` counts the prompts that its
    warnings would name.
    """
    from lm_eval.api import model, task
    from lm_eval.models import huggingface

    logger = logging.getLogger("lm_eval")
    level, modules = logger.level, [model, task, *([] if progress else [huggingface])]
    logger.setLevel(logging.ERROR)
    for module in modules:
        vars(module)["tqdm"] = _no_bar
    try:
        yield
    finally:
        logger.setLevel(level)
        for module in modules:
            vars(module)["tqdm"] = tqdm


def _no_bar(*arguments: Any, **options: Any) -> Any:
    return tqdm(*arguments, **{**options, "disable": True})


def _truncated(model: Any, samples: list[dict[str, Any]]) -> int:
    """Counts the questions that HFLM cut from the left because a continuation was too long."""
    longest = model.max_length + 1  # the model never reads the last token
    return sum(
        any(
            len(text.encode()) > longest and len(model.tok_encode(text)) > longest
            for context, continuation in (pair[:2] for pair in sample["arguments"])
            if isinstance(continuation, str) and (text := context + continuation)
        )
        for sample in samples
    )


# --- what comes out -------------------------------------------------------------------------------


def _scores(
    name: str, results: Mapping[str, Any], cut: Mapping[str, int], limit: int | None
) -> dict[str, Any]:
    """Our record of a task or group, or of each task if the name has no score of its own."""
    tasks = list(results["n-samples"])
    if not _metrics(results["results"].get(name, {})):
        return {task: _score(task, [task], results, cut, limit) for task in tasks}
    score = _score(name, tasks, results, cut, limit)
    if tasks != [name]:
        score["subjects"] = {
            task.split("::")[-1].removeprefix(f"{name}_"): {
                key: value
                for key, value in _score(task, [task], results, cut, limit).items()
                if key not in ("shots", "limit", "version") and value is not None
            }
            for task in tasks
        }
    return {name: score}


def _score(
    name: str,
    tasks: Sequence[str],
    results: Mapping[str, Any],
    cut: Mapping[str, int],
    limit: int | None,
) -> dict[str, Any]:
    metrics = _metrics(results["results"][name])
    main = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    score: dict[str, Any] = {key: metrics.pop(key, None) for key in main}
    if metrics:
        score["metrics"] = metrics
    return score | {
        "n": sum(results["n-samples"][task]["effective"] for task in tasks),
        "version": str(results["versions"][name]),
        "shots": max(results["n-shot"][task] for task in tasks),
        "limit": limit,
        "truncated": sum(cut[task] for task in tasks),
    }


def _metrics(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """{`metric` or `metric,filter`: value} from the harness's `metric,filter`; N/A is None."""
    return {
        key.removesuffix(",none"): None if isinstance(value, str) else float(value)
        for key, value in scores.items()
        if "," in key
    }


def _lines(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A JSON line for each question: its place in the task, target, answers and scores."""
    rows = (
        {
            "task": task,
            "row": sample["doc_id"],
            "filter": sample["filter"],
            "target": sample["target"],
            "responses": sample["filtered_resps"],
            **{metric: sample[metric] for metric in sample["metrics"]},
        }
        for task, rows_of_task in samples.items()
        for sample in rows_of_task
    )
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
