"""Files and folders written whole or not at all, read with a check, locked while in use.

Records kept line by line: none is lost, none is torn, and no answer is paid for twice. One suite
for every store of answers; the truth is a command that nothing ended.
"""

import errno
import fcntl
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dcr import eval as evaluation
from dcr.core import storage
from dcr.core.config import DataError, UserError
from dcr.core.evaluation import in_turn
from dcr.core.generation import Completion
from dcr.endpoints import HTTPConfig
from dcr.extensions import EvalSettings
from dcr.judges import AnnotatorConfig, LLMJudgeConfig, pairwise
from dcr.judges import judging as judges
from dcr.judges.pairwise import Pair
from tests import forked
from tests.servers.scripted import Body, completion, last_user, scripted
from tests.test_eval import resolved
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


def test_a_file_system_without_locks_is_told_from_a_folder_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    told = r"\.lock: cannot be written \(No locks available\)"
    with pytest.raises(UserError, match=told), storage.locked(tmp_path / "run"):
        raise AssertionError("nothing keeps others out")


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


def test_the_folder_in_which_one_stands_is_filled_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "result"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with storage.replaced_folder(folder) as staging:
        (staging / "a").write_text("new")
    assert os.listdir() == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


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


def test_processes_take_turns_in_a_folder_and_leave_no_empty_one(tmp_path: Path) -> None:
    folder = tmp_path / "eval" / "x"
    with in_turn(folder):
        turns = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(turns, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(turns, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(turns)
    assert list(tmp_path.iterdir()) == []
    with in_turn(folder):
        storage.write_text(folder / "kept", "")
    assert (folder / "kept").is_file()


def test_who_waits_for_a_folder_that_is_removed_meanwhile_locks_the_new_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder, held = tmp_path / "eval" / "x", list[bool]()

    def wait() -> None:
        with in_turn(folder):
            turns = os.open(folder, os.O_RDONLY)
            with pytest.raises(BlockingIOError):
                fcntl.flock(turns, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(turns)
            held.append(True)

    waiting = threading.Thread(target=wait)
    with in_turn(folder):
        waiting.start()
        while "waiting for it" not in caplog.text:
            waiting.join(0.01)
    waiting.join()
    assert held
    assert list(tmp_path.iterdir()) == []


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


# --- lines ---

ROWS = [Row("a", 1), Row("ü", 2)]


def test_lines_read_back_as_written(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.jsonl"
    assert storage.read_lines(file, Row) == []
    storage.append_lines(file, [])
    assert not file.exists()
    odd = Row("two\nlines \u2028 \u2029 \x85 \r\n \x0b 🙂 \u200b end", 3)  # none ends a line
    for row in (*ROWS, odd, Row("\ud800!", 4)):
        storage.append_lines(file, [row])
    assert storage.read_lines(file, Row) == [*ROWS, odd, Row("?!", 4)]
    assert file.read_bytes().count(b"\n") == 4


def test_a_torn_line_is_left_out_and_the_next_one_kept(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for cut in range(1, len('{"id": "ü", "n": 2}'.encode())):
        file.unlink(missing_ok=True)
        storage.append_lines(file, ROWS)
        os.truncate(file, file.stat().st_size - 1 - cut)
        assert storage.read_lines(file, Row) == ROWS[:1]
        storage.append_lines(file, ROWS[1:])
        assert storage.read_lines(file, Row) == ROWS


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"id": "b"}', "n: missing"),
        (b'{"id": "b", "n": "2"}', "n: '2': "),
        (b'{"id": "b", "n": 2}}', "not JSON"),
        (b"[1]", "object"),
        (b"\x93\x00", "not JSON"),
        (b'{"id": "\xff", "n": 1}', "not JSON"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes, why: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"id": "a", "n": 1}\n' + line + b'\n{"id": "c", "n": 3}\n')
    with pytest.raises(DataError) as refused:
        storage.read_lines(file, Row)
    assert str(refused.value).startswith(f"{file}:2: line: ")
    assert why in str(refused.value)
    assert "remove the line" in str(refused.value)


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write, calls = tmp_path / "rows.jsonl", os.write, []

    def half(handle: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) > 1:
            raise FULL
        return write(handle, data[:5])

    storage.append_lines(file, ROWS)
    before = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(UserError, match=f"{file}: cannot be written .No space left"):
            storage.append_lines(file, ROWS)
    assert file.read_bytes() == before


# --- every store of answers: an evaluation's, a judge's and an annotator's ---

ASKED = 12
HTTP = HTTPConfig(concurrency=2, timeout=60.0, retries=0)


def _evaluated(url: str, folder: Path) -> None:
    evaluation.evaluate(
        *resolved(
            *(f"endpoint={url}", "endpoint_model=there", f"output={folder}", "data=demo"),
            *("limit=6", "http.concurrency=2", "wandb.mode=disabled", "judge=[keyword]"),
            "tasks=[over_refusal,safety]",
        )
    )


def _judged(url: str, folder: Path) -> None:
    rows = [Completion(f"r{i}", f"item {i}?", "Yes.", 3, True, 0.0) for i in range(ASKED)]
    settings = EvalSettings(judge=["llm"], http=HTTP, llm=LLMJudgeConfig(url=url, model="j"))
    judges.judge("llm", settings, {"one": rows}, folder, progress=False)


def _compared(url: str, folder: Path) -> None:
    pairs = [Pair(f"r{i}", f"item {i}?", "This.", "Or that.") for i in range(ASKED)]
    settings = EvalSettings(http=HTTP, annotator=AnnotatorConfig(url=url))
    pairwise.annotate(pairs, settings, folder, ("a", "b"), progress=False)


STORES = {"completions": _evaluated, "verdicts": _judged, "annotations": _compared}


def _said(body: Body) -> Body:
    """An answer that each of them takes: a class, and a letter with its log-probability."""
    return completion("1_full_compliance", top=[{"m": -0.1, "M": -2.5}])


def _kept(folder: Path) -> list[str]:
    """Every whole line of every file of records."""
    files = folder.rglob("*.jsonl")
    lines = (line for file in files for line in file.read_text().splitlines())
    return sorted(line for line in lines if line.endswith("}"))


@pytest.mark.parametrize("store", STORES)
def test_killed_with_a_torn_line_and_given_again_it_asks_only_what_is_missing(
    tmp_path: Path, store: str
) -> None:
    ask: Callable[[str, Path], None] = STORES[store]
    go_on, killed = threading.Event(), tmp_path / "killed"

    def reply(body: Body) -> Body:
        if len(server.requests) > 5:  # the fifth answer is the last before the kill
            go_on.wait()
        return _said(body)

    with scripted(_said) as server:
        ask(server.url, tmp_path / "whole")
        assert len(server.requests) == ASKED
        ask(server.url, tmp_path / "whole")
        assert len(server.requests) == ASKED, "what is stored is not asked again"
    with scripted(reply) as server:
        try:
            forked.killed(lambda: ask(server.url, killed), lambda: len(_kept(killed)) == 5)
        finally:
            go_on.set()
        under_way = len(server.requests) - 5
        assert under_way <= 2
        file = max(killed.rglob("*.jsonl"), key=lambda file: file.stat().st_size)
        os.truncate(file, file.stat().st_size - 10)
        ask(server.url, killed)
        times = Counter(map(last_user, server.bodies))
    assert _kept(killed) == _kept(tmp_path / "whole")
    assert len(times) == ASKED
    assert sum(times.values()) == ASKED + under_way + 1  # and the one whose line was torn
