"""Choice of layer and sources: planted directions, hand counts, and the command itself."""

import json
import logging
import math
import random
from collections.abc import Mapping
from pathlib import Path
from string import ascii_lowercase

import pytest
import torch
from sklearn.metrics import roc_auc_score
from tiny_run import settings, write_jsonl
from torch import Tensor

from dcr.analyses import separability
from dcr.analyses.separability import linear_probe
from dcr.choice import origins, transfer
from dcr.choice.__main__ import describe, main
from dcr.choice.origins import Material, SourcePair
from dcr.choice.transfer import Choice, mean, ranked
from dcr.core import prompts
from dcr.core.config import (
    ConfigError,
    CountedSourceConfig,
    DataConfig,
    DataError,
    Kind,
    SourceConfig,
)
from dcr.core.config.training import TrainConfig
from dcr.core.data.rows import prompt_rows
from dcr.core.models import Policy
from dcr.core.sources import Example
from dcr.core.statistics import Interval

TRAIN, TEST, OTHER = (
    SourcePair(("train_safe",), ("train_toxic",)),
    SourcePair(("test_safe",), ("test_toxic",)),
    SourcePair(("other_safe",), ("other_toxic",)),
)
LAYERS, WIDTH, COUNT = 4, 6, 40


def rows(name: str, kind: Kind, count: int = COUNT) -> list[Example]:
    ending = "?" if kind is Kind.seemingly_toxic else "."
    chance = random.Random(f"{name}:{kind.value}")
    words = ["".join(chance.choices(ascii_lowercase, k=30)) for _ in range(count)]
    texts = [f"{word}{ending}" for word in words]
    return [Example(f"{name}-{i}", text, kind, name) for i, text in enumerate(texts)]


def material(candidates: list[SourcePair], tests: Mapping[str, SourcePair]) -> Material:
    pairs = [*candidates, *tests.values()]
    sides = {side for pair in pairs for side in pair.sides}
    return Material(candidates, dict(tests), {side: rows(side[1][0], side[0]) for side in sides})


def planted(found: Material, axes: Mapping[str, Mapping[int, int]]) -> dict:
    """Noise, in which toxic rows of a source are shifted: source -> layer -> axis."""
    chance = torch.Generator().manual_seed(0)
    features = {}
    for (kind, names), part in sorted(found.rows.items(), key=str):
        points = torch.randn(LAYERS, len(part), WIDTH, generator=chance)
        for layer, axis in axes.get(names[0], {}).items():
            points[layer - 1, :, abs(axis)] += math.copysign(6, axis)
        features[kind, names] = points
    return features


def probed(
    candidates: list[SourcePair], tests: Mapping[str, SourcePair], **axes: dict[int, int]
) -> Choice:
    """The choice among candidates whose sources have these axes planted."""
    found = material(candidates, tests)
    return Choice("a/model", ranked(found, planted(found, axes), seed=0, near=0.9), 1, ["a note"])


# --- the comparison ---


def test_the_layer_of_transfer_wins_over_one_that_separates_its_own_sources_alone() -> None:
    axes = {"train_toxic": {2: 1, 3: 4}, "test_toxic": {3: 4}}
    (pair,) = probed([TRAIN], {"elsewhere": TEST}, **axes).pairs
    assert pair.best.layer == 3
    assert pair.layers[1].within.estimate > 0.99  # layer 2 looks as good in distribution
    assert pair.layers[1].transfer.estimate < 0.75
    assert pair.best.transfer.estimate > 0.99
    assert pair.rows == (COUNT, COUNT)
    assert pair.balance.questions == (1, 0)
    assert "questions" in (pair.balance.warning or "")


def test_transfer_is_the_mean_over_sets_of_a_probe_on_all_training_rows() -> None:
    found = material([TRAIN], {"one": TEST, "two": OTHER})
    features = planted(found, {"train_toxic": {1: 2}, "test_toxic": {1: 2}, "other_toxic": {1: -2}})
    (pair,) = ranked(found, features, seed=0, near=0.9)
    labels = torch.tensor([0] * COUNT + [1] * COUNT)

    def points(of: SourcePair) -> Tensor:
        return torch.cat([features[side][0] for side in of.sides])

    score = linear_probe(points(TRAIN), labels)
    expected = [roc_auc_score(labels.numpy(), score(points(test))) for test in (TEST, OTHER)]
    first = pair.layers[0]
    assert [first.tests[name].estimate for name in ("one", "two")] == pytest.approx(expected)
    assert first.transfer.estimate == pytest.approx(sum(expected) / 2)
    assert expected[0] > 0.99
    assert expected[1] < 0.01


def test_the_mean_of_intervals_against_independent_draws() -> None:
    parts = [Interval(0.6, 0.5, 0.65), Interval(0.9, 0.8, 0.92)]
    found = mean(parts)
    assert found.estimate == pytest.approx(0.75)
    assert found.low == pytest.approx(0.75 - math.sqrt(0.1**2 + 0.1**2) / 2)
    assert found.high == pytest.approx(0.75 + math.sqrt(0.05**2 + 0.02**2) / 2)
    assert mean(parts[:1]) == parts[0]
    draws = 0.5 + 0.1 * torch.randn(3, 200_000, generator=torch.Generator().manual_seed(0))
    ends = torch.quantile(draws.mean(0), torch.tensor([0.025, 0.975])).tolist()
    wide = mean([Interval(0.5, 0.5 - 0.196, 0.5 + 0.196)] * 3)
    assert [wide.low, wide.high] == pytest.approx(ends, abs=2e-3)


def test_pairs_are_compared_on_the_sets_that_all_were_tested_on() -> None:
    """The second pair is tested on an easy set that the first one trains on."""
    axes = {"train_toxic": {2: 1}, "other_toxic": {2: 1}, "test_toxic": {2: 1}}
    found = probed([TRAIN, OTHER], {"easy": TRAIN, "hard": TEST}, **axes)
    first, second = found.pairs
    assert list(first.best.tests) == ["hard"]
    assert list(second.best.tests) == ["easy", "hard"]
    assert found.common == ["hard"]
    assert second.on(["hard"]) == mean([second.best.tests["hard"]])
    assert second.on([]) is None


def test_test_prompts_close_to_training_prompts_do_not_count() -> None:
    found = material([TRAIN], {"elsewhere": TEST})
    features = planted(found, {"train_toxic": {1: 1}, "test_toxic": {1: 1}})
    (apart,) = ranked(found, features, seed=0, near=0.9)
    side = (Kind.toxic, ("test_toxic",))
    copies = [Example(f"copy-{i}", row.prompt.upper() + " !", Kind.toxic, "test_toxic")
              for i, row in enumerate(found.rows[Kind.toxic, ("train_toxic",)][:20])]  # fmt: skip
    found.rows[side] = copies + found.rows[side][20:]
    features[side][:, :20] = -100  # would ruin the AUROC
    (kept,) = ranked(found, features, seed=0, near=0.9)
    assert kept.best.transfer.estimate > 0.99
    assert apart.best.transfer.estimate > 0.99
    found.rows[side] = copies
    features[side] = features[side][:, :20]
    with pytest.raises(ConfigError, match="too few prompts of elsewhere differ from"):
        ranked(found, features, seed=0, near=0.9)


def test_layers_that_are_not_finite_cannot_be_chosen() -> None:
    found = material([TRAIN], {"elsewhere": TEST})
    features = planted(found, {"train_toxic": {2: 1}, "test_toxic": {2: 1}})
    features[Kind.toxic, ("train_toxic",)][3] = math.inf
    (pair,) = ranked(found, features, seed=0, near=0.9)
    assert [layer.layer for layer in pair.layers] == [1, 2, 3]
    nowhere = {side: torch.full_like(points, math.nan) for side, points in features.items()}
    with pytest.raises(ConfigError, match=r"model\.name: its hidden states are not finite"):
        ranked(found, nowhere, seed=0, near=0.9)


# --- candidates and test sets ---


def data(safe: str, toxic: str, root: Path | None = None) -> DataConfig:
    return DataConfig(
        label="mine", root=root and str(root), seemingly_toxic=CountedSourceConfig(source=[safe]),
        toxic=SourceConfig(source=[toxic]),
    )  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data folder with invented rows in the places of real sets."""
    words = {"safe": "How to kill the process", "unsafe": "How to kill the man"}
    rows = [
        {
            "prompt": f"{words[label]} {i}{'abcdefghijklm'[i] * 9}?",
            "label": label,
            "category": "contrast_homonyms" if label == "unsafe" else "homonyms",
        }
        for label in words
        for i in range(12)
    ]
    write_jsonl(tmp_path / "xstest/xstest_v2.jsonl", rows)
    for name, words in (
        ("stl_safety/safety_pairs", "Steal it"),
        ("orbench/or_bench_hard_1k", "Would it burn"),
        ("harmfulq/harmfulq", "Burn them"),
    ):
        made = [{"prompt": f"{words} {'nopqrstuvwxyz'[i] * 9} {i}"} for i in range(13)]
        write_jsonl(tmp_path / f"{name}.jsonl", made)
    return tmp_path


def test_candidates_and_tests_that_a_folder_holds(root: Path) -> None:
    found = origins.gathered(data("xstest_safe", "stl_safety", root), seed=0, limit=11)
    assert [str(pair) for pair in found.candidates] == [
        "xstest_safe / stl_safety",
        "xstest_safe / xstest_unsafe",
    ]  # the usual third needs harmfulqa, which is not there
    assert any(n.startswith("orbench_hard / harmfulqa: left out") for n in found.notes)
    demo = "demo_seemingly_toxic_heldout / demo_toxic_heldout"
    assert set(found.tests) == {demo, "orbench_hard / harmfulq"}
    assert any(n.startswith("xstest_safe / xstest_unsafe: not tested on") for n in found.notes)
    assert {len(part) for part in found.used.values()} == {11}


def test_a_set_of_the_same_collection_is_no_test(root: Path) -> None:
    found = origins.gathered(data("orbench_hard", "stl_safety", root), seed=0, limit=11)
    own = found.tests_of(found.candidates[0])
    assert "xstest_safe / xstest_unsafe" in own
    assert not any("orbench" in name for name in own)
    with_xstest = next(pair for pair in found.candidates if "xstest_safe" in pair.names)
    assert "xstest_safe / xstest_unsafe" not in found.tests_of(with_xstest)
    related = [({"coconot_safety"}, {"coconot_contrast_pref"}), ({"oktest"}, {"oktest", "i_cona"})]
    assert all(origins.related(*names) for names in related)
    assert not origins.related({"stl_safety"}, {"i_cona"})


def test_named_pairs_and_tests_replace_the_usual_ones(root: Path) -> None:
    found = origins.gathered(
        data("xstest_safe", "stl_safety", root), 0, 11, "orbench_hard:harmfulq+stl_safety",
        "demo_seemingly_toxic:demo_toxic",
    )  # fmt: skip
    assert found.candidates[1:] == [SourcePair(("orbench_hard",), ("harmfulq", "stl_safety"))]
    assert found.tests == {"demo_seemingly_toxic / demo_toxic": SourcePair(
        ("demo_seemingly_toxic",), ("demo_toxic",)
    )}  # fmt: skip
    alone = origins.gathered(data("xstest_safe", "stl_safety", root), 0, 11, "none")
    assert [str(pair) for pair in alone.candidates] == ["xstest_safe / stl_safety"]


def test_what_the_user_names_must_be_there(root: Path) -> None:
    mine = data("xstest_safe", "stl_safety", root)
    for asked in ({"pairs": "orbench_hard:harmfulqa"}, {"tests": "oktest:harmfulq"}):
        with pytest.raises(DataError, match=r"harmfulqa\.jsonl|oktest\.jsonl"):
            origins.gathered(mine, 0, 11, **asked)
    with pytest.raises(DataError, match="hh_rlhf_red_team: only on the hub"):
        origins.gathered(data("xstest_safe", "hh_rlhf_red_team", root), 0, 11)
    write_jsonl(root / "few.jsonl", [{"prompt": "Same?"}] * 12)
    with pytest.raises(DataError, match=r"few\.jsonl: 1 distinct prompts, 10 are needed"):
        origins.gathered(data(str(root / "few.jsonl"), "demo_toxic"), 0, 20)


def test_the_embedded_corpus_needs_nothing_else() -> None:
    found = origins.gathered(data("demo_seemingly_toxic", "demo_toxic"), 0, 30)
    assert [str(pair) for pair in found.candidates] == [
        "demo_seemingly_toxic / demo_toxic",
        "demo_seemingly_toxic / demo_toxic_matched",
    ]
    assert len(found.tests) == 1
    assert any("hardly another origin" in note for note in found.notes)
    assert found.rows == origins.gathered(data("demo_seemingly_toxic", "demo_toxic"), 0, 30).rows


# --- the whole ---


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return settings(
        tmp_path_factory.mktemp("rows"),
        "data.seemingly_toxic={source: demo_seemingly_toxic, count: null}",
        "data.toxic.source=demo_toxic",
    )


def test_best_layer_is_the_one_of_the_table(
    tuned: TrainConfig, policy: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        best = transfer.best_layer(tuned, limit=20, policy=policy)
    assert "dcr.layer=auto: block" in caplog.text
    assert "chosen on prompts of demo_seemingly_toxic_heldout / demo_toxic_heldout" in caplog.text
    found = transfer.choose(tuned, limit=20, pairs="none", policy=policy)
    by_layer = {layer.layer: layer.transfer.estimate for layer in found.pairs[0].layers}
    assert by_layer[best] == max(by_layer.values())
    assert set(by_layer) == {1, 2}


def test_features_are_those_of_stage_one(tuned: TrainConfig, policy: Policy) -> None:
    """The measured AUROC is that of a probe on features read prompt by prompt."""
    found = transfer.choose(tuned, limit=20, pairs="none", policy=policy)
    gathered = origins.gathered(tuned.data, tuned.seed, 20, "none")
    chat = prompts.chat_format(policy.tokenizer, tuned.model)
    ((name, test),) = gathered.tests.items()
    points, labels = [], torch.tensor([0] * 20 + [1] * 20)
    for pair in (gathered.candidates[0], test):
        examples = [row for side in pair.sides for row in gathered.rows[side]]
        encoded = prompt_rows(chat, examples, 0, 10_000)
        points.append(separability.features(policy, encoded, batch_tokens=1)[1])
    scores = linear_probe(points[0], labels)(points[1])
    expected = roc_auc_score(labels.numpy(), scores)
    assert found.pairs[0].layers[1].tests[name].estimate == pytest.approx(expected, abs=0.005)


def test_table_and_record_name_the_settings_to_use_and_why() -> None:
    axes = {"train_toxic": {3: 4}, "test_toxic": {3: 4}, "other_toxic": {3: 1}}
    found = probed([TRAIN, OTHER], {"elsewhere": TEST}, **axes)
    told = " ".join(describe(found).split())
    assert "- dcr.layer=3: the probe on train_safe / train_toxic transfers best" in told
    assert "3 best" in told
    assert "1 configured" in told
    assert "data.seemingly_toxic.source=[train_safe] data.toxic.source=[train_toxic] trans" in told
    assert "100% / 0%" in told
    assert "- a note" in told
    assert "scores on elsewhere do not test this choice" in told
    assert all(len(line) <= 100 for line in describe(found).splitlines())
    record = found.record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["layer"], record["block"]) == (3, 3)
    assert [pair["seemingly_toxic"] for pair in record["pairs"]] == [["train_safe"], ["other_safe"]]
    best = record["pairs"][0]["blocks"][2]
    assert best["transfer"]["estimate"] == found.pairs[0].best.transfer.estimate
    assert record["pairs"][0]["transfer_on_common_tests"]["estimate"] > 0.99


def test_sources_that_teach_nothing_are_said_to() -> None:
    axes = {"train_toxic": dict.fromkeys(range(1, LAYERS + 1), 1)}
    told = " ".join(describe(probed([TRAIN, OTHER], {"elsewhere": TEST}, **axes)).split())
    assert "separate other sets nearly as well as these (1.00)" in told


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    assert main(["model=tiny", "data=demo", "limit=16", "dcr.layer=2", f"out={out}"]) == 0
    printed, record = capsys.readouterr().out, json.loads(out.read_text())
    assert f"dcr.layer={record['layer']}: the probe" in " ".join(printed.split())
    assert record["configured_block"] == 2
    assert [block["block"] for block in record["pairs"][0]["blocks"]] == [1, 2]
    assert len(record["pairs"]) == 2
    assert str(out) in printed
