"""A search against loops over its trials, its runs done alone, and workers that are killed."""

import csv
import json
import re
import shutil
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from forked import killed
from test_study import alone, measured
from tiny_run import logged

from dcr import entry, search
from dcr.core.config import ConfigError
from dcr.core.runs import Run
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

    patch.setattr(trials, "_values", made_up)
    patch.setattr(Search, "trial", trial)
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
    measured = [file for file in (tmp_path / "trials").iterdir() if file.is_dir()]
    assert len(measured) == len(points)  # one for each point, however many trials have it
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
    def slow(search: Search, job: Untrained) -> list[float]:
        if len(list(tmp_path.glob("trials/*/search*"))) == 2:
            under.write_text(json.dumps(job.point))
            time.sleep(600)
        return made_up(search, job)

    under, order = tmp_path / "under way", asked(tmp_path, words, "trials=4")
    monkeypatch.setattr(trials, "PULSE", 1)
    monkeypatch.setattr(trials, "SILENCE", 2)
    monkeypatch.setattr(trials, "_values", slow)
    killed(lambda: command.main(order), under.exists)
    monkeypatch.setattr(trials, "_values", made_up)
    noted: list[str] = []
    monkeypatch.setattr(command.study, "carry_out", lambda _: {})
    monkeypatch.setattr(command.report, "build", lambda *_, notes: noted.extend(notes))
    assert command.main([*order, "chosen=4"]) == 0
    found = shown(tmp_path)
    assert column(found, "trial") == ["0", "1", "3", "4"]
    assert column(found, "configured") == ["1", "0", "0", "0"]
    assert "chosen from 4 that" in noted[0]
    left = {key: str(value) for key, value in json.loads(under.read_text()).items()}
    assert left in [{key: row[key] for key in SEARCHED} for row in found]


def test_a_trial_that_was_taken_over_meanwhile_is_left_to_the_other(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    def slept(search: Search, job: Untrained) -> list[float]:
        if not any((tmp_path / "trials").glob("*/")):  # the first, before it is measured
            shared = trials.opened(search)
            (own,) = (t for t in shared.get_trials() if t.state is not trials.WAITING)
            shared.tell(own.number, state=trials.FAIL)
            trials.enqueue_again(shared, own)
        return made_up(search, job)

    monkeypatch.setattr(trials, "_values", slept)
    assert command.main(asked(tmp_path, words, "trials=2")) == 0
    assert column(shown(tmp_path), "ended") == ["complete", "complete"]


def test_trials_of_one_point_are_measured_once(
    made: Search, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    job: Any = made.trial({"dcr.layer": 1, "dcr.margin": 0.2, "dcr.epochs": "1"})
    first = trials._measured(made, job)
    monkeypatch.delattr(trials, "_values")
    assert trials._measured(made, job) == first == pytest.approx([0.2, 0.1, 1.0])


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
    return command._resolved(entry.parse(command.Options, order))[0]


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


OUTSIDE = "trial 0 has settings or values outside the search"
DAMAGE = {  # what SQL does to a database, and what is said of it
    "UPDATE study_directions SET direction = 'MINIMIZE'": "an objective has another direction",
    "UPDATE trial_values SET value_type = 'INF_NEG', value = NULL": OUTSIDE,
    "UPDATE trial_values SET value = 7 WHERE objective = 0": OUTSIDE,
    "DELETE FROM trial_values WHERE objective = 2": OUTSIDE,
    "UPDATE trial_params SET param_value = 7 WHERE param_name = 'dcr.margin'": OUTSIDE,
    "UPDATE trial_params SET param_name = 'dcr.scale' WHERE param_name = 'dcr.layer'": OUTSIDE,
    "DELETE FROM trial_params WHERE param_name = 'dcr.margin'": OUTSIDE,
    "UPDATE trials SET state = 'PRUNED'": OUTSIDE,
    "UPDATE trials SET number = 1": "trials are missing or there twice",
    # Optuna's own refusals
    "UPDATE trial_params SET param_value = 7": "restore",
    "UPDATE trial_params SET distribution_json = '{}'": "restore",
    "UPDATE trials SET state = 'x'": "restore",
    "UPDATE alembic_version SET version_num = 'v0.1'": "restore",
    "ALTER TABLE trials DROP COLUMN state": "restore",
}


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


@pytest.fixture(scope="module")
def made(order: list[str]) -> Search:
    return as_asked(order)


def refused(made: Search, file: Path) -> str:
    """The one line that a search ends in on this database."""
    asked = replace(made, url=f"sqlite:///{file}")
    with pytest.raises(ConfigError) as caught:
        trials.ended_trials(asked, trials.opened(asked))
    told = str(caught.value)
    assert told.startswith(f"storage=sqlite:///{file}: ")
    assert "\n" not in told
    return told


def test_a_damaged_database_is_refused_in_one_line(
    order: list[str], made: Search, tmp_path: Path
) -> None:
    for place, (damage, told) in enumerate(DAMAGE.items()):
        file = copied(order, tmp_path / f"{place}.db")
        with closing(sqlite3.connect(file)) as base:
            base.execute(damage)
            base.commit()
        assert told in refused(made, file), damage
    for content in (b"x" * 5000, copied(order, tmp_path / "good.db").read_bytes()[:9000]):
        (torn := tmp_path / "torn.db").write_bytes(content)
        assert "restore" in refused(made, torn)


def test_a_database_that_another_holds_is_told_after_seconds(
    order: list[str], made: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = copied(order, tmp_path / "held.db")
    assert trials.LOCKED < 10  # in which a stop signal is obeyed
    monkeypatch.setattr(trials, "LOCKED", 0.2)
    with closing(sqlite3.connect(file)) as base:
        base.execute("BEGIN EXCLUSIVE")
        assert "another program has held its lock" in refused(made, file)


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
