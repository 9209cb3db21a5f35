"""OpenAI-compatible servers: bounded, retried requests.

`check` before anything else, then `chats` or `moderations`; `spend` and `usage` price the tokens.
"""

from dcr.endpoints.answers import Failure, Message, Moderation, Reply
from dcr.endpoints.calls import chats, moderations
from dcr.endpoints.servers import (
    EndpointError,
    check,
    sent_parameters,
    spend,
    usage,
)
