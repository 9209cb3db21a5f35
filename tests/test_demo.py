"""The demo: one command that does what six do by hand, and goes on where it was stopped."""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended
from safetensors.torch import load_file
from torch.testing import assert_close

from dcr.core import progress
from dcr.demo.__main__ import Overall, Part, Work

BY_HAND = re.compile(r"^ *python (train\.py|eval\.py|-m dcr\.report) (.*)$", re.M)


@pytest.fixture
def few(words: list[str]) -> list[str]:
    """Settings of a demo of seconds."""
    kept = [word for word in words if word not in ("dcr.epochs=1", "trainer.progress=false")]
    return [*kept, "sft.readout.steps=0", "data.group_holdout=0", "out=demo"]


@pytest.mark.timeout(600)
def test_the_demo_does_what_its_commands_do_by_hand(
    command: Callable[..., Ended], few: list[str]
) -> None:
    told = command("dcr.demo", *few)
    assert told.code == 0, told.err
    assert "step" not in told.err, told.err  # no bar of a stage's own
    commands = BY_HAND.findall(told.out)
    assert [script for script, _ in commands] == [
        *["train.py"] * 2,
        *["eval.py"] * 3,
        "-m dcr.report",
    ]
    table = told.out.rpartition("\n\npage: ")[0].rpartition("report.html\n")[2]
    assert "compliance" in table
    whole = adapter("demo/dcr")
    shutil.rmtree("demo/dcr/sft")  # as where it was stopped after stage one
    on = command("dcr.demo", *few)
    assert re.findall(r"^\[(.)/5\] (.*)", on.out, re.M) == [
        ("2", "DCR: training"),
        ("4", "DCR: evaluation"),
    ]
    assert table in on.out
    assert "/5]" not in command("dcr.demo", *few).out
    other = command("dcr.demo", *few, "seed=1")
    assert "demo/stl was made with another configuration (seed: 0 -> 1)" in other.err
    assert other.code == 2
    by_hand = shlex.split(commands[1][1])[:-1]
    assert command("train.py", *by_hand, "run=hand", "trainer.progress=false").code == 0
    for other in (adapter("demo/dcr"), adapter("hand")):
        assert_close(other, whole, rtol=0, atol=0)


def adapter(run: str) -> dict[str, object]:
    return load_file(Path(run) / "sft" / "adapter_model.safetensors")  # pyright: ignore


def test_the_demo_refuses_what_is_no_setting(command: Callable[..., Ended]) -> None:
    assert command("dcr.demo", "epochs=3").error.startswith("epochs=3: no setting of train.py or")
    assert command("dcr.demo", "run=elsewhere").code == 2
    assert not Path("outputs").exists()


def test_one_bar_over_all_parts_knows_what_was_done_before() -> None:
    works = {"a": {"x": 10}, "b": {"x": 20, "y": 10}, "c": {"x": 40}}
    parts = [
        Part(name, "", bool, list, {bar: Work(0, seconds) for bar, seconds in bars.items()})
        for name, bars in works.items()
    ]
    overall = Overall(parts, 1.0, 1)
    seen = []
    with progress.told_to(overall.reached):
        overall.begin(parts[1])  # "a" is done
        seen.append((overall.now, overall.counted))
        bar = progress.Bar(desc="x", total=4, initial=2)  # half of it, in an earlier command
        assert bar.disable
        seen.append((overall.now, overall.counted))
        bar.update()
        progress.Bar(desc="another", total=1).update()
        seen.append((overall.now, overall.counted))
        progress.Bar(desc="y", total=2).update(1)
        seen.append((overall.now, overall.counted))
    overall.end(parts[1])
    overall.begin(parts[2])
    seen.append((overall.now, overall.counted))
    overall.end(parts[2])
    seen.append((overall.now, overall.counted))
    # the last quarter of "x" passes as "y" begins, which tells of no work
    assert seen == [(10, 0), (20, 0), (25, 5), (35, 10), (40, 15), (80, 55)]
    assert overall.whole == 80


def test_a_part_takes_its_products_and_the_rest() -> None:
    work = Work(4e9, 3.0)
    assert work.expected(2e9, 1) == pytest.approx(2 + 3)
    assert 2 + 1.5 < work.expected(2e9, 2) < 2 + 3  # two threads are not twice as fast
