"""State that was damaged on disk: every command that reads it ends in one line with the file.

A finished run is damaged file by file in every way that a disk, an editor or a kill can think of.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dcr import chat, export
from dcr import eval as eval_entry
from dcr import train as train_entry
from dcr.core import storage
from dcr.core.config import DataError, Precision, UserError
from dcr.core.models import folders
from dcr.core.runs import Run
from dcr.report import building
from tests import tiny_run
from tests.test_eval import resolved

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Any]:
    """A run of both stages with snapshots and an evaluation, and the settings it was made with."""
    run, settings = tiny_run.trained(tmp_path_factory.mktemp("runs"), "tracking.snapshots=1")
    _evaluate(run)
    return run, settings


def _evaluate(run: Run, *more: str) -> None:
    settings, _ = resolved(f"run={run.folder}", "tasks=[over_refusal]", "limit=2", *more)
    eval_entry.evaluate(settings, run)


def _export(run: Run) -> None:
    out = run.folder.parent / "exported"
    try:
        export.export(run, out)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _report(run: Run) -> None:
    """The report goes on without what it cannot read, and says so in a note."""
    page = run.folder.parent / "page.html"
    page.unlink(missing_ok=True)
    building.build([run.folder], page)
    text = page.read_text()
    if noted := re.search(r"[^>]*(?:skipped, unreadable|: missing|disagree)[^<]*", text):
        raise UserError(noted[0])


COMMANDS: dict[str, Callable[[Run], object]] = {
    "eval": _evaluate,
    "snapshots": lambda run: _evaluate(run, "snapshots=true"),
    "export": _export,
    "chat": lambda run: chat.open_stage(run),
    "report": _report,
}


@contextmanager
def damaged(file: Path, damage: Damage) -> Iterator[None]:
    """The file as `damage` leaves it, and whole again afterwards."""
    whole = file.read_bytes()
    try:
        damage(file)
        yield
    finally:
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        file.write_bytes(whole)


def _halved(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _not_utf8(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:9] + b"\xff" + content[9:])


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


BYTES: dict[str, Damage] = {  # of which test_storage shows what each document makes
    "halved": _halved,
    "empty": lambda file: file.write_bytes(b""),
    "a list": lambda file: file.write_bytes(b"[1]\n"),
    "a number": lambda file: file.write_bytes(b"3\n"),
    "binary": lambda file: file.write_bytes(b"\x00\xff\x93NUMPY" * 9),
    "not UTF-8": _not_utf8,
    "a folder": _folder,
}


FEW = {how: BYTES[how] for how in ("halved", "a folder")}


def _told(command: Callable[[Run], object], run: Run) -> str:
    """The error that a user reads, "" if the command ends well. Other exceptions pass through."""
    try:
        command(run)
    except UserError as error:
        return str(error)
    return ""


def _faults(run: Run, file: Path, damages: dict[str, Damage], commands: list[str]) -> list[str]:
    found = []
    for how, damage in damages.items():
        with damaged(file, damage):
            for command in commands:
                try:
                    told = _told(COMMANDS[command], run)
                except Exception as error:  # a traceback is what is looked for
                    found.append(f"{command}, {how}: {type(error).__name__}: {str(error)[:150]}")
                    continue
                if file.name not in told:
                    found.append(f"{command}, {how}: {told[:150] or 'ended well'}")
    return found


def _json(change: Callable[[Any], object]) -> Damage:
    """The document with something changed in it."""

    def damage(file: Path) -> None:
        value = json.loads(file.read_text())
        change(value)
        file.write_text(json.dumps(value))

    return damage


# --- results ---


@pytest.mark.parametrize("stage", ["contrastive", "sft"])
def test_every_file_of_a_result_is_checked(finished: tuple[Run, Any], stage: str) -> None:
    run, _ = finished
    for file in run.stage(stage).iterdir():
        more = {} if file.name == storage.CHECKSUMS else {"flipped": _flipped}
        for how, damage in (BYTES | more).items():
            with damaged(file, damage), pytest.raises(UserError) as told:
                storage.check_checksums(run.stage(stage))
            assert file.name in str(told.value), how
    weights = next(run.stage(stage).glob("*.safetensors"))
    # what is answered already needs no weights of the base
    commands = ["chat", "export"] if stage == "contrastive" else ["eval", "chat", "export"]
    assert _faults(run, weights, {"flipped": _flipped}, commands) == []
    assert _faults(run, weights, {"gone": lambda file: file.unlink()}, ["chat"]) == []


def test_a_damaged_snapshot_is_named(finished: tuple[Run, Any]) -> None:
    run, _ = finished
    weights = next(run.snapshots.glob("*/adapter_model.safetensors"))
    assert _faults(run, weights, {"flipped": _flipped}, ["snapshots"]) == []


def test_stage_two_does_not_start_from_a_damaged_stage_one(
    finished: tuple[Run, Any], tmp_path: Path
) -> None:
    whole, settings = finished
    run = Run(tmp_path / "run")
    shutil.copytree(whole.folder, run.folder, ignore=shutil.ignore_patterns("sft", "eval"))
    weights = next(run.stage("contrastive").glob("*.safetensors"))
    within = _json(lambda value: value.update(contrastive=3))
    cases = [(weights, _flipped), (run.base_file, _halved), (run.base_file, within)]
    for file, damage in cases:
        with damaged(file, damage), pytest.raises(UserError, match=re.escape(str(file))):
            train_entry.train(settings, run)
    assert not run.done("sft")


@pytest.mark.parametrize("stage", ["contrastive", "sft"])
def test_a_result_without_its_checksums_is_damaged(finished: tuple[Run, Any], stage: str) -> None:
    file = finished[0].stage(stage) / storage.CHECKSUMS
    with damaged(file, lambda file: file.unlink()), pytest.raises(DataError) as refused:
        folders.open_result(file.parent, Precision.fp32)
    assert str(refused.value).startswith(f"{file}: cannot be read (No such file")


def test_adapter_weights_that_are_no_numbers_are_refused(
    finished: tuple[Run, Any], tmp_path: Path
) -> None:
    """Those of a base are in test_hostile."""
    run = Run(tmp_path / "run")
    shutil.copytree(finished[0].folder, run.folder)
    file = run.stage("sft") / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[sorted(tensors)[-1]].view(-1)[-1] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    storage.write_checksums(file.parent)
    with pytest.raises(UserError, match=r"sft.*not finite"):
        chat.open_stage(run)


# --- what a run says of itself ---


def _text(pattern: str, instead: str) -> Damage:
    """The first match of a pattern, which may begin a line, replaced."""

    def damage(file: Path) -> None:
        text, count = re.subn(pattern, instead, file.read_text(), count=1, flags=re.MULTILINE)
        assert count, pattern
        file.write_text(text)

    return damage


CONFIG = {
    "no model": _text("^model:", "other:"),
    "no seed": _text("^seed:.*", ""),
    "seed": _text("^seed:.*", "seed: [1]"),
    "layer": _text("^  layer: .*", "  layer: x"),
    "label": _text("^  label: tiny", "  label: [1]"),
    "precision": _text("^  precision: .*", "  precision: 17"),
    "unknown": _text("^  label:", "  labbel:"),
    "cut after a line": _text(r"(?s)^  near_duplicate:.*", ""),
    "source": _text("^  seemingly_toxic:", "  seemingly_toxic: 3\n  other:"),
}
ROWS: dict[str, Damage] = {
    "no count": _json(lambda value: value["rows"]["toxic"].pop("count")),
    "ids": _json(lambda value: value["rows"]["toxic"].update(ids=3)),
    "fingerprint": _json(lambda value: value["rows"]["toxic"].update(fingerprint=None)),
    "in_distribution": _json(lambda value: value.update(in_distribution="xstest")),
    "no rows": _json(lambda value: value.pop("rows")),
}


@pytest.mark.parametrize(
    ("name", "more", "commands"),
    [("config.yaml", CONFIG, ["eval", "export", "chat"]), ("rows.json", ROWS, ["eval", "export"])],
)
def test_what_a_run_says_of_itself_is_checked(
    finished: tuple[Run, Any], name: str, more: dict[str, Damage], commands: list[str]
) -> None:
    run, settings = finished
    file = run.folder / name
    assert _faults(run, file, FEW | more, commands[:1]) == []
    assert _faults(run, file, FEW, commands[1:]) == []
    for damage in (FEW | more).values():
        with damaged(file, damage), pytest.raises(UserError, match=re.escape(name)):
            train_entry.train(settings, run)


def test_a_damaged_choice_of_the_layer_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path)
    storage.write_json(run.layer_file, {"block": 2})
    assert run.block() == 2
    text = _json(lambda value: value.update(block="2"))
    for damage in (*FEW.values(), _json(dict.clear), text):
        with damaged(run.layer_file, damage), pytest.raises(UserError, match=r"layer\.json"):
            run.block()


# --- what an evaluation left ---


def test_damaged_metrics_are_named(finished: tuple[Run, Any]) -> None:
    run, _ = finished
    (file,) = run.folder.glob("eval/sft-*/metrics.json")
    assert _faults(run, file, FEW, ["eval", "report"]) == []  # test_results damages each block


def test_damaged_completions_are_named_with_their_line(finished: tuple[Run, Any]) -> None:
    run, _ = finished
    (file,) = run.folder.glob("eval/sft-*/*.jsonl")

    def first(change: Callable[[Any], object]) -> Damage:
        def damage(file: Path) -> None:
            line, *others = file.read_text().splitlines()
            value = json.loads(line)
            change(value)
            file.write_text("\n".join([json.dumps(value), *others]) + "\n")

        return damage

    for damage in (
        BYTES["binary"],
        first(lambda value: value.pop("id")),
        first(lambda value: value.update(response=3)),
    ):
        with damaged(file, damage):
            assert f"{file}:1: " in _told(_evaluate, run)


# --- a disk that is full ---


def test_a_full_disk_is_one_line_and_leaves_nothing(
    finished: tuple[Run, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a result, an export, or an evaluation's metrics are written."""
    whole, settings = finished
    run, new = Run(tmp_path / "run"), Run(tmp_path / "new")
    shutil.copytree(whole.folder, run.folder, ignore=shutil.ignore_patterns("sft"))
    shutil.copytree(whole.stage("sft"), run.stage("sft"))
    shutil.copytree(whole.folder, new.folder, ignore=shutil.ignore_patterns("sft", "eval"))
    (metrics,) = run.folder.glob("eval/sft-*/metrics.json")
    before, replace = metrics.read_text(), os.replace

    def full(source: Any, target: Any) -> None:
        if re.search(r"/\.writing-(out|metrics\.json|sft)\.\w{8}(/|$)", str(source)):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    for command, name in (
        (lambda: export.export(run, tmp_path / "out"), "out"),
        (lambda: _evaluate(run), "metrics.json"),
        (lambda: train_entry.train(settings, new), "sft"),
    ):
        with pytest.raises(UserError, match=rf"{name}: cannot be written .No space left"):
            command()
    assert metrics.read_text() == before
    assert not new.done("sft")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob(f"{storage.STAGING}*"))
