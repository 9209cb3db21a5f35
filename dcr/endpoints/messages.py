"""What goes to an OpenAI-compatible server and what comes back."""

from collections.abc import Mapping
from dataclasses import dataclass

from dcr.config import UserError

Message = Mapping[str, str]  # role and content


class EndpointError(UserError):
    """Every further request would fail the same way: no key, no such model, a parameter refused."""


@dataclass(frozen=True)
class Reply:
    """A chat completion. `top` has, per generated token, log-probabilities by token text."""

    text: str
    finish: str
    top: tuple[Mapping[str, float], ...] | None
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Moderation:
    """What a moderation model says of a text."""

    flagged: bool
    categories: tuple[str, ...]
    model: str


@dataclass(frozen=True)
class Failure:
    """One request that brought nothing usable.

    `error`: no answer after all retries. `invalid`: an answer that is not what was asked for
    (not JSON, no choices, stopped by a content filter).
    """

    status: str
    reason: str  # one line without secrets
