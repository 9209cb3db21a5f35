"""The chat template of a tokenizer: its own, one that a setting names, or ours where it has none.

An export's tokenizer keeps the template that its model was trained with.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcr.core.config import ConfigError, Language
from dcr.core.prompts import ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:  # a user's error does not wait for it
    Tokenizer = Any

log = logging.getLogger(__name__)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
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
UNTEMPLATED: set[str] = set()  # models whose template this command has warned of
LANGUAGE = "answer_language"  # in an export's tokenizer_config.json, where it is not English
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
    if (text := written_template(named)) is not None:
        return text
    raise ConfigError(f"model.template={named}: give {', '.join(TEMPLATES)} or a .jinja file")


def written_template(named: str | None) -> str | None:
    """The text of a user's template; None if `model.template` names no file.

    Raises ConfigError where it cannot be read.
    """
    if not named or not Path(named).is_file():
        return None
    try:
        return Path(named).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"model.template={named}: is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"model.template={named}: cannot be read ({why}); mend it") from error


def _with_begin_token(tokenizer: Tokenizer, template: str) -> str:
    """A template of ours behind the token that this tokenizer begins every text with, if any.

    Llama-3's own template writes it too; Gemma and Llama answer badly without it.
    """
    begins: Any = tokenizer("x")["input_ids"]
    begun = tokenizer.bos_token_id is not None and begins[0] == tokenizer.bos_token_id
    return "{{ bos_token }}" + template if begun else template


# --- the template of an export --------------------------------------------------------------------


def keep_template(chat: ChatFormat) -> None:
    """Gives the tokenizer the format: its template, default system prompt and language."""
    tokenizer = chat.tokenizer

    def templated() -> Any:
        turns = [{"role": "user", "content": "x"}]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    tokenizer.chat_template = chat.template
    if templated() != chat.text("x"):
        system = json.dumps(chat.system_prompt, ensure_ascii=False)  # a Jinja string as well
        turn = f"{{'role': 'system', 'content': {system}}}"
        tokenizer.chat_template = (
            "{% if messages[0]['role'] != 'system' %}"
            f"{{% set messages = [{turn}] + messages %}}{{% endif %}}{chat.template}"
        )
    assert templated() == chat.text("x"), "the tokenizer speaks otherwise than the format"
    if chat.language is not Language.en:
        tokenizer.init_kwargs[LANGUAGE] = chat.language.value


def kept_language(tokenizer: Tokenizer) -> Language:
    """The language of answers that `keep_template` has put down; English if it has not.

    Raises ConfigError for one whose refusals are not known.
    """
    named = tokenizer.init_kwargs.get(LANGUAGE, Language.en.value)
    if named not in Language.__members__:
        known = ", ".join(Language.__members__)
        raise ConfigError(f"tokenizer_config.json: {LANGUAGE}={named}: choose one of {known}")
    return Language(named)
