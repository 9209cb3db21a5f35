"""The command lines: Hydra's two scripts, and the door of every `python -m dcr.<command>`.

Both end alike: a user's error is one line on stderr and exit code 2, a signal one line and 128 plus
its number. `run` calls a Hydra main, whose jobs `job` wraps. `command` reads a small dataclass of
`option`s, from which `--help` is made as well; `compose` gives such a command the settings of
`train.py` or `eval.py` too.
"""

import argparse
import errno
import functools
import hashlib
import inspect
import io
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import Field, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

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
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.console import Console
from rich.table import Column, Table

from dcr.core import config, runs, storage
from dcr.core.config import ConfigError, EvalConfig, TrainConfig, UserError
from dcr.core.text import label_of, printable, redact, single_line

SCHEMAS = {"train": TrainConfig, "eval": EvalConfig}
# What the machine rather than the program is to blame for: worth a line, not a traceback.
DISK_FAULTS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
    *(errno.EEXIST, errno.ENOTDIR),
}
# Options of Hydra's that take settings from elsewhere, and with them code to run.
REFUSED_OPTIONS = {
    "experimental_rerun": "it would unpickle a file, and run whatever code that holds",
    "config_dir": "its files could name code to run, as Hydra's callbacks",
    "config_path": "its files could name code to run, as Hydra's callbacks",
    "config_name": "each script has one of its own",
}
PATIENCE = 1.0  # seconds between two looks at another process
PARENT = "DCR_LAUNCHED_BY"  # the process without which a job of a sweep ends
SIGNALLED = 128  # exit codes above it say which signal ended the process
PACKAGE = Path(__file__).parent.parent
# within an installed package; beside it in a checkout
CONF = next(p / "conf" for p in (PACKAGE, PACKAGE.parent) if (p / "conf" / "train.yaml").is_file())
COLUMNS = 100  # of what commands print
KINDS = {bool: "true/false", int: "integer", float: "number", str: "text", Path: "path"}
LOG_LINE = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"  # as Hydra's scripts have it
SPELLINGS = "Options are written key=value, --key=value or --key value."

Options = TypeVar("Options")


def prepare() -> None:
    """Register schemas and resolvers, and quieten libraries."""
    for name, schema in SCHEMAS.items():
        node = OmegaConf.structured(schema)
        if schema is EvalConfig:
            _unset(node.data)  # what no one names comes from the run, whatever the default
        ConfigStore.instance().store(name=f"{name}_schema", node=node)
    # the store hands out copies, so Hydra need not copy it whole for each group it lists
    ConfigStore.__deepcopy__ = lambda store, _: store  # pyright: ignore
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
    OmegaConf.register_new_resolver("choice", _choice, replace=True)
    _quieten()
    logging.setLogRecordFactory(SafeRecord)


def _unset(node: DictConfig) -> None:
    for key in node:
        if not OmegaConf.is_missing(node, key) and OmegaConf.is_dict(node[key]):
            _unset(node[key])
        else:
            node[key] = MISSING


class SafeRecord(logging.LogRecord):
    """A log record, also of Hydra's and other libraries', without secrets and control codes."""

    def getMessage(self) -> str:
        return printable(redact(super().getMessage()))


class SafeOutput:
    """Standard output without secrets and control codes, whoever wrote the text that is printed.

    A model that is talked to, a database or a folder of another's is foreign text as well.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def write(self, text: str) -> int:
        self.inner.write(printable(redact(text)))
        return len(text)


def own_output() -> Any:
    """Standard output past SafeOutput, for codes of our own."""
    return getattr(sys.stdout, "inner", sys.stdout)


@contextmanager
def _safe_output() -> Iterator[None]:
    """Print through SafeOutput, and tracebacks of faults of ours without secrets too."""
    with redirect_stdout(SafeOutput(sys.stdout)):  # pyright: ignore[reportArgumentType]
        sys.excepthook = lambda _, error, __: print_traceback(error)
        yield


def print_traceback(error: BaseException) -> None:
    """On stderr, without secrets and control codes."""
    print(printable(redact("".join(traceback.format_exception(error)))), file=sys.stderr)


def _quieten() -> None:
    """Hide what no user can act on, so that what remains is worth reading.

    What Lightning says while it trains, `training.callbacks.quiet` hides.
    """
    # transformers reads these when it is imported, which help and a user's error need not wait for
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
    for name in (
        "lightning.pytorch.trainer.connectors.signal_connector",  # a signal has one line, ours
        "lightning.fabric.utilities.seed",
        "lightning.fabric.utilities.distributed",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


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
    settings = runs.binding({str(k): v for k, v in plain.items() if k != "hydra"})
    model = _root_.model
    given = "label" in _fields_of_model(_overrides(_root_.hydra))
    of_another = config.names_another_model(model) and not given
    label = label_of(str((not of_another and model.get("label")) or model.name))
    method = getattr(_root_.method, "name", _root_.method)
    name = f"{label}-{method}-{storage.fingerprint(settings)}"
    return f"{parent}/{name}" if parent else name


def _overrides(hydra: Any) -> list[str]:
    """What the command, or this job of a sweep, sets: as written, interpolations and all."""
    written = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    assert isinstance(written, list)
    return [str(override) for override in written]


def _fields_of_model(overrides: Sequence[str]) -> list[str]:
    """The fields of `model` that a command sets, one by one rather than by a file."""
    keys = [override.lstrip("+~").split("=")[0] for override in overrides]
    return [key.split(".")[1] for key in keys if key.startswith("model.")]


def _own_to(composed: DictConfig, overrides: Sequence[str]) -> None:
    """What depends on which settings the command names: the others give way. Changes `composed`."""
    config.leave_numbers_of_another_model(composed, _fields_of_model(overrides))
    given = {override.lstrip("+~").split("=")[0] for override in overrides}
    if "at_most" in composed and "at_most" not in given:
        composed.at_most = [
            key for key in config.COUNTS if not {key, key.rpartition(".")[0]} & given
        ]


@dataclass(frozen=True)
class Outcome:
    """How one job of a command ended."""

    overrides: list[str]
    folder: Path
    seconds: float
    error: Exception | None


# Of this process's jobs, in order. Before the first has begun, any fault is the command's; at the
# end, a sweep reports them.
BEGUN: list[list[str]] = []
OUTCOMES: list[Outcome] = []
STOPS: list[signal.Signals] = []  # that this process received and is ending for


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
        BEGUN.append(overrides)
        kept = Exception if _sweeps(here=True) else UserError
        try:
            with faults_in_words():
                _own_to(composed, overrides)
                function(composed)
        except kept as caught:
            if _sweeps(here=False):
                raise
            if not isinstance(caught, UserError):
                print_traceback(caught)
            elif caught.exit_code > SIGNALLED:
                fail(str(caught), caught.exit_code)
            error = caught
        finally:
            forget_empty(output_folder())
        spent = time.perf_counter() - began
        OUTCOMES.append(Outcome(overrides, output_folder(), spent, error))

    return noted


@contextmanager
def faults_in_words() -> Iterator[None]:
    """Turn what the configuration, the disk or the memory is to blame for into a UserError."""
    try:
        try:
            yield
        except Exception as error:
            if STOPS:  # a library that cleaned up behind the signal's exception raised another
                raise KeyboardInterrupt from error
            raise
    except OmegaConfBaseException as error:
        raise ConfigError(_said(error)) from error
    except (RuntimeError, MemoryError) as error:
        from dcr.core import batching  # with torch, which only what can fail like this has loaded

        if batching.is_out_of_memory(error):
            raise OutOfMemory from error
        raise
    except OSError as error:
        # before a job has begun, Hydra makes its folder; what it says itself has no number
        if error.errno is None or (BEGUN and error.errno not in DISK_FAULTS):
            raise
        place = error.filename or (HydraConfig.initialized() and output_folder()) or "disk"
        raise UserError(f"{place}: {error.strerror}; free or choose another place") from error


class OutOfMemory(UserError):
    """The device is too small for these settings."""

    exit_code = 1

    def __init__(self) -> None:
        super().__init__(
            "out of memory: lower dcr.batch_size, sft.micro_tokens or gen.batch_size, set "
            "sft.gradient_checkpointing=true, or use dcr.adapter=lora; plan=true estimates the need"
        )


def _sweeps(here: bool) -> bool:
    """Whether this is one job of several, in this process or in one that a launcher started."""
    basic = "BasicLauncher" in str(HydraConfig.get().launcher.get("_target_", ""))
    return HydraConfig.get().mode is RunMode.MULTIRUN and basic is here


@contextmanager
def _stopped_by(goes_on: bool) -> Iterator[None]:
    """Let the first signal stop a command and ignore the rest, so that it ends in one line.

    Raises UserError with the signal's exit code in place of KeyboardInterrupt.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}

    def stop(number: int, _: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        STOPS.append(signal.Signals(number))
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(STOPS[-1] if STOPS else signal.SIGINT, goes_on) from error
    finally:
        STOPS.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with(parent: int) -> None:
    """Stop this process, as Ctrl-C does, once the one that started it was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PATIENCE)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class Stopped(UserError):
    """A signal ended the command."""

    def __init__(self, number: signal.Signals, goes_on: bool) -> None:
        then = "goes on" if goes_on else "starts anew"
        super().__init__(f"stopped by {number.name}; the same command {then}")
        self.exit_code = SIGNALLED + number


def run(main: Callable[[], Any]) -> None:
    """Call a Hydra main; a user's error becomes one line on stderr and exit code 2."""
    prepare()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise instead of printing several lines
    BEGUN.clear()
    OUTCOMES.clear()
    sweep = {"-m", "--multirun"} & set(sys.argv)
    if sweep:
        # the group that makes a sweep one dashboard: the same command gives the same group
        named = hashlib.sha256(" ".join(sys.argv[1:]).encode()).hexdigest()[:8]
        os.environ.setdefault("DCR_SWEEP", f"sweep-{named}")
    try:
        with _safe_output(), _stopped_by(goes_on=True), faults_in_words():
            if parent := os.environ.pop(PARENT, ""):
                end_with(int(parent))
            _check_command_line()
            main()
    except UserError as error:
        fail(str(error), error.exit_code)
    except (HydraException, ValueError, TypeError, AttributeError) as error:
        if BEGUN:
            raise
        fail(_said(error), ConfigError.exit_code)
    finally:
        if sweep:
            _forget_sweep()
    failed = [outcome for outcome in OUTCOMES if outcome.error is not None]
    if len(OUTCOMES) > 1:
        _print_sweep(OUTCOMES)
        sys.exit(1 if failed else 0)
    if failed:
        fail(str(failed[0].error), getattr(failed[0].error, "exit_code", 1))


def _forget_sweep() -> None:
    """Remove Hydra's record of a sweep (each run has its own), and its folder if no job wrote."""
    key = "hydra.sweep.dir="
    named = [argument.removeprefix(key) for argument in sys.argv if argument.startswith(key)]
    folder = Path(named[-1].strip("'\"") if named else "multirun")
    (folder / "multirun.yaml").unlink(missing_ok=True)
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


def _said(error: Exception) -> str:
    """What is wrong with a setting, be it through the run folder's name, made of all of them."""
    said = config.one_line(error, *_schemas())
    named = [word for word in sys.argv[1:] if "${" in word]
    if not said.startswith("hydra.") or not named:
        return said
    return f"{named[0]}: {said.partition(': ')[2]}"


def _refuse_intervals(overrides: Sequence[str]) -> None:
    """Raises ConfigError for what Hydra's sweeper refuses without saying of which setting."""
    for word in overrides:
        key, _, value = word.partition("=")
        if re.match(r"(tag\(.*)?interval\(", value):
            raise ConfigError(
                f"{word}: a sweep takes values, as in {key}=1,2 or range(1,4), and python -m "
                f"dcr.search an interval, {key}=<low>..<high>"
            )


def _schemas() -> list[type]:
    """What the command can be told: the schema of its own script, where that is known."""
    named = SCHEMAS.get(Path(sys.argv[0]).stem)
    return [named] if named else list(SCHEMAS.values())


def _print_sweep(outcomes: list[Outcome]) -> None:
    """A row for each job, told apart by the overrides that differ, and a line for each error."""
    shared = set.intersection(*(set(outcome.overrides) for outcome in outcomes))
    table = Table("job", "minutes", "outcome", Column("folder", overflow="fold"))
    errors: list[str] = []
    for outcome in outcomes:
        job = single_line(" ".join(o for o in outcome.overrides if o not in shared))
        ended = "done" if outcome.error is None else "failed"
        table.add_row(job, f"{outcome.seconds / 60:.1f}", ended, os.path.relpath(outcome.folder))
        if outcome.error is not None:
            what = single_line(outcome.error) or type(outcome.error).__name__
            errors.append(f"{job}: {what}")
    Console(stderr=True, markup=False, emoji=False).print(table)
    print(*errors, sep="\n", file=sys.stderr)


def fail(message: str, code: int) -> None:
    """End the process with one line on stderr."""
    print(f"error: {single_line(message)}", file=sys.stderr)
    sys.exit(code)


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


def plain(config: Any) -> Any:
    """A dataclass tree as plain YAML values; text stays as it is, `${` refers to nothing there."""
    if isinstance(config, Enum):
        return config.name
    if is_dataclass(config):
        return {entry.name: plain(getattr(config, entry.name)) for entry in fields(config)}
    if isinstance(config, Mapping):
        return {str(key): plain(value) for key, value in config.items()}
    return [plain(value) for value in config] if isinstance(config, list) else config


# --- python -m dcr.<command> --------------------------------------------------------------------


def option(
    meaning: str,
    default: Any = MISSING,
    *,
    choices: Sequence[str] = (),
    least: float | None = None,
    most: float | None = None,
    rest: bool = False,
    key: str = "",
) -> Any:
    """A field of a command's options; `--help` and every error are made from it.

    Without a default it must be given. A list is given by repeating the option; with `rest` it
    takes every word that is no option, such as settings of `train.py`. A `key` with dots, as
    `eval.py` spells the same setting, stands in place of the field's name.
    """
    facts = {"meaning": meaning, "choices": choices, "least": least, "most": most, "rest": rest}
    facts["key"] = key
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=facts)
    return field(default=default, metadata=facts)


def command(
    schema: type[Options], goes_on: bool = False
) -> Callable[[Callable[[Options], None]], Callable[[Sequence[str]], int]]:
    """Make a function of options a command: from the words behind its name to an exit code.

    `goes_on` says of a command that was stopped whether it finds its work again.
    """

    def made(main: Callable[[Options], None]) -> Callable[[Sequence[str]], int]:
        @functools.wraps(main)
        def call(arguments: Sequence[str]) -> int:
            if {"-h", "--help"} & set(arguments):
                print(help_of(schema))
                return 0
            logging.basicConfig(format=LOG_LINE)
            try:
                with _safe_output(), _stopped_by(goes_on), faults_in_words():
                    main(read(schema, arguments))
            except UserError as error:
                print(f"error: {single_line(error)}", file=sys.stderr)
                return error.exit_code
            return 0

        return call

    return made


def read(schema: type[Options], arguments: Sequence[str]) -> Options:
    """The options as `key=value`, `--key=value`, `--key value`, or `--key` for a yes.

    Values are taken as they are written, so that no path is read as YAML. Raises ConfigError for
    an unknown key, a wrong type, a value outside its range and one that is missing.
    """
    known = _entries(schema)
    rest = next((name for name, entry in known.items() if entry.metadata["rest"]), None)
    given: dict[str, list[str]] = {}
    words = iter(arguments)
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if key in known and key != rest and (equals or word.startswith("--")):
            if not equals:
                value = "true" if known[key].type is bool else next(words, "")
            given.setdefault(key, []).append(value)
        elif rest is None or word.startswith("-"):
            near, names = config.nearest(key, list(known)), [n for n in known if n != rest]
            offer = f"did you mean {' or '.join(near)}?" if near else f"give {', '.join(names)}"
            raise ConfigError(f"{word}: no such setting; {offer}")
        else:
            given.setdefault(rest, []).append(word)
    node = OmegaConf.structured(schema)
    try:
        for key, values in given.items():
            for value in values:
                _check_word(known[key], value)
            plain = [value.replace("${", r"\${") for value in values]  # no interpolation either
            name = known[key].name
            node[name] = plain if OmegaConf.is_list(node._get_node(name)) else plain[-1]
            _check_range(known[key], node[name])
        for key, entry in known.items():
            if OmegaConf.is_missing(node, entry.name):
                raise ConfigError(f"{key}: nothing given; it is {entry.metadata['meaning']}")
        return OmegaConf.to_object(node)  # pyright: ignore[reportReturnType]
    except OmegaConfBaseException as error:
        raise ConfigError(config.one_line(error, schema)) from error


def _entries(schema: type) -> dict[str, Field[Any]]:
    return {_key(entry): entry for entry in fields(schema)}


def _key(entry: Field[Any]) -> str:
    return entry.metadata["key"] or entry.name


def _check_word(entry: Field[Any], value: str) -> None:
    """Raises ConfigError for what no option of the kind can be, whatever its type makes of it."""
    choices = entry.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(f"{_key(entry)}={value}: choose one of {', '.join(choices)}")
    if not value:
        raise ConfigError(f"{_key(entry)}=: it needs a value, or leave it out")
    if Path in (entry.type, *get_args(entry.type)):
        try:
            os.lstat(value)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"{entry.name}={value[:60]}: cannot be a path ({why})") from error


def _check_range(entry: Field[Any], value: Any) -> None:
    least, most = entry.metadata["least"], entry.metadata["most"]
    if least is not None and not least <= value <= (math.inf if most is None else most):
        raise ConfigError(f"{_key(entry)}={value}: give {_range(least, most)}")


def _range(least: float, most: float | None) -> str:
    return f"{least:g} or more" if most is None else f"{least:g} to {most:g}"


def help_of(schema: type) -> str:
    """What a command does, and each option with type, default and meaning, 100 columns wide."""
    table = Table("option", "type", "default", Column("meaning", overflow="fold"), box=None)
    for name, entry in _entries(schema).items():
        facts = entry.metadata
        kind = KINDS[(get_args(entry.type) or (entry.type,))[0]]
        if facts["least"] is not None:
            kind += f", {_range(facts['least'], facts['most'])}"
        plain = "none" if get_origin(entry.type) is list else str(entry.default)
        default = {MISSING: "needed", "None": "none", "False": "false"}.get(plain, plain)
        choices = f"; one of {', '.join(facts['choices'])}" if facts["choices"] else ""
        shown = f"<{name}> ..." if facts["rest"] else f"{name}="
        table.add_row(shown, kind, default, f"{facts['meaning']}{choices}")
    return f"{inspect.getdoc(schema)}\n\n{plain_text(table)}\n\n{SPELLINGS}"


def plain_text(*parts: str | Table) -> str:
    """What a command prints, 100 columns wide, without colour or blanks at line ends."""
    out = io.StringIO()
    console = Console(
        file=out, width=COLUMNS, color_system=None, highlight=False, markup=False, emoji=False
    )
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def table(title: str, heads: Sequence[str], names: int = 1) -> Table:
    """A table whose columns behind the first `names` hold numbers."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, head in enumerate(heads):
        made.add_column(head, justify="left" if place < names else "right", overflow="fold")
    return made


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of the values that overrides list, as `-m` runs them; of one key the last.

    Raises ConfigError for what is no override.
    """
    _refuse_intervals(overrides)
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        (found,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except (HydraException, ValueError) as error:
        raise ConfigError(config.one_line(error, *SCHEMAS.values())) from error
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
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            composed = hydra.compose(script, list(overrides))
    except (HydraException, ValueError, AttributeError) as error:
        raise ConfigError(config.one_line(error, SCHEMAS[script], *own)) from error
    _own_to(composed, overrides)
    return composed
