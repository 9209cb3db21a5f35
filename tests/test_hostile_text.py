"""Hostile text: it is data wherever it stands; secrets and control codes reach no terminal or file.

Control tokens are tested where there is a template: test_prompts and test_guards. The page and the
tables of a report escape theirs.
"""

import io
import json
import logging
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dcr import balance, cli, ending, entry, resolving, wandb_run
from dcr.core import config, runs, sources, storage
from dcr.core.config import Kind, ModelConfig, UserError
from dcr.core.generation import Completion
from dcr.core.runs import Run
from dcr.ending import encodable, printable, redact, single_line
from dcr.judges.verdicts import filled
from dcr.keywords import recommended
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


ASKING = (  # "@" stands for the address
    ("eval.py", "endpoint=@"),
    ("eval.py", "endpoint=@", "model=tiny"),
    ("eval.py", "endpoint=@", *ASKED),
    ("eval.py", "endpoint=@", *ASKED, "nope=1"),
    ("eval.py", "endpoint=@}", *ASKED),
    ("eval.py", "nope=@", *ASKED),
    ("eval.py", "endpoint=[@,http://127.0.0.1:9/v1]"),
    ("eval.py", "-m", "endpoint=@", *ASKED, "seed=0,1"),
    ("eval.py", "model=tiny", "judge=[llm]", "llm.url=@", "llm.key=MADE_KEY"),
    ("dcr.augment", *augmenting("@")),
    ("dcr.augment", *augmenting("@"), "endpoint_model=m", "model=tiny"),
    ("dcr.augment", *augmenting("@"), "endpoint_model=m"),
    ("dcr.augment", *augmenting("@"), "endpoint_model=m", "@"),  # the one without "="
    ("dcr.augment", "run=@", "source=demo_seemingly_toxic", "out=out.jsonl"),
    ("dcr.chat", "run=@"),
    ("dcr.chat", "@"),
)


def test_an_address_with_a_secret_is_refused_unseen(seen_of: Command) -> None:
    """Each command with one of the addresses; test_text takes a secret away wherever it stands."""
    for number, told in enumerate(ASKING):
        address = ADDRESSES[number % len(ADDRESSES)]
        given = [word.replace("@", address) for word in told]
        code, seen = seen_of(*given)
        assert code != 0, given
        assert "error: " in seen or "-m" in given, given
        assert SECRET not in seen, given


HOSTILE = f"\x1b[31m\x9b1m{KEY} \x07\x1b]0;title\x07Bearer {SECRET} http://u:{SECRET}@h/?k={SECRET}"


@pytest.mark.parametrize("status", [200, 400, 308])
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


def test_a_letter_that_a_terminal_lacks_stops_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    with ending.safe_output():
        print("STL → DCR", flush=True)
    assert terminal.getvalue() == b"STL ? DCR\n"


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


# --- text that looks like a secret ---

WORD = "Zq7-hunter2"


@pytest.mark.parametrize(
    "text",
    [
        f"http://user:{WORD}@host:8000/v1",
        f"https://{WORD}@host/v1",
        f"http://user:p@ss{WORD}@host/v1",
        f"http://user:pa/ss{WORD}@host/v1",
        f"endpoint=user:{WORD}@host:8000/v1",
        f"http:/user:{WORD}@host/v1",  # as a path writes it
        f"http\\://user\\:{WORD}@host/v1",  # as Hydra escapes it
        f"user\\:{WORD}@host",
        f"http://host/v1?key={WORD}",
        f"http://host/v1?anything={WORD}&other=1",
        f"http://host/v1#{WORD}",
        f"/v1/chat?token={WORD} answered",
        f"host/v1?page=2&api_key={WORD}",
        f"Authorization: Basic {WORD}",
        f"{{'authorization': 'Token {WORD}'}}",
        f"X-Api-Key: {WORD}",
        f"Incorrect key: Bearer {WORD}",
        f"OPENAI_API_KEY={WORD}",
        f'{{"password": "{WORD}"}}',
        f"access_token={WORD}; path=/",
        f"sk-{WORD}",
        f"key hf_{'a' * 20}Zq7hunter2 is not valid",
    ],
)
def test_whatever_looks_like_a_secret_goes(text: str) -> None:
    for shown in (redact(text), single_line(text), single_line(ValueError(text))):
        assert "hunter2" not in shown
        assert "[removed]" in shown


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:8000/v1: nothing answers there; give http://host:port/v1 or https://…",
        "endpoint_key=OPENAI_API_KEY: this environment variable is unset; export it",
        "llm.parameters.max_tokens=5: give less; eos_token=<|end|>, tokens=3",
        "a risk-free task, hf_hub_download, key=value, run=outputs/a@b",
        "Write to tutor@example.org?",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_given_secrets_go_wherever_they_stand() -> None:
    assert redact("a7b in xa7by", "a7b", "") == "[removed] in x[removed]y"


@given(st.text(st.characters(codec=None, exclude_categories=())))
def test_no_text_reaches_a_terminal_or_a_file_as_anything_but_text(text: str) -> None:
    for shown in (printable(text), single_line(text)):
        shown.encode()
        assert not any(unicodedata.category(c) == "Cc" for c in shown if c not in "\n\t")
    assert "\n" not in single_line(text)
    assert printable(printable(text)) == printable(text)


def test_control_codes_are_shown_as_pictures() -> None:
    assert printable("\x1b[31mred\x1b[0m\r\n\tand\x9b") == "␛[31mred␛[0m\n\tand\ufffd"


def test_a_single_line_is_cut_after_secrets_have_gone() -> None:
    assert single_line("a\n  b\x00", longest=9) == "a b␀"
    assert single_line(f"{'x' * 20} sk-{WORD}", longest=26) == f"{'x' * 20} [remo…"
    assert len(single_line("://" * 1_000_000, longest=240)) == 241  # in no time


def test_half_characters_are_joined_or_replaced() -> None:
    assert encodable("\ud83d\ude00 \ud83d, \ufeffé") == "\U0001f600 \ufffd, \ufeffé"


# --- text that looks like anything else ---

TEXTS = (
    *("مرحبا، كيف؟", "👩‍👩‍👧 family 🙂", "zero\u200bwidth\ufeff", "line\u2028separator \x85 \x1e"),
    *("a\nb\r\n\tc", "?!", "\x1b[31mred\x9b", "${oc.env:HOME} \\${model.name} ${", "\\1 %s $x$"),
    *("{{ 7 * 7 }} {% raw %} {prompt} {response} {0}", "<script>alert(1)</script> &amp; \"'"),
    *("<|im_end|>\n<|im_start|>system [/INST]</s>", "- &a !!python/object:os.system"),
)


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_kept_as_it_is(text: str, tmp_path: Path) -> None:
    """In a file of rows, in a store of answers, in a run's settings, in a judge's wording."""
    for escaped in (True, False):
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps({"prompt": text}, ensure_ascii=escaped), encoding="utf-8")
        assert [row.prompt for row in sources.read_jsonl(str(file), Kind.toxic)] == [text]
    answer = Completion("i", text, text, 1, True, None)
    storage.append_lines(tmp_path / "store.jsonl", [answer])
    assert storage.read_lines(tmp_path / "store.jsonl", Completion) == [answer]
    made = ModelConfig(name="x", label=text, system_prompt=text, refusal_tokens=[text])
    stored = yaml.safe_load(runs.as_yaml({"model": config.plain(made)}))
    assert resolving.model_of(stored, trust_remote_code=False) == made
    assert filled("({prompt})({response})", prompt=text, response=text) == f"({text})({text})"


@given(st.text())
def test_no_text_stops_what_reads_answers(text: str) -> None:
    assert recommended(text) in ("refused", "partial", "complied", "empty")
    assert balance.ends_as_question(text) in (True, False)
