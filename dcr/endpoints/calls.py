"""Chats and moderations: many requests to one server, a bounded number of them at once."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from dcr.config import HTTPConfig, ServerConfig
from dcr.endpoints import replies
from dcr.endpoints.attempts import Answer, Session, answer, session
from dcr.endpoints.messages import EndpointError, Failure, Message, Moderation, Reply
from dcr.endpoints.servers import check, sent_parameters

if TYPE_CHECKING:
    from openai import AsyncOpenAI

HOPELESS_ROUNDS = 2  # of `concurrency` requests in a row, none answered even when asked again


def chats(
    server: ServerConfig,
    http: HTTPConfig,
    conversations: Sequence[Sequence[Message]],
    *,
    node: str,
) -> Iterator[tuple[int, Reply | Failure]]:
    """The answers to `conversations`, each with its index, in order of arrival.

    At most `http.concurrency` requests are under way, or answered and not yet taken: a caller
    who stores each answer before asking for the next loses no more than these when killed.
    Closing the iterator ends them. Connection errors, time-outs, 408, 409, 429, 5xx and bodies
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

    return _arrivals(server, node, http, len(conversations), ask, replies.reply)


def moderations(
    server: ServerConfig, http: HTTPConfig, texts: Sequence[str], *, node: str
) -> Iterator[tuple[int, Moderation | Failure]]:
    """The verdicts on `texts`, a request each; otherwise as `chats`."""

    async def ask(client: "AsyncOpenAI", index: int) -> bytes:
        raw = await client.moderations.with_raw_response.create(
            model=server.model, input=texts[index], extra_body=sent_parameters(server)
        )
        return raw.content

    return _arrivals(server, node, http, len(texts), ask, replies.moderation)


def _arrivals(
    server: ServerConfig,
    node: str,
    http: HTTPConfig,
    count: int,
    ask: Callable[["AsyncOpenAI", int], Awaitable[bytes]],
    read: Callable[[Any], Answer | Failure],
) -> Iterator[tuple[int, Answer | Failure]]:
    check(server, node)
    if not count:
        return
    left = iter(range(count))
    unanswered = 0  # requests in a row that ended in an error
    with session(server) as here:

        def start(index: int) -> "Future[Answer | Failure]":
            asked = answer(
                lambda: ask(here.client, index), read, (server, node), http, here.hopeless
            )
            return asyncio.run_coroutine_threadsafe(asked, here.loop)

        for index, found in _taken(here, left, start, http.concurrency):
            yield index, found
            failed = isinstance(found, Failure) and found.status == "error"
            unanswered = unanswered + 1 if failed else 0
            if unanswered >= HOPELESS_ROUNDS * http.concurrency:
                reason = f"not asked: {unanswered} requests in a row had no answer"
                for index in left:
                    yield index, Failure("error", reason)


def _taken(
    here: Session,
    left: Iterator[int],
    start: Callable[[int], "Future[Answer | Failure]"],
    concurrency: int,
) -> Iterator[tuple[int, Answer | Failure]]:
    """What the requests for the indices in `left` bring; a new one starts as one is taken."""
    under_way: dict[Future[Answer | Failure], int] = {}
    hopeless: EndpointError | None = None

    def fill() -> None:
        under_way.update((start(i), i) for i in islice(left, concurrency - len(under_way)))

    fill()
    while under_way:
        for future in wait(under_way, return_when=FIRST_COMPLETED).done:
            index = under_way.pop(future)
            try:
                found = future.result()
            except EndpointError as error:
                hopeless = hopeless or error
                here.set(here.hopeless)
            except CancelledError:  # it waited for a retry when another proved hopeless
                continue
            else:
                yield index, found
            if not hopeless:
                fill()
    if hopeless:
        raise hopeless
