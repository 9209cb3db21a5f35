"""Commands of `dcr` in forked children: the imports are paid once, a case costs its own work."""

import contextlib
import importlib
import os
import pkgutil
import re
import resource
import runpy
import shlex
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300.0  # seconds after which a command counts as hanging; the slowest good one takes ten
SECRET = "hf_" + "Campa1gn" * 4  # as HF_TOKEN, and in addresses that commands are given
MARK = "code-ran"  # the file that an attack makes where its code runs
MEMORY = 12 * 2**30  # bytes of address space, so that a silly size ends a case and not the machine
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Ended:
    """How a command ended. A negative code is the signal that killed it."""

    code: int
    out: str
    err: str
    hung: bool
    seconds: float

    @property
    def said(self) -> str:
        return self.out + self.err

    def faults(self) -> list[tuple[str, str]]:
        """Lists what it did that no command may do: (kind, detail) of each."""
        if self.hung:
            return [("hang", f"ran past {self.seconds:.0f} s; last: {_last(self.said)}")]
        if TRACEBACK in self.said:
            return [("traceback", signature(self.said))]
        if self.code < 0:
            return [("crash", f"{signal.Signals(-self.code).name}; last: {_last(self.err)}")]
        if self.code == 0:
            return []
        lines = [line for line in self.err.splitlines() if not line.startswith("[")]
        if self.code < 128 and "%|" in self.err and lines[-1].startswith("error: "):
            return [("not one line", "a progress bar stands before the error")]
        if self.code >= 128:  # stopped by a signal, where a bar stood
            lines = [line for line in lines if line.strip() and "%|" not in line]
        if len(lines) != 1 or not lines[0].startswith("error: "):
            return [("not one line", f"exit {self.code}: {self.err[-300:]!r}")]
        if self.err.isascii() and not all(map(str.isprintable, self.err.splitlines())):
            return [("not one line", f"control characters: {self.err[-300:]!r}")]
        return []


def _last(text: str) -> str:
    return repr((text.strip().splitlines() or [""])[-1][-160:])


def signature(text: str) -> str:
    """The exception and the last frame of ours: what tracebacks of one cause share."""
    lines = text[text.index(TRACEBACK) :].splitlines()
    ours = [line.strip() for line in lines if f"{ROOT}/" in line and "/.venv/" not in line]
    ours = [line for line in ours if "/tests/" not in line]
    raised = [line for line in lines[1:] if line and not line.startswith((" ", "\t"))]
    where = ours[-1].replace(f"{ROOT}/", "") if ours else "?"
    return f"{raised[0][:160] if raised else '?'} | {where}"


def preload() -> None:
    """Import everything a command needs, once, before the first fork."""
    sys.path.insert(0, str(ROOT))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_TOKEN": SECRET,
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "agg",
        "PYTHONPATH": str(ROOT),  # of the processes that a launcher starts
    }
    import torch

    torch.set_num_threads(1)
    package = importlib.import_module("dcr")
    for module in pkgutil.walk_packages(package.__path__, "dcr."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    import transformers.models.llama.modeling_llama  # noqa: F401


def spell(arguments: Sequence[str]) -> str:
    """The command as a user would type it."""
    script, *rest = arguments
    start = f"python {script}" if script.endswith(".py") else f"python -m {script}"
    return " ".join([start, *map(shlex.quote, rest)])


def run(
    arguments: Sequence[str],
    place: Path,
    limit: float = LIMIT,
    interfere: Callable[[int], None] | None = None,
) -> Ended:
    """Run `train.py …` or `dcr.report …` in `place`; `interfere` gets the child's process id."""
    logs = place.parent / f"{place.name}.logs"
    logs.mkdir(exist_ok=True)
    began = time.monotonic()
    child = os.fork()
    if not child:
        _become(arguments, place, logs)
    if interfere is not None:
        interfere(child)
    hung, status = False, None
    while status is None:
        found, code = os.waitpid(child, os.WNOHANG)
        if found:
            status = code
        elif time.monotonic() - began > limit:
            hung = True
            os.killpg(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        else:
            time.sleep(0.004)
    with contextlib.suppress(ProcessLookupError):  # what a launcher started and left behind
        os.killpg(child, signal.SIGKILL)
    out, err = ((logs / name).read_text(errors="replace") for name in ("out", "err"))
    spent = time.monotonic() - began
    return Ended(os.waitstatus_to_exitcode(status), out, err, hung, spent)


def _become(arguments: Sequence[str], place: Path, logs: Path) -> None:
    """In the child: the command, from its first line to the end of the process."""
    import torch

    code = 70
    try:
        os.setpgid(0, 0)
        torch.set_num_threads(1)  # renews the pool, as in a process that was not forked
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(logs / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644), number)
        os.chdir(place)
        os.environ["DCR_CACHE"] = str(logs / "cache")
        script, *rest = arguments
        is_file = script.endswith(".py")
        path = str(ROOT / script)
        sys.argv = [path if is_file else script, *rest]
        warnings.simplefilter("ignore")
        if is_file:
            runpy.run_path(path, run_name="__main__")
        else:
            sys.modules.pop(script, None)
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = _code(ended)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _code(ended: SystemExit) -> int:
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    print(ended.code, file=sys.stderr)
    return 1


# What a result tells of the machine rather than of the model: seconds, memory, where it lies.
CHANCE = re.compile(
    rb'"(seconds|peak_memory_gib)": [0-9.e+-]+|tracking_seconds,.*|[^ ":]*(?=/run/)'
)


def _stable(file: Path) -> bytes:
    if file.name == "checksums.json":  # of files that tell where they lie
        return b""
    told = CHANCE.sub(b"", file.read_bytes())
    # a resumed process logs the same rows, in another order
    return b"\n".join(sorted(told.splitlines())) if file.name == "metrics.csv" else told


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path there; a folder without files counts as well.

    Seconds, memory and places are left out of what the files say.
    """
    return {
        str(path.relative_to(folder)): _stable(path) if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if path.is_file() or (path.is_dir() and not any(path.iterdir()))
    }


def leaks(place: Path, ended: Ended) -> list[tuple[str, str]]:
    """Lists secrets that were shown or written, and code that ran."""
    faults = []
    if SECRET in ended.said:
        at = ended.said.index(SECRET)
        faults.append(("secret", f"told: {ended.said[max(0, at - 80) : at]!r}"))
    for file in sorted(place.rglob("*")):
        if file.is_file() and not file.is_symlink() and SECRET.encode() in file.read_bytes():
            faults.append(("secret", f"written to {file.relative_to(place)}"))
    if (place / MARK).exists():
        faults.append(("code run", "the attack's code ran"))
    return faults
