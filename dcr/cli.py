"""What both Hydra entry points share: run-folder names, and errors in one line with an exit code."""

import difflib
import functools
import hashlib
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from dcr import runs
from dcr.config import EvalConfig, TrainConfig, UserError
from dcr.models import safe_label


def prepare() -> None:
    """Register schemas and resolvers, and let Hydra raise instead of printing several lines."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="eval_schema", node=EvalConfig)
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
    if {"-m", "--multirun"} & set(sys.argv):
        # the group that makes a sweep one dashboard: the same command gives the same group
        named = hashlib.sha256(" ".join(sys.argv[1:]).encode()).hexdigest()[:8]
        os.environ.setdefault("DCR_SWEEP", f"sweep-{named}")
    _quieten()


def _quieten() -> None:
    """Hide what no user can act on, so that what remains is worth reading."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*already been called.*", module="lightning")


def _run_folder(parent: str = "", *, _root_: DictConfig) -> str:
    """A name that follows from the configuration, so that the same command finds its run."""
    named = _root_.get("run")
    if named:
        return str(named)
    plain = OmegaConf.to_container(_root_, resolve=False)
    assert isinstance(plain, dict)
    settings = runs.binding({str(k): v for k, v in plain.items() if k != "hydra"})
    label = safe_label(str(_root_.model.get("label") or _root_.model.name))
    name = f"{label}-{getattr(_root_.method, 'name', _root_.method)}-{runs.fingerprint(settings)}"
    return f"{parent}/{name}" if parent else name


@dataclass(frozen=True)
class Outcome:
    """How one job of a command ended."""

    overrides: str
    folder: Path
    seconds: float
    error: Exception | None


OUTCOMES: list[Outcome] = []  # of this process's jobs, in order: a sweep reports them at its end


def job(function: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Wrap a Hydra task: note how it ended, and leave no trace of a job that wrote nothing.

    A user's error is kept for `run` to print in one line; in a sweep any error is, so that the
    jobs behind it still run. Launchers that start other processes see the error itself.
    """

    @functools.wraps(function)
    def noted(composed: DictConfig) -> None:
        began, error = time.perf_counter(), None
        kept = Exception if _sweeps_here() else UserError
        try:
            function(composed)
        except kept as caught:
            if not isinstance(caught, UserError):
                traceback.print_exception(caught)
            if _sweeps_elsewhere():
                raise
            error = caught
        finally:
            forget_empty(output_folder())
        overrides = " ".join(HydraConfig.get().overrides.task)
        OUTCOMES.append(Outcome(overrides, output_folder(), time.perf_counter() - began, error))

    return noted


def _launcher() -> str:
    return str(HydraConfig.get().launcher.get("_target_", ""))


def _sweeps_here() -> bool:
    return HydraConfig.get().mode is RunMode.MULTIRUN and "BasicLauncher" in _launcher()


def _sweeps_elsewhere() -> bool:
    return HydraConfig.get().mode is RunMode.MULTIRUN and "BasicLauncher" not in _launcher()


def run(main: Callable[[], Any]) -> None:
    """Call a Hydra main; a user's error becomes one line on stderr and exit code 2."""
    prepare()
    try:
        main()
    except UserError as error:
        _fail(str(error), error.exit_code)
    except (HydraException, OmegaConfBaseException) as error:
        _fail(_one_line(error), 2)
    failed = [outcome for outcome in OUTCOMES if outcome.error is not None]
    if len(OUTCOMES) > 1:
        _print_sweep(OUTCOMES)
        sys.exit(1 if failed else 0)
    if failed:
        _fail(str(failed[0].error), getattr(failed[0].error, "exit_code", 1))


def _print_sweep(outcomes: list[Outcome]) -> None:
    table = Table("job", "folder", "minutes", "outcome")
    for outcome in outcomes:
        ended = "done" if outcome.error is None else " ".join(str(outcome.error).split())
        minutes = f"{outcome.seconds / 60:.1f}"
        table.add_row(outcome.overrides, str(outcome.folder), minutes, ended)
    Console(stderr=True).print(table)


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _one_line(error: Exception) -> str:
    """Hydra's several lines as one that names the key and the nearest name that exists."""
    text = str(error)
    unknown = re.search(r"Key '([^']+)' (?:is )?not in '?(\w+)", text)
    path = re.search(r"full_key: (\S+)", text)
    if unknown and path:
        key = path.group(1)
        near = difflib.get_close_matches(key, _keys(TrainConfig()) + _keys(EvalConfig()), n=1)
        return f"{key}: no such setting" + (f"; did you mean {near[0]}?" if near else "")
    override = re.search(r"Could not override '([^']+)'", text)
    if override and "not in" in text:
        key = override.group(1)
        near = difflib.get_close_matches(key, _keys(TrainConfig()) + _keys(EvalConfig()), n=1)
        return f"{key}: no such setting" + (f"; did you mean {near[0]}?" if near else "")
    if path:
        reason = text.splitlines()[0]
        return f"{path.group(1)}: {reason}"
    return re.sub(r"\s+", " ", text.split("To append to your config")[0])


def _keys(node: object, prefix: str = "") -> list[str]:
    assert is_dataclass(node)
    found = []
    for entry in fields(node):
        value = getattr(node, entry.name)
        found.append(prefix + entry.name)
        if is_dataclass(value):
            found += _keys(value, f"{prefix}{entry.name}.")
    return found


def output_folder() -> Path:
    """The folder Hydra made for this job."""
    return Path(HydraConfig.get().runtime.output_dir)


def forget_empty(folder: Path) -> None:
    """Remove the folder Hydra made if nothing was written, so that a bad command leaves no trace."""
    for place in (folder, *folder.parents[:1]):
        if place.is_dir() and place != Path.cwd() and not any(place.iterdir()):
            place.rmdir()


def plain(config: object) -> dict[str, Any]:
    """A dataclass tree as plain YAML values."""
    values = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    assert isinstance(values, Mapping)
    return {str(key): value for key, value in values.items()}
