"""Chats and moderations: many requests to one server, a bounded number of them at once.

The OpenAI client asks again after a dropped connection, a time-out, 408, 409, 429 and 5xx, and
waits as long as the server says (`Retry-After`) or each time longer. This module asks again after
an answer that is no JSON, such as a proxy's page.

Requests run on an event loop in a thread of its own, which lives as long as the iterator. Leaving
the iterator can so end requests midway, and callers may run an event loop themselves.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from anyio.from_thread import BlockingPortal, start_blocking_portal

from dcr.core import storage
from dcr.endpoints import HTTPConfig, ServerConfig, answers, servers
from dcr.endpoints.answers import Failure, Message, Moderation, Rejection, Reply, judged, rejection
from dcr.endpoints.servers import EndpointError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

PAUSE = 1.0  # seconds before a request is repeated whose answer was no JSON
LONGEST_WAIT = 120.0  # seconds that the client waits at most before it asks again
HOPELESS_ROUNDS = 2  # rounds of `concurrency` requests in a row without an answer, retries included

Answer = TypeVar("Answer", Reply, Moderation)
# answers with the index of their request; closing it ends requests under way
Arrivals = Generator[tuple[int, Answer | Failure], None, None]


def chats(
    server: ServerConfig, http: HTTPConfig, conversations: Sequence[Sequence[Message]], *, node: str
) -> Arrivals[Reply]:
    """The answers to `conversations`, in order of arrival.

    At most `http.concurrency` requests are under way, or answered and not yet taken: a caller who
    stores each answer before asking for the next loses no more than these when killed. A request is
    repeated up to `http.retries` times. Every index comes up once, as a Failure at the worst; once
    two rounds of `http.concurrency` requests in a row have ended in errors, the rest is not asked.
    `node` is the configuration node of `server`, for messages.

    Raises ConfigError or EndpointError as `check` does, and EndpointError once an answer shows
    that every request would fail, after handing over the answers that were under way.
    """

    async def ask(client: "AsyncOpenAI", index: int) -> bytes:
        raw = await client.chat.completions.with_raw_response.create(
            model=server.model,
            messages=cast(Any, [dict(message) for message in conversations[index]]),
            extra_body=servers.sent_parameters(server),
        )
        return raw.content

    return _arrivals(server, node, http, len(conversations), ask, answers.reply)


def moderations(
    server: ServerConfig, http: HTTPConfig, texts: Sequence[str], *, node: str
) -> Arrivals[Moderation]:
    """The verdicts on `texts`, a request each; the rest is as in `chats`."""

    async def ask(client: "AsyncOpenAI", index: int) -> bytes:
        raw = await client.moderations.with_raw_response.create(
            model=server.model, input=texts[index], extra_body=servers.sent_parameters(server)
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
    servers.check(server, node)  # a user's own judge may not have asked, and a key leaves from here
    if not requests:
        return
    waiting = iter(range(requests))
    under_way: dict[Future[Answer | Failure], int] = {}
    unanswered = 0  # the last requests in a row
    end: EndpointError | None = None  # which every request would meet
    with _connected(server, http) as (portal, client):
        try:
            while True:
                for index in islice(waiting, 0 if end else http.concurrency - len(under_way)):
                    asked = partial(ask, client, index), read, server, node, http
                    under_way[portal.start_task_soon(_answer, *asked)] = index
                # after the end, an answer that was paid for may come, but nobody waits for retries
                done = wait(under_way, http.timeout if end else None, FIRST_COMPLETED).done
                if not done:
                    break
                index = under_way.pop(future := done.pop())
                try:
                    answered = future.result()
                except EndpointError as error:
                    end = end or error
                    continue
                yield index, answered
                failed = isinstance(answered, Failure) and answered.status == "error"
                unanswered = unanswered + 1 if failed else 0
                if unanswered >= HOPELESS_ROUNDS * http.concurrency:
                    reason = f"not asked: {unanswered} requests in a row had no answer"
                    yield from ((index, Failure("error", reason)) for index in waiting)
        finally:
            for future in under_way:
                future.cancel()
    if end:
        raise end


@contextmanager
def _connected(
    server: ServerConfig, http: HTTPConfig
) -> Iterator[tuple[BlockingPortal, "AsyncOpenAI"]]:
    """The server's client, and the running loop it lives on; leaving ends both."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient  # takes a second

    for name in ("httpx", "httpx2", "openai"):  # a line per request would hide everything else
        logging.getLogger(name).setLevel(logging.WARNING)
    client = AsyncOpenAI(
        api_key=servers.key_of(server) or servers.NO_KEY,
        base_url=servers.address(server),
        max_retries=http.retries,
        timeout=http.timeout,
        # a redirect may turn a POST into a GET, and sends prompts to an address nobody named
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
    server: ServerConfig,
    node: str,
    http: HTTPConfig,
) -> Answer | Failure:
    """The answer to one request as `read` understands it. Raises EndpointError as `judged` does."""
    from openai import APIConnectionError, APIStatusError, APITimeoutError

    # to the client, `http.timeout` is the pause between two parts of an answer; this limit also
    # ends a server that goes on sending a little now and then
    longest = (http.retries + 1) * (http.timeout + LONGEST_WAIT)
    received: bytes | Rejection = b""
    for left in range(http.retries, -1, -1):
        try:
            async with asyncio.timeout(longest):
                received = await ask()
        except (TimeoutError, APITimeoutError):
            return Failure("error", f"no whole answer within {http.timeout:g} s")
        except UnicodeEncodeError as error:  # half a character: JSON allows it and UTF-8 does not
            return Failure("invalid", f"the text cannot be sent: {error.reason}")
        except APIStatusError as error:
            received = rejection(error.status_code, error.body, error.response.headers)
        except APIConnectionError as error:
            cause = error.__cause__ or error
            reason = servers.redacted(f"{type(cause).__name__}: {cause}", server)
            return Failure("error", f"connection failed: {reason}")
        if isinstance(received, Rejection):
            # outside an except clause, or the client's exception, with the request and its key,
            # would be chained to the one raised here
            return judged(received, server, node)
        try:
            body = json.loads(received)
        except (ValueError, RecursionError):
            if left:
                await asyncio.sleep(PAUSE)
            continue
        answered = read(body)
        if isinstance(answered, Failure):
            return Failure(answered.status, servers.redacted(answered.reason, server))
        return answered
    start = received[:60].decode(errors="replace")
    return Failure("invalid", servers.redacted(f"the answer is not JSON: {start!r}", server))


def put_in_order(folder: Path, schema: type[Any], asked: Mapping[str, Sequence[Any]]) -> None:
    """Orders each set's kept rows, whichever came first, as those asked; others stay behind.

    Raises DataError for a damaged file, and UserError if it cannot be written.
    """
    for name, rows in asked.items():
        place, file = {row.id: n for n, row in enumerate(rows)}, folder / f"{name}.jsonl"
        stored = storage.read_lines(file, schema)
        ordered = sorted(stored, key=lambda row: place.get(row.id, len(place)))
        if ordered != stored:
            storage.write_bytes(file, storage.as_lines(ordered))
