"""What goes to an OpenAI-compatible server and what comes back: read from the bodies of answers.

Servers differ in what they leave out, so that only what is used is required, and bodies are read
as plain JSON rather than as the client's own types.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dcr.config import UserError
from dcr.text import encodable

JSON = Any  # whatever json.loads returns
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


def reply(body: JSON) -> Reply | Failure:
    """A chat completion, of its first choice.

    Failure("invalid") without choices or text, for a refusal in the server's own field, and
    where a content filter cut the answer off. Text may be empty: some models answer nothing.
    """
    choice = _first(_field(body, "choices"))
    message = _field(choice, "message")
    if not isinstance(message, Mapping):
        words = _field(_field(body, "error"), "message") or _field(body, "error")
        return Failure("invalid", f"no choices in the answer{f': {words}' if words else ''}")
    finish = str(_field(choice, "finish_reason") or "")
    if finish == "content_filter":
        return Failure("invalid", "stopped by the server's content filter")
    if refusal := _field(message, "refusal"):
        return Failure("invalid", f"the model refused: {refusal}")
    text = _text(_field(message, "content"))
    if text is None:
        return Failure("invalid", f"no text in the answer (finish reason: {finish or 'none'})")
    usage = _field(body, "usage")
    return Reply(
        text=text,
        finish=finish,
        top=_top(choice),
        prompt_tokens=_count(_field(usage, "prompt_tokens")),
        completion_tokens=_count(_field(usage, "completion_tokens")),
    )


def moderation(body: JSON) -> Moderation | Failure:
    """The verdict on the one text sent; Failure("invalid") where the body holds none."""
    result = _first(_field(body, "results"))
    flagged = _field(result, "flagged")
    if not isinstance(flagged, bool):
        return Failure("invalid", "no result with `flagged` in the answer")
    categories = _field(result, "categories")
    named = categories if isinstance(categories, Mapping) else {}
    return Moderation(
        flagged=flagged,
        categories=tuple(encodable(str(name)) for name, holds in named.items() if holds is True),
        model=str(_field(body, "model") or ""),
    )


def _field(value: JSON, name: str) -> JSON:
    """A member of an object; text without half characters, which no file could hold."""
    member = value.get(name) if isinstance(value, Mapping) else None
    return encodable(member) if isinstance(member, str) else member


def _first(value: JSON) -> JSON:
    return value[0] if isinstance(value, list) and value else None


def _count(value: JSON) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def _text(content: JSON) -> str | None:
    """The text of a message, which some servers send in parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [_field(part, "text") for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        return "".join(texts) if texts else None
    return None


def _top(choice: JSON) -> tuple[Mapping[str, float], ...] | None:
    """Log-probabilities per generated token, None where the server gave none."""
    content = _field(_field(choice, "logprobs"), "content")
    if not isinstance(content, list):
        return None
    return tuple(_alternatives(token) for token in content)


def _alternatives(token: JSON) -> dict[str, float]:
    """Of two tokens that read alike, such as halves of a character, the likelier one."""
    listed = _field(token, "top_logprobs")
    likeliest: dict[str, float] = {}
    for other in listed if isinstance(listed, list) and listed else [token]:
        text, logprob = _field(other, "token"), _field(other, "logprob")
        if isinstance(text, str) and isinstance(logprob, (int, float)) and not math.isnan(logprob):
            likeliest[text] = max(float(logprob), likeliest.get(text, -math.inf))
    return likeliest
