"""What an error status means: try again, this row alone, or every request.

The order of the rules is the contract. Codes are OpenAI's (platform.openai.com/docs/guides/
error-codes); the wordings are those of servers that send no code, such as vLLM and llama.cpp.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from dcr.config import ServerConfig
from dcr.endpoints.replies import EndpointError, Failure
from dcr.endpoints.servers import address, redacted, sent_parameters, setting, variable

PASSING = {408, 409, 429}  # and everything from 500: over when asked again
FILTERED = {"content_filter", "content_policy_violation", "moderation_blocked"}
FILTER_WORDS = re.compile(r"content[ _-]?(filter|management policy|policy)|\bflagged\b", re.I)
TOO_LONG = re.compile(r"context[ _-]?(length|window)|maximum context|too many tokens", re.I)
UNSUPPORTED = {"unsupported_parameter", "unsupported_value", "unknown_parameter"}
NO_QUOTA = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
LONGEST_WAIT = 60.0  # seconds, whatever the server asks for
CONTENT = {"messages", "input"}  # the row itself, by its place in a request


@dataclass(frozen=True)
class Again:
    """An attempt that another may mend. `wait` is what the server asks for, in seconds."""

    failure: Failure
    wait: float | None = None


@dataclass(frozen=True)
class Rejection:
    """An answer with an error status, by the parts that servers agree on."""

    status: int
    code: str
    param: str
    message: str
    named: tuple[str, ...]  # parameters that the body names by their place in the request
    wait: float | None  # seconds the server asks to wait
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
        wait=wait_asked_for(headers),
        target=headers.get("location", ""),
    )


def judged(rejected: Rejection, server: ServerConfig, node: str) -> Again | Failure:
    """What to do about `rejected`, an answer of `server`.

    Raises EndpointError, which names setting and cure, where every request would end the same.
    """
    words = redacted(rejected.message, server)
    reason = f"HTTP {rejected.status}: {words}"
    key = _key(server, node)
    if rejected.code in NO_QUOTA or rejected.status == 402:
        raise EndpointError(
            f"{key}: the account behind this key has no quota left ({words}); add credit, or name "
            f"another server with {setting(node, 'url')}"
        )
    if rejected.status in PASSING or rejected.status >= 500:
        return Again(Failure("error", reason), rejected.wait)
    if rejected.code in FILTERED or FILTER_WORDS.search(rejected.message):
        return Failure("invalid", f"content filter, {reason}")
    if rejected.code == "context_length_exceeded" or TOO_LONG.search(rejected.message):
        return Failure("invalid", reason)
    _raise_where_hopeless(rejected, words, server, node)
    about_row = re.split(r"[.\[]", rejected.param)[0] in CONTENT or rejected.status == 413
    return Failure("invalid" if about_row else "error", reason)


def _key(server: ServerConfig, node: str) -> str:
    return f"{setting(node, 'key')}={variable(server) or 'null'}"


def _raise_where_hopeless(rejected: Rejection, words: str, server: ServerConfig, node: str) -> None:
    """EndpointError for a redirect, or a key, model, address or parameter that is not taken."""
    where = address(server)
    if 300 <= rejected.status < 400:
        target = redacted(rejected.target, server) or "nowhere"
        raise EndpointError(
            f"{setting(node, 'url')}={where}: redirects to {target} (HTTP "
            f"{rejected.status}), which is not followed; give the address that answers itself"
        )
    key, model = _key(server, node), setting(node, "model")
    if rejected.status == 401 and variable(server) is None:
        raise EndpointError(
            f"{key}: {where} wants a key ({words}); name the environment variable that holds it"
        )
    if rejected.status == 401:
        raise EndpointError(
            f"{key}: {where} does not take this key ({words}); export the right one"
        )
    if rejected.status == 403:
        raise EndpointError(
            f"{key}: this key may not use {model}={server.model} at {where} ({words}); "
            "export another key, or name another model"
        )
    if _is_about_model(rejected):
        raise EndpointError(
            f"{model}={server.model}: {where} has no such model ({words}); name one that it has"
        )
    if rejected.status in (404, 405):
        raise EndpointError(
            f"{setting(node, 'url')}={where}: nothing answers requests there ({words}); give the "
            "address that a client would be given, usually ending in /v1"
        )
    blamed = _blamed(rejected, sent_parameters(server))
    if blamed in server.parameters:
        name = f"{setting(node, 'parameters')}.{blamed}"
        raise EndpointError(
            f"{name}: {where} does not take it ({words}); leave it out with {name}=null, and add "
            f"another with +{setting(node, 'parameters')}.<name>=<value>"
        )
    if blamed:
        raise EndpointError(
            f"{model}={server.model}: {where} does not take {blamed} for this model ({words}); "
            "name another model"
        )


def _is_about_model(rejected: Rejection) -> bool:
    if rejected.code in ("model_not_found", "model_not_available") or rejected.param == "model":
        return True
    return rejected.status == 404 and bool(re.search(r"\bmodel\b", rejected.message, re.I))


def _blamed(rejected: Rejection, sent: Iterable[str]) -> str | None:
    """The parameter that a rejection names: by field, by place, or by words.

    One that was not sent counts only where the code says so (such as a role in `messages`).
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


def wait_asked_for(headers: Mapping[str, str]) -> float | None:
    """Seconds from `retry-after-ms` or `retry-after` (seconds, or a date), LONGEST_WAIT at most.

    None without either, and for what is neither a time nor one to come.
    """
    for name, in_a_second in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers.get(name, "")) / in_a_second
        except ValueError:
            continue
        if seconds >= 0:  # neither negative nor NaN
            return min(seconds, LONGEST_WAIT)
    try:
        date = parsedate_to_datetime(headers.get("retry-after", ""))
    except (ValueError, OverflowError):
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return min(max(0.0, (date - datetime.now(UTC)).total_seconds()), LONGEST_WAIT)
