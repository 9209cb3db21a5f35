"""Results as one tidy data frame: a row for each number with what it is of."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dcr import inference
from dcr.core import storage
from dcr.core.config import Kind, UserError
from dcr.core.evaluation import APART, pairs_of, set_name
from dcr.core.runs import Run
from dcr.ending import encodable
from dcr.results.schema import (
    Ability,
    Estimate,
    Metrics,
    Quality,
    RankedSet,
    Ranking,
    SetCounts,
    read,
)
from dcr.stages import stages_behind

# Ways to decode, as the settings of an evaluation tell them.
CONTRASTS = {"self_cd": "Self-CD", "adacd": "AdaCD"}

COLUMNS = (
    "run", "weights", "step", "method", "model", "preset", "seed", "data", "stages", "edit", "set",
    "kind", "judge", "judge_model", "quantity", "value", "low", "high", "count", "n",
    "in_distribution", "contaminated", "file",
)  # fmt: skip
FAULTS = ("unanswered", "empty", "truncated", "repetitive", "non_english")
NORMAL = 1.959963984540054  # standard errors to either side of a 95% interval
COMPLIANCE = ("complied", "partial", "refused")
TIMES = ("seconds", "tokens_per_second", "peak_memory_gib")  # how fast a machine is

TidyRow = dict[str, Any]


def load(folders: Iterable[str | Path] | str | Path) -> pd.DataFrame:
    """Every number of every evaluation in run folders, a row each, with the columns `COLUMNS`.

    `value` lies within `low` and `high`, a 95% interval, NaN where none is known; `n` is what it
    was measured on, and of a rate `count` of them: rates over several sets are sums of both. Rates,
    win rates too, are in [0, 1]. `quantity` is what was measured of `set` (or of a task, a choice
    of a kernel's parameters, a block) by `judge`: `refused`, `partial`, `complied` (of the answers
    that have one of the three, by keywords of all answers, some of which are `empty`), `lenient`
    (the last two), `safe`, `unsafe` (of all answers), `invalid`, `error`, `discernment` (an AUROC),
    `answered_at_safety/0.8`, `refused_at_over_refusal/0.05`, `acc`, `win_rate`, `kappa` and so on,
    the paper's analyses under `refusal_probability`, `kernel/…`, `separability/…` and `claims/…`,
    answers under attack under `robustness/<attack>/…`, a user's own task under `<Class>/…`.
    `stages` tells what trained the weights (`contrastive + sft + readout`), "" where nothing did or
    the run's configuration is gone, `edit` steering and decoding, "" for none. `in_distribution`
    marks numbers of sets that the run was trained on, `contaminated` those of others of which
    training, steering or a gate saw some prompts.

    Raises DataError for a damaged file, UserError for a folder without an evaluation.
    """
    places = [folders] if isinstance(folders, (str, Path)) else folders
    rows: list[TidyRow] = []
    for folder in map(Path, places):
        files = sorted(folder.glob("eval/*/metrics.json"))
        if not files:
            raise UserError(f"{folder}: no evaluations there; run python eval.py run={folder}")
        run = Run(folder)
        config = run.config_file
        made_with = storage.read_yaml(config, dict[str, Any]) if config.exists() else {}
        for file in files:
            metrics = read(file)
            trained_by = " + ".join(stages_behind(made_with, metrics.weights))
            learnt = trained_on(run.record(), metrics.weights)
            rows += rows_of(metrics, str(folder), str(file), trained_by, learnt)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def frame_of(metrics: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of one evaluation that is not read from its file, as those of `load`."""
    return pd.DataFrame(rows_of(Metrics.model_validate(metrics)), columns=list(COLUMNS))


def csv_text(table: pd.DataFrame) -> str:
    """CSV with numbers in full precision and no text that a spreadsheet takes for a formula."""

    def plain(value: object) -> object:
        formula = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t")
        return f"'{value}" if formula else value

    rows = [[plain(value) for value in row] for row in table.itertuples(index=False)]
    # as objects, so that whole numbers with gaps stay whole
    frame = pd.DataFrame(rows, columns=table.columns, dtype=object)
    return frame.to_csv(index=False, lineterminator="\n")


def trained_on(rows: Mapping[str, Any], weights: str) -> frozenset[str]:
    """The sets that a run with this `rows.json` trained these weights on."""
    sources = rows.get("in_distribution") or () if weights != "base" else ()
    return frozenset(map(set_name, sources))


def rows_of(
    metrics: Metrics,
    run: str = "",
    file: str = "",
    trained_by: str = "",
    learnt: Collection[str] = (),
) -> list[TidyRow]:
    """The rows of one evaluation, whose weights were trained on the sets `learnt`."""
    about = {key: getattr(metrics, key) for key in COLUMNS[1:8]}
    about |= {"run": run, "stages": trained_by, "edit": edit(metrics.settings), "file": file}
    empty = {
        "set": "", "kind": "", "judge": "", "judge_model": "", "low": math.nan, "high": math.nan,
        "count": None, "n": None, "in_distribution": False, "contaminated": False,
    }  # fmt: skip
    return [
        {key: encodable(v) if isinstance(v, str) else v for key, v in (empty | about | row).items()}
        for row in _all(metrics, learnt)
    ]


def edit(settings: Mapping[str, Any]) -> str:
    """Steering and decoding of an evaluation in one line, "" where the model answered as it is."""
    edits = steering(settings)
    parts = [str(edits.pop("method"))] if "method" in edits else []
    parts += [f"{key}={value}" for key, value in edits.items()]
    if settings.get("validation"):
        parts.append("validation")
    for key in (*CONTRASTS, "thinking", "repetition_penalty", "prefill", "gate", "calibrate"):
        if (value := settings.get(key)) is None:
            continue
        if key == "gate":
            parts.append(f"gate={value['name']}")
            parts += [f"threshold={value['threshold']:g}"] if "threshold" in value else []
            parts += [] if value["alone"] else ["beside the model's refusals"]
        else:
            parts.append(f"{key}={value!r}" if key == "prefill" else f"{key}={value}")
    return " ".join(parts)


def steering(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Method, strength and settings of the steering; a user's own with its source's hash."""
    edits = dict(settings.get("steering") or {})
    if version := edits.pop("sha256", None):
        path, own = edits.pop("path"), edits.pop("settings")
        edits = own | edits | {"method": f"{path}@{version[:8]}"}
    return edits


def _all(metrics: Metrics, learnt: Collection[str]) -> Iterator[TidyRow]:
    for name, counts in metrics.sets.items():
        for row in _set(counts):
            marks = _marks(metrics, [name])
            if row["quantity"].endswith("/unseen"):
                marks["in_distribution"] = False
            yield {"set": name, "kind": counts.kind.value} | marks | row
    if calibration := metrics.calibration:
        chosen = "bias" if calibration.threshold is None else "threshold"
        yield {"quantity": f"calibration/{chosen}", "value": _value(getattr(calibration, chosen))}
        for name, of in calibration.sets.items():
            about = {"set": name, "kind": of.kind.value}
            yield _rate("calibration/refused", of.refused, of.n, **about)
            yield _rate("calibration/refused_plain", of.plain, of.n, **about)
    if ranked := metrics.discernment:
        asked = _asked(metrics)
        pool = [name for name in ranked.sets or asked if name not in APART]
        known = {of: (of.split(" / "),) for of in ranked.pairs} | pairs_of(asked)
        pairs = {of: [name for side in known[of] for name in side] for of in ranked.pairs}
        over = {"pooled": pool, **pairs}
        over["untrained"] = [name for name in pool if not asked[name].in_distribution]
        named = {"pooled": ranked.pooled, "untrained": ranked.untrained, **ranked.pairs}
        for name, ranking in named.items():
            if ranking is not None:
                for row in of_ranking(name, ranking):
                    yield row | _marks(metrics, over[name])
    for name, overlap in metrics.contamination.items():
        for way in ("exact", "near", "ngram"):
            yield _rate(f"contamination/{way}", getattr(overlap, way), overlap.n, set=name)
    for agreement in metrics.agreement:
        about = {"judge": " and ".join(agreement.judges), "kind": agreement.kind, "n": agreement.n}
        yield {"quantity": "kappa", "value": _value(agreement.kappa), **about}
    for judge, usage in metrics.usage.items():
        for key in ("requests", "prompt_tokens", "completion_tokens", "usd"):
            yield {"quantity": f"usage/{key}", "judge": judge, "value": _value(getattr(usage, key))}
    for task, ability in metrics.ability.items():
        for row in _ability(ability):
            yield {"set": task, "contaminated": contaminated(metrics, task)} | row
    if metrics.quality:
        yield from _quality(metrics.quality)
    yield from _attacked(metrics, learnt)
    yield from _own(metrics)
    yield from _analyses(metrics)
    for key in TIMES:
        if (value := getattr(metrics, key)) is not None:
            yield {"quantity": key, "value": value}


def _asked(metrics: Metrics) -> dict[str, SetCounts | RankedSet]:
    """The sets that were answered or ranked, with what is known of them."""
    return {**(metrics.discernment.sets if metrics.discernment else {}), **metrics.sets}


def _marks(metrics: Metrics, names: Iterable[str], learnt: Collection[str] = ()) -> dict[str, bool]:
    """Whether a number over some sets is of any trained on, and of any seen in part."""
    asked = _asked(metrics)
    known = {
        name: name in learnt or (name in asked and asked[name].in_distribution) for name in names
    }
    return {
        "in_distribution": any(known.values()),
        "contaminated": any(contaminated(metrics, name) for name in known if not known[name]),
    }


def contaminated(metrics: Metrics, name: str) -> bool:
    """Whether training, steering or a gate saw prompts of a set that the run was not trained on."""
    counts, overlap = metrics.sets.get(name), metrics.contamination.get(name)
    if (asked := _asked(metrics).get(name)) and asked.in_distribution:
        return False
    return bool((overlap and overlap.any) or (counts and counts.seen_by_steering))


def _set(counts: SetCounts) -> Iterator[TidyRow]:
    for part, suffix in ((counts, ""), (counts.unseen, "/unseen")):
        if part is None:
            continue
        for rules, refused in part.refused.items():
            judge, partial = f"keyword:{rules}", part.partial.get(rules)
            yield _rate(f"refused{suffix}", refused, part.n, judge=judge)
            if partial is not None:
                yield _rate(f"partial{suffix}", partial, part.n, judge=judge)
            answered = part.n - refused - (partial or 0) - (part.empty or 0)
            yield _rate(f"complied{suffix}", answered, part.n, judge=judge)
    for fault in FAULTS:
        if (count := getattr(counts, fault)) is not None:
            asked = counts.n + (counts.unanswered or 0) if fault == "unanswered" else counts.n
            yield _rate(fault, count, asked)
    if counts.seen_by_steering:
        yield _rate("seen_by_steering", counts.seen_by_steering, counts.n)
    for judge, judged in counts.judged.items():
        by = {"judge": judge, "judge_model": judged.model}
        labelled = sum(getattr(judged, label) or 0 for label in COMPLIANCE)
        named = ("safe", "unsafe", *judged.labels)
        answers = sum(judged.counts.get(label, 0) for label in named) + judged.invalid
        for label, count in judged.counts.items():
            of_three = label in COMPLIANCE and label not in judged.labels
            yield _rate(label, count, labelled if of_three else answers, **by)
        if judged.complied is not None:
            lenient = judged.complied + (judged.partial or 0)
            yield _rate("lenient", lenient, labelled, **by)
        asked = max(labelled + judged.invalid, answers) + judged.error
        for label in ("invalid", "error"):
            yield _rate(label, getattr(judged, label), asked, **by)


def of_ranking(name: str, ranking: Ranking) -> Iterator[TidyRow]:
    """The rows of a ranking over some sets, without their marks."""
    counts = ranking.toxic, ranking.seemingly_toxic
    about = {"set": name, "n": None if None in counts else sum(filter(None, counts))}
    yield _estimate("discernment", ranking.auroc, **about)
    for share, estimate in ranking.answered.items():
        yield _estimate(f"answered_at_safety/{share}", estimate, **about)
    for share, estimate in ranking.refused.items():
        yield _estimate(f"refused_at_over_refusal/{share}", estimate, **about)


def _ability(ability: Ability) -> Iterator[TidyRow]:
    for metric in ("acc", "acc_norm"):
        value, error = getattr(ability, metric), getattr(ability, f"{metric}_stderr")
        if value is not None:
            low, high = None, None
            if error is not None:
                low, high = max(0.0, value - NORMAL * error), min(1.0, value + NORMAL * error)
            yield _estimate(metric, (value, low, high), n=ability.n)
    for metric, value in ability.metrics.items():
        yield {"quantity": metric, "value": _value(value), "n": ability.n}


def _quality(quality: Quality) -> Iterator[TidyRow]:
    for key in ("win_rate", "length_controlled", "discrete"):
        value = getattr(quality, key)
        if value is not None:
            error = _value(quality.standard_error if key == "win_rate" else None)
            around, share = NORMAL * error / 100, value / 100
            ends = share - around, share + around
            yield _estimate(key, (share, *ends), judge=quality.annotator, n=quality.n)


def _attacked(metrics: Metrics, learnt: Collection[str]) -> Iterator[TidyRow]:
    """Answers under attack; `learnt` tells of sets that were attacked and not asked plainly."""
    for attack, of in metrics.robustness.items():
        begin = f"robustness/{attack}"
        for name, counts in of.sets.items():
            about = {"set": name, "kind": counts.kind.value} | _marks(metrics, [name], learnt)
            by_keywords = about | {"judge": "keyword:paper"}
            yield _rate(f"{begin}/refused", counts.refused, counts.n, **by_keywords)
            for outcome, count in counts.outcomes.items():
                yield _rate(f"{begin}/{outcome}", count, counts.n, judge="outcome", **about)
        marks = _marks(metrics, [name for name in of.sets if name not in APART], learnt)
        for row in of_ranking("pooled", of.ranking) if of.ranking else ():
            yield row | marks | {"quantity": f"{begin}/{row['quantity']}"}
        if of.bias is not None:
            yield {"quantity": f"{begin}/bias", "value": of.bias}


def _own(metrics: Metrics) -> Iterator[TidyRow]:
    """Numbers of a user's own tasks; keys that name a set or a kind are told in those columns."""
    kinds = {kind.value for kind in Kind}
    for name, task in metrics.own.items():
        for keys, (value, low, high) in task.numbers.items():
            of = next((key for key in keys if key in metrics.sets), "")
            kind = next((key for key in keys if key in kinds), "")
            quantity = "/".join([name, *(key for key in keys if key not in (of, kind))])
            about = {"quantity": quantity, "set": of, "kind": kind}
            yield about | {"value": value, "low": low, "high": high}


def _analyses(metrics: Metrics) -> Iterator[TidyRow]:
    if refusal := metrics.refusal_probability:
        for kind, means in refusal.kinds.items():
            about = {"kind": kind, "n": means.n}
            yield _estimate("refusal_probability", means.plain, **about)
            yield _estimate("refusal_probability/prefix_free", means.prefix_free, **about)
        if first := refusal.first_token:
            for score, auroc in (first.auroc or {}).items():
                yield _estimate(f"refusal_probability/auroc/{score}", auroc, n=first.n)
            for score, value in first.rank_correlation.items():
                about = {"value": _value(value), "n": first.n}
                yield {"quantity": f"refusal_probability/rank_correlation/{score}", **about}
    for params, matrix in (metrics.kernel.params if metrics.kernel else {}).items():
        for observer, cells in matrix.items():
            for trained, cell in cells.items():
                yield _estimate(f"kernel/{observer}/{trained}", cell, set=params, kind=observer)
    if separability := metrics.separability:
        for layer in separability.layers:
            about = {"set": f"block {layer.layer}", "n": len(separability.labels)}
            for key in ("kmeans", "silhouette", "fisher"):
                value = _value(getattr(layer, key))
                yield {"quantity": f"separability/{key}", "value": value, **about}
            probe = layer.probe, layer.probe_low, layer.probe_high
            yield _estimate("separability/probe", probe, **about)
    if claims := metrics.claims:
        for params, parts in claims.params.items():
            for block in ("norm", "prediction", "states"):
                for key, cell in getattr(parts, block).items():
                    if cell is not None:
                        yield _estimate(f"claims/{block}/{key}", cell, set=params)
        for kind, cell in claims.change.items():
            if cell is not None:
                yield _estimate("claims/change", cell, kind=kind)


def _rate(quantity: str, count: int, n: int, **about: Any) -> TidyRow:
    interval = inference.wilson(count, n)
    value = {"value": interval.estimate, "low": interval.low, "high": interval.high}
    return {"quantity": quantity, "count": count, "n": n, **about, **value}


def _estimate(quantity: str, estimate: Estimate | Sequence[float | None], **about: Any) -> TidyRow:
    value, low, high = map(_value, estimate)
    return {"quantity": quantity, **about, "value": value, "low": low, "high": high}


def _value(value: float | None) -> float:
    return math.nan if value is None else float(value)
