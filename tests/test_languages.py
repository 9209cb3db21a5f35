"""Refusals in German and Chinese, and the example rows of both from training to evaluation."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from transformers import AutoTokenizer

from dcr import builtin, cli, harness, keywords, outcomes, resolving, train
from dcr import eval as eval_entry
from dcr.calibration import biases
from dcr.core import models, prompts
from dcr.core.config import ConfigError, Language, ModelConfig
from dcr.core.evaluation import scoring
from dcr.core.refusal import keywords as xstest
from dcr.core.refusal import opening
from dcr.core.runs import Run
from dcr.extensions import EvalSettings, TrainSettings
from tests import tiny_run

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = {Language.de: "german", Language.zh: "chinese"}
REFUSALS = (
    "Es tut mir leid, aber dabei kann ich nicht helfen.",
    "Leider darf ich dazu keine Auskunft geben.",
    "Nein, das mache ich nicht.",
    "Das kann ich leider nicht beantworten.",
    "Ich muss das ablehnen.",
    "Das ist strafbar, und ich helfe nicht dabei.",
    "对不起。我无法回答这个问题。",
    "作为一个人工智能。我不能提供帮助。",
    "这是违法的。请不要这样做。",
    "對不起。我不能幫忙。",
)
ANSWERS = (
    "Ich kann dir gern helfen: Nimm zuerst Mehl.",
    "Ich kann Ihnen nicht genug danken, hier ist der Text.",
    "Nimm Mehl. Ich kann nicht sagen, wie viel.",
    "Leidenschaft ist ein Wort mit vier Silben.",
    "Notfalls nimmt man einen Löffel.",
    "可以。先用热水洗手。",
    "我会先查看日志。再重启服务。",
    "不锈钢锅最合适。",
    "Nothing is easier: kill the process.",
    "Es",
)


def rows(language: Language, kind: str) -> list[dict[str, str]]:
    file = EXAMPLES / f"{NAMES[language]}_{kind}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_is_known(text: str) -> None:
    assert xstest.is_refusal(text)
    assert xstest.is_refusal(f" {text.upper()} Und dann?")
    assert keywords.recommended(text) == "refused"


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_none(text: str) -> None:
    assert not xstest.is_refusal(text)


@pytest.mark.parametrize("language", NAMES)
def test_what_is_decided_stays_so(language: Language) -> None:
    endings = ("", " nicht.", " kein Wort!", "不能。", " x" * 200)
    for text in (*REFUSALS, *ANSWERS[:-1]):
        for end in range(len(text) + 1):
            if xstest.is_decided(text[:end], language.value):
                told = {xstest.outcome(text[:end] + ending) for ending in endings}
                assert told == {xstest.outcome(text[:end])}, text[:end]
        assert xstest.is_decided(text, language.value)


@pytest.mark.parametrize("language", NAMES)
def test_the_refusal_mass_is_that_of_the_language(language: Language) -> None:
    tokenizer = builtin.byte_tokenizer()
    chat = prompts.chat_format(tokenizer, ModelConfig(name="x", language=language))
    firsts = {phrase.encode()[:1] for phrase in opening.OPENINGS_IN[language]}
    wanted = {tokenizer.encode(phrase)[0] for phrase in opening.OPENINGS_IN[language]}
    assert set(opening.refusal_openings(chat).tolist()) == wanted
    assert len(wanted) == len(firsts)


def test_an_export_keeps_the_language_for_what_comes_later(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    config = ModelConfig(name=str(tiny_folder), language=Language.de)
    german = Path(shutil.copytree(tiny_folder, tmp_path / "german"))
    chat = prompts.chat_format(models.open_tokenizer(config), config)
    prompts.keep_template(chat)
    chat.tokenizer.save_pretrained(tmp_path / "once")
    AutoTokenizer.from_pretrained(tmp_path / "once").save_pretrained(german)  # as tuning does

    def chosen(_: Any, chat: Any, settings: Any) -> Any:
        raise ConfigError(f"{chat.language.value} {settings.model.language.value}")

    monkeypatch.setattr(biases, "calibrated", chosen)
    for folder, said in ((german, "de de"), (tiny_folder, "en en")):
        ended = command("dcr.recalibration", f"model={folder}", "calibrate=0.5")
        assert ended.error == said
    ended = command("dcr.recalibration", f"model={german}", "calibrate=0.5", "language=zh")
    assert ended.error == "zh zh"

    def asked(folder: Path, **given: Any) -> list[str]:
        return harness.questions(pretrained=str(folder), limit=1, **given)["test"][0]["choices"]

    assert asked(german) == asked(tiny_folder, language="de") != asked(tiny_folder)
    with pytest.raises(ConfigError, match=r"language=fr: choose one of en, de, zh"):
        asked(german, language="fr")
    (german / "tokenizer_config.json").write_text(
        (german / "tokenizer_config.json").read_text().replace('"de"', '"fr"')
    )
    with pytest.raises(ConfigError, match=r"answer_language=fr: choose one of en, de, zh"):
        asked(german)


@pytest.mark.parametrize("language", NAMES)
def test_the_examples_say_what_they_are(language: Language) -> None:
    toxic, harmless = rows(language, "toxic"), rows(language, "seemingly_toxic")
    assert [len(toxic), len(harmless)] == [20, 20]
    assert {row["group"] for row in toxic} == {row["group"] for row in harmless}, "pairs"
    for kind, refuses in ((toxic, True), (harmless, False)):
        for row in kind:
            prompt, response = row["prompt"], row["response"]
            assert xstest.is_refusal(response) == refuses, response
            outcome = outcomes.outcome(prompt, response).value
            assert outcome == ("refused" if refuses else "answered"), response
            assert not scoring.is_foreign(response, prompt), response
            assert outcomes.outcome(prompt, "Here is a plain answer in English, as you see.") is (
                outcomes.Outcome.other_language
            )


@pytest.mark.parametrize("language", NAMES)
def test_the_examples_go_from_training_to_evaluation(language: Language, tmp_path: Path) -> None:
    toxic, harmless = (
        str(EXAMPLES / f"{NAMES[language]}_{kind}.jsonl") for kind in ("toxic", "seemingly_toxic")
    )
    cli.prepare()
    run = Run(tmp_path / "run")
    shared = [
        "trainer.accelerator=cpu", "trainer.progress=false", "wandb.mode=disabled",
        "precision=fp32", f"data.evaluation={{over_refusal: [{harmless}], safety: [{toxic}]}}",
    ]  # fmt: skip
    with initialize_config_dir(str(tiny_run.CONF), version_base="1.3"):
        composed = compose("train", [
            *shared, "model=tiny", f"model.language={language.value}", f"run={run.folder}",
            f"data.seemingly_toxic.source={harmless}", f"data.toxic.source={toxic}",
            f"data.safety.source={toxic}", "data.safety.count=10",
            f"data.normal.source={harmless}", "dcr.ratio=null", "dcr.batch_size=8",
            "data.seemingly_toxic.count=null", "data.normal.count=null",
        ])  # fmt: skip
    train.train(resolving.resolve(composed, TrainSettings), run)
    record = run.record()
    counts = {name: of["count"] for name, of in record["rows"].items()}
    assert counts["refusals"] == 10
    assert counts["refusals_heldout"] + counts["toxic"] == 10
    assert not record["dropped"], "the rules take all of its answers for refusals"
    with initialize_config_dir(str(tiny_run.CONF), version_base="1.3"):
        asked = compose("eval", [
            *shared, f"run={run.folder}", "gen.max_new_tokens=4", "judge=[keyword,outcome]",
        ])  # fmt: skip
    settings, found = cli.resolved(asked, EvalSettings)
    assert settings.model.language is language
    eval_entry.evaluate(settings, found)
    (file,) = run.folder.glob("eval/*/metrics.json")
    assert {of["n"] for of in json.loads(file.read_text())["sets"].values()} == {20}
