"""A search against loops over its trials, its runs done alone, and workers that are killed."""

import csv
import itertools
import json
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from forked import killed
from test_study import alone, measured
from tiny_run import logged

from dcr import cli, search
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


def made_up(search: Search, job: Any, trial: Any) -> list[float]:
    """What a trial measures, without training: a number for each objective."""
    point = trial.params
    place = search.out / "ran" / str(trial.number)
    place.parent.mkdir(exist_ok=True)
    place.open("x").close()  # a second run of the same trial stops here
    time.sleep(random.random() / 50)
    return [point["dcr.margin"], abs(point["dcr.margin"] - 0.3), point["dcr.layer"] + 0.0]


# --- front and choice ---------------------------------------------------------------------------


def dominated(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """By another; the first objective is to be high and the rest low."""
    ahead = [other[0] >= one[0], *(b <= a for a, b in zip(one[1:], other[1:], strict=True))]
    return all(ahead) and one != other


def test_two_workers_on_one_file_share_trials_and_the_front_is_that_of_a_loop(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "_measured", made_up)
    monkeypatch.setattr(Search, "trial", lambda *_: None)
    monkeypatch.setattr(Search, "corners", lambda _: [])
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


@pytest.mark.parametrize("ends", [*itertools.product((0.5, 0.71, 0.8), (1.0, 2.0), (9.0, 11.0))])
def test_a_trial_is_beaten_by_what_is_ahead_in_everything(ends: tuple[float, ...]) -> None:
    low, nll, seconds = ends
    own = {"probe": [0.6, 0.5, 0.7], "nll": 1.5, "seconds": 10.0}
    other = {"probe": [low + 0.1, low, low + 0.2], "nll": nll, "seconds": seconds}
    by = trials.beaten(own, {7: other}, ("auroc", "nll", "seconds"))
    assert (by == 7) == (low > 0.7 and nll <= 1.5 and seconds <= 10.0)
    assert (trials.beaten(own, {7: other}, ("answered",)) == 7) == (low > 0.7)


# --- kills --------------------------------------------------------------------------------------


def test_a_killed_workers_trial_is_failed_and_enqueued_again(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(search: Search, job: Any, trial: Any) -> list[float]:
        if trial.number == 2:
            under.write_text(json.dumps(trial.params))
            time.sleep(600)
        return made_up(search, job, trial)

    under, order = tmp_path / "under way", asked(tmp_path, words, "trials=4")
    monkeypatch.setattr(trials, "SILENCE", 1.0)
    monkeypatch.setattr(Search, "trial", lambda *_: None)
    monkeypatch.setattr(Search, "corners", lambda _: [])
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
    return command._asked(cli.read(command.Options, order))[0]


def test_a_trial_gives_what_its_run_gives_and_one_behind_ends_half_way_through_stage_one(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def ahead(own: Any, others: Any, _: Any) -> int | None:
        return min(others, default=None)

    monkeypatch.setattr(trials, "beaten", ahead)
    order = asked(tmp_path / "all", words, "trials=2", "dcr.epochs=2")
    assert command.main(order) == 0
    assert re.search("no importances for .*: 1 of 4 trials ended", capfd.readouterr().out)
    found = shown(tmp_path / "all")
    assert column(found, "ended") == ["complete", "pruned"]
    assert found[1]["auroc"] == ""
    agrees(found[0], as_asked(order), tmp_path / "alone")
    ends = {}
    for file in tmp_path.glob("all/trials/*/halfway.json"):
        steps = [s for stage, s, *_ in logged(file.parent) if stage == "contrastive"]
        ends[json.loads(file.read_text())["beaten_by"]] = max(steps)
    assert ends == {None: 9, 0: 3}  # of ten, from 0: the fifth is taken and not logged
    assert not [*tmp_path.glob("all/trials/*/contrastive"), *tmp_path.glob("all/trials/*/sft")]


@pytest.mark.slow
def test_a_search_that_is_killed_ends_as_front_and_retrained_point(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trials, "SILENCE", 1.0)
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


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("dcr.margin=0.4..0.1", "dcr.margin=0.4..0.1: give low..high, low below high"),
        ("dcr.margin=0..0.4:log", "of :log both above 0"),
        ("dcr.margin=0.1..x", "a space is low..high"),
        ("dcr.margin=0.1..1.4", "dcr.margin=1.4: give a number inside (0, 1)"),
        ("dcr.layer=1..3", "dcr.layer=3: the model has blocks 1 to 2"),
        ("dcr.ratio=1.0..50.0", "dcr.ratio=50.0 asks for 600 rows"),
        ("dcr.margni=0.1..0.2", "dcr.margni"),
        ("gen.max_new_tokens=3,4", "gen.max_new_tokens: no setting of train.py"),
        ("seed=0,1", "seed: not searched"),
        ("method=stl", "method=stl: only dcr has a stage one"),
        ("objectives=auroc,speed", "objectives=auroc,speed: choose from auroc"),
        ("objectives=nll data.validation=0", "data.validation=0"),
        ("validation=demo_seemingly_toxic_heldout:demo_toxic_heldout", "data.evaluation tests on"),
        ("validation=xstest_safe", "give <seemingly toxic>:<toxic>"),
        ("storage=here.db", "storage=here.db: give an URL"),
        ("storage=nothing://here", "storage=nothing://here"),
        ("chosen=best", "chosen=best: give knee or the number"),
        ("trials=0", "trials=0: give 1 or more"),
        ("model.name=/not/here", "model.name=/not/here: cannot be opened"),
        ("trainer.devices=2", "trainer.devices"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    more: str, told: str, words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    order = [
        w for w in asked(tmp_path / "none", words) if not more.startswith(w.split("=")[0] + "=")
    ]
    assert command.main([*order, *more.split()]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert told in line
    assert not (tmp_path / "none").exists()
