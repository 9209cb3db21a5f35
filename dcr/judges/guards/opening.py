"""Guard models out of a hub id or a folder: checked before anything loads, then opened."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from dcr.config import ConfigError, GuardConfig, Judge
from dcr.models import DTYPES, Policy
from dcr.models.opening import refused_as, whole_model
from dcr.prompts import ChatFormat

Content = Callable[[str], Any]  # what a chat template takes as a message's content


@dataclass(frozen=True)
class Guard:
    """A guard model, opened. `openings` are the tokens that begin the word `unsafe`."""

    policy: Policy
    chat: ChatFormat  # for its end tokens and control tokens
    openings: Int[Tensor, "tokens"]


def check(settings: GuardConfig, node: str) -> None:
    """Configuration and tokenizer can be read and fit the judge; no weight is opened.

    Raises ConfigError naming `<node>.model`: for a path that is no folder with config.json,
    safetensors and a tokenizer, for a hub id that cannot be reached, and, for Llama Guard, for a
    chat template that is absent or leaves a message out.
    """
    if _is_path(settings.model):
        _check_folder(Path(settings.model), f"{node}.model={settings.model}")
    with refused_as(f"{node}.model={settings.model}"):
        AutoConfig.from_pretrained(
            settings.model, revision=settings.revision, trust_remote_code=False
        )
    tokenizer = open_tokenizer(settings, node)
    if node == Judge.llama_guard.value:
        content_form(tokenizer, f"{node}.model={settings.model}")


def _is_path(name: str) -> bool:
    """Hub ids have one slash at most."""
    return Path(name).exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1


def _check_folder(folder: Path, key: str) -> None:
    if not folder.is_dir():
        raise ConfigError(f"{key}: no such folder; give one with a guard model, or a hub id")
    wanted = {
        "config.json": ("config.json",),
        "*.safetensors": ("*.safetensors",),
        "tokenizer.json": ("tokenizer.json", "tokenizer.model", "vocab.json"),
    }
    for name, patterns in wanted.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise ConfigError(f"{key}: holds no {name}; give the whole folder of a guard model")


def open_tokenizer(settings: GuardConfig, node: str) -> PreTrainedTokenizerBase:
    """Raises ConfigError, naming `<node>.model`, when there is none."""
    with refused_as(f"{node}.model={settings.model}"):
        return AutoTokenizer.from_pretrained(
            settings.model, revision=settings.revision, trust_remote_code=False
        )


def content_form(tokenizer: PreTrainedTokenizerBase, key: str) -> Content:
    """How the chat template takes a message: as text (8B), or as a list of parts (1B, 11B).

    Raises ConfigError, beginning with `key`, when there is no template or when neither form puts
    both the user's and the assistant's words into the text.
    """
    if not tokenizer.chat_template:
        raise ConfigError(f"{key}: its tokenizer has no chat template; give a Llama Guard model")
    forms: tuple[Content, ...] = (str, lambda text: [{"type": "text", "text": text}])
    for form in forms:
        try:
            text = conversation(tokenizer, form, "0x5f3759df", "0xcafebabe")
        except (TemplateError, TypeError, ValueError):  # the other form is what it takes
            continue
        if 0 <= text.find("0x5f3759df") < text.find("0xcafebabe"):
            return form
    raise ConfigError(
        f"{key}: its chat template does not hold a user and an assistant message; give a Llama "
        "Guard model"
    )


def conversation(
    tokenizer: PreTrainedTokenizerBase, form: Content, prompt: str, response: str
) -> str:
    """Both messages in the guard's template, up to where its verdict begins."""
    turns = [
        {"role": "user", "content": form(prompt)},
        {"role": "assistant", "content": form(response)},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def opened(settings: GuardConfig, node: str, accelerator: str) -> Guard:
    """The guard in evaluation mode, on a GPU where there is one and `accelerator` lets it.

    Raises ConfigError naming `<node>.model` when it cannot be read or its weights are not whole.
    """
    tokenizer = open_tokenizer(settings, node)
    with refused_as(f"{node}.model={settings.model}"):
        model = whole_model(
            settings.model,
            DTYPES[settings.precision],
            revision=settings.revision,
            trust_remote_code=False,
        )
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        model.to("cuda")
    named = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    stop = tuple(dict.fromkeys(int(token) for token in ends if token is not None))
    if not stop:
        raise ConfigError(f"{node}.model={settings.model}: its tokenizer has no end-of-text token")
    chat = ChatFormat(tokenizer, "", None, stop[0], stop)
    return Guard(Policy(model, tokenizer, settings.model), chat, _openings(tokenizer, "unsafe"))


def _openings(tokenizer: PreTrainedTokenizerBase, word: str) -> Int[Tensor, "tokens"]:
    """The tokens that can begin `word`: at the start, behind a space, behind a newline."""
    spelled = [tokenizer.encode(lead + word, add_special_tokens=False) for lead in ("", " ", "\n")]
    first = {next(t for t in ids if not is_space(tokenizer, t)) for ids in spelled}
    return torch.tensor(sorted(first))


def is_space(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether a token shows nothing."""
    return not str(tokenizer.decode([token])).strip()
