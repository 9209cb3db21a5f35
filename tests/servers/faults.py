"""A proxy that stands in front of a server and misbehaves by a script.

A fault is an answer of the proxy's own, so a request that meets one never reaches the server
behind: what is forwarded is what would have been paid, and is counted per distinct body.
"""

import json
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from tests.servers.loopback import Answer, Request, answering, as_json
from tests.servers.scripted import completion, rejected

Script = Callable[[bytes, int], Answer | None]  # of body and attempt (from 0): a fault, or None

_WHOLE = json.dumps(completion("an answer that does not arrive")).encode()
FAULTS = {
    "rate_limited": replace(
        rejected(429, "Rate limit reached", code="rate_limit_exceeded"),
        headers={"Retry-After": "0"},
    ),
    "server_error": rejected(500, "The server had an error"),
    "unavailable": Answer(b"<html>503</html>", 503, kind="text/html"),
    "dropped": Answer(b"", cut=-1),
    "half_body": Answer(_WHOLE, cut=len(_WHOLE) // 2),
    "hang": Answer(_WHOLE, delay=30.0),
    "garbage": Answer(b"\x80\x81 garbage \xff", kind="application/octet-stream"),
    "html": Answer(b"<html>a proxy's greeting</html>", kind="text/html"),
    "half_json": Answer(_WHOLE[: len(_WHOLE) // 2]),
    "empty": Answer(b""),
    "no_choices": as_json({"id": "c", "choices": []}),
    "no_content": as_json(completion(None)),
    "filtered": as_json(completion("", finish="content_filter")),
    "filtered_prompt": rejected(400, "The response was filtered", code="content_filter"),
    "unsupported": rejected(
        400,
        "Unsupported parameter: 'max_tokens' is not supported with this model. "
        "Use 'max_completion_tokens' instead.",
        code="unsupported_parameter",
        param="max_tokens",
        type="invalid_request_error",
    ),
    "no_quota": rejected(429, "You exceeded your current quota", code="insufficient_quota"),
    "no_key": rejected(401, "Incorrect API key provided", code="invalid_api_key"),
    "no_model": rejected(404, "The model does not exist", code="model_not_found"),
}


@dataclass(frozen=True)
class Proxy:
    """A running proxy with its counts per distinct request body."""

    url: str
    injected: Counter[bytes] = field(default_factory=Counter)
    forwarded: Counter[bytes] = field(default_factory=Counter)
    delivered: Counter[bytes] = field(default_factory=Counter)


def each(*faults: str | None) -> Script:
    """Every distinct body meets these in turn (None: forwarded), and is then forwarded."""
    return lambda _, attempt: _fault(faults[attempt]) if attempt < len(faults) else None


def in_turn(*faults: str | None) -> Script:
    """Requests meet these in order of arrival, whatever they ask, and are then forwarded."""
    left = iter(faults)  # the proxy calls scripts one at a time
    return lambda _, __: _fault(next(left, None))


def always(fault: str) -> Script:
    return lambda _, __: FAULTS[fault]


def _fault(name: str | None) -> Answer | None:
    return None if name is None else FAULTS[name]


@contextmanager
def faulty(upstream: str, script: Script) -> Iterator[Proxy]:
    """`upstream` (a base URL ending in /v1) behind `script`."""
    injected, forwarded, delivered = Counter[bytes](), Counter[bytes](), Counter[bytes]()
    seen = Counter[bytes]()
    lock = threading.Lock()
    root = upstream.removesuffix("/v1")

    def respond(request: Request) -> Answer:
        with lock:
            fault = script(request.content, seen[request.content])
            seen[request.content] += 1
            (forwarded if fault is None else injected)[request.content] += 1
        if fault is not None:
            return fault
        answer = _forward(root, request)
        with lock:
            delivered[request.content] += 1
        return answer

    with answering(respond) as url:
        yield Proxy(url, injected, forwarded, delivered)


def _forward(root: str, request: Request) -> Answer:
    sent = {"Content-Type": request.headers.get("content-type", "application/json")}
    if "authorization" in request.headers:
        sent["Authorization"] = request.headers["authorization"]
    asked = urllib.request.Request(root + request.path, request.content, sent)
    try:
        with urllib.request.urlopen(asked) as answer:
            return Answer(answer.read(), answer.status, kind=answer.headers["Content-Type"])
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.read(), error.code, kind=error.headers["Content-Type"])
