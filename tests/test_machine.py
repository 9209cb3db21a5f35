"""How many threads: what the process may use, what others hold, and who may say otherwise."""

import math
from pathlib import Path

import psutil
import pytest
import torch

from dcr import headroom
from dcr.core import machine

FOUR = [0, 1, 2, 3]


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Four cores, idle, without OMP_NUM_THREADS, control groups or an effect on this process."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(headroom, "cores", lambda: FOUR)
    monkeypatch.setattr(headroom, "held_by_others", lambda _: 0.0)
    monkeypatch.setattr(headroom, "control_groups", list)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    return monkeypatch


@pytest.mark.parametrize(
    ("held", "granted", "number"),
    [(0.0, "max", 4), (1.0, "max", 3), (0.3, "max", 4), (3.9, "max", 1), (9.0, "max", 1),
     (0.0, "250000", 2), (1.0, "250000", 2), (3.0, "250000", 1), (0.0, "50000", 1)],
)  # fmt: skip
def test_it_takes_what_is_free(
    idle: pytest.MonkeyPatch, tmp_path: Path, held: float, granted: str, number: int
) -> None:
    (tmp_path / "cpu.max").write_text(f"{granted} 100000\n")
    idle.setattr(headroom, "held_by_others", lambda _: held)
    idle.setattr(headroom, "control_groups", lambda: [tmp_path])
    assert machine.chosen_threads(None)[0] == number


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/slice/job\n")
    inner = tmp_path / "root" / "slice" / "job"
    inner.mkdir(parents=True)
    assert headroom.quota(headroom.control_groups(tmp_path / "root", own)) == math.inf
    (inner / "cpu.max").write_text("max 100000\n")
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    assert headroom.quota(headroom.control_groups(tmp_path / "root", own)) == 1.5


def test_a_core_counts_as_taken_while_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that has just ended or just begun holds no core: the load lags behind."""
    now = [100.0, 50.0, 0.0, 0.0, 100.0]  # the last is not ours
    monkeypatch.setattr(psutil, "cpu_percent", lambda **_: now)
    monkeypatch.setattr(headroom.os, "getloadavg", lambda: (2.0, 0.0, 0.0))
    assert headroom.held_by_others(FOUR) == 1.5
    monkeypatch.setattr(headroom.os, "getloadavg", lambda: (0.25, 0.0, 0.0))
    assert headroom.held_by_others(FOUR) == 0.25
    assert headroom.held_by_others([2, 3]) == 0


def test_the_user_the_environment_and_the_run_come_first(
    idle: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given: list[int] = []
    idle.setattr(torch, "set_num_threads", given.append)
    with caplog.at_level("INFO"):
        assert machine.use_threads(3, before=2) == 3
        assert (
            machine.use_threads(None, before=2) == 2
        )  # else a resumed run's last bits would differ
        assert machine.use_threads(None, before=8) == 4  # it began on a larger machine
        idle.setenv("OMP_NUM_THREADS", "1")
        assert machine.use_threads(None, before=2) == 4, "kept all the same"
    assert given == [3, 2, 4, 4], "the number that torch has as well: a fork needs the call"
    assert [line.split(" (")[0] for line in caplog.messages] == [
        f"threads: {number}" for number in (3, 2, 4, 4)
    ]
