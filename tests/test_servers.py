"""An endpoint's answers as they are stored, and its discernment.

The truth is a command that nothing ended, and for discernment the same weights at home.
"""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from openai import _base_client
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dcr import eval as eval_entry
from dcr.core.config import ConfigError, UserError
from dcr.core.refusal import opening as refusal
from dcr.core.refusal.opening import FIRST_WORDS
from dcr.core.runs import Run
from dcr.report import __main__ as report
from dcr.results import schema
from tests.servers.faults import FAULTS
from tests.servers.logprobs import logprobs
from tests.servers.scripted import Body, completion, last_user, rejected, scripted
from tests.servers.served import served
from tests.test_eval import metrics_of, resolved

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.002)


def echo(body: Body) -> str:
    return f"echo of {last_user(body)}"


# --- the store ------------------------------------------------------------------------------------


def evaluation(url: str, output: Path) -> tuple[Any, Run]:
    return resolved(
        *(f"endpoint={url}", "endpoint_model=there", f"output={output}", "data=demo", "limit=6"),
        *("http.retries=1", "http.concurrency=2", "wandb.mode=disabled"),
        *("tasks=[over_refusal,safety]", "judge=[keyword]"),
    )


def test_what_is_stored_is_kept_where_the_server_dies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def dying(body: Body) -> Any:
        return echo(body) if len(made.requests) <= 3 else rejected(500, "out of order")

    with scripted(dying) as made:
        settings, run = evaluation(made.url, tmp_path / "run")
        eval_entry.evaluate(settings, run)
        (found,) = metrics_of(run)
        counts = found["sets"].values()
        assert (sum(c["n"] for c in counts), sum(c["unanswered"] for c in counts)) == (3, 9)
        assert "9 of 12 prompts without an answer" in caplog.text
        assert len(made.requests) <= 3 + 2 * (2 * 2 + 1)  # two rounds of two, twice each
        settings, run = evaluation(made.url, tmp_path / "none")
        with pytest.raises(UserError, match="none of 12 prompts was answered") as failure:
            eval_entry.evaluate(settings, run)
    assert failure.value.exit_code == 1
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


@pytest.fixture(scope="module")
def home(worded: Path) -> Run:
    """The same weights evaluated here."""
    return discerned(worded, worded / "home", f"model.name={worded}")


@pytest.mark.parametrize("k", [4, 23])
def test_an_endpoint_discerns_as_its_weights_do_at_home(
    worded: Path, home: Run, tmp_path: Path, k: int
) -> None:
    with logprobs(worded) as url:
        who = (f"endpoint={url}", f"endpoint_model={worded}")
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
    with scripted(lambda _: answer) as made:
        who = (f"endpoint={made.url}", "endpoint_model=m")
        with pytest.raises(ConfigError) as caught:
            discerned(worded, tmp_path / "run", *who, "tasks=[over_refusal,discernment]")
    words = str(caught.value)
    assert words.startswith(f"tasks=[discernment] endpoint={made.url}: answers without log-prob")
    assert "\n" not in words
    assert [last_user(body) for body in made.bodies] == ["Hello."]
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


def test_the_compose_file_agrees_with_the_command_beside_it() -> None:
    text = (ROOT / "examples/vllm.compose.yaml").read_text()
    (one,) = yaml.safe_load(text)["services"].values()
    options = dict(itertools.pairwise(one["command"]))
    (port,) = one["ports"]
    assert f"endpoint=http://127.0.0.1:{port.split(':')[1]}/v1 " in text
    assert f"endpoint_model={options['--served-model-name']} " in text
    (device,) = one["deploy"]["resources"]["reservations"]["devices"]
    assert int(options["--data-parallel-size"]) == len(device["device_ids"])


@pytest.mark.slow
def test_a_real_server_is_evaluated_and_shows_no_likeliest_tokens(
    tiny_folder: Path, tmp_path: Path
) -> None:
    with served(tiny_folder) as url:
        who = (f"endpoint={url}", f"endpoint_model={tiny_folder}", "limit=6", "wandb.mode=disabled")
        eval_entry.evaluate(*resolved(*who, "data=demo", f"output={tmp_path / 'one'}"))
        with pytest.raises(ConfigError, match="answers without log-probabilities"):
            eval_entry.evaluate(
                *resolved(*who, "data=demo", f"output={tmp_path / 'none'}", "tasks=[discernment]")
            )
