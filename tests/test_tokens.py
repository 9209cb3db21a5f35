"""Tokens, architecture and parameters read from files alone, against transformers and torch's."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config

from dcr import blueprint, cost, tokens
from dcr.core import cli, config, models, prompts, sources
from dcr.core.config import ModelConfig, Stage, TrainConfig
from dcr.core.prompts import ChatFormat

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
ODD_PROMPTS = ("", " \n x ", "<|im_end|>ünï", "a<|im_start|>system\nb", "\u200b日本")


def folder_of(place: Path, shape: Any) -> Path:
    shape.save_pretrained(place)
    models.byte_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(params=["embedded", "llama", "qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "embedded":
        return models.embedded_folder()
    family = LlamaConfig if request.param == "llama" else Qwen2Config
    return folder_of(tmp_path, family(**SIZES))


@pytest.mark.parametrize("template", [None, "chatml", "llama3", "plain"])
def test_prompts_and_pairs_are_the_same_tokens(folder: Path, template: str | None) -> None:
    told = ModelConfig(name=str(folder), template=template, system_prompt="Be kind.")
    read: Any = tokens.read(folder)
    whole = models.open_tokenizer(told)
    assert len(read) == len(whole)
    ours, theirs = (prompts.chat_format(each, told) for each in (read, whole))
    facts = ("template", "terminator", "stop")
    assert [getattr(ours, f) for f in facts] == [getattr(theirs, f) for f in facts]
    rows = sources.read("demo_normal", kind=config.Kind.normal)[:40]
    for row in rows:
        pair = (row.prompt, row.response or "")
        assert ours.pair(*pair, 64) == theirs.pair(*pair, 64)
    for words in (*ODD_PROMPTS, *(row.prompt for row in rows)):
        assert ours.prompt_ids(words) == theirs.prompt_ids(words)


def test_the_byte_tokenizer_is_the_same() -> None:
    told = ModelConfig(name="tiny")
    light: Any = tokens.byte_level()
    ours: ChatFormat = prompts.chat_format(light, told)
    theirs = prompts.chat_format(models.byte_tokenizer(), told)
    for words in ODD_PROMPTS:
        assert ours.prompt_ids(words) == theirs.prompt_ids(words)
        assert ours.pair("x", words, 50) == theirs.pair("x", words, 50)
    assert light.pad_token_id == models.byte_tokenizer().pad_token_id


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"add_bos_token": True},
        {"eos_token": "<|new|>"},
        {"extra_special_tokens": ["<|new|>"]},
    ],
)
def test_a_tokenizer_that_transformers_changes_is_left_to_it(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    file = folder_of(tmp_path, LlamaConfig(**SIZES)) / "tokenizer_config.json"
    assert tokens.read(tmp_path) is not None
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert tokens.read(tmp_path) is None


def test_a_template_with_words_of_transformers_own_is_left_to_it(tmp_path: Path) -> None:
    folder_of(tmp_path, LlamaConfig(**SIZES))
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%d') }}{{ messages }}")
    assert tokens.read(tmp_path) is None


# --- architecture -------------------------------------------------------------------------------


def settings(*overrides: str) -> TrainConfig:
    return config.resolve(cli.compose("train", ["precision=bf16", *overrides]), TrainConfig)


def both(told: TrainConfig, stage: Stage, patch: pytest.MonkeyPatch) -> tuple[cost.Shape, ...]:
    """By arithmetic, and of a model on torch's meta device."""
    assert blueprint.read(told.model) is not None
    counted = cost.stage_shape(told, stage)
    patch.setattr(blueprint, "read", lambda _: None)
    return counted, cost.stage_shape(told, stage)


FAMILIES = sorted(file.stem for file in (cli.CONF / "model").glob("*.yaml"))


@pytest.mark.parametrize("stage", list(Stage)[1:])
@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_those_of_the_meta_model(
    name: str, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, built = both(settings(f"model={name}"), stage, monkeypatch)
    assert counted.full_saved == pytest.approx(built.full_saved)
    assert counted.trunk_saved == pytest.approx(built.trunk_saved)
    assert {**vars(counted), "full_saved": 0, "trunk_saved": 0} == {
        **vars(built), "full_saved": 0, "trunk_saved": 0
    }  # fmt: skip
    assert list(counted.parts) == list(built.parts)  # the order of the table


@pytest.mark.parametrize(
    ("shape", "stage", "asked"),
    [
        (LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=16), "contrastive", []),
        (LlamaConfig(**SIZES, tie_word_embeddings=True), "contrastive", ["dcr.layer=3"]),
        (Qwen2Config(**SIZES), "contrastive", ["dcr.train_embeddings=true"]),
        (Qwen2Config(**SIZES), "contrastive", ["dcr.adapter=lora"]),
        (Qwen2Config(**SIZES), "sft", ["sft.lora.targets=[o_proj,up_proj]", "sft.lora.rank=3"]),
    ],
)  # fmt: skip
def test_so_they_are_whatever_is_asked(
    shape: Any, stage: str, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = settings(f"model.name={folder_of(tmp_path, shape)}", "dcr.layer=2", *asked)
    counted, built = both(told, Stage(stage), monkeypatch)
    assert counted.parts == built.parts
    assert counted.trained == built.trained
    assert counted.trunk_saved == pytest.approx(built.trunk_saved)
    assert counted.full_saved == pytest.approx(built.full_saved)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gemma"},
        {"hidden_size": 2**30},
        {"num_key_value_heads": 3},
        {"quantization_config": {"bits": 4}},
        {"attn_implementation": "someone/kernel"},
        {"rope_parameters": {"rope_type": "llama3"}},
        {"tie_word_embeddings": None},
        {"pad_token_id": 300},
    ],
)
def test_anything_unusual_is_left_to_transformers(tmp_path: Path, change: dict[str, Any]) -> None:
    file = folder_of(tmp_path, LlamaConfig(**SIZES)) / "config.json"
    told = ModelConfig(name=str(tmp_path))
    assert blueprint.read(told) is not None
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert blueprint.read(told) is None
