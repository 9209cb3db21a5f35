"""State on disk: written whole or not at all, checked when read, locked while in use.

Every file that a command keeps goes through here, so that a kill, a full disk or a damaged file has
the same end everywhere: the old content stays, or one line names the file and the cure.
"""

import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from dcr.core.config import DataError, UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

STAGING = ".writing-"  # prefix of the name of a file or folder until it is whole
ASIDE = ".old"  # suffix of the name of a folder while another takes its place
CHECKSUMS = "checksums.json"
SUMS: dict[object, list[str]] = {}  # checksums of files that this process has read, by their state
BREAKS_OFF = "not JSON (EOF "  # the fault of a line that more bytes could make JSON of
CURE = "restore the file, or delete it and run the command that wrote it again"


# --- names --------------------------------------------------------------------------------------


def fingerprint(settings: object) -> str:
    """Twelve hex digits that name a configuration or any other JSON value."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False, default=str)
    # a lone surrogate, which a server can send, is no UTF-8
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two configurations differ."""
    changed: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed += differences(before, after, f"{name}.")
        elif before != after:
            changed.append(f"{name}: {before} -> {after}")
    return changed


# --- writing ------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes what the system refuses to write a UserError with the path and the cure."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
        raise UserError(
            f"{path}: cannot be written ({reason}); free space or name another folder"
        ) from error


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of `path` on success and vanishes on failure.

    Raises UserError with the path if the folder cannot be written or the disk is full.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent, path.name)
        handle, name = tempfile.mkstemp(prefix=f"{STAGING}{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                _mark_in_use(handle)
                yield file
                file.flush()
                os.fsync(handle)
            os.chmod(name, 0o644)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes all bytes or keeps the old file. Raises UserError with the path if it cannot."""
    with replaced_file(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 with line ends as they are; a file name's bytes that are no text become `?`."""
    write_bytes(path, text.encode("utf-8", "replace"))


def write_json(path: Path, value: object) -> None:
    """Writes indented JSON with non-ASCII text as it is."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Gives a staging folder that takes the place of `folder` on success and vanishes on failure.

    Raises UserError with the path if it cannot be written or the disk is full.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent, folder.name)
        staging = Path(tempfile.mkdtemp(prefix=f"{STAGING}{folder.name}.", dir=folder.parent))
        marked = os.open(staging, os.O_RDONLY)
        try:
            _mark_in_use(marked)
            yield staging
            for file in staging.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            staging.chmod(0o755)
            _exchange(staging, folder)
        finally:
            os.close(marked)
            shutil.rmtree(staging, ignore_errors=True)


def _exchange(staging: Path, folder: Path) -> None:
    """Puts `staging` in the place of `folder`; the old content goes only after that has worked."""
    if not folder.exists():
        os.replace(staging, folder)
        return
    if os.path.samefile(folder, os.curdir) and not os.listdir(folder):
        for part in sorted(staging.iterdir()):  # a shell that stands there would be left nowhere
            os.replace(part, folder / part.name)
        staging.rmdir()
        return
    aside = staging.with_name(f"{staging.name}{ASIDE}")
    os.replace(folder, aside)
    try:
        os.replace(staging, folder)
    except OSError:
        os.replace(aside, folder)
        raise
    shutil.rmtree(aside)


def append(path: Path, data: bytes) -> None:
    """Adds whole lines to a file, all or none; a line that a kill tore gets its end first.

    Raises UserError with the path if it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(-1, os.SEEK_END)
                data = data if file.read(1) == b"\n" else b"\n" + data
            rest = memoryview(data)
            try:
                while rest:
                    rest = rest[os.write(file.fileno(), rest) :]
            except OSError:
                file.truncate(size)
                raise


def append_lines(path: Path, rows: Iterable[object]) -> None:
    """Adds records, such as dataclasses or mappings, as one JSON line each, all or none."""
    if data := as_lines(rows):
        append(path, data)


def as_lines(rows: Iterable[object]) -> bytes:
    """Records as one JSON line each."""
    plain = (asdict(r) if is_dataclass(r) and not isinstance(r, type) else r for r in rows)
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in plain)
    return text.encode("utf-8", "replace")  # servers can send lone surrogates


# --- reading ------------------------------------------------------------------------------------


@contextmanager
def _reading(path: Path, cure: str) -> Iterator[None]:
    try:
        check_regular(path)
        yield
    except OSError as error:
        place = error.filename or path
        raise DataError(f"{place}: cannot be read ({error.strerror or error}); {cure}") from error


def check_regular(path: Path) -> None:
    """Raises DataError for a pipe or a device, also in a folder: reading it may never end."""
    for place in (path, *(sorted(path.iterdir()) if path.is_dir() else ())):
        if place.exists() and not (place.is_file() or place.is_dir()):
            raise DataError(f"{place}: cannot be read (a pipe or device, not a file)")


def read_text(path: Path, cure: str = CURE) -> str:
    """The UTF-8 text of a file. Raises DataError with its name and the cure if unreadable."""
    with _reading(path, cure):
        data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start + 1} is not UTF-8; {cure}") from None


def read_json(path: Path, schema: type[T], cure: str = CURE) -> T:
    """A JSON file as `schema`: a dataclass, a pydantic model or a type such as `dict[str, str]`.

    Raises DataError "file: fault; cure" if it is absent, no JSON, or lacks or mistypes something
    that the schema names. Other keys are ignored.
    """
    text = read_text(path, cure)
    try:
        return _adapter(schema).validate_json(text, strict=True)
    except ValidationError as error:
        raise DataError(f"{path}: {_first_fault(error)}; {cure}") from None


def read_yaml(path: Path, schema: type[T], cure: str = CURE) -> T:
    """A YAML file as `schema`, with the errors of `read_json`."""
    text = read_text(path, cure)
    try:
        return _adapter(schema).validate_python(yaml.safe_load(text))
    except ValidationError as error:
        raise DataError(f"{path}: {_first_fault(error)}; {cure}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: not YAML ({why}); {cure}") from None


def read_lines(path: Path, schema: type[T], cure: str = "remove the line") -> list[T]:
    """The records of a file of JSON lines, none if it is absent; a line torn by a kill is left out.

    A torn line breaks off. Raises DataError "file:line: fault; cure" for any other line that is not
    of the schema.
    """
    if not path.exists():
        return []
    with _reading(path, CURE):
        lines = path.read_bytes().split(b"\n")
    records: list[T] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(_adapter(schema).validate_json(line, strict=True))
        except ValidationError as error:
            why = _first_fault(error)
            if not why.startswith(BREAKS_OFF):
                raise DataError(f"{path}:{number}: line: {why}; {cure}") from None
    return records


@functools.cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _first_fault(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return f"not JSON ({first['ctx']['error'] if 'ctx' in first else first['msg']})"
    place = ".".join(map(str, first["loc"]))
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{place}: missing"
    shown = repr(first["input"])
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return f"{place}: {shown}: {what}" if place else f"{shown}: {what}"


# --- checksums of a result folder ---------------------------------------------------------------


@dataclass(frozen=True)
class Checksums:
    """`checksums.json` of a folder: the SHA-256 of every file in it.

    A weight file's checksum also covers the weight files before it, with their names:
    `weights_fingerprint` shortens the last one, so that weights are read once for both.
    """

    weights: dict[str, str]
    files: dict[str, str]


def write_checksums(folder: Path) -> None:
    """Writes `checksums.json` of the files that now lie in a folder, such as a staging folder."""
    text = json.dumps(asdict(_checksums(folder)), indent=1)
    (folder / CHECKSUMS).write_text(f"{text}\n")


def _checksums(folder: Path) -> Checksums:
    weights = sorted(folder.glob("*.safetensors"))
    sums = running_sha256(weights, named=True)
    others = (f for f in sorted(folder.iterdir()) if f.is_file() and f.name != CHECKSUMS)
    return Checksums(
        dict(zip([file.name for file in weights], sums, strict=True)),
        {file.name: sha256(file) for file in others if file not in weights},
    )


def check_checksums(folder: Path, needed: bool = True) -> None:
    """Raises DataError with the file that differs from its checksum.

    A folder without checksums, such as another's model, passes unless they are `needed`.
    """
    cure = f"restore it from a copy, or delete {folder} and run the command that made it again"
    check_regular(folder)  # transformers and peft read every file there
    file = folder / CHECKSUMS
    if not needed and not file.exists():
        return
    known = read_json(file, Checksums, cure)
    with _reading(folder, cure):
        now = _checksums(folder)
    sums = now.files | now.weights
    for name, value in (known.files | known.weights).items():
        if name not in sums:
            raise DataError(f"{folder / name}: missing; {cure}")
        if sums[name] != value:
            raise DataError(f"{folder / name}: damaged, its checksum differs; {cure}")
    if more := sorted(now.weights.keys() - known.weights.keys()):
        raise DataError(f"{folder / more[0]}: no part of this result; remove the file")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex; an unchanged file is read once."""
    return running_sha256([path])[-1]


def running_sha256(files: Sequence[Path], named: bool = False) -> list[str]:
    """The SHA-256 of all files up to each one, in hex; with `named` each file's name goes first.

    Files that have not changed since the last call are not read again.
    """
    states = tuple((file.name, *_state(file)) for file in files)
    if (states, named) in SUMS:
        return SUMS[states, named]
    # a file's clock ticks too coarsely to show a second change right after the first
    settled = all(time.time_ns() - changed > 10**8 for *_, changed in states)
    digest, sums = hashlib.sha256(), []
    for file in files:
        if named:
            digest.update(file.name.encode())
        check_regular(file)
        if file.is_dir():
            raise DataError(f"{file}: cannot be read (a folder, not a file); {CURE}")
        with file.open("rb") as handle:
            rest = os.fstat(handle.fileno()).st_size  # so that a growing file ends as well
            while piece := handle.read(min(rest, 1 << 22)):
                digest.update(piece)
                rest -= len(piece)
        sums.append(digest.hexdigest())
    if settled:
        SUMS[states, named] = sums
    return sums


def weights_fingerprint(folder: Path) -> str:
    """The SHA-256 over the safetensors files of a folder, in name order (16 hex digits)."""
    sums = running_sha256(sorted(folder.glob("*.safetensors")), named=True)
    return (sums[-1] if sums else hashlib.sha256().hexdigest())[:16]


def _state(file: Path) -> tuple[int, int, int, int]:
    status = file.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


# --- locks, and files of killed processes -------------------------------------------------------


@dataclass(frozen=True)
class Lease:
    """The right to write into a folder, which ends with its lock file."""

    file: Path
    opened: os.stat_result

    def check(self) -> None:
        """Raises UserError if the folder was deleted meanwhile, or is another process's now."""
        if not self.holds():
            raise UserError(f"{self.file.parent}: was deleted or replaced while this process ran")

    def holds(self) -> bool:
        return self.file.exists() and os.path.samestat(self.file.stat(), self.opened)


@contextmanager
def locked(folder: Path) -> Iterator[Lease]:
    """Gives exclusive use of a run folder, without the half-written files of killed processes.

    If nothing but the lock was written, the folder is removed again, with the parents made for it.
    A kill frees the lock, but a fork of the killed process that still writes keeps it until its
    end; filelock, which closes its file in forks, would not. Raises UserError if another process
    has the lock, with its words in `.lock`, or if the folder cannot be written.
    """
    file = folder / ".lock"
    made = [place for place in (folder, *folder.parents) if not place.exists()] or [folder]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = file.open("a+", encoding="utf-8", errors="replace")
    with handle:
        with writing(file):  # also on a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                handle.seek(0)
                holder = handle.read(200).strip()
                fault = f"another process is using this run folder{holder and f' ({holder})'}"
                raise UserError(f"{folder}: {fault}; wait for it, or end it") from error
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            handle.flush()
        lease = Lease(file, os.fstat(handle.fileno()))
        lease.check()
        for place in {torn.parent for torn in folder.rglob(f"{STAGING}*")}:
            _remove_abandoned(place, "")
        try:
            yield lease
        finally:
            if lease.holds() and os.listdir(folder) == [file.name]:
                file.unlink()
                with suppress(OSError):  # a parent that holds something by now
                    for place in made:
                        place.rmdir()


def _mark_in_use(handle: int) -> None:
    """Locks a half-written file or folder until its process ends."""
    with suppress(OSError):  # a file system without locks; nothing abandoned is removed there
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_abandoned(folder: Path, name: str) -> None:
    """Removes half-written files of killed writers of `name`; a folder set aside comes back."""
    if not folder.is_dir():
        return
    begins = f"{STAGING}{name}." if name else STAGING
    for torn in sorted(folder.iterdir()):
        if not torn.name.startswith(begins) or not _abandoned(torn):
            continue
        target = folder / torn.name.removeprefix(STAGING).rsplit(".", 2)[0]
        if torn.name.endswith(ASIDE) and not target.exists():
            os.replace(torn, target)
        elif torn.is_dir():
            shutil.rmtree(torn, ignore_errors=True)
        else:
            torn.unlink(missing_ok=True)


def _abandoned(torn: Path) -> bool:
    """Whether no living process writes there."""
    try:
        handle = os.open(torn, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True
