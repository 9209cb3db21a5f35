"""State that was damaged on disk: every command that reads it ends in one line with the file.

A finished run is damaged file by file in every way that a disk, an editor or a kill can think of.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dcr import chat, export, report
from dcr import eval as eval_entry
from dcr import train as train_entry
from dcr.core import models, storage
from dcr.core.config import Precision, UserError
from dcr.core.runs import Run
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
    report.build([run.folder], page)
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


BYTES: dict[str, Damage] = {
    "halved": _halved,
    "empty": lambda file: file.write_bytes(b""),
    "a list": lambda file: file.write_bytes(b"[1]\n"),
    "a number": lambda file: file.write_bytes(b"3\n"),
    "binary": lambda file: file.write_bytes(b"\x00\xff\x93NUMPY" * 9),
    "not UTF-8": _not_utf8,
    "a folder": _folder,
}


def _told(command: Callable[[Run], object], run: Run) -> str:
    """What a user reads, "" where the command ends well. Any other exception is a traceback."""
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
    files = sorted(run.stage(stage).iterdir())
    assert storage.CHECKSUMS in [file.name for file in files]
    for file in files:
        # the sums themselves: an older result has none, so one that was deleted is none's fault
        damages = BYTES if file.name == storage.CHECKSUMS else BYTES | {"flipped": _flipped}
        few = {how: damages[how] for how in list(damages)[:: 1 if file.name[:3] == "ada" else 3]}
        assert _faults(run, file, few, ["export"]) == [], file
    weights = next(run.stage(stage).glob("*.safetensors"))
    flipped = {"flipped": _flipped, "gone": lambda file: file.unlink()}
    # what is answered already needs no weights of the base
    commands = ["chat", "export"] if stage == "contrastive" else ["eval", "chat", "export"]
    assert _faults(run, weights, flipped, commands) == []


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
    cases = [(file, _halved) for file in run.stage("contrastive").glob("*.*")]
    base = BYTES | {"a number within": _json(lambda value: value.update(contrastive=3))}
    cases += [(run.base_file, damage) for damage in base.values()]
    for file, damage in cases:
        with damaged(file, damage), pytest.raises(UserError, match=re.escape(str(file))):
            train_entry.train(settings, run)
    assert not run.done("sft")


@pytest.fixture(scope="module")
def without_sums(finished: tuple[Run, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("older") / "run")
    shutil.copytree(finished[0].folder, run.folder)
    for stage in ("contrastive", "sft"):
        (run.stage(stage) / storage.CHECKSUMS).unlink()
    return run


def test_older_results_have_no_sums_and_open_with_one_line(
    without_sums: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        chat.open_stage(without_sums)
        chat.open_stage(without_sums)
    told = [record.getMessage() for record in caplog.records]
    assert sum("no checksums" in line for line in told) == 1, told
    damages = BYTES | {"no key": _json(dict.clear)}
    for name in ("dcr.json", "adapter_config.json"):
        assert _faults(without_sums, without_sums.stage("sft") / name, damages, ["chat"]) == []


def _one_token_more(file: Path) -> None:
    value = json.loads(file.read_text())
    more = {**value["added_tokens"][-1], "id": len(value["model"]["vocab"]), "content": "<|more|>"}
    value["added_tokens"].append(more)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "name",
    [
        *("contrastive/config.json", "contrastive/model.safetensors"),
        *("sft/adapter_model.safetensors", "sft/tokenizer.json"),
    ],
)
def test_a_damaged_file_of_an_older_result_never_ends_in_another_exception(
    without_sums: Run, name: str
) -> None:
    """Without sums damage may go unseen; what cannot be opened is refused in one line."""
    file = without_sums.folder / name
    damages = {how: BYTES[how] for how in ("halved", "empty", "a list", "not UTF-8", "a folder")}
    damages |= {"flipped": _flipped}
    if file.suffix == ".json":
        damages["no key"] = _json(dict.clear)
    for damage in damages.values():
        with damaged(file, damage), contextlib.suppress(UserError):
            models.open_result(file.parent, Precision.fp32)
    if file.name == "tokenizer.json":
        with damaged(file, _one_token_more), pytest.raises(UserError, match="has 261 tokens") as e:
            models.open_result(file.parent, Precision.fp32)
        assert str(e.value).startswith(f"{file.parent}: ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stage", ["contrastive", "sft"])
def test_weights_that_are_no_numbers_are_refused(
    finished: tuple[Run, Any], tmp_path: Path, stage: str, value: float
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(finished[0].folder, run.folder)
    file = next(run.stage(stage).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    for place in ("contrastive", "sft"):
        (run.stage(place) / storage.CHECKSUMS).unlink()
    if stage == "contrastive":
        origin = json.loads((run.stage("sft") / "dcr.json").read_text())
        origin |= {"base": str(run.stage("contrastive")), "fingerprint": None}
        (run.stage("sft") / "dcr.json").write_text(json.dumps(origin))
    with pytest.raises(UserError, match=f"{stage}.*not finite"):
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
    file, damages = run.folder / name, BYTES | more
    assert _faults(run, file, damages, commands) == []
    for damage in damages.values():
        with damaged(file, damage), pytest.raises(UserError, match=re.escape(name)):
            train_entry.train(settings, run)


@pytest.mark.parametrize("how", [*BYTES, "no block", "text"])
def test_a_damaged_choice_of_the_layer_is_named(tmp_path: Path, how: str) -> None:
    run = Run(tmp_path)
    storage.write_json(run.layer_file, {"block": 2})
    assert run.block() == 2
    more = {"no block": _json(dict.clear), "text": _json(lambda value: value.update(block="2"))}
    (BYTES | more)[how](run.layer_file)
    with pytest.raises(UserError, match=r"layer\.json"):
        run.block()


# --- what an evaluation left ---

METRICS: dict[str, Damage] = {
    "no weights": _json(lambda value: value.pop("weights")),
    "sets": _json(lambda value: value.update(sets=[1])),
    "counts": _json(lambda value: next(iter(value["sets"].values())).update(n="2")),
    "more refused than asked": _json(
        lambda value: next(iter(value["sets"].values()))["refused"].update(paper=99)
    ),
    "settings": _json(lambda value: value.update(settings=3)),
}


def test_damaged_metrics_are_named(finished: tuple[Run, Any]) -> None:
    run, _ = finished
    (file,) = run.folder.glob("eval/sft-*/metrics.json")
    assert _faults(run, file, BYTES | METRICS, ["eval"]) == []
    assert _faults(run, file, BYTES, ["report"]) == []


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

    damages: dict[str, Damage] = {
        "a list": BYTES["a list"],
        "binary": BYTES["binary"],
        "no id": first(lambda value: value.pop("id")),
        "a number for a response": first(lambda value: value.update(response=3)),
        "text for tokens": first(lambda value: value.update(tokens="3")),
    }
    assert _faults(run, file, damages, ["eval"]) == []
    for damage in damages.values():
        with damaged(file, damage):
            assert f"{file}:1: " in _told(_evaluate, run)


# --- a disk that is full ---


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    finished: tuple[Run, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """While a result, an export, or an evaluation's metrics are written."""
    whole, settings = finished
    run, new = Run(tmp_path / "run"), Run(tmp_path / "new")
    shutil.copytree(whole.folder, run.folder, ignore=shutil.ignore_patterns("sft"))
    shutil.copytree(whole.stage("sft"), run.stage("sft"))
    shutil.copytree(whole.folder, new.folder, ignore=shutil.ignore_patterns("sft", "eval"))
    (metrics,) = run.folder.glob("eval/sft-*/metrics.json")
    before, real = metrics.read_text(), getattr(os, call)

    def full(*given: Any, **named: Any) -> Any:
        place = str(given[0]) if call == "replace" else os.readlink(f"/proc/self/fd/{given[0]}")
        if re.search(r"/\.writing-(out|metrics\.json|sft)\.\w{8}(/|$)", place):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given, **named)

    monkeypatch.setattr(os, call, full)
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
