"""Records kept line by line: none is lost, none is torn, and no answer is paid for twice.

One suite for every store of answers: an evaluation's, a judge's and an annotator's. The truth is a
command that nothing ended.
"""

import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dcr import eval as evaluation
from dcr.core import storage
from dcr.core.config import DataError, UserError
from dcr.core.generation import Completion
from dcr.endpoints import HTTPConfig
from dcr.extensions import EvalSettings
from dcr.judges import AnnotatorConfig, LLMJudgeConfig, pairwise
from dcr.judges import judging as judges
from dcr.judges.pairwise import Pair
from tests import forked
from tests.servers.scripted import Body, completion, last_user, scripted
from tests.test_eval import resolved

FULL = OSError(28, "No space left on device")


@dataclass(frozen=True)
class Row:
    id: str
    n: int


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


# --- every store of answers ---

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
