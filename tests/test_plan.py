"""plan=true against published parameter counts, the paper's step counts and measured tensors."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dcr import builtin, cli, plan, resolving
from dcr import train as training_script
from dcr.core import data, machine, models
from dcr.core.config import ConfigError, DataError, Kind, LoraConfig, Method, Precision, Stage
from dcr.core.config.training import TrainConfig
from dcr.core.data.rows import pair_batch, prompt_batch
from dcr.core.models import structure
from dcr.core.models.training import freeze_beyond
from dcr.core.runs import Run
from dcr.core.sources import Example
from dcr.extensions import TrainSettings
from dcr.fast import packing
from dcr.plan import cost
from tests.tiny_run import changed

PUBLISHED = {
    "smollm2_135m": 134_515_008,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_7b": 7_615_616_512,
    "llama3_8b": 8_030_261_248,
}


PAPER = "dcr.precision=mixed", "sft.precision=bf16"  # what auto is follows the processor


def settings(*overrides: str) -> TrainConfig:
    told = ["trainer.accelerator=cpu", "trainer.threads=1", *PAPER, *overrides]
    return resolving.resolve(cli.compose("train", told), TrainSettings)


def stage(told: TrainConfig, which: Stage) -> plan.StagePlan:
    drawn = data.rows_of(told)
    return plan.stage_plan(told, which, cost.stage_shape(told, which), drawn)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model as a folder: what `model.name=<folder>` opens."""
    folder = tmp_path_factory.mktemp("base")
    model = AutoModelForCausalLM.from_config(_architecture(), dtype=torch.float32)
    model.save_pretrained(folder)
    builtin.byte_tokenizer().save_pretrained(folder)
    return folder


def _architecture(width: int = 32, vocabulary: int = 260) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan loaded weights")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.setattr(models, "open_policy", refuse)


# --- parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_parts_add_up_to_the_published_count(name: str) -> None:
    told = settings(f"model={name}")
    for which in (Stage.contrastive, Stage.sft):
        parts = cost.stage_shape(told, which).parts
        assert sum(n for part, n in parts.items() if part != "LoRA") == PUBLISHED[name]


def test_parts_of_qwen_by_hand() -> None:
    made = cost.stage_shape(settings("model=qwen2_5_1_5b"), Stage.contrastive)
    width, kv, inner = 1536, 256, 8960
    block = 2 * width * width + 2 * width * kv + width + 2 * kv + 3 * width * inner + 2 * width
    assert made.parts == {
        "embeddings": 151936 * width,
        "blocks 1 to 13": 13 * block,
        "blocks 14 to 28": 15 * block,
        "final norm": width,
        "head": 0,
    }
    # tied embeddings are frozen: training them would change the head, which belongs to the tail
    assert made.tied
    assert {part for part, n in made.trained.items() if n} == {"blocks 1 to 13"}


def test_lora_parameters_are_rank_times_rows_and_columns() -> None:
    made = cost.stage_shape(settings("model=qwen2_5_7b"), Stage.sft)
    # q: 3584 to 3584, v: 3584 to 512, rank 8, 28 blocks
    assert made.parts["LoRA"] == 28 * 8 * ((3584 + 3584) + (3584 + 512))
    assert sum(made.trained.values()) == made.parts["LoRA"]


def test_lora_in_stage_one_stays_below_the_block(local: Path) -> None:
    told = settings(f"model.name={local}", "dcr.adapter=lora", "dcr.layer=1")
    four_blocks = cost.stage_shape(told, Stage.sft).parts["LoRA"]
    assert cost.stage_shape(told, Stage.contrastive).parts["LoRA"] * 4 == four_blocks


@pytest.mark.parametrize(
    ("name", "without", "with_them"),
    [("qwen2_5_1_5b", 13, 16), ("qwen2_5_7b", 67, 73), ("llama3_8b", 71, 78)],
)
def test_fp32_states_of_stage_one(name: str, without: int, with_them: int) -> None:
    """Gigabytes of weights, gradients and Adam states, without and with trained embeddings."""
    for train, expected in ((False, without), (True, with_them)):
        told = settings(f"model={name}", "dcr.precision=fp32", f"dcr.train_embeddings={train}")
        made = cost.stage_shape(told, Stage.contrastive)
        nothing = cost.Load(0, 0, 0, 0, 0, 0, 0)
        found = cost.memory(told, Stage.contrastive, made, nothing)
        states = found["weights"] + found["gradients"] + found["Adam states"]
        assert states / 1e9 == pytest.approx(expected, abs=0.7)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (["dcr.layer=29"], "dcr.layer=29: the model has blocks 1 to 28"),
        (["sft.readout.blocks=29", "sft.readout.steps=9"], "sft.readout.blocks=29: the model has"),
    ],
)
def test_blocks_beyond_the_depth_are_refused(told: list[str], says: str) -> None:
    asked = settings("model=qwen2_5_1_5b", *told)
    for refusing in (
        plan.describe,
        lambda asked: training_script.checked(asked, Run(Path("none"))),
    ):
        with pytest.raises(ConfigError, match=says):
            refusing(asked)


# --- rows and steps -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "which", "steps"),
    [
        ("1_5b", Stage.contrastive, (24, 72, 0)),  # 750 rows, 32 a step, 3 epochs
        ("7b", Stage.contrastive, (24, 48, 0)),
        ("7b", Stage.sft, (165, 660, 20)),  # 21,000 rows, 128 a step, 4 epochs, 3% warm-up
    ],
)
def test_steps_of_the_paper(
    name: str, which: Stage, steps: tuple[int, int, int], no_weights: None
) -> None:
    told = settings(f"model=qwen2_5_{name}", "data=paper")
    counts = {Kind.seemingly_toxic: 250, Kind.toxic: 500, Kind.normal: 20_000}
    rows = {k: [Example(f"{k}{i}", "x", k, "s", "y") for i in range(n)] for k, n in counts.items()}
    drawn = data.Splits(
        seemingly_toxic=rows[Kind.seemingly_toxic],
        toxic=rows[Kind.toxic],
        normal=rows[Kind.normal],
        refusals=rows[Kind.toxic] * 2,
    )
    made = plan.stage_plan(told, which, cost.stage_shape(told, which), drawn)
    assert (made.steps_per_epoch, made.steps, made.warmup) == steps


def test_rows_and_steps_are_those_of_training(local: Path, no_weights: None) -> None:
    told = settings(f"model.name={local}", "dcr.ratio=3", "dcr.epochs=2", "sft.batch_size=7")
    drawn = data.rows_of(told)
    assert (len(drawn.seemingly_toxic), len(drawn.toxic)) == (40, 120)
    assert stage(told, Stage.contrastive).steps == 2 * math.ceil(160 / 32)
    pairs = len(drawn.normal) + len(drawn.refusals)
    assert stage(told, Stage.sft).steps_per_epoch == math.ceil(pairs / 7)


def test_tokens_of_the_nlls_own_pairs_are_counted(tiny: TrainConfig, tmp_path: Path) -> None:
    told, run = (
        changed(tiny, "dcr.nll.source=general", "dcr.epochs=1", "stage=contrastive"),
        tmp_path,
    )
    training_script.train(told, Run(run))
    found = json.loads((run / "contrastive.cost.json").read_text())["tokens"]
    assert found == stage(told, Stage.contrastive).load.unpadded


def test_a_prompt_that_training_refuses_is_refused(local: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "a" * 5000}))
    told = settings(f"model.name={local}", f"data.toxic.source=[demo_toxic,{long}]")
    with pytest.raises(DataError, match=r"long\.jsonl: long-1: .* exceed the model's context of"):
        plan.describe(replace(told, dcr=replace(told.dcr, ratio=None)))
    with pytest.raises(ConfigError, match=r"sft\.max_len=5000: the model's context is 4096 tokens"):
        plan.describe(settings(f"model.name={local}", "sft.max_len=5000"))


def test_tokens_of_a_local_folder_are_counted(local: Path) -> None:
    told = settings(f"model.name={local}", "sft.batch_size=9", "sft.max_len=4000")
    drawn = data.rows_of(told)
    load = stage(told, Stage.sft).load
    answers = [r.response.strip() for r in [*drawn.normal, *drawn.refusals] if r.response]
    assert load.labelled == sum(len(a.encode()) + 1 for a in answers)  # bytes and the end token
    assert load.unpadded <= load.full
    assert load.largest_full <= max(told.sft.micro_tokens, 4000)


@pytest.mark.parametrize("which", [Stage.contrastive, Stage.sft])
def test_tokens_computed_here_are_those_that_passes_lay_out(local: Path, which: Stage) -> None:
    told = settings(f"model.name={local}", "sft.lora.dropout=0", "sft.max_len=4000")
    made, (batches, prefix) = (
        stage(told, which),
        plan.batches_of(told, which, data.rows_of(told)),
    )
    backbone = structure.backbone(AutoModelForCausalLM.from_pretrained(local))
    packs, found = packing.packs(backbone, torch.device("cpu")), []
    for places in batches.sampler:
        if which is Stage.sft:
            groups = batches.sft_step([batches.pairs[place] for place in places])
            passes: list[Any] = [pair_batch(group, batches.pad) for group in groups]
        else:
            rows, _ = batches.contrastive_step([batches.prompts[place] for place in places])
            passes = [prompt_batch(rows, batches.pad)]
        laid_out = [packing.laid_out(backbone, made.ids, made.mask, packs) for made in passes]
        found += [layout.inputs["input_ids"].numel() for layout in laid_out]
    assert (made.here.full, made.here.largest_full) == (sum(found), max(found))
    assert made.here.full < made.load.unpadded < made.load.full
    dropping = replace(told, sft=replace(told.sft, lora=LoraConfig(dropout=0.1)))
    shared = 0 if which is Stage.sft else prefix
    here = plan.load_of(dropping, batches, prefix)
    assert (here.full == here.unpadded) == (shared == 0)
    node = "sft" if which is Stage.sft else "dcr"
    spared = settings(f"model.name={local}", f"{node}.gradient_checkpointing=true")
    assert not cost.packs(spared, which)


def test_estimated_tokens_are_a_quarter_of_the_characters() -> None:
    told = settings("model=llama3_8b", "sft.max_len=4000")
    drawn = data.rows_of(told)
    answers = [r.response or "" for r in [*drawn.normal, *drawn.refusals]]
    expected = sum(math.ceil(len(answer) / 4) + 1 for answer in answers)
    assert stage(told, Stage.sft).load.labelled == expected


def test_no_step_beyond_the_block_without_nll(local: Path) -> None:
    load = stage(settings(f"model.name={local}", "dcr.nll.weight=0"), Stage.contrastive).load
    assert (load.full, load.labelled) == (0, 0)
    assert load.trunk > 0


# --- cost ---------------------------------------------------------------------------------------


def _trained(told: TrainConfig, which: Stage, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_config(models.architecture(told.model), dtype=dtype)
    if which is Stage.contrastive:
        freeze_beyond(model, told.dcr.layer or 1, None)
        return model.train()
    return structure.add_lora(model, LoraConfig(targets=["all-linear"]), seed=0).train()


@pytest.fixture
def wide(tmp_path: Path) -> TrainConfig:
    """Wide enough that matrices outweigh norms and attention."""
    _architecture(width=256).save_pretrained(tmp_path)
    builtin.byte_tokenizer().save_pretrained(tmp_path)
    return settings(f"model.name={tmp_path}", "dcr.layer=3", "sft.lora.targets=[all-linear]")


@pytest.mark.parametrize("precision", list(structure.DTYPES))
@pytest.mark.parametrize("which", [Stage.contrastive, Stage.sft])
def test_activations_are_what_autograd_keeps(
    wide: TrainConfig, which: Stage, precision: Precision
) -> None:
    wide.dcr.precision = wide.sft.precision = precision
    model = _trained(wide, which, structure.DTYPES[precision])
    ids = torch.zeros(6, 50, dtype=torch.long)
    weights = {tuple(w.shape) for w in model.parameters()}
    weights |= {size[::-1] for size in weights}  # autocast's copies are counted with the weights
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision is not Precision.fp32),
    ):
        structure.backbone(model)(input_ids=ids, use_cache=False)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    made = cost.stage_shape(wide, which)
    assert ids.numel() * made.full_saved == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("which", [Stage.contrastive, Stage.sft])
def test_flops_are_those_that_torch_counts(wide: TrainConfig, which: Stage) -> None:
    model = _trained(wide, which, torch.float32)
    ids = torch.zeros(6, 20, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        hidden = structure.backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        hidden.sum().backward()
    load = cost.Load(0, ids.numel(), ids.numel(), 0, 0, ids.numel(), 0)
    found = cost.epoch_flops(wide, which, cost.stage_shape(wide, which), load)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_checkpointing_trades_activations_for_time(local: Path) -> None:
    plain = stage(settings(f"model.name={local}"), Stage.sft)
    spared = stage(settings(f"model.name={local}", "sft.gradient_checkpointing=true"), Stage.sft)
    assert spared.memory["activations"] < plain.memory["activations"] / 2
    assert 1.2 < spared.flops / plain.flops < 1.5


# --- the text -----------------------------------------------------------------------------------


def test_a_plan_says_what_it_estimates(no_weights: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "timed_product", lambda *_: 5e10)  # no test times this machine
    told = plan.describe(settings("model=llama3_8b", "stage=contrastive"))
    assert "8,030,261,248" in told
    assert "estimated at 4 characters a token" in told
    assert max(map(len, told.splitlines())) <= 100
    assert "\x1b" not in told


@pytest.mark.parametrize("method", list(Method))
def test_the_plan_of_a_method_is_of_the_stages_it_trains(
    local: Path, method: Method, no_weights: None
) -> None:
    told = plan.describe(settings(f"model.name={local}", f"method={method.value}"))
    chain = {"dcr": "contrastive then sft", "stl": "sft", "stl_aug": "sft"}[method.value]
    assert told.startswith(f"Plan: method={method.value} ({chain}) on ")
    assert ("contrastive" in told.replace(str(local), "")) == (method is Method.dcr)
    assert "characters a token" not in told


def test_the_readout_warms_up_and_all_stages_stand_in_one_row(
    local: Path, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at the machine's load finds another number of threads each time."""
    numbers = itertools.count(1)
    monkeypatch.setattr(machine, "chosen_threads", lambda _: (next(numbers), ""))
    monkeypatch.setattr(cost, "timed_product", lambda *_: 5e10)
    cost._threads.cache_clear()
    asked = settings(f"model.name={local}", "sft.readout.steps=40", "trainer.threads=null")
    lines = [line.split() for line in plan.describe(asked).splitlines()]
    (warm,) = (line for line in lines if line[:3] == ["of", "them", "warm-up"])
    assert warm[-1] == "2"
    here = [line for line in lines if line[:4] == ["time", "on", "this", "CPU,"]]
    assert len(here) == 1
    cost._threads.cache_clear()


def test_a_finished_stage_is_said_to_be_skipped(local: Path, tmp_path: Path) -> None:
    (tmp_path / "contrastive").mkdir()
    told = plan.describe(settings(f"model.name={local}", f"run={tmp_path}"))
    assert "contrastive is done" in told
    assert "sft is done" not in told


def test_a_run_that_training_refuses_to_go_on_with_is_refused(
    tiny: TrainConfig, whole: Path, half: Path
) -> None:
    assert "sft is done" in plan.describe(replace(tiny, run=str(whole)))
    with pytest.raises(
        ConfigError, match=r"another configuration \(dcr.epochs: 2 -> 3\); sft is d"
    ):
        plan.describe(changed(tiny, f"run={whole}", "dcr.epochs=3"))
    rows = (half / "rows.json").read_text()
    (half / "rows.json").write_text(rows.replace('"count": 20', '"count": 19'))
    with pytest.raises(ConfigError, match=r"made with other rows \(normal: 19 rows"):
        plan.describe(replace(tiny, run=str(half)))
