"""The harness's results as the scores of `metrics.json`, and as lines, one a question."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def scores(
    name: str, results: Mapping[str, Any], cut: Mapping[str, int], limit: int | None
) -> dict[str, Any]:
    """Our record of a task or group; of each task where the name has no score of its own."""
    tasks = list(results["n-samples"])
    if not _metrics(results["results"].get(name, {})):
        return {task: _score(task, [task], results, cut, limit) for task in tasks}
    found = _score(name, tasks, results, cut, limit)
    if tasks != [name]:
        found["subjects"] = {
            task.split("::")[-1].removeprefix(f"{name}_"): {
                key: value
                for key, value in _score(task, [task], results, cut, limit).items()
                if key not in ("shots", "limit", "version") and value is not None
            }
            for task in tasks
        }
    return {name: found}


def _score(
    name: str,
    tasks: Sequence[str],
    results: Mapping[str, Any],
    cut: Mapping[str, int],
    limit: int | None,
) -> dict[str, Any]:
    metrics = _metrics(results["results"][name])
    main = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    found: dict[str, Any] = {key: metrics.pop(key, None) for key in main}
    if metrics:
        found["metrics"] = metrics
    return found | {
        "n": sum(results["n-samples"][task]["effective"] for task in tasks),
        "version": str(results["versions"][name]),
        "shots": max(results["n-shot"][task] for task in tasks),
        "limit": limit,
        "truncated": sum(cut[task] for task in tasks),
    }


def _metrics(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """`metric` or `metric,filter` -> value, from the harness's `metric,filter`; N/A is None."""
    return {
        key.removesuffix(",none"): None if isinstance(value, str) else float(value)
        for key, value in scores.items()
        if "," in key
    }


def lines(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Each question's place in its task, target, the model's answers and scores, one a line."""
    found = (
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
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in found)
