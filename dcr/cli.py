"""The command line of Hydra's two scripts: `run` calls a Hydra main, whose jobs `job` wraps.

A user's error is one line on stderr and exit code 2, a signal one line and 128 plus its number.
`compose` gives any other command the settings of `train.py` or `eval.py`.
"""

import argparse
import functools
import hashlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.console import Console
from rich.table import Column, Table

from dcr import continuing, ending, resolving
from dcr.core import config, storage
from dcr.core.config import ConfigError, ModelConfig, UserError
from dcr.core.config.evaluation import EvalConfig
from dcr.core.config.training import TrainConfig
from dcr.core.runs import Run
from dcr.core.text import label_of

log = logging.getLogger(__name__)

Settings = TypeVar("Settings", bound=EvalConfig)

# Options of Hydra's that take settings from elsewhere, and with them code to run.
REFUSED_OPTIONS = {
    "experimental_rerun": "it would unpickle a file, and run whatever code that holds",
    "config_dir": "its files could name code to run, as Hydra's callbacks",
    "config_path": "its files could name code to run, as Hydra's callbacks",
    "config_name": "each script has one of its own",
}
# Fields that belong to the name, and so stay when another model is named.
WITH_ANY_NAME = ("name", "revision", "trust_remote_code", "quantization")
# Counts of rows, which give way to what there is where a command names none of them.
COUNTS = ("data.seemingly_toxic.count", "data.safety.count", "data.normal.count", "dcr.ratio")
# Entries of `config.json` that make two models one architecture.
SHAPE = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")


def prepare() -> None:
    """Register schemas and resolvers, and quieten libraries."""
    _register(*ending.SCHEMAS.items())
    # the store hands out copies, so Hydra need not copy it whole for each group it lists
    ConfigStore.__deepcopy__ = lambda store, _: store  # pyright: ignore
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
    OmegaConf.register_new_resolver("choice", _choice, replace=True)
    ending.quieten()
    logging.setLogRecordFactory(ending.SafeRecord)


@functools.cache  # a study composes dozens of settings, and this takes half the time of one
def _register(*schemas: tuple[str, type]) -> None:
    for name, schema in schemas:
        node = OmegaConf.structured(schema)
        if not issubclass(schema, TrainConfig):
            _unset(node.data)  # what no one names comes from the run, whatever the default
        _open(node)
        ConfigStore.instance().store(name=f"{name}_schema", node=node)


def _open(node: DictConfig) -> None:
    """Leaves the keys of plain dictionaries, such as `own`, to the user."""
    for key in node:
        kind = OmegaConf.get_type(node, str(key))
        if kind is dict:
            OmegaConf.set_struct(node[key], False)
        elif is_dataclass(kind):
            _open(node[key])


def _unset(node: DictConfig) -> None:
    for key in node:
        if not OmegaConf.is_missing(node, key) and OmegaConf.is_dict(node[key]):
            _unset(node[key])
        else:
            node[key] = MISSING


def _choice(key: str, *, _root_: DictConfig) -> str:
    """A setting as part of a folder's name: `${choice:method}` is stl, `${method}` Method.stl."""
    value = OmegaConf.select(_root_, key)
    return str(getattr(value, "name", value))


def _run_folder(parent: str = "", *, _root_: DictConfig) -> str:
    """A name that follows from the configuration, so that the same command finds its run."""
    named = _root_.get("run")
    if named:
        return str(named)
    plain = OmegaConf.to_container(_root_, resolve=False)
    assert isinstance(plain, dict)
    settings = continuing.binding({str(k): v for k, v in plain.items() if k != "hydra"})
    model = _root_.model
    given = "label" in _fields_of_model(_overrides(_root_.hydra))
    of_another = names_another_model(model) and not given
    label = label_of(str((not of_another and model.get("label")) or model.name))
    method = getattr(_root_.method, "name", _root_.method)
    name = f"{label}-{method}-{storage.fingerprint(settings)}"
    return f"{parent}/{name}" if parent else name


def _overrides(hydra: Any) -> list[str]:
    """The overrides of the command, or of this job of a sweep, as written."""
    written = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    assert isinstance(written, list)
    return [str(override) for override in written]


def _fields_of_model(overrides: Sequence[str]) -> list[str]:
    """The fields of `model` that a command sets, one by one rather than by a file."""
    keys = [override.lstrip("+~").split("=")[0] for override in overrides]
    return [key.split(".")[1] for key in keys if key.startswith("model.")]


def _give_way(composed: DictConfig, overrides: Sequence[str]) -> None:
    """Change what depends on which settings the command names: the others give way to them."""
    leave_numbers_of_another_model(composed, _fields_of_model(overrides))
    given = {override.lstrip("+~").split("=")[0] for override in overrides}
    if "at_most" in composed and "at_most" not in given:
        composed.at_most = [key for key in COUNTS if not {key, key.rpartition(".")[0]} & given]


def names_another_model(model: DictConfig) -> bool:
    """Whether `model.name` is another model's than the one the other numbers were set for."""
    return model.get("numbers_for") not in (None, model.get("name"))


def leave_numbers_of_another_model(config: DictConfig, keep: Collection[str] = ()) -> None:
    """Put defaults in `config.model` where a file set them for another model than the one named.

    A local folder of the same architecture keeps them all: it is a copy, or trained from one. What
    does not apply is logged in one line. `keep` names the fields that the user set for this model.
    Changes `config`; once is enough.
    """
    model = config.model
    if not names_another_model(model):
        return
    name = str(model.name)
    written: Any = OmegaConf.to_container(model, resolve=False)  # as text that is resolved once
    kept: dict[str, Any] = {key: written[key] for key in (*WITH_ANY_NAME, *keep) if key in model}
    label = kept.get("label") or label_of(name)
    unlike = _unlike(model, name)
    if unlike is None:
        model.numbers_for, model.label = name, label
        if "architecture" not in keep:
            model.architecture = None  # the folder's own says more, such as its context
        return
    plain = ModelConfig(name=name)
    left = [
        f"{key}={getattr(value, 'value', value)}"
        for key, value in model.items()
        if key not in {*kept, "label", "numbers_for", "architecture"}
        and value != getattr(plain, str(key))
    ]
    if left:
        log.warning(
            "model.name=%s: %s, so what was set for %s does not apply: %s (model.<key>= sets one)",
            name,
            unlike,
            model.numbers_for,
            " ".join(left),
        )
    config.model = OmegaConf.structured(ModelConfig(**{**kept, "label": label}))


def _unlike(model: DictConfig, name: str) -> str | None:
    """The reason why the folder `name` is no copy of the model's architecture; None if it is."""
    try:
        read = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        shape = {key: (read.get("text_config") or read).get(key) for key in SHAPE}
    except (OSError, ValueError, AttributeError, RecursionError):
        return "no folder with a config.json to compare"
    for key in SHAPE:
        wanted = (model.get("architecture") or {}).get(key)
        if wanted is None or shape[key] != wanted:
            return f"its {key} is {shape[key]}, not {wanted}"
    return None


@dataclass(frozen=True)
class Outcome:
    """How one job of a command ended."""

    overrides: list[str]
    folder: Path
    seconds: float
    error: Exception | None


OUTCOMES: list[Outcome] = []  # of this process's jobs, in order: at the end, a sweep reports them


def job(function: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Wrap a Hydra task: note how it ended, and leave no trace of a job that wrote nothing.

    A user's error is kept for `run` to print in one line; in a sweep any error is, so that the
    jobs behind it still run. A signal ends the whole sweep. Launchers that start other processes
    see the error itself.
    """

    @functools.wraps(function)
    def noted(composed: DictConfig) -> None:
        began, error = time.perf_counter(), None
        overrides = _overrides(HydraConfig.get())
        ending.BEGUN.append(overrides)
        kept = Exception if _sweeps(here=True) else UserError
        try:
            with ending.faults_in_words():
                _give_way(composed, overrides)
                function(composed)
        except kept as caught:
            if _sweeps(here=False):
                raise
            if not isinstance(caught, UserError):
                ending.print_traceback(caught)
            elif caught.exit_code > ending.SIGNALLED:
                ending.fail(str(caught), caught.exit_code)
            error = caught
        finally:
            forget_empty(output_folder())
        spent = time.perf_counter() - began
        # eval.py writes into the run that it evaluates
        folder = Path(composed.run or composed.get("output") or output_folder())
        OUTCOMES.append(Outcome(overrides, folder, spent, error))

    return noted


def _sweeps(here: bool) -> bool:
    """Whether this is one job of several, in this process or in one that a launcher started."""
    basic = "BasicLauncher" in str(HydraConfig.get().launcher.get("_target_", ""))
    return HydraConfig.get().mode is RunMode.MULTIRUN and basic is here


def run(main: Callable[[], Any]) -> None:
    """Call a Hydra main; a user's error becomes one line on stderr and exit code 2."""
    prepare()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise instead of printing several lines
    ending.BEGUN.clear()
    OUTCOMES.clear()
    sweep = {"-m", "--multirun"} & set(sys.argv)
    if sweep:
        # the group that makes a sweep one dashboard: the same command gives the same group
        named = hashlib.sha256(" ".join(sys.argv[1:]).encode()).hexdigest()[:8]
        os.environ.setdefault("DCR_SWEEP", f"sweep-{named}")
    try:
        with ending.safe_output(), ending.stopped_by(goes_on=True), ending.faults_in_words():
            _check_command_line()
            main()
    except UserError as error:
        ending.fail(str(error), error.exit_code)
    except (HydraException, ValueError, TypeError, AttributeError) as error:
        if ending.BEGUN:
            raise
        ending.fail(ending.setting_fault(error), ConfigError.exit_code)
    finally:
        if sweep:
            _forget_sweep()
    failed = [outcome for outcome in OUTCOMES if outcome.error is not None]
    if len(OUTCOMES) > 1:
        _print_sweep(OUTCOMES)
        sys.exit(1 if failed else 0)
    if failed:
        ending.fail(str(failed[0].error), getattr(failed[0].error, "exit_code", 1))


def _forget_sweep() -> None:
    """Remove Hydra's record of a sweep (each run has its own), and its folder if no job wrote."""
    key = "hydra.sweep.dir="
    named = [argument.removeprefix(key) for argument in sys.argv if argument.startswith(key)]
    folder = Path(named[-1].strip("'\"") if named else "multirun")
    with suppress(OSError):  # not there, or its folder is none
        (folder / "multirun.yaml").unlink()
    forget_empty(folder)


def _check_command_line() -> None:
    """Refuse what Hydra's parser would refuse in several lines."""
    parser = get_args_parser()
    parser.exit_on_error = False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        known, unknown = parser.parse_known_args()
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    for option, does in REFUSED_OPTIONS.items():
        if getattr(known, option, None):
            flag = f"--{option.replace('_', '-')}"
            raise ConfigError(f"{flag}: {does}; write settings key=value instead")
    _refuse_intervals(known.overrides)
    for argument in unknown:
        cure = "settings are written key=value" if argument[0] == "-" else "options come first"
        raise ConfigError(f"{argument}: {cure}, as in -m dcr.epochs=1,2")


def _refuse_intervals(overrides: Sequence[str]) -> None:
    """Raises ConfigError for what Hydra's sweeper refuses without saying of which setting."""
    for word in overrides:
        key, _, value = word.partition("=")
        if re.match(r"(tag\(.*)?interval\(", value):
            raise ConfigError(
                f"{word}: a sweep takes values, as in {key}=1,2 or range(1,4), and python -m "
                f"dcr.search an interval, {key}=<low>..<high>"
            )


def _print_sweep(outcomes: list[Outcome]) -> None:
    """A row for each job, told apart by the overrides that differ, and a line for each error."""
    shared = set.intersection(*(set(outcome.overrides) for outcome in outcomes))
    table = Table("job", "minutes", "outcome", Column("folder", overflow="fold"))
    errors: list[str] = []
    for outcome in outcomes:
        job = ending.single_line(" ".join(o for o in outcome.overrides if o not in shared))
        ended = "done" if outcome.error is None else "failed"
        table.add_row(job, f"{outcome.seconds / 60:.1f}", ended, os.path.relpath(outcome.folder))
        if outcome.error is not None:
            what = ending.single_line(outcome.error) or type(outcome.error).__name__
            errors.append(f"{job}: {what}")
    Console(stderr=True, markup=False, emoji=False).print(table)
    for line in errors:
        print(line, file=sys.stderr)


def output_folder() -> Path:
    """The folder Hydra made for this job."""
    return Path(HydraConfig.get().runtime.output_dir)


def is_sweep() -> bool:
    """Whether this is one job of a `-m` command."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def forget_empty(folder: Path) -> None:
    """Remove the folder Hydra made, and its parents, if nothing was written there."""
    for place in (whole := folder.absolute(), *whole.parents):
        if not place.is_dir() or place.is_symlink() or place in (here := Path.cwd(), *here.parents):
            return
        try:
            place.rmdir()
        except OSError:  # not empty, or not ours to remove
            return


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of the values that overrides list, as `-m` runs them; of one key the last.

    Raises ConfigError for what is no override.
    """
    _refuse_intervals(overrides)
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        (found,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except (HydraException, ValueError) as error:
        raise ConfigError(resolving.one_line(error, *ending.SCHEMAS.values())) from error
    return found


def compose(script: str, overrides: Sequence[str], *own: type) -> DictConfig:
    """The settings of `train` or `eval` as overrides make them, Hydra's lines in one.

    `own` are the command's options, which a misspelt key may have meant. Raises ConfigError.
    """
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override}: settings are written key=value")
    prepare()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(config.CONF)):
            composed = hydra.compose(script, list(overrides))
    except (HydraException, ValueError, AttributeError) as error:
        raise ConfigError(resolving.one_line(error, ending.SCHEMAS[script], *own)) from error
    _give_way(composed, overrides)
    return composed


# --- which run, model or endpoint an evaluation is of ---


def resolved(composed: DictConfig, schema: type[Settings]) -> tuple[Settings, Run]:
    """The settings of an evaluation and the folder it is for, as `eval.py` composes them.

    `schema` holds the core's settings, the extensions' and their table. Raises ConfigError where it
    is not clear what is to be evaluated.
    """
    run = _run_of(composed)
    own = resolving.own_paths(composed)  # before those of the run join them
    made_with = run.config() if composed.run is not None else {}
    return resolving.resolve(completed(composed, made_with), schema, own), run


def _run_of(composed: DictConfig) -> Run:
    """The folder to evaluate: the user's run, or one for a model or endpoint without a run."""
    model = None if OmegaConf.is_missing(composed.model, "name") else composed.model.name
    if composed.endpoint is not None:
        for key, named in (("run", composed.run), ("model", model)):
            if named is not None:
                raise ConfigError(
                    f"endpoint={composed.endpoint} {key}={named}: two things to evaluate; give one"
                )
    if composed.run is not None:
        if model is not None:
            raise ConfigError(
                f"run={composed.run} model={model}: a run brings its own model; give one of the two"
            )
        own = OmegaConf.structured(ModelConfig(trust_remote_code=composed.model.trust_remote_code))
        for key in own:
            if composed.model._get_node(key) != own._get_node(key):
                raise ConfigError(
                    f"run={composed.run} model.{key}={composed.model[key]}: a run brings its own; "
                    "leave it out"
                )
        run = Run(Path(str(composed.run)))
        run.config()  # what is not there or damaged is named before a model opens
        run.record()
        return run
    if composed.endpoint is None and model is None:
        raise ConfigError("nothing to evaluate: give run=<folder>, model=<name> or endpoint=<url>")
    return Run(Path(str(composed.output)))


def completed(composed: DictConfig, made_with: Mapping[str, Any]) -> DictConfig:
    """The user's settings, with model and data of the run that was `made_with` its settings where
    they are not named.
    """
    merged = OmegaConf.create(OmegaConf.to_container(composed, resolve=False))
    assert isinstance(merged, DictConfig)
    if made_with:
        trusted = composed.model.trust_remote_code or made_with["model"].get("trust_remote_code")
        merged.model = resolving.literal({**made_with["model"], "trust_remote_code": bool(trusted)})
    if composed.endpoint is not None:
        named = str(composed.endpoint_model or "unnamed")  # which the checks then refuse
        merged.model.name, merged.model.label = named, ""
    if not merged.model.label:
        merged.model.label = label_of(str(merged.model.name))
    if OmegaConf.is_missing(composed.data, "label"):
        own = resolving.literal(made_with.get("data"))
        base = own or OmegaConf.load(config.CONF / "data" / "demo.yaml")
        merged.data = OmegaConf.merge(base, resolving.named(composed.data))
    return merged
