"""Stages that a run takes over from another with the same settings and rows, by hard links.

Runs that agree in model, data, seed and `dcr` share stage one, if the pairs that its NLL may learn
are laid out alike. Those that agree in everything but the readout share SFT.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dcr import continuing, ending
from dcr.core import config, data, runs, storage
from dcr.core.config import DataError, Stage, UserError
from dcr.core.config.training import TrainConfig, stages_of
from dcr.core.runs import Run
from dcr.ending import single_line
from dcr.stages import Cost

STAGE_ONE = ("model", "data", "dcr", "seed", "tracking")  # nodes that decide its weights and log
STAGE_ONE_ROWS = ("seemingly_toxic", "toxic", "normal")
NAMES = {Stage.contrastive: "stage one", Stage.sft: "SFT", Stage.readout: "readout"}


def adopted(run: Run) -> dict[str, str]:
    """By stage the name of the folder that a run took it over from."""
    return _by_stage(run.adopted_file)


def _by_stage(file: Path) -> dict[str, str]:
    return storage.read_json(file, dict[str, str]) if file.exists() else {}


def made_of(made_with: Mapping[str, Any], stage: Stage) -> str:
    """A fingerprint of the part of a run's configuration that a shared stage depends on."""
    decisive = continuing.binding(made_with)
    if stage is Stage.contrastive:
        nodes = {key: decisive.get(key) for key in STAGE_ONE}
        return storage.fingerprint(nodes | continuing.of_general_pairs(decisive))
    sft = {key: value for key, value in decisive["sft"].items() if key != "readout"}
    return storage.fingerprint(decisive | {"sft": sft})


def adopt(settings: TrainConfig, run: Run, stage: Stage) -> bool:
    """Take over a stage from a run beside this one that has the same settings and rows, if any.

    Files are hard-linked where the disk can, which takes no room. A donor with damaged files is
    named in one line and passed over.
    """
    found = donors(settings, run, stage)
    if not found:
        return False
    from dcr import train as training_script

    record = data.row_record(training_script.checked(settings, run))
    for donor in found:
        try:
            with ending.faults_in_words():
                taken = _take_over(donor, run, settings, record, stage)
        except UserError as fault:
            told = f"no {NAMES[stage]} is taken over: {single_line(fault)}"
            print(told, file=sys.stderr, flush=True)
            continue
        if taken:
            print(f"taken over from {donor.folder}")
            return True
    return False


def donors(settings: TrainConfig, run: Run, stage: Stage) -> list[Run]:
    """The runs beside a run that have done this stage with the same settings."""
    settled, _ = continuing.with_precisions(settings, run.precisions())
    key, found = made_of(config.plain(settled), stage), []
    for file in sorted(run.folder.parent.glob("*/config.yaml")):
        donor = Run(file.parent)
        with suppress(UserError):  # a damaged run has nothing to give
            if donor.folder != run.folder and donor.done(stage.value):
                found += [donor] if made_of(donor.config(), stage) == key else []
    return found


def _rows_of(record: Mapping[str, Any], stage: Stage) -> dict[str, str]:
    """The fingerprints of the rows that a shared stage depends on."""
    rows = record["rows"]
    names = [name for name in rows if not name.startswith("readout")]
    if stage is Stage.contrastive:
        names = [name for name in STAGE_ONE_ROWS if name in rows]
    own = {path: made["sha256"] for path, made in record.get("own", {}).items()}
    return {name: rows[name]["fingerprint"] for name in names} | own


def _take_over(
    donor: Run, run: Run, settings: TrainConfig, record: Mapping[str, Any], stage: Stage
) -> bool:
    """Copy a stage of a donor that started from the same weights and learnt from the same rows.

    Returns whether it did. Raises UserError, before anything is written, where a file of the donor
    is damaged.
    """

    name, weights = stage.value, donor.stage(stage.value)
    first = stage is stages_of(settings)[0]
    folder = Path(settings.model.name) if first else run.stage("contrastive")
    now = storage.weights_fingerprint(folder) if folder.is_dir() else None
    started = storage.read_json(donor.base_file, dict[str, str], runs.RESTORE).get(name)
    if started is None:
        raise DataError(f"{donor.base_file}: {name}: missing; {runs.RESTORE}")
    if _rows_of(donor.record(), stage) != _rows_of(record, stage) or now not in (None, started):
        return False
    storage.check_checksums(weights)
    logged = [row for row in runs.read_metrics(donor) if row["stage"] == name]
    block, cost_file = donor.block(), donor.cost_file(name)
    spent = storage.read_json(cost_file, Cost) if cost_file.exists() else None
    with storage.locked(run.folder):
        for source, target in (
            (donor.tracked(name), run.tracked(name)),
            *([(donor.snapshots, run.snapshots)] if stage is Stage.sft else []),
        ):
            if source.is_dir():
                with storage.replaced_folder(target) as staging:
                    _copy(source, staging)
        with storage.replaced_folder(run.stage(name)) as staging:  # its end makes the stage done
            _copy(weights, staging)
            # only now: a run that failed to take it over trains the stage itself
            storage.write_json(run.adopted_file, adopted(run) | {name: donor.folder.name})
            storage.write_json(run.base_file, _by_stage(run.base_file) | {name: started})
            runs.forget_metrics_beyond(run, name, 0)
            runs.append_metrics(run, ([row[key] for key in runs.METRIC_FIELDS] for row in logged))
            if block is not None and stage is Stage.contrastive:
                storage.write_json(run.layer_file, {"block": block})
            if spent is not None:
                storage.write_json(run.cost_file(name), asdict(spent))
    return True


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
