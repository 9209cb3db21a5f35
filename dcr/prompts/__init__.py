"""From words to token ids: chat templates, terminators, label masks and padding.

Every prompt of every stage and evaluation passes through `ChatFormat`, so that what stage one
reads, what stage two trains on and what generation continues from are the same tokens.
"""

from dcr.prompts.chat import ZERO_WIDTH_SPACE, ChatFormat, chat_format
from dcr.prompts.endings import looks_trained, unused_tokens
from dcr.prompts.rows import IGNORED, PairRow, PromptRow, attention_mask, padded
from dcr.prompts.templates import CHATML, LLAMA3, PLAIN, TEMPLATES
