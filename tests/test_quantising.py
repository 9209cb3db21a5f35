"""Weights in four bits: their numbers against NF4's table, their passes against plain layers."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from dcr import cli, continuing, export, plan, quantising, resolving, train
from dcr import eval as evaluation
from dcr.core import data, learning, models
from dcr.core.config import ConfigError, LoraConfig, Precision, Quantization, Stage
from dcr.core.config.training import stages_of
from dcr.core.models import folders, structure
from dcr.core.runs import Run
from dcr.core.training.stages import SFTModule
from dcr.extensions import EvalSettings, TrainSettings
from dcr.fast.passes import Fast
from dcr.plan import cost
from tests import tiny_run

ROOT = Path(__file__).parent.parent
needed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="pip install '.[memory]' brings it"
)
# The sixteen levels of NF4, from appendix E of QLoRA (arXiv 2305.14314).
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
WIDE = [f"model.architecture.{key}={size}" for key, size in (
    ("hidden_size", 64), ("intermediate_size", 128), ("head_dim", 16)
)]  # fmt: skip
NARROW = (*WIDE, "model.quantization=nf4", "dcr.adapter=lora")


def model(width: int = 64, dtype: torch.dtype = torch.float32) -> Any:
    shape = LlamaConfig(
        vocab_size=260,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shape, dtype=dtype).eval()


def narrowed(precision: Precision = Precision.fp32, dtype: torch.dtype = torch.float32) -> Any:
    made = model(dtype=dtype)
    quantising.quantise(made, precision)
    return made


def numbers(of: Any) -> dict[str, Tensor]:
    """The fp32 weights that each layer in four bits stands for, by its name."""
    named = structure.decoder_blocks(of).named_modules()
    return {n: quantising.weight_of(m).float() for n, m in named if hasattr(m, "quant_state")}


def by_table(weight: Tensor) -> Tensor:
    """Each weight's nearest level of NF4, by the largest absolute weight of its 64."""
    blocks = weight.float().view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(LEVELS)
    nearest = ((blocks / scale)[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * scale).view(weight.shape)


@needed
def test_four_bits_are_the_nearest_levels_of_nf4() -> None:
    whole, found = model(), numbers(narrowed())
    layers: dict[str, Any] = dict(structure.decoder_blocks(whole).named_modules())
    plain = {name: layers[name].weight for name in found}
    assert len(found) == 2 * 7, "every linear layer of both blocks"
    for name, weight in found.items():
        nearest = by_table(plain[name])
        # scales are themselves in eight bits, so a few weights between two levels go either way
        close = (weight - nearest).abs() <= 0.02 * plain[name].abs().max()
        assert close.float().mean() > 0.99, name
        assert (weight - plain[name]).norm() / plain[name].norm() < 0.12, name


@needed
@pytest.mark.parametrize("precision", [Precision.mixed, Precision.bf16])
def test_the_numbers_follow_from_the_file_and_not_from_the_precision(precision: Precision) -> None:
    exact, other = narrowed(), narrowed(precision)
    assert other.get_input_embeddings().weight.dtype == structure.DTYPES[precision]
    codes = [[p for p in each.parameters() if p.dtype is torch.uint8] for each in (exact, other)]
    assert len(codes[0]) == 2 * 7
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))
    rounded = {name: weight.bfloat16().float() for name, weight in numbers(exact).items()}
    for name, weight in numbers(other).items():
        torch.testing.assert_close(weight, rounded[name], rtol=2**-8, atol=0)


@needed
@pytest.mark.parametrize("fast", [True, False])
def test_passes_and_gradients_are_those_of_plain_layers(
    fast: bool, chat: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through packed and fused passes as well, which leave layers in four bits alone."""
    monkeypatch.setattr(learning, "_used", [Fast() if fast else learning.Plain()])
    gradients = []
    for plain in (False, True):
        made = narrowed()
        if plain:
            quantising.dequantise(made)
            assert not structure.is_quantised(made)
        lora = LoraConfig(rank=2, targets=["all-linear"], dropout=0.0)
        adapted = structure.add_lora(made, lora, seed=0)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:  # else no gradient reaches A
                nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
        policy = models.Policy(adapted, chat.tokenizer, "")
        module = SFTModule(policy, tiny.sft, 1)
        gradients.append(tiny_run.gradients_of_one_step(module, sft_batch(chat, tiny)))
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 2 * 2 * 7
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() < 1e-4 * gradient.norm(), name


def sft_batch(chat: Any, tiny: Any) -> Any:
    from dcr.core import data
    from dcr.core.training import SafetyData

    rows = data.rows_of(tiny)
    batches = SafetyData(Stage.sft, rows, chat, tiny, 512)
    batches.setup("fit")
    return next(iter(batches.train_dataloader()))


@needed
def test_other_widths_stay_as_they_are_and_a_model_of_none_is_refused() -> None:
    odd = model(width=96)
    quantising.quantise(odd, Precision.fp32)
    kept = [n for n, m in odd.named_modules() if type(m) is nn.Linear]
    assert sorted({name.rpartition(".")[2] for name in kept}) == [
        *("gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj")
    ]
    shape = GPT2Config(vocab_size=260, n_embd=64, n_layer=1, n_head=2)
    with pytest.raises(ConfigError, match="GPT2LMHeadModel have no linear layer"):
        quantising.quantise(AutoModelForCausalLM.from_config(shape), Precision.fp32)


@needed
def test_the_plan_counts_the_bytes_that_are_there(tmp_path: Path) -> None:
    told = tiny_run.settings(tmp_path, *NARROW, "method=stl", "plan=true", "sft.lora.rank=2")
    shape = cost.stage_shape(told, Stage.sft)
    policy = models.open_policy(told.model, Precision.fp32)
    adapted = structure.add_lora(policy.model, told.sft.lora, seed=0)
    held = sum(p.nbytes for p in {id(p): p for p in adapted.parameters()}.values())
    layer: Any
    for layer in adapted.modules():
        if hasattr(layer, "quant_state"):
            state = layer.weight.quant_state
            held += state.absmax.nbytes + state.state2.absmax.nbytes
    counted = cost.memory(told, Stage.sft, shape, cost.Load(0, 1, 1, 1, 0, 1, 0))["weights"]
    counted -= 4 * shape.widest
    # scales of scales are rounded up to whole blocks of 256
    assert counted == pytest.approx(held, rel=0.01)


# --- a run ---


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("narrow")
    made, _ = tiny_run.trained(folder, *NARROW, "sft.readout.steps=2", *READOUT)
    return made


READOUT = ("sft.readout.batch_size=8", "sft.readout.seemingly_toxic=[demo_seemingly_toxic]",
           "sft.readout.toxic=[demo_toxic]")  # fmt: skip


@needed
def test_stage_one_adds_to_the_weights_in_full(run: Run) -> None:
    base = models.open_policy(resolving.model_of(run.config(), False), Precision.fp32)
    assert structure.is_quantised(base.model)
    full = load_file(Path(base.name) / "model.safetensors")
    result = load_file(run.stage("contrastive") / "model.safetensors")
    moved = {name for name in full if not torch.equal(full[name], result[name])}
    assert moved == {n for n in full if n.startswith("model.layers.0.") and "_proj" in n}


@needed
def test_what_is_added_to_rounded_weights_would_be_lost_to_the_next_rounding() -> None:
    """The reason why stage one adds to the weights in full."""

    def rounded(weight: Tensor) -> Tensor:
        layer = model()
        block = structure.decoder_blocks(layer)[0].get_submodule("mlp.gate_proj")
        block.weight = nn.Parameter(weight, requires_grad=False)
        quantising.quantise(layer, Precision.fp32)
        return numbers(layer)["0.mlp.gate_proj"]

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 64, generator=generator)
    step = 0.01 * torch.randn(128, 64, generator=generator)
    on_grid = rounded(weight)
    kept = {
        name: float(((rounded(start + step) - on_grid) * step).sum() / step.square().sum())
        for name, start in (("full", weight), ("grid", on_grid))
    }
    assert kept["full"] == pytest.approx(1, abs=0.2)
    assert kept["grid"] < 0.2


@needed
def test_an_adapter_knows_that_its_base_is_in_four_bits(run: Run) -> None:
    for stage in ("sft", "readout"):
        assert json.loads((run.stage(stage) / "dcr.json").read_text())["quantization"] == "nf4"
        assert structure.is_quantised(folders.open_result(run.stage(stage), Precision.fp32).model)
    held = folders.open_result(run.stage("contrastive"), Precision.fp32, False, Quantization.nf4)
    assert structure.is_quantised(held.model)


@needed
def test_a_stopped_run_ends_in_the_same_bits(run: Run, tmp_path: Path) -> None:
    made = tiny_run.settings(run.folder.parent / "rows", *NARROW, "sft.readout.steps=2", *READOUT)
    other, steps = Run(tmp_path / "run"), iter(range(100))

    def stop(*_: Any) -> None:
        if next(steps) in (3, 9, 15):
            tiny_run.stop()

    with pytest.MonkeyPatch.context() as patch:
        tiny_run.at_each_step(patch, stop)
        for _ in range(3):
            with pytest.raises(tiny_run.Stop):
                train.train(made, other)
        train.train(made, other)
    assert tiny_run.same(tiny_run.weights(other.folder), tiny_run.weights(run.folder))


@needed
def test_its_evaluation_is_in_four_bits_and_never_another_ones(run: Run, tmp_path: Path) -> None:
    small = ("limit=2", "gen.max_new_tokens=2", "wandb.mode=disabled", "trainer.accelerator=cpu")
    folders = []
    for held in ("none", "nf4"):
        told = ["model=tiny", *WIDE, f"model.quantization={held}", f"output={tmp_path}", *small]
        composed = tiny_run.composed("eval", *told)
        settings, place = cli.resolved(composed, EvalSettings)
        evaluation.evaluate(settings, place)
        folders.append(set((tmp_path / "eval").iterdir()))
    assert len(folders[1] - folders[0]) == 1
    composed = tiny_run.composed("eval", f"run={run.folder}", *small)
    settings, place = cli.resolved(composed, EvalSettings)
    assert settings.model.quantization is Quantization.nf4
    with pytest.raises(ConfigError, match=r"tasks=\[kernel\]: needs gradients"):
        cli.resolved(tiny_run.composed("eval", f"run={run.folder}", "tasks=[kernel]"), EvalSettings)


@needed
def test_an_export_is_what_answered_and_tells_its_errors(run: Run, tmp_path: Path) -> None:
    out = export.export(run, tmp_path / "out", precision=Precision.fp32)
    merged = AutoModelForCausalLM.from_pretrained(out).eval()
    ours = folders.open_result(run.stage("readout"), Precision.fp32).model
    ids = torch.tensor([[5, 60, 100, 7, 201, 33]])
    with torch.inference_mode():
        torch.testing.assert_close(merged(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(run.stage("contrastive"))
    lost = [
        float((by_table(w) - w).norm() / w.norm())
        for w in (
            m.weight.detach()
            for m in structure.decoder_blocks(base).modules()
            if type(m) is nn.Linear
        )
    ]
    card = (out / "README.md").read_text()
    told = re.search(r"a layer lost\s([\d.]+)% .*? at most\s([\d.]+)%", card, re.DOTALL)
    assert told
    assert float(told[1]) == pytest.approx(100 * sum(lost) / len(lost), abs=0.3)
    assert float(told[2]) == pytest.approx(100 * max(lost), abs=0.5)
    assert re.search(r"the same for (\d+) of \1 prompts", " ".join(card.split()))


# --- settings ---


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ([], "dcr.adapter=full: stage one would train the blocks' own weights"),
        (["dcr.adapter=lora", "trainer.strategy=fsdp"], "trainer.strategy=fsdp: choose one"),
        (["dcr.adapter=lora", "tracking.quantities=[kernel]"], "needs gradients of the weights"),
    ],
)
def test_what_four_bits_cannot_do_is_refused(told: list[str], says: str) -> None:
    told = ["model=tiny", "model.quantization=nf4", "plan=true", *told]
    with pytest.raises(ConfigError, match=rf"model\.quantization=nf4.*{re.escape(says)}"):
        resolving.resolve(tiny_run.composed("train", *told), TrainSettings)


def test_without_bitsandbytes_only_a_plan_is_made(
    monkeypatch: pytest.MonkeyPatch, command: Any, tmp_path: Path
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    told = ["model=tiny", "model.quantization=nf4", "method=stl"]
    nothing, needs = Run(tmp_path / "none"), r"needs bitsandbytes; run pip install '\.\[mem"
    for more in ([], ["model.quantization=none", "dcr.optim.moments=int8", "method=dcr"]):
        words = tiny_run.composed("train", *told, *more), tiny_run.composed("train", *told, *more)
        words[1].plan = True
        trained, planned = (resolving.resolve(each, TrainSettings) for each in words)
        with pytest.raises(ConfigError, match=needs):
            train.checked(trained, nothing)
        train.checked(planned, nothing)
    gate = command("dcr.gate", *told, "out=none")
    assert "nf4: a gate is trained on weights in full; leave it out" in gate.error
    told = ["model=tiny", "model.quantization=nf4"]
    asked, _ = cli.resolved(tiny_run.composed("eval", *told), EvalSettings)
    with pytest.raises(ConfigError, match=r"nf4: needs bitsandbytes; run pip install '\.\[mem"):
        evaluation.evaluate(asked, Run(tmp_path))
    with pytest.raises(ConfigError, match=r"tiny: in four bits: needs bitsandbytes"):
        models.open_policy(asked.model, Precision.fp32)
    assert list(tmp_path.iterdir()) == []
    for script in ("dcr.align", "dcr.study"):
        words = [*told, "dcr.adapter=lora", *["study=arms"] * (script == "dcr.study")]
        assert "nf4: needs bitsandbytes" in command(script, *words).error
        planned = command(script, *words, "plan=true")
        assert planned.code == 0, planned.err


def test_settings_at_their_default_leave_the_names_of_runs_alone() -> None:
    from dcr.core import config

    settings = resolving.resolve(tiny_run.composed("train", "model=tiny"), TrainSettings)
    assert "quantization" not in continuing.binding(config.plain(settings))["model"]


# --- the page ---

ROW = re.compile(r"^\| `([^|]+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+|none) \|$", re.M)
CARDS = (8, 12, 16, 24)


def planned() -> list[tuple[str, ...]]:
    """The rows of the page's table of what fits."""
    return ROW.findall((ROOT / "docs" / "own-model.md").read_text())


@pytest.mark.parametrize("row", planned(), ids=lambda row: row[0])
def test_the_page_says_what_the_plan_says(row: tuple[str, ...]) -> None:
    told, *peaks, card = row
    page = (ROOT / "docs" / "own-model.md").read_text()
    (command,) = re.findall(r"^    python train\.py (model=llama3_8b .*plan=true.*)$", page, re.M)
    whole = [*command.split(), *told.split()]
    settings = resolving.resolve(cli.compose("train", whole), TrainSettings)
    settings, _ = continuing.with_precisions(settings)
    drawn = data.rows_of(settings)
    found = [
        sum(
            plan.stage_plan(settings, each, cost.stage_shape(settings, each), drawn).memory.values()
        )
        for each in stages_of(settings)
    ]
    assert [f"{peak / 1e9:.1f}" for peak in found] == peaks
    fits = next((str(size) for size in CARDS if 1.1 * max(found) <= size * 1e9), "none")
    assert fits == card


def test_the_page_has_a_row_for_each_card() -> None:
    assert {row[-1] for row in planned()} == {"none", *map(str, CARDS)}
