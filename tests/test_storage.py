"""Files and folders written whole or not at all, read with a check, locked while in use."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dcr.core import storage
from dcr.core.config import DataError, UserError
from tests.tiny_run import failing

FULL = OSError(28, "No space left on device")


def test_a_fingerprint_follows_values_not_their_order() -> None:
    assert storage.fingerprint({"a": 1, "b": "é"}) == storage.fingerprint({"b": "é", "a": 1})
    assert storage.fingerprint({"a": 1}) != storage.fingerprint({"a": 2})
    assert len(storage.fingerprint([])) == 12


# --- who may write ---


def test_a_second_user_of_a_folder_is_refused_and_a_lease_ends_with_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for _ in range(2):  # it is free again
        with (
            storage.locked(run),
            pytest.raises(UserError, match=f"{run}: another process.*process {os.getpid()} on"),
        ):
            storage.locked(run).__enter__()
    with storage.locked(run) as lease:
        lease.check()
        run.rename(tmp_path / "old")
        with pytest.raises(UserError, match="deleted or replaced"):
            lease.check()
        with storage.locked(run) as newer:  # another one's by now
            newer.check()
            with pytest.raises(UserError, match="deleted or replaced"):
                lease.check()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"{folder}: cannot be written"):
            storage.locked(folder).__enter__()


@pytest.mark.parametrize(
    ("owner", "name"), [(os, "replace"), (os, "fsync"), (storage.tempfile, "mkstemp")]
)
def test_a_failed_write_names_the_path_and_keeps_the_old_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    file = tmp_path / "rows.json"
    storage.write_text(file, "old")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(FULL))
        with pytest.raises(UserError, match=f"{file}: cannot be written .No space left"):
            storage.write_text(file, "new")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "deep" / "x.json", {"text": "ü\r\n…"})
    assert json.loads((tmp_path / "deep" / "x.json").read_bytes()) == {"text": "ü\r\n…"}
    assert "ü" in (tmp_path / "deep" / "x.json").read_text()
    assert (tmp_path / "deep" / "x.json").stat().st_mode & 0o777 == 0o644


# --- folders ---


def test_a_failed_save_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "result"
    with storage.replaced_folder(folder) as staging:
        (staging / "a").write_text("old")
    with (
        pytest.raises(UserError, match="result: cannot be written"),
        storage.replaced_folder(folder) as staging,
    ):
        shutil.copy(staging / "absent", staging / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["result"]
    assert (folder / "a").read_text() == "old"
    with storage.replaced_folder(folder) as staging:
        (staging / "b").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["result"]
    assert [p.name for p in folder.iterdir()] == ["b"]


def test_a_failed_exchange_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "a").write_text("old")
    moved, calls = os.replace, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk")
        moved(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with (
        pytest.raises(UserError, match=r"result: cannot be written .disk"),
        storage.replaced_folder(folder) as staging,
    ):
        (staging / "a").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["result"]
    assert (folder / "a").read_text() == "old"


# --- what a kill leaves behind ---


def test_what_a_kill_left_is_gone_at_the_next_start(tmp_path: Path) -> None:
    run = tmp_path / "run"
    torn = [run / ".writing-rows.json.abcdefgh", run / "eval" / "x" / ".writing-metrics.json.ab"]
    folder = run / ".writing-sft.12345678"
    (folder / "step").mkdir(parents=True)
    for file in torn:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("half")
    with storage.locked(run):
        assert not folder.exists()
        assert not any(file.exists() for file in torn)


def test_a_folder_set_aside_by_a_kill_comes_back(tmp_path: Path) -> None:
    for place in ("whole", ".writing-sft.12345678.old", ".writing-sft.12345678"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a").write_text(place)
    with storage.locked(tmp_path):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "sft", "whole"]
    assert (tmp_path / "sft" / "a").read_text() == ".writing-sft.12345678.old"


def test_what_is_being_written_is_left_alone(tmp_path: Path) -> None:
    with storage.replaced_folder(tmp_path / "sft") as staging:
        (staging / "a").write_text("half")
        with storage.locked(tmp_path):
            assert (staging / "a").exists()
        (tmp_path / ".writing-sft.abcdefgh").mkdir()
        with storage.replaced_folder(tmp_path / "sft") as other:
            (other / "a").write_text("other")
        assert (staging / "a").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "sft"]


def test_a_folder_that_stayed_empty_is_removed(tmp_path: Path) -> None:
    with storage.locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
    with storage.locked(tmp_path / "run"):
        (tmp_path / "run").rename(tmp_path / "old")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".lock").touch()
    assert (tmp_path / "run" / ".lock").exists(), "another process's by now"
    with storage.locked(tmp_path / "run"):
        (tmp_path / "run" / "a").write_text("")
    assert (tmp_path / "run" / "a").exists()


# --- documents ---


@dataclass(frozen=True)
class Row:
    id: str
    n: int


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda file: file.unlink(), "No such file"),
        (lambda file: (file.unlink(), file.mkdir()), "Is a directory"),
        (lambda file: file.write_bytes(b""), "not JSON"),
        (lambda file: file.write_bytes(b'{"id": "a", "n"'), "not JSON"),
        (lambda file: file.write_bytes(b"\x80\x02}q\x00"), "byte 1 is not UTF-8"),
        (lambda file: file.write_bytes(b"[" * 100_000), "not JSON"),
        (lambda file: file.write_bytes(b"[]"), "[]: "),
        (lambda file: file.write_bytes(b'{"id": "a"}'), "n: missing"),
        (lambda file: file.write_bytes(b'{"id": null, "n": 1}'), "id: None: "),
    ],
)
@pytest.mark.parametrize("read", [storage.read_json, storage.read_yaml])
def test_a_damaged_document_is_named_with_the_cure(
    tmp_path: Path, damage: Callable[[Path], object], why: str, read: Any
) -> None:
    file = tmp_path / "row.json"
    storage.write_json(file, {"id": "a", "n": 1, "more": None})
    assert read(file, Row) == Row("a", 1)
    damage(file)
    with pytest.raises(DataError) as refused:
        read(file, Row, cure="make it anew")
    told = str(refused.value)
    assert told.startswith(f"{file}: ")
    assert told.endswith("; make it anew")
    if read is storage.read_json or not why.startswith("not JSON"):
        assert why in told
