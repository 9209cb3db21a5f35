"""W&B: one run per run folder, started by training, resumed by every evaluation of it.

What was made from what stands in artifacts: settings, the result of each stage, evaluations, pages.
"""

import functools
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from dcr.core import config, storage
from dcr.core.config import STAGES, DataError, ScriptSettings
from dcr.core.config.training import TrainConfig
from dcr.core.runs import Run
from dcr.ending import redact, single_line
from dcr.resolving import SAFE_NAME

if TYPE_CHECKING:
    import wandb
    from lightning.pytorch.loggers import Logger

log = logging.getLogger(__name__)

WANDB_TIMEOUT = 20  # seconds to wait for a server before logging offline
PROJECT, TAG = 128, 64  # characters of a project and of a tag that W&B takes
RESULTS = tuple(stage.value for stage in STAGES)  # weights that a run made


class WandbMode(Enum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class WandbConfig:
    mode: WandbMode = WandbMode.offline
    project: str = "dcr"
    entity: str | None = None  # you or a team; null: the account's own
    group: str | None = None  # of runs; null: the sweep
    tags: list[str] = field(default_factory=list)


def relations(settings: ScriptSettings) -> Iterator[str]:
    """Names that W&B does not take."""
    node = settings.node(WandbConfig)
    if not SAFE_NAME.fullmatch(node.project) or len(node.project) > PROJECT:
        yield (
            f"wandb.project={node.project}: use letters, digits, '.', '_' and '-' only, "
            f"{PROJECT} at most"
        )
    for tag in node.tags:
        if not 1 <= len(tag) <= TAG:
            yield f"wandb.tags=[{tag!r:.60}]: give 1 to {TAG} characters each"


@contextmanager
def showing(
    settings: TrainConfig, run: Run
) -> Iterator["tuple[list[Logger], Callable[[str], None] | None]"]:
    """Gives Lightning's logger of the folder's W&B run, and what keeps a stage's result there."""
    from lightning.pytorch.loggers import WandbLogger  # evaluation does without

    tags = [settings.method.value, settings.model.label or "model"]
    made_with = config.plain(settings)
    with opened(settings.node(WandbConfig), run, settings.stage.value, tags, made_with) as started:
        if started is None:
            yield [], None
            return
        started.define_metric("*", step_metric="trainer/global_step")
        yield [WandbLogger(experiment=started)], functools.partial(log_stage, started, run)


@contextmanager
def opened(
    options: WandbConfig,
    run: Run,
    job_type: str,
    tags: list[str],
    made_with: Mapping[str, Any] | None,
) -> Iterator["wandb.Run | None"]:
    """The W&B run of a folder, closed whatever happens; None when `wandb.mode=disabled`.

    `made_with` are the settings that the run was made with; None leaves those that it holds.
    """
    if options.mode is WandbMode.disabled:
        yield None
        return
    os.environ["WANDB_SILENT"] = "true"  # before the import, which reads it
    import wandb

    try:
        yield _started(options, run, job_type, tags, made_with)
    finally:
        wandb.finish()
        forget_keys(run, wandb.api.api_key or "")


def forget_keys(run: Run, key: str) -> None:
    """Removes keys from W&B's own logs, since a server may echo a key and W&B logs its replies."""
    for file in (run.folder / "wandb").rglob("*.log"):
        with suppress(OSError):  # a log that is gone
            text = file.read_text(encoding="utf-8", errors="replace")
            if (clean := redact(text, key)) != text:
                storage.write_text(file.resolve(), clean)


def _started(
    options: WandbConfig,
    run: Run,
    job_type: str,
    tags: list[str],
    made_with: Mapping[str, Any] | None,
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
        # a model's folder may have a longer name than W&B takes
        tags=[tag[:TAG] for tag in (*tags, *options.tags)],
        config=None if made_with is None else dict(made_with),
        resume="allow",
        settings=wandb.Settings(console="off", init_timeout=WANDB_TIMEOUT),
    )
    if options.mode is WandbMode.online:
        try:
            if wandb.login(prompt=False, verify=False):
                return start(mode="online")
            reason = "no key: export WANDB_API_KEY or run `wandb login`"
        except wandb.Error as error:
            reason = single_line(error, wandb.api.api_key or "", longest=200)
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


# --- artifacts ----------------------------------------------------------------------------------

# Built from the run folder alone, without times, so that the same content is the same version
# whenever and wherever it is logged, and an offline run adds nothing that the server has.


def log_stage(started: "wandb.Run", run: Run, stage: str) -> None:
    """Keep a stage's result as an artifact, made from the run's settings and the stage before."""
    use(started, _settings(run))
    for before in RESULTS[: RESULTS.index(stage)][::-1]:
        if run.done(before):
            use(started, result(run, before))
            break
    started.log_artifact(result(run, stage))


def use(started: "wandb.Run", artifact: "wandb.Artifact") -> None:
    """Marks the artifact as an input of the W&B run, and logs it first if the server lacks it."""
    if started.offline:  # where `use_artifact`, which does the same and waits, raises
        started._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        started.use_artifact(artifact)


def _settings(run: Run) -> "wandb.Artifact":
    import wandb

    rows = {n: part["fingerprint"] for n, part in run.record().get("rows", {}).items()}
    made = wandb.Artifact(f"settings-{run_id(run)}", "settings", metadata={"rows": rows})
    with made.new_file("config.yaml", encoding="utf-8") as file:
        file.write(storage.read_text(run.config_file))
    return made


def result(run: Run, stage: str) -> "wandb.Artifact":
    """An adapter with its weights; of whole weights, which are large, the checksums alone."""
    import wandb

    folder = run.stage(stage)
    adapter = (folder / "adapter_config.json").is_file()
    made = wandb.Artifact(f"{stage}-{run_id(run)}", "adapter" if adapter else "weights")
    names = [storage.CHECKSUMS, *(["adapter_config.json"] if adapter else [])]
    files = [folder / name for name in names]
    files += sorted(folder.glob("adapter_model*.safetensors"))
    for file in files:
        if file.is_file():
            made.add_file(str(file), policy="immutable")  # not copied: a result never changes
    return made
