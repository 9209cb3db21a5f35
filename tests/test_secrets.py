"""What is secret reaches no terminal and no file, and no server's control codes do either."""

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from tests.servers.loopback import Answer, as_json
from tests.servers.scripted import Body, rejected, scripted

ROOT = Path(__file__).parent.parent
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
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """`command("eval.py", "endpoint=…")`: its exit code, and all it said and wrote."""

    def call(script: str, *arguments: str) -> tuple[int, str]:
        GlobalHydra.instance().clear()
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *arguments])
        code = 0
        try:
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                monkeypatch.delitem(sys.modules, script, raising=False)  # or it warns
                runpy.run_module(script, run_name="__main__")
        except SystemExit as ended:
            code = int(ended.code or 0)
        files = [file for file in sorted(tmp_path.rglob("*")) if file.is_file()]
        written = [f"{file}\n{file.read_text('utf-8')}" for file in files]
        return code, "\n".join([*capfd.readouterr(), *written])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MADE_KEY", KEY)
    for name in ("DCR_SWEEP", "HYDRA_FULL_ERROR"):  # set by the command, gone with the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield call
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


def augmenting(address: str) -> tuple[str, ...]:
    return ("source=demo_seemingly_toxic", "out=out.jsonl", f"endpoint={address}")


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_with_a_secret_is_refused_unseen(command: Command, address: str) -> None:
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
        code, seen = command(*given)
        assert code != 0, given
        assert "error: " in seen or "-m" in given, given
        assert SECRET not in seen, given


HOSTILE = f"\x1b[31m\x9b1m{KEY} \x07\x1b]0;title\x07Bearer {SECRET} http://u:{SECRET}@h/?k={SECRET}"


@pytest.mark.parametrize("status", [200, 400, 401, 404, 500, 308])
def test_what_a_server_says_is_printed_and_stored_without_secrets_and_control_codes(
    command: Command, status: int
) -> None:
    def reply(body: Body) -> Answer:
        if status == 200:
            return as_json({"error": {"message": HOSTILE}})
        if status == 308:
            return Answer(b"", 308, {"Location": f"http://u:{SECRET}@127.0.0.1:9/v1?k={SECRET}"})
        return rejected(status, HOSTILE, code=HOSTILE, param=HOSTILE)

    with scripted(reply) as server:
        given = ("endpoint_model=m", "endpoint_key=MADE_KEY", *ALONE)
        evaluated = command("eval.py", f"endpoint={server.url}", *ASKED, "endpoint_key=MADE_KEY")
        judged = command(
            *("eval.py", "model=tiny", "tasks=[safety]", "limit=2", "judge=[llm]"),
            *(f"llm.url={server.url}", "llm.key=MADE_KEY", "llm.model=j", *ALONE),
            *("gen.max_new_tokens=2", "trainer.accelerator=cpu"),
        )
        written = command("dcr.augment", *augmenting(server.url), "count=2", *given)
    for _, seen in (evaluated, judged, written):
        assert SECRET not in seen
        assert not {c for c in seen if c < " " or "\x7f" <= c < "\xa0"} - set("\n\t\r")
    for code, seen in (judged, written):
        assert code != 0 or status == 200, seen  # invalid answers are counted
