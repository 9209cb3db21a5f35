"""The end and the output of a command: a line for a signal, no secrets, no control codes."""

import errno
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from omegaconf.errors import OmegaConfBaseException

from dcr import resolving
from dcr.core import machine
from dcr.core.config import ConfigError, UserError
from dcr.core.config.training import TrainConfig

# The schemas of the scripts; `dcr.extensions` puts in its own, and that of eval.
SCHEMAS: dict[str, type] = {"train": TrainConfig}
# faults of the machine rather than the program, which get a line and no traceback
DISK_FAULTS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
    *(errno.EEXIST, errno.ENOTDIR),
}
SIGNALLED = 128  # exit codes above it say which signal ended the process
PATIENCE = 1.0  # seconds between two looks at another process
STOPS: list[signal.Signals] = []  # signals that this process is ending for
# the overrides of each of Hydra's jobs in this process; before the first, a fault is the command's
BEGUN: list[list[str]] = []
REMOVED = "[removed]"
# names of environment variables whose values, if long enough, are secrets
KEYS = re.compile(r"(?i)(?:key|token|secret|password|passwd|credentials?)$")
SHORTEST_KEY = 8
# control characters as their pictures, and later ones and surrogates as a replacement
SHOWN = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
SHOWN |= dict.fromkeys((*range(0x7F, 0xA0), *range(0xD800, 0xE000)), "\N{REPLACEMENT CHARACTER}")
LONGEST_LINE = 1_000  # characters of an error's line
LONGEST_READ = 10_000  # characters read of a text that becomes one line
NAMES = (
    r"(?:[\w.-]{0,40}(?:(?:api|access)[_-]?key|(?:access|api|auth|hf|refresh|session)[_-]?token"
    r"|secret|password|passwd|credentials?)|token)"
)
# patterns of secrets; the first group stays
SECRETS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?i)\b((?:authorization|x-api-key|api-key)['\"]?\s*[:=]\s*).*",
        r"(?i)\b(bearer\s+)\S+",
        r"\b([Bb]asic\s+)(?=\S*(?:[0-9=+/]|[a-z][A-Z]))[A-Za-z0-9+/]{8,}={0,2}",
        r"()\bsk-[\w*.-]{3,}",
        r"()\b(?:hf|gsk|ghp|gho|github_pat|glpat|nvapi|xai|AIza)[_-]?\w{16,}",
        # user and password, also without a scheme, and with an @ or a slash in the password
        r"(:/{1,2})(?:[^\s/?#\"'<>@]*:[^\s\"'<>]*|[^\s/?#\"'<>]*)@",
        r"()(?<![\w/.:+-])[\w.+-]+\\?:[^\s/@\"'<>]+(?=@[\w-])",
        # the query of an address
        r"(:/{1,2}[^\s?#\"'<>]*[?#])[^\s\"'<>]+",
        r"(?i)([?&;](?:\w*key|sig|signature|auth|code|session)=)[^\s&\"'<>]+",
        rf"(?i)\b({NAMES}(?:=|['\"]\s*[:=]\s*)['\"]?)[^\s&,;\"'<>}}]+",
    )
)


def redact(text: str, *secrets: str) -> str:
    """`text` without `secrets` and all else that looks like one.

    It removes keys of this environment, keys with usual beginnings or headers, user and password of
    an address, an address's query, and values of names such as api_key, token and password.
    """
    known = (v for name, v in os.environ.items() if KEYS.search(name) and len(v) >= SHORTEST_KEY)
    for secret in sorted({*secrets, *known}, key=len, reverse=True):
        text = text.replace(secret, REMOVED) if secret else text
    for pattern in SECRETS:
        text = pattern.sub(rf"\1{REMOVED}", text)
    return text


def printable(text: str) -> str:
    """The text with control characters as pictures, and without lone surrogates.

    Line ends and tabs stay. No text of a file, a model or a server can so move the cursor, or
    colour or rename a terminal.
    """
    return text.replace("\r\n", "\n").translate(SHOWN)


def encodable(text: str) -> str:
    """The text with surrogates, which JSON can spell and UTF-8 cannot, joined or made U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def single_line(text: object, *secrets: str, longest: int | None = None) -> str:
    """`text`, or an exception's text, in one printable line without secrets.

    It has at most `longest` characters and an ellipsis. Without `longest`, a line that is too long
    to be read loses its middle, so that the key at its beginning and the cure at its end stay.
    """
    line = redact(printable(" ".join(str(text)[:LONGEST_READ].split())), *secrets)
    if longest is not None:
        return line if len(line) <= longest else f"{line[:longest]}…"
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} … {line[-half:]}"


class SafeRecord(logging.LogRecord):
    """A log record, also of Hydra's and other libraries', without secrets and control codes."""

    def getMessage(self) -> str:
        return printable(redact(super().getMessage()))


class SafeOutput:
    """Standard output without secrets and control codes, whatever the source of the text.

    Answers of a model, a database and others' folders are foreign text as well. If nobody reads on,
    as behind `| head`, the command ends without a word, as other programs do.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def write(self, text: str) -> int:
        with self._read():
            self.inner.write(printable(redact(text)))
        return len(text)

    def flush(self) -> None:
        with self._read():
            self.inner.flush()

    @contextmanager
    def _read(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # Python flushes once more at its end, and would complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.inner.fileno())
            raise SystemExit(SIGNALLED + signal.SIGPIPE) from None


def own_output() -> Any:
    """The standard output behind SafeOutput, for our own control codes."""
    return getattr(sys.stdout, "inner", sys.stdout)


@contextmanager
def safe_output() -> Iterator[None]:
    """Prints through SafeOutput, and also prints tracebacks without secrets."""
    if hasattr(sys.stdout, "reconfigure"):  # a letter that the terminal lacks stops no command
        sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    with redirect_stdout(SafeOutput(sys.stdout)):  # pyright: ignore[reportArgumentType]
        sys.excepthook = lambda _, error, __: print_traceback(error)
        yield
        sys.stdout.flush()


def print_traceback(error: BaseException) -> None:
    """Prints a traceback on stderr, without secrets and control codes."""
    print(printable(redact("".join(traceback.format_exception(error)))), file=sys.stderr)


def quieten() -> None:
    """Hides messages that no user can act on.

    `training.callbacks.quiet` hides those of Lightning's trainer.
    """
    # transformers reads these when it is imported, for which help and a user's error do not wait
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
    # which says in each command, where PEFT imports it, that it found no kernels on the hub
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


class Stopped(UserError):
    """A signal ended the command."""

    def __init__(self, number: signal.Signals, goes_on: bool) -> None:
        then = "goes on" if goes_on else "starts anew"
        super().__init__(f"stopped by {number.name}; the same command {then}")
        self.exit_code = SIGNALLED + number


@contextmanager
def stopped_by(goes_on: bool) -> Iterator[None]:
    """Lets the first signal stop a command and ignores the rest, so that it ends in one line.

    Raises Stopped with the signal's exit code in place of KeyboardInterrupt.
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
    """Stops this process, as Ctrl-C does, once its parent has ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PATIENCE)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def fail(message: str, code: int) -> NoReturn:
    """Ends the process with one line on stderr."""
    print(f"error: {single_line(message)}", file=sys.stderr)
    sys.exit(code)


@contextmanager
def faults_in_words() -> Iterator[None]:
    """Turns faults of the configuration, the disk or the memory into a UserError."""
    try:
        try:
            yield
        except Exception as error:
            if STOPS:  # a library raised another exception while it cleaned up after the signal
                raise KeyboardInterrupt from error
            raise
    except OmegaConfBaseException as error:
        raise ConfigError(setting_fault(error)) from error
    except (RuntimeError, MemoryError) as error:
        if machine.is_out_of_memory(error):
            raise OutOfMemory from error
        raise
    except OSError as error:
        # before a job has begun, Hydra makes its folder; Hydra's own errors have no number
        if error.errno is None or (BEGUN and error.errno not in DISK_FAULTS):
            raise
        place = error.filename or "disk"
        raise UserError(f"{place}: {error.strerror}; free or choose another place") from error


def setting_fault(error: Exception) -> str:
    """A line on a setting's fault, which may show only in the run folder's name."""
    schema = SCHEMAS.get(Path(sys.argv[0]).stem)
    line = resolving.one_line(error, *([schema] if schema else SCHEMAS.values()))
    named = [word for word in sys.argv[1:] if "${" in word]
    if not line.startswith("hydra.") or not named:
        return line
    return f"{named[0]}: {line.partition(': ')[2]}"


class OutOfMemory(UserError):
    """The device is too small for these settings."""

    exit_code = 1

    def __init__(self) -> None:
        super().__init__(
            "out of memory: lower dcr.batch_size, sft.micro_tokens or gen.batch_size, set "
            "sft.gradient_checkpointing=true, or use dcr.adapter=lora; plan=true estimates the need"
        )
