"""Phrases as the tokens that follow a prompt (A.5): canonical tokens only, no end of text."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dcr.config import UserError

Tokens = tuple[int, ...]


class PhraseError(UserError, ValueError):
    """Phrases or a prompt whose tokens give no refusal probability."""


@dataclass(frozen=True)
class Ending:
    """As much of a prompt's end as decides the tokens of what follows it.

    Attributes:
        ids: the prompt's last tokens.
        text: what they spell.
        spaced: whether a space stands between them and what follows: not after white space and
            not after a special token.
    """

    ids: Tokens
    text: str
    spaced: bool


def ending(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], text: str | None = None
) -> Ending:
    """The ending of a tokenised prompt; `text` is what it was tokenised from, where known.

    Tokenizers cut text at special tokens before anything else, so that what stands before the
    last one has no part in the tokens that follow.
    """
    ids = tuple(prompt_ids)
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(index for index, token in added if token.special)}
    last = max((place for place, token in enumerate(ids) if token in special), default=-1)
    options = [(ids, text)] if text is not None else [(ids, _spelled(tokenizer, ids))]
    if last > 0:
        options.insert(0, (ids[last:], _spelled(tokenizer, ids[last:])))
    elif last == 0:  # begin-of-text, after which some tokenizers do not spell what they read
        options.append((ids[1:], _spelled(tokenizer, ids[1:])))
    exact = (option for option in options if _encoded(tokenizer, [option[1]])[0] == option[0])
    tail, words = next(exact, options[-1])
    spaced = bool(words) and not words[-1].isspace() and tail[-1:] != () and tail[-1] not in special
    return Ending(tail, words, spaced)


def continuations(
    tokenizer: PreTrainedTokenizerBase, end: Ending, phrases: Sequence[str]
) -> tuple[Tokens, ...]:
    """The distinct token sequences of phrases behind a prompt, in the order of the phrases.

    Raises PhraseError if the prompt's tokens change once a phrase follows.
    """
    context = end.text + " " * end.spaced
    start = len(end.ids)
    found: list[Tokens] = []
    for phrase, ids in zip(
        phrases, _encoded(tokenizer, [context + phrase for phrase in phrases]), strict=True
    ):
        if ids[:start] != end.ids or len(ids) == start:
            raise PhraseError(
                f"the prompt's tokens change when {phrase!r} follows {end.text[-20:]!r}; end the "
                "prompt in a newline or without white space"
            )
        found.append(ids[start:])
    return tuple(dict.fromkeys(found))


def checked(phrases: Sequence[str]) -> tuple[str, ...]:
    """Phrases without repetitions. Raises PhraseError if there is none, or an empty one."""
    if isinstance(phrases, str):
        raise PhraseError(f"phrases={phrases!r}: give a list of strings")
    if not phrases or not all(phrase.strip() for phrase in phrases):
        raise PhraseError(f"phrases={list(phrases)!r}: give at least one, and none that is empty")
    return tuple(dict.fromkeys(phrases))


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Tokens]:
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [tuple(row) for row in rows]  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]


def _spelled(tokenizer: PreTrainedTokenizerBase, ids: Tokens) -> str:
    words = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return str(words)
