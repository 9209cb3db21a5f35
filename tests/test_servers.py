"""Several servers of one model: who is asked what, when some are slow or die, and what is stored.

The truth is one server that does all the work, and for discernment the same weights at home.
"""

import json
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dcr import augment, endpoints, refusal
from dcr import eval as eval_entry
from dcr.config import ConfigError, HTTPConfig, ServerConfig, UserError
from dcr.endpoints import EndpointError, Failure, Reply, calls
from dcr.refusal.phrases import FIRST_WORDS
from dcr.report import __main__ as report
from dcr.results import schema
from dcr.runs import Run
from tests import forked
from tests.servers.faults import FAULTS
from tests.servers.logprobs import logprobs
from tests.servers.scripted import Body, Scripted, completion, last_user, rejected, scripted
from tests.servers.served import served
from tests.test_eval import metrics_of, resolved

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "FIRST_WAIT", 0.002)


def chats(urls: Sequence[str], texts: Sequence[str], **http: Any) -> dict[int, Reply | Failure]:
    """Every answer by index; one that comes twice, or not at all, fails here."""
    settings = HTTPConfig(**{"concurrency": 2, "timeout": 60.0, "retries": 2, **http})
    asked = [[{"role": "user", "content": text}] for text in texts]
    to = ServerConfig(url=list(urls), model="m")
    found = list(endpoints.chats(to, settings, asked, node="llm"))
    assert Counter(index for index, _ in found) == Counter(range(len(texts)))
    return dict(found)


def echo(body: Body) -> str:
    return f"echo of {last_user(body)}"


QUESTIONS = [f"question {i}" for i in range(24)]
ECHOES = {i: f"echo of {text}" for i, text in enumerate(QUESTIONS)}


def said(found: dict[int, Reply | Failure]) -> dict[int, str]:
    return {i: answer.text for i, answer in found.items() if isinstance(answer, Reply)}


# --- who is asked what ----------------------------------------------------------------------------


@pytest.mark.parametrize("servers", [1, 2])
def test_equal_servers_take_equal_parts_and_twice_as_much_at_once(servers: int) -> None:
    """Whoever is under way waits for all others: rounds of two requests to each server."""
    together, rounds = threading.Barrier(2 * servers), Counter[int]()

    def reply(body: Body) -> str:
        rounds[together.wait(10)] += 1
        return echo(body)

    with ExitStack() as stack:
        made = [stack.enter_context(scripted(reply)) for _ in range(servers)]
        found = chats([one.url for one in made], QUESTIONS)
    assert said(found) == ECHOES
    assert {len(one.requests) for one in made} == {24 // servers}
    assert rounds[0] == 12 // servers  # so two servers with latency need half as long as one


def test_a_slow_server_takes_fewer_requests() -> None:
    enough = threading.Event()

    def slow(body: Body) -> str:
        enough.wait(500)
        return echo(body)

    def fast(body: Body) -> str:
        if len(quick.requests) >= 20:
            enough.set()
        return echo(body)

    with scripted(slow) as other, scripted(fast) as quick:
        assert said(chats([other.url, quick.url], QUESTIONS)) == ECHOES
    assert 2 <= len(other.requests) <= 4
    assert len(other.requests) + len(quick.requests) == 24


@pytest.mark.parametrize("fault", ["refused", "server_error", "unavailable", "hang", "html"])
def test_a_server_that_dies_half_way_loses_nothing_and_nothing_is_paid_twice(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    answered = Counter[str]()
    dead = threading.Event()

    def healthy(body: Body) -> str:
        if len(fit.requests) > 8:
            dead.wait(10)  # there is enough left for the other one to fail at
        answered[last_user(body)] += 1
        return echo(body)

    def dying(body: Body) -> Any:
        if answered.total() and len(sick.requests) > 5:
            dead.set()
            return FAULTS["dropped" if fault == "refused" else fault]
        answered[last_user(body)] += 1
        return echo(body)

    with scripted(healthy) as fit, ExitStack() as stack:
        sick = stack.enter_context(scripted(dying))
        if fault == "refused":  # the process is gone, and with it its port

            def closing() -> None:
                dead.wait(10)
                stack.close()

            threading.Thread(target=closing, name="closing").start()
        found = chats([sick.url, fit.url], QUESTIONS, timeout=0.3)
    assert said(found) == ECHOES
    assert set(answered.values()) == {1}
    aside = [line for line in caplog.messages if "is put aside" in line]
    assert len(aside) == len(caplog.messages) == 1
    assert sick.url in aside[0]


def test_a_server_comes_back_once_a_request_is_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    back = threading.Event()

    def healthy(body: Body) -> str:
        if len(fit.requests) > 4:
            back.wait(10)
        return echo(body)

    def restarted(body: Body) -> Any:
        if len(sick.requests) <= 12:
            return FAULTS["unavailable"]
        back.set()
        return echo(body)

    with scripted(healthy) as fit, scripted(restarted) as sick:
        assert said(chats([sick.url, fit.url], QUESTIONS)) == ECHOES
    first, last = caplog.messages
    assert first.startswith(f"llm: {sick.url} is put aside (HTTP 503")
    assert last == f"llm: {sick.url} answers again"


def test_one_poisoned_request_is_lost_alone() -> None:
    """Each server fails at it after all retries, and answers everything else."""
    poisoned = Counter[str]()

    def reply(body: Body) -> Any:
        poisoned[last_user(body)] += 1
        return FAULTS["server_error"] if last_user(body) == "question 3" else echo(body)

    with scripted(reply) as one, scripted(reply) as two:
        found = chats([one.url, two.url], QUESTIONS)
    assert {i for i, answer in found.items() if isinstance(answer, Failure)} == {3}
    assert set(poisoned.values()) == {1, poisoned["question 3"]}
    assert poisoned["question 3"] >= 2 * 3


def test_where_all_die_the_rest_is_not_asked(caplog: pytest.LogCaptureFixture) -> None:
    made: list[Scripted] = []

    def reply(body: Body) -> Any:
        return echo(body) if sum(len(m.requests) for m in made) <= 6 else FAULTS["unavailable"]

    with scripted(reply) as one, scripted(reply) as two:
        made += [one, two]
        found = chats([one.url, two.url], QUESTIONS)
    lost = [answer for answer in found.values() if isinstance(answer, Failure)]
    assert len(lost) == 18
    assert {answer.status for answer in lost} == {"error"}
    assert any("not asked" in answer.reason for answer in lost)
    assert sum("is put aside" in line for line in caplog.messages) == 1


def test_what_no_server_would_take_ends_all() -> None:
    def no_key(body: Body) -> Any:
        return FAULTS["no_key"]

    with scripted(echo) as one, scripted(no_key) as two:
        with pytest.raises(EndpointError) as caught:
            chats([one.url, two.url], QUESTIONS)
        assert str(caught.value).startswith(f"llm.key=null: {two.url} wants a key")


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ([], r"^llm\.url=\[\]: name at least one server"),
        (["http://h/v1", None], r"^llm\.url: None is no address"),
        ({"a": 1}, r"^llm\.url: \{'a': 1\} is no address"),
        (["http://h/v1", "http://h/v1/"], r"^llm\.url: http://h/v1 stands there twice"),
        (["http://h/v1", "ftp://h"], r"^llm\.url=ftp://h: not an address"),
    ],
)
def test_addresses_that_cannot_be_are_refused(url: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        endpoints.check(ServerConfig(url=url, model="m"), "llm")


def test_all_servers_that_list_their_models_must_serve_this_one() -> None:
    with scripted(echo, ["m", "x"]) as one, scripted(echo, ["y"]) as two, scripted(echo) as three:
        for fine in ([one.url], [one.url, three.url], [two.url, three.url]):
            endpoints.check_served(ServerConfig(url=fine, model="m"), "llm")
        with pytest.raises(EndpointError) as caught:
            endpoints.check_served(ServerConfig(url=[one.url, two.url], model="m"), "llm")
    assert f"llm.model=m: {two.url} does not serve it, but y; " in str(caught.value)
    assert not [*one.requests, *two.requests, *three.requests]


# --- the store ------------------------------------------------------------------------------------


def evaluation(urls: Sequence[str], output: Path, *more: str) -> tuple[Any, Run]:
    return resolved(
        *(f"endpoint=[{','.join(urls)}]", "endpoint_model=there", f"output={output}"),
        *("data=demo", "limit=6", "http.retries=1", "http.concurrency=2", "wandb.mode=disabled"),
        *("tasks=[over_refusal,safety]", "judge=[keyword,llm]", *more),
    )


def judging(body: Body) -> str:
    return "1_full_compliance"


def stored(run: Run) -> dict[str, bytes]:
    files = sorted(run.folder.glob("eval/*/**/*.jsonl"))
    return {f"{f.parent.name.split('-')[0]}/{f.name}": f.read_bytes() for f in files}


def test_two_servers_of_which_one_dies_leave_what_one_leaves(tmp_path: Path) -> None:
    def dying(body: Body) -> Any:
        return echo(body) if len(sick.requests) <= 2 else FAULTS["unavailable"]

    judged = Counter[str]()

    def judge(body: Body) -> str:
        judged[last_user(body)] += 1
        return judging(body)

    def no_judge(body: Body) -> Any:
        return FAULTS["server_error"]

    with scripted(echo) as fit, scripted(judging) as judges:
        one = evaluation([fit.url], tmp_path / "one", f"llm.url={judges.url}")
        eval_entry.evaluate(*one)
    with (
        scripted(echo) as fit,
        scripted(dying) as sick,
        scripted(judge) as judges,
        scripted(no_judge) as broken,
    ):
        urls = f"llm.url=[{broken.url},{judges.url}]"
        two = evaluation([sick.url, fit.url], tmp_path / "two", urls)
        eval_entry.evaluate(*two)
        asked = len(fit.requests), len(sick.requests), len(judges.requests)
        eval_entry.evaluate(*two)  # all is there
        assert asked == (len(fit.requests), len(sick.requests), len(judges.requests))
    assert stored(one[1]) == stored(two[1])
    assert len(stored(two[1])) == 4
    assert set(judged.values()) == {1}
    (alone,), (shared,) = metrics_of(one[1]), metrics_of(two[1])
    for key in ("sets", "usage", "agreement"):
        assert alone[key] == shared[key]
    took = schema.Metrics.model_validate(shared).servers
    assert took["endpoint"].keys() == {sick.url, fit.url}
    for url, made in ((sick.url, sick), (fit.url, fit)):
        assert took["endpoint"][url].requests == len(made.requests)
    answered = [of for by in took.values() for of in by.values()]
    assert sum(of.requests - of.failures for of in answered) == 24
    assert sum(of.prompt_tokens for of in answered) == 24 * 7
    assert took["endpoint"][sick.url].failures == len(sick.requests) - 2
    assert took["llm"][broken.url].failures == len(broken.requests) > 0


def test_killed_and_given_again_with_one_server_less_it_asks_nothing_twice(
    tmp_path: Path,
) -> None:
    def slowly(body: Body) -> str:
        time.sleep(0.05)
        return echo(body)

    with scripted(echo) as fit:
        whole = evaluation([fit.url], tmp_path / "whole", "judge=[keyword]")
        eval_entry.evaluate(*whole)
    with scripted(slowly) as one, scripted(slowly) as two:
        run = Run(tmp_path / "killed")
        settings, _ = evaluation([one.url, two.url], run.folder, "judge=[keyword]")

        def lines() -> list[str]:
            return [
                json.loads(line)["prompt"]
                for file in run.folder.glob("eval/*/*.jsonl")
                for line in file.read_text().splitlines()
                if line.endswith("}")
            ]

        forked.killed(lambda: eval_entry.evaluate(settings, run), lambda: len(lines()) >= 4)
        before, first = set(lines()), len(one.requests) + len(two.requests)
        again, _ = evaluation([one.url], run.folder, "judge=[keyword]")
        eval_entry.evaluate(again, run)
        asked = [last_user(body) for body in (one.bodies + two.bodies)]
    assert 4 <= len(before) < 12
    assert first - len(before) <= 2 * 2  # under way at both when it was killed
    assert Counter(asked[first:]) - Counter(asked) == Counter()
    assert all(asked.count(prompt) == 1 for prompt in before)
    assert stored(run) == stored(whole[1])


def test_where_all_die_what_is_stored_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def dying(body: Body) -> Any:
        return echo(body) if len(one.requests) <= 3 else rejected(500, "out of order")

    with scripted(dying) as one, scripted(lambda _: rejected(500, "out of order")) as two:
        settings, run = evaluation([one.url, two.url], tmp_path / "run", "judge=[keyword]")
        eval_entry.evaluate(settings, run)
    (found,) = metrics_of(run)
    assert sum(counts["n"] for counts in found["sets"].values()) == 3
    assert "9 of 12 prompts without an answer" in caplog.text
    with scripted(lambda _: rejected(500, "out of order")) as two:
        urls = [two.url, two.url.replace("127.0.0.1", "localhost")]
        settings, run = evaluation(urls, tmp_path / "none", "judge=[keyword]")
        with pytest.raises(UserError, match="none of 12 prompts was answered"):
            eval_entry.evaluate(settings, run)
    assert not run.folder.exists()


# --- discernment ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("likeliest", "mass", "margin", "unseen"),
    [
        ({"I": 0.5, "Sure": 0.3, "Sorry": 0.1}, 0.6, math.log(5 / 3), 0.1),  # what is left
        ({"I": 0.5, "Sure": 0.3, "Here": 0.01}, 0.5, math.log(5 / 3), 0.06),  # six others
        ({"Sure": 0.7, "Here": 0.2}, 0.0, math.log(2 / 7), 0.1),
        ({" I": 0.5, "I": 0.1, "Sure": 0.4}, 0.5, math.log(5 / 4), 0.0),  # either spelling
        ({"▁I": 0.5, "In": 0.2, "Is": 0.3}, 0.5, math.log(5 / 3), 0.0),
    ],
)
def test_mass_of_the_likeliest_tokens_has_bounds(
    likeliest: dict[str, float], mass: float, margin: float, unseen: float
) -> None:
    found = refusal.shown_mass({text: math.log(p) for text, p in likeliest.items()})
    assert found == pytest.approx((mass, margin, mass + unseen), abs=1e-9)


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model over whole words, refusals' first ones among them, with peaked heads."""
    folder = tmp_path_factory.mktemp("worded")
    words = ["<s>", "</s>", "<unk>", "<user>", "<assistant>", *sorted(FIRST_WORDS)]
    words += ["Sure", "Here", "how", "can", "the", "a", "kill", "make", "process", "bomb", "?"]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )  # fmt: skip
    fast.chat_template = (
        "{% for m in messages %}<user> {{ m['content'] }} </s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.6,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    rows = {"toxic": ("make", "the"), "seemingly_toxic": ("kill", "a")}
    asked = ["how can ?", "can how bomb", "the process ? ?", "a bomb", "process", "the a the a"]
    for kind, ends in rows.items():
        lines = [{"prompt": f"{ends[i % 2]} {text} {ends[0]}"} for i, text in enumerate(asked)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{kind}.jsonl").write_text(text)
    return folder


def discerned(folder: Path, output: Path, *who: str) -> Run:
    settings, run = resolved(
        *(*who, f"output={output}", "tasks=[discernment]", "precision=fp32", "wandb.mode=disabled"),
        f"data.evaluation.safety=[{folder}/toxic.jsonl]",
        f"data.evaluation.over_refusal=[{folder}/seemingly_toxic.jsonl]",
    )
    eval_entry.evaluate(settings, run)
    return run


def read_openings(run: Run) -> dict[str, dict[str, Any]]:
    files = run.folder.glob("eval/*/openings/*.jsonl")
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {row["prompt"]: row for row in rows}


@pytest.mark.parametrize("k", [4, 20, 23])
def test_an_endpoint_discerns_as_its_weights_do_at_home(
    worded: Path, tmp_path: Path, k: int
) -> None:
    home = discerned(worded, tmp_path / "home", f"model.name={worded}")
    with logprobs(worded) as one, logprobs(worded) as two:
        who = (f"endpoint=[{one},{two}]", f"endpoint_model={worded}")
        there = discerned(
            worded, tmp_path / "there", *who, f"+endpoint_parameters.top_logprobs={k}"
        )
    ours, theirs = read_openings(home), read_openings(there)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 12
    for prompt, shown in theirs.items():
        assert shown["mass"] - 1e-5 <= ours[prompt]["mass"] <= shown["most"] + 1e-5
        if k == 23:  # the whole vocabulary
            assert shown["most"] == pytest.approx(ours[prompt]["mass"], abs=1e-5)
            assert shown["margin"] == pytest.approx(ours[prompt]["margin"], abs=1e-4)
    (known,), (found,) = metrics_of(home), metrics_of(there)
    pooled = schema.Metrics.model_validate(found).discernment
    assert pooled is not None
    assert pooled.unseen is not None
    low, high = found["discernment"]["pooled"]["auroc_bounds"]
    exact = known["discernment"]["pooled"]["auroc"][0]
    assert low <= exact <= high
    assert k < 23 or low == exact == high
    widest = max(row["most"] - row["mass"] for row in theirs.values())
    assert pooled.unseen.max == pytest.approx(widest)
    assert found["discernment"]["sets"] == known["discernment"]["sets"]


@pytest.mark.parametrize(
    "answer", [completion("Sure"), completion("Sure", top=[{"Sure": -0.1}]), FAULTS["unsupported"]]
)
def test_a_server_without_log_probabilities_is_refused_before_anything_is_asked(
    answer: Any, worded: Path, tmp_path: Path
) -> None:
    if answer is FAULTS["unsupported"]:
        answer = rejected(
            400, "Unsupported parameter: 'logprobs'", code="unsupported_parameter", param="logprobs"
        )
    shows = completion("Sure", top=[{"Sure": -0.1, "I": -3.0}])
    with scripted(lambda _: shows) as one, scripted(lambda _: answer) as two:
        who = (f"endpoint=[{one.url},{two.url}]", "endpoint_model=m")
        with pytest.raises(ConfigError) as caught:
            discerned(worded, tmp_path / "run", *who, "tasks=[over_refusal,discernment]")
    words = str(caught.value)
    assert words.startswith(f"tasks=[discernment] endpoint={two.url}: answers without log-prob")
    assert "\n" not in words
    assert [last_user(body) for body in (*one.bodies, *two.bodies)] == ["Hello."] * 2
    assert not (tmp_path / "run").exists()


def test_the_report_tells_what_a_server_did_not_show(worded: Path, tmp_path: Path) -> None:
    with logprobs(worded) as url:
        who = (f"endpoint={url}", f"endpoint_model={worded}")
        run = discerned(worded, tmp_path / "run", *who, "+endpoint_parameters.top_logprobs=8")
    assert report.main([str(run.folder), "--table", "discernment", f"out={tmp_path}/p.html"]) == 0
    (found,) = metrics_of(run)
    low, high = found["discernment"]["pooled"]["auroc_bounds"]
    words = " ".join((tmp_path / "discernment.md").read_text().split())
    assert f"the pooled AUROC of the whole mass lies between {low:.3f} and {high:.3f}." in words


# --- other commands -------------------------------------------------------------------------------


def test_answers_for_training_come_from_several_servers(tmp_path: Path) -> None:
    def helpful(body: Body) -> str:
        return f"Here is how: take the usual steps, one after the other. {last_user(body)}"

    with scripted(helpful) as one, scripted(lambda _: FAULTS["server_error"]) as two:
        out = tmp_path / "answers.jsonl"
        who = [f"endpoint=[{two.url},{one.url}]", "endpoint_model=m", "http.retries=1"]
        asked = ["source=demo_seemingly_toxic", "count=9", f"out={out}", *who]
        assert augment.main([*asked, "http.concurrency=2", "trainer.progress=false"]) == 0
        assert len({last_user(body) for body in one.bodies}) == len(one.bodies) == 9
    assert len(out.read_text().splitlines()) == 9


def test_the_compose_file_agrees_with_the_command_beside_it() -> None:
    text = (ROOT / "examples/vllm.compose.yaml").read_text()
    services = yaml.safe_load(text)["services"].values()
    ports = [port.split(":")[1] for one in services for port in one["ports"]]
    listed = re.findall(r"http://127\.0\.0\.1:(\d+)/v1", text)
    assert ports == listed
    reserved = [one["deploy"]["resources"]["reservations"]["devices"] for one in services]
    gpus = [gpu for devices in reserved for device in devices for gpu in device["device_ids"]]
    assert len(set(gpus)) == len(gpus) == len(services)
    for one in services:  # merged from the anchor
        named = one["command"][one["command"].index("--served-model-name") + 1]
        assert f"endpoint_model={named} " in text


# --- real servers ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_real_servers_share_the_work_of_one(tiny_folder: Path, tmp_path: Path) -> None:
    with served(tiny_folder) as one, served(tiny_folder) as two:

        def asked(urls: Sequence[str], name: str, *more: str) -> tuple[Any, Run]:
            return resolved(
                *(f"endpoint=[{','.join(urls)}]", f"endpoint_model={tiny_folder}", "data=demo"),
                *(f"output={tmp_path / name}", "limit=6", "wandb.mode=disabled", *more),
            )

        alone, shared = asked([one], "one"), asked([one, two], "two", "http.concurrency=2")
        eval_entry.evaluate(*alone)
        eval_entry.evaluate(*shared)
        assert stored(alone[1]) == stored(shared[1])
        (found,) = metrics_of(shared[1])
        took = found["servers"]["endpoint"]
        assert all(took[url]["requests"] > 0 for url in (one, two))
        with pytest.raises(ConfigError, match="answers without log-probabilities"):
            eval_entry.evaluate(*asked([one, two], "none", "tasks=[discernment]"))
