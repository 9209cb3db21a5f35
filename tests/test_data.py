"""Splits over made-up files, orders of rows against counting, and tensors against loops."""

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, compress
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from dcr import builtin
from dcr.cli import COUNTS
from dcr.core import prompts, sources
from dcr.core.config import (
    ConfigError,
    CountedSourceConfig,
    DataConfig,
    DataError,
    EvaluationSets,
    ModelConfig,
    SafetyPairsConfig,
    SourceConfig,
    Stage,
)
from dcr.core.config.training import (
    ContrastiveConfig,
    NLLConfig,
    NLLSource,
    ReadoutConfig,
    Sampler,
    SFTConfig,
    TrainConfig,
)
from dcr.core.data import Splits
from dcr.core.data.rows import (
    DRAWS,
    NO_CLASS,
    EpochBatches,
    PairBatch,
    PairRow,
    PromptRow,
    generator,
    micro_batches,
    pair_batch,
    permutation,
    prompt_batch,
    share,
)
from dcr.core.prompts import IGNORED
from dcr.core.sources import Example
from dcr.core.training import SafetyData
from tests.tiny_run import REFUSAL as REFUSED
from tests.tiny_run import WORDS, drawn, write_jsonl


def sentence(kind: str, number: int) -> str:
    """Sentences with hardly a word in common: none is near another."""
    return " ".join([kind, *random.Random(f"{kind}{number}").choices(WORDS, k=9), str(number)])


@dataclasses.dataclass
class Files:
    """A data configuration over four files of a temporary folder."""

    folder: Path
    evaluation: EvaluationSets = dataclasses.field(default_factory=EvaluationSets)

    def rows(self, name: str, count: int, **more: Any) -> str:
        made = [{"id": f"{name}-{i}", "prompt": sentence(name, i), **more} for i in range(count)]
        return write_jsonl(self.folder / f"{name}.jsonl", made)

    def config(self, safe: int = 30, toxic: int = 120, normal: int = 60, **more: Any) -> DataConfig:
        # one file for the SFT pairs and for stage one, as with every corpus of toxic prompts
        harmful = self.rows("toxic", toxic, response=REFUSED)
        return DataConfig(
            label="made",
            seemingly_toxic=CountedSourceConfig([self.rows("safe", safe)], count=10),
            toxic=SourceConfig([harmful]),
            safety=SafetyPairsConfig([harmful], count=20),
            normal=CountedSourceConfig([self.rows("normal", normal, response="Yes.")], count=40),
            evaluation=self.evaluation,
            **more,
        )


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def split(config: DataConfig, ratio: float | None = 2.0, seed: int = 0, dcr: bool = True) -> Splits:
    return drawn(config, ratio, seed, dcr)


def ids(rows: Sequence[Example]) -> list[str]:
    return [row.id for row in rows]


# --- splits -------------------------------------------------------------------------------------


def test_counts_are_exact_and_parts_disjoint(files: Files) -> None:
    rows = split(files.config())
    counts = {name: len(part) for name, part in rows.parts().items()}
    assert counts == {
        "seemingly_toxic": 10,
        "toxic": 20,
        "seemingly_toxic_heldout": 20,
        "toxic_heldout": 64,  # 120 - 20 - 2 - 20 are left, of which no more are watched
        "normal": 40,
        "refusals": 20,
        "normal_heldout": 4,
        "refusals_heldout": 2,
    }
    found = [row.prompt for part in rows.parts().values() for row in part]
    assert len(set(found)) == len(found)
    again, other = split(files.config()), split(files.config(), seed=1)
    assert again == rows
    assert all(ids(part) != ids(other.parts()[name]) for name, part in rows.parts().items())


def test_a_prompt_of_both_kinds_is_no_toxic_row_and_counted(files: Files) -> None:
    config = files.config()
    both = [{"prompt": sentence("safe", i).upper(), "response": REFUSED} for i in range(3)]
    config.toxic.source.append(write_jsonl(files.folder / "both.jsonl", both))
    pairs = ReadoutConfig(config.seemingly_toxic.source, config.toxic.source, steps=1)
    rows = drawn(config, dcr=True, readout=pairs)
    for name in ("toxic", "readout_toxic"):
        assert rows.dropped[f"{name}: is a seemingly toxic prompt as well"] == 3
        assert {row.source for row in rows.parts()[name]} == {config.toxic.source[0]}


def test_sft_rows_are_the_same_for_every_ratio_and_method(files: Files) -> None:
    config = files.config()
    names = ("normal", "refusals", "normal_heldout", "refusals_heldout")
    stl = split(config, dcr=False)
    for ratio in (0.5, 1, 2, 5, None):
        dcr = split(config, ratio=ratio)
        assert all(dcr.parts()[name] == stl.parts()[name] for name in names)
        asked = 98 if ratio is None else round(10 * ratio)
        assert (len(dcr.seemingly_toxic), len(dcr.toxic)) == (10, asked)
    assert stl.toxic == stl.seemingly_toxic == stl.toxic_heldout == []
    assert ids(split(config, ratio=5).toxic)[:20] == ids(split(config, ratio=2).toxic)


@pytest.mark.parametrize(
    ("ratio", "change", "message"),
    [
        (9.9, {}, "dcr.ratio=9.9 asks for 99 rows: only 98 are left"),
        (2, {"safe": 9}, "data.seemingly_toxic.count asks for 10 rows: only 9"),
        (2, {"normal": 39}, "data.normal.count asks for 40 rows: only 39"),
        (2, {"toxic": 19}, "data.safety.count asks for 20 rows: only 19"),
        (0.01, {}, r"no toxic row is left for stage one; dcr\.ratio=0\.01 asks for none; raise it"),
    ],
)
def test_too_few_rows_are_named(
    files: Files, ratio: float, change: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        split(files.config(**change), ratio=ratio)


def test_a_holdout_of_all_rows_is_the_setting_to_lower(files: Files) -> None:
    config = dataclasses.replace(files.config(), group_holdout=0.999)
    why = r"asks for 10 rows: only 0 are left and 30 held out by data\.group_holdout; ask for fewer"
    with pytest.raises(ConfigError, match=why):
        split(config)
    config.seemingly_toxic.count = None
    why = r"no seemingly toxic row is left .*; data\.group_holdout=0\.999 holds out all; lower it"
    with pytest.raises(ConfigError, match=why):
        split(config)


def test_defaults_give_way_to_what_there_is(files: Files) -> None:
    config = files.config(safe=9, normal=39, toxic=25)
    rows = drawn(config, 2.0, dcr=True, at_most=COUNTS)
    counts = [len(part) for part in (rows.seemingly_toxic, rows.toxic, rows.normal, rows.refusals)]
    assert counts == [9, 3, 39, 20]  # of 25 toxic ones 20 are pairs of SFT, and 2 are held out
    assert rows.told() == [
        "defaults give way to what there is: data.normal.count asks for 40 rows, 39 are there, "
        "data.seemingly_toxic.count asks for 10 rows, 9 are there, dcr.ratio=2.0 asks for 18 rows, "
        "3 are there"
    ]
    plenty = files.config()
    assert drawn(plenty, 2.0, dcr=True, at_most=COUNTS) == split(plenty)
    insisted = [key for key in COUNTS if key != "dcr.ratio"]
    with pytest.raises(ConfigError, match=r"dcr\.ratio=2\.0 asks for 18 rows: only 3 are left"):
        drawn(files.config(safe=9, toxic=25), 2.0, dcr=True, at_most=insisted)


@pytest.mark.parametrize("node", ["safety", "normal"])
def test_a_pair_without_a_response_is_named_by_file_and_line(files: Files, node: str) -> None:
    config = files.config()
    file = files.folder / "half.jsonl"
    write_jsonl(file, [{"prompt": "One?", "response": REFUSED}, {"prompt": "Two?"}])
    getattr(config, node).source = [str(file)]
    with pytest.raises(DataError, match=rf"{file}:2: response: missing"):
        split(config)


def test_only_refusals_are_drawn_if_asked(files: Files) -> None:
    answers, config = [REFUSED, "Sure, here is how."], files.config()
    pairs = ({"prompt": sentence("toxic", i), "response": answers[i % 2]} for i in range(120))
    write_jsonl(files.folder / "toxic.jsonl", pairs)
    config.safety.refusals_only = True
    found = split(config)
    assert {row.response for row in [*found.refusals, *found.refusals_heldout]} == {REFUSED}
    assert found.dropped == {"safety: its answer is no refusal": 60}
    config.safety.refusals_only = False
    assert {row.response for row in split(config).refusals} == set(answers)
    config.safety = SafetyPairsConfig(config.normal.source, refusals_only=True)
    with pytest.raises(ConfigError, match="none of 60 answers refuses by the keyword rules"):
        split(config)


# --- contamination ------------------------------------------------------------------------------


def test_rows_near_an_evaluation_prompt_are_dropped_and_counted(files: Files) -> None:
    evaluated = [
        sentence("toxic", 3).upper() + "!",  # the same once normalised
        sentence("toxic", 4) + " x",  # near
        sentence("normal", 5),
        "nothing like any other prompt at all",
    ]
    name = write_jsonl(files.folder / "held.jsonl", ({"prompt": p} for p in evaluated))
    files.evaluation = EvaluationSets(safety=[name])
    config = files.config()
    rows = split(config, ratio=None)
    assert rows.dropped == {
        f"toxic: is a prompt of {name}": 1,
        f"toxic: is close to a prompt of {name}": 1,
        f"safety: is a prompt of {name}": 1,
        f"safety: is close to a prompt of {name}": 1,
        f"normal: is a prompt of {name}": 1,
    }
    everything = {row.id for part in rows.parts().values() for row in part}
    assert everything.isdisjoint({"toxic-3", "toxic-4", "normal-5"})
    assert rows.in_distribution == []
    assert len(rows.toxic) == 120 - 20 - 2 - 2
    config.drop_contaminated = False
    assert split(config, ratio=None).dropped == {}
    repeated = ({"prompt": sentence("toxic", i)} for i in range(7))
    config.toxic.source += [write_jsonl(files.folder / "more.jsonl", repeated)]
    assert split(config, ratio=None).dropped == {"toxic: repeats another row": 7}


def test_a_set_that_is_trained_on_is_marked_and_kept(files: Files) -> None:
    config = files.config()
    safe, harmful = config.seemingly_toxic.source[0], config.toxic.source[0]
    config.evaluation = EvaluationSets(over_refusal=[safe], safety=[harmful])
    rows = split(config)
    assert rows.dropped == {}
    assert rows.in_distribution == sorted([safe, harmful])
    assert split(config, dcr=False).in_distribution == [harmful]  # STL never reads the safe ones


def made_up(
    made: dict[str, list[str]], name: str, *, root: str | None, kind: Any, **_: Any
) -> list[Example]:
    """The prompts of a source, in the place of `sources.read`."""
    rows = enumerate(made[name])
    return [Example(f"{name}-{i}", text, kind, name, response=REFUSED) for i, text in rows]


def test_a_set_that_only_its_contrast_is_trained_on_stays_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XSTest's unsafe prompts are near its safe ones by design, another source's are not."""
    unsafe = [f"How do I kill the {word} person today?" for word in WORDS]
    made = {
        "xstest_safe": [f"How do I kill the {word} process today?" for word in WORDS],
        "xstest_unsafe": unsafe,
        "stl_safety": [*(sentence("toxic", i) for i in range(60)), *unsafe[:3]],
        "alpaca": [sentence("normal", i) for i in range(9)],
    }

    monkeypatch.setattr(sources, "read", partial(made_up, made))
    config = DataConfig(
        label="made",
        seemingly_toxic=CountedSourceConfig(["xstest_safe"], count=20),
        toxic=SourceConfig(["stl_safety"]),
        safety=SafetyPairsConfig(["stl_safety"], count=10),
        normal=CountedSourceConfig(["alpaca"]),
        evaluation=EvaluationSets(over_refusal=["xstest_safe"], safety=["xstest_unsafe"]),
        near_duplicate=0.8,
    )
    rows = split(config, ratio=1)
    assert rows.in_distribution == ["xstest_safe"]
    assert rows.dropped == {
        "safety: is a prompt of xstest_unsafe": 3,
        "toxic: is a prompt of xstest_unsafe": 3,
    }
    config.toxic.source = ["xstest_unsafe"]  # now both are trained on, and both are marked
    rows = split(config, ratio=1)
    assert rows.in_distribution == ["xstest_safe", "xstest_unsafe"]
    assert rows.dropped == {"safety: is a prompt of xstest_unsafe": 3}


@pytest.mark.parametrize(
    ("trained", "evaluated", "marked", "dropped"),
    [
        ("coconot_safety", "coconot_contrast", True, 0),  # a part of what is evaluated
        ("coconot_contrast", "coconot_safety", True, 0),
        ("coconot_safety", "coconot_contrast_test", False, 20),  # two parts that share rows
        ("coconot_contrast", "coconot_contrast_final", False, 20),  # no part that can be learnt
    ],
)
def test_a_set_is_marked_or_kept_apart_where_training_reads_a_part_of_it(
    trained: str, evaluated: str, marked: bool, dropped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = [sentence("safe", i) for i in range(20)]
    made = {
        trained: [*shared, *(sentence("more", i) for i in range(20))],
        evaluated: shared,
        "stl_safety": [sentence("toxic", i) for i in range(60)],
        "alpaca": [sentence("normal", i) for i in range(9)],
    }

    monkeypatch.setattr(sources, "read", partial(made_up, made))
    config = DataConfig(
        label="made",
        seemingly_toxic=CountedSourceConfig([trained], count=20),
        toxic=SourceConfig(["stl_safety"]),
        safety=SafetyPairsConfig(["stl_safety"], count=10),
        normal=CountedSourceConfig(["alpaca"]),
        evaluation=EvaluationSets(over_refusal=[evaluated]),
    )
    readout = ReadoutConfig(seemingly_toxic=[trained], toxic=["stl_safety"], steps=1)
    for rows, node in (
        (split(config, ratio=1), "seemingly_toxic"),
        (drawn(config, readout=readout), "readout_seemingly_toxic"),
    ):
        assert rows.in_distribution == [evaluated] * marked
        assert rows.dropped == ({f"{node}: is a prompt of {evaluated}": dropped} if dropped else {})


# --- groups and records -------------------------------------------------------------------------


def test_groups_stay_whole_and_contrasts_together(files: Files) -> None:
    config = files.config(group_holdout=0.4)
    for name, file in (("safe", config.seemingly_toxic), ("toxic", config.toxic)):
        rows = [
            {"id": f"{name}{i}", "prompt": sentence(name, i), "group": f"g{i % 30}"}
            | ({"response": REFUSED} if name == "toxic" else {})
            for i in range(120)
        ]
        file.source = [write_jsonl(files.folder / f"grouped_{name}.jsonl", rows)]
    rows = split(config, ratio=None)
    trained = {row.group for row in [*rows.seemingly_toxic, *rows.toxic]}
    watched = {row.group for row in [*rows.seemingly_toxic_heldout, *rows.toxic_heldout]}
    assert trained & watched == set()
    assert watched <= set(rows.unseen_groups)
    assert trained.isdisjoint(rows.unseen_groups)
    assert trained | set(rows.unseen_groups) == {f"g{i}" for i in range(30)}
    assert 4 <= len(rows.unseen_groups) <= 20

    named = config.seemingly_toxic.source, config.toxic.source
    readout = ReadoutConfig(*named, steps=1, heldout=0.2)
    later = drawn(config, dcr=True, readout=readout)
    learnt = {row.group for row in [*later.readout_toxic, *later.readout_seemingly_toxic]}
    assert set(later.unseen_groups) == set(rows.unseen_groups) - learnt
    assert later.unseen_groups
    assert learnt & set(rows.unseen_groups)


# --- orders of rows -----------------------------------------------------------------------------

LABELS = [0] * 40 + [1] * 200


def places_drawn(sampler: Sampler, count: int, seed: int = 0) -> list[int]:
    return DRAWS[sampler](LABELS, count, generator(seed))


def test_balanced_draws_both_classes_equally_often() -> None:
    count = 6000
    rows = places_drawn(Sampler.balanced, count)
    toxic = sum(LABELS[row] for row in rows)
    low, high = stats.binom.interval(1 - 1e-6, count, 0.5)
    assert low <= toxic <= high
    per_row = Counter(rows)
    assert len(per_row) == len(LABELS)
    safe = [per_row[row] for row in range(40)]  # each with chance 1/80
    assert stats.chisquare(safe).pvalue > 1e-6


def test_proportional_draws_go_through_all_rows() -> None:
    rows = places_drawn(Sampler.proportional, 500)
    for start in (0, 240):
        assert sorted(rows[start : start + 240]) == list(range(240))
    assert len(set(rows[480:])) == 20
    assert rows[:240] != rows[240:480]


def test_orders_are_the_same_on_every_machine() -> None:
    """Torch's generator on the CPU drew the recorded orders."""
    assert permutation(8, generator(0, 7)) == [1, 0, 4, 6, 7, 3, 5, 2]
    drawn = DRAWS[Sampler.balanced]([0, 0, 0, 1], 8, generator(0, 7))
    assert drawn == [1, 3, 3, 3, 3, 3, 3, 3]


def batches(size: int = 8, draws: int = 30, seed: int = 0, **more: Any) -> EpochBatches:
    return EpochBatches(lambda drawing: permutation(draws, drawing), draws, size, seed, **more)


def epoch(sampler: EpochBatches, number: int) -> list[list[int]]:
    sampler.set_epoch(number)
    return list(sampler)


def test_an_epoch_is_a_function_of_seed_and_number() -> None:
    one, two = batches(), batches()
    assert epoch(one, 3) == epoch(two, 3)
    assert epoch(one, 1) == epoch(two, 1) == epoch(two, 1) != epoch(one, 2)
    assert epoch(batches(seed=1), 1) != epoch(one, 1)
    assert sorted(chain(*epoch(one, 1))) == list(range(30))
    assert [len(batch) for batch in epoch(one, 1)] == [8, 8, 8, 6]
    assert one.sampler is one  # what Lightning calls set_epoch on


@pytest.mark.parametrize("start", [0, 1, 3, 4, 6, 8, 11, 12, 99])
def test_a_skip_continues_with_the_next_step(start: int) -> None:
    whole = [batch for number in range(3) for batch in epoch(batches(), number)]
    assert len(whole) == 12, "nothing is passed over from the start"
    resumed = batches()
    resumed.start = start
    left = [batch for number in range(start // 4, 3) for batch in epoch(resumed, number)]
    assert left == whole[start:]


@pytest.mark.parametrize("world", [2, 3, 5, 8])
def test_ranks_share_every_batch(world: int) -> None:
    for batch in epoch(batches(), 2):  # the last one of six
        parts = [share(batch, rank, world) for rank in range(world)]
        assert list(chain(*parts)) == batch
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


# --- tensors ------------------------------------------------------------------------------------


def pairs(lengths: Sequence[int]) -> list[PairRow]:
    return [
        PairRow(f"r{i}", [1 + i % 7] * n, [IGNORED] * (n - 1) + [5], i % 3 == 0)
        for i, n in enumerate(lengths)
    ]


def test_micro_batches_keep_every_row_within_the_budget() -> None:
    chance = random.Random(0)
    rows = pairs([min(int(chance.lognormvariate(4, 0.7)), 500) + 2 for _ in range(128)])
    rows += pairs([900])  # longer than the budget: alone
    groups = micro_batches(rows, tokens=800)
    assert Counter(id(row) for group in groups for row in group) == Counter(map(id, rows))

    def padded(groups: Sequence[Sequence[PairRow]]) -> int:
        return sum(len(group) * max(len(row.ids) for row in group) for group in groups)

    for group in groups:
        assert padded([group]) <= 800 or len(group) == 1
    real = sum(len(row.ids) for row in rows)
    shuffled = chance.sample(rows, len(rows))
    size = -(-len(rows) // len(groups))
    baseline = padded([shuffled[i : i + size] for i in range(0, len(rows), size)])
    assert padded(groups) / real < 1.2 < baseline / real


def test_a_pair_batch_is_its_rows_padded() -> None:
    rows = pairs([3, 5, 2])
    batch = pair_batch(rows, pad=9)
    assert batch.ids.shape == batch.targets.shape == batch.mask.shape == (3, 5)
    for b, row in enumerate(rows):
        for t in range(5):
            inside = t < len(row.ids)
            assert batch.mask[b, t].item() == inside
            assert batch.ids[b, t].item() == (row.ids[t] if inside else 9)
            assert batch.targets[b, t].item() == (row.targets[t] if inside else IGNORED)
    assert batch.refusal.tolist() == [True, False, False]
    assert batch.names == ("r0", "r1", "r2")


def test_a_batch_moves_whole() -> None:
    rows = [PromptRow("p", [1, 2], 1, (1, 2), [2, IGNORED])]
    batch = prompt_batch(rows, 0, general=pairs([3]))
    moved = batch.to(torch.device("meta"))
    for of, to in ((batch, moved), (batch.general, moved.general)):
        for name, before in vars(of).items():
            if isinstance(before, torch.Tensor):
                after = getattr(to, name)
                assert (after.device.type, after.shape) == ("meta", before.shape), name
    assert moved.names == ("p",)
    assert (batch.spans.tolist(), batch.labels.tolist()) == ([[1, 2]], [1])


# --- the DataModule -----------------------------------------------------------------------------


def module(stage: Stage, rows: Splits, **more: Any) -> SafetyData:
    dcr = ContrastiveConfig(**{"batch_size": 8} | more.pop("dcr", {}))
    sft = SFTConfig(**{"batch_size": 16, "micro_tokens": 600} | more.pop("sft", {}))
    chat = prompts.chat_format(builtin.byte_tokenizer(), ModelConfig(name="x"))
    return SafetyData(stage, rows, chat, TrainConfig(dcr=dcr, sft=sft), **more)


def watched(made: SafetyData) -> list[str]:
    loader: Any = made.val_dataloader()
    return sorted(name for batch in loader for name in batch.names)


def test_sft_batches_hold_every_pair_once(files: Files) -> None:
    rows = split(files.config())
    made = module(Stage.sft, rows)
    assert made.steps_per_epoch == 4  # 60 pairs in batches of 16
    steps = list(made.train_dataloader())
    assert len(steps) == 4
    micros = list(chain(*steps))
    seen = Counter(p for m in micros for p in zip(m.names, m.refusal.tolist(), strict=True))
    parts = ((rows.normal, False), (rows.refusals, True))
    assert seen == Counter((row.id, refused) for part, refused in parts for row in part)
    assert all(micro.ids.numel() <= 600 for micro in micros)
    assert watched(made) == sorted(ids(rows.normal_heldout) + ids(rows.refusals_heldout))


def test_stage_one_batches_hold_labelled_prompts(files: Files) -> None:
    rows = split(files.config())
    made = module(Stage.contrastive, rows, dcr={"sampler": Sampler.proportional})
    assert made.steps_per_epoch == 4  # 30 prompts in batches of 8
    seen: list[tuple[str, int]] = []
    for batch in made.train_dataloader():
        assert batch.general is None
        seen += zip(batch.names, batch.labels.tolist(), strict=True)
        ends = batch.mask.sum(1)
        assert torch.equal(batch.spans, torch.stack([ends - 1, ends], dim=1))
    assert sorted(seen) == sorted(
        [(i, 0) for i in ids(rows.seemingly_toxic)] + [(i, 1) for i in ids(rows.toxic)]
    )
    assert watched(made) == sorted(ids(rows.seemingly_toxic_heldout) + ids(rows.toxic_heldout))
    assert module(Stage.contrastive, rows, dcr={"draws": 100}).steps_per_epoch == 13


def test_general_rows_come_with_their_prompts_again(files: Files) -> None:
    rows = split(files.config())
    nll = NLLConfig(weight=0.1, source=NLLSource.general, general_batch_size=3)
    one, two = (
        list(module(Stage.contrastive, rows, dcr={"nll": nll}).train_dataloader()) for _ in range(2)
    )
    chosen = [batch.general.names for batch in one]
    assert chosen == [batch.general.names for batch in two]
    assert all(len(set(names)) == 3 and set(names) <= set(ids(rows.normal)) for names in chosen)
    assert len(set(chosen)) == len(chosen)
    resumed = module(Stage.contrastive, rows, dcr={"nll": nll})
    resumed.rows.sampler.start = 2
    assert [batch.general.names for batch in resumed.train_dataloader()] == chosen[2:]


@pytest.mark.parametrize("stage", [Stage.contrastive, Stage.sft])
def test_the_batches_of_ranks_are_the_global_batch_once(files: Files, stage: Stage) -> None:
    rows = split(files.config())
    options = {"nll": NLLConfig(weight=0.1, source=NLLSource.general, general_batch_size=2)}
    world, steps = 3, []
    for rank in range(world):
        made = module(stage, rows, dcr=options | {"draws": 26}, sft={"batch_size": 29})
        made.rows.rank, made.rows.world = rank, world
        steps.append(list(made.train_dataloader()))
    alone = module(stage, rows, dcr=options | {"draws": 26}, sft={"batch_size": 29})
    for whole, *parts in zip(alone.train_dataloader(), *steps, strict=True):
        # in the last batch are two rows for three ranks
        assert sorted(learnt(whole)) == sorted(chain(*map(learnt, parts)))


def learnt(batch: Any) -> Iterator[str]:
    """Ids of the rows that a loss looks at."""
    if isinstance(batch, list):
        yield from chain(*map(learnt, batch))
    elif isinstance(batch, PairBatch):
        yield from compress(batch.names, (batch.targets != IGNORED).any(1).tolist())
    else:
        assert (batch.targets[batch.labels == NO_CLASS] == IGNORED).all()
        yield from compress(batch.names, (batch.labels != NO_CLASS).tolist())
        yield from learnt(batch.general)


def test_what_does_not_fit_is_counted_or_refused(files: Files) -> None:
    rows = split(files.config())
    long = dataclasses.replace(rows.normal[0], id="long", prompt="a" * 600)
    made = module(Stage.sft, dataclasses.replace(rows, normal=[*rows.normal, long]))
    assert made.rows.too_long == ["long"]
    with pytest.raises(ConfigError, match=r"sft\.max_len=8: no training pair fits; raise it"):
        module(Stage.sft, rows, sft={"max_len": 8})
    with pytest.raises(ConfigError, match="needs seemingly toxic and toxic prompts, both"):
        module(Stage.contrastive, dataclasses.replace(rows, toxic=[]))
    made = module(Stage.contrastive, rows)
    longest = max(len(row.ids) for row in [*made.rows.prompts, *made.rows.heldout])
    module(Stage.contrastive, rows, context=longest)
    with pytest.raises(DataError, match=f"its {longest} tokens exceed the model's context of"):
        module(Stage.contrastive, rows, context=longest - 1)
