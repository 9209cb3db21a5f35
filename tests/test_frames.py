"""The corpus of frames: clean, the same for both kinds, and without those that attacks use."""

from collections import Counter

from dcr import frames
from dcr.core.config import Kind
from dcr.core.sources import Example
from dcr.core.text import conversation, normalise
from dcr.robustness.attacked import FRAMES

PAST = {"past", "ago", "history", "historical", "era", "century", "centuries", "ancient"}
STORY = {"story", "stories", "tale", "novel", "fiction", "told", "tells", "woman", "neighbour"}


def test_frames_are_clean_and_each_stands_once() -> None:
    rows = frames.corpus()
    assert len({row.id for row in rows}) == len({normalise(row.text) for row in rows}) == len(rows)
    for row in rows:
        assert row.text.count(frames.PLACE) == 1, row.id
        assert row.text == row.text.strip()
        assert row.text.replace("\n", "").isprintable()
        assert row.id.startswith(row.register.replace(" ", "-"))


def test_whole_registers_are_held_out() -> None:
    learnt = frames.training()
    assert len(learnt) > 100
    assert {row.register for row in frames.corpus() if row not in learnt} == {*frames.HELD_OUT}
    assert {row.register for row in learnt}.isdisjoint(frames.HELD_OUT)


def fours(text: str) -> set[tuple[str, ...]]:
    words = normalise(text).split()
    return {tuple(words[start : start + 4]) for start in range(len(words) - 3)}


def test_no_frame_of_training_speaks_as_an_attack_does() -> None:
    attacks = set[tuple[str, ...]]().union(*map(fours, FRAMES.values()))
    for row in frames.training():
        words = {*normalise(row.text).split()}
        assert not words & (PAST | STORY), row.text
        assert row.register not in ("history", "story")
        assert not fours(row.text) & attacks, row.text


def test_a_frame_tells_no_kind_and_each_is_as_frequent_as_any_other() -> None:
    kinds = [
        [Example(f"{kind.value}-{n}", f"word {n}", kind, "mine") for n in range(count)]
        for kind, count in ((Kind.toxic, 300), (Kind.seemingly_toxic, 200))
    ]
    found = [frames.in_frames(rows, seed=3) for rows in kinds]
    drawn = [[row.id.partition(" in ")[2] for row in of] for of in found]
    assert drawn[0][:200] == drawn[1]
    counts = Counter(drawn[0])
    assert counts.keys() == {frame.id for frame in frames.training()}
    assert max(counts.values()) - min(counts.values()) <= 1
    texts = {frame.id: frame.text for frame in frames.corpus()}
    for row, before in zip(found[0], kinds[0], strict=True):
        before_id, _, frame = row.id.partition(" in ")
        assert (before_id, row.kind) == (before.id, Kind.toxic)
        assert row.prompt == texts[frame].replace("{}", before.prompt)
    assert [row.id for row in frames.in_frames(kinds[0], seed=4)] != [row.id for row in found[0]]


def test_a_frame_stands_around_the_last_turn_and_braces_of_a_prompt_stay() -> None:
    turns = [("user", "First {0}"), ("assistant", "No."), ("user", "Then {x} {}")]
    framed = frames.framed("Say: {} Now.", conversation(turns))
    assert framed == conversation([*turns[:2], ("user", "Say: Then {x} {} Now.")])
