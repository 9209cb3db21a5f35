"""From words to token ids: chat templates, terminators, label masks and padding.

Every prompt of every stage and evaluation passes through `ChatFormat`, so that what stage one
reads, what stage two trains on and what generation continues from are the same tokens.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dcr.config import ConfigError, ModelConfig, Pooling, Template, Terminator

log = logging.getLogger(__name__)

IGNORED = -100  # label of positions without a loss, as everywhere in transformers
ZERO_WIDTH_SPACE = "\u200b"

LLAMA3 = (
    "{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "{% elif m.role == 'system' %}{{ m.content }}\n\n"
    "{% else %}### Response:\n{{ m.content }}{{ eos_token or '' }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML, "plain": PLAIN}


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
    """How this model is spoken to: template, system turn, terminator and stop set."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    system_prompt: str | None
    terminator: int
    stop: tuple[int, ...]

    def text(self, prompt: str) -> str:
        """The templated prompt up to where the assistant begins to speak."""
        return self._render(self._turns(prompt), generate=True)

    def prompt_ids(self, prompt: str) -> list[int]:
        return self._encode(self.text(prompt))

    def pair(
        self, prompt: str, response: str, max_len: int, train_on_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """Ids and next-token targets of one training pair, at most `max_len` tokens.

        A response that does not fit loses its end and with it the terminator, so that the model
        never learns to stop in mid-sentence. An empty list of ids means that not even one
        response token fits behind the prompt.
        """
        lead = self.text(prompt)
        start = self._encode(lead)
        answer = self._encode(self._response_text(lead, prompt, response)) + [self.terminator]
        ids = (start + answer)[:max_len]
        if len(ids) <= len(start):
            return [], []
        first = 0 if train_on_prompt else len(start) - 1
        return ids, [IGNORED] * first + ids[first + 1 :] + [IGNORED]

    def feature_row(
        self, id: str, prompt: str, label: int, template: Template, pooling: Pooling, user_nll: bool
    ) -> PromptRow:
        """One prompt of stage one (Section 1 of the specification, ambiguities 1, 2 and 6)."""
        text = prompt if template is Template.raw else self.text(prompt)
        encoded = self.tokenizer(
            text, add_special_tokens=template is Template.raw, return_offsets_mapping=True
        )
        ids: list[int] = list(encoded["input_ids"])  # pyright: ignore
        first, last = self._user_span(text, prompt, encoded["offset_mapping"])
        spans = {
            Pooling.last: (len(ids) - 1, len(ids)),
            Pooling.last_user_token: (last, last + 1),
            Pooling.mean: (1, len(ids)),  # position 0 is an attention sink with a huge norm
        }
        targets = [*ids[1:], IGNORED]
        if user_nll:
            targets = [t if first - 1 <= i < last else IGNORED for i, t in enumerate(targets)]
        return PromptRow(id, ids, label, spans[pooling], targets)

    def _user_span(self, text: str, prompt: str, offsets: Any) -> tuple[int, int]:
        """First and last token of the user's words."""
        words = self.neutralised(prompt).strip()
        begin = text.rfind(words)
        end = begin + len(words)
        inside = [i for i, (a, b) in enumerate(offsets) if b > begin and a < end and b > a]
        return inside[0], inside[-1]

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
        found = behind.find(words)
        return behind[: found + len(words)] if found >= 0 else words

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)  # pyright: ignore[reportArgumentType]

    def neutralised(self, text: str) -> str:
        """User text in which a chat control token is only its letters.

        A zero-width space after the first letter keeps the text readable and stops the tokenizer
        from seeing a control token.
        """
        for token in self._control_tokens():
            text = text.replace(token, token[0] + ZERO_WIDTH_SPACE + token[1:])
        return text

    def _control_tokens(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = {t.content for t in added if t.special} | set(self.tokenizer.all_special_tokens)
        return sorted((t for t in tokens if len(t) > 1), key=len, reverse=True)


def chat_format(
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    terminator: Terminator = Terminator.auto,
    output_rows: Tensor | None = None,
    base_stop: Sequence[int] = (),
) -> ChatFormat:
    """The format for a tokenizer: its own template, the one the config names, or a plain one.

    `output_rows` ([vocabulary, width], the head's weight) lets `auto` tell whether the chat-end
    token was ever trained; `base_stop` are end tokens named by the generation config.
    Raises ConfigError for a template that is neither known nor a file.
    """
    template = _template(tokenizer, config.template)
    base = tokenizer.eos_token_id
    probe = ChatFormat(tokenizer, template, config.system_prompt, 0, ())
    chat_end = _chat_end(probe)
    candidates = [chat_end, base, *base_stop, *_known_ends(tokenizer)]
    stop = tuple(dict.fromkeys(int(t) for t in candidates if t is not None))
    if not stop:
        raise ConfigError(f"model.name={config.name}: its tokenizer has no end-of-text token")
    chosen = chat_end if chat_end is not None else stop[0]
    fallback = next((t for t in stop if t != chosen), chosen)
    if terminator is Terminator.base_eos:
        chosen = fallback
    elif terminator is Terminator.auto and output_rows is not None:
        if not looks_trained(output_rows, chosen, unused_tokens(tokenizer, len(output_rows))):
            log.warning(
                "the chat-end token %r looks untrained: responses end with %r instead "
                "(sft.terminator=chat_end keeps it)",
                tokenizer.convert_ids_to_tokens(chosen),
                tokenizer.convert_ids_to_tokens(fallback),
            )
            chosen = fallback
    return ChatFormat(tokenizer, template, config.system_prompt, chosen, stop)


def _template(tokenizer: PreTrainedTokenizerBase, named: str | None) -> str:
    if named is None:
        if isinstance(tokenizer.chat_template, str):
            return tokenizer.chat_template
        log.warning(
            "the tokenizer ships no chat template: using the plain instruction format "
            "(model.template=chatml, llama3 or a .jinja file gives another)"
        )
        return PLAIN
    if named in TEMPLATES:
        return TEMPLATES[named]
    if Path(named).is_file():
        return Path(named).read_text(encoding="utf-8")
    raise ConfigError(f"model.template={named}: give {', '.join(TEMPLATES)} or a .jinja file")


def _known_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End tokens of common bases, which an instruct tokenizer no longer names as its EOS."""
    vocabulary = tokenizer.get_vocab()
    return [
        vocabulary[t] for t in ("<|endoftext|>", "<|end_of_text|>", "</s>") if t in vocabulary
    ]


def _chat_end(probe: ChatFormat) -> int | None:
    """The special token that the template puts after what the assistant said."""
    lead = probe.text("x")
    whole = probe._render([*probe._turns("x"), {"role": "assistant", "content": "y"}], False)
    if not whole.startswith(lead):
        return None
    behind = whole[len(lead) :].split("y", 1)[-1]
    special = set(probe.tokenizer.all_special_ids) | {
        index for index, token in probe.tokenizer.added_tokens_decoder.items() if token.special
    }
    return next((i for i in probe._encode(behind) if i in special), None)


def unused_tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[int]:
    """Token ids no training text can have held: padding rows and reserved names."""
    padding = list(range(len(tokenizer), rows))
    reserved = [
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if any(word in token.content.lower() for word in ("reserved", "unused", "<|extra_"))
    ]
    return sorted({*padding, *reserved} & set(range(rows)))


def looks_trained(rows: Float[Tensor, "vocabulary width"], token: int, unused: list[int]) -> bool:
    """Whether a token's output row differs from rows that training never touched.

    An untouched row either has hardly any norm, or lies as near the mean of the unused rows as
    they lie themselves.
    """
    norms = rows.detach().float().norm(dim=1)
    if norms[token] < 0.25 * norms.median():
        return False
    others = [index for index in unused if index != token]
    if len(others) < 2:
        return True
    reference = rows[others].detach().float()
    centre = reference.mean(0)
    spread = (reference - centre).norm(dim=1).median()
    # rows of one random initialisation lie at nearly one distance from their mean in high dimension
    return bool((rows[token].detach().float() - centre).norm() > 1.25 * spread + 1e-6)


def padded(
    sequences: Sequence[Sequence[int]], value: int, left: bool = False
) -> Int[Tensor, "batch length"]:
    """Sequences as one tensor, filled up with `value` on the right (or left)."""
    length = max(map(len, sequences))
    rows = [
        [value] * (length - len(s)) * left + list(s) + [value] * (length - len(s)) * (not left)
        for s in sequences
    ]
    return torch.tensor(rows, dtype=torch.long)


def attention_mask(
    sequences: Sequence[Sequence[int]], left: bool = False
) -> Bool[Tensor, "batch length"]:
    """True where a token stands. Never derived from ids: a pad id can be a real end token."""
    return padded([[1] * len(s) for s in sequences], 0, left).bool()
