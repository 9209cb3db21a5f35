"""The corpus of compliant openings: clean, parted for good, and unseen where it says so."""

import itertools
import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rapidfuzz import fuzz
from scipy import stats

from dcr import adopting, openings, plan, train
from dcr.core import config, data, models, prompts, runs
from dcr.core.config import Kind, Precision, Stage, TrainConfig
from dcr.core.data.module import SafetyData
from dcr.core.data.rows import StageRows
from dcr.core.prompts import IGNORED
from dcr.core.runs import Run
from dcr.core.sources import Example
from dcr.core.text import normalise
from dcr.core.training import sft
from dcr.core.training.sft import SFTModule
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


# --- pairs behind openings ---


def asked(tmp_path: Path, share: float, *more: str) -> TrainConfig:
    return settings(tmp_path, "method=stl", f"sft.recovery={share}", *more)


def test_an_opening_tells_nothing_of_what_follows_it() -> None:
    """Both kinds stand behind openings of the same words and lengths, by chance alone."""
    drawing = random.Random(0)
    kinds = [
        [Example(f"{i}", f"{name} {i}", Kind.normal, name, "Yes.") for i in range(2000)]
        for name in ("safe", "harm")
    ]
    both = behind_openings([row for pair in zip(*kinds, strict=True) for row in pair], drawing)
    opened = [[row.opening for row in both[start::2] if row.opening] for start in (0, 1)]
    assert [len(each) for each in opened] == [2000, 2000]
    assert {each.tokens for each in opened[0]} == set(range(1, LONGEST + 1))
    assert sum(each.text.endswith(BREAK) for each in opened[1]) > 100
    shares = [Counter(each.text.strip() for each in kind) for kind in opened]
    texts = {row.text for row in TRAINING}
    assert set(shares[0]) | set(shares[1]) <= texts
    table = [[share[text] for text in sorted(texts)] for share in shares]
    untyped: Any = stats
    assert untyped.chi2_contingency([c for c in zip(*table, strict=True) if sum(c)])[1] > 0.001
    lengths = [[each.tokens for each in kind] for kind in opened]
    assert untyped.ks_2samp(*lengths).pvalue > 0.001


def test_pairs_stand_beside_a_share_of_the_rows_and_are_recorded_and_planned(
    tmp_path: Path,
) -> None:
    off, half, all_of_them = (data.rows_of(asked(tmp_path, share)) for share in (0, 0.5, 1))
    count = len(off.normal) + len(off.refusals)
    assert [len(rows.recovery) for rows in (off, half, all_of_them)] == [0, count // 2, count]
    assert all_of_them.recovery[: count // 2] == half.recovery
    assert half.normal == off.normal
    assert half.refusals == off.refusals
    toxic = {row.prompt for row in half.readout_toxic}
    refusals, answers = {row.response for row in off.refusals}, half.readout_seemingly_toxic
    given = {row.prompt: row.response for row in answers}
    for place, row in enumerate(all_of_them.recovery):
        assert row.opening is not None
        if place % 2 == 0:
            assert row.prompt in toxic
            assert row.response in refusals
        else:
            assert row.response == given[row.prompt]
    record = data.row_record(half)["rows"]
    assert isinstance(record, dict)
    assert record["recovery"]["count"] == record["recovery"]["openings"]["count"] == count // 2
    assert "recovery" not in str(data.row_record(off))
    lines = plan.describe(asked(tmp_path, 0.5)).splitlines()
    assert any(line.split()[:2] == ["recovery", f"{count // 2}"] for line in lines)


def test_beside_a_row_the_first_tokens_behind_its_opening_are_learnt(tmp_path: Path) -> None:
    told = asked(tmp_path, 0.5)
    rows = data.rows_of(told)
    chat = prompts.chat_format(models.byte_tokenizer(), told.model)
    made = StageRows(Stage.sft, rows, chat, told)
    beside = [row.beside for row in made.pairs if row.beside]
    assert [row.id for row in beside] == [row.id for row in rows.recovery]
    places = [place for place, row in enumerate(made.pairs) if row.beside]
    apart = {later - place for place, later in itertools.pairwise(places)}
    assert apart <= {len(made.pairs) // len(beside), -(-len(made.pairs) // len(beside))}
    for row, given in zip(beside, rows.recovery, strict=True):
        assert given.opening is not None
        opening = chat.encode(given.opening.text)[: given.opening.tokens]
        ids = [*chat.prompt_ids(given.prompt), *opening]
        assert row.ids[: len(ids)] == ids
        learnt = [target for target in row.targets if target != IGNORED]
        assert row.targets == [*[IGNORED] * (len(ids) - 1), *learnt]
        assert row.ids == [*ids, *learnt[:-1]]
        words = str(chat.tokenizer.decode(learnt))
        assert len(learnt) == 4
        assert str(given.response).startswith(words.strip())


def test_the_loss_adds_the_mean_over_pairs_behind_openings(tmp_path: Path) -> None:
    """Gradients of a step are those of both means, the second weighed, by autograd on one sum."""
    told = asked(tmp_path, 0.5)
    chat = prompts.chat_format(models.byte_tokenizer(), told.model)
    batches = SafetyData(Stage.sft, data.rows_of(told), chat, told)
    batch = next(iter(batches.train_dataloader()))
    assert {micro.recovery for micro in batch} == {False, True}
    policy = models.open_policy(told.model, Precision.fp32)
    module = SFTModule(policy, told.sft, total_steps=1)
    weight = policy.model.get_input_embeddings().weight.requires_grad_()

    def mean(behind: bool) -> torch.Tensor:
        found = [module.nll(micro)[0] for micro in batch if micro.recovery is behind]
        tokens = [(m.targets != IGNORED).sum() for m in batch if m.recovery is behind]
        return torch.stack(found).sum() / torch.stack(tokens).sum()

    (wanted,) = torch.autograd.grad(mean(False) + sft.RECOVERY * mean(True), weight)
    trainer: Any = SimpleNamespace(
        world_size=1,
        strategy=SimpleNamespace(model=None, reduce=lambda count, **_: count),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SFTModule, "trainer", trainer)
        patch.setattr(SFTModule, "manual_backward", lambda _, loss: loss.backward())
        patch.setattr(SFTModule, "optimise", lambda _: None)
        logged: dict[str, Any] = {}
        patch.setattr(SFTModule, "log", lambda _, name, value, **__: logged.update({name: value}))
        module.training_step(batch, 0)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, wanted, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(logged["sft/step_recovery"], mean(True).detach())
    torch.testing.assert_close(logged["sft/step_nll"], mean(False).detach())


def test_without_rows_of_both_kinds_it_is_one_line(tmp_path: Path) -> None:
    rows = replace(data.rows_of(asked(tmp_path, 0.5)), refusals=[])
    told = asked(tmp_path, 0.5)
    with pytest.raises(config.ConfigError, match=r"sft.recovery=0.5: needs seemingly toxic"):
        openings.opened(told, replace(rows, readout_toxic=[]))


def test_stage_one_is_shared_between_shares(tmp_path: Path) -> None:
    on, off = (settings(tmp_path, f"sft.recovery={share}") for share in (0.5, 0))
    keys = [adopting.made_of(config.plain(each), Stage.contrastive) for each in (on, off)]
    assert keys[0] == keys[1]
    keys = [adopting.made_of(config.plain(each), Stage.sft) for each in (on, off)]
    assert keys[0] != keys[1]


def test_a_run_without_openings_is_the_same_run_as_before_there_were_any(tmp_path: Path) -> None:
    made_with = config.plain(settings(tmp_path, "sft.readout.steps=3"))
    before = json.loads(json.dumps(made_with))
    del before["sft"]["recovery"]
    assert runs.binding(made_with) == runs.binding(before)
    before["sft"]["readout"]["recovery"] = 0.0  # runs made while the readout had a share as well
    assert runs.binding(made_with) == runs.binding(before)


def test_stopped_in_sft_behind_openings_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    on = asked(tmp_path, 0.5)
    train.train(on, Run(tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        at_each_step(patch, lambda trainer, *_: stop() if trainer.global_step == 5 else None)
        with pytest.raises(Stop):
            train.train(on, Run(tmp_path / "run"))
    train.train(on, Run(tmp_path / "run"))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    plain = changed(on, "sft.recovery=0")
    train.train(plain, Run(tmp_path / "plain"))
    assert not same(weights(tmp_path / "plain"), weights(tmp_path / "whole"))
