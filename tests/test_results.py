"""`metrics.json` as typed records, and runs as a data frame, against numbers counted by hand."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcr import results
from dcr.core.config import DataError, UserError
from dcr.inference import wilson
from dcr.results import schema

WHOLE: dict[str, Any] = {
    "version": results.VERSION, "weights": "sft",
    "step": None,
    "method": "dcr",
    "model": "tiny",
    "preset": "paper",
    "seed": 3,
    "data": "demo",
    "settings": {"limit": None, "steering": {"method": "scans", "strength": 2}},
    "sets": {
        "safe": {
            "kind": "seemingly_toxic", "n": 8, "refused": {"paper": 2, "recommended": 1},
            "partial": {"paper": 0, "recommended": 3}, "empty": 1, "unanswered": 2,
            "in_distribution": True,
            "unseen": {"n": 4, "refused": {"paper": 1}},
            "judged": {"llm": {"model": "m", "n": 8, "complied": 3, "partial": 1, "refused": 2,
                               "invalid": 1, "error": 1}},
        },
        "unsafe": {"kind": "toxic", "n": 5, "refused": {"paper": 5}, "in_distribution": False,
                   "judged": {"guard": {"model": "g", "safe": 3, "unsafe": 1, "invalid": 1}}},
    },
    "calibration": {"target": 0.8, "run": None, "bias": 1.5, "sets": {
        "held": {"kind": "toxic", "n": 10, "plain": 3, "refused": 8, "opened": 8}}},
    "discernment": {
        "pooled": {"toxic": 5, "seemingly_toxic": 8, "auroc": [0.75, 0.5, 0.875],
                   "answered": {"0.8": [0.5, 0.25, 0.75]}, "refused": {"0.05": [0.25, 0.0, 0.5]}},
        "untrained": None, "pairs": {"safe / unsafe": None},
        "sets": {"safe": {"kind": "seemingly_toxic", "n": 8, "in_distribution": True}},
    },
    "agreement": [{"judges": ["keyword:paper", "llm"], "kind": "toxic", "n": 5, "kappa": 0.5,
                   "labels": ["complied", "refused"], "confusion": [[1, 0], [1, 3]]}],
    "usage": {"llm": {"requests": 8, "prompt_tokens": 80, "completion_tokens": 8, "usd": None}},
    "contamination": {"safe": {"n": 10, "exact": 4, "near": 1, "ngram": 0, "by_source": {"x": 5}}},
    "ability": {"mmlu": {"acc": 0.5, "acc_stderr": 0.125, "acc_norm": None, "n": 16, "version": "2",
                         "shots": 0, "limit": 16, "truncated": 0}},
    "quality": {"win_rate": 25.0, "standard_error": 5.0, "length_controlled": None,
                "discrete": 20.0, "n": 4, "annotator": "gpt", "reference": "base"},
    "refusal_probability": {
        "kinds": {"toxic": {"n": 2, "plain": [0.5, 0.25, 0.75], "prefix_free": [0.5, 0.25, 0.5]}},
        "values": [{"id": "a", "kind": "toxic", "plain": 0.5, "prefix_free": 0.5}],
        "first_token": {"n": 8, "rank_correlation": {"plain": 0.75, "prefix_free": None},
                        "auroc": {"mass": [0.5, 0.25, 0.75]}},
    },
    "kernel": {"top_k": 5, "ids": ["a"], "of": ["toxic"],
               "params": {"all": {"toxic": {"normal": [0.5, None, 1.5]}}}},
    "separability": {"layers": [{"layer": 1, "kmeans": 0.5, "probe": 0.75, "probe_low": 0.5,
                                 "probe_high": 1.0, "fisher": None}],
                     "labels": [0, 1], "ids": ["a", "b"], "mds": {"1": [[0.0, 1.0], [1.0, 0.0]]}},
    "claims": {"trained": ["a"], "change": {"toxic": [0.25, 0.0, 0.5]},
               "params": {"all": {"norm": {"within": [0.5, 0.25, 0.75]}}}},
    "seconds": 1.5,
    "unknown": {"kept": True},
}  # fmt: skip


def written(folder: Path, found: Any = WHOLE) -> Path:
    file = folder / "eval" / "sft-1" / "metrics.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(found))
    return file


def test_what_is_written_is_read_back_whole(tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    found = schema.write(file, WHOLE, results.Metrics)
    assert json.loads(file.read_text()) == WHOLE
    assert results.read(file) == found
    assert found.model_dump(mode="json", exclude_unset=True) == WHOLE


def test_a_block_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    broken = copy.deepcopy(WHOLE)
    broken["sets"]["safe"]["refused"]["paper"] = 9
    with pytest.raises(ValueError, match=r"sets\.safe(.|\n)*more refusals by paper than 7"):
        schema.write(tmp_path / "metrics.json", broken, results.Metrics)
    assert not list(tmp_path.iterdir())


def row(table: Any, quantity: str, **about: Any) -> Any:
    chosen = table[table.quantity == quantity]
    for key, value in about.items():
        chosen = chosen[chosen[key] == value]
    assert len(chosen) == 1, chosen
    return chosen.iloc[0]


def test_every_number_has_its_row(tmp_path: Path) -> None:
    file = written(tmp_path)
    table = results.load(tmp_path)
    assert tuple(table.columns) == results.COLUMNS
    assert not table.duplicated(["set", "kind", "judge", "quantity"]).any()
    for key, value in {"run": str(tmp_path), "file": str(file), "weights": "sft", "seed": 3,
                       "method": "dcr", "edit": "scans strength=2"}.items():  # fmt: skip
        assert (table[key] == value).all()

    refused = row(table, "refused", set="safe", judge="keyword:paper")
    expected = wilson(2, 8)
    assert (refused.value, refused.low, refused.high) == (0.25, expected.low, expected.high)
    assert (refused.n, refused.kind, refused.in_distribution) == (8, "seemingly_toxic", True)
    assert row(table, "partial", set="safe", judge="keyword:recommended").value == 3 / 8
    unseen = row(table, "refused/unseen", set="safe")
    assert (unseen.value, unseen.n, unseen.in_distribution) == (0.25, 4, False)
    assert row(table, "empty", set="safe").value == 1 / 8
    assert row(table, "unanswered", set="safe").value == 2 / 10
    judged = row(table, "refused", judge="llm")
    assert (judged.value, judged.n) == (2 / 6, 6), "neither invalid nor error counts"
    assert (judged["count"], judged.judge_model) == (2, "m")
    assert row(table, "lenient", judge="llm").value == 4 / 6, "complied, also in part"
    assert row(table, "invalid", judge="llm")["count"] == 1
    assert row(table, "complied", set="safe", judge="keyword:recommended").value == 3 / 8
    assert row(table, "complied", set="safe", judge="keyword:paper").value == 5 / 8
    assert row(table, "safe", judge="guard").value == 3 / 5, "an unreadable verdict is not safe"
    assert not table.contaminated.any(), "what it was trained on bears another mark"
    assert row(table, "refused", set="unsafe").value == 1.0

    found = row(table, "discernment")
    assert (found.set, found.value, found.low, found.high) == ("pooled", 0.75, 0.5, 0.875)
    assert row(table, "answered_at_safety/0.8").n == 13
    assert row(table, "calibration/refused", set="held").value == 0.8
    assert row(table, "calibration/refused_plain", set="held").value == 0.3
    assert row(table, "refused_at_over_refusal/0.05").value == 0.25
    assert row(table, "kappa", kind="toxic").value == 0.5
    assert math.isnan(row(table, "usage/usd", judge="llm").value)
    assert row(table, "contamination/exact", set="safe").value == 0.4
    acc = row(table, "acc", set="mmlu")
    assert (acc.value, acc.n) == (0.5, 16)
    assert acc.high == pytest.approx(0.5 + 1.96 * 0.125, abs=1e-4)
    rate = row(table, "win_rate", judge="gpt")
    assert (rate.value, rate.high) == (0.25, pytest.approx(0.25 + 1.96 * 0.05, abs=1e-4))
    assert row(table, "refusal_probability", kind="toxic").low == 0.25
    assert row(table, "refusal_probability/auroc/mass").high == 0.75
    assert row(table, "refusal_probability/rank_correlation/plain").value == 0.75
    kernel = row(table, "kernel/toxic/normal", set="all")
    assert kernel.value == 0.5
    assert math.isnan(kernel.low)
    assert row(table, "separability/probe", set="block 1").high == 1.0
    assert math.isnan(row(table, "separability/fisher").value)
    assert row(table, "claims/norm/within", set="all").value == 0.5
    assert row(table, "claims/change", kind="toxic").value == 0.25
    assert row(table, "seconds").value == 1.5


def test_runs_stand_below_each_other(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        written(tmp_path / name, WHOLE | {"seed": seed, "settings": {}})
    table = results.load([tmp_path / "a", tmp_path / "b"])
    by_seed = table[(table.quantity == "refused") & (table.set == "unsafe")].set_index("seed").value
    assert by_seed.to_dict() == {1: 1.0, 2: 1.0}
    assert set(table.edit) == {""}
    overlap = {"unsafe": {"n": 5, "exact": 1, "near": 0, "ngram": 0}}
    written(tmp_path / "c\udcff", WHOLE | {"contamination": overlap})  # a name that is no UTF-8
    table = results.load(tmp_path / "c\udcff")
    assert set(table[table.contaminated].set) == {"unsafe"}
    with pytest.raises(UserError, match="no evaluations there"):
        results.load([tmp_path / "a", tmp_path / "none"])


def changed(*path: str, to: Any) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        for key in path[:-1]:
            found = found[key]
        found[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (changed("weights", to="other"), "weights"),
        (changed("version", to=1), "version"),
        (changed("sets", to=[]), "sets"),
        (changed("sets", "safe", "n", to="8"), "sets.safe.n"),
        (changed("sets", "safe", "n", to=1), "sets.safe"),
        (changed("sets", "safe", "empty", to=9), "sets.safe"),
        (changed("sets", "safe", "kind", to="kind"), "sets.safe.kind"),
        (changed("sets", "safe", "judged", "llm", to={}), "sets.safe.judged.llm"),
        (changed("discernment", "pooled", to=[1.0]), "discernment.pooled"),
        (changed("discernment", "pooled", "answered", to=[]), "discernment.pooled"),
        (changed("agreement", to=[{}]), "agreement.0"),
        (changed("usage", "llm", to=3), "usage.llm"),
        (changed("quality", "n", to=-1), "quality.n"),
        (changed("contamination", "safe", "exact", to=-1), "contamination.safe.exact"),
        (changed("ability", "mmlu", "acc", to="x"), "ability.mmlu.acc"),
        (changed("kernel", "of", to=[]), "kernel"),
        (changed("separability", "labels", to=[1]), "separability"),
        (changed("claims", "params", to={"all": 3}), "claims.params.all"),
        (changed("refusal_probability", "kinds", to=None), "refusal_probability.kinds"),
        (changed("seconds", to=[]), "seconds"),
    ],
)
def test_a_damaged_block_is_named(
    tmp_path: Path, change: Callable[[Any], None], place: str
) -> None:
    broken = copy.deepcopy(WHOLE)
    change(broken)
    file = written(tmp_path, broken)
    with pytest.raises(DataError) as refused:
        results.read(file)
    assert str(refused.value).startswith(f"{file}: {place}")
    assert "evaluate again" in str(refused.value)
