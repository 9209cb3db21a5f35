"""The answers of an OpenAI-compatible server: replies, and the meaning of an error status.

Servers leave out different fields, so only the fields in use are required, and bodies are read as
plain JSON rather than as the client's own types. The order of the rules decides whether an error is
a passing fault, concerns this row alone, or concerns every request. Codes are OpenAI's
(platform.openai.com/docs/guides/error-codes); the wordings are those of servers that send no code,
such as vLLM and llama.cpp.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dcr.ending import encodable
from dcr.endpoints import ServerConfig, servers
from dcr.endpoints.servers import EndpointError

JSON = Any  # a result of json.loads
Message = Mapping[str, str]  # role and content

PASSING = {408, 409, 429}  # and all from 500; the client has already asked again, to no avail
FILTERED = {"content_filter", "content_policy_violation", "moderation_blocked"}
FILTER_WORDS = re.compile(r"content[ _-]?(filter|management policy|policy)|\bflagged\b", re.I)
TOO_LONG = re.compile(r"context[ _-]?(length|window)|maximum context|too many tokens", re.I)
UNSUPPORTED = {"unsupported_parameter", "unsupported_value", "unknown_parameter"}
NO_QUOTA = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
THOUGHTS = ("reasoning_content", "reasoning")  # fields in which servers keep thoughts apart
CONTENT = {"messages", "input"}  # the places of the row itself in a request


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
    """A moderation model's verdict on a text."""

    flagged: bool
    categories: tuple[str, ...]
    model: str


@dataclass(frozen=True)
class Failure:
    """One request without a usable answer.

    `error`: no answer came after all retries. `invalid`: the answer is not of the kind asked for
    (not JSON, no choices, stopped by a content filter).
    """

    status: str
    reason: str  # one line without secrets


def reply(body: JSON) -> Reply | Failure:
    """The first choice of a chat completion.

    An answer without choices or text, or cut off by a content filter is Failure("invalid"). A
    refusal in the server's own field is the text. Text may be empty: some models answer nothing.
    """
    choice = _first(_field(body, "choices"))
    message = _field(choice, "message")
    if not isinstance(message, Mapping):
        words = _field(_field(body, "error"), "message") or _field(body, "error")
        return Failure("invalid", f"no choices in the answer{f': {words}' if words else ''}")
    finish = str(_field(choice, "finish_reason") or "")
    if finish == "content_filter":
        return Failure("invalid", "stopped by the server's content filter")
    text = _text(_field(message, "refusal") or _field(message, "content"))
    if text is None and any(_field(message, key) for key in THOUGHTS):
        text = ""  # the limit came before the answer
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
    """The verdict on the one text sent; Failure("invalid") if the body holds none."""
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
    """A member of an object; lone surrogates, which no file could hold, are replaced in text."""
    member = value.get(name) if isinstance(value, Mapping) else None
    return encodable(member) if isinstance(member, str) else member


def _first(value: JSON) -> JSON:
    return value[0] if isinstance(value, list) and value else None


def _count(value: JSON) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def _text(content: JSON) -> str | None:
    """The text of a message, which some servers send in parts."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [text for part in parts if isinstance(text := _field(part, "text"), str)]
    return "".join(texts) if texts else None


def _top(choice: JSON) -> tuple[Mapping[str, float], ...] | None:
    """The log-probabilities per generated token; None if the server gave none.

    If two tokens read alike, such as halves of a character, the likelier one counts.
    """
    content = _field(_field(choice, "logprobs"), "content")
    if not isinstance(content, list):
        return None
    top = []
    for token in content:
        listed = _field(token, "top_logprobs")
        likeliest: dict[str, float] = {}
        for other in listed if isinstance(listed, list) and listed else [token]:
            text, logprob = _field(other, "token"), _field(other, "logprob")
            number = isinstance(logprob, (int, float)) and not math.isnan(logprob)
            if isinstance(text, str) and number:
                likeliest[text] = max(float(logprob), likeliest.get(text, -math.inf))
        top.append(likeliest)
    return tuple(top)


@dataclass(frozen=True)
class Rejection:
    """The parts of an answer with an error status that servers agree on."""

    status: int
    code: str
    param: str
    message: str
    named: tuple[str, ...]  # parameters that the body names by their place in the request
    target: str  # of a redirect


def rejection(status: int, body: Any, headers: Mapping[str, str]) -> Rejection:
    """The parts of an error body: OpenAI's {"error": {…}}, FastAPI's {"detail": […]}, or text."""
    error = body.get("error", body) if isinstance(body, Mapping) else body
    fields = error if isinstance(error, Mapping) else {}
    detail = fields.get("detail")
    listed = detail if isinstance(detail, list) else []
    places = [item.get("loc") for item in listed if isinstance(item, Mapping)]
    code = fields.get("code") or fields.get("type") or ""
    return Rejection(
        status=status,
        code=str(code),
        param=str(fields.get("param") or ""),
        message=str(fields.get("message") or detail or error or "no reason given"),
        named=tuple(str(place[-1]) for place in places if isinstance(place, list) and place),
        target=headers.get("location", ""),
    )


def judged(rejected: Rejection, server: ServerConfig, node: str) -> Failure:
    """The failure of the row whose request `server` has `rejected`.

    Raises EndpointError, which names setting and cure, if every request would end the same way.
    """
    words = servers.redacted(rejected.message, server)
    reason = f"HTTP {rejected.status}: {words}"
    key = f"{servers.setting(node, 'key')}={servers.variable(server) or 'null'}"
    if rejected.code in NO_QUOTA or rejected.status == 402:
        raise EndpointError(
            f"{key}: the account behind this key has no quota left ({words}); add credit, or name "
            f"another server with {servers.setting(node, 'url')}"
        )
    if rejected.status in PASSING or rejected.status >= 500:
        return Failure("error", reason)
    if rejected.code in FILTERED or FILTER_WORDS.search(rejected.message):
        return Failure("invalid", f"content filter, {reason}")
    if rejected.code == "context_length_exceeded" or TOO_LONG.search(rejected.message):
        return Failure("invalid", reason)
    _raise_if_hopeless(rejected, words, server, node)
    about_row = re.split(r"[.\[]", rejected.param)[0] in CONTENT or rejected.status == 413
    return Failure("invalid" if about_row else "error", reason)


def _raise_if_hopeless(rejected: Rejection, words: str, server: ServerConfig, node: str) -> None:
    """Raises EndpointError for a redirect, or a refused key, model, address or parameter."""
    where = servers.address(server)
    if 300 <= rejected.status < 400:
        target = servers.redacted(rejected.target, server) or "nowhere"
        raise EndpointError(
            f"{servers.setting(node, 'url')}={where}: redirects to {target} (HTTP "
            f"{rejected.status}), which is not followed; give the address that answers itself"
        )
    key = f"{servers.setting(node, 'key')}={servers.variable(server) or 'null'}"
    model = servers.setting(node, "model")
    if rejected.status == 401:
        says, cure = "does not take this", "export the right one"
        if servers.variable(server) is None:
            says, cure = "wants a", "name the environment variable that holds it"
        raise EndpointError(f"{key}: {where} {says} key ({words}); {cure}")
    if rejected.status == 403:
        raise EndpointError(
            f"{key}: this key may not use {model}={server.model} at {where} ({words}); "
            "export another key, or name another model"
        )
    unknown = rejected.code in ("model_not_found", "model_not_available")
    named = rejected.status == 404 and re.search(r"\bmodel\b", rejected.message, re.I)
    if unknown or rejected.param == "model" or named:
        raise EndpointError(
            f"{model}={server.model}: {where} has no such model ({words}); name one that it has"
        )
    if rejected.status in (404, 405):
        raise EndpointError(
            f"{servers.setting(node, 'url')}={where}: nothing answers requests there ({words}); "
            "give the address that a client would be given, usually ending in /v1"
        )
    blamed = _blamed(rejected, servers.sent_parameters(server))
    if blamed in server.parameters:
        name = f"{servers.setting(node, 'parameters')}.{blamed}"
        raise EndpointError(
            f"{name}: {where} does not take it ({words}); leave it out with {name}=null, and add "
            f"another with +{servers.setting(node, 'parameters')}.<name>=<value>"
        )
    if blamed:
        raise EndpointError(
            f"{model}={server.model}: {where} does not take {blamed} for this model ({words}); "
            "name another model"
        )


def _blamed(rejected: Rejection, sent: Iterable[str]) -> str | None:
    """The parameter that a rejection names: by field, by place, or by words.

    A parameter that was not sent counts only if the code says so (such as a role in `messages`).
    """
    names = list(sent)
    root = re.split(r"[.\[]", rejected.param)[0]
    if root in names:
        return root
    if root and rejected.code in UNSUPPORTED:
        return rejected.param
    for place in rejected.named:
        if place in names:
            return place
    if root in CONTENT or rejected.status not in (400, 422):
        return None
    places = [
        (match.start(), name)
        for name in names
        if (match := re.search(rf"(?<!\w){re.escape(name)}(?!\w)", rejected.message))
    ]
    return min(places)[1] if places else None
