"""Evaluates what settings name: completions, verdicts, metrics; `dcr.commands` calls it."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dcr.core import config, extending, machine, runs, storage
from dcr.core.config import ConfigError, DataError, Method, Precision
from dcr.core.config.evaluation import EvalConfig
from dcr.core.runs import Run

Settings = TypeVar("Settings", bound=EvalConfig)


def settle_precision(
    settings: Settings, recorded: Mapping[str, Precision] | None = None
) -> tuple[Settings, machine.Settled]:
    """The settings with the precision that `auto` means for a model here and for guards."""
    accelerator = settings.trainer.accelerator
    found = machine.settled({"evaluation": settings.precision}, accelerator, recorded)
    others = {
        name: replace(node, precision=own.precisions["evaluation"])
        for name, node in vars(settings).items()
        if hasattr(node, "precision")
        for own in [machine.settled({"evaluation": node.precision}, accelerator)]
    }
    if settings.endpoint is None:
        settings = replace(settings, precision=found.precisions["evaluation"])
    return replace(settings, **others), found


def evaluate(settings: EvalConfig, run: Run) -> None:
    """Answer what is unanswered, judge what is unjudged, count, and write `metrics.json`."""
    # not at the top: what is asked is checked before torch is loaded
    from dcr.core.evaluation import metrics, subjects

    config.check_bitsandbytes(settings.model)
    settings, arithmetic = settle_precision(settings, run.precisions() if settings.run else {})
    if settings.endpoint is None:
        arithmetic.say()
    found = subjects.subjects(settings, run)
    metrics.check(settings, run)
    asked = metrics.read(settings)
    metrics.check_prompts(settings, run, asked)
    place = run.folder / "eval"
    if place.exists() and not place.is_dir():
        raise DataError(f"{place}: a file or a device, not a folder; move it away")
    machine.use_threads(settings.trainer.threads)
    with storage.locked(run.folder), _claimed(settings, run), ExitStack() as stack:
        showing = extending.ours(settings.table.showing)
        show = stack.enter_context(showing(settings, run)) if showing else None
        for subject in found:
            measured, answers = metrics.measure(settings, run, subject, asked)
            if show:
                show(measured, answers)


@contextmanager
def _claimed(settings: EvalConfig, run: Run) -> Iterator[None]:
    """The folder with a `config.yaml` of what is evaluated; a run's own stays as it is.

    Where a command ends before it has kept anything, the folder is as it was before.
    """
    before = run.config_file.read_bytes() if run.config_file.is_file() else None
    kept = _kept(run)
    try:
        if settings.run is None:
            if run.config_file.exists() and run.config()["method"] in Method.__members__:
                raise ConfigError(
                    f"output={run.folder}: is the folder of a trained run; evaluate it with run=, "
                    "or name another"
                )
            method = "endpoint" if settings.endpoint else "base"
            made: dict[str, Any] = {"method": method, "seed": settings.seed, "preset_name": "-"}
            if settings.endpoint is None:
                made["precision"] = settings.precision.value
            made |= {"model": config.plain(settings.model), "data": config.plain(settings.data)}
            runs.write_config(run, made)
        yield
    except BaseException:
        if settings.run is None and _kept(run) == kept:
            if before is None:
                run.config_file.unlink(missing_ok=True)
            else:
                storage.write_bytes(run.config_file, before)
        raise


def _kept(run: Run) -> set[Path]:
    """Answers, verdicts and vectors: what a later command need not make again."""
    return {file for name in ("eval", "steering") for file in (run.folder / name).rglob("*.*")}
