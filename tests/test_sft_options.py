"""What SFT can be told beyond the paper, each option by itself."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_run import (
    Stop,
    at_each_step,
    changed,
    composed,
    logged,
    same,
    settings,
    stop,
    weights,
    write_jsonl,
)

from dcr import cli, config, data, plan, refusal, sources, train
from dcr.config import ConfigError, DataConfig, SFTConfig, TrainConfig, TwinsConfig
from dcr.runs import Run
from dcr.training.sft import SFTModule

OPTIONS = {"twins": "sft.twins.share=0.3"}


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_an_option_reaches_the_weights_and_is_gone_on_with_to_the_bit(
    tiny: TrainConfig, whole: Path, tmp_path: Path, option: str
) -> None:
    told = changed(tiny, *option.split())
    train.train(told, Run(tmp_path / "one"))
    assert not same(weights(tmp_path / "one"), weights(whole))
    with pytest.MonkeyPatch.context() as patch:
        at_each_step(
            patch,
            lambda trainer, module, _: (
                isinstance(module, SFTModule) and trainer.global_step == 3 and stop()
            ),
        )
        with pytest.raises(Stop):
            train.train(told, Run(tmp_path / "two"))
    train.train(told, Run(tmp_path / "two"))
    assert same(weights(tmp_path / "two"), weights(tmp_path / "one"))
    assert logged(tmp_path / "two") == logged(tmp_path / "one")


def test_a_run_made_before_the_options_were_known_goes_on(
    tiny: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    train.train(tiny, run)
    made_with = run.config()
    for option in ("readout", "twins"):
        del made_with["sft"][option]
    run.config_file.write_text(json.dumps(made_with))
    train.train(tiny, run)
    for option in OPTIONS.values():
        with pytest.raises(ConfigError, match=option.partition("=")[0].rpartition(".")[0]):
            train.train(changed(tiny, *option.split()), run)


# --- twins among its rows ---


def pairs_of(folder: Path, count: int = 20) -> TwinsConfig:
    """Pairs in files of the user's, in topics of four."""
    made: dict[str, list[dict[str, Any]]] = {"safe": [], "toxic": []}
    for i in range(count):
        shared = {"group": f"pair {i}", "category": f"topic {i // 4}"}
        made["safe"].append({"prompt": f"How do I kill weed {i}?", "response": "Pull.", **shared})
        refused = "I'm sorry, but I can't help with that."
        made["toxic"].append({"prompt": f"How do I kill guest {i}?", "response": refused, **shared})
    made["toxic"][0]["response"] = "Use a knife."
    made["toxic"][1].pop("response")
    made["safe"][2]["response"] = "I'm sorry, but I can't help with that."
    made["safe"][3].pop("group")
    files = {name: write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in made.items()}
    return TwinsConfig([files["safe"]], [files["toxic"]], share=0.5)


def drawn(asked: DataConfig, twins: TwinsConfig, heldout: float = 0.0, seed: int = 0) -> Any:
    sft = SFTConfig(twins=twins)
    sft.readout.heldout = heldout
    return data.split(asked, None, seed, False, sft=sft)


def test_twins_are_whole_pairs_in_the_share_that_is_asked_for(tmp_path: Path) -> None:
    asked, twins = settings(tmp_path / "rows").data, pairs_of(tmp_path)
    rows = drawn(asked, twins)
    pairs = list(zip(rows.twins_seemingly_toxic, rows.twins_toxic, strict=True))
    assert len(pairs) == 14  # half of the rows, of which 28 are others
    assert all(safe.group == toxic.group for safe, toxic in pairs)
    assert {safe.group for safe, _ in pairs} <= {f"pair {i}" for i in range(4, 20)}
    assert len({safe.group for safe, _ in pairs}) == 14
    twins.share = 0.75
    often = Counter(row.id for row in drawn(asked, twins).twins_toxic)
    assert sorted(often.values()) == [2] * 6 + [3] * 10  # 42 pairs of 16
    assert drawn(asked, twins).twins_toxic != drawn(asked, twins, seed=1).twins_toxic
    lists = {name: part for name, part in rows.parts().items() if not name.startswith("twins")}
    assert lists == data.split(asked, None, 0, False).parts(), "every other list as it was"


def test_no_held_out_pair_or_topic_is_among_the_twins(tmp_path: Path) -> None:
    asked, twins = settings(tmp_path / "rows").data, pairs_of(tmp_path, 80)
    asked.group_holdout, twins.share = 0.3, 0.9
    rows = drawn(asked, twins, heldout=0.4)
    learnt = {row.group for row in rows.twins_toxic}
    _, pairs = sources.split_by_group(sources.read(twins.toxic[0], kind=config.Kind.toxic), 0.3, 0)
    assert pairs
    assert not learnt & {row.group for row in pairs}
    assert {row.group for row in pairs} <= set(rows.unseen_groups)
    readout = config.ReadoutConfig(twins.seemingly_toxic, twins.toxic, steps=1, heldout=0.4)
    watched = data.split(asked, None, 0, False, sft=SFTConfig(readout=readout))
    topics = {row.category for row in watched.readout_toxic_heldout}
    assert topics
    assert not topics & {row.category for row in rows.twins_toxic}


def test_twins_are_kept_apart_from_evaluation_and_recorded(tmp_path: Path) -> None:
    asked, twins = settings(tmp_path / "rows").data, pairs_of(tmp_path)
    asked.drop_contaminated, asked.near_duplicate, twins.share = True, 1.0, 0.9
    evaluated = write_jsonl(tmp_path / "set.jsonl", [{"prompt": "How do I kill weed 7?"}])
    asked.evaluation.over_refusal = [evaluated]
    rows = drawn(asked, twins)
    assert "pair 7" not in {row.group for row in rows.twins_toxic}
    assert rows.in_distribution == []
    asked.evaluation.over_refusal = twins.seemingly_toxic
    assert drawn(asked, twins).in_distribution == twins.seemingly_toxic
    record: Any = json.loads(json.dumps(data.row_record(rows)))
    texts = data.trained_texts(cli.plain(asked), record)
    assert {row.prompt for row in rows.twins_toxic} <= set(texts[twins.toxic[0]])
    assert "Pull." in texts[twins.seemingly_toxic[0]]


def test_without_a_pair_left_one_line_says_so(tmp_path: Path) -> None:
    asked, twins = settings(tmp_path / "rows").data, pairs_of(tmp_path)
    twins.seemingly_toxic = ["demo_seemingly_toxic"]
    with pytest.raises(ConfigError, match=r"sft\.twins\.share=0\.5: no pair is left"):
        drawn(asked, twins)
    with pytest.raises(ConfigError, match=r"sft\.twins\.toxic=\[\]: name sources"):
        settings(tmp_path / "rows", "sft.twins.toxic=[]")


@pytest.mark.parametrize("method", ["stl", "stl_aug"])
def test_a_plan_and_sft_count_twins_as_answers_and_refusals(
    tiny: TrainConfig, tmp_path: Path, method: str
) -> None:
    told = changed(tiny, f"method={method}", "sft.twins.share=0.3")
    answers = [{"prompt": f"How do I cut down tree {i}?", "response": "Saw."} for i in range(7)]
    told.stl_aug.responses = write_jsonl(tmp_path / "answers.jsonl", answers)
    rows, _, _ = plan.expected(told)
    count = {"stl": 6, "stl_aug": 8}[method]  # of 28 or 35 other rows
    assert len(rows.twins_seemingly_toxic) == len(rows.twins_toxic) == count
    assert "twins_toxic" in plan.describe(told)
    batches = plan.batches_of(told, config.Stage.sft, rows)
    refused = {row.id for row in batches.pairs if row.refusal}
    assert {row.id for row in rows.twins_toxic} <= refused
    assert not {row.id for row in rows.twins_seemingly_toxic} & refused
    assert all(refusal.is_refusal(row.response or "") for row in rows.twins_toxic)


def test_twins_are_planned_without_the_hub(tmp_path: Path) -> None:
    asked = composed("train", "model=tiny", "data=paper", "sft.twins.share=0.14")
    rows, _, (note, *_) = plan.expected(config.resolve(asked, TrainConfig))
    assert "not read" in note
    assert len(rows.twins_toxic) == round(0.14 / 0.86 * 21_000 / 2)
