"""Chats and moderations: many requests to one server, a bounded number at once, each retried.

They run on an event loop in a thread of its own, which lives as long as the iterator, so that
leaving it can end requests midway and callers may run an event loop themselves. The retries are
ours: the client's own take neither a body that is no JSON nor a whole answer that is late for
something to ask again, ask an account without quota again, and go on waiting when all is hopeless.
"""

import asyncio
import json
import logging
import random
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any, TypeVar, cast

from anyio.from_thread import BlockingPortal, start_blocking_portal

from dcr.config import HTTPConfig, ServerConfig
from dcr.endpoints import answers
from dcr.endpoints.answers import (
    LONGEST_WAIT,
    Again,
    Failure,
    Message,
    Moderation,
    Rejection,
    Reply,
    judged,
    rejection,
)
from dcr.endpoints.servers import (
    EndpointError,
    address,
    check,
    key_of,
    redacted,
    sent_parameters,
)

if TYPE_CHECKING:
    from openai import AsyncOpenAI

FIRST_WAIT = 1.0  # seconds before the first retry, doubled before each further one
HOPELESS_ROUNDS = 2  # of `concurrency` requests in a row, none answered even when asked again
NO_KEY = "none"  # sent where the variable is unset: local servers want a header, not a key

Answer = TypeVar("Answer", Reply, Moderation)
# Each with the index of its request. Closing it ends what is under way.
Arrivals = Generator[tuple[int, Answer | Failure], None, None]


def chats(
    server: ServerConfig,
    http: HTTPConfig,
    conversations: Sequence[Sequence[Message]],
    *,
    node: str,
) -> Arrivals[Reply]:
    """The answers to `conversations`, in order of arrival.

    At most `http.concurrency` requests are under way, or answered and not yet taken: a caller
    who stores each answer before asking for the next loses no more than these when killed.
    Connection errors, time-outs, 408, 409, 429, 5xx and bodies
    that are not JSON are asked again up to `http.retries` times, after the time the server asks
    for or a growing one. Every index comes up once, as a Failure at the worst; once two rounds
    of `http.concurrency` requests in a row have ended in errors, the rest is not asked.
    `node` is the configuration node of `server`, for messages.

    Raises ConfigError or EndpointError as `check` does, and EndpointError once an answer shows
    that every request would fail, after handing over the answers that were under way.
    """

    async def ask(client: "AsyncOpenAI", index: int) -> bytes:
        raw = await client.chat.completions.with_raw_response.create(
            model=server.model,
            messages=cast(Any, [dict(message) for message in conversations[index]]),
            extra_body=sent_parameters(server),
        )
        return raw.content

    return _arrivals(server, node, http, len(conversations), ask, answers.reply)


def moderations(
    server: ServerConfig, http: HTTPConfig, texts: Sequence[str], *, node: str
) -> Arrivals[Moderation]:
    """The verdicts on `texts`, a request each; otherwise as `chats`."""

    async def ask(client: "AsyncOpenAI", index: int) -> bytes:
        raw = await client.moderations.with_raw_response.create(
            model=server.model, input=texts[index], extra_body=sent_parameters(server)
        )
        return raw.content

    return _arrivals(server, node, http, len(texts), ask, answers.moderation)


def _arrivals(
    server: ServerConfig,
    node: str,
    http: HTTPConfig,
    requests: int,
    ask: Callable[["AsyncOpenAI", int], Awaitable[bytes]],
    read: Callable[[Any], Answer | Failure],
) -> Arrivals[Answer]:
    check(server, node)
    if not requests:
        return
    left = iter(range(requests))
    under_way: dict[Future[Answer | Failure | None], int] = {}
    unanswered = 0  # requests in a row that ended in an error
    end: EndpointError | None = None
    with _connected(server) as (portal, client):
        hopeless = portal.call(asyncio.Event)
        try:
            while True:
                for index in islice(left, 0 if end else http.concurrency - len(under_way)):
                    asked = (partial(ask, client, index), read, (server, node), http, hopeless)
                    under_way[portal.start_task_soon(_answer, *asked)] = index
                if not under_way:
                    break
                future = next(iter(wait(under_way, return_when=FIRST_COMPLETED).done))
                index = under_way.pop(future)
                try:
                    answered = future.result()
                except EndpointError as error:
                    end = end or error
                    portal.call(hopeless.set)
                    continue
                if answered is None:
                    continue
                yield index, answered
                failed = isinstance(answered, Failure) and answered.status == "error"
                unanswered = unanswered + 1 if failed else 0
                if unanswered >= HOPELESS_ROUNDS * http.concurrency:
                    reason = f"not asked: {unanswered} requests in a row had no answer"
                    yield from ((index, Failure("error", reason)) for index in left)
        finally:
            for future in under_way:
                future.cancel()
    if end:
        raise end


@contextmanager
def _connected(server: ServerConfig) -> Iterator[tuple[BlockingPortal, "AsyncOpenAI"]]:
    """A client of `server`, and the running loop that it lives on; leaving ends both."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient  # takes a second

    for name in ("httpx", "httpx2"):  # a line per request would hide everything else
        logging.getLogger(name).setLevel(logging.WARNING)
    client = AsyncOpenAI(
        api_key=key_of(server) or NO_KEY,
        base_url=address(server),
        max_retries=0,
        timeout=None,
        # A redirect may turn a POST into a GET, and sends prompts where the user did not.
        http_client=DefaultAsyncHttpxClient(follow_redirects=False),
    )
    with (
        start_blocking_portal(name="dcr.endpoints") as portal,
        portal.wrap_async_context_manager(client),
    ):
        yield portal, client


async def _answer(
    ask: Callable[[], Awaitable[bytes]],
    read: Callable[[Any], Answer | Failure],
    to: tuple[ServerConfig, str],
    http: HTTPConfig,
    hopeless: asyncio.Event,
) -> Answer | Failure | None:
    """What `ask` brings as `read` understands it, asked again up to `http.retries` times.

    `to` is the server with its configuration node. None in place of waiting for a retry once
    `hopeless` is set. Raises EndpointError as `judged` does.
    """
    for retry in count():
        outcome = await _attempt(ask, read, to, http.timeout)
        if not isinstance(outcome, Again):
            return outcome
        if retry == http.retries:
            return outcome.failure
        try:
            async with asyncio.timeout(seconds_before(retry, outcome.wait)):
                await hopeless.wait()
        except TimeoutError:
            continue
        return None


def seconds_before(retry: int, asked: float | None) -> float:
    """How long to wait: what the server asks for, or twice as long each time; with jitter."""
    if asked is not None:
        return asked + random.uniform(0, FIRST_WAIT / 10)
    growing = min(FIRST_WAIT * 2.0 ** min(retry, 10), LONGEST_WAIT)
    return growing + random.uniform(0, FIRST_WAIT)


async def _attempt(
    ask: Callable[[], Awaitable[bytes]],
    read: Callable[[Any], Answer | Failure],
    to: tuple[ServerConfig, str],
    timeout: float,
) -> Answer | Failure | Again:
    """One request; `timeout` is for the whole of its answer."""
    from openai import APIConnectionError, APIStatusError

    server, node = to
    try:
        async with asyncio.timeout(timeout):
            brought = await ask()
    except TimeoutError:
        return Again(Failure("error", f"no whole answer within {timeout:g} s"))
    except UnicodeEncodeError as error:  # half a character, which JSON allows and UTF-8 does not
        return Failure("invalid", f"the text cannot be sent: {error.reason}")
    except APIStatusError as error:
        brought = rejection(error.status_code, error.body, error.response.headers)
    except APIConnectionError as error:
        cause = error.__cause__ or error
        reason = redacted(f"{type(cause).__name__}: {cause}", server)
        return Again(Failure("error", f"connection failed: {reason}"))
    if isinstance(brought, Rejection):
        # Outside an except clause: the client's exception, with the request and its key, would
        # be chained to the one raised here.
        return judged(brought, server, node)
    try:
        body = json.loads(brought)
    except (ValueError, RecursionError):
        start = brought[:60].decode(errors="replace")
        return Again(Failure("invalid", redacted(f"the answer is not JSON: {start!r}", server)))
    answered = read(body)
    if isinstance(answered, Failure):
        return Failure(answered.status, redacted(answered.reason, server))
    return answered
