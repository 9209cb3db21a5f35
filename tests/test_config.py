"""Every shipped YAML, the paper's numbers and commands, and what becomes of random settings."""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from dcr import cli, resolving
from dcr.core import config, models
from dcr.core.config import ConfigError, LoraConfig, Method, ModelConfig, Stage
from dcr.core.config.training import ContrastiveConfig, NLLSource, TrainConfig, block_of
from dcr.core.text import label_of
from dcr.extensions import EvalSettings, TrainSettings
from dcr.resolving import settings_of
from dcr.tracking import TrackingConfig
from tests.tiny_run import CONF, composed

FILES = sorted(CONF.rglob("*.yaml"))


def train_config(*overrides: str) -> TrainConfig:
    return resolving.resolve(composed("train", *overrides), TrainSettings)


def block(found: TrainConfig) -> int:
    """ℓ of a command, with the depth from the model's facts and no weight read."""
    return block_of(found.dcr, models.facts(found.model).depth)


# --- every file ---


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_every_file_composes_and_resolves(path: Path) -> None:
    assert len(FILES) >= 15
    if path.parent == CONF:
        script, choice = path.stem, ["model=tiny"]
    elif path.parent.name == "steering":
        script, choice = "eval", ["model=tiny", f"steering={path.stem}"]
    else:
        script, choice = "train", [f"{path.parent.relative_to(CONF)}={path.stem}"]
    schema = {"train": TrainSettings, "eval": EvalSettings}[script]
    if schema is EvalSettings:
        choice.append("data=demo")
    found = resolving.resolve(composed(script, *choice), schema)
    assert isinstance(found, schema)
    if path.parent.name == "steering":
        assert isinstance(found, EvalSettings)
        assert found.steering.method == path.stem
    if isinstance(found, TrainConfig):
        assert 1 <= block(found) <= models.facts(found.model).depth
    if path.parent.name == "model":
        arrived = config.plain(found.model)
        for key, written in yaml.safe_load(path.read_text()).items():
            value = arrived[key]
            assert value == (float(written) if isinstance(value, float) else written), key


@pytest.mark.parametrize("path", sorted(CONF.glob("sweep/*.yaml")), ids=lambda path: path.stem)
def test_a_sweep_file_sets_parameters_of_the_sweep_alone(base: DictConfig, path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert set(content) == {"hydra"}
    assert set(content["hydra"]) == {"sweeper"}
    assert set(content["hydra"]["sweeper"]) == {"params"}
    assert composed("train", "model=tiny", f"sweep={path.stem}") == base
    for key, values in content["hydra"]["sweeper"]["params"].items():
        for value in str(values).split(","):
            resolved(base, {key: value})


# --- the paper's commands and numbers ---


def test_any_model_with_the_papers_data(tiny_folder: Path, tmp_path: Path) -> None:
    named = [f"model.name={tiny_folder}", "data=paper", f"data.root={tmp_path}"]
    found = train_config(*named, "data.toxic.source=stl_safety")
    assert (block(found), found.data.toxic.source) == (1, ["stl_safety"])  # 14/30 of two blocks


@pytest.mark.parametrize(
    ("model", "layer", "epochs", "sft_epochs"),
    [("qwen2_5_1_5b", 13, 3, 3), ("qwen2_5_7b", 13, 2, 4), ("llama3_8b", 15, 3, 4)],
)
def test_the_papers_numbers(model: str, layer: int, epochs: int, sft_epochs: int) -> None:
    found = train_config(f"model={model}", "data=paper")
    dcr, sft = found.dcr, found.sft
    assert (dcr.layer, dcr.epochs, sft.epochs) == (layer, epochs, sft_epochs)
    assert (dcr.margin, dcr.scale, dcr.ratio, dcr.batch_size) == (0.25, 16.0, 2.0, 32)
    assert (dcr.nll.weight, dcr.nll.source) == (0.001, NLLSource.prompt_tokens)
    assert (dcr.optim.lr, sft.lr, sft.batch_size, sft.warmup) == (1e-4, 1e-4, 128, 0.03)
    lora = LoraConfig(rank=8, alpha=32, dropout=0.05, targets=["q_proj", "v_proj"])
    assert sft.lora == lora
    assert found.data.seemingly_toxic.count == 250
    assert (found.data.normal.count, found.data.safety.count) == (20000, 1000)
    assert found.preset_name == "paper"


# --- how nodes hang together ---


def test_stage_numbers_follow_the_model_until_told_otherwise() -> None:
    assert block(train_config()) == 14
    same = ("model=llama3_8b", "model.name=meta-llama/Meta-Llama-3-8B")  # keeps its numbers
    assert block(train_config(*same)) == 15
    assert train_config("model.layer=7", "model.epochs=4").dcr.layer == 7
    found = train_config("model=llama3_8b", "dcr.layer=9", "dcr.epochs=1", "sft.lr=1e-5")
    assert (found.dcr.layer, found.dcr.epochs, found.sft.lr) == (9, 1, 1e-5)
    assert (found.model.layer, found.model.epochs, found.sft.epochs) == (15, 3, 4)
    assert train_config("preset=paper") == train_config("~preset"), "the paper's are the defaults"


def test_another_model_leaves_the_files_numbers_behind() -> None:
    found = train_config("model.name=/some/other-model", "model.revision=abc")
    assert found.model == ModelConfig(
        name="/some/other-model", label="other-model", revision="abc", epochs=3, sft_epochs=3
    )
    assert (found.dcr.epochs, found.sft.epochs, found.sft.lr) == (3, 3, 1e-4)
    assert (found.sft.batch_size, found.sft.lora.targets) == (128, ["q_proj", "v_proj"])
    blocks = {28: 13, 32: 15, 30: 14, 24: 11, 2: 1, 1: 1}  # 13/28 and 15/32 are the paper's
    assert {depth: block_of(found.dcr, depth) for depth in blocks} == blocks
    assert abs(found.dcr.depth - (13 / 28 + 15 / 32) / 2) < 1e-3


COPY = {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 128256}


def test_a_copy_of_a_model_keeps_its_numbers(tmp_path: Path) -> None:
    """The architecture decides, as a folder's config.json has it; the folder's name is its own."""
    (tmp_path / "config.json").write_text(json.dumps(COPY))
    named = train_config("model=llama3_8b").model
    found = train_config("model=llama3_8b", f"model.name={tmp_path}")
    name = {"name": str(tmp_path), "numbers_for": str(tmp_path), "label": label_of(str(tmp_path))}
    assert found.model == replace(named, **name, architecture=None)
    assert (found.sft.epochs, found.model.template, found.model.scans_alpha) == (4, "llama3", 0.1)
    # as eval.py does with the run's own config.yaml
    again = OmegaConf.create(config.plain(found))
    assert isinstance(again, DictConfig)
    assert resolving.resolve(again, TrainSettings).model == found.model
    told = ("model=llama3_8b", f"model.name={tmp_path}", "steering=surgical", "data=demo")
    surgical = resolving.resolve(composed("eval", *told), EvalSettings).steering.surgical
    assert (surgical.add, surgical.ablate) == (0.5, 0.3)


@pytest.mark.parametrize("change", [{"hidden_size": 2048}, {"model_type": "qwen2"}, None])
def test_numbers_left_behind_are_named_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any] | None
) -> None:
    if change is not None:
        (tmp_path / "config.json").write_text(json.dumps(COPY | change))
    found = train_config("model=llama3_8b", f"model.name={tmp_path}")
    assert (found.sft.epochs, found.model.template, found.dcr.layer) == (3, None, None)
    (line,) = caplog.messages
    for part in ("layer=15", "sft_epochs=4", "template=llama3", "scans_alpha=0.1", "surgical_add"):
        assert part in line
    reason = next(iter(change)) if change else "no folder with a config.json"
    assert reason in line


def test_what_the_user_sets_survives_another_model() -> None:
    found = train_config("model.name=other", "dcr.layer=5", "sft.lr=3e-4", "sft.lora.targets=[x]")
    assert (found.dcr.layer, found.sft.lr, found.sft.lora.targets) == (5, 3e-4, ["x"])
    told = ["model.name=other", "model.template=llama3", "model.sft_epochs=7"]
    found = resolving.resolve(cli.compose("train", told), TrainSettings)
    assert (found.model.template, found.sft.epochs, found.dcr.layer) == ("llama3", 7, None)


def test_recommended_sets_what_it_says() -> None:
    found = train_config("preset=recommended")
    assert (found.preset_name, found.method.value) == ("recommended", "stl")
    assert train_config("preset=recommended", "method=dcr").method.value == "dcr"
    both = [train_config("preset=recommended", *more).data for more in ((), ("data=paper",))]
    for kind in ("toxic", "seemingly_toxic"):
        named = [getattr(node, kind).source for node in both]
        assert named == [[f"contrasts_{kind}", f"demo_{kind}"]] * 2
        evaluated = {*both[1].evaluation.over_refusal, *both[1].evaluation.safety}
        assert not evaluated & set(named[1]), "trained on what it is tested on"
    assert (found.data.seemingly_toxic.count, found.data.group_holdout) == (None, 0.1)
    assert (found.dcr.ratio, found.dcr.epochs) == (None, 4)
    assert found.dcr.nll.source is NLLSource.general
    assert (found.dcr.layer, block(found)) == (None, 18)  # 0.6 of 30
    assert train_config("preset=recommended", "dcr.layer=4", "dcr.epochs=1").dcr.layer == 4


def test_keys_of_ones_own_need_no_plus() -> None:
    words = ["model=tiny", "model.template_variables={enable_thinking: false}"]
    given = train_config(*words, "model.template_variables.effort=low").model.template_variables
    assert given == {"enable_thinking": False, "effort": "low"}
    asked = composed("eval", *words, "llm.parameters.top_p=1", "endpoint_parameters={top_k: 2}")
    assert (asked.llm.parameters.top_p, asked.endpoint_parameters.top_k) == (1, 2)
    with pytest.raises(Exception, match=r"Could not override 'llm\.parametrs"):
        composed("eval", "model=tiny", "llm.parametrs.top_p=1")


def test_blocks_are_counted_from_one() -> None:
    assert [block_of(ContrastiveConfig(layer=layer), 2) for layer in (1, 2)] == [1, 2]
    for layer in (-1, 0, 3):
        with pytest.raises(ConfigError, match=f"dcr.layer={layer}: the model has blocks 1 to 2"):
            block_of(ContrastiveConfig(layer=layer), 2)


def test_a_resolved_configuration_is_plain() -> None:
    found = train_config()
    assert (found.method, found.stage) == (Method.dcr, Stage.all)
    again: Any = OmegaConf.create(yaml.safe_dump(config.plain(found)))
    assert resolving.resolve(again, TrainSettings) == found


# --- ranges: what is refused, and the nearest values that are not ---

RANGES = {
    "dcr.margin": (["0", "1", "nan", "inf"], ["1e-6", "0.999"]),
    "dcr.scale": (["0", "inf"], ["1e-3", "512"]),
    "dcr.epochs": (["0"], ["1", "100"]),
    "sft.epochs": (["0", "???"], ["1"]),
    "dcr.optim.lr": (["0", "nan", "inf"], ["1e-9", "1"]),
    "sft.lr": (["0", "1e38"], ["1e-9"]),
    "dcr.nll.weight": (["-1e-9", "inf"], ["0", "10"]),
    "dcr.ratio": (["0", "inf", "1e308"], ["0.5", "5"]),
    "dcr.batch_size": (["2", "-2"], ["3", "1024"]),
    "dcr.layer": (["-1"], ["1"]),
    "dcr.depth": (["0", "1.01"], ["0.01", "1"]),
    "sft.warmup": (["1", "-0.01"], ["0", "0.99"]),
    "sft.lora.rank": (["0"], ["1"]),
    "sft.lora.dropout": (["1", "-0.1"], ["0"]),
    "data.normal.count": (["0"], ["1"]),
    "data.near_duplicate": (["0", "1.1"], ["1"]),
    "data.group_holdout": (["1", "-0.1"], ["0"]),
    "seed": (["-1", str(2**32)], ["0", str(2**32 - 1)]),
    "tracking.snapshots": (["-1"], ["0"]),
    "trainer.devices": (["0"], ["1", "8"]),
    "trainer.threads": (["100000"], ["1"]),
    "wandb.project": (["a/b", ""], ["a.b-c_1"]),
    "model.label": ([".nan", "../x"], ["a"]),
    "sft.lora.targets": ([[["a"]]], [["a"]]),
    "data.toxic.source": ([3, None, [], ["a", 3], {"a": "b"}], [["harmfulqa", "stl_safety"]]),
}


@pytest.fixture(scope="module")
def base() -> DictConfig:
    return composed("train", "model=tiny")


def resolved(base: DictConfig, values: Mapping[str, object]) -> TrainConfig:
    node = copy.deepcopy(base)
    for key, value in values.items():
        OmegaConf.update(node, key, value)
    return resolving.resolve(node, TrainSettings)


@pytest.mark.parametrize("key", RANGES)
def test_what_is_out_of_range_is_refused(base: DictConfig, key: str) -> None:
    for value in RANGES[key][0]:
        with pytest.raises(ConfigError, match=rf"^{key}=[^:]*: \S"):
            resolved(base, {key: value})


def test_ends_of_ranges_are_settings(base: DictConfig) -> None:
    for place in (0, -1):
        found = resolved(base, {key: values[1][place] for key, values in RANGES.items()})
        assert config.plain(found)["dcr"]["depth"] == (0.01, 1)[place]
        assert found.data.toxic.source == ["harmfulqa", "stl_safety"]


# --- every setting is one that something reads ---


NOT_BY_THAT_NAME = {
    "model.numbers_for": "by key, before there are dataclasses",
    "preset_name": "from config.yaml, by the report",
}


def test_every_setting_is_read_somewhere() -> None:
    """By code that is not the schema or its checks, or by another setting."""
    package = CONF.parent / "dcr"
    schema = [file for file in (package / "core/config").glob("*.py") if file.stem != "resolving"]
    code = "".join(file.read_text() for file in package.rglob("*.py") if file not in schema)
    files = "".join(file.read_text() for file in [*schema, *FILES])
    interpolated = re.findall(r'II\("([\w.]+)"\)|\$\{([\w.]+)\}', files)
    names = {*re.findall(r"\.(\w+)", code), *("".join(k).split(".")[-1] for k in interpolated)}
    every = (*vars(EvalSettings()).items(), *vars(TrainSettings()).items())
    by_class = {f"node({type(node).__name__})": key for key, node in every}
    names |= {key for asked, key in by_class.items() if asked in code}
    paths = {path for schema in (TrainSettings, EvalSettings) for path, _ in settings_of(schema())}
    assert len(paths) > 150
    assert {path for path in paths if path.split(".")[-1] not in names} <= set(NOT_BY_THAT_NAME)


def test_a_node_that_the_schema_lacks_is_named() -> None:
    with pytest.raises(LookupError, match="EvalSettings has no node of type TrackingConfig"):
        EvalSettings().node(TrackingConfig)
