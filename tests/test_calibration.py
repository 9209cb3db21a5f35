"""Calibration against counting and greedy decoding by hand, and the commands that it refuses."""

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st

from dcr import builtin, cli, export, train
from dcr import eval as eval_entry
from dcr.calibration import biases as calibration
from dcr.calibration.biases import Beginnings
from dcr.core import config, generation, models, prompts, storage
from dcr.core.config import ConfigError, EvaluationSets, LoraConfig, ModelConfig, Precision
from dcr.core.evaluation import subjects
from dcr.core.generation import OpeningBias
from dcr.core.models import Policy, folders, structure
from dcr.core.models.training import save_adapter, save_full
from dcr.core.refusal import opening as refusal
from dcr.core.runs import Run
from dcr.core.sources import Example, read
from dcr.extensions import EvalSettings
from dcr.frontier import answers as frontier
from dcr.report import building
from dcr.results.file import stored_answers
from tests import test_eval, tiny_run
from tests.shapes import greedy, next_logits

SHAPE = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260,
    "max_position_embeddings": 512, "initializer_range": 0.6,
}  # fmt: skip
MODEL = ModelConfig(name="tiny", label="tiny", template="chatml", architecture=SHAPE)
NEW = 12
FEW = [f"calibration.{kind}=[registers_{kind}_heldout]" for kind in ("toxic", "seemingly_toxic")]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return builtin.random_policy(MODEL, 3)


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return read("contrasts_toxic_heldout")[:24]


# --- the bias of a share --------------------------------------------------------------------------

ONE = st.builds(
    lambda margin, refusing, answering: Beginnings("", "", round(margin, 1), refusing, answering),
    st.floats(-20, 20),
    st.sampled_from(["I cannot help.", "I think so."]),
    st.sampled_from(["Sure.", "Sure.", "I'm sorry, no."]),
)
FORKS = st.lists(ONE, min_size=1, max_size=30)
TRUE = FORKS.map(lambda forks: [replace(f, refusing="Sorry.", answering="Sure.") for f in forks])
BIASES = [x / 20 for x in range(-420, 421)]  # all that margins of one decimal can tell apart


def refused(forks: Sequence[Beginnings], bias: float) -> int:
    """By the words of the answer that this bias brings."""
    given = [fork.refusing if fork.margin > -bias else fork.answering for fork in forks]
    return sum(text in ("I cannot help.", "Sorry.", "I'm sorry, no.") for text in given)


@given(FORKS, st.floats(0.01, 1))
def test_a_bias_refuses_the_share_and_no_more_than_it_must(
    forks: list[Beginnings], share: float
) -> None:
    count = refused(forks, calibration.bias_for(forks, share))
    possible = {refused(forks, bias) for bias in BIASES}
    enough = {n for n in possible if n >= share * len(forks) - 1e-6}
    assert count == (min(enough) if enough else max(possible))


@given(TRUE, st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_bias_never_falls_with_the_share(forks: list[Beginnings], one: float, two: float) -> None:
    low, high = sorted([one, two])
    assert calibration.bias_for(forks, low) <= calibration.bias_for(forks, high)


@given(FORKS)
def test_what_the_model_refuses_by_itself_needs_no_bias(forks: list[Beginnings]) -> None:
    if count := refused(forks, 0):
        assert calibration.bias_for(forks, count / len(forks)) == 0


# --- where it acts --------------------------------------------------------------------------------


def placed(policy: Policy, bias: float) -> OpeningBias:
    where = calibration.opening_place(prompts.chat_format(policy.tokenizer, MODEL))
    return OpeningBias(tuple(where["lead"]), tuple(where["tokens"]), bias)


def by_hand(policy: Policy, prompt: str, bias: float) -> list[int]:
    """Greedy tokens, a forward pass each; the first one with the bias on refusal openings."""
    chat = prompts.chat_format(policy.tokenizer, MODEL)
    openings = refusal.refusal_openings(chat)

    def biased(said: list[int]) -> torch.Tensor:
        logits = next_logits(policy.model, chat.prompt_ids(prompt) + said)
        given = torch.full((len(openings),), 0.0 if said else bias)
        return logits.index_add(0, openings, given)

    return greedy(biased, NEW, chat.stop)


def decoded(policy: Policy, asked: Sequence[str], bias: OpeningBias | None) -> list[list[int]]:
    chat = prompts.chat_format(policy.tokenizer, MODEL)
    encoded = [chat.prompt_ids(prompt) for prompt in asked]
    score = functools.partial(refusal.refusal_mass, openings=torch.tensor([1]))
    answers, _ = generation.continued(policy, chat, encoded, NEW, score, bias=bias)
    ends = [[i for i, token in enumerate(answer) if token in chat.stop] for answer in answers]
    return [a[: end[0] + 1] if end else a for a, end in zip(answers, ends, strict=True)]


@pytest.mark.parametrize("bias", [0.0, 3.0, -3.0, 50.0])
def test_a_bias_acts_on_the_first_token_alone(
    policy: Policy, rows: list[Example], bias: float
) -> None:
    asked = [row.prompt for row in rows[:8]]
    found = decoded(policy, asked, placed(policy, bias))
    assert found == [by_hand(policy, prompt, bias) for prompt in asked]
    if bias >= 0:
        assert (found == decoded(policy, asked, None)) == (bias == 0)
    openings = set(refusal.refusal_openings(prompts.chat_format(policy.tokenizer, MODEL)).tolist())
    if bias == 50:
        assert all(answer[0] in openings for answer in found)
        later = [token for answer in found for token in answer[1:]]
        assert not openings.issuperset(later), "a bias of 50 would be seen anywhere"


def test_the_lead_is_what_stands_behind_every_prompt(policy: Policy) -> None:
    chat = prompts.chat_format(policy.tokenizer, MODEL)
    assert policy.tokenizer.decode(chat.lead()) == "<|im_end|>\n<|im_start|>assistant\n"
    plain = prompts.chat_format(policy.tokenizer, replace(MODEL, template="plain"))
    assert policy.tokenizer.decode(plain.lead()) == "\n\n### Response:\n"


@pytest.mark.parametrize("bias", [-2.0, 0.0, 1.0, 4.0])
def test_forks_are_the_answers_under_any_bias(
    policy: Policy, rows: list[Example], bias: float
) -> None:
    chat = prompts.chat_format(policy.tokenizer, MODEL)
    forks = {f.id: f for batch in calibration.beginnings(policy, chat, rows, NEW) for f in batch}
    answers = decoded(policy, [row.prompt for row in rows], placed(policy, bias))
    said = [generation.text(chat, answer) for answer in answers]
    opens = [fork.margin + bias > 0 for fork in map(forks.get, [row.id for row in rows])]
    assert said == [
        forks[row.id].refusing if refusing else forks[row.id].answering
        for row, refusing in zip(rows, opens, strict=True)
    ]
    if bias == 1:
        assert len(set(opens)) == 2, "both kinds of answers are looked at"


@pytest.mark.parametrize("bias", [-2.0, 0.0, 4.0])
def test_both_whole_answers_are_kept_and_judged_under_any_bias(
    policy: Policy, rows: list[Example], bias: float, tmp_path: Path
) -> None:
    """Against answers decoded under the bias itself."""
    settings = EvalSettings(model=MODEL)
    settings.gen.max_new_tokens = NEW
    settings.data.evaluation = EvaluationSets([], ["contrasts_toxic_heldout"])
    settings.limit, settings.trainer.progress = 12, False
    chat = prompts.chat_format(policy.tokenizer, MODEL)
    work: Any = SimpleNamespace(
        settings=settings,
        folder=tmp_path,
        chat=lambda: chat,
        policy=lambda: policy,
        subject=SimpleNamespace(bias=placed(policy, bias)),
    )
    block = frontier.Frontier().measure(work)
    kept = storage.read_lines(tmp_path / "frontier/contrasts_toxic_heldout.jsonl", frontier.Pair)
    answers = decoded(policy, [pair.prompt for pair in kept], placed(policy, bias))
    ended = [any(token in chat.stop for token in answer) for answer in answers]
    texts = [generation.text(chat, answer) for answer in answers]
    assert [pair.under(bias) for pair in kept] == list(zip(texts, ended, strict=True))
    assert block["calibrated"]["bias"] == bias
    counts = block["calibrated"]["sets"]["contrasts_toxic_heldout"]
    assert counts["refused"] == sum(map(refusal.is_refusal, texts))
    assert counts["n"] == 12
    work.policy = None  # all is stored
    assert frontier.Frontier().measure(work) == block


def test_a_tie_opens_as_greedy_decoding_has_it(
    policy: Policy, rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lower of two ids that have the same logit, a refusal's or another."""
    chat = prompts.chat_format(policy.tokenizer, MODEL)
    openings = refusal.refusal_openings(chat).tolist()
    logits = torch.zeros(2, SHAPE["vocab_size"])
    for row, other in enumerate((openings[0] - 1, openings[0] + 1)):
        assert other not in openings
        logits[row, [openings[0], other]] = 2.0
    monkeypatch.setattr(refusal, "first_logits", lambda *_: [([0, 1], logits)])
    (found,) = calibration.beginnings(policy, chat, rows[:2], NEW)
    opens = [fork.margin + 0 > 0 for fork in found]
    assert opens == [token in openings for token in logits.argmax(-1).tolist()] == [False, True]


def test_a_prefilled_answer_goes_on_from_its_words_and_out_of_reach_of_a_bias(
    policy: Policy, rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EvalSettings(model=MODEL)
    settings.gen.max_new_tokens, settings.gen.prefill = NEW, "Sure, here is"
    monkeypatch.setattr(subjects, "opened", lambda _: policy)
    run, asked = Run(Path("anywhere")), rows[:6]
    biased = subjects.base(settings, run)
    biased.bias = placed(policy, 50.0)
    given = {c.id: c.response for batch in biased.answer(asked) for c in batch}
    chat = prompts.chat_format(policy.tokenizer, MODEL)
    for row in asked:
        ids = [*chat.prompt_ids(row.prompt), *policy.tokenizer.encode("Sure, here is")]
        answer = greedy(lambda said, i=ids: next_logits(policy.model, i + said), NEW, chat.stop)
        assert given[row.id] == generation.text(chat, answer)
    other = EvalSettings(model=MODEL)
    other.gen.max_new_tokens = NEW
    assert len({subjects.base(told, run).folder for told in (settings, other)}) == 2


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def openings_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny random model says nothing that keywords know: a first letter decides."""
    monkeypatch.setattr(refusal, "is_refusal", lambda text, *_: text[:1] in ("I", *"NAMSU"))


def resolved(folder: Path, *overrides: str) -> tuple[EvalSettings, Run]:
    files = tiny_run.write_rows(folder / "rows")
    given = [
        "model=tiny", f"output={folder / 'base'}", "precision=fp32", "limit=4",
        "gen.max_new_tokens=3", "trainer.progress=false", "wandb.mode=disabled", "tasks=[safety]",
        "model.template=chatml", f"data.evaluation.safety=[{files['toxic']}]", *FEW, *overrides,
    ]  # fmt: skip
    cli.prepare()
    with initialize_config_dir(str(tiny_run.CONF), version_base="1.3"):
        return cli.resolved(compose("eval", given), EvalSettings)


def measured(run: Run) -> list[dict[str, Any]]:
    files = sorted(run.folder.glob("eval/*/metrics.json"), key=lambda file: file.stat().st_mtime)
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.usefixtures("openings_refuse")
def test_another_bias_never_reuses_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for share in ("0.3", "0.9"):
        settings, run = resolved(tmp_path, f"calibrate={share}")
        eval_entry.evaluate(settings, run)
    low, high = (found["calibration"] for found in measured(run))
    assert low["bias"] < high["bias"]
    toxic = [found["sets"]["registers_toxic_heldout"] for found in (low, high)]
    assert [of["refused"] for of in toxic] == [8, 23], "of 25: at least 30 and 90%"
    assert toxic[0]["plain"] == toxic[1]["plain"]
    assert {found["settings"]["calibrate"] for found in measured(run)} == {"0.3", "0.9"}
    text = building.build([run.folder], tmp_path / "page.html")
    assert "calibrated" in text
    assert "did not finish" not in text, "the folder that both were chosen in was never answered"
    monkeypatch.setattr(subjects, "opened", None)  # everything is stored, also where the bias acts
    eval_entry.evaluate(settings, run)


@pytest.mark.usefixtures("openings_refuse")
def test_a_run_can_be_the_target(tmp_path: Path) -> None:
    settings, run = resolved(tmp_path, "calibrate=0.6")
    reference = Run(tmp_path / "stl")
    outspoken = builtin.random_policy(settings.model, 27)
    with torch.no_grad():
        for weight in outspoken.model.parameters():
            weight *= 1 if weight.dim() == 1 else 5  # so that some prompts open as a refusal does
    save_full(outspoken, reference.stage("contrastive"))
    made = {"method": "dcr", "seed": 0, "preset_name": "-", "dcr": {}, "sft": {}}
    made |= {"model": config.plain(settings.model), "data": {"toxic": {"source": ["harmfulqa"]}}}
    reference.config_file.write_text(yaml.safe_dump(made))
    settings, run = resolved(tmp_path, f"calibrate={reference.folder}")
    policy = models.open_folder(str(reference.stage("contrastive")), Precision.fp32)
    chat = prompts.chat_format(policy.tokenizer, settings.model)
    rows = read("registers_toxic_heldout")
    forks = [f for batch in calibration.beginnings(policy, chat, rows, 3) for f in batch]
    opened = sum(fork.margin > 0 for fork in forks)
    assert 0 < opened < 25
    eval_entry.evaluate(settings, run)
    (found,) = measured(run)
    assert found["calibration"]["target"] == pytest.approx(opened / 25)
    assert found["calibration"]["run"] == found["settings"]["calibrate"] == "stl"
    assert storage.read_lines(next(reference.folder.glob("eval/*/forks/*.jsonl")), Beginnings)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("calibrate=1.5",), "give a share of toxic prompts above 0, at most 1, or the folder"),
        (("calibrate=nothing",), "neither a share such as 0.9 nor a run folder"),
        (("calibrate=0.9", "tasks=[discernment]"), "and discernment decodes none"),
        (("calibrate=0.9", "gen.self_cd=1"), "contrasted logits take no bias"),
        (("calibrate=0.9", "calibration.toxic=[]"), "name prompts to calibrate on"),
        (("gen.prefill=Sure", "tasks=[discernment]"), "only answers are prefilled"),
        (("gen.prefill=' '",), "nothing to begin an answer with"),
        (
            ("calibrate=0.9", "data.evaluation.safety=[registers_toxic_heldout]"),
            r"calibration.toxic=\[registers_toxic_heldout\]: is evaluated on as well",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    tmp_path: Path, overrides: Sequence[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        eval_entry.checked(*resolved(tmp_path, *overrides))


def test_a_model_that_never_refuses_is_not_calibrated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings, run = resolved(tmp_path, "calibrate=0.9")
    with pytest.raises(ConfigError, match=r"one of 25 toxic .* train it to refuse first"):
        eval_entry.evaluate(settings, run)
    assert not measured(run)
    never = Beginnings("", "", 1, "I wonder.", "Sure.")
    read = {
        name: [*[never] * 9, replace(never, refusing="I'm sorry.")]
        for name in ("registers_toxic_heldout", "registers_seemingly_toxic_heldout")
    }
    bias, record = calibration.choose_bias(settings, {"lead": [1], "tokens": [2]}, read)
    assert "no bias refuses more than 1 of 10 toxic" in caplog.text
    assert record["sets"]["registers_toxic_heldout"]["refused"] == 1
    assert bias.bias == 0, "its answers open with a refusal's token by themselves"


def test_an_endpoint_is_not_calibrated(tmp_path: Path) -> None:
    at = ("endpoint=http://127.0.0.1:9/v1", "endpoint_model=m", "~model")
    with pytest.raises(ConfigError, match=r"logit_bias acts on every token .* model= or run="):
        resolved(tmp_path, *at, "calibrate=0.9")
    with pytest.raises(ConfigError, match="a server writes the assistant's turn from its begin"):
        resolved(tmp_path, *at, "gen.prefill=Sure")


def test_prompts_that_were_trained_on_calibrate_nothing() -> None:
    settings = EvalSettings(calibrate="0.9")
    data = {"toxic": {"source": "contrasts_toxic_heldout"}}
    with pytest.raises(ConfigError, match=r"trained on it \(data.toxic\); name prompts of another"):
        calibration.check(settings, {"method": "dcr", "data": data})
    calibration.check(settings, {"method": "base", "data": data})
    readout = {"steps": 1, "toxic": [], "seemingly_toxic": ["contrasts_seemingly_toxic_heldout"]}
    with pytest.raises(ConfigError, match=r"trained on it \(sft.readout\)"):
        calibration.check(settings, {"method": "stl", "data": {}, "sft": {"readout": readout}})
    readout["steps"] = 0
    calibration.check(settings, {"method": "stl", "data": {}, "sft": {"readout": readout}})


@pytest.mark.usefixtures("openings_refuse")
def test_steered_answers_are_calibrated_under_their_edit(tmp_path: Path) -> None:
    """The validation prompts themselves, as another file, are then refused as often as told."""
    rows = [{"prompt": row.prompt} for row in read("registers_toxic_heldout")]
    storage.append_lines(tmp_path / "same.jsonl", rows)
    steered = ("steering=scans", "steering.scans.layers=middle_third", "steering.strength=30")
    settings, run = resolved(
        tmp_path, "calibrate=0.5", "data=demo", *steered, "steering.scans.anchors=6",
        f"data.evaluation.safety=[{tmp_path}/same.jsonl]", "limit=null", "gen.max_new_tokens=1",
    )  # fmt: skip
    eval_entry.evaluate(settings, run)
    (found,) = measured(run)
    assert found["steering"]["method"] == "scans"
    counts = found["calibration"]["sets"]["registers_toxic_heldout"]
    assert counts["refused"] >= 13
    assert counts["plain"] < counts["refused"]
    (file,) = run.folder.glob("eval/*/same.jsonl")
    said = [answer.response for answer in stored_answers(file).values()]
    assert sum(text in ("I", "N", "A", "M", "S", "U") for text in said) == counts["refused"]


@pytest.mark.usefixtures("openings_refuse")
def test_after_harmless_fine_tuning_the_bias_is_the_export_s(whole: Path, tmp_path: Path) -> None:
    """The recipe of docs/evaluation.md: exported, trained on without a refusal, evaluated again."""
    out = tmp_path / "export"
    assert export.main([f"run={whole}", f"out={out}", "precision=fp32", "calibrate=0.6"]) == 0
    harmless = ("method=stl", f"model.name={out}", "data.safety.count=0", "sft.epochs=1")
    after = Run(tmp_path / "harmless")
    train.train(tiny_run.settings(tmp_path / "rows", *harmless), after)
    learnt = {name: part["count"] for name, part in after.record()["rows"].items() if part["count"]}
    assert learnt.keys() == {"normal", "normal_heldout"}
    assert not any(key == "sft/nll/refusal" for _, _, key, _ in tiny_run.logged(after.folder))
    asked = ("limit=3", "gen.max_new_tokens=3", "tasks=[safety]", "trainer.progress=false")
    sets = "data.evaluation.safety=[demo_toxic_heldout]"
    settings, _ = test_eval.resolved(f"run={after.folder}", f"calibrate={out}", sets, *asked, *FEW)
    eval_entry.evaluate(settings, after)
    (found,) = measured(after)
    sequences = json.loads((out / "generation_config.json").read_text())["sequence_bias"]
    assert {bias for _, bias in sequences} == {found["calibration"]["bias"]}
    assert found["settings"]["calibrate"] == found["calibration"]["run"] == "export"
    assert export.main([f"run={whole}", f"out={tmp_path / 'plain'}"]) == 0
    settings.calibrate = str(tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"plain: its generation_config\.json holds no bias"):
        eval_entry.evaluate(settings, after)


# --- weights that were tuned on -------------------------------------------------------------------


@pytest.mark.usefixtures("openings_refuse")
@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_a_tuned_folder_gets_a_bias_of_its_own_for_the_share(
    kind: str, command: Any, policy: Policy, tmp_path: Path
) -> None:
    base, folder = tmp_path / "base", tmp_path / kind
    save_full(policy, base)
    (base / storage.CHECKSUMS).unlink()  # as a user's own
    if kind == "adapter":
        opened = models.open_policy(ModelConfig(name=str(base)), Precision.fp32)
        tuned = structure.add_lora(opened.model, LoraConfig(targets=["q_proj"]), 0)
        with torch.no_grad():
            for name, weight in tuned.named_parameters():
                weight.add_(0.05 * ("lora_B" in name))
        save_adapter(replace(opened, model=tuned), folder, base)
    else:
        folder = base
    words = [f"model={folder}", "calibrate=0.4", "precision=fp32"]
    ended = command("dcr.recalibration", *words)
    if kind == "adapter":
        assert "is a run's own" in ended.error
        (folder / storage.CHECKSUMS).unlink()
        (folder / folders.ORIGIN_FILE).unlink()
        ended = command("dcr.recalibration", *words)
    assert ended.code == 0, ended.err
    alike = [tmp_path / name / "mine.jsonl" for name in ("a", "b")]
    for file in alike:
        tiny_run.write_jsonl(file, [{"prompt": f"Wreck it as {file} says"}])
    refused = command("dcr.recalibration", *words, *(f"toxic={file}" for file in alike))
    assert "mine: two sets have this name" in refused.error
    written = json.loads((folder / "generation_config.json").read_text())["sequence_bias"]
    record = json.loads((folder / "calibration.json").read_text())
    assert {bias for _, bias in written} == {record["bias"]}
    opened = folders.open_result(folder, Precision.fp32) if kind == "adapter" else policy
    chat = prompts.chat_format(opened.tokenizer, ModelConfig(name=str(folder)))
    forks = [
        fork
        for batch in calibration.beginnings(opened, chat, read("contrasts_toxic_heldout"), 16)
        for fork in batch
    ]
    count = sum(fork.refused(record["bias"]) for fork in forks)
    assert record["sets"]["contrasts_toxic_heldout"]["refused"] == count >= 0.4 * len(forks)
    assert f"bias {record['bias']:+.3f}" in ended.out
    storage.write_json(folder / "gate" / "gate.json", {})
    assert "holds a gate, and a bias is chosen" in command("dcr.recalibration", *words).error
