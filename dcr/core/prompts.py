"""Prompts as token ids: chat templates, ends of turns and label masks.

Every prompt of every stage and evaluation passes through `ChatFormat`, so that stage one, stage two
and generation see the same tokens.
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dcr.core import extending
from dcr.core.config import ConfigError, DataError, Language, ModelConfig, Terminator
from dcr.core.text import Marks, marks_of, messages, turns_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:  # a user's error waits for neither
    Tensor = Tokenizer = Any

IGNORED = -100  # label of positions without a loss, as everywhere in transformers
ZERO_WIDTH_SPACE = "\u200b"
PLACEHOLDER, ANSWER = "0x5f3759df", "0x9e3779b9"  # turns that no template holds
SWITCHES = ("enable_thinking", "thinking")  # variables by which templates turn thoughts off
# end-of-text tokens of common bases, which an instruct tokenizer no longer names as its own
BASE_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>")


@dataclass(frozen=True)
class ChatFormat:
    """The chat format of a model: template, system turn, terminator and stop set.

    Attributes:
        prefill: the beginning of every answer, which `prompt_ids` include.
        language: that of the answers, by which refusals begin.
        thought: gives the tokens between the text of a prompt and its answer, see `thoughts`; None
            where that text ends behind an empty thought, or the model never thinks.
        processor: changes the logits of the next token of an answer, [rows, vocabulary], that are
            read behind these token ids, [rows, length]; None leaves them.
    """

    tokenizer: Tokenizer
    template: str
    system_prompt: str | None
    terminator: int
    stop: tuple[int, ...]
    prefill: str = ""
    language: Language = Language.en
    thought: Callable[[str], list[int]] | None = None
    processor: "Callable[[Tensor, Tensor], Tensor] | None" = None

    def text(self, prompt: str) -> str:
        """The templated prompt with the header of the answer.

        Raises DataError for a conversation that the template refuses or leaves a turn out of.
        """
        turns = self._turns(prompt)
        if len(turns_of(prompt)) == 1:
            return self._render(turns, generate=True)
        try:
            text = self._render(turns, generate=True)
            for turn in turns:
                if turn["content"].strip() not in text:
                    raise ValueError(f"it leaves out the {turn['role']}'s turn")
        except Exception as error:  # a template's own mistakes, of any type
            roles = ", ".join(turn["role"] for turn in turns)
            why = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"the model's chat template takes no turns of {roles} ({why}); remove the row or "
                "the turn, or give another template with model.template"
            ) from error
        return text

    def check(self, rows: Iterable[Any]) -> None:
        """Raises DataError, naming the row, for a conversation that cannot be templated."""
        for row in rows:
            if len(turns_of(row.prompt)) > 1:
                try:
                    self.text(row.prompt)
                except DataError as error:
                    raise DataError(f"{row.source}: {row.id}: {error}") from error

    def prompt_ids(self, prompt: str) -> list[int]:
        ids = self.encode(self.text(prompt))
        if self.thought:
            ids += self.thought(prompt)
        return [*ids, *self.encode(self.prefill)] if self.prefill else ids

    def lead(self) -> list[int]:
        """The last tokens of every prompt, behind which an answer begins.

        They start at the last end token if the template has one there, since no answer holds it.
        """
        rows = [self.prompt_ids(words)[::-1] for words in (PLACEHOLDER, "x", "Why?", "a\nb")]
        alike = [len(set(column)) == 1 for column in zip(*rows, strict=False)]
        shared = alike.index(False) if False in alike else len(alike)
        behind = rows[0][:shared]
        ends = [place for place, token in enumerate(behind) if token in self.stop]
        return behind[: ends[0] + 1 if ends else None][::-1]

    def pair(
        self,
        prompt: str,
        response: str,
        max_len: int,
        train_on_prompt: bool = False,
    ) -> tuple[list[int], list[int]]:
        """The ids and next-token targets of one training pair, at most `max_len` tokens.

        A response that does not fit loses its end and with it the terminator, so that the model
        never learns to stop in mid-sentence. If not even one response token fits behind the prompt,
        both lists are empty.
        """
        lead = self.text(prompt)
        start = self.encode(lead)
        words = self._response_text(lead, prompt, response)
        ids = [*start, *self.encode(words), self.terminator][:max_len]
        if len(ids) <= len(start):
            return [], []
        asked = ids[1 : len(start)] if train_on_prompt else [IGNORED] * (len(start) - 1)
        return ids, [*asked, *ids[len(start) :], IGNORED]

    def _turns(self, prompt: str) -> list[dict[str, str]]:
        return messages(prompt, self.system_prompt, self.neutralised)

    def _render(self, turns: Sequence[dict[str, str]], generate: bool, **variables: object) -> str:
        text = self.tokenizer.apply_chat_template(
            list(turns),
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=generate,
            **variables,  # pyright: ignore[reportArgumentType]
        )
        assert isinstance(text, str)
        return text

    def _response_text(self, lead: str, prompt: str, response: str) -> str:
        """The response with the leading space that some templates put before it."""
        words = self.neutralised(response).strip()
        turns = [*self._turns(prompt), {"role": "assistant", "content": words}]
        whole = self._render(turns, generate=False)
        behind = whole[len(lead) :] if whole.startswith(lead) else words
        place = behind.find(words)
        return behind[: place + len(words)] if place >= 0 else words

    def render(self, template: str, answered: bool, variables: Mapping[str, Any]) -> str:
        """Another template's text of a dialogue, as `thoughts` asks for it."""
        turns = self._turns(PLACEHOLDER)
        if answered:
            turns.append({"role": "assistant", "content": ANSWER})
        other = replace(self, template=template)
        return other._render(turns, not answered, **variables)

    @property
    def marks(self) -> Marks | None:
        """The marks around thoughts; None if the template speaks of none."""
        return marks_of(self.template)

    def encode(self, text: str) -> list[int]:
        """The ids of text that holds control tokens, without those that begin every text."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)  # pyright: ignore[reportArgumentType]

    def neutralised(self, text: str) -> str:
        """User text whose chat control tokens are plain letters.

        A zero-width space after the first letter keeps the text readable and stops the tokenizer
        from seeing a control token.
        """
        tokens, first_letters = self._controls
        if not first_letters.isdisjoint(text):
            for token in tokens:
                text = text.replace(token, token[0] + ZERO_WIDTH_SPACE + token[1:])
        return text

    @functools.cached_property
    def _controls(self) -> tuple[list[str], set[str]]:
        """Control tokens, longest first, and their first letters; Gemma 3 has 6,000 of them."""
        marks = self.marks
        ours = [marks.opens.strip(), marks.closes] if marks else []
        named = {token for token in (*special_tokens(self.tokenizer), *ours) if len(token) > 1}
        return sorted(named, key=len, reverse=True), {token[0] for token in named}


def chat_format(
    tokenizer: Tokenizer,
    config: ModelConfig,
    terminator: Terminator = Terminator.auto,
    output_rows: Tensor | None = None,
) -> ChatFormat:
    """The format for a tokenizer: its own template, the one the config names, or a plain one.

    Whoever trains on responses gives `terminator` and `output_rows` ([vocabulary, width], the
    head's weight), which show `auto` whether the chat-end token was ever trained. Raises
    ConfigError for a template that is neither known nor a file, or fails to render.
    """
    template: str = extending.part("chat_template")(tokenizer, config.template, config.name)
    probe = ChatFormat(tokenizer, template, config.system_prompt, 0, ())
    try:
        probe = replace(probe, template=_ending_thoughts(probe, config))
        chat_end = _chat_end(probe)
        if PLACEHOLDER not in probe.text(PLACEHOLDER):
            raise ValueError("it leaves out what the user says")
    except Exception as error:  # a template's own mistakes, of any type
        named = f"template={config.template}" if config.template else f"name={config.name}"
        raise ConfigError(
            f"model.{named}: its chat template fails ({str(error) or type(error).__name__}); mend "
            "it, give another with model.template, or drop model.system_prompt where it takes none"
        ) from error
    stop = stop_tokens(tokenizer, chat_end)
    if not stop:
        raise ConfigError(f"model.name={config.name}: its tokenizer has no end-of-text token")
    end = stop[0]
    if output_rows is not None:
        choose = extending.part("end_of_responses")
        end = choose(tokenizer, terminator, chat_end, stop, output_rows)
    return replace(probe, terminator=end, stop=stop, language=config.language)


def given(template: str, variables: Mapping[str, Any]) -> str:
    """The template with values for variables that whoever renders it leaves undefined."""
    set_ones = (
        f"{{% if not {name} is defined %}}{{% set {name} = {json.dumps(value)} %}}{{% endif %}}"
        for name, value in variables.items()
    )
    return "".join(set_ones) + template


def _ending_thoughts(probe: ChatFormat, config: ModelConfig) -> str:
    """The template with the user's variables, whose prompts end behind an empty thought."""
    template = given(probe.template, config.template_variables)
    if config.close_thoughts is False or marks_of(template) is None:
        return template
    return extending.part("closed_thoughts")(replace(probe, template=template), config)


def _chat_end(probe: ChatFormat) -> int | None:
    """The special token that the template puts behind the assistant's words."""
    lead, whole = probe.text(PLACEHOLDER), probe.render(probe.template, True, {})
    if probe.marks is None and not whole.startswith(lead):
        return None
    special = special_tokens(probe.tokenizer).values()
    behind = probe.encode(whole.rpartition(ANSWER)[2])
    return next((token for token in behind if token in special), None)


def keep_template(chat: ChatFormat) -> None:
    """Gives the tokenizer the format: its template, default system prompt and language."""
    extending.part("keep_template")(chat)


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of a tokenizer's control tokens, by their text."""
    added = tokenizer.added_tokens_decoder.items()
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {token.content: index for index, token in added if token.special} | dict(named)


def stop_tokens(tokenizer: Tokenizer, chat_end: int | None) -> tuple[int, ...]:
    """Every token that ends a response: the chat's end, and the base's end of text."""
    special = special_tokens(tokenizer)  # Gemma's </s> is a tag of HTML
    bases = [special[token] for token in BASE_ENDS if token in special]
    ends: tuple[Any, ...] = (chat_end, tokenizer.eos_token_id, *bases)
    return tuple(dict.fromkeys(int(token) for token in ends if token is not None))
