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

pytestmark = pytest.mark.usefixtures("composed_once")
BY_HAND = re.compile(r"^ *python (train\.py|eval\.py|-m dcr\.report) (.*)$", re.M)


@pytest.fixture
def few(words: list[str]) -> list[str]:
    """Settings of a demo of seconds."""
    kept = [word for word in words if word != "dcr.epochs=1"]
    return [*kept, "sft.readout.steps=0", "data.group_holdout=0", "out=demo"]


@pytest.mark.timeout(600)
def test_the_demo_does_what_its_commands_do_by_hand(
    command: Callable[..., Ended], few: list[str]
) -> None:
    told = command("dcr.demo", *few)
    assert told.code == 0, told.err
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
    # the same weights to the bit, which are evaluated already
    assert re.findall(r"^\[(.)/5\] (.*)", on.out, re.M) == [("2", "DCR: training")]
    assert table in on.out
    assert "/5]" not in command("dcr.demo", *few).out
    other = command("dcr.demo", *few, "seed=1")
    assert "demo/stl was made with another configuration (seed: 0 -> 1)" in other.err
    assert other.code == 2
    by_hand = shlex.split(commands[1][1])[:-1]
    assert command("train.py", *by_hand, "run=hand").code == 0
    for other in (adapter("demo/dcr"), adapter("hand")):
        assert_close(other, whole, rtol=0, atol=0)


def adapter(run: str) -> dict[str, object]:
    return load_file(Path(run) / "sft" / "adapter_model.safetensors")  # pyright: ignore


def test_the_demo_refuses_what_is_no_setting(command: Callable[..., Ended]) -> None:
    assert command("dcr.demo", "epochs=3").error.startswith("epochs=3: no setting of train.py or")
    assert command("dcr.demo", "run=elsewhere").code == 2
    assert not Path("outputs").exists()
