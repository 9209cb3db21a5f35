"""The door to OpenAI-compatible servers, against servers that misbehave and one that is real."""

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import _base_client

from dcr.core.config import ConfigError, UserError
from dcr.endpoints import HTTPConfig, ServerConfig, calls, servers
from dcr.endpoints.answers import Failure, Moderation, Reply
from dcr.endpoints.servers import EndpointError
from dcr.judges import LLMJudgeConfig
from tests.servers.faults import FAULTS, Proxy, always, each, faulty, in_turn
from tests.servers.loopback import Answer, as_json
from tests.servers.scripted import completion, last_user, moderated, rejected, scripted
from tests.servers.served import served

ROOT = Path(__file__).parent.parent
KEY = "4f9a2c7d1e-test"  # like no other key, so that only its value can give it away


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A key that must show up nowhere, waits of milliseconds, and no thread left behind."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(calls, "PAUSE", 0.002)
    monkeypatch.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.002)
    yield
    until = time.monotonic() + 500  # only against hangs
    while _threads() and time.monotonic() < until:
        time.sleep(0.01)  # the client's own worker thread ends a moment after its event loop
    assert not _threads()


def _threads() -> list[str]:
    names = ("dcr.endpoints", "loopback", "process_request", "AnyIO")
    return [t.name for t in threading.enumerate() if any(name in t.name for name in names)]


def server(url: str | None, **settings: Any) -> ServerConfig:
    named: dict[str, Any] = {"key": "OPENAI_API_KEY"}
    return ServerConfig(url=url, model="m", **named | settings)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def ask(
    to: ServerConfig, texts: list[str], node: str = "llm", **http: Any
) -> dict[int, Reply | Failure]:
    """Every answer by index; one that comes twice, or not at all, fails here."""
    settings = HTTPConfig(**{"concurrency": 4, "timeout": 60.0, "retries": 3, **http})
    found = list(calls.chats(to, settings, [chat(text) for text in texts], node=node))
    assert Counter(index for index, _ in found) == Counter(range(len(texts)))
    return dict(found)


def echo(body: dict[str, Any]) -> str:
    return f"echo of {last_user(body)}"


def test_replies_come_with_text_tokens_and_log_probabilities() -> None:
    top = [{"m": -0.25, "M": -1.5}]
    with scripted(lambda body: completion(echo(body), top=top, tokens=(11, 1))) as made:
        sent = {"logprobs": True, "top_logprobs": 2, "odd": {"a": [1]}}
        to = server(made.url, parameters=sent | {"max_tokens": None})  # null is left out
        found = ask(to, ["one", "two"])
    for index, text in enumerate(["one", "two"]):
        assert found[index] == Reply(f"echo of {text}", "stop", tuple(top), 11, 1)
    for body in made.bodies:
        assert body == {"model": "m", "messages": body["messages"], **sent}
    assert {request.headers["authorization"] for request in made.requests} == {f"Bearer {KEY}"}
    assert {request.path for request in made.requests} == {"/v1/chat/completions"}


def test_answers_may_lack_usage_and_come_in_parts() -> None:
    parts = {"choices": [{"message": {"content": [{"type": "text", "text": "a"}, {"text": "b"}]}}]}
    with scripted(lambda body: parts) as made:
        assert ask(server(made.url), ["one"]) == {0: Reply("ab", "", None, 0, 0)}


def test_moderations_name_the_categories_that_hold() -> None:
    def verdict(body: dict[str, Any]) -> Any:
        text = last_user(body)
        return {"results": []} if text == "none" else moderated(violence=text == "bad", hate=False)

    with scripted(verdict) as made:
        texts = ["bad", "good", "none"]
        found = dict(calls.moderations(server(made.url), HTTPConfig(), texts, node="moderation"))
    assert found[0] == Moderation(True, ("violence",), "scripted-moderation")
    assert found[1] == Moderation(False, (), "scripted-moderation")
    assert isinstance(found[2], Failure)
    assert found[2].status == "invalid"
    assert sorted(body["input"] for body in made.bodies) == sorted(texts)


PASSING = ["rate_limited", "server_error", "unavailable", "dropped", "half_body", "hang"]
MALFORMED = ["garbage", "html", "half_json", "empty"]


def test_an_answer_that_hangs_is_asked_for_again() -> None:
    texts = [f"question {i}" for i in range(4)]
    with scripted(echo) as made, faulty(made.url, each("hang")) as proxy:
        found = ask(server(proxy.url), texts, timeout=3.0)
    assert {i: a.text for i, a in found.items() if isinstance(a, Reply)} == {
        i: f"echo of {text}" for i, text in enumerate(texts)
    }
    _assert_counts(proxy, injected=4, forwarded=4)


def test_a_server_that_only_drips_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each blank comes in time, so that the client's own time-out would wait for all of them."""
    monkeypatch.setattr(calls, "LONGEST_WAIT", 0.0)

    def drip() -> None:
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not left.wait(0.05):
                connection.sendall(b" ")

    left = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        dripping = threading.Thread(target=drip)
        dripping.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        found = ask(server(url), ["one"], retries=0, timeout=2.0)
        left.set()
        dripping.join()
    assert found == {0: Failure("error", "no whole answer within 2 s")}


def test_every_fault_in_one_run_loses_no_answer_and_repeats_none() -> None:
    kinds = [kind for kind in (*PASSING, *MALFORMED) if kind != "hang"]
    script = [kind for pair in zip(kinds * 3, [None] * 27, strict=True) for kind in pair]
    texts = [f"question {i}" for i in range(30)]
    with scripted(echo) as made, faulty(made.url, in_turn(*script)) as proxy:
        found = ask(server(proxy.url), texts, retries=27)
    assert all(isinstance(answer, Reply) for answer in found.values())
    _assert_counts(proxy, injected=27, forwarded=30)


def _assert_counts(proxy: Proxy, injected: int, forwarded: int) -> None:
    assert proxy.injected.total() == injected
    assert proxy.forwarded.total() == proxy.delivered.total() == forwarded
    assert set(proxy.forwarded.values()) <= {1}  # no paid call twice


@pytest.mark.parametrize("fault", [*PASSING, *MALFORMED])
def test_a_lasting_fault_ends_as_a_failure_after_the_retries(fault: str) -> None:
    with scripted(echo) as made, faulty(made.url, always(fault)) as proxy:
        patience = 0.15 if fault == "hang" else 60.0
        found = ask(server(proxy.url), ["one", "two"], retries=2, timeout=patience)
    for answer in found.values():
        assert isinstance(answer, Failure)
        assert answer.status == ("invalid" if fault in MALFORMED else "error")
        assert answer.reason
    assert set(proxy.injected.values()) == {3}
    assert not made.requests


@pytest.mark.parametrize(
    ("answer", "status", "word"),
    [
        (FAULTS["no_choices"], "invalid", "no choices"),
        (FAULTS["no_content"], "invalid", "no text"),
        (FAULTS["filtered"], "invalid", "content filter"),
        (FAULTS["filtered_prompt"], "invalid", "content filter"),
        (rejected(400, "flagged", code="content_policy_violation"), "invalid", "filter"),
        (rejected(400, "This model's maximum context length is 8"), "invalid", "context"),
        (rejected(400, "too long", code="context_length_exceeded"), "invalid", "too long"),
        (rejected(400, "bad text", param="messages[0].content"), "invalid", "bad text"),
        (rejected(400, "something else"), "error", "HTTP 400: something else"),
        (as_json({"error": {"message": "behind the gateway"}}), "invalid", "behind the gateway"),
        (as_json(["no", "object"]), "invalid", "no choices"),
    ],
)
def test_a_row_without_a_reply_is_told_apart_and_not_asked_again(
    answer: Any, status: str, word: str
) -> None:
    with scripted(lambda body: answer) as made:
        found = ask(server(made.url, parameters={"max_tokens": 4}), ["one"])[0]
    assert isinstance(found, Failure)
    assert found.status == status
    assert word in found.reason
    assert len(made.requests) == 1


def test_a_refusal_in_a_field_of_its_own_is_the_answer() -> None:
    with scripted(lambda body: completion(None, refusal="I will not")) as made:
        (found,) = ask(server(made.url), ["one"]).values()
    assert isinstance(found, Reply)
    assert found.text == "I will not"


def test_half_a_character_in_an_answer_becomes_one_that_can_be_stored() -> None:
    def said(body: dict[str, Any]) -> Any:
        if "input" in body:
            return moderated(**{"half \ud83d": True})
        if last_user(body) == "none":
            return completion(None, refusal="\ud83d")
        return completion("\ud83d\ude00 \ude00", top=[{"\ud83d": -1.0}], finish="\udc00")

    with scripted(said) as made:
        found = ask(server(made.url), ["one", "none"])
        ((_, flagged),) = calls.moderations(
            server(made.url), HTTPConfig(), ["text"], node="moderation"
        )
    assert found[0] == Reply("\U0001f600 \ufffd", "\ufffd", ({"\ufffd": -1.0},), 7, 3)
    assert isinstance(found[1], Reply)
    assert found[1].text == "\ufffd"
    assert isinstance(flagged, Moderation)
    assert flagged.categories == ("half \ufffd",)


def test_text_that_cannot_be_sent_is_a_row_alone() -> None:
    with scripted(echo) as made:
        found = ask(server(made.url), ["half \ud83d", "whole \U0001f600"])
    assert isinstance(found[0], Failure)
    assert found[0].status == "invalid"
    assert found[1] == Reply("echo of whole \U0001f600", "stop", None, 7, 3)


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (FAULTS["unsupported"], "llm.parameters.max_tokens"),
        (rejected(400, "bad", param="temperature"), "llm.parameters.temperature"),
        (rejected(400, "no such thing as top_p here"), "llm.parameters.top_p"),
        (
            as_json({"detail": [{"loc": ["body", "top_p"], "msg": "extra"}]}, 422),
            "llm.parameters.top_p",
        ),
        (as_json({"detail": "Unexpected keys: {'top_p'}"}, 422), "llm.parameters.top_p"),
        (
            rejected(400, "no system", param="messages[0].role", code="unsupported_value"),
            "llm.model=m",
        ),
        (FAULTS["no_quota"], "llm.key=OPENAI_API_KEY"),
        (rejected(402, "Insufficient Balance"), "llm.key=OPENAI_API_KEY"),
        (FAULTS["no_key"], "llm.key=OPENAI_API_KEY"),
        (rejected(403, "not for you"), "llm.model=m"),
        (FAULTS["no_model"], "llm.model=m"),
        (Answer(b"<html>404</html>", 404, kind="text/html"), "llm.url=http://127.0.0.1"),
    ],
)
def test_what_every_request_would_meet_stops_at_once(answer: Answer, named: str) -> None:
    parameters = {"max_tokens": 4, "temperature": 0, "top_p": 1.0}
    texts = [f"q{i}" for i in range(50)]
    with scripted(lambda body: answer) as made, pytest.raises(EndpointError) as caught:
        ask(server(made.url, parameters=parameters), texts, retries=1)
    message = str(caught.value)
    assert named in message
    assert "\n" not in message
    # Those under way when the first answer came; the client asks again after every 429.
    assert len({last_user(body) for body in made.bodies}) <= 4
    assert len(made.requests) <= (8 if answer.status == 429 else 4)
    assert isinstance(caught.value, UserError)
    assert _unchained(caught.value)


@pytest.mark.parametrize("status", [301, 303, 307])
def test_a_redirect_is_not_followed(status: int) -> None:
    with scripted(echo) as elsewhere:
        target = f"{elsewhere.url}/chat/completions"
        moved = Answer(b"", status, {"Location": f"{target}?token=hunter2"})
        with scripted(lambda body: moved) as made, pytest.raises(EndpointError) as caught:
            ask(server(made.url), ["one"])
    assert str(caught.value).startswith(f"llm.url={made.url}: redirects to {target}?[removed]")
    assert (len(made.requests), len(elsewhere.requests)) == (1, 0)


def _unchained(error: BaseException) -> bool:
    """Nothing of the client's, which holds the request with its key, hangs on the exception."""
    return error.__cause__ is None and error.__context__ is None


def test_the_endpoint_node_has_its_own_spelling() -> None:
    with (
        scripted(lambda body: FAULTS["no_model"]) as made,
        pytest.raises(EndpointError, match=r"^endpoint_model=m:"),
    ):
        ask(server(made.url), ["one"], node="endpoint")


def test_answers_under_way_are_handed_over_before_the_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The key ends while two paid answers are on their way and one request waits long to retry."""
    monkeypatch.setattr(_base_client, "INITIAL_RETRY_DELAY", 1000.0)
    monkeypatch.setattr(_base_client, "MAX_RETRY_DELAY", 1000.0)
    first = threading.Barrier(4)

    def reply(body: dict[str, Any]) -> Any:
        text = last_user(body)
        if text != "later":
            first.wait(500)
        if text == "broke":
            return FAULTS["no_key"]
        if text == "limited":
            return rejected(429, "slow down")
        time.sleep(0.2)
        return echo(body)

    texts = ["paid", "broke", "limited", "paid too", "later"]
    taken: list[int] = []
    with scripted(reply) as made:
        settings = HTTPConfig(concurrency=4, timeout=5, retries=50)
        arriving = calls.chats(server(made.url), settings, [chat(t) for t in texts], node="llm")
        with pytest.raises(EndpointError, match="does not take this key"):
            taken.extend(index for index, _ in arriving)
    assert sorted(taken) == [0, 3]
    assert sorted(last_user(body) for body in made.bodies) == sorted(texts[:4])


def test_no_more_requests_at_once_than_allowed() -> None:
    lock, under_way, most = threading.Lock(), 0, 0

    def reply(body: dict[str, Any]) -> str:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.02)
        with lock:
            under_way -= 1
        return "done"

    with scripted(reply) as made:
        ask(server(made.url), [f"q{i}" for i in range(12)], concurrency=3)
    assert most == 3


def test_answers_not_taken_hold_new_requests_back() -> None:
    """Killed while it stores one answer, a caller loses those under way and no more."""
    with scripted(echo) as made:
        settings = HTTPConfig(concurrency=3, timeout=60)
        arriving = calls.chats(
            server(made.url), settings, [chat(f"q{i}") for i in range(20)], node="llm"
        )
        for taken in range(3):
            next(arriving)
            assert settled(made.requests, 3 + taken) == 3 + taken
        arriving.close()


def settled(requests: list[Any], expected: int) -> int:
    """How many requests there are a while after the one expected last has come."""
    until = time.monotonic() + 500
    while len(requests) < expected and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    return len(requests)


def test_closing_early_ends_what_waits_and_what_hangs() -> None:
    def reply(body: dict[str, Any]) -> Any:
        return FAULTS["hang"] if last_user(body) == "hang" else echo(body)

    with scripted(reply) as made:
        settings = HTTPConfig(concurrency=2, timeout=60)
        texts = ["hang", *(f"q{i}" for i in range(50))]
        arriving = calls.chats(server(made.url), settings, [chat(t) for t in texts], node="llm")
        next(arriving)
        started = time.monotonic()
        arriving.close()
        assert time.monotonic() - started < 10  # the server would answer after 30 s
        assert "dcr.endpoints" not in [thread.name for thread in threading.enumerate()]
        asked = len(made.requests)
        time.sleep(0.1)
        assert len(made.requests) == asked <= 4


def test_a_server_that_is_not_there_ends_in_errors_soon() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    found = ask(server(url), [f"q{i}" for i in range(200)], retries=1)
    reasons = [answer.reason for answer in found.values() if isinstance(answer, Failure)]
    assert len(reasons) == 200
    assert {a.status for a in found.values() if isinstance(a, Failure)} == {"error"}
    assert 8 <= sum("connection failed" in reason for reason in reasons) <= 12
    assert sum("not asked" in reason for reason in reasons) >= 188


def test_an_outage_in_the_middle_costs_only_its_own_rows() -> None:
    """Six rows fail through all retries; with the bound at eight in a row the run goes on."""

    def reply(body: dict[str, Any]) -> Any:
        number = int(last_user(body))
        return FAULTS["server_error"] if 10 <= number < 16 else "done"

    with scripted(reply) as made:
        found = ask(server(made.url), [str(i) for i in range(30)], retries=1)
    assert {i for i, a in found.items() if isinstance(a, Failure)} == set(range(10, 16))


def test_openais_key_goes_to_no_other_server_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with scripted(lambda body: rejected(401, "no key")) as made:
        to = ServerConfig(url=made.url, model="m")
        assert servers.key_of(to) == ""
        with pytest.raises(EndpointError, match=r"^llm\.key=null: .* wants a key"):
            list(calls.chats(to, HTTPConfig(retries=0), [chat("one")], node="llm"))
    assert servers.key_of(ServerConfig(model="m")) == KEY  # OpenAI's own


@pytest.mark.parametrize("key", [KEY, "openai_api_key", "1KEY", "MY-KEY", "", "A\nB"])
def test_a_key_in_the_place_of_its_variable_is_refused_unseen(key: str) -> None:
    with pytest.raises(ConfigError, match=r"^llm\.key: not a name") as caught:
        servers.check(server("http://127.0.0.1:1/v1", key=key), "llm")
    assert key == "" or key not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("ftp://host/v1", True),
        ("localhost:8000/v1", True),
        ("http://", True),
        ("http://host:port/v1", True),
        ("http://ho st/v1", True),
        ("https://user:hunter2@host/v1", False),
        ("https://hunter2@host/v1", False),
        ("https://host/v1?api-key=hunter2", False),
        ("https://host/v1#hunter2", False),
        ("nohost?hunter2", False),
    ],
)
def test_an_address_that_cannot_be_is_refused(url: str, shown: bool) -> None:
    with pytest.raises(ConfigError, match=r"^llm\.url") as caught:
        servers.check(server(url), "llm")
    assert (url in str(caught.value)) == shown
    assert "hunter2" not in str(caught.value)


def test_a_key_is_needed_for_openai_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    servers.check(LLMJudgeConfig(), "llm")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(EndpointError, match=r"llm\.key=OPENAI_API_KEY: .* is unset; export it"):
        servers.check(LLMJudgeConfig(), "llm")
    with scripted(echo) as made:
        servers.check(server(made.url), "llm")
        assert isinstance(ask(server(made.url), ["one"])[0], Reply)
    assert made.requests[0].headers["authorization"] == "Bearer none"


def test_the_end_of_the_line_is_no_part_of_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_KEY", f"{KEY}\n")
    with scripted(echo) as made:
        ask(server(made.url, key="OTHER_KEY"), ["one"])
    assert made.requests[0].headers["authorization"] == f"Bearer {KEY}"
    monkeypatch.setenv("OTHER_KEY", "two words")
    with pytest.raises(EndpointError, match="OTHER_KEY: this environment") as caught:
        servers.check(server(None, key="OTHER_KEY"), "llm")
    assert "two words" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", "x"), ("stream", True), ("api_key", KEY), ("temperature", float("nan"))],
)
def test_parameters_that_cannot_be_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^llm\.parameters\.{name}") as caught:
        servers.check(server("http://h/v1", parameters={name: value}), "llm")
    assert KEY not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^llm\.model: empty"):
        servers.check(ServerConfig(url="http://h/v1", model=" "), "llm")


def test_nothing_is_asked_for_no_rows() -> None:
    assert ask(server("http://127.0.0.1:1/v1"), []) == {}


@pytest.mark.slow
def test_transformers_serve_answers(tiny_folder: Path) -> None:
    with served(tiny_folder) as url:
        to = ServerConfig(url=url, model=str(tiny_folder), parameters={"max_tokens": 4})
        found = ask(to, ["one", "two"], concurrency=2, timeout=60.0)
    for reply in found.values():
        assert isinstance(reply, Reply)
        assert reply.prompt_tokens > 0
        assert reply.completion_tokens <= 4
