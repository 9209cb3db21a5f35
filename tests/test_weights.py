"""Curves against the finished model, and that measuring changes nothing that is trained."""

import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from dcr import eval as eval_entry
from dcr import train as train_entry
from dcr.analyses import kinds, ntk, probability, weights
from dcr.core import models, prompts
from dcr.core.config import Kind, UserError
from dcr.core.models import folders
from dcr.core.runs import Run
from dcr.tracking import curves as tracking
from tests import tiny_run
from tests.test_eval import resolved

QUANTITIES = "tracking.quantities=[refusal_probability,kernel]"
ANALYSIS = (
    "data.analysis={seemingly_toxic: [demo_seemingly_toxic_heldout], "
    "toxic: [demo_toxic_heldout], normal: [demo_normal_heldout]}"
)
SLOW = 1000.0  # seconds that a measurement of refusal probability seems to take
SMALL = ("tracking.refusal_prob.prompts=3", "tracking.entk.prompts=2", "tracking.entk.top_k=2")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """The same training with and without curves."""
    folder = tmp_path_factory.mktemp("curves")
    plain, tracked = Run(folder / "plain"), Run(folder / "tracked")
    train_entry.train(tiny_run.settings(folder / "rows", ANALYSIS), plain)
    more = (ANALYSIS, QUANTITIES, *SMALL, "tracking.entk.params=[tail:1]")
    measure, clock, ahead = weights.refusal_probability, time.perf_counter, [0.0]

    def slowly(*given: Any) -> Any:
        ahead[0] += SLOW
        return measure(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: clock() + ahead[0])
        patch.setattr(weights, "refusal_probability", slowly)
        train_entry.train(tiny_run.settings(folder / "rows", *more), tracked)
    return plain, tracked


def test_measuring_changes_no_weight(pair: tuple[Run, Run]) -> None:
    plain, tracked = (tiny_run.weights(run.folder) for run in pair)
    assert tiny_run.same(plain, tracked)


def test_every_step_is_measured_where_there_are_few(pair: tuple[Run, Run]) -> None:
    rows = tiny_run.logged(pair[1].folder)
    for stage, total in (("contrastive", 10), ("sft", 8)):
        for key in ("refusal_probability/toxic", "kernel/tail-1/toxic/normal"):
            steps = [step for of, step, name, _ in rows if of == stage and name == f"{stage}/{key}"]
            assert steps == list(range(total + 1))


def test_the_last_point_is_the_finished_model(pair: tuple[Run, Run]) -> None:
    run = pair[1]
    settings = tiny_run.settings(run.folder.parent / "rows", ANALYSIS, *SMALL)
    policy = folders.open_adapter(run.stage("sft"), settings.sft.precision)
    chat = prompts.chat_format(policy.tokenizer, settings.model)
    rows = kinds.drawn(kinds.every(settings.data), 3, settings.seed)[Kind.toxic]
    encoded = [chat.prompt_ids(row.prompt) for row in rows]
    plain, _ = probability.probabilities(policy.model, chat.tokenizer, encoded)
    logged = {(of, step, key): value for of, step, key, value in tiny_run.logged(run.folder)}
    found = logged["sft", 8, "sft/refusal_probability/toxic"]
    assert found == pytest.approx(float(plain.mean()), rel=0.05)  # trained under autocast


def test_the_values_of_every_prompt_are_kept_beside_the_means(pair: tuple[Run, Run]) -> None:
    run = pair[1]
    logged = {(of, step, key): value for of, step, key, value in tiny_run.logged(run.folder)}
    for stage, total in (("contrastive", 10), ("sft", 8)):
        places = sorted(run.tracked(stage).glob("step-*"))
        assert [int(place.name.removeprefix("step-")) for place in places] == [*range(total + 1)]
        kept = json.loads((places[3] / "metrics.json").read_text())
        values = [v["plain"] for v in kept["refusal_probability"]["values"] if v["kind"] == "toxic"]
        mean = logged[stage, 3, f"{stage}/refusal_probability/toxic"]
        assert sum(values) / len(values) == pytest.approx(mean)
        norms = load_file(places[3] / "kernel" / "tail-1.safetensors")["norms"]
        whole = ntk.normalised(norms)
        kinds = kept["kernel"]["of"]
        seen, trained = ([i for i, k in enumerate(kinds) if k == of] for of in ("toxic", "normal"))
        cell = logged[stage, 3, f"{stage}/kernel/tail-1/toxic/normal"]
        assert float(whole[seen][:, trained].mean()) == pytest.approx(cell)


def test_what_was_measured_beyond_a_checkpoint_is_forgotten(tmp_path: Path) -> None:
    for step in (0, 4, 5, 9):
        (tmp_path / f"step-{step:06d}").mkdir()
    watch = object.__new__(tracking.Tracker)
    watch.folder = tmp_path
    watch._forget_beyond(4)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["step-000000", "step-000004"]


def test_the_clock_of_a_stage_stops_while_it_is_measured(pair: tuple[Run, Run]) -> None:
    logged = tiny_run.logged(pair[1].folder)
    spent = max(value for *_, key, value in logged if key == "sft/tracking_seconds")
    assert spent > SLOW * 9
    assert json.loads((pair[1].folder / "sft.cost.json").read_text())["seconds"] < SLOW


def test_steps_are_denser_early_and_hold_both_ends() -> None:
    for total in (1, 5, 21, 22, 60, 495):
        steps = tracking.tracked_steps(total)
        assert steps[0] == 0
        assert steps[-1] == total
        assert len(steps) == min(total + 1, 22)
        assert steps == sorted(set(steps))
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert max(gaps[:5]) < min(gaps[-5:])
    assert tracking.tracked_steps(10, every=4) == [0, 4, 8, 10]


def evaluated(run: Run, *overrides: str) -> dict:
    settings, _ = resolved(f"run={run.folder}", ANALYSIS, *overrides)
    eval_entry.evaluate(settings, run)
    (file,) = run.folder.glob("eval/*/metrics.json")
    return json.loads(file.read_text())


def test_analyses_of_a_run_by_their_own_command(pair: tuple[Run, Run]) -> None:
    run = pair[0]
    small = ("refusal_prob.prompts=3", "entk.prompts=2", "entk.top_k=2", "sep.prompts=12")
    params = "entk.params=[tail:1,trunk:1]"
    found = evaluated(
        run, "tasks=[refusal_probability,kernel,separability]", params, "entk.head=false", *small
    )
    kinds = found["refusal_probability"]["kinds"]
    for kind, block in kinds.items():
        values = [v["plain"] for v in found["refusal_probability"]["values"] if v["kind"] == kind]
        assert block["n"] == len(values) == 3
        assert block["plain"][0] == pytest.approx(sum(values) / 3)
        assert block["plain"][1] <= block["plain"][0] <= block["plain"][2]
    ids = [v["id"] for v in found["refusal_probability"]["values"]]
    first, both = found["refusal_probability"]["first_token"], ("toxic", "seemingly_toxic")
    scores = {
        kind: [
            v | {"mass": first["mass"][v["id"]]}
            for v in found["refusal_probability"]["values"]
            if v["kind"] == kind
        ]
        for kind in both
    }
    assert list(first["mass"]) == ids
    every = [of for kind in both for of in scores[kind]]
    assert first["n"] == len(every) == 6
    for name, (auroc, _, _) in first["auroc"].items():
        above = [a[name] > b[name] for a in scores["toxic"] for b in scores["seemingly_toxic"]]
        assert auroc == pytest.approx(sum(above) / len(above))
    for name, told in first["rank_correlation"].items():
        mass, other = ([of[key] for of in every] for key in ("mass", name))
        by_scipy: Any = stats.spearmanr(mass, other)
        assert told == pytest.approx(by_scipy.statistic)
    assert set(found["kernel"]["params"]) == {"tail-1-headless", "trunk-1-headless"}
    (file,) = run.folder.glob("eval/*/kernel/trunk-1-headless.safetensors")
    norms = load_file(file)["norms"]
    assert torch.equal(norms, norms.T) or torch.allclose(norms, norms.T, rtol=1e-4)
    matrix = ntk.normalised(norms, "observer")
    of = found["kernel"]["of"]
    cells = [
        matrix[i, j].item()
        for i in range(len(of))
        for j in range(len(of))
        if of[i] == "toxic" and of[j] == "normal"
    ]
    told = found["kernel"]["params"]["trunk-1-headless"]["toxic"]["normal"][0]
    assert told == pytest.approx(sum(cells) / len(cells), rel=1e-5)
    assert [layer["layer"] for layer in found["separability"]["layers"]] == [1, 2]
    # other parameters of the same prompts stand beside these
    more = evaluated(run, "tasks=[kernel]", "entk.params=[tail:1]", *small)
    assert set(more["kernel"]["params"]) == {"tail-1", "tail-1-headless", "trunk-1-headless"}
    assert more["kernel"]["params"].items() >= found["kernel"]["params"].items()
    found = more
    # a later command for one task leaves what the others measured
    later = evaluated(run, "tasks=[refusal_probability]", *small)
    assert later["kernel"] == found["kernel"]
    assert "sets" not in later


def test_prompts_that_were_trained_on_are_counted(pair: tuple[Run, Run], tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(pair[0].folder, run.folder, ignore=shutil.ignore_patterns("eval"))
    learnt = run.config()["data"]["normal"]["source"][0]
    tasks = "tasks=[refusal_probability,separability]"
    found = evaluated(run, tasks, "refusal_prob.prompts=null", f"data.analysis.normal=[{learnt}]")
    count = run.record()["rows"]["normal"]["count"]
    for task in ("refusal_probability", "separability"):
        assert found[task]["trained_on"] == {"seemingly_toxic": 0, "toxic": 0, "normal": count}
    assert found["refusal_probability"]["kinds"]["normal"]["n"] > count


def test_a_fault_in_one_task_costs_no_earlier_one(
    pair: tuple[Run, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any) -> Any:
        raise RuntimeError("out of luck")

    run = Run(tmp_path / "run")
    shutil.copytree(pair[0].folder, run.folder, ignore=shutil.ignore_patterns("eval"))
    monkeypatch.setattr(weights, "kernel", fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        evaluated(run, "tasks=[refusal_probability,kernel]", "refusal_prob.prompts=2")
    (file,) = run.folder.glob("eval/*/metrics.json")
    kept = json.loads(file.read_text())
    assert kept["refusal_probability"]["kinds"]["toxic"]["n"] == 2
    assert "kernel" not in kept


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.safety.source=nowhere", "no data source is called 'nowhere'"),
        ("data.safety.source=demo_normal", "demo_normal holds normal prompts, not toxic"),
        ("data.analysis.toxic=[]", r"data\.analysis\.toxic=\[\]: name a source"),
    ],
)
def test_rows_are_refused_before_a_model_is_opened(
    pair: tuple[Run, Run], override: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(models, "open_policy")
    with pytest.raises(UserError, match=words):
        evaluated(pair[0], "tasks=[claims]", override)


def test_the_first_prompt_stands_in_where_the_papers_is_not(tmp_path: Path) -> None:
    data = tiny_run.settings(tmp_path / "rows", ANALYSIS).data
    every = kinds.every(data)
    alone = kinds.followed(every)
    assert {kind: row.id for kind, row in alone.items()} == {
        kind: rows[0].id for kind, rows in every.items()
    }
