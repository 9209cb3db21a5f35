"""The chat format of one model: prompts and pairs as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jinja2 import TemplateError

from dcr.core.config import ConfigError, ModelConfig, Pooling, Terminator
from dcr.core.prompts.templates import (
    Tensor,
    Tokenizer,
    chosen_end,
    chosen_template,
    special_tokens,
    stop_tokens,
)

IGNORED = -100  # label of positions without a loss, as everywhere in transformers
ZERO_WIDTH_SPACE = "\u200b"
PLACEHOLDER = "0x5f3759df"  # a turn that no template holds


@dataclass(frozen=True)
class PromptRow:
    """A tokenised prompt; `features` are the positions stage one pools over."""

    id: str
    ids: list[int]
    label: int
    features: tuple[int, int]  # first and one past the last position
    nll: list[int]  # next-token targets, IGNORED where no loss falls


@dataclass(frozen=True)
class PairRow:
    """A tokenised prompt with its response; `targets[t]` is what position t must predict."""

    id: str
    ids: list[int]
    targets: list[int]
    refusal: bool


@dataclass(frozen=True)
class ChatFormat:
    """The chat format of a model: template, system turn, terminator and stop set."""

    tokenizer: Tokenizer
    template: str
    system_prompt: str | None
    terminator: int
    stop: tuple[int, ...]
    prefill: str = ""  # the beginning of every answer, which `prompt_ids` include

    def text(self, prompt: str) -> str:
        """The templated prompt with the header of the answer."""
        return self._render(self._turns(prompt), generate=True)

    def prompt_ids(self, prompt: str) -> list[int]:
        ids = self._encode(self.text(prompt))
        return [*ids, *self._encode(self.prefill)] if self.prefill else ids

    def with_system(self, words: str, asked: str) -> "ChatFormat":
        """The same chat with `words` behind the model's own system prompt.

        That prompt is the user's, or the one that the template writes into a dialogue without a
        system turn. Raises ConfigError, naming the setting `asked`, for a template that refuses a
        system prompt or leaves it out.
        """
        other = replace(self, system_prompt=words)
        cure = f"leave {asked} out, or name another model.template"
        try:
            plain, (before, shown, behind) = self.text("x"), other.text("x").partition(words)
        except TemplateError as error:
            raise ConfigError(
                f"{asked}: the chat template takes no system prompt ({error}); {cure}"
            ) from error
        if not shown:
            raise ConfigError(f"{asked}: the chat template leaves the system prompt out; {cure}")
        own = self.system_prompt or ""
        if not own and plain.startswith(before) and plain.endswith(behind):
            own = plain[len(before) : len(plain) - len(behind)].strip()
        return replace(self, system_prompt=f"{own}\n\n{words}") if own else other

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
        self, prompt: str, response: str, max_len: int, train_on_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """The ids and next-token targets of one training pair, at most `max_len` tokens.

        A response that does not fit loses its end and with it the terminator, so that the model
        never learns to stop in mid-sentence. If not even one response token fits behind the prompt,
        both lists are empty.
        """
        lead = self.text(prompt)
        start = self._encode(lead)
        answer = self._encode(self._response_text(lead, prompt, response))
        ids = [*start, *answer, self.terminator][:max_len]
        if len(ids) <= len(start):
            return [], []
        first = 0 if train_on_prompt else len(start) - 1
        return ids, [IGNORED] * first + ids[first + 1 :] + [IGNORED]

    def feature_row(self, id: str, prompt: str, label: int, pooling: Pooling) -> PromptRow:
        """One prompt of stage one (Section 1 of the specification, ambiguities 1 and 6)."""
        ids = self.prompt_ids(prompt)
        # position 0 is an attention sink with a huge norm
        first = len(ids) - 1 if pooling is Pooling.last else min(1, len(ids) - 1)
        return PromptRow(id, ids, label, (first, len(ids)), [*ids[1:], IGNORED])

    def _turns(self, prompt: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, {"role": "user", "content": self.neutralised(prompt)}]

    def _render(self, turns: Sequence[dict[str, str]], generate: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            list(turns),
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=generate,
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

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)  # pyright: ignore[reportArgumentType]

    def neutralised(self, text: str) -> str:
        """User text whose chat control tokens are plain letters.

        A zero-width space after the first letter keeps the text readable and stops the tokenizer
        from seeing a control token.
        """
        for token in sorted(special_tokens(self.tokenizer), key=len, reverse=True):
            if len(token) > 1:
                text = text.replace(token, token[0] + ZERO_WIDTH_SPACE + token[1:])
        return text


def chat_format(
    tokenizer: Tokenizer,
    config: ModelConfig,
    terminator: Terminator = Terminator.auto,
    output_rows: Tensor | None = None,
) -> ChatFormat:
    """The format for a tokenizer: its own template, the one the config names, or a plain one.

    `output_rows` ([vocabulary, width], the head's weight) show `auto` whether the chat-end token
    was ever trained. Raises ConfigError for a template that is neither known nor a file, or fails
    to render.
    """
    template = chosen_template(tokenizer, config.template, config.name)
    probe = ChatFormat(tokenizer, template, config.system_prompt, 0, ())
    try:
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
    end = chosen_end(tokenizer, terminator, chat_end, stop, output_rows)
    return ChatFormat(tokenizer, template, config.system_prompt, end, stop)


def _chat_end(probe: ChatFormat) -> int | None:
    """The special token that the template puts behind the assistant's words."""
    lead = probe.text("x")
    whole = probe._render([*probe._turns("x"), {"role": "assistant", "content": "y"}], False)
    if not whole.startswith(lead):
        return None
    special = special_tokens(probe.tokenizer).values()
    behind = probe._encode(whole[len(lead) :].split("y", 1)[-1])
    return next((token for token in behind if token in special), None)
