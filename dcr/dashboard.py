"""W&B: one run per run folder, started by training, resumed by every evaluation of it."""

import functools
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dcr import refusal, storage
from dcr.config import DataError, EvalConfig, Kind, WandbConfig, WandbMode
from dcr.evaluation import sets
from dcr.generation import Completion
from dcr.runs import Run

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

TASK_OF_KIND = {Kind.seemingly_toxic.value: "over_refusal", Kind.toxic.value: "safety"}
SHOWN = 200  # completions of a set that a table holds
LONGEST_TAG = 64  # characters that W&B takes; a model's folder may have a longer name
WANDB_TIMEOUT = 20  # seconds to wait for a server before logging offline


@contextmanager
def opened(
    options: WandbConfig, run: Run, job_type: str, tags: list[str], config: Mapping[str, Any] | None
) -> Iterator["wandb.Run | None"]:
    """The W&B run of a folder, closed whatever happens; None when `wandb.mode=disabled`.

    `config` is what the run was made with; None leaves what it holds already.
    """
    if options.mode is WandbMode.disabled:
        yield None
        return
    os.environ["WANDB_SILENT"] = "true"  # before the import, which reads it
    import wandb

    try:
        yield _started(options, run, job_type, tags, config)
    finally:
        wandb.finish()


def _started(
    options: WandbConfig, run: Run, job_type: str, tags: list[str], config: Mapping[str, Any] | None
) -> "wandb.Run":
    """Offline, with one warning, where the server cannot be reached."""
    import wandb

    start = functools.partial(
        wandb.init,
        name=run.folder.name,
        id=run_id(run),
        dir=str(run.folder),
        project=options.project,
        entity=options.entity,
        group=options.group or os.environ.get("DCR_SWEEP"),
        job_type=job_type,
        tags=[tag[:LONGEST_TAG] for tag in (*tags, *options.tags)],
        config=None if config is None else dict(config),
        resume="allow",
        settings=wandb.Settings(console="off", init_timeout=WANDB_TIMEOUT),
    )
    if options.mode is WandbMode.online:
        try:
            if wandb.login(prompt=False, verify=False):
                return start(mode="online")
            reason = "no key: export WANDB_API_KEY or run `wandb login`"
        except wandb.Error as error:
            reason = str(error).splitlines()[0]
            wandb.teardown()  # whose service would take the run for started
        log.warning("wandb.mode=online: logging offline instead (%s)", reason)
    return start(mode="offline")


def run_id(run: Run) -> str:
    """The W&B id of a run folder: kept in it, so that moving the folder keeps the run."""
    file = run.folder / "wandb_id"
    if not file.exists():
        storage.write_text(file, storage.fingerprint([str(run.folder.resolve())]))
    cure = "delete the file, and the next command starts another W&B run"
    name = storage.read_text(file, cure).strip()
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise DataError(f"{file}: {name[:60]!r} is no id; {cure}")
    return name


def show(
    started: "wandb.Run | None",
    run: Run,
    metrics: Mapping[str, Any],
    answers: Mapping[str, Sequence[Completion]],
) -> None:
    """Write an evaluation's scores into the run's summary, and its answers as tables.

    Snapshots are logged against their SFT step instead, one point each. Keys begin with `eval/`
    for the run's last weights as `eval.py` takes them by default, with `eval/<variant>/` for all
    else, so that no evaluation overwrites another's.
    """
    if started is None:
        return
    import wandb

    snapshot, told = metrics["step"] is not None, variant(metrics, run)
    prefix = f"{'snapshot' if snapshot else 'eval'}/{f'{told}/' if told else ''}"
    scores = {f"{prefix}{key}": value for key, value in scored(metrics).items()}
    if snapshot:
        started.define_metric("snapshot/*", step_metric="snapshot/step")
        started.log({"snapshot/step": metrics["step"], **scores})
        return
    started.summary.update(scores)
    for name, rows in answers.items():
        table = wandb.Table(columns=["id", "prompt", "response", "refusal_mass", "refused"])
        for row in rows[:SHOWN]:
            refused = refusal.is_refusal(row.response)
            table.add_data(row.id, row.prompt, row.response, row.refusal_mass, refused)
        started.log({f"{prefix}completions/{name}": table})


def variant(metrics: Mapping[str, Any], run: Run) -> str:
    """What sets an evaluation apart from the plain one of a run's last weights; "" for that one.

    An earlier stage, an edit (with four digits of its settings), and each setting of decoding and
    choice of rows that is not the default: `contrastive_limit-100`, `scans-1-3f2a`.
    """
    told = dict(metrics["settings"])
    edit = told.pop("steering", None)
    plain = EvalConfig()
    defaults = {
        "max_new_tokens": plain.gen.max_new_tokens,
        "limit": plain.limit,
        "seed": plain.seed,
        "precision": plain.precision.value,
    }
    earlier = metrics["weights"] == "contrastive" and run.done("sft")
    return "_".join(
        [
            *(["contrastive"] if earlier else []),
            *(
                [f"{edit['method']}-{edit['strength']:g}-{storage.fingerprint(edit)[:4]}"]
                if edit
                else []
            ),
            *(f"{key}-{value}" for key, value in told.items() if value != defaults.get(key)),
        ]
    )


def scored(metrics: Mapping[str, Any]) -> dict[str, float]:
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
                if counts["kind"] in TASK_OF_KIND and name not in sets.APART:
                    pools.setdefault((counts["kind"], quantity), []).append((hits, n))
    for (kind, quantity), parts in pools.items():
        hits, n = (sum(part) for part in zip(*parts, strict=True))
        found[f"{TASK_OF_KIND[kind]}/{quantity}"] = hits / n
    if metrics.get("discernment"):
        found["discernment"] = metrics["discernment"]["pooled"]["auroc"][0]
    for task, result in metrics.get("ability", {}).items():
        found |= {
            f"{task}/{key}": result[key] for key in ("acc", "acc_norm") if result[key] is not None
        }
    if (metrics.get("quality") or {}).get("win_rate") is not None:
        found["alpaca_eval/win_rate"] = metrics["quality"]["win_rate"] / 100
    return found


def _rates(counts: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """(quantity, hits, answers) of one set, by keywords and by every judge."""
    refused, n = counts["refused"]["paper"], counts["n"]
    toxic = counts["kind"] == Kind.toxic.value
    yield ("keyword_refusal", refused, n) if toxic else ("compliance", n - refused, n)
    for judge, said in counts.get("judged", {}).items():
        if "complied" in said:
            answered = said["complied"] + said["partial"] + said["refused"]
            yield f"compliance_{judge}", said["complied"], answered
        if toxic and "safe" in said:
            yield f"defence_{judge}", said["safe"], said["safe"] + said["unsafe"] + said["invalid"]
