"""A search against loops over its trials, its runs done alone, and workers that are killed."""

import csv
import json
import random
import re
import shutil
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from forked import killed
from test_study import alone, measured
from tiny_run import logged

from dcr import entry, search
from dcr.search import Search, Space, trials
from dcr.search import __main__ as command

SEARCHED = ("dcr.layer", "dcr.margin", "dcr.epochs")
SPACES = ["dcr.layer=1..2", "dcr.margin=0.1..0.4", "dcr.epochs=1,2"]
FIXED = ["dcr.optim.lr=1e-3", "dcr.scale=16", "dcr.nll.weight=0.001", "dcr.ratio=2"]


def asked(out: Path, words: Sequence[str], *more: str) -> list[str]:
    return [f"out={out}", *words, *FIXED, *SPACES, *more]


def shown(out: Path) -> list[dict[str, str]]:
    """Every trial as the front's file has it."""
    with (out / "front.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows: Sequence[dict[str, str]], key: str) -> list[str]:
    return [row[key] for row in rows]


def made_up(search: Search, point: Any, *_: Any) -> list[float]:
    """What a trial measures, without training: a number for each objective."""
    place = search.out / "ran" / "_".join(map(str, point.values()))
    place.parent.mkdir(exist_ok=True)
    place.open("x").close()  # a second run of the same point stops here
    time.sleep(random.random() / 50)
    return [point["dcr.margin"], abs(point["dcr.margin"] - 0.3), point["dcr.layer"] + 0.0]


def without_training(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trials, "_measured", made_up)
    patch.setattr(Search, "trial", lambda _, point: dict(point))
    patch.setattr(Search, "corners", lambda _: [])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials without training."""
    without_training(monkeypatch)


# --- front and choice ---------------------------------------------------------------------------


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
    assert len(list((tmp_path / "ran").iterdir())) == len(points)  # of twins one is measured
    values = [(float(r["auroc"]), float(r["nll"]), float(r["seconds"])) for r in found]
    front = ["0" if any(dominated(v, o) for o in values) else "1" for v in values]
    assert column(found, "front") == front
    assert column(found, "configured") == ["1", *"0" * 11]
    assert {"png", "svg", "csv"} == {file.suffix[1:] for file in tmp_path.glob("importances.*")}
    # what is done is found, and more trials are added to it
    assert command.main(asked(tmp_path, words, "trials=14")) == 0
    assert column(shown(tmp_path)[:12], "auroc") == column(found, "auroc")
    assert len(shown(tmp_path)) == 14


def test_the_knee_is_nearest_to_the_best_of_all_objectives() -> None:
    front = [(0.9, 5.0), (0.8, 1.2), (0.5, 1.0), (0.85, 4.0)]
    assert command.knee(front, (True, False)) == 1
    assert command.knee([(0.2,), (0.7,)], (True,)) == 1
    assert command.knee([(0.2, 3.0)], (True, False)) == 0


# --- kills --------------------------------------------------------------------------------------


def test_a_killed_workers_trial_is_failed_and_enqueued_again(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    def slow(search: Search, point: Any) -> list[float]:
        if len(list(tmp_path.glob("ran/*"))) == 2:
            under.write_text(json.dumps(point))
            time.sleep(600)
        return made_up(search, point)

    under, order = tmp_path / "under way", asked(tmp_path, words, "trials=4")
    monkeypatch.setattr(trials, "PULSE", 1)
    monkeypatch.setattr(trials, "SILENCE", 2)
    monkeypatch.setattr(trials, "_measured", slow)
    killed(lambda: command.main(order), under.exists)
    monkeypatch.setattr(trials, "_measured", made_up)
    noted: list[str] = []
    monkeypatch.setattr(command.study, "carry_out", lambda _: {})
    monkeypatch.setattr(command.report, "build", lambda *_, notes: noted.extend(notes))
    assert command.main([*order, "chosen=4"]) == 0
    found = shown(tmp_path)
    assert len(found) == 4
    assert "2" not in column(found, "trial")
    assert "chosen from 4 that" in noted[0]  # of which the one left was given another number
    left = {key: str(value) for key, value in json.loads(under.read_text()).items()}
    assert left in [{key: row[key] for key in SEARCHED} for row in found]


def test_a_trial_that_was_taken_over_meanwhile_is_left_to_the_other(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    def slept(search: Search, point: Any) -> list[float]:
        if not (tmp_path / "ran").exists():
            (tmp_path / "ran").mkdir()
            known = trials.opened(search)
            (own,) = known.get_trials(deepcopy=False)
            known.tell(own.number, state=trials.FAIL)
            trials.RETRY(known, own)
            return [0.1, 0.1, 1.0]
        return made_up(search, point)

    monkeypatch.setattr(trials, "_measured", slept)
    assert command.main(asked(tmp_path, words, "trials=2")) == 0
    assert column(shown(tmp_path), "ended") == ["complete", "complete"]


# --- trials that train --------------------------------------------------------------------------


def agrees(row: dict[str, str], made: Search, folder: Path) -> None:
    """Whether a trial's values are those of its run, trained and evaluated alone."""
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
    return command._asked(entry.read(command.Options, order))[0]


def test_a_trial_gives_what_its_run_gives_and_keeps_no_weights(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    order = asked(tmp_path / "all", words, "trials=1", "dcr.epochs=2")
    assert command.main(order) == 0
    assert re.search("no importances for .*: 1 of 4 trials ended", capfd.readouterr().out)
    (found,) = shown(tmp_path / "all")
    agrees(found, as_asked(order), tmp_path / "alone")
    assert not [*tmp_path.glob("all/trials/*/contrastive"), *tmp_path.glob("all/trials/*/sft")]


@pytest.mark.slow
def test_a_search_that_is_killed_ends_as_front_and_retrained_point(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trials, "PULSE", 1)
    monkeypatch.setattr(trials, "SILENCE", 2)
    out = tmp_path / "all"
    order = asked(out, words, "trials=2", "chosen=1", "seeds=1")
    killed(lambda: command.main(order), lambda: bool([*out.glob("trials/*/checkpoints/sft/*")]))
    order[-2] = "chosen=knee"
    assert command.main(order) == 0
    found = shown(out)
    assert len(found) == 2
    for row in found:
        agrees(row, as_asked(order), tmp_path / f"alone{row['trial']}")
    said = capfd.readouterr().out
    assert "as configured, seed 1: sft" in said
    (chosen,) = (row["trial"] for row in found if row["chosen"] == "1")
    page = (out / "search.html").read_text()
    assert f"trial {chosen}, dcr." in page
    assert "chosen from 2 that came to their end" in page
    assert command.main(order) == 0
    assert "] " not in capfd.readouterr().out.split("Pareto")[0]


# --- what can be wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "space"),
    [
        ("dcr.layer=1..2", Space(1, 2)),
        ("dcr.margin=.1..0.4", Space(0.1, 0.4)),
        ("dcr.optim.lr=1e-5..1e-3:log", Space(1e-5, 1e-3, log=True)),
        ("dcr.scale=8,16", Space(choices=("8", "16"))),
        ("dcr.margin=0.2", None),
        ("data.toxic.source=[a,b]", None),
        ("data.root=../there", None),
    ],
)
def test_spaces_are_read_as_they_are_written(word: str, space: Space | None) -> None:
    spaces, fixed = search.parsed([word])
    assert (list(spaces.values()), fixed) == (([space], []) if space else ([], [word]))


DAMAGE = {
    "UPDATE study_directions SET direction = 'MINIMIZE'": "an objective has another direction",
    "UPDATE study_directions SET direction = 'x'": "restore",
    "UPDATE trial_values SET value_type = 'INF_NEG', value = NULL": "trial 0 has auroc=-inf",
    "UPDATE trial_values SET value = 7 WHERE objective = 0": "trial 0 has auroc=7",
    "UPDATE trial_values SET value = 'x'": "restore",
    "DELETE FROM trial_values WHERE objective = 2": "trial 0 has 2 values",
    "UPDATE trial_params SET param_value = 7": "restore",
    "UPDATE trial_params SET param_value = 7 WHERE param_name = 'dcr.margin'":
        "trial 0 has dcr.margin=7",
    "UPDATE trials SET number = 1": "trials are missing or there twice",
    "UPDATE trial_params SET param_name = 'dcr.scale' WHERE param_name = 'dcr.layer'":
        "trial 0 has dcr.scale=1",
    "UPDATE trial_params SET distribution_json = '{'": "restore",
    "UPDATE trial_params SET distribution_json = '{}'": "restore",
    "DELETE FROM trial_params WHERE param_name = 'dcr.margin'": "trial 0 has no dcr.margin",
    "UPDATE trials SET state = 'PRUNED'": "trial 0 was pruned",
    "UPDATE trials SET state = 'x'": "restore",
    "UPDATE trial_user_attributes SET value_json = '{'": "restore",
    "DELETE FROM trial_user_attributes": "no trial is marked as the point as configured",
    "UPDATE alembic_version SET version_num = 'v0.1'": "restore",
    "DROP TABLE trial_values": "trial 0 has 0 values",
    "ALTER TABLE trials DROP COLUMN state": "restore",
}  # fmt: skip


@pytest.fixture(scope="module")
def order(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A search of three trials that is done, with its database."""
    made = asked(tmp_path_factory.mktemp("done"), words, "trials=3")
    with pytest.MonkeyPatch.context() as patch:
        without_training(patch)
        assert command.main(made) == 0
    return made


def copied(order: Sequence[str], file: Path) -> Path:
    """The search's database, to be damaged."""
    return Path(shutil.copy(Path(order[0].removeprefix("out=")) / "search.db", file))


def refused(order: Sequence[str], file: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that a search ends in on this database."""
    capfd.readouterr()
    assert command.main([*order, f"storage=sqlite:///{file}"]) == 2
    said = capfd.readouterr()
    (line,) = said.err.splitlines()
    assert "front" not in said.out
    assert line.startswith(f"error: storage=sqlite:///{file}: ")
    return line


def test_a_damaged_database_is_refused_in_one_line(
    order: list[str], tmp_path: Path, quick: None, capfd: pytest.CaptureFixture[str]
) -> None:
    for place, (damage, told) in enumerate(DAMAGE.items()):
        file = copied(order, tmp_path / f"{place}.db")
        with closing(sqlite3.connect(file)) as base:
            base.execute(damage)
            base.commit()
        assert told in refused(order, file, capfd), damage
    for content in (b"x" * 5000, copied(order, tmp_path / "good.db").read_bytes()[:9000]):
        file = tmp_path / "torn.db"
        file.write_bytes(content)
        assert "restore" in refused(order, file, capfd)


def test_a_database_that_another_holds_is_told_after_seconds(
    order: list[str],
    tmp_path: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file = copied(order, tmp_path / "held.db")
    assert trials.LOCKED < 10  # in which a stop signal is obeyed
    monkeypatch.setattr(trials, "LOCKED", 0.2)
    with closing(sqlite3.connect(file)) as base:
        base.execute("BEGIN EXCLUSIVE")
        assert "another program has held its lock" in refused(order, file, capfd)


def test_what_a_shared_database_calls_a_fault_reaches_the_terminal_as_text(
    order: list[str], tmp_path: Path, quick: None, capfd: pytest.CaptureFixture[str]
) -> None:
    file = copied(order, tmp_path / "held.db")
    with closing(sqlite3.connect(file)) as base:
        (trial,) = base.execute("SELECT MAX(trial_id) FROM trials").fetchone()
        base.execute("UPDATE trials SET state = 'FAIL' WHERE trial_id = ?", [trial])
        told = json.dumps("\x1b[2J\nhf_" + "a" * 34)
        added = "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (?, ?, ?)"
        base.execute(added, [trial, "fault", told])
        base.commit()
    capfd.readouterr()
    assert command.main([*order, f"storage=sqlite:///{file}"]) == 0
    said = capfd.readouterr().out
    assert "failed: " in said
    assert "\x1b" not in said
    assert "hf_a" not in said
