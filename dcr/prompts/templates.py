"""Chat templates: the model's own, one of ours, or the user's file."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import TemplateRuntimeError
from transformers import PreTrainedTokenizerBase

from dcr.config import ConfigError

log = logging.getLogger(__name__)

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


def chosen_template(tokenizer: PreTrainedTokenizerBase, named: str | None) -> str:
    """The template that `model.template` names, else the tokenizer's own, else the plain one.

    Raises ConfigError for a name that is neither known nor a file.
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
        log.warning(
            "the tokenizer ships no chat template: using the plain instruction format "
            "(model.template=chatml, llama3 or a .jinja file gives another)"
        )
        return _begun(tokenizer, PLAIN)
    if named in TEMPLATES:
        return _begun(tokenizer, TEMPLATES[named])
    if Path(named).is_file():
        try:
            return Path(named).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"model.template={named}: cannot be read ({error})") from error
    raise ConfigError(f"model.template={named}: give {', '.join(TEMPLATES)} or a .jinja file")


def _begun(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """A template of ours behind the token that this tokenizer begins every text with, if any.

    Llama-3's own template writes it too; Gemma and Llama lose their footing without it.
    """
    begins: Any = tokenizer("x")["input_ids"]
    begun = tokenizer.bos_token_id is not None and begins[0] == tokenizer.bos_token_id
    return "{{ bos_token }}" + template if begun else template


@contextmanager
def bounded(steps: int = 1_000_000) -> Iterator[None]:
    """Templates rendered inside end after so many of their own lines.

    A template comes with a model, and may loop for as long as it likes. Raises jinja2's
    TemplateRuntimeError. Slows rendering down: for a trial, not for every prompt.
    """
    left = steps

    def count(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        left -= event == "line"
        if left < 0:
            raise TemplateRuntimeError(f"it is not done after {steps} steps")
        return count

    def enter(frame: Any, event: str, argument: Any) -> Any:
        return count if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)
