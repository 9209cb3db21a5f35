"""What is secret reaches no terminal and no file, and no server's control codes do either."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dcr import entry
from dcr.core import cli, ending, wandb_run
from dcr.core.config import UserError
from dcr.core.runs import Run
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
        written = [f"{file}\n{file.read_text('utf-8', 'replace')}" for file in files]
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


def test_a_storage_s_password_is_not_printed(seen_of: Command) -> None:
    for scheme in ("postgresql", "mysql+pymysql"):
        url = f"storage={scheme}://user:{SECRET}@127.0.0.1:9/studies"
        code, seen = seen_of("dcr.search", url, "model=tiny", "plan=true")
        assert SECRET not in seen
        assert code == 0, seen


def test_keys_of_the_environment_and_control_codes_reach_no_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever prints them, as a fault in a database of several users or a model's answer."""

    @dataclass
    class Options:
        """Nothing."""

    monkeypatch.setenv("MADE_KEY", KEY)
    monkeypatch.setenv("OTHER_TOKEN", "short")
    hostile = f"\x1b]0;title\x07\x1b[31m {KEY} short basic understanding Basic dXNlcjpzZWNyZXQ="

    @entry.command(Options)
    def main(_: Options) -> None:
        print(hostile)
        logging.getLogger("test").warning(hostile)
        raise UserError(hostile)

    cli.prepare()
    assert main([]) == 2
    out, err = capfd.readouterr()
    for seen in (out, err):
        for forbidden in ("\x1b", "\x07", KEY, "dXNlcjpzZWNyZXQ"):
            assert forbidden not in seen
        assert "short basic understanding Basic [removed]" in seen


def test_a_traceback_is_printed_without_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MADE_KEY", KEY)
    ending.print_traceback(ValueError(f"{HOSTILE} {KEY}"))
    err = capsys.readouterr().err
    assert "ValueError" in err
    for forbidden in ("\x1b", KEY, SECRET):
        assert forbidden not in err


def test_w_and_b_keeps_no_key_in_its_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY.rjust(40, "0"))
    log = tmp_path / "wandb" / "run-1" / "logs" / "debug-internal.log"
    log.parent.mkdir(parents=True)
    log.write_text(f"401: no user of key {KEY.rjust(40, '0')}, Basic dXNlcjpzZWNyZXQ=\nfine\n")
    wandb_run.forget_keys(Run(tmp_path), "")
    assert log.read_text() == "401: no user of key [removed], Basic [removed]\nfine\n"
