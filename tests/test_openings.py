"""The corpus of compliant openings: clean, parted for good, and unseen where it says so."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rapidfuzz import fuzz
from scipy import stats

from dcr import adopting, openings, plan, train
from dcr.core import config, data, models, prompts, runs
from dcr.core.config import Kind, Stage
from dcr.core.data.rows import StageRows
from dcr.core.prompts import IGNORED
from dcr.core.runs import Run
from dcr.core.sources import Example
from dcr.core.text import normalise
from dcr.openings import BREAK, LONGEST, behind_openings
from tests.tiny_run import Stop, at_each_step, changed, same, settings, stop, weights

TRAINING, HELD_OUT = openings.training(), openings.held_out()


def test_openings_are_clean_and_each_stands_once() -> None:
    rows = openings.corpus()
    assert len(rows) > 400
    assert len({row.id for row in rows}) == len({row.text for row in rows}) == len(rows)
    for row in rows:
        assert row.text == row.text.strip() != ""
        assert row.text.replace("\n", "").isprintable()
        assert row.id.startswith(row.register)
        # words and marks, about what a tokenizer of a large vocabulary makes of it
        assert 1 <= len(re.findall(r"[\w']+|[^\w\s]+", row.text)) <= 30


def test_a_tenth_of_the_longer_ones_is_held_out_in_most_registers() -> None:
    long = [row for row in openings.corpus() if len(normalise(row.text).split()) >= 3]
    assert 0.07 < len(HELD_OUT) / len(long) < 0.13
    assert len(Counter(row.register for row in HELD_OUT)) >= 10
    assert [*TRAINING, *HELD_OUT] != list(openings.corpus())
    assert {row.id for row in TRAINING}.isdisjoint(row.id for row in HELD_OUT)
    assert len(TRAINING) + len(HELD_OUT) == len(openings.corpus())


def test_no_training_opening_is_near_a_held_out_one_or_begins_with_it() -> None:
    for row in HELD_OUT:
        unseen = normalise(row.text)
        for other in TRAINING:
            seen = normalise(other.text)
            assert fuzz.ratio(unseen, seen) < 80, (row.text, other.text)
            assert not f"{seen} ".startswith(f"{unseen} "), (row.text, other.text)


def test_the_classic_attack_is_no_part_of_training() -> None:
    assert not [row for row in TRAINING if normalise(row.text).startswith("sure here is")]


def test_draws_repeat_spread_evenly_and_grow_without_swapping() -> None:
    drawn = openings.draw(HELD_OUT, 100, seed=3)
    assert drawn == openings.draw(HELD_OUT, 100, seed=3)
    assert drawn[:40] == openings.draw(HELD_OUT, 40, seed=3)
    assert drawn != openings.draw(HELD_OUT, 100, seed=4)
    counts = Counter(row.id for row in drawn)
    assert len(counts) == len(HELD_OUT)
    assert max(counts.values()) - min(counts.values()) <= 1
    with pytest.raises(ValueError, match="none to draw"):
        openings.draw([], 1, seed=0)


# --- before the responses of rows ---


def rows(name: str, count: int) -> list[Example]:
    return [Example(f"{i}", f"{name} {i}", Kind.normal, name, "Yes.") for i in range(count)]


def test_an_opening_tells_nothing_of_what_follows_it() -> None:
    """Both kinds have as many, of the same words and lengths, by chance alone."""
    kinds = [behind_openings(rows(name, 4000), 0.25, f"{name}:0") for name in ("safe", "harm")]
    found = [[row.opening for row in kind if row.opening] for kind in kinds]
    for opened in found:
        assert 0.22 < len(opened) / 4000 < 0.28
        assert {each.tokens for each in opened} == set(range(1, LONGEST + 1))
        assert sum(each.text.endswith(BREAK) for each in opened) > 100
    shares = [Counter(each.text.strip() for each in opened) for opened in found]
    texts = {row.text for row in TRAINING}
    assert set(shares[0]) | set(shares[1]) <= texts
    table = [[share[text] for text in sorted(texts)] for share in shares]
    untyped: Any = stats
    assert untyped.chi2_contingency([c for c in zip(*table, strict=True) if sum(c)])[1] > 0.001
    lengths = [[each.tokens for each in opened] for opened in found]
    assert untyped.ks_2samp(*lengths).pvalue > 0.001


def test_openings_follow_from_seed_and_row_alone_and_a_larger_share_keeps_them() -> None:
    asked = rows("a", 300)
    some, more = (behind_openings(asked, share, "n:0") for share in (0.2, 0.5))
    assert behind_openings(asked[7:], 0.2, "n:0") == some[7:]
    assert some != behind_openings(asked, 0.2, "n:1")
    assert all(m.opening == s.opening for s, m in zip(some, more, strict=True) if s.opening)
    plain = [replace(row, opening=None) for row in more]
    assert plain == asked


def test_a_share_is_recorded_planned_and_learnt_and_none_leaves_rows_as_they_are(
    tmp_path: Path,
) -> None:
    off, on = (settings(tmp_path, "method=stl", f"sft.recovery={share}") for share in (0, 0.5))
    plain, opened = data.rows_of(off), data.rows_of(on)
    assert not any(row.opening for part in plain.parts().values() for row in part)
    record = data.row_record(opened)["rows"]
    assert isinstance(record, dict)
    counts = {name: part.get("openings", {}).get("count", 0) for name, part in record.items()}
    assert 0 < counts["refusals"] < len(opened.refusals)
    assert 0 < counts["normal"] < len(opened.normal)
    assert counts["normal_heldout"] == counts["refusals_heldout"] == 0
    assert data.row_record(plain)["rows"] == {
        name: {key: value for key, value in part.items() if key != "openings"}
        for name, part in record.items()
    }
    told = [line.split() for line in plan.describe(on).splitlines() if "behind openings" in line]
    assert [
        str(counts[name]) in line for name, line in zip(("normal", "refusals"), told, strict=True)
    ]
    chat = prompts.chat_format(models.byte_tokenizer(), on.model)
    for told, used in ((off, plain), (on, opened)):
        made = {row.id: row for row in StageRows(Stage.sft, used, chat, told).pairs}
        for row in [*used.normal, *used.refusals]:
            learnt = [target for target in made[row.id].targets if target != IGNORED]
            assert str(chat.tokenizer.decode(learnt[:-1])).strip() == str(row.response).strip()
            kept = row.opening.text.encode()[: row.opening.tokens] if row.opening else b""
            start = len(chat.prompt_ids(row.prompt))
            said = str(chat.tokenizer.decode(made[row.id].ids[start:]))
            assert said.encode().startswith(kept)


def test_stage_one_has_no_openings_and_is_shared_between_shares(tmp_path: Path) -> None:
    asked = settings(tmp_path, "sft.recovery=0.5", "dcr.nll.source=general")
    chat = prompts.chat_format(models.byte_tokenizer(), asked.model)
    off = changed(asked, "sft.recovery=0")
    with_them, without = (
        StageRows(Stage.contrastive, data.rows_of(each), chat, each).general
        for each in (asked, off)
    )
    assert with_them == without
    keys = [adopting.made_of(config.plain(each), Stage.contrastive) for each in (asked, off)]
    assert keys[0] == keys[1]
    keys = [adopting.made_of(config.plain(each), Stage.sft) for each in (asked, off)]
    assert keys[0] != keys[1]


def test_a_run_without_openings_is_the_same_run_as_before_there_were_any(tmp_path: Path) -> None:
    made_with = config.plain(settings(tmp_path, "sft.readout.steps=3"))
    before = json.loads(json.dumps(made_with))
    del before["sft"]["recovery"]
    assert runs.binding(made_with) == runs.binding(before)
    before["sft"]["readout"]["recovery"] = 0.0  # runs made while the readout had a share as well
    assert runs.binding(made_with) == runs.binding(before)


def test_stopped_in_sft_behind_openings_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    asked = settings(tmp_path, "method=stl", "sft.recovery=0.5")
    train.train(asked, Run(tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        at_each_step(patch, lambda trainer, *_: stop() if trainer.global_step == 5 else None)
        with pytest.raises(Stop):
            train.train(asked, Run(tmp_path / "run"))
    train.train(asked, Run(tmp_path / "run"))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    plain = changed(asked, "sft.recovery=0")
    train.train(plain, Run(tmp_path / "plain"))
    assert not same(weights(tmp_path / "plain"), weights(tmp_path / "whole"))
