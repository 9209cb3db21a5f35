"""Chat templates (the model's own, one of ours, or the user's file) and the ends of turns."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float

from dcr.core.config import ConfigError, Terminator
from dcr.core.text import CHATML

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:  # a plan, which has neither, writes prompts as well
    Tensor = Tokenizer = Any

log = logging.getLogger(__name__)

LLAMA3 = (
    "{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "{% elif m.role == 'system' %}{{ m.content }}\n\n"
    "{% else %}### Response:\n{{ m.content }}{{ eos_token or '' }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
# end-of-text tokens of common bases, which an instruct tokenizer no longer names as its own
BASE_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>")
UNTEMPLATED: set[str] = set()  # models that this command has warned have no template
TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML, "plain": PLAIN}


def chosen_template(tokenizer: Tokenizer, named: str | None, model: str) -> str:
    """The template that `model.template` names, else the tokenizer's own, else the plain one.

    A warning, once a `model`, tells that the plain one is used. Raises ConfigError for a name that
    is neither known nor a file.
    """
    if named is None:
        shipped: Any = tokenizer.chat_template
        shipped = shipped.get("default") if isinstance(shipped, dict) else shipped
        if shipped and not isinstance(shipped, str):
            raise ConfigError(
                "model.name: its tokenizer's chat_template is no text; mend tokenizer_config.json "
                "or name another with model.template"
            )
        if shipped:
            return shipped
        if model not in UNTEMPLATED:
            UNTEMPLATED.add(model)
            log.warning(
                "model.name=%s: its tokenizer ships no chat template: using the plain instruction "
                "format (model.template=chatml, llama3 or a .jinja file gives another)",
                model,
            )
        return _with_begin_token(tokenizer, PLAIN)
    if named in TEMPLATES:
        return _with_begin_token(tokenizer, TEMPLATES[named])
    if Path(named).is_file():
        try:
            return Path(named).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"model.template={named}: cannot be read ({error})") from error
    raise ConfigError(f"model.template={named}: give {', '.join(TEMPLATES)} or a .jinja file")


def _with_begin_token(tokenizer: Tokenizer, template: str) -> str:
    """A template of ours behind the token that this tokenizer begins every text with, if any.

    Llama-3's own template writes it too; Gemma and Llama answer badly without it.
    """
    begins: Any = tokenizer("x")["input_ids"]
    begun = tokenizer.bos_token_id is not None and begins[0] == tokenizer.bos_token_id
    return "{{ bos_token }}" + template if begun else template


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of a tokenizer's control tokens, by their text."""
    added = tokenizer.added_tokens_decoder.items()
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {token.content: index for index, token in added if token.special} | dict(named)


# --- the end of a turn: the token that training responses end with, and the stop tokens ---


def stop_tokens(tokenizer: Tokenizer, chat_end: int | None) -> tuple[int, ...]:
    """Every token that ends a response: the chat's end, and the base's end of text."""
    vocabulary = tokenizer.get_vocab()
    bases = [vocabulary[token] for token in BASE_ENDS if token in vocabulary]
    ends: tuple[Any, ...] = (chat_end, tokenizer.eos_token_id, *bases)
    return tuple(dict.fromkeys(int(token) for token in ends if token is not None))


def chosen_end(
    tokenizer: Tokenizer,
    terminator: Terminator,
    chat_end: int | None,
    stop: Sequence[int],
    output_rows: Float[Tensor, "vocabulary width"] | None,
) -> int:
    """The token that training responses end with: the chat's end, or the base's end of text.

    `auto` takes the latter if the output row of the former looks untrained, since LoRA leaves the
    head alone and would never learn to emit it.
    """
    end = stop[0]
    # an instruct tokenizer names the chat end as its end of text: its base's own comes after it
    base = end if chat_end is None else next((token for token in stop if token != end), end)
    if terminator is Terminator.base_eos:
        return base
    if terminator is Terminator.chat_end or output_rows is None or base == end:
        return end
    if looks_trained(output_rows, end, unused_tokens(tokenizer, len(output_rows))):
        return end
    log.warning(
        "the chat-end token %r looks untrained: responses end with %r instead "
        "(sft.terminator=chat_end keeps it)",
        tokenizer.convert_ids_to_tokens(end),
        tokenizer.convert_ids_to_tokens(base),
    )
    return base


def unused_tokens(tokenizer: Tokenizer, rows: int) -> list[int]:
    """The token ids that no training text can have held: padding rows and reserved names."""
    padding = list(range(len(tokenizer), rows))
    reserved = [
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if any(word in token.content.lower() for word in ("reserved", "unused", "<|extra_"))
    ]
    return sorted({*padding, *reserved} & set(range(rows)))


def looks_trained(rows: Float[Tensor, "vocabulary width"], token: int, unused: list[int]) -> bool:
    """Whether a token's output row differs from rows that training never touched.

    An untouched row either has hardly any norm, or lies as near to the mean of the unused rows as
    they do.
    """
    norms = rows.detach().float().norm(dim=1)
    if norms[token] < 0.25 * norms.median():
        return False
    others = [index for index in unused if index != token]
    if len(others) < 2:
        return True
    reference = rows[others].detach().float()
    centre = reference.mean(0)
    # in high dimension, rows of one random initialisation lie at nearly one distance from their
    # mean, and a row that is part of the mean lies nearer to it than one that is not
    part = math.sqrt((len(others) + 1) / (len(others) - 1))
    spread = part * (reference - centre).norm(dim=1).median()
    return bool((rows[token].detach().float() - centre).norm() > 1.25 * spread + 1e-6)
