"""Prompts as token ids: chat templates, terminators and label masks.

Every prompt of every stage and evaluation passes through `ChatFormat`, so that stage one, stage two
and generation see the same tokens.
"""

from dcr.core.prompts.chat import (
    IGNORED,
    ZERO_WIDTH_SPACE,
    ChatFormat,
    PairRow,
    PromptRow,
    chat_format,
)
from dcr.core.prompts.templates import (
    CHATML,
    LLAMA3,
    PLAIN,
    TEMPLATES,
    UNTEMPLATED,
    looks_trained,
    special_tokens,
    unused_tokens,
)
