"""What is secret reaches no terminal and no file, and no server's control codes do either."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.servers.loopback import Answer, as_json
from tests.servers.scripted import Body, rejected, scripted

SECRET = "hunter2"
KEY = "Zq7-hunter2-0a"  # in the environment, so that only its value can give it away
ADDRESSES = (
    f"http://user:{SECRET}@127.0.0.1:9/v1",
    f"http://127.0.0.1:9/v1?key={SECRET}",
    f"user:{SECRET}@127.0.0.1:9",
)
ALONE = ("http.retries=0", "wandb.mode=disabled")
ASKED = ("endpoint_model=m", "tasks=[over_refusal]", "limit=2", *ALONE)

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def seen_of(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    """`seen_of("eval.py", "endpoint=…")`: its exit code, and all it said and wrote."""

    def call(script: str, *arguments: str) -> tuple[int, str]:
        ended = command(script, *arguments)
        files = [file for file in sorted(tmp_path.rglob("*")) if file.is_file()]
        written = [f"{file}\n{file.read_text('utf-8')}" for file in files]
        return ended.code, "\n".join([ended.out, ended.err, *written])

    monkeypatch.setenv("MADE_KEY", KEY)
    return call


def augmenting(address: str) -> tuple[str, ...]:
    return ("source=demo_seemingly_toxic", "out=out.jsonl", f"endpoint={address}")


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_with_a_secret_is_refused_unseen(seen_of: Command, address: str) -> None:
    for given in (
        ("eval.py", f"endpoint={address}"),
        ("eval.py", f"endpoint={address}", "model=tiny"),
        ("eval.py", f"endpoint={address}", *ASKED),
        ("eval.py", f"endpoint={address}", *ASKED, "nope=1"),
        ("eval.py", f"endpoint={address}}}", *ASKED),
        ("eval.py", f"nope={address}", *ASKED),
        ("eval.py", "-m", f"endpoint={address}", *ASKED, "seed=0,1"),
        ("eval.py", "model=tiny", "judge=[llm]", f"llm.url={address}", "llm.key=MADE_KEY"),
        ("dcr.augment", *augmenting(address)),
        ("dcr.augment", *augmenting(address), "endpoint_model=m", "model=tiny"),
        ("dcr.augment", *augmenting(address), "endpoint_model=m"),
        ("dcr.augment", *augmenting(address), "endpoint_model=m", address.replace("=", "")),
        ("dcr.augment", f"run={address}", "source=demo_seemingly_toxic", "out=out.jsonl"),
        ("dcr.chat", f"run={address}"),
        ("dcr.chat", address),
    ):
        code, seen = seen_of(*given)
        assert code != 0, given
        assert "error: " in seen or "-m" in given, given
        assert SECRET not in seen, given


HOSTILE = f"\x1b[31m\x9b1m{KEY} \x07\x1b]0;title\x07Bearer {SECRET} http://u:{SECRET}@h/?k={SECRET}"


@pytest.mark.parametrize("status", [200, 400, 401, 404, 500, 308])
def test_what_a_server_says_is_printed_and_stored_without_secrets_and_control_codes(
    seen_of: Command, status: int
) -> None:
    def reply(body: Body) -> Answer:
        if status == 200:
            return as_json({"error": {"message": HOSTILE}})
        if status == 308:
            return Answer(b"", 308, {"Location": f"http://u:{SECRET}@127.0.0.1:9/v1?k={SECRET}"})
        return rejected(status, HOSTILE, code=HOSTILE, param=HOSTILE)

    with scripted(reply) as server:
        given = ("endpoint_model=m", "endpoint_key=MADE_KEY", *ALONE)
        evaluated = seen_of("eval.py", f"endpoint={server.url}", *ASKED, "endpoint_key=MADE_KEY")
        judged = seen_of(
            *("eval.py", "model=tiny", "tasks=[safety]", "limit=2", "judge=[llm]"),
            *(f"llm.url={server.url}", "llm.key=MADE_KEY", "llm.model=j", *ALONE),
            *("gen.max_new_tokens=2", "trainer.accelerator=cpu"),
        )
        written = seen_of("dcr.augment", *augmenting(server.url), "count=2", *given)
    for _, seen in (evaluated, judged, written):
        assert SECRET not in seen
        assert not {c for c in seen if c < " " or "\x7f" <= c < "\xa0"} - set("\n\t\r")
    for code, seen in (judged, written):
        assert code != 0 or status == 200, seen  # invalid answers are counted
