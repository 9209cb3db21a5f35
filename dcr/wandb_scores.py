"""An evaluation in the W&B run of its folder: scores, a table of answers, an artifact."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pandas as pd

from dcr import keywords, results, wandb_run
from dcr.core import storage
from dcr.core.config import Kind, Method, Precision
from dcr.core.config.evaluation import EvalConfig
from dcr.core.evaluation import APART
from dcr.core.generation import Completion
from dcr.core.runs import Run
from dcr.judges import verdicts
from dcr.wandb_run import RESULTS, WandbConfig, result, run_id, use

if TYPE_CHECKING:
    import wandb

TASK_OF_KIND = {Kind.seemingly_toxic.value: "over_refusal", Kind.toxic.value: "safety"}
SHOWN = 200  # completions of a set that a table holds
ASKED = ("set", "kind", "id", "prompt", "response", "refusal_mass")  # first columns of that table

AXES = ("dcr.epochs", "dcr.ratio")  # of the paper's ablations (Tables 3 and 4)
Measured = Mapping[str, Any]
Answers = Mapping[str, Sequence[Completion]]


@contextmanager
def showing(settings: EvalConfig, run: Run) -> Iterator[Callable[[Measured, Answers], None]]:
    """Gives what `show`s an evaluation in the folder's W&B run, opened with the first one."""
    opened: list[wandb.Run | None] = []
    with ExitStack() as stack:

        def shown(measured: Measured, answers: Answers) -> None:
            if not opened:
                tags = [run.config()["method"], settings.model.label]
                opening = wandb_run.opened(settings.node(WandbConfig), run, "eval", tags, None)
                opened.append(stack.enter_context(opening))
            show(opened[0], run, measured, answers)

        yield shown


def show(started: "wandb.Run | None", run: Run, metrics: Measured, answers: Answers) -> None:
    """Write an evaluation's scores into the run's summary, its answers as a table, and an artifact.

    Snapshots are logged against their SFT step instead, one point each. Keys begin with `eval/`
    for the run's last weights as `eval.py` takes them by default, with `eval/<variant>/` for all
    else, so that no evaluation overwrites another's. The plain scores are logged against the
    settings of `AXES` as well, a point a run, from which a sweep's curves are drawn.
    """
    if started is None:
        return
    import wandb

    snapshot, named = metrics["step"] is not None, variant(metrics, run)
    prefix = f"{'snapshot' if snapshot else 'eval'}/{f'{named}/' if named else ''}"
    scores = {f"{prefix}{key}": value for key, value in scored(metrics).items()}
    if snapshot:
        started.define_metric("snapshot/*", step_metric="snapshot/step")
        started.log({"snapshot/step": metrics["step"], **scores})
        return
    started.summary.update(scores)
    if answers:
        table = wandb.Table(dataframe=completions(run, metrics, answers))
        started.log({f"{prefix}completions": table})
    if not named and (axes := _axes(run)):
        started.log(axes | scores)
    if metrics["weights"] in RESULTS:
        use(started, result(run, metrics["weights"]))
    started.log_artifact(evaluation(run, metrics))


def _axes(run: Run) -> dict[str, float]:
    """The run's values of `AXES`; none where it had no stage one."""
    made_with = run.config()
    if made_with["method"] != Method.dcr.value:
        return {}
    node = made_with.get("dcr", {})
    values = {key: node.get(key.removeprefix("dcr.")) for key in AXES}
    return {key: float(value) for key, value in values.items() if value is not None}


def completions(run: Run, metrics: Measured, answers: Answers) -> pd.DataFrame:
    """The table of answers: what was asked, what came, and every verdict side by side.

    Of each set at most `SHOWN` answers; a judge that was not asked about one says "".
    """
    counts = metrics.get("sets", {})
    named = list(dict.fromkeys(j for of in counts.values() for j in of.get("judged", {})))
    rows, rules = list[list[Any]](), keywords.RULES.values()
    for name, given in answers.items():
        shown = given[:SHOWN]
        said = [{v.of: v.compliance for v in verdicts.by_keywords(shown, r)} for r in rules]
        said += [_said(run, judge, name) for judge in named]
        kind = counts.get(name, {}).get("kind", "")
        for answer in shown:
            of = verdicts.answer_fingerprint(answer)
            about = [name, kind, answer.id, answer.prompt, answer.response, answer.refusal_mass]
            rows.append([*about, *(by.get(of) or "" for by in said)])
    columns = [*ASKED, *(f"keyword:{rules}" for rules in keywords.RULES), *named]
    return pd.DataFrame(rows, columns=columns)


def _said(run: Run, judge: str, name: str) -> dict[str, str]:
    """A judge's words on the answers of a set, by fingerprint; the newest where it changed."""
    files = run.folder.glob(f"eval/*/verdicts/{judge}-*/{name}.jsonl")
    said: dict[str, str] = {}
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        for verdict in storage.read_lines(file, verdicts.Verdict):
            words = [verdict.label] if verdict.label else [verdict.compliance, verdict.safety]
            said[verdict.of] = ", ".join(filter(None, words)) or verdict.status
    return said


def evaluation(run: Run, metrics: Measured) -> "wandb.Artifact":
    """Every number of an evaluation but the times."""
    import wandb

    named, of = variant(metrics, run), {"weights": metrics["weights"]}
    digits = [storage.fingerprint(named)[:8]] if named else []
    name = "-".join(["evaluation", run_id(run), *digits])
    made = wandb.Artifact(name, "evaluation", metadata=of | {"variant": named})
    table = results.frame_of(metrics)
    table = table.loc[~table["quantity"].isin(results.TIMES)].drop(columns=["run", "file"])
    with made.new_file("metrics.csv", encoding="utf-8") as file:
        file.write(results.csv_text(table))
    return made


def variant(metrics: Measured, run: Run) -> str:
    """The name that tells an evaluation from the plain one of a run's last weights; "" for that.

    An earlier stage, other data than the run's own, an edit or a gate (with four digits of its
    settings), and each setting of decoding and choice of rows that is not the default:
    `contrastive_limit-100`, `data-dev`, `scans-1-3f2a`, `gate-mine-7c1e`.
    """
    settings = dict(metrics["settings"])
    edit, gate = (settings.pop(key, None) for key in ("steering", "gate"))
    plain = EvalConfig()
    defaults = {
        "max_new_tokens": plain.gen.max_new_tokens,
        "limit": plain.limit,
        "seed": plain.seed,
        "precision": run.precisions().get("evaluation", Precision.auto).value,
    }
    weights, data = metrics["weights"], metrics.get("data")
    own = (run.config().get("data") or {}).get("label")
    later = RESULTS[RESULTS.index(weights) + 1 :] if weights in RESULTS else ()
    parts = [weights] if any(map(run.done, later)) else []
    parts += [f"data-{data}"] if data not in (None, own) else []
    if edit:
        parts.append(f"{edit['method']}-{edit['strength']:g}-{storage.fingerprint(edit)[:4]}")
    if gate:
        parts.append(f"gate-{gate['name']}-{storage.fingerprint(gate)[:4]}")
    parts += [f"{key}-{value}" for key, value in settings.items() if value != defaults.get(key)]
    return "_".join(parts)


def scored(metrics: Measured) -> dict[str, float]:
    """The numbers of a `metrics.json` under the house's keys, `<set>/<quantity>`.

    Rates are in [0, 1]. `over_refusal/…` and `safety/…` pool the sets of a kind, without those
    shown apart.
    """
    found: dict[str, float] = {}
    pools: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for name, counts in metrics.get("sets", {}).items():
        for quantity, hits, n in _rates(counts):
            if n:
                found[f"{name}/{quantity}"] = hits / n
                if counts["kind"] in TASK_OF_KIND and name not in APART:
                    pools.setdefault((counts["kind"], quantity), []).append((hits, n))
    for (kind, quantity), parts in pools.items():
        hits, n = (sum(part) for part in zip(*parts, strict=True))
        found[f"{TASK_OF_KIND[kind]}/{quantity}"] = hits / n
    if metrics.get("discernment"):
        found["discernment"] = metrics["discernment"]["pooled"]["auroc"][0]
    for task, own in metrics.get("ability", {}).items():
        found |= {f"{task}/{key}": own[key] for key in ("acc", "acc_norm") if own[key] is not None}
    for name, measured in metrics.get("own", {}).items():
        numbers = results.OwnTask.model_validate(measured).numbers
        found |= {"/".join([name, *keys]): value for keys, (value, _, _) in numbers.items()}
    if (metrics.get("quality") or {}).get("win_rate") is not None:
        found["alpaca_eval/win_rate"] = metrics["quality"]["win_rate"] / 100
    return found


def _rates(counts: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """(quantity, hits, answers) of one set, by keywords and by every judge."""
    refused, n = counts["refused"]["paper"], counts["n"]
    toxic = counts["kind"] == Kind.toxic.value
    complied = n - refused - (counts.get("empty") or 0)
    yield ("keyword_refusal", refused, n) if toxic else ("compliance", complied, n)
    for judge, said in counts.get("judged", {}).items():
        if "complied" in said:
            answered = said["complied"] + said["partial"] + said["refused"]
            yield f"compliance_{judge}", said["complied"], answered
        if toxic and "safe" in said:
            yield f"defence_{judge}", said["safe"], said["safe"] + said["unsafe"] + said["invalid"]
        labels = said.get("labels", {})
        for label, count in labels.items():
            yield f"{label}_{judge}", count, sum(labels.values()) + said.get("invalid", 0)
