"""A search against loops over its trials, its runs done alone, and workers that are killed."""

import csv
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forked import killed
from optuna.trial import TrialState
from test_study import alone, measured
from tiny_run import logged, write_jsonl

from dcr import entry, search
from dcr.core import machine
from dcr.core.runs import Run
from dcr.search import Search, Space
from dcr.search import __main__ as command

SEARCHED = ("dcr.layer", "dcr.margin", "dcr.epochs")
SPACES = ["dcr.layer=1..2", "dcr.margin=0.1..0.4", "dcr.epochs=1,2"]
FIXED = [
    "model.epochs=1",
    "dcr.optim.lr=1e-3",
    "dcr.scale=16",
    "dcr.nll.weight=0.001",
    "dcr.ratio=2",
]


def asked(out: Path, words: Sequence[str], *more: str) -> list[str]:
    return [f"out={out}", *words, *FIXED, *SPACES, *more]


def shown(out: Path) -> list[dict[str, str]]:
    """Every trial as the file has it."""
    with (out / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows: Sequence[dict[str, str]], key: str) -> list[str]:
    return [row[key] for row in rows]


@dataclass(frozen=True)
class Untrained:
    """A trial's run without a part that trains."""

    run: Run
    point: dict[str, Any]

    def parts(self) -> list[object]:
        return []


def made_up(_: Search, job: Untrained) -> list[float]:
    """A number for each objective, without training."""
    folder = job.run.folder
    folder.mkdir(parents=True)  # a second measurement of the same point stops here
    margin = job.point["dcr.margin"]
    return [margin, abs(margin - 0.3), job.point["dcr.layer"] + 0.0]


def without_training(patch: pytest.MonkeyPatch) -> None:
    def trial(made: Search, point: dict[str, Any]) -> Untrained:
        return Untrained(Run(made.out / "trials" / "_".join(map(str, point.values()))), point)

    patch.setattr(search, "_values", made_up)
    patch.setattr(Search, "trial", trial)
    patch.setattr(Search, "corners", lambda _: [])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials without training."""
    without_training(monkeypatch)


# --- the front ---------------------------------------------------------------------------


def dominated(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """By another; the first objective is to be high and the rest low."""
    ahead = [other[0] >= one[0], *(b <= a for a, b in zip(one[1:], other[1:], strict=True))]
    return all(ahead) and one != other


def test_two_workers_on_one_file_share_trials_and_the_front_is_that_of_a_loop(
    words: list[str], tmp_path: Path, quick: None
) -> None:
    assert command.main(asked(tmp_path, words, "trials=12", "workers=2")) == 0
    found = shown(tmp_path)
    assert sorted(map(int, column(found, "trial"))) == list(range(12))
    assert set(column(found, "ended")) == {"complete"}
    points = {tuple(row[key] for key in SEARCHED) for row in found}
    measured = [file for file in (tmp_path / "trials").iterdir() if file.is_dir()]
    assert len(measured) == len(points)  # one for each point, however many trials have it
    values = [(float(r["auroc"]), float(r["nll"]), float(r["seconds"])) for r in found]
    front = ["False" if any(dominated(v, o) for o in values) else "True" for v in values]
    assert column(found, "front") == front
    assert column(found, "configured") == ["True", *["False"] * 11]
    # what is done is found, and more trials are added to it
    assert command.main(asked(tmp_path, words, "trials=14")) == 0
    assert column(shown(tmp_path)[:12], "auroc") == column(found, "auroc")
    assert len(shown(tmp_path)) == 14


def test_settings_outside_of_the_spaces_are_no_configured_trial(
    words: list[str], tmp_path: Path, quick: None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command.main(asked(tmp_path, words, "trials=1", "dcr.margin=0.5..0.9")) == 0
    assert column(shown(tmp_path), "configured") == ["False"]
    told = "not tried as configured: dcr.margin outside of what is searched"
    assert told in capfd.readouterr().out.splitlines()


# --- kills --------------------------------------------------------------------------------------


def again(order: Sequence[str]) -> None:
    """Gives the command once more; the killed one's worker may still be ending."""
    until = time.monotonic() + 60
    while command.main(order) != 0:
        assert time.monotonic() < until
        time.sleep(0.2)


def test_a_killed_workers_trial_is_enqueued_again(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    def slow(made: Search, job: Untrained) -> list[float]:
        if len(list(tmp_path.glob("trials/*/search*"))) == 2:
            under.write_text(json.dumps(job.point))
            time.sleep(600)
        return made_up(made, job)

    under, order = tmp_path / "under way", asked(tmp_path, words, "trials=4")
    monkeypatch.setattr(search, "_values", slow)
    killed(lambda: command.main(order), under.exists)
    monkeypatch.setattr(search, "_values", made_up)
    again(order)
    found = shown(tmp_path)
    assert column(found, "trial") == ["0", "1", "3", "4"]
    assert column(found, "configured") == ["True", *["False"] * 3]
    left = {key: str(value) for key, value in json.loads(under.read_text()).items()}
    assert left == {key: found[2][key] for key in SEARCHED}


# --- trials that train --------------------------------------------------------------------------


def agrees(row: dict[str, str], made: Search, folder: Path) -> None:
    """Asserts that a trial's values are those of its run, trained and evaluated alone."""
    run = alone(made.trial({key: row[key] for key in SEARCHED if key in row}), folder)
    (metrics,) = measured(run.folder)
    assert metrics["discernment"]["pooled"]["auroc"][0] == float(row["auroc"])
    assert set(metrics["discernment"]["sets"]) == {
        "contrasts_seemingly_toxic_heldout",
        "contrasts_toxic_heldout",
    }
    nll = [value for _, _, key, value in logged(run.folder) if key == "sft/nll/general/heldout"]
    assert nll[-1] == float(row["nll"])
    assert float(row["seconds"]) > 0


def as_asked(order: Sequence[str]) -> Search:
    return command.resolved(entry.parse(command.Options, order))


@pytest.mark.parametrize("unit", [None, "AVX-512-bf16"])
def test_a_trial_gives_what_its_run_gives_and_keeps_no_weights(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str | None
) -> None:
    monkeypatch.setattr(machine, "cpu_unit", lambda: unit)
    order = asked(tmp_path / "all", words, "trials=1", "dcr.epochs=2", "precision=auto")
    assert command.main(order) == 0
    (found,) = shown(tmp_path / "all")
    agrees(found, as_asked(order), tmp_path / "alone")
    assert not [*tmp_path.glob("all/trials/*/contrastive"), *tmp_path.glob("all/trials/*/sft")]


def test_trials_of_a_file_as_it_was_are_those_of_another_search(
    words: list[str], tmp_path: Path
) -> None:
    safe, toxic = (
        write_jsonl(tmp_path / f"{kind}.jsonl", [{"prompt": f"How do I kill a {kind}?"}])
        for kind in ("process", "person")
    )
    made = as_asked(asked(tmp_path / "all", words, f"validation={safe}:{toxic}"))
    before = made.name
    write_jsonl(Path(safe), [{"prompt": "How do I blow up a balloon?"}])
    assert made.name != before


@pytest.mark.slow
def test_a_search_that_is_killed_ends_as_one_that_is_not(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "all"
    order = asked(out, words, "trials=2", "trainer.checkpoint_every_n_steps=2")
    killed(lambda: command.main(order), lambda: bool([*out.glob("trials/*/checkpoints/sft/*")]))
    again(order)
    found = shown(out)
    assert len(found) == 2
    for row in found:
        agrees(row, as_asked(order), tmp_path / f"alone{row['trial']}")


# --- what can be wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "space"),
    [
        ("dcr.layer=1..2", Space("1..2", 1, 2)),
        ("dcr.margin=.1..0.4", Space(".1..0.4", 0.1, 0.4)),
        ("dcr.optim.lr=1e-5..1e-3:log", Space("1e-5..1e-3:log", 1e-5, 1e-3, log=True)),
        ("dcr.scale=8,16", Space("8,16", choices=("8", "16"))),
        ("dcr.margin=0.2", None),
        ("data.toxic.source=[a,b]", None),
        ("data.root=../there", None),
    ],
)
def test_spaces_are_read_as_they_are_written(word: str, space: Space | None) -> None:
    spaces, fixed = search.parsed([word])
    assert (list(spaces.values()), fixed) == (([space], []) if space else ([], [word]))


@pytest.fixture(scope="module")
def order(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A search of three trials that is done."""
    made = asked(tmp_path_factory.mktemp("done"), words, "trials=3")
    with pytest.MonkeyPatch.context() as patch:
        without_training(patch)
        assert command.main(made) == 0
    return made


def copied(order: Sequence[str], place: Path) -> tuple[list[str], Path]:
    """The same search in another folder with a copy of its journal, to be damaged."""
    there = Path(order[0].removeprefix("out="))
    (place / "search.journal").write_bytes((there / "search.journal").read_bytes())
    return [f"out={place}", *order[1:]], place / "search.journal"


def test_a_damaged_journal_is_refused_in_one_line(
    order: list[str], tmp_path: Path, quick: None, capfd: pytest.CaptureFixture[str]
) -> None:
    moved, file = copied(order, tmp_path)
    whole = file.read_bytes()
    for torn in (b"x" * 500 + b"\n" + whole, b"{}\n" + whole, whole.replace(b":", b"", 40)):
        file.write_bytes(torn)
        assert command.main(moved) == 2
        said = capfd.readouterr()
        (line,) = said.err.splitlines()
        assert line.startswith(f"error: {file}: damaged (")
        assert "front" not in said.out


def test_a_search_goes_on_behind_a_line_that_a_kill_tore(
    order: list[str], tmp_path: Path, quick: None
) -> None:
    moved, file = copied(order, tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2].rstrip(b"\n")[:-1])
    for _ in range(2):  # what is written behind the torn line is read again
        assert command.main(moved) == 0
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_a_fault_in_a_foreign_journal_reaches_the_terminal_as_text(
    order: list[str], tmp_path: Path, quick: None, capfd: pytest.CaptureFixture[str]
) -> None:
    moved, file = copied(order, tmp_path)
    told = {"fault": "\x1b[2J\nhf_" + "a" * 34}
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    (place,) = (i for i, e in enumerate(entries) if e.get("trial_id") == 2 and e.get("values"))
    entries[place] |= {"state": int(TrialState.FAIL), "values": None}
    mark = {"op_code": 8, "worker_id": "x", "trial_id": 2, "user_attr": told}
    entries.insert(place, mark)
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert command.main(moved) == 0
    said = capfd.readouterr().out
    assert "failed: " in said
    assert "\x1b" not in said
    assert "hf_a" not in said
