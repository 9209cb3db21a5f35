"""Win rates against hand counts, whatever the order shown, and no comparison paid for twice."""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dcr.core.config import ConfigError, UserError
from dcr.core.generation import Completion
from dcr.core.runs import Run
from dcr.endpoints import calls
from dcr.endpoints.answers import Failure, Message, Reply
from dcr.endpoints.servers import EndpointError
from dcr.extensions import EvalSettings
from dcr.judges import AnnotatorConfig, pairwise
from dcr.judges.pairwise import Pair
from dcr.quality import QualityConfig
from dcr.quality import win_rates as quality
from tests.servers.logprobs import logprobs

LABELS = ("dcr-seed0", "stl-seed0")
PROMPT = "|{instruction}|\nm: |{output_1}|\nM: |{output_2}|\nm or M?"
Rule = Callable[[str, str, str], Reply | Failure]


def reply(p_first: float, tokens: tuple[str, str] = ("m", "M")) -> Reply:
    """An annotator's answer, 40 tokens for a prompt; the rest of the mass goes to other tokens."""
    top = {tokens[0]: math.log(0.9 * p_first), tokens[1]: math.log(0.9 * (1 - p_first))}
    top |= {"The": math.log(0.05), "Both": math.log(0.03), "\n": math.log(0.02)}
    return Reply(tokens[p_first < 0.5], "length", (top,), prompt_tokens=40, completion_tokens=1)


def longer_wins(_: str, first: str, second: str) -> Reply:
    return reply(0.8 if len(first) > len(second) else 0.2)


class Annotator:
    """Stands in for `calls.chats`, and counts what it is asked."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.closed = rule, False
        self.asked: list[tuple[str, str, str]] = []

    def __call__(
        self, server: Any, http: Any, conversations: Sequence[Sequence[Message]], *, node: str
    ) -> Iterator[tuple[int, Reply | Failure]]:
        assert node == "annotator"
        try:
            for index in reversed(range(len(conversations))):  # arrival is not the order of asking
                self.asked.append(shown(conversations[index]))
                yield index, self.rule(*self.asked[-1])
        finally:
            self.closed = True


def shown(conversation: Sequence[Message]) -> tuple[str, str, str]:
    """Instruction, first and second answer of a prompt that puts each between bars."""
    (turn,) = conversation
    instruction, first, second = re.findall(r"\|(.*?)\|", turn["content"], re.DOTALL)
    return instruction, first, second


@pytest.fixture
def settings(tmp_path: Path) -> EvalSettings:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(PROMPT)
    run = tmp_path / "stl"
    run.mkdir()
    (run / "config.yaml").write_text("method: stl\n")
    return EvalSettings(
        quality=QualityConfig(reference=str(run)),
        annotator=AnnotatorConfig(
            url="http://127.0.0.1:9/v1", prompt=str(prompt), input_price=0.15, output_price=0.6
        ),
    )


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Annotator]:
    def put(rule: Rule) -> Annotator:
        annotator = Annotator(rule)
        monkeypatch.setattr(calls, "chats", annotator)
        return annotator

    return put


def answers(texts: Sequence[str], prefix: str = "q") -> list[Completion]:
    return [
        Completion(f"{prefix}-{i}", f"Explain item {i}.", text, len(text), True, 0.0)
        for i, text in enumerate(texts)
    ]


def rated(
    own: Sequence[Completion], reference: Sequence[Completion], settings: EvalSettings, folder: Path
) -> dict[str, Any]:
    return quality.compared(own, reference, settings, folder, LABELS, progress=False)


# --- one comparison ---


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ({"m": math.log(0.6), "M": math.log(0.2)}, 1.25),
        ({"M": math.log(0.6), "m": math.log(0.2)}, 1.75),
        ({"m": -0.1, "Both": -3.0}, 1.0),
        ({"M": -9.0, "The": -0.01}, 2.0),
        ({" m": math.log(0.3), "m": math.log(0.3), "M\n": math.log(0.2)}, 1.25),
        ({"Ġm": math.log(0.1), "▁M": math.log(0.3), "Model": math.log(0.5)}, 1.75),
        ({"m": -900.0, "M": -900.0}, 1.5),  # exp(-900) is 0 in double precision
        ({"m": -math.inf, "M": -1.0}, 2.0),
    ],
)
def test_preference_is_the_share_of_the_second_letter(
    top: dict[str, float], expected: float
) -> None:
    assert pairwise.preference(top, switched=False) == pytest.approx(expected, abs=1e-12)
    assert pairwise.preference(top, switched=True) == pytest.approx(3 - expected, abs=1e-12)


@pytest.mark.parametrize("top", [{}, {"mM": -0.1, "A": -1.0}, {"m": -math.inf}])
def test_without_either_letter_there_is_no_preference(top: dict[str, float]) -> None:
    assert pairwise.preference(top, switched=False) is None


def test_the_order_is_a_fair_coin_that_stays_as_it_fell() -> None:
    ids = [f"q-{i}" for i in range(1000)]
    once = [pairwise.is_switched(i, 0) for i in ids]
    assert once == [pairwise.is_switched(i, 0) for i in ids]
    assert 440 < sum(once) < 560  # standard deviation 16
    same = sum(a == pairwise.is_switched(i, 1) for a, i in zip(once, ids, strict=True))
    assert 440 < same < 560  # another seed is another coin


# --- rates ---


def test_the_longer_answer_wins_in_whichever_order_it_is_shown(
    settings: EvalSettings, tmp_path: Path, install: Callable[..., Annotator]
) -> None:
    annotator = install(longer_wins)
    own, other = ["long answer"] * 30 + ["short"] * 10, ["middling"] * 40
    found = rated(answers(own), answers(other), settings, tmp_path)
    places = [(first == "middling") for _, first, _ in annotator.asked]
    assert 10 < sum(places) < 30  # both orders were shown
    assert found["win_rate"] == pytest.approx(100 * (30 * 0.8 + 10 * 0.2) / 40)
    variance = (30 * (0.8 - 0.65) ** 2 + 10 * (0.2 - 0.65) ** 2) / 39
    assert found["standard_error"] == pytest.approx(100 * math.sqrt(variance / 40))
    assert found["discrete"] == 75
    assert found["length_controlled"] == pytest.approx(50, abs=2)  # its length was all it had
    assert (found["n"], found["invalid"], found["error"], found["missing"]) == (40, 0, 0, 0)
    assert found["mean_length"] == (30 * 11 + 10 * 5) / 40
    assert found["reference_length"] == 8
    assert (found["annotator"], found["reference"]) == (settings.annotator.model, "stl-seed0")
    assert found["usage"] == {
        "requests": 40,
        "prompt_tokens": 1600,
        "completion_tokens": 40,
        "usd": pytest.approx((1600 * 0.15 + 40 * 0.6) / 1e6),
    }


def test_a_model_against_itself_is_50_without_a_request(
    settings: EvalSettings, tmp_path: Path, install: Callable[..., Annotator]
) -> None:
    annotator = install(lambda *_: reply(0.99))
    own = answers([f"text {'x' * i}" for i in range(33)])
    found = rated(own, own, settings, tmp_path)
    assert annotator.asked == []
    rates = ("win_rate", "discrete", "length_controlled", "standard_error")
    assert [found[name] for name in rates] == [50.0, 50.0, 50.0, 0.0]
    assert (found["n"], found["identical"]) == (33, 33)
    assert found["usage"] == {
        **{"requests": 0, "prompt_tokens": 0, "completion_tokens": 0},
        "usd": 0,
    }


def test_trading_sides_gives_the_rest_of_100(
    settings: EvalSettings, tmp_path: Path, install: Callable[..., Annotator]
) -> None:
    def by_content(instruction: str, first: str, second: str) -> Reply:
        # leans to length, and to the answers whose text begins with "good"
        lean = 0.02 * (len(first) - len(second)) + first.startswith("good")
        return reply(1 / (1 + math.exp(second.startswith("good") - lean)))

    install(by_content)
    own = answers([("good" if i % 3 else "poor") + "x" * (7 * i % 50) for i in range(60)])
    other = answers(["good" if i % 4 == 0 else "fair" + "y" * (11 * i % 40) for i in range(60)])
    there = rated(own, other, settings, tmp_path / "there")
    back = rated(other, own, settings, tmp_path / "back")
    for rate in ("win_rate", "discrete", "length_controlled"):
        assert there[rate] + back[rate] == pytest.approx(100, abs=1e-5), rate
    assert abs(there["length_controlled"] - there["win_rate"]) > 0.1
    assert there["standard_error"] == pytest.approx(back["standard_error"])


def test_failures_and_strange_answers_are_counted_apart(
    settings: EvalSettings, tmp_path: Path, install: Callable[..., Annotator]
) -> None:
    strange = {
        "Explain item 0.": Failure("error", "HTTP 503"),
        "Explain item 1.": Failure("invalid", "content filter"),
        "Explain item 2.": Reply("A", "length", ({"A": -0.1, "B": -2.5},), 40, 1),
        "Explain item 3.": Reply("", "stop", None, 40, 0),
    }
    install(lambda prompt, first, second: strange.get(prompt, longer_wins(prompt, first, second)))
    own = answers(["a longer answer"] * 8)
    found = rated(own, answers(["short"] * 8), settings, tmp_path)
    assert (found["n"], found["invalid"], found["error"]) == (4, 3, 1)
    assert found["win_rate"] == pytest.approx(80)
    assert found["length_controlled"] is None
    published = json.loads((tmp_path / "quality" / "annotations.json").read_text())
    assert [row["preference"] is None for row in published] == [True] * 4 + [False] * 4


def test_an_annotator_that_answers_nothing_is_none(
    settings: EvalSettings, tmp_path: Path, install: Callable[..., Annotator]
) -> None:
    install(lambda *_: Failure("error", "HTTP 500"))
    with pytest.raises(EndpointError, match=r"^annotator: none of 3 .*HTTP 500.* same command"):
        rated(answers(["a"] * 3), answers(["b"] * 3), settings, tmp_path)


def test_answers_meet_by_id_and_prompt(
    settings: EvalSettings, tmp_path: Path, install: Callable[..., Annotator]
) -> None:
    annotator = install(longer_wins)
    own, reference = answers(["long answer"] * 4), answers(["short"] * 6)[::-1]
    own[3] = replace(own[3], prompt="Another prompt.")
    found = rated(own, reference, settings, tmp_path)
    assert sorted(asked[0] for asked in annotator.asked) == [f"Explain item {i}." for i in range(3)]
    assert found["n"] == 3
    assert found["missing"] == 4  # the other prompt; items 3, 4 and 5 of the reference
    with pytest.raises(ConfigError, match=r"^quality\.reference=.*none of the 2 prompts"):
        rated(answers(["a"] * 2), answers(["b"] * 2, prefix="other"), settings, tmp_path / "none")
    assert not (tmp_path / "none").exists()


# --- what is stored, and never asked again ---


def test_only_errors_changed_answers_and_other_annotators_are_asked_again(
    settings: EvalSettings, tmp_path: Path, install: Callable[..., Annotator]
) -> None:
    own, other = answers([f"longer {i}" for i in range(6)]), answers(["short"] * 6)
    fails = {"Explain item 0.": "error", "Explain item 1.": "invalid"}

    def failing(prompt: str, first: str, second: str) -> Reply | Failure:
        if prompt in fails:
            return Failure(fails[prompt], "not today")
        return longer_wins(prompt, first, second)

    install(failing)
    rated(own, other, settings, tmp_path)
    again = install(longer_wins)
    found = rated(own, other, settings, tmp_path)
    assert [asked[0] for asked in again.asked] == ["Explain item 0."]
    assert (found["n"], found["invalid"], found["error"]) == (5, 1, 0)

    changed = [*own[:5], replace(own[5], response="another answer")]
    again = install(longer_wins)
    rated(changed, other, settings, tmp_path)
    assert [asked[0] for asked in again.asked] == ["Explain item 5."]

    for annotator in (
        replace(settings.annotator, model="other/judge-8b"),
        replace(settings.annotator, parameters={**settings.annotator.parameters, "seed": 1}),
    ):
        again = install(longer_wins)
        rated(own, other, replace(settings, annotator=annotator), tmp_path)
        assert len(again.asked) == 6
    assert len(list((tmp_path / "quality").glob("judge-8b-*.jsonl"))) == 1


def test_files_are_in_the_format_of_alpaca_eval(
    settings: EvalSettings, tmp_path: Path, install: Callable[..., Annotator]
) -> None:
    install(longer_wins)
    own, other = answers(["the longer ✓ one", "a", "same"]), answers(["short", "b2", "same"])
    found = rated(own, other, settings, tmp_path)
    home = tmp_path / "quality"
    outputs = json.loads((home / "model_outputs.json").read_text())
    assert outputs[0] == {
        "dataset": "alpaca_eval",
        "instruction": "Explain item 0.",
        "output": "the longer ✓ one",
        "generator": "dcr-seed0",
    }
    assert [o["generator"] for o in json.loads((home / "reference_outputs.json").read_text())] == [
        "stl-seed0"
    ] * 3
    published = json.loads((home / "annotations.json").read_text())
    (store,) = home.glob("gpt-4o-mini-2024-07-18-*.jsonl")
    kept = {row["id"]: row for row in map(json.loads, store.read_text().splitlines())}
    assert set(kept) == {"q-0", "q-1"}  # the tie cost nothing
    for i, row in enumerate(published):
        assert (row["output_1"], row["generator_1"]) == (other[i].response, "stl-seed0")
        assert (row["output_2"], row["generator_2"]) == (own[i].response, "dcr-seed0")
        assert row["annotator"] == settings.annotator.model
        if row["output_1"] != row["output_2"]:
            assert {**row, **kept[f"q-{i}"]} == {"dataset": "alpaca_eval", **kept[f"q-{i}"]}
    assert [row["preference"] for row in published] == pytest.approx([1.8, 1.2, 1.5])
    mean = sum(row["preference"] - 1 for row in published) / 3
    assert found["win_rate"] == pytest.approx(100 * mean)


# --- the annotator's settings ---


@pytest.mark.parametrize("top", [None, (), ({"m": -0.1},)])
def test_a_server_without_log_probabilities_stops_at_once(
    top: Any, settings: EvalSettings, tmp_path: Path, install: Callable[..., Annotator]
) -> None:
    annotator = install(lambda *_: Reply("m", "length", top, 40, 1))
    with pytest.raises(EndpointError, match=r"^annotator\.model=gpt-4o-mini.*log-probabilities"):
        rated(answers(["a"] * 5), answers(["b"] * 5), settings, tmp_path)
    assert len(annotator.asked) == 1
    assert annotator.closed


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("logprobs", None, r"^annotator\.parameters\.logprobs=None: .*; ?give"),
        ("top_logprobs", 1, r"^annotator\.parameters\.top_logprobs=1: .*; ?give"),
        ("prompt", None, r"^annotator\.prompt=.*own\.txt: .*No such file"),
        ("prompt", "{instruction} {output_1}", r"^annotator\.prompt=.*: has no \{output_2\}"),
        ("prompt", f"<|im_start|>user\n{PROMPT}<|im_end|> more", r"^annotator\.prompt=.*outside"),
        ("reference", "nowhere", r"^quality\.reference=.*nowhere: no config\.yaml there"),
        ("key", None, r"annotator.*OPENAI_API_KEY"),
    ],
)
def test_what_would_fail_after_the_answers_are_written_is_named_before(
    key: str,
    value: Any,
    fault: str,
    settings: EvalSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quality.Quality().check(settings, Run(tmp_path))
    if key == "reference":
        settings.quality.reference = str(tmp_path / value)
    elif key == "key":
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        settings.annotator.url = None
    elif key == "prompt":
        settings.annotator.prompt = str(tmp_path / "own.txt")
        if value is not None:
            (tmp_path / "own.txt").write_text(value)
    else:
        settings.annotator.parameters[key] = value
    with pytest.raises(UserError, match=fault) as caught:
        quality.Quality().check(settings, Run(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_own_prompt_shows_the_first_answer_as_m_and_keeps_quoted_placeholders(
    tmp_path: Path, settings: EvalSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Sequence[Message]] = []

    def chats(
        server: Any, http: Any, conversations: Any, *, node: str
    ) -> Iterator[tuple[int, Reply | Failure]]:
        sent.extend(conversations)
        yield from ((i, reply(0.5)) for i in range(len(conversations)))

    monkeypatch.setattr(calls, "chats", chats)
    plain = replace(settings, annotator=replace(settings.annotator, prompt=None))
    tricky = "<|im_end|>{output_2} {0} \\1"
    pairs = [Pair(f"q-{i}", "What is {output_1}?", tricky, "mine") for i in range(8)]
    rows = pairwise.annotate(pairs, plain, tmp_path / "quality", LABELS, progress=False)
    assert len(sent) == 2  # eight ids, one request in either order
    assert {row.is_switched for row in rows} == {False, True}
    for system, user in sent:
        assert (system["role"], user["role"]) == ("system", "user")
        assert "What is {output_1}?" in user["content"]
        after_m = user["content"].split('<answer by="m">\n')[1].split("\n</answer>")[0]
        after_big = user["content"].split('<answer by="M">\n')[1].split("\n</answer>")[0]
        assert {after_m, after_big} == {tricky, "mine"}
    first = [s[1]["content"].split('<answer by="m">\n')[1].startswith(tricky) for s in sent]
    assert sorted(first) == [False, True]


def test_a_prompt_file_in_the_format_of_alpaca_eval_becomes_turns(tmp_path: Path) -> None:
    file = tmp_path / "alpaca.txt"
    file.write_text(
        "<|im_start|>system\nYou rank.\n<|im_end|>\n<|im_start|>user\n"
        '{"q": """{instruction}"""}\n{ {"m": {output_1}}, {"M": {output_2}} }\n<|im_end|>\n',
        encoding="utf-8-sig",
    )
    turns = pairwise.turns(AnnotatorConfig(prompt=str(file)))
    assert [turn["role"] for turn in turns] == ["system", "user"]
    assert turns[0]["content"] == "You rank."
    assert turns[1]["content"].endswith('{"M": {output_2}} }')


# --- over HTTP ---


def test_a_real_model_prefers_what_its_own_logits_say(
    settings: EvalSettings, tmp_path: Path, tiny_folder: Path
) -> None:
    own, other = answers([f"own {i}" for i in range(6)]), answers([f"other {i}" for i in range(6)])
    whole = {**settings.annotator.parameters, "top_logprobs": 260}
    with logprobs(tiny_folder) as url:
        few = replace(settings, annotator=replace(settings.annotator, url=url))
        every = replace(few, annotator=replace(few.annotator, parameters=whole))
        quality.Quality().check(every, Run(tmp_path))
        found = rated(own, other, every, tmp_path)
        found_in_top_5 = rated(own, other, few, tmp_path)

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "mM"]
    wins, in_top_5, tokens = [], [], 0
    for mine, theirs in zip(own, other, strict=True):
        switched = pairwise.is_switched(mine.id, settings.seed)
        first, second = (mine, theirs) if switched else (theirs, mine)
        text = PROMPT.format(
            instruction=mine.prompt, output_1=first.response, output_2=second.response
        )
        chat = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        share = logits[letters].softmax(0)[0 if switched else 1].item()
        present = set(letters) & set(logits.topk(5).indices.tolist())
        wins.append(share)
        in_top_5.append(bool(present))
        tokens += len(ids)
    assert found["win_rate"] == pytest.approx(100 * sum(wins) / 6, abs=1e-3)
    assert (found["n"], found["invalid"], found["error"]) == (6, 0, 0)
    assert (found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"]) == (tokens, 6)
    assert found_in_top_5["n"] == sum(in_top_5)
    assert found_in_top_5["invalid"] == 6 - sum(in_top_5)
