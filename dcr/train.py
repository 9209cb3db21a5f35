"""The stages of a method in a run folder: what `dcr.commands` calls with resolved settings."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from lightning.pytorch.utilities import rank_zero_only

from dcr.core import config, data, extending, machine, models, runs, storage, training
from dcr.core.config import Method
from dcr.core.config.training import AUTO_LAYER, TrainConfig, block_of, stages_of
from dcr.core.data import Splits
from dcr.core.runs import Run
from dcr.core.storage import Lease
from dcr.core.training import Job, Show, Watch, callbacks, stages

log = logging.getLogger(__name__)


def train(settings: TrainConfig, run: Run) -> None:
    """Run the stages of a method in a run folder, going on from whatever is done there.

    Raises UserError for anything a user can mend, before weights are loaded where it can be known,
    TrainingError when training had to stop and Interrupted after a signal.
    """
    wanted = stages_of(settings)
    settings, arithmetic = extending.part("with_precisions")(settings, run.precisions())
    rows = checked(settings, run)
    trains = not all(run.done(stage.value) for stage in wanted)
    if trains:
        arithmetic.say()
    watch: Watch | None = extending.ours(settings.table.watching)
    watched = watch(settings) if watch else None
    show: Show | None = extending.ours(settings.table.showing) if _leads() else None
    with (
        callbacks.quiet(),
        _claimed(settings, run, rows) as lease,
        show(settings, run) if show else nullcontext(([], None)) as (loggers, shown),
    ):
        number = machine.use_threads(settings.trainer.threads, run.threads())
        if _leads() and trains:
            storage.write_json(run.threads_file, {"threads": number})
        job = Job(settings, run, rows, _block(settings, run), lease, loggers, watched)
        for stage in wanted:
            if run.done(stage.value):
                log.info("%s: done in %s, skipped", stage.value, run.stage(stage.value))
                # left by a kill right after the result was saved
                training.forget_checkpoints(run, stage)
            else:
                stages.train_stage(stage, job)
            if shown:
                shown(stage.value)
    if _leads():
        print(run.folder)


def checked(settings: TrainConfig, run: Run) -> Splits:
    """The rows of a run, and a UserError for all that can be known wrong before weights open."""
    extending.part("check_settings")(settings)
    rows = data.rows_of(settings)
    extending.part("check_stages")(settings, run, rows)
    return rows


def _block(settings: TrainConfig, run: Run) -> int:
    """The block that stage one reads; with `auto` measured once and kept in the run folder."""
    if settings.dcr.layer != AUTO_LAYER or settings.method is not Method.dcr:
        return block_of(settings.dcr, models.facts(settings.model).depth)
    if (known := run.block()) is not None:
        return known
    block: int = extending.ours(settings.table.best_layer)(settings)
    if _leads():
        storage.write_json(run.layer_file, {"block": block})
    return block


def _leads() -> bool:
    """Whether this process is the first of the job's, the one that writes."""
    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def _claimed(settings: TrainConfig, run: Run, rows: Splits) -> Iterator[Lease | None]:
    """The run folder as this command's own: locked, and made with these settings and rows."""
    if not _leads():  # the process that does holds the folder for all
        yield None
        return
    before = set(os.listdir(run.folder)) if run.folder.is_dir() else set()
    with storage.locked(run.folder) as lease:
        try:
            made_with = config.plain(settings)
            extending.part("claim")(run, made_with, data.row_record(rows), settings.force)
            about, warnings = extending.part("examine")(rows)
            storage.write_json(run.rows_file, data.row_record(rows, about))
            runs.write_config(run, made_with)
            drawn = (f"{len(part)} {name}" for name, part in rows.parts().items() if part)
            log.info("rows: %s", ", ".join(drawn))
            for line in rows.told():
                log.info(line)
            for line in warnings:
                log.warning(line)
            yield lease
        except BaseException:
            if lease.holds():  # else the folder is gone, or another's
                _take_back(run, before)
            raise


def _take_back(run: Run, before: set[str]) -> None:
    """A command that failed before its first step leaves the folder as it found it."""
    made = set(os.listdir(run.folder)) - before
    if not made <= runs.BEFORE_TRAINING:
        return
    for place in map(run.folder.joinpath, made):
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    if not before:
        run.folder.rmdir()
