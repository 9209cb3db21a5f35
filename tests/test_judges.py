"""Judges against loopback servers: verdicts, what is asked again and what is not, faults, keys."""

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import cohen_kappa_score

from dcr import keywords
from dcr.core.config import ConfigError, Kind, UserError
from dcr.core.evaluation import PromptSet
from dcr.core.evaluation.protocols import Judge
from dcr.core.generation import Completion
from dcr.endpoints import HTTPConfig, ServerConfig
from dcr.endpoints.servers import EndpointError
from dcr.extensions import TABLE, EvalSettings
from dcr.judges import GuardConfig, LLMJudgeConfig, ModerationConfig, guards, served
from dcr.judges import judging as judges
from dcr.judges.verdicts import (
    COMPLIANCE,
    SAFETY,
    Verdict,
    agreements,
    answer_fingerprint,
    by_keywords,
)
from tests.servers.faults import FAULTS, faulty
from tests.servers.loopback import Answer
from tests.servers.scripted import (
    Body,
    Scripted,
    completion,
    last_user,
    moderated,
    scripted,
)

KEY = "test-key-93c1f0"

Serve = Callable[[Callable[[Body], "str | Body | Answer"]], Scripted]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    monkeypatch.setenv("JUDGE_TEST_KEY", KEY)
    with ExitStack() as running:
        yield lambda reply: running.enter_context(scripted(reply))


def texts(server: Scripted) -> list[str]:
    """The user's text of each request."""
    return [last_user(body) for body in server.bodies]


def by_response(body: Body) -> Body:
    """The class by a word in the response, which no wording of the judge's prompt holds."""
    text = last_user(body)
    refused, partly = "zebra" in text, "lemur" in text
    label = "2_full_refusal" if refused else "3_partial_refusal" if partly else "1_full_compliance"
    return completion(label, tokens=(100, 5))


def settings(url: str, **llm_: Any) -> EvalSettings:
    node: dict[str, Any] = {"url": url, "model": "judge-1", "key": "JUDGE_TEST_KEY"}
    return EvalSettings(
        judge=["llm"],
        http=HTTPConfig(concurrency=4, timeout=60.0, retries=0),
        llm=LLMJudgeConfig(**node | llm_),
        moderation=ModerationConfig(url=url, model="moderation-latest", key="JUDGE_TEST_KEY"),
    )


def answer(name: str, response: str = "", prompt: str | None = None) -> Completion:
    prompt = f"question {name}?" if prompt is None else prompt
    return Completion(name, prompt, response or f"answer {name}", 3, True, 0.0)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for file in sorted(folder.rglob("*.jsonl"))
        for line in file.read_text().splitlines()
    ]


# --- what a judge's words mean --------------------------------------------------------------------

CLEAR = {
    "complied": (
        *("1", "1.", " 1\n", "(1)", "CLASS: 1_full_compliance", "**1_full_compliance**"),
        *("Class 1: full compliance", "The correct class is 1_full_compliance."),
        *("Full compliance", "1) full compliance", "1_full_compl"),
        "1_full_compliance\n\nThe answer gives 2 ways to do it.",
        "<think>Perhaps 2_full_refusal?</think>\n1_full_compliance",
    ),
    "refused": (" 2.", "\n\n2_full_refusal", "2 - full refusal", "FULL REFUSAL", "Label: 2"),
    "partial": ("3", "**3_partial_refusal**", "3_partial_refusal, because", "partial refusal"),
}
UNCLEAR = (
    *("", "0", "4", "10", "1.5", "2nd", "1a", "CLASS:", "Class A"),
    *("1 or 2", "1 (or 2)", "1/2", "1, 2", "2 and 3", "1-3", "1 2", "either 1 or 2"),
    *("1_full_refusal", "2_full_compliance", "3_full_refusal", "partial compliance"),
    "1_full_compliance or 3_partial_refusal",
    "1_full_compliance2_full_refusal",
    "1_full_compliance. Or class 3.",
    "full refusal or partial refusal",
    "not 2_full_refusal",
    "The 2 requests differ.",
    "<think>1_full_compliance",
)


@pytest.mark.parametrize(
    ("label", "text"), [(label, text) for label, texts in CLEAR.items() for text in texts]
)
def test_a_class_is_read_in_every_form(label: str, text: str) -> None:
    assert served.parsed(text) == label


@pytest.mark.parametrize("text", UNCLEAR)
def test_an_unclear_answer_is_no_verdict(text: str) -> None:
    assert served.parsed(text) is None


# --- what the judge is sent -----------------------------------------------------------------------


def test_the_shipped_wording_ends_where_the_judge_goes_on() -> None:
    wording = served.wording(LLMJudgeConfig())
    assert wording.endswith("CLASS:")
    assert wording.count("{question}") == wording.count("{response}") == 1
    assert all(
        name in wording for name in ("1_full_compliance", "2_full_refusal", "3_partial_refusal")
    )


def test_a_long_text_loses_its_middle_alone() -> None:
    text = "".join(chr(97 + i % 26) for i in range(served.LONGEST + 5))
    short = served.shortened(text)
    begin, note, end = short.split("\n")
    assert begin == text[: served.OPENING]
    assert note == "[... 5 characters left out ...]"
    assert end == text[served.OPENING + 5 :]
    assert served.shortened(text[:-5]) == text[:-5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"only {question}", "has no {response}"),
        (b"neither", "has no {question}"),
        (b"\xff\xfe", "is not UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_a_wording_that_cannot_be_used_is_named(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "wording.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"llm.prompt={file}: {message}") as found:
        judges.JudgeTable().check(["llm"], settings("http://127.0.0.1:1/v1", prompt=str(file)))
    assert "\n" not in str(found.value)


def test_every_judge_has_its_place_in_the_tables() -> None:
    settings = EvalSettings()
    found = {name: judges.judging_of(name, settings) for name in TABLE.judges}
    assert all(isinstance(judging, judges.Judging) for judging in found.values())
    nodes = {name: judges.node_of(name, settings) for name in found}
    assert [name for name, node in nodes.items() if node is None] == ["outcome"]
    # the cost is estimated of those that a server charges for
    served_ = {name for name, node in nodes.items() if isinstance(node, ServerConfig)}
    assert {name for name, judging in found.items() if judging.characters} == served_


# --- asking and storing ---------------------------------------------------------------------------


def test_verdicts_are_stored_and_never_asked_for_again(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(by_response)
    node = settings(server.url, input_price=2.0, output_price=10.0)
    answers = {
        "one": [answer("a"), answer("b", "zebra"), answer("c", "a lemur")],
        "two": [answer("b2", "zebra", "question b?"), answer("d")],
    }
    first = judges.judge("llm", node, answers, tmp_path, progress=False)
    labels = {name: [v.compliance for v in rows] for name, rows in first.items()}
    assert labels == {"one": ["complied", "refused", "partial"], "two": ["refused", "complied"]}
    assert {name: [v.id for v in rows] for name, rows in first.items()} == {
        "one": ["a", "b", "c"],
        "two": ["b2", "d"],
    }
    assert len(server.requests) == 4  # the response in both sets was asked about once
    request = server.bodies[0]
    assert request["model"] == "judge-1"
    assert (request["temperature"], request["max_tokens"]) == (0, 16)
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    sent = sum(len(m["content"]) for r in server.bodies for m in r["messages"])
    said_before, said_after = capsys.readouterr().out.splitlines()
    assert f"0 verdicts stored, 4 to ask of judge-1: about {sent // 4:,} tokens in" in said_before
    assert "at most 64 out" in said_before
    # 4 x 100 tokens at 2 USD and 4 x 5 at 10 USD a million
    assert "4 requests, 400 tokens in, 20 out, 0.0010 USD" in said_after

    again = judges.judge("llm", node, answers, tmp_path, progress=False)
    assert again == first
    assert len(server.requests) == 4
    assert capsys.readouterr().out == "llm: 4 verdicts, all stored\n"


def test_a_changed_response_is_judged_anew_and_the_old_one_is_remembered(
    serve: Serve, tmp_path: Path
) -> None:
    server = serve(by_response)
    node = settings(server.url)

    def verdict(response: str) -> str | None:
        found = judges.judge("llm", node, {"one": [answer("a", response)]}, tmp_path, False)
        return found["one"][0].compliance

    assert [verdict("plain"), verdict("zebra"), verdict("plain")] == [
        "complied",
        "refused",
        "complied",
    ]
    assert len(server.requests) == 2


def test_wording_parameters_and_model_have_a_store_of_their_own(
    serve: Serve, tmp_path: Path
) -> None:
    server = serve(by_response)
    file = tmp_path / "wording.txt"
    file.write_text("Mine: {question} / {response}\nCLASS:\n")
    answers = {"one": [answer("a")]}
    variants = [
        settings(server.url),
        settings(server.url, prompt=str(file)),
        settings(server.url, model="judge-2"),
        settings(server.url, parameters={"temperature": 1}),
    ]
    for number, node in enumerate(variants, start=1):
        judges.judge("llm", node, answers, tmp_path / "run", False)
        assert len(server.requests) == number
    assert texts(server)[1] == "Mine: question a? / answer a\nCLASS:"
    file.write_text("Changed: {question} / {response}\nCLASS:\n")
    judges.judge("llm", variants[1], answers, tmp_path / "run", False)
    assert texts(server)[4] == "Changed: question a? / answer a\nCLASS:"
    assert len(list((tmp_path / "run" / "verdicts").iterdir())) == 5
    # neither prices nor the way of calling change a verdict
    cheap = replace(variants[0], http=HTTPConfig(concurrency=1, retries=3))
    cheap.llm.input_price = 1.0
    judges.judge("llm", cheap, answers, tmp_path / "run", False)
    # a parameter set to null is not sent, so that it changes nothing either
    unset = settings(server.url, parameters={"temperature": 0, "max_tokens": 16, "top_p": None})
    judges.judge("llm", unset, answers, tmp_path / "run", False)
    assert len(server.requests) == 5


def test_a_kill_between_the_files_of_two_sets_costs_no_request(
    serve: Serve, tmp_path: Path
) -> None:
    server = serve(by_response)
    node = settings(server.url)
    answers = {"one": [answer("a")], "two": [answer("z", "answer a", "question a?")]}
    first = judges.judge("llm", node, answers, tmp_path, False)
    (file,) = tmp_path.rglob("two.jsonl")
    file.unlink()
    assert judges.judge("llm", node, answers, tmp_path, False) == first
    assert len(server.requests) == 1
    assert sorted(row["id"] for row in lines(tmp_path)) == ["a", "z"]


# --- faults ---------------------------------------------------------------------------------------

# Each fault of the proxy that may strike one row, and each useless answer, with what it ends as.
STRUCK = {
    **dict.fromkeys(("rate_limited", "server_error", "unavailable"), "error"),
    **dict.fromkeys(("dropped", "half_body"), "error"),
    **dict.fromkeys(("garbage", "html", "half_json", "empty", "no_choices"), "invalid"),
    **dict.fromkeys(("no_content", "filtered", "filtered_prompt"), "invalid"),
}
SAID = {"silence": "", "refusal": "I'm sorry, but I can't help.", "undecided": "1 or 2"}


def test_faults_are_counted_apart_and_only_the_unanswered_are_asked_again(
    serve: Serve, tmp_path: Path
) -> None:
    def about(text: str, names: Iterable[str]) -> str | None:
        return next((name for name in names if f"question {name}?" in text), None)

    def reply(body: Body) -> Body:
        name = about(last_user(body), SAID)
        return completion(SAID[name]) if name else by_response(body)

    mended = threading.Event()

    def script(content: bytes, _: int) -> Answer | None:
        name = about(content.decode(), STRUCK)
        return FAULTS[name] if name and not mended.is_set() else None

    wanted = {**STRUCK, **dict.fromkeys(SAID, "invalid"), "x": "ok", "y": "ok"}
    rows = [answer(name, "zebra" if name == "y" else "") for name in wanted]
    server = serve(reply)
    with faulty(server.url, script) as proxy:
        node = settings(proxy.url)
        node.http.timeout = 60.0
        node.http.concurrency = 10  # so that the faults in a row do not look like a dead server

        def judged() -> dict[str, Verdict]:
            found = judges.judge("llm", node, {"one": rows}, tmp_path, False)["one"]
            return {v.id: v for v in found}

        first = judged()
        assert {name: v.status for name, v in first.items()} == wanted
        labels = {name: v.compliance for name, v in first.items() if v.compliance}
        assert labels == {"x": "complied", "y": "refused"}
        assert all(v.raw for v in first.values())
        block = judges.counts(list(first.values()), COMPLIANCE, {"model": "judge-1"})
        counted = ("n", "complied", "partial", "refused", "invalid", "error")
        assert [block[key] for key in counted] == [18, 1, 0, 1, 11, 5]
        before = len(server.requests)
        mended.set()
        second = judged()
        assert len(server.requests) - before == 5
        assert {name: v.status for name, v in second.items()} == {
            name: "ok" if status == "error" else status for name, status in wanted.items()
        }
        assert judged() == second
        assert len(server.requests) - before == 5


@pytest.mark.parametrize("name", ["llm", "moderation"])
def test_a_judge_that_answers_nothing_is_no_judge(serve: Serve, tmp_path: Path, name: str) -> None:
    """Its errors are kept; with one verdict, of now or earlier, the rest may be asked again."""
    broken = threading.Event()
    broken.set()

    def reply(body: Body) -> Body | Answer:
        if broken.is_set():
            return FAULTS["server_error"]
        return by_response(body) if name == "llm" else moderated(violence=True)

    node, rows = settings(serve(reply).url), [answer("a"), answer("b")]
    with pytest.raises(EndpointError, match=rf"^{name}: none of 2 .*HTTP 500.* same command"):
        judges.judge(name, node, {"one": rows}, tmp_path, False)
    assert [row["status"] for row in lines(tmp_path)] == ["error"] * 2
    broken.clear()
    judges.judge(name, node, {"one": rows[:1]}, tmp_path, False)
    broken.set()
    found = judges.judge(name, node, {"one": rows}, tmp_path, False)["one"]
    assert [v.status for v in found] == ["ok", "error"]


@pytest.mark.parametrize(("labels", "told"), [(2, "no label for id-2"), (4, "more labels than")])
def test_a_judge_of_ones_own_gives_each_answer_a_label(labels: int, told: str) -> None:
    class Own(Judge):
        labels = ("a",)

        def judge(self, answers: Any) -> list[str]:
            return ["a"] * labels

    answers = [answer(f"id-{number}") for number in range(3)]
    with pytest.raises(ConfigError, match=told):
        list(judges._by_own("mine:Own", Own(), answers))


def test_a_judge_that_fails_midway_keeps_what_it_said(serve: Serve, tmp_path: Path) -> None:
    quota = threading.Semaphore(6)

    def script(body: Body) -> Body | Answer:
        if quota.acquire(blocking=False):
            return by_response(body)
        return FAULTS["no_quota"]

    server = serve(script)
    rows = [answer(f"r{i}") for i in range(20)]
    with pytest.raises(EndpointError, match=r"llm\.key=JUDGE_TEST_KEY"):
        judges.judge("llm", settings(server.url), {"one": rows}, tmp_path, False)
    assert [row["status"] for row in lines(tmp_path)] == ["ok"] * 6


def test_verdicts_that_cannot_be_written_end_the_spending(serve: Serve, tmp_path: Path) -> None:
    server = serve(by_response)
    node = settings(server.url)
    judges.judge("llm", node, {"two": [answer("x")]}, tmp_path, False)
    (place,) = (tmp_path / "verdicts").iterdir()
    (place / "one.jsonl").symlink_to(tmp_path / "nowhere" / "one.jsonl")
    rows = [answer(f"r{i}") for i in range(30)]
    with pytest.raises(UserError, match=r"one\.jsonl: cannot be written"):
        judges.judge("llm", node, {"one": rows}, tmp_path, False)
    assert len(server.requests) <= 1 + node.http.concurrency


# --- moderation -----------------------------------------------------------------------------------


def test_moderation_sees_the_response_alone(serve: Serve, tmp_path: Path) -> None:
    server = serve(lambda body: moderated(violence="zebra" in body["input"], hate=False))
    rows = [answer("a", prompt="zebra?"), answer("b", "zebra"), answer("c", " \n")]
    node = settings(server.url)
    found = judges.judge("moderation", node, {"one": rows}, tmp_path, False)["one"]
    assert [v.safety for v in found] == ["safe", "unsafe", "safe"]
    assert [v.raw for v in found] == ["", "violence", "empty"]
    assert sorted(texts(server)) == ["answer a", "zebra"]  # nothing to see, nothing to ask
    assert judges.counts(found, SAFETY, {"model": "moderation-latest"}) == {
        "model": "scripted-moderation",
        "n": 3,
        "safe": 2,
        "unsafe": 1,
        "invalid": 0,
        "error": 0,
    }
    assert judges.usage(found, node.moderation)["requests"] == 2
    judges.judge("moderation", node, {"one": rows}, tmp_path, False)
    assert len(server.requests) == 2
    failing = serve(lambda body: {"results": [{}]} if "a" in body["input"] else FAULTS["garbage"])
    node = settings(failing.url)
    found = judges.judge("moderation", node, {"one": rows}, tmp_path / "two", False)["one"]
    assert [(v.status, v.safety) for v in found[:2]] == [("invalid", None)] * 2


# --- counting and comparing -----------------------------------------------------------------------


def test_counts_of_a_judge_that_says_both() -> None:
    found = [
        Verdict("a", "1", "ok", "refused", "safe"),
        Verdict("b", "2", "ok", "complied", "unsafe"),
        Verdict("c", "3", "ok", "complied", None),
        Verdict("d", "4", "invalid"),
    ]
    assert judges.counts(found, COMPLIANCE + SAFETY, {"model": "w"}) == {
        "model": "w",
        "n": 4,
        "complied": 2,
        "partial": 0,
        "refused": 1,
        "safe": 1,
        "unsafe": 1,
        "invalid": 1,
        "error": 0,
    }


def test_usage_counts_a_response_once_and_only_what_was_answered() -> None:
    found = [
        Verdict("a", "1", "ok", prompt_tokens=100, completion_tokens=4),
        Verdict("a2", "1", "ok", prompt_tokens=100, completion_tokens=4),
        Verdict("b", "2", "invalid", prompt_tokens=50, completion_tokens=16),
        Verdict("c", "3", "error"),
        Verdict("d", "4", "ok", asked=False),
    ]
    priced = ServerConfig(model="m", input_price=2.0, output_price=10.0)
    used = {"requests": 2, "prompt_tokens": 150, "completion_tokens": 20}
    assert judges.usage(found, priced) == used | {"usd": pytest.approx(0.0005)}
    assert judges.usage(found, ServerConfig(model="m")) == used | {"usd": None}
    assert judges.usage(found, GuardConfig(model="g")) == used | {"usd": None}


def test_the_cost_of_a_judge_holds_what_earlier_commands_asked(
    serve: Serve, tmp_path: Path
) -> None:
    """As where one command asks about over-refusal, and the next about safety."""
    server = serve(lambda body: moderated(violence=False, hate=False))
    asked, table = settings(server.url), judges.JudgeTable()
    for name, texts, requests in (("one", ("a", "b"), 2), ("two", ("b", "c"), 3)):
        rows = [answer(f"{name}-{text}", text, prompt="same") for text in texts]
        part = PromptSet(name, Kind.toxic, [])
        found = table.judged(["moderation"], asked, [part], {name: rows}, {}, tmp_path)
        assert found.blocks["usage"]["moderation"]["requests"] == requests
    assert len(server.requests) == 3


def verdicts(text: str, about: str = "compliance") -> list[Verdict]:
    """One verdict a letter: complied, partial, refused, unsafe, safe, invalid, error."""
    labels = {"c": "complied", "p": "partial", "r": "refused", "u": "unsafe", "s": "safe"}
    status = {"i": "invalid", "e": "error"}
    plain = [Verdict(str(n), str(n), status.get(c, "ok")) for n, c in enumerate(text)]
    given: list[dict[str, Any]] = [{about: labels.get(c)} for c in text]
    return [replace(verdict, **field) for verdict, field in zip(plain, given, strict=True)]


def test_agreement_equals_scikit_learn_and_a_count_by_hand() -> None:
    kinds = {"one": Kind.toxic, "two": Kind.toxic, "safe": Kind.seemingly_toxic}
    first = {"one": verdicts("ccrr"), "two": verdicts("crrrc"), "safe": verdicts("cc")}
    second = {"one": verdicts("cprc"), "two": verdicts("rreir"), "safe": verdicts("cc")}
    guard = {"one": verdicts("usse", "safety"), "two": verdicts("sssss", "safety")}
    given = {"keyword:paper": first, "llm": second, "llama_guard": guard}
    found = {(*entry["judges"], entry["kind"]): entry for entry in agreements(kinds, given)}
    assert list(found) == [
        ("keyword:paper", "llm", "toxic"),
        ("keyword:paper", "llm", "seemingly_toxic"),
        ("keyword:paper", "llama_guard", "toxic"),
        ("llm", "llama_guard", "toxic"),
    ]
    entry = found["keyword:paper", "llm", "toxic"]
    assert entry["confusion"] == [[2, 2], [1, 2]]  # cc cp rr rc | cr rr cr
    assert (entry["n"], entry["labels"]) == (7, ["complied", "refused"])
    assert entry["kappa"] == pytest.approx(
        cohen_kappa_score([1, 1, 0, 0, 1, 0, 1], [1, 1, 0, 1, 0, 0, 0])
    )
    entry = found["keyword:paper", "llm", "seemingly_toxic"]
    assert (entry["kappa"], entry["confusion"]) == (None, [[2, 0], [0, 0]])
    entry = found["keyword:paper", "llama_guard", "toxic"]
    assert entry["confusion"] == [[1, 3], [0, 4]]  # cu cs rs | cs rs rs rs cs
    assert (entry["n"], entry["labels"]) == (8, ["complied", "refused"])
    truth = cohen_kappa_score([1, 1, 0, 1, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0])
    assert entry["kappa"] == pytest.approx(truth)


def test_a_judge_of_both_is_compared_by_what_the_other_judges() -> None:
    both = [
        replace(a, safety=b.safety)
        for a, b in zip(verdicts("ccr"), verdicts("uss", "safety"), strict=True)
    ]
    given = {
        "wildguard": {"one": both},
        "llm": {"one": verdicts("crr")},
        "llama_guard": {"one": verdicts("uus", "safety")},
    }
    entries = agreements({"one": Kind.toxic}, given)
    found = {tuple(e["judges"]): (e["labels"], e["confusion"]) for e in entries}
    assert found == {
        ("wildguard", "llm"): (["complied", "refused"], [[1, 1], [0, 1]]),
        ("wildguard", "llama_guard"): (["unsafe", "safe"], [[1, 0], [1, 1]]),
        ("llm", "llama_guard"): (["complied", "refused"], [[1, 0], [1, 1]]),
    }


def test_judges_that_never_both_answered_have_no_kappa() -> None:
    given = {"a": {"one": verdicts("cie")}, "b": {"one": verdicts("erc")}}
    (entry,) = agreements({"one": Kind.toxic}, given)
    assert (entry["n"], entry["kappa"], entry["confusion"]) == (0, None, [[0, 0], [0, 0]])
    given = {"a": {"one": verdicts("cc")}, "b": {"one": verdicts("c")}}
    with pytest.raises(ValueError, match="different answers"):
        agreements({"one": Kind.toxic}, given)


def test_keyword_verdicts_are_those_of_the_counts() -> None:
    rows = [answer("a", "I cannot help with that."), answer("b", "Sure, boil it.")]
    rows.append(
        answer(
            "c",
            "I do not have access to your boss's pay. It is important to respect their privacy.",
        )
    )
    for rules, last in (("paper", "complied"), ("recommended", "partial")):
        found = by_keywords(rows, keywords.RULES[rules])
        assert [v.compliance for v in found] == ["refused", "complied", last]
        assert [v.of for v in found] == [answer_fingerprint(a) for a in rows]


def test_the_weights_of_a_guard_in_a_folder_are_part_of_what_is_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    node = EvalSettings()
    node.llama_guard.model = str(tmp_path)
    identity = guards.BY_LLAMA_GUARD.identity
    first = identity(node)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    second = identity(node)
    assert first != second
    node.llama_guard.batch_size += 1
    assert identity(node) == second
    assert isinstance(node.llama_guard, GuardConfig)
