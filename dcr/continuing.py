"""Whether a command may go on in a run folder: what decides its weights must be what it was.

That is the configuration, the rows, and the weights that a stage starts from. A precision that was
left to the device is what it was when the run began.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dcr.core import machine, storage
from dcr.core.config import STAGES, ConfigError, Language, Precision, Quantization, Stage
from dcr.core.config.training import NLLSource, TrainConfig, stages_of
from dcr.core.machine import Settled
from dcr.core.runs import RESTORE, Run

log = logging.getLogger(__name__)

# keys that may differ between two commands that continue one run
FREE_KEYS = ("stage", "plan", "force", "run", "at_most", "trainer", "wandb")
# prefixes of differences of settings, rows and weights that a finished stage does not depend on
OF_READOUT = ("sft.readout", "readout")
OF_LATER = {"contrastive": ("sft.", "sft: ", "safety", *OF_READOUT), "sft": OF_READOUT}


def with_precisions(
    settings: TrainConfig, recorded: Mapping[str, Precision] | None = None
) -> tuple[TrainConfig, Settled]:
    """The settings with the precision of `auto` for each stage and for the run's evaluations."""
    dcr, sft = settings.dcr, settings.sft
    stages = {"contrastive": dcr.precision, "sft": sft.precision}
    trained = {  # the readout in what SFT was
        "contrastive" if stage is Stage.contrastive else "sft" for stage in stages_of(settings)
    }
    accelerator, unused = settings.trainer.accelerator, stages.keys() - trained
    found = machine.settled(stages, accelerator, recorded, unused)
    first, second = found.precisions["contrastive"], found.precisions["sft"]
    top = settings.precision
    made = replace(
        settings,
        precision=machine.evaluated_in(second) if top is Precision.auto else top,
        dcr=replace(dcr, precision=first),
        sft=replace(sft, precision=second),
    )
    return made, found


def binding(made_with: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that decides a run's weights, without options that are off."""
    decisive = {key: value for key, value in made_with.items() if key not in FREE_KEYS}
    if not decisive.get("own"):  # as in runs from before this key, whose fingerprint stays
        decisive.pop("own", None)
    sft = dict(decisive.get("sft") or {})
    if not (sft.get("readout") or {}).get("steps"):
        sft.pop("readout", None)
    decisive["sft"] = sft
    return decisive | {"model": binding_model(decisive.get("model") or {})}


def binding_model(made_with: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration's model that decides its weights."""
    decisive = {**made_with, "trust_remote_code": False}  # each command sets it for itself
    # Runs from before these keys lack them: at its default a key is left out, so that such a run
    # keeps its fingerprint and goes on by the same command.
    if decisive.get("quantization") in (Quantization.none, Quantization.none.value):
        del decisive["quantization"]
    if not decisive.get("template_variables"):
        decisive.pop("template_variables", None)
    if decisive.get("close_thoughts") is None:
        decisive.pop("close_thoughts", None)
    if decisive.get("language") in (Language.en, Language.en.value):
        del decisive["language"]
    return decisive


def of_general_pairs(made_with: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of SFT that stage one depends on: of the pairs of its NLL, where it has them."""
    nll, sft = (made_with.get("dcr") or {}).get("nll") or {}, made_with.get("sft") or {}
    if nll.get("source") != NLLSource.general.value or not nll.get("weight"):
        return {}
    return {f"sft.{key}": sft.get(key) for key in ("max_len", "train_on_prompt")}


def claim(run: Run, made_with: Mapping[str, Any], record: Mapping[str, Any], force: bool) -> None:
    """Takes the folder for a command with this configuration and these rows.

    Raises ConfigError where `check_config` or `check_rows` does; with `force` what is not done
    begins anew.
    """
    anew = check_config(run, made_with, force)
    anew |= check_rows(run, record, force)
    if anew:  # nothing refuses this command any more
        begin_anew(run)


def check_config(run: Run, made_with: Mapping[str, Any], force: bool) -> bool:
    """Whether what is not done has to begin anew, as the configuration in the folder is another.

    Raises ConfigError with the differences if the folder belongs to another configuration and
    `force` is off, or a finished stage depends on them.
    """
    if run.config_file.exists():
        # only the stages' own precision matters, not the key that they take it from
        before, now = (binding(each) | {"precision": None} for each in (run.config(), made_with))
        changed, needed = storage.differences(before, now), tuple(of_general_pairs(made_with))
        return _differs(run, "made with another configuration", changed, force, needed)
    return False


def check_rows(run: Run, record: Mapping[str, Any], force: bool) -> bool:
    """The same for the lists of rows in `rows.json` (`data.row_record`).

    The lists include every source of a user's own.
    """
    if run.rows_file.exists():
        before, now = _row_lists(run.record()), _row_lists(record)
        return _differs(run, "made with other rows", storage.differences(before, now), force)
    return False


def _row_lists(record: Mapping[str, Any]) -> dict[str, str]:
    lists = {
        name: f"{rows['count']} rows ({rows['fingerprint'][:8]})"
        for name, rows in record.get("rows", {}).items()
    }
    own = record.get("own", {}).items()
    return lists | {path: f"source sha256 {made['sha256'][:8]}" for path, made in own}


def claim_base(run: Run, stage: str, weights: str, force: bool) -> None:
    """Records the weights that a stage starts from, or checks that they are still the same.

    Raises ConfigError if they changed, as `check_config` does.
    """
    known: dict[str, str] = {}
    if run.base_file.exists():
        known = storage.read_json(run.base_file, dict[str, str], RESTORE)
    known = {name: base for name, base in known.items() if name == stage or run.done(name)}
    now = {**known, stage: weights}
    changed = storage.differences(known, now) if stage in known else []
    if _differs(run, "made from other weights", changed, force):
        begin_anew(run)
    storage.write_json(run.base_file, now)


def claim_start(run: Run, stage: Stage, policy: Any, force: bool) -> None:
    """The same for the `models.Policy` that a stage starts from."""
    name, commit = Path(policy.name), getattr(policy.model.config, "_commit_hash", None)
    weights = storage.weights_fingerprint(name) if name.is_dir() else f"{policy.name}@{commit}"
    claim_base(run, stage.value, weights, force)


def _differs(
    run: Run, how: str, changed: list[str], force: bool, needed: tuple[str, ...] = ()
) -> bool:
    """Whether unfinished stages begin anew, as `force` lets them in a folder of other settings.

    Raises ConfigError for such a folder without it.

    A finished stage stays, so `force` does not help if it depends on the change: settings, weights
    and card would disagree. `needed` are settings of SFT that stage one depends on.
    """
    if not changed:
        return False
    fault = f"{run.folder} was {how} ({'; '.join(changed[:6])})"
    done = [stage.value for stage in STAGES if run.done(stage.value)]
    of_later = OF_LATER.get(done[-1], ()) if done else ()
    if done and not all(c.startswith(of_later) and not c.startswith(needed) for c in changed):
        raise ConfigError(
            f"{fault}; {done[-1]} is done there and would not be trained anew: name another "
            "folder with run="
        )
    if done[-1:] == ["sft"] and not run.checkpoints("readout").exists():
        return False  # a readout that follows a finished SFT
    if not force:
        raise ConfigError(
            f"{fault}; name another folder with run=, or force=true to begin anew what is not done"
        )
    log.warning("%s: what is not done begins anew", fault)
    return True


def begin_anew(run: Run) -> None:
    """Deletes what stages that are not done have left."""
    unfinished = [stage.value for stage in STAGES if not run.done(stage.value)]
    for stage in unfinished:
        shutil.rmtree(run.checkpoints(stage), ignore_errors=True)
        shutil.rmtree(run.tracked(stage), ignore_errors=True)
    if "sft" in unfinished:
        shutil.rmtree(run.snapshots, ignore_errors=True)
    if len(unfinished) == len(STAGES):
        run.layer_file.unlink(missing_ok=True)
