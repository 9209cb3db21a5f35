"""Prompts shared among processes: the same files as one process writes, and none lost by a kill."""

import multiprocessing
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dcr import augment, cli, workers
from dcr import eval as eval_entry
from dcr.core import storage
from dcr.core.config import UserError
from dcr.extensions import EvalSettings
from tests import tiny_run

ROOT = Path(__file__).parent.parent
ASKED = (
    *("model=tiny", "precision=fp32", "gen.max_new_tokens=4", "gen.batch_size=3", "limit=7"),
    *("tasks=[over_refusal,safety,discernment,refusal_probability,kernel]", "entk.top_k=2"),
    *("refusal_prob.prompts=5", "entk.prompts=4", "entk.budget_gib=0.001", "entk.params=[all]"),
    *("trainer.progress=false", "trainer.accelerator=cpu", "wandb.mode=disabled"),
)


def evaluated(folder: Path, *overrides: str) -> dict[str, bytes]:
    """The files of an evaluation that answers are kept in, and the refusal probabilities."""
    composed = tiny_run.composed("eval", *told(folder, *overrides))
    eval_entry.evaluate(*cli.resolved(composed, EvalSettings))
    return written(folder)


def told(folder: Path, *overrides: str) -> list[str]:
    return [*ASKED, f"output={folder}", *overrides]


def written(folder: Path) -> dict[str, bytes]:
    places = [*folder.glob("eval/*/**/*.jsonl"), *folder.glob("eval/*/kernel/*.safetensors")]
    files = {_named(file): file.read_bytes() for file in places}
    for file in folder.glob("eval/*/metrics.json"):
        measured = storage.read_json(file, dict[str, Any])
        files["measured"] = str(
            [measured[name] for name in ("discernment", "refusal_probability", "kernel")]
        ).encode()
    return files


def _named(file: Path) -> str:
    return "/".join(file.parts[file.parts.index("eval") + 2 :])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return evaluated(tmp_path_factory.mktemp("one"))


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes that import nothing anew."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda _: fork)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that threads and fork do not go together
        yield


@pytest.mark.usefixtures("forked")
def test_three_processes_write_what_one_does(one: dict[str, bytes], tmp_path: Path) -> None:
    assert {"openings/demo_toxic_heldout.jsonl", "kernel/all.safetensors"} < one.keys()
    assert evaluated(tmp_path, "trainer.devices=3") == one


@pytest.mark.usefixtures("forked")
def test_each_attempt_of_augment_is_shared_under_its_own_instruction(tmp_path: Path) -> None:
    rows = [{"prompt": f"How do I kill process {i}?"} for i in range(3)]
    source = tiny_run.write_jsonl(tmp_path / "rows.jsonl", rows)
    kept = []
    for devices in (1, 2):
        out = tmp_path / str(devices) / "answers.jsonl"
        told = ("model=tiny", "precision=fp32", "gen.max_new_tokens=2", "gen.batch_size=1")
        more = (*told, "trainer.progress=false", f"trainer.devices={devices}")
        assert augment.main([f"source={source}", f"out={out}", "attempts=2", *more]) == 0
        kept.append({file.read_bytes() for file in out.parent.rglob("eval/*/answers.jsonl")})
    assert len(kept[0]) == 2
    assert kept[0] == kept[1]


@pytest.mark.usefixtures("forked")
def test_a_killed_process_ends_the_command_and_the_next_one_goes_on(
    one: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    appended = storage.append_lines

    def append_and_kill(*given: Any) -> None:
        appended(*given)
        monkeypatch.setattr(storage, "append_lines", appended)
        for process in multiprocessing.active_children():
            process.kill()

    monkeypatch.setattr(storage, "append_lines", append_and_kill)
    with pytest.raises(UserError, match=r"trainer.devices=2: .* was killed, .* goes on"):
        evaluated(tmp_path, "trainer.devices=2")
    kept = {_named(file): file.read_bytes() for file in tmp_path.glob("eval/*/**/*.jsonl")}
    assert kept
    assert all(one[name].startswith(rows) for name, rows in kept.items())
    assert evaluated(tmp_path, "trainer.devices=2") == one


@pytest.mark.slow
def test_the_command_itself_shares_prompts(one: dict[str, bytes], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "eval.py"), *told(tmp_path, "trainer.devices=2")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert written(tmp_path) == one


def test_an_error_of_a_process_is_the_commands(
    forked: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="exceed the model's context of 2048"):
        evaluated(tmp_path, "trainer.devices=2", "gen.max_new_tokens=2040")
    cli.forget_empty(tmp_path)
