"""Structure, freezing, LoRA and saved folders over random models of several families."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dcr import builtin
from dcr.activations import head_logits
from dcr.checking import skeleton
from dcr.core import losses, models, storage
from dcr.core.config import ConfigError, LoraConfig, ModelConfig, Precision
from dcr.core.models import Policy, folders, structure
from dcr.core.models.training import (
    freeze_beyond,
    head_arguments,
    save_adapter,
    save_full,
    trunk,
)
from tests import shapes

DEPTH, WIDTH = 3, 32
WIDE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "vocab_size": 70,
    "max_position_embeddings": 64,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "llama_one_block": {"intermediate_size": 48, "num_hidden_layers": 1},
    "qwen2_tied": {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2_untied": {"intermediate_size": 48, "num_key_value_heads": 2},
    "mistral": {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 4},
    "gemma2": {
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 4,
        "final_logit_softcapping": 0.5,
    },
    "gemma3_text": {
        "intermediate_size": 48,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": 4,
    },
    "cohere": {"intermediate_size": 48, "num_key_value_heads": 2, "logit_scale": 0.3},
    "granite": {"intermediate_size": 48, "num_key_value_heads": 2, "logits_scaling": 5.0},
    "phi": {"intermediate_size": 48},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
    "opt_post_norm": {"ffn_dim": 48, "word_embed_proj_dim": WIDTH, "do_layer_norm_before": False},
    "mixtral": {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": DEPTH},
}
TIED = {"qwen2_tied", "gemma2", "gemma3_text", "cohere", "granite", "gpt2", "opt", "opt_post_norm"}
ARCHITECTURE = {"llama_one_block": "llama", "qwen2_tied": "qwen2", "qwen2_untied": "qwen2"}
ARCHITECTURE |= {"opt_post_norm": "opt"}
IDS = torch.tensor([[5, 60, 10, 7, 21, 33, 9, 2]])


def made(name: str) -> Any:
    options = {"tie_word_embeddings": name in TIED, "pad_token_id": None} | WIDE | SHAPES[name]
    kind = ARCHITECTURE.get(name, name)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options))
    for norm in (m for n, m in model.named_modules() if "norm" in n or "ln_" in n):
        if isinstance(weight := getattr(norm, "weight", None), Tensor):
            nn.init.uniform_(weight, 0.5, 2.0)  # else a second norm would change nothing
    return model.eval()


@pytest.fixture(params=SHAPES)
def named(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, made(request.param)


# --- structure ----------------------------------------------------------------------------------


def test_trunk_ends_where_hidden_states_say(named: tuple[str, Any]) -> None:
    name, model = named
    depth = model.config.num_hidden_layers
    blocks = structure.decoder_blocks(model)
    assert len(blocks) == depth
    last: list[Tensor] = []

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)

    hook = blocks[-1].register_forward_hook(note)
    with torch.no_grad():
        whole = model(input_ids=IDS, output_hidden_states=True, use_cache=False)
        hook.remove()
        for block in range(1, depth + 1):
            cut = trunk(model, block)(input_ids=IDS, use_cache=False).last_hidden_state
            truth = whole.hidden_states[block] if block < depth else last[0]
            assert torch.equal(cut, truth), f"{name}: block {block}"
    if structure.final_norm(model) is not None:  # it was not applied, and would have been seen
        assert not torch.allclose(last[0], whole.hidden_states[depth])


def test_trunk_runs_no_later_block_and_shares_its_parameters(named: tuple[str, Any]) -> None:
    model, before = named[1], dict(named[1].named_parameters())
    ran: list[int] = []
    for index, block in enumerate(structure.decoder_blocks(model)):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    cut = trunk(model, 1)
    cut(input_ids=IDS, use_cache=False)
    assert ran == [0]
    assert {id(p) for p in cut.parameters()} < {id(p) for p in before.values()}
    assert dict(model.named_parameters()).keys() == before.keys()
    model(input_ids=IDS, use_cache=False)  # the model itself is whole
    assert ran == [0, *range(model.config.num_hidden_layers)]


def test_backbone_head_and_nll_make_the_models_own_logits(named: tuple[str, Any]) -> None:
    """The NLL from hidden states, caps and scales included, against cross entropy on the logits."""
    model = named[1]
    with torch.no_grad():
        hidden = structure.backbone(model)(input_ids=IDS, use_cache=False).last_hidden_state
        logits = model(input_ids=IDS, use_cache=False).logits
        total, each = losses.token_nll(hidden[0, :-1], targets=IDS[0, 1:], **head_arguments(model))
    truth = nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:], reduction="none")
    torch.testing.assert_close(each, truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, truth.sum(), rtol=1e-5, atol=1e-5)
    found = head_logits(model, hidden[0])
    torch.testing.assert_close(found, logits[0], rtol=1e-5, atol=1e-5)
    assert structure.head(model) is model.get_output_embeddings()


def test_lists_inside_a_block_are_no_blocks_and_two_lists_are_refused() -> None:
    model = made("llama")
    for block in structure.decoder_blocks(model):
        block.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(DEPTH)])
    assert structure.decoder_blocks(model) is model.model.layers
    model.other = nn.ModuleList([nn.Linear(2, 2) for _ in range(DEPTH)])
    with pytest.raises(ConfigError, match="LlamaForCausalLM has 2 lists of 3 blocks, not one"):
        structure.decoder_blocks(model)


# --- freezing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [None, True, False])
def test_exactly_the_trunk_trains(named: tuple[str, Any], told: bool | None) -> None:
    name, model = named
    freeze_beyond(model, 1, told)
    embeddings = model.get_input_embeddings().weight
    expected = {id(p) for p in structure.decoder_blocks(model)[0].parameters()}
    if told or (told is None and name not in TIED):
        expected.add(id(embeddings))
    assert {id(p) for p in model.parameters() if p.requires_grad} == expected
    tied = model.get_output_embeddings().weight is embeddings
    assert tied == (name in TIED)
    blocks = structure.decoder_blocks(model)
    freeze_beyond(model, len(blocks), False)  # deeper trains more
    expected = {id(p) for p in blocks.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == expected


# --- LoRA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox"])
def test_all_linear_reaches_every_projection_of_the_chosen_blocks(name: str) -> None:
    model = made(name)
    projections = projections_of(model)
    adapted = structure.add_lora(model, LoraConfig(targets=["all-linear"]), seed=0, blocks=2)
    assert adapted_of(adapted) == {n for n in projections if n[0] in "01"} != set()
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in n for n in trained)
    whole = structure.add_lora(made(name), LoraConfig(targets=["all-linear"]), seed=0)
    assert adapted_of(whole) == projections


def projections_of(model: Any) -> set[str]:
    inside = structure.decoder_blocks(model).named_modules()
    return {name for name, module in inside if type(module).__name__ in ("Linear", "Conv1D")}


def adapted_of(model: Any) -> set[str]:
    inside = structure.decoder_blocks(model).named_modules()
    stem = ".lora_A.default"
    return {name.removesuffix(stem) for name, _ in inside if name.endswith(stem)}


def test_named_targets_keep_to_their_blocks() -> None:
    adapted = structure.add_lora(
        made("llama"), LoraConfig(targets=["q_proj", "v_proj"]), 0, blocks=1
    )
    assert adapted_of(adapted) == {"0.self_attn.q_proj", "0.self_attn.v_proj"}


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["q_proj", "valeu", "mlp"], "valeu, mlp match"),  # one that fits does not hide the rest
        (["proj"], "proj match"),
    ],
)
def test_targets_that_match_nothing_are_named(targets: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        structure.add_lora(made("llama"), LoraConfig(targets=targets), seed=0)
    known = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, or all-linear"
    assert known in str(caught.value)


def test_lora_follows_from_its_seed_and_leaves_the_generators_alone() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    config = LoraConfig(targets=["q_proj"])
    made_with = [structure.add_lora(byte_model(), config, seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    one, two, other = map(get_peft_model_state_dict, made_with)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_an_adapted_bf16_model_has_lora_in_fp32_and_its_structure_as_before() -> None:
    model = made("llama").to(torch.bfloat16)
    adapted = structure.add_lora(model, LoraConfig(targets=["all-linear"]), seed=0)
    kinds = {("lora_" in name, p.dtype) for name, p in adapted.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert structure.unwrapped(adapted) is model
    assert structure.decoder_blocks(adapted) is model.model.layers
    assert structure.backbone(adapted) is model.model
    assert structure.head(adapted) is model.lm_head


# --- opening ------------------------------------------------------------------------------------

TINY = ModelConfig(name="tiny", architecture=shapes.TINY | {"tie_word_embeddings": False})


def test_a_random_model_follows_from_its_seed() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (builtin.random_policy(TINY, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits(one.model), logits(two.model))
    assert not torch.equal(logits(one.model), logits(other.model))
    assert not one.model.training


def test_facts_need_no_weights(tmp_path: Path) -> None:
    AutoConfig.for_model("gpt2", n_layer=5, n_embd=24, n_head=2).save_pretrained(tmp_path)
    facts = models.facts(ModelConfig(name=str(tmp_path)))
    assert (facts.depth, facts.width, facts.vocabulary, facts.context) == (5, 24, 50257, 1024)
    assert facts.tied
    assert not models.facts(TINY).tied


@pytest.mark.parametrize(
    "open_it",
    [lambda c: models.open_policy(c, Precision.fp32), models.facts, models.open_tokenizer],
)
def test_what_cannot_be_opened_is_named(open_it: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=f"model.name={tmp_path}: cannot be opened"):
        open_it(ModelConfig(name=str(tmp_path)))


def saved(folder: Path, model: Any) -> Policy:
    policy = Policy(model, builtin.byte_tokenizer(), "made")
    save_full(policy, folder)
    return policy


def byte_model(seed: int = 0, **other: Any) -> Any:
    """A model over bytes, whose shape `other` changes; the global generator stays as it was."""
    config = dataclasses.replace(TINY, architecture=dict(TINY.architecture or {}) | other)
    return builtin.random_policy(config, seed).model


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def with_rows_of_head(rows: int, file: Path) -> None:
    weights = load_file(file)
    head = weights.pop("lm_head.weight")[:rows].contiguous()
    # without one transformers would fill in a random one, and only warn
    save_file(weights | ({"lm_head.weight": head} if rows else {}), file, {"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-100]),
        partial(with_rows_of_head, 0),
        partial(with_rows_of_head, 9),
        lambda file: file.unlink(),
        lambda file: file.with_name("tokenizer.json").write_text("{}"),
    ],
    ids=["torn", "an absent weight", "another shape", "no weights", "half a tokenizer"],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: Any) -> None:
    saved(tmp_path, byte_model())
    damage(tmp_path / "model.safetensors")
    storage.write_checksums(tmp_path)  # which tell nothing of a folder that others made
    with pytest.raises(ConfigError, match=f"{tmp_path}: cannot be opened"):
        models.open_folder(str(tmp_path), Precision.fp32)
    with pytest.raises(ConfigError, match=f"model.name={tmp_path}: cannot be opened"):
        models.open_policy(ModelConfig(name=str(tmp_path)), Precision.fp32)


def test_precision_is_the_weights_dtype(tmp_path: Path) -> None:
    policy = saved(tmp_path, byte_model())
    policy.tokenizer.pad_token = None  # opens all the same
    policy.tokenizer.save_pretrained(tmp_path)
    for precision, dtype in structure.DTYPES.items():
        opened = models.open_policy(ModelConfig(name=str(tmp_path)), precision)
        assert {p.dtype for p in opened.model.parameters()} == {dtype}
        assert opened.tokenizer.pad_token_id is None
        same = torch.equal(logits(opened.model), logits(policy.model))
        assert same or dtype is torch.bfloat16
    assert structure.DTYPES[Precision.bf16] is torch.bfloat16


def test_a_gguf_file_becomes_the_model_that_it_was_written_from(tmp_path: Path) -> None:
    """Gemma 3's files hold the weights of norms plus 1, and its blocks differ in kind."""
    gguf = pytest.importorskip("gguf")
    letters = ["▁", "H", "o", "w"]
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    shape = AutoConfig.for_model(
        "gemma3_text",
        **SHAPES["gemma3_text"] | WIDE | {"num_hidden_layers": 7, "vocab_size": len(tokens)},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape).eval()
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "gemma3")
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_sliding_window(shape.sliding_window)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([3] * len(control) + [6] * 256 + [1] * len(letters))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, shape.num_hidden_layers)
    for name, weight in model.named_parameters():
        nn.init.normal_(weight, std=0.3)
        stored = weight.detach() + ("norm" in name)
        writer.add_tensor(names.get_name(name, (".weight",)), stored.numpy())
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    builtin.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder")
    found = models.open_policy(ModelConfig(name=str(tmp_path / "folder")), Precision.fp32)
    torch.testing.assert_close(found.model(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert structure.head(found.model).weight is found.model.get_input_embeddings().weight
    assert found.tokenizer("How")["input_ids"] == [2, 262, 263, 264]
    for file in (tmp_path / "folder").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match="its tokenizer makes no token of"):
        models.open_tokenizer(ModelConfig(name=str(tmp_path / "folder")))


# --- folders that are no model ------------------------------------------------------------------

FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a number as text": ({"hidden_size": "32"}, "hidden_size"),
    "a negative size": ({"hidden_size": -16}, "hidden_size is -16"),
    "no block": ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be 1 or more"),
    "no head": ({"num_attention_heads": 0}, "cannot be opened|num_attention_heads"),
    "an unknown type": ({"model_type": "nope"}, "nope"),
    "a list for a type": ({"model_type": [1]}, "cannot be opened"),
    "an encoder-decoder": ({"model_type": "t5"}, "cannot be opened|num_hidden"),
    "an unknown activation": ({"hidden_act": "nope"}, "nope"),
    "fewer embeddings than tokens": ({"vocab_size": 100}, "tokenizer has 260 tokens and the model"),
    "quantised weights": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantis"),
    "no object": ({"quantization_config": [1]}, "quantised|cannot be opened"),
    "kernels from the hub": ({"attn_implementation": "kernels/x"}, r"code on the hub .*kernels/x"),
}


def told(tmp_path: Path, **entries: Any) -> ModelConfig:
    """A whole folder whose config.json then says otherwise."""
    saved(tmp_path, byte_model())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return ModelConfig(name=str(tmp_path))


@pytest.mark.parametrize(("entries", "says"), FAULTS.values(), ids=FAULTS)
def test_a_folder_that_is_no_model_is_one_line(
    tmp_path: Path, entries: dict[str, Any], says: str
) -> None:
    config = told(tmp_path, **entries)

    def planned() -> None:  # as a plan does, before any weight is read
        skeleton(config)
        models.open_tokenizer(config)

    for open_it in (planned, lambda: models.open_policy(config, Precision.fp32)):
        with pytest.raises(ConfigError, match=says) as caught:
            open_it()
        assert str(caught.value).startswith(f"model.name={tmp_path}: ")
        assert "\n" not in str(caught.value)


def test_kernels_of_the_hub_are_for_those_who_trust_them_and_odd_weights_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = told(tmp_path, attn_implementation="kernels/x")
    assert models.architecture(dataclasses.replace(config, trust_remote_code=True))
    config = told(tmp_path, num_hidden_layers=1)  # of a file with two blocks
    models.open_policy(config, Precision.fp32)
    assert "weights there belong to no part of the model, model.layers.1" in caplog.text


# --- adapters -----------------------------------------------------------------------------------


def stored(model: Any, folder: Path, base: Path | str) -> Any:
    """The model with an adapter, which now lies in the folder."""
    adapted = structure.add_lora(model, LoraConfig(targets=["q_proj"]), seed=0)
    save_adapter(Policy(adapted, builtin.byte_tokenizer(), "made"), folder, base)
    return adapted


def with_adapter(run: Path) -> tuple[Path, Tensor]:
    """A run of both stages: the place of a snapshot's adapter, and its logits in memory."""
    policy = saved(run / "contrastive", byte_model())
    adapted = shapes.adapted(policy.model)
    for place in ("sft", "snapshots/step-000002"):
        save_adapter(Policy(adapted, policy.tokenizer, "made"), run / place, run / "contrastive")
    return run / "sft", logits(adapted.eval())


def test_a_moved_run_says_the_same(tmp_path: Path) -> None:
    _, in_memory = with_adapter(tmp_path / "run")
    away = tmp_path / "far" / "away"
    away.parent.mkdir()
    shutil.move(tmp_path / "run", away)
    base = logits(models.open_folder(str(away / "contrastive"), Precision.fp32).model)
    assert not torch.allclose(base, in_memory, atol=0.01)
    for place in ("sft", "snapshots/step-000002"):
        assert folders.adapter_base(away / place) == str(away / "contrastive")
        opened = folders.open_adapter(away / place, Precision.fp32)
        assert torch.equal(logits(opened.model), in_memory)


def test_a_base_elsewhere_is_found_where_it_was(tmp_path: Path) -> None:
    """STL stands on a model outside the run folder, which stays where it is when the run moves."""
    policy = saved(tmp_path / "base", byte_model())
    adapted = stored(policy.model, tmp_path / "a" / "run" / "sft", tmp_path / "base")
    shutil.move(tmp_path / "a" / "run", tmp_path / "run")
    opened = folders.open_adapter(tmp_path / "run" / "sft", Precision.fp32)
    assert torch.equal(logits(opened.model), logits(adapted))


def test_a_base_that_is_another_or_gone_is_named(tmp_path: Path) -> None:
    """The path in PEFT's file still leads to weights that fit: those beside the adapter count."""
    adapter, _ = with_adapter(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for run in ("copy", "run"):
        saved(tmp_path / run / "contrastive", byte_model(seed=1))
        with pytest.raises(ConfigError, match=f"{run}/contrastive is not the base this adapter"):
            folders.open_adapter(tmp_path / run / "sft", Precision.fp32)
    shutil.rmtree(tmp_path / "run" / "contrastive")
    with pytest.raises(ConfigError, match=r"its base weights .*contrastive are gone"):
        folders.open_adapter(adapter, Precision.fp32)


def test_the_embedded_base_is_found_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCR_CACHE", str(tmp_path / "here"))
    policy = saved(policy_folder(), byte_model())
    stored(policy.model, tmp_path / "run" / "sft", policy_folder())
    shutil.move(tmp_path / "here", tmp_path / "there")
    monkeypatch.setenv("DCR_CACHE", str(tmp_path / "there"))
    assert folders.adapter_base(tmp_path / "run" / "sft") == str(policy_folder())


def test_an_adapter_on_itself_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path)})
    )
    with pytest.raises(ConfigError, match=f"{tmp_path}: its base {tmp_path} is an adapter, too"):
        folders.adapter_base(tmp_path)


def policy_folder() -> Path:
    return builtin.cache_folder() / "smollm2-135m-instruct"


@pytest.mark.parametrize(
    "shape", [{"hidden_size": 8}, {"num_hidden_layers": 1}, {"model_type": "gpt_neox"}], ids=str
)
def test_an_adapter_of_another_model_is_refused(tmp_path: Path, shape: dict[str, Any]) -> None:
    """Without our files there is no fingerprint: the adapter's own weights tell."""
    adapter, _ = with_adapter(tmp_path / "run")
    for file in (folders.ORIGIN_FILE, storage.CHECKSUMS):
        (adapter / file).unlink()
    saved(tmp_path / "run" / "contrastive", byte_model(**shape))
    with pytest.raises(ConfigError, match="do not fit those of"):
        folders.open_adapter(adapter, Precision.fp32)


def test_an_adapter_on_the_tiny_model_opens_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCR_CACHE", str(tmp_path / "cache"))
    base = models.open_policy(TINY, Precision.fp32)
    adapted = shapes.adapted(base.model)
    save_adapter(Policy(adapted, base.tokenizer, "made"), tmp_path / "sft", base.name)
    opened = folders.open_adapter(tmp_path / "sft", Precision.fp32)
    assert torch.equal(logits(opened.model), logits(adapted.eval()))
    made, told = byte_model(), models.open_tokenizer(TINY)
    assert torch.equal(logits(models.open_policy(TINY, Precision.fp32).model), logits(made))
    assert told("Hä?")["input_ids"] == builtin.byte_tokenizer()("Hä?")["input_ids"]
    assert told.chat_template == builtin.byte_tokenizer().chat_template
    assert [place.name[:5] for place in (tmp_path / "cache").iterdir()] == ["tiny-"]


def test_an_adapter_keeps_the_commit_of_its_hub_base(tmp_path: Path) -> None:
    model = byte_model()
    model.config._commit_hash = "0123abcd"
    stored(model, tmp_path / "sft", "some/base")
    named = json.loads((tmp_path / "sft" / "adapter_config.json").read_text())
    assert (named["base_model_name_or_path"], named["revision"]) == ("some/base", "0123abcd")
