"""A tokenizer read from its files alone, without transformers, where that gives the same tokens.

A plan counts tokens with it: what `prompts.ChatFormat` asks of transformers' class, `FileTokenizer`
answers alike (`tests/test_tokens.py`). `read` gives None for every tokenizer that transformers
would change when it opens it, or that may be one.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from dcr.core.text import CHATML

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
# What a tokenizer's configuration may say without its tokens being others than in the file.
HARMLESS = {
    *("backend", "is_local", "local_files_only", "model_max_length", "tokenizer_class"),
    *("extra_special_tokens", "clean_up_tokenization_spaces", "padding_side", *NAMED),
}
CLASS = "TokenizersBackend"  # transformers' own, which reads tokenizer.json as it is
LARGEST = 100_000  # tokens, beyond which transformers may mend a tokenizer's pattern
# What transformers renders in a way of its own
UNKNOWN_WORDS = re.compile(r"strftime_now|reasoning|thinking|generation\s*-?%\}|extra_special")
BYTE_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unused|>")


@dataclass(frozen=True)
class FileTokenizer:
    """The part of transformers' tokenizer class that prompts are made with, by the same names."""

    backend: Tokenizer
    named: Mapping[str, str]  # special tokens by their role
    extra: Sequence[str]  # further special tokens
    chat_template: str | None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.backend.encode(text, add_special_tokens=add_special_tokens).ids}

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def apply_chat_template(
        self,
        turns: Sequence[Mapping[str, str]],
        chat_template: str,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> str:
        return rendering(chat_template).render(
            messages=[dict(turn) for turn in turns],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self.named,
        )

    def get_vocab(self) -> dict[str, int]:
        return self.backend.get_vocab(with_added_tokens=True)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return self.backend.get_added_tokens_decoder()

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys([*self.named.values(), *self.extra]))

    @property
    def all_special_ids(self) -> list[int | None]:
        return [self.backend.token_to_id(token) for token in self.all_special_tokens]

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self.backend.id_to_token(token)

    def _id(self, role: str) -> int | None:
        return self.backend.token_to_id(self.named[role]) if role in self.named else None

    @property
    def bos_token_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id("pad_token")


def read(folder: Path) -> FileTokenizer | None:
    """The tokenizer of a folder, where its files say all of it."""
    try:
        said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        shipped = folder / "chat_template.jinja"
        template = shipped.read_text(encoding="utf-8") if shipped.is_file() else None
        named = {role: said[role] for role in NAMED if said.get(role) is not None}
        made = FileTokenizer(backend, named, said.get("extra_special_tokens") or [], template)
        special = {token.content for token in made.added_tokens_decoder.values() if token.special}
        whole = (
            said["tokenizer_class"] == CLASS
            and set(said) <= HARMLESS
            and set(made.all_special_tokens) <= special
            and backend.truncation is None
            and backend.padding is None
        )
    except Exception:  # tokenizers raises no other type; what is wrong here, transformers says
        return None
    other_files = ("special_tokens_map.json", "added_tokens.json", "additional_chat_templates")
    whole = whole and not any((folder / name).exists() for name in other_files)
    return made if whole and len(made) <= LARGEST and renders_alike(template or "") else None


def renders_alike(template: str) -> bool:
    """Whether a template asks for nothing that only transformers knows."""
    return UNKNOWN_WORDS.search(template) is None


def byte_level(template: str | None = CHATML) -> FileTokenizer:
    """A tokenizer of the 256 bytes and four special tokens, made in memory."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*BYTE_SPECIALS, *alphabet])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    end, start, end_of_turn, unused = BYTE_SPECIALS
    backend.add_special_tokens(list(BYTE_SPECIALS))
    named = {"eos_token": end_of_turn, "pad_token": end}
    return FileTokenizer(backend, named, [start, unused], template)


@functools.cache
def rendering(template: str) -> jinja2.Template:
    """A chat template compiled as transformers does: sandboxed, blocks without their blanks."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    sandbox.globals["raise_exception"] = _refuse
    return sandbox.from_string(template)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
