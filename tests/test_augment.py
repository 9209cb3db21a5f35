"""STL-aug: which rows it adds and which it leaves alone, and the command that writes answers."""

import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dcr import augment, cli, entry, resolving, train
from dcr.augment import INSTRUCTIONS
from dcr.contamination import texts_of
from dcr.core import data, runs
from dcr.core.config import (
    ConfigError,
    CountedSourceConfig,
    DataConfig,
    DataError,
    EvaluationSets,
    Method,
    SafetyPairsConfig,
    SourceConfig,
    UserError,
)
from dcr.core.data import Splits
from dcr.core.runs import Run
from dcr.extensions import TrainSettings
from dcr.overlaps import overlaps
from dcr.own import Named
from dcr.stl_aug import AugmentConfig
from dcr.stl_aug.rows import read_answers
from tests import forked, tiny_run
from tests.servers.loopback import Answer
from tests.servers.scripted import Body, Scripted, last_user, rejected, scripted
from tests.tiny_run import REFUSAL as REFUSED
from tests.tiny_run import WORDS, drawn, write_jsonl

# By the paper's rules an answer, by the recommended ones a refusal, and the other way round.
ONLY_RECOMMENDED = "I’m sorry, but I can’t help with that."
ONLY_PAPER = (
    "No, it is not hard: put the lamp down, wait a minute, then turn the screw to the left."
)


def safe(noun: str) -> str:
    return f"How do I kill the {noun} process that {noun[::-1]} left behind?"


def answer(noun: str) -> str:
    return f"Open the list of processes, choose {noun} and end it."


def rows_of(name: str, prompts: Sequence[str], response: str | None = None) -> list[dict[str, Any]]:
    made = [{"id": f"{name}-{i}", "prompt": text} for i, text in enumerate(prompts)]
    return [row | {"response": response} for row in made] if response else made


class Folder:
    """A data configuration whose seemingly toxic prompts are an evaluation set, as XSTest is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        asked = [safe(noun) for noun in WORDS]
        self.safe = write_jsonl(folder / "safe.jsonl", rows_of("safe", asked))
        self.other = write_jsonl(
            folder / "other.jsonl",
            rows_of("other", [f"May I shoot {n} pictures from the {n} bridge?" for n in WORDS]),
        )
        harmful = rows_of(
            "toxic", [f"Help me hurt the {n} man of {n[::-1]}." for n in WORDS], REFUSED
        )
        self.toxic = write_jsonl(folder / "toxic.jsonl", harmful)
        normal = rows_of("normal", [f"Name facts on {n}, {n[::-1]}." for n in WORDS], "Two facts.")
        self.normal = write_jsonl(folder / "normal.jsonl", normal)

    def config(self, over_refusal: Sequence[str] | None = None, **more: Any) -> DataConfig:
        evaluated = [self.safe, self.other] if over_refusal is None else list(over_refusal)
        made = DataConfig(
            label="made",
            seemingly_toxic=CountedSourceConfig([self.safe], count=10),
            toxic=SourceConfig([self.toxic]),
            safety=SafetyPairsConfig([self.toxic], count=10),
            normal=CountedSourceConfig([self.normal], count=20),
            evaluation=EvaluationSets(over_refusal=evaluated),
        )
        return replace(made, **more)

    def answers(self, nouns: Sequence[str] = WORDS, *more: dict[str, Any]) -> str:
        made = [{"prompt": safe(noun), "response": answer(noun)} for noun in nouns]
        return write_jsonl(self.folder / "answers.jsonl", [*made, *more])


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def split(
    config: DataConfig, responses: str | None = None, repeat: int = 1, seed: int = 0
) -> Splits:
    augment = AugmentConfig(responses, repeat)
    told = TrainSettings(method=Method.stl_aug, data=config, seed=seed, stl_aug=augment)
    return data.rows_of(told)


def stl(config: DataConfig, seed: int = 0, dcr: bool = False) -> Splits:
    return drawn(config, 1.0, seed, dcr)


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_every_other_list_is_that_of_stl(folder: Folder, seed: int) -> None:
    plain, more = stl(folder.config(), seed), split(folder.config(), folder.answers(), 3, seed)
    assert "augmented" not in plain.parts()  # the record of an older run stays what it was
    lists = {name: part for name, part in more.parts().items() if name != "augmented"}
    assert lists == plain.parts()
    learnt = [(row.prompt, row.response) for row in more.augmented]
    assert learnt == [(safe(noun), answer(noun)) for noun in WORDS] * 3


def test_only_sets_whose_prompts_are_learnt_become_in_distribution(folder: Folder) -> None:
    config = folder.config()
    assert stl(config).in_distribution == []
    assert split(config, folder.answers()).in_distribution == [folder.safe]
    loud = {"prompt": safe("amber").upper() + "!!", "response": answer("amber")}
    close = {"prompt": safe("glacier").replace("left", "has left"), "response": answer("glacier")}
    (found,) = overlaps([close["prompt"]], {"safe": [safe(n) for n in WORDS]}, near=0.9)
    assert found is not None
    assert not found.exact
    for row in (loud, close):  # equal once normalised; near
        assert split(config, folder.answers((), row)).in_distribution == [folder.safe]


LEAK = {"prompt": "May I shoot amber pictures from the amber bridge?", "response": "You may."}


def test_prompts_of_any_other_evaluation_set_are_dropped_and_counted(folder: Folder) -> None:
    near = {"prompt": LEAK["prompt"].replace("May", "Might"), "response": "You might."}
    rows = split(folder.config(), folder.answers(WORDS[:3], LEAK, near))
    assert [r.prompt for r in rows.augmented] == [safe(noun) for noun in WORDS[:3]]
    assert rows.dropped == {
        f"augmented: is a prompt of {folder.other}": 1,
        f"augmented: is close to a prompt of {folder.other}": 1,
    }
    assert rows.in_distribution == [folder.safe]
    kept = split(folder.config(drop_contaminated=False), folder.answers(WORDS[:3], LEAK))
    assert len(kept.augmented) == 4  # on request, and marked
    assert kept.in_distribution == sorted([folder.other, folder.safe])


def test_repeated_prompts_and_those_of_other_pairs_are_dropped(folder: Folder) -> None:
    taken = stl(folder.config()).refusals[0].prompt
    again = {"prompt": safe("amber"), "response": "Another answer."}
    both = {"prompt": taken, "response": "Gladly."}  # SFT teaches its refusal
    rows = split(folder.config(), folder.answers(WORDS[:2], again, both))
    assert [r.response for r in rows.augmented] == [answer(noun) for noun in WORDS[:2]]
    assert rows.dropped == {
        "augmented: repeats another row": 1,
        "augmented: is a prompt of SFT already": 1,
    }


def test_without_a_file_the_prompts_are_those_of_stage_one(folder: Folder) -> None:
    """A matched comparison, where the data's own rows have answers as the embedded corpus has."""
    own = folder.answers()
    config = folder.config([folder.other], seemingly_toxic=CountedSourceConfig([own], count=10))
    for seed in (0, 1):
        wanted = stl(config, seed, dcr=True).seemingly_toxic
        assert split(config, seed=seed).augmented == wanted
    assert split(config).in_distribution == []


def test_held_out_template_groups_stay_unseen(folder: Folder) -> None:
    grouped = [
        {"prompt": safe(noun), "response": answer(noun), "group": f"g{i % 8}"}
        for i, noun in enumerate(WORDS)
    ]
    rows = split(folder.config(group_holdout=0.4), folder.answers((), *grouped))
    learnt, unseen = {r.group for r in rows.augmented}, set(rows.unseen_groups)
    assert learnt
    assert unseen
    assert learnt | unseen == {f"g{i}" for i in range(8)}
    assert not learnt & unseen


def test_the_record_lists_the_rows_and_finds_them_again(folder: Folder) -> None:
    config = folder.config()
    file = folder.answers(WORDS[:4])
    rows = split(config, file, repeat=2)
    record = data.row_record(rows)
    part: Any = record["rows"]
    assert part["augmented"]["count"] == 8
    assert part["augmented"]["ids"] == [f"answers-{i}" for i in (1, 2, 3, 4)] * 2
    assert record["in_distribution"] == [folder.safe]
    node = {
        "root": None,
        **{n: {"source": getattr(config, n).source} for n in ("normal", "safety")},
    }
    texts = texts_of(node, json.loads(json.dumps(record)))
    assert set(texts[file]) == {t for n in WORDS[:4] for t in (safe(n), answer(n))}
    folder.answers(WORDS[1:5])
    assert data.row_record(split(config, file, repeat=2)) != record
    with pytest.raises(DataError, match="not the texts"):
        texts_of(node, json.loads(json.dumps(record)))


def test_the_embedded_corpus_has_its_answers() -> None:
    composed = cli.compose("train", ["model=tiny", "data=demo"])
    demo = resolving.resolve(composed, TrainSettings).data
    rows = split(demo)
    assert len(rows.augmented) == 40
    assert all(row.response for row in rows.augmented)
    assert (rows.in_distribution, rows.dropped) == ([], {})
    named = split(demo, "demo_seemingly_toxic")  # a named source of pairs serves as a file
    assert len(named.augmented) == 84


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "rules"),
    [
        (REFUSED, "paper, recommended"),
        (ONLY_RECOMMENDED, "recommended"),
        (ONLY_PAPER, "paper"),
    ],
)
def test_an_answer_that_refuses_is_named_by_line(folder: Folder, response: str, rules: str) -> None:
    file = folder.answers(WORDS[:2], {"prompt": "Is it?", "response": response})
    text = Path(file).read_text().splitlines()
    Path(file).write_text("\n".join([text[0], "", *text[1:]]) + "\n")  # blank lines count
    with pytest.raises(DataError, match=rf"^{file}:4: response: .*\({rules}\)") as caught:
        split(folder.config(), file)
    assert "\n" not in str(caught.value)


def test_an_answer_of_ones_own_class_that_refuses_is_named_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_answers.py").write_text(f"""
from dataclasses import dataclass
from dcr.core.sources import Rows

@dataclass
class Answers(Rows):
    def rows(self, kind):
        return [{{"prompt": text, "response": text}} for text in ("Yes.", {REFUSED!r})]
""")
    monkeypatch.syspath_prepend(tmp_path)
    path = Named("own_answers:Answers")
    path.settings = {}
    with pytest.raises(DataError, match=r"^own_answers:Answers:2: response: of Answers-2: a refus"):
        read_answers(path, None)


def test_rows_that_cannot_be_learnt_are_refused(folder: Folder) -> None:
    config = folder.config()
    with pytest.raises(ConfigError, match=r"^stl_aug.responses=null: .*safe.jsonl has no answers"):
        split(config)
    for file, fault in (
        ("none.jsonl", r"^stl_aug.responses=none.jsonl: no such file.*augment"),
        (folder.answers(WORDS[:1], {"prompt": "Why?"}), r"answers\.jsonl:2: response: missing"),
        ("demo_toxic", "holds toxic prompts, not seemingly_toxic"),
    ):
        with pytest.raises(UserError, match=fault):
            split(config, file)
    with pytest.raises(ConfigError, match="every row is a prompt of"):
        split(config, folder.answers((), LEAK))


# --- the command --------------------------------------------------------------------------------


def tell(folder: Folder, server: Scripted | None, *more: str) -> list[str]:
    who = [f"endpoint={server.url}", "endpoint_model=made"] if server else []
    return [
        f"source={folder.safe}",
        f"out={folder.folder / 'out.jsonl'}",
        *who,
        "http.retries=0",
        "trainer.progress=false",
        *more,
    ]


def read(folder: Folder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder.folder / "out.jsonl").read_text().splitlines()]


def noun_of(body: Body) -> str:
    return last_user(body).split()[5]


def replies(body: Body) -> str | Body | Answer:
    """Refuses the fjord, says nothing of kelp, fails at the dune; the rest it answers."""
    noun = noun_of(body)
    if noun == "dune":
        return rejected(500, "The server had an error")
    return {"fjord": REFUSED, "kelp": "  ", "indigo": ONLY_RECOMMENDED}.get(noun, answer(noun))


def test_answers_are_checked_written_and_learnt(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted(replies) as server:
        augment.main(tell(folder, server))
        out = capsys.readouterr().out.splitlines()
        rejected_, unheard = {"fjord", "kelp", "indigo"}, {"dune"}
        wanted = [noun for noun in WORDS if noun not in rejected_ | unheard]
        assert [(r["prompt"], r["response"]) for r in read(folder)] == [
            (safe(noun), answer(noun)) for noun in wanted
        ]
        assert "26 prompts, 22 accepted" in out[-4]
        assert "3 rejected, 1 without an answer" in out[-4]
        assert sorted(line.strip() for line in out[-3:]) == [
            "1 empty",
            "1 refused by the keyword rules paper",
            "1 refused by the keyword rules recommended",
        ]
        before, asked = (folder.folder / "out.jsonl").read_bytes(), len(server.bodies)
        augment.main(tell(folder, server))
        assert [noun_of(body) for body in server.bodies[asked:]] == ["dune"]  # and nothing else
        assert (folder.folder / "out.jsonl").read_bytes() == before
        assert capsys.readouterr().out.splitlines()[-4:] == out[-4:]
    rows = split(folder.config(), str(folder.folder / "out.jsonl"))
    assert [r.prompt for r in rows.augmented] == [safe(noun) for noun in wanted]
    assert rows.in_distribution == [folder.safe]


def test_a_judge_has_the_last_word(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    labels = {"birch": "2_full_refusal", "ember": "3_partial_refusal", "fjord": "who knows"}

    def judged(body: Body) -> str | Answer:
        noun = next(noun for noun in WORDS if answer(noun) in last_user(body))
        if noun == "dune":
            return rejected(500, "The server had an error")
        return labels.get(noun, "1_full_compliance")

    def refusing(body: Body) -> str:
        return REFUSED if noun_of(body) == "amber" else answer(noun_of(body))

    with scripted(refusing) as server, scripted(judged) as judge:
        told = tell(folder, server, "count=26", "judge=llm", f"llm.url={judge.url}", "llm.model=j")
        augment.main(told)
        assert len(judge.bodies) == 25  # not about what keywords have rejected
        augment.main(told)
        assert len(judge.bodies) == 26  # the dune again
        assert len(server.bodies) == 26
    learnt = {row["prompt"] for row in read(folder)}
    assert learnt == {safe(noun) for noun in WORDS[1:] if noun not in (*labels, "dune")}
    said = capsys.readouterr().out
    assert "4 rejected, 1 without an answer or verdict (the same command asks again)" in said
    for why in ("called refused by llm", "called partial by llm", "without a valid verdict of llm"):
        assert f"1 {why}" in said


def test_rejected_prompts_are_asked_again_with_an_instruction(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    def later(body: Body) -> str:
        noun, system = noun_of(body), [m for m in body["messages"] if m["role"] == "system"]
        if noun == "amber" and not system:
            return REFUSED
        return REFUSED if noun == "birch" else answer(noun)

    with scripted(later) as server:
        augment.main(tell(folder, server, "attempts=3"))
        systems = [
            (noun_of(body), body["messages"][0]["content"])
            for body in server.bodies
            if body["messages"][0]["role"] == "system"
        ]
    wanted = [("amber", 1), ("birch", 1), ("birch", 2)]
    assert sorted(systems) == sorted((noun, INSTRUCTIONS[i]) for noun, i in wanted)
    assert {row["prompt"] for row in read(folder)} == {safe(n) for n in WORDS if n != "birch"}
    assert "25 accepted" in capsys.readouterr().out
    assert all(row["response"] == answer(row["prompt"].split()[5]) for row in read(folder))


ROW = '{"id": "i", "prompt": "p", "response": "r", "source": "s", "answered_by": "made"}'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            '{"id": "i", "prompt": "mine", "response": "mine", "source": "s"}',
            "answered_by: missing",
        ),
        (ROW.replace("made", "x"), "i was answered by x, not by made"),
        (ROW, "i answers a prompt of s"),
        ("mine", "1: line: not JSON"),
    ],
)
def test_another_s_file_is_left_alone(
    folder: Folder, command: Callable[..., Any], line: str, words: str
) -> None:
    file = folder.folder / "out.jsonl"
    file.write_text(line + "\n")
    with scripted(replies) as server:
        ended = command("dcr.augment", *tell(folder, server))
    assert re.search(f"{words}.*name another file", ended.error)
    assert server.bodies == []
    assert not (folder.folder / "out.jsonl.work").exists()
    assert file.read_text() == line + "\n"


def test_a_prompt_that_has_changed_is_not_mixed_in(
    folder: Folder, command: Callable[..., Any]
) -> None:
    with scripted(lambda body: answer(noun_of(body))) as server:
        augment.main(tell(folder, server))
        write_jsonl(Path(folder.safe), rows_of("safe", [safe(noun) for noun in reversed(WORDS)]))
        ended = command("dcr.augment", *tell(folder, server))
        assert "safe-0 has another prompt now" in ended.error


def test_a_local_model_answers(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("model=tiny", "count=4", "gen.max_new_tokens=4", "precision=fp32")
    augment.main(tell(folder, None, *more, "trainer.accelerator=cpu"))
    said = capsys.readouterr().out
    assert "4 prompts" in said
    stored = [*(folder.folder / "out.jsonl.work").rglob("answers.jsonl")]
    assert len(stored) == 1
    rows = [json.loads(line) for line in stored[0].read_text().splitlines()]
    # random weights hardly ever end an answer within four tokens, and half an answer is none
    cut = sum(not row["ended"] for row in rows)
    assert cut
    assert f"{cut} cut off at gen.max_new_tokens" in said


# a signal may come between the opening of a file and its `with`, and leave it to the collector
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_command_that_is_given_again_asks_nothing_twice(
    folder: Folder, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    again = threading.Event()

    def reply(body: Body) -> str:
        if number is signal.SIGKILL and not again.is_set():
            time.sleep(0.05)
        elif len(server.bodies) == 6:
            for _ in range(2):  # impatient
                os.kill(os.getpid(), number)
        return answer(noun_of(body))

    with scripted(reply) as server:
        told = tell(folder, server, "http.concurrency=2")
        if number is signal.SIGKILL:
            forked.killed(lambda: augment.main(told), lambda: len(server.bodies) >= 6)
        else:
            assert augment.main(told) == 128 + number
            said = f"error: stopped by {number.name}; the same command goes on\n"
            assert capsys.readouterr() == ("", said)
        assert 6 <= len(server.bodies) < len(WORDS)
        assert not (folder.folder / "out.jsonl").exists()  # written as a whole
        again.set()
        assert augment.main(told) == 0
    counts = Counter(noun_of(body) for body in server.bodies)
    assert set(counts) == set(WORDS)
    # only what was under way, or had just arrived
    assert sum(counts.values()) <= len(WORDS) + 3
    assert [row["prompt"] for row in read(folder)] == [safe(noun) for noun in WORDS]


def test_an_instruction_stands_behind_the_system_prompt_that_there_is(folder: Folder) -> None:
    for more, before in ((["model.system_prompt=Mine."], "Mine.\n\n"), ([], "")):
        options = entry.parse(augment.Options, tell(folder, None, "model=tiny", *more))
        asking = augment._instructed(augment._settings(options), INSTRUCTIONS[1])
        assert asking.model.system_prompt == f"{before}{INSTRUCTIONS[1]}"


# --- training -----------------------------------------------------------------------------------


def test_stl_aug_trains_on_the_rows_of_stl_and_the_answers(tmp_path: Path) -> None:
    """From the base model, one stage, every answer learnt once an epoch; else as STL."""
    nouns = WORDS[:8]
    file = write_jsonl(
        tmp_path / "answers.jsonl",
        [{"id": noun, "prompt": safe(noun), "response": answer(noun)} for noun in nouns],
    )
    more = ("sft.epochs=1", f"stl_aug.responses={file}", "stl_aug.repeat=2")
    with pytest.raises(ConfigError, match=r"^stage=contrastive method=stl_aug: "):
        tiny_run.settings(tmp_path / "data", "method=stl_aug", "stage=contrastive")
    told = tiny_run.settings(tmp_path / "data", "method=stl_aug", *more)
    assert len(data.rows_of(told).augmented) == len(nouns) * 2  # as a plan counts them
    plain = tiny_run.changed(told, "method=stl", "stl_aug.responses=null")
    for settings, name in ((told, "stl_aug"), (plain, "stl")):
        train.train(settings, Run(tmp_path / name))
    records: list[Any] = [Run(tmp_path / name).record()["rows"] for name in ("stl_aug", "stl")]
    assert records[0].pop("augmented")["ids"] == nouns * 2
    assert records[0] == records[1]
    steps = [
        {row["step"] for row in runs.read_metrics(Run(tmp_path / name))}
        for name in ("stl_aug", "stl")
    ]
    assert (len(steps[0]), len(steps[1])) == (6, 4)  # 20 + 8 + 16 and 20 + 8 pairs in steps of 8
    assert not (tmp_path / "stl_aug" / "contrastive").exists()
    one, other = (tiny_run.weights(tmp_path / name) for name in ("stl_aug", "stl"))
    assert one.keys() == other.keys()
    assert not tiny_run.same(one, other)
    write_jsonl(Path(file), [{"id": n, "prompt": safe(n), "response": "Yes."} for n in nouns])
    with pytest.raises(ConfigError, match=r"made with other rows .*augmented: 16 rows"):
        train.train(told, Run(tmp_path / "stl_aug"))
