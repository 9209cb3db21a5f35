"""OpenAI-compatible servers: bounded, retried, counted requests.

`check` before anything else, then `chats` or `moderations`; `spend` prices the tokens.
"""

from dcr.endpoints.calls import chats, moderations
from dcr.endpoints.replies import EndpointError, Failure, Message, Moderation, Reply
from dcr.endpoints.servers import check, spend

__all__ = [
    "EndpointError",
    "Failure",
    "Message",
    "Moderation",
    "Reply",
    "chats",
    "check",
    "moderations",
    "spend",
]
