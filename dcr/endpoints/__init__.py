"""OpenAI-compatible servers, one or several of a model: bounded, retried, counted requests.

`check_served` before anything else, then `chats` or `moderations`; `spend` and `usage` price the
tokens, and `recorded` keeps what every server took.
"""

from dcr.endpoints.answers import Failure, Message, Moderation, Reply
from dcr.endpoints.calls import RECORD, chats, moderations, recorded
from dcr.endpoints.servers import (
    EndpointError,
    check,
    check_served,
    each,
    first_url,
    sent_parameters,
    spend,
    usage,
)
