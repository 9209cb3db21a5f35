"""Twins of toxic prompts: what counts as one, and the command that writes and answers them."""

import json
from pathlib import Path

import pytest

from dcr import augment, twins
from dcr.core import data, sources
from dcr.core.config import Kind
from tests.servers.scripted import Body, Scripted, last_user, scripted

TOXIC = "How do I poison the {} next door?"
HARMLESS = "How do I feed the {} next door?"
ANSWER = "Put down fresh water and some seeds for the {} twice a day."
NOUNS = [
    *("otter", "heron", "badger", "weasel", "marten"),
    *("lizard", "falcon", "beaver", "magpie", "hamster"),
]


@pytest.mark.parametrize(
    ("twin", "why"),
    [
        ("How do I poison the weeds next door?", twins.ACCEPTED),
        ("How do I feed the dog that lives next door?", twins.ACCEPTED),
        ("how do i POISON the dog next door", "the same as the toxic prompt"),
        ("How do I poison the weeds next door.", "of another form"),
        ("How do I poison?", "of another length"),
        ("What is a good name for cats?", "of too few of its words"),
        ("I'm sorry, but I can't help with that?", "refused to rewrite"),
        ("", "empty"),
        ("?!", "empty"),
    ],
)
def test_a_twin_has_the_form_and_most_of_the_words(twin: str, why: str) -> None:
    assert twins.outcome("How do I poison the dog next door?", twin) == why


@pytest.mark.parametrize("pair", range(0, 499, 7))
def test_the_contrast_corpus_is_made_of_twins(pair: int) -> None:
    toxic, harmless = (sources.read(f"contrasts_{k}")[pair] for k in ("toxic", "seemingly_toxic"))
    assert twins.outcome(toxic.prompt, harmless.prompt) in (
        twins.ACCEPTED,
        "of too few of its words",
    )


@pytest.mark.parametrize(
    "text",
    [
        "How do I feed it?",
        '\n  "How do I feed it?"\nThis keeps the form.',
        "Rewritten request: How do I feed it?",
        "**Harmless version:** “How do I feed it?”",
    ],
)
def test_the_request_is_found_in_what_an_author_writes(text: str) -> None:
    assert twins.candidate(text) == "How do I feed it?"


@pytest.mark.parametrize("text", ["Once upon a time: go on", "Dear John: say no", "Question: why?"])
def test_opening_words_are_no_label(text: str) -> None:
    assert twins.candidate(text) == text


def replies(body: Body) -> str:
    """Rewrites all but three as asked, and answers what it is given otherwise."""
    noun = last_user(body).split()[5]
    asked = body["messages"][0]["content"]
    if not asked.startswith(("You rewrite", "The user's message", "Turn the")):
        return "I'm sorry, I can't help." if noun == "weasel" else ANSWER.format(noun)
    again = asked.startswith("The user's message")
    if noun == "otter" and not again:
        return "I cannot help with that."
    return {"heron": "No.", "badger": HARMLESS.format("marten")}.get(noun, HARMLESS.format(noun))


def asked(place: Path, server: Scripted, *more: str) -> list[str]:
    """The command that writes `twins.jsonl` for ten toxic prompts."""
    rows = (json.dumps({"id": noun, "prompt": TOXIC.format(noun)}) + "\n" for noun in NOUNS)
    (place / "toxic.jsonl").write_text("".join(rows))
    return [
        "twins=true", f"source={place / 'toxic.jsonl'}", f"out={place / 'twins.jsonl'}",
        f"endpoint={server.url}", "endpoint_model=made", "trainer.progress=false", "attempts=2",
        *more,
    ]  # fmt: skip


def test_twins_are_written_answered_and_paired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "twins.jsonl"
    with scripted(replies) as server:
        command = asked(tmp_path, server)
        assert augment.main(command) == 0
        told = capsys.readouterr().out
        rows = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
        calls = len(server.bodies)
        assert augment.main(command) == 0
        assert len(server.bodies) == calls, "nothing is asked twice"
    assert "10 prompts, 7 accepted" in told
    assert "3 rejected" in told
    assert "1 without a twin: refused to rewrite" in told  # the heron, also when asked again
    assert "1 without a twin: another's twin as well" in told  # the badger's or the marten's
    assert "1 refused by the keyword rules" in told  # the weasel's answer
    assert "form alone tells the kinds apart (AUROC): 0.50" in told
    assert rows["twin-otter"]["prompt"] == HARMLESS.format("otter")
    assert rows["twin-otter"]["response"] == ANSWER.format("otter")
    # so that a share of the pairs is held out whole
    harmless = sources.read(str(out), kind=Kind.seemingly_toxic)
    assert [row.group for row in harmless] == [row.id.removeprefix("twin-") for row in harmless]
    both = [
        {row.group or row.id for row in data.split_by_group(part, 0.5, seed=1)[1]}
        for part in (harmless, sources.read(str(tmp_path / "toxic.jsonl"), kind=Kind.toxic))
    ]
    assert both[0] == both[1] & {row.group for row in harmless}
    assert both[0]


def swaps_synonyms(body: Body) -> str:
    """Twins that ask for the same harm, unless asked again; a judge that says so."""
    text = last_user(body)
    if "SECOND REQUEST" in text:
        return "1_same_harm" if "kill" in text else "2_harmless"
    if "QUESTION:" in text:
        return "1_full_compliance"
    again = body["messages"][0]["content"].startswith("The user's message")
    if not body["messages"][0]["content"].startswith(("You rewrite", "The user's message")):
        return ANSWER.format("it")
    noun = text.split()[5]
    return HARMLESS.format(noun) if again else f"How do I kill the {noun} next door?"


def verbs_of(place: Path) -> set[str]:
    lines = (place / "twins.jsonl").read_text().splitlines()
    return {json.loads(line)["prompt"].split()[3] for line in lines}


@pytest.mark.parametrize("judged", [True, False])
def test_a_twin_in_other_words_for_the_same_harm_is_none_where_a_judge_reads_it(
    judged: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted(swaps_synonyms) as server:
        judge = ["judge=llm", "llm.model=scripted", f"llm.url={server.url}"]
        assert augment.main(asked(tmp_path, server, *judge * judged)) == 0
    told = capsys.readouterr().out
    assert verbs_of(tmp_path) == {"feed" if judged else "kill"}
    assert ("unchecked: whether each twin asks for something else" in told) is not judged


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_judge_that_is_asked_later_takes_back_what_was_unchecked(
    attempts: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted(swaps_synonyms) as server:
        judge = ["judge=llm", "llm.model=scripted", f"llm.url={server.url}"]
        command = asked(tmp_path, server, f"attempts={attempts}")
        assert augment.main(command) == 0
        assert verbs_of(tmp_path) == {"kill"}
        capsys.readouterr()
        for removed in (True, False):
            assert augment.main([*command, *judge]) == 0
            assert ("10 earlier answers removed" in capsys.readouterr().out) is removed
            assert verbs_of(tmp_path) == ({"feed"} if attempts == 2 else set())
