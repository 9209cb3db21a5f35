"""Chats and moderations: many requests to one server, a bounded number at once, each retried.

They run on an event loop in a thread of its own, which lives as long as the session, so that
leaving it can end requests midway and callers may run an event loop themselves. The retries are
ours: the client's own take neither a body that is no JSON nor a whole answer that is late for
something to ask again, ask an account without quota again, and go on waiting when all is hopeless.
"""

import asyncio
import json
import logging
import random
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar, cast

from dcr.config import HTTPConfig, ServerConfig
from dcr.endpoints import replies
from dcr.endpoints.rejections import LONGEST_WAIT, Again, Rejection, judged, rejection
from dcr.endpoints.replies import EndpointError, Failure, Message, Moderation, Reply
from dcr.endpoints.servers import address, check, key_of, redacted, sent_parameters

if TYPE_CHECKING:
    from openai import AsyncOpenAI

FIRST_WAIT = 1.0  # seconds before the first retry, doubled before each further one
HOPELESS_ROUNDS = 2  # of `concurrency` requests in a row, none answered even when asked again

Answer = TypeVar("Answer", Reply, Moderation)


@dataclass(frozen=True)
class Session:
    """The event loop in its thread, and the client whose connections it holds."""

    loop: asyncio.AbstractEventLoop
    client: "AsyncOpenAI"
    hopeless: asyncio.Event  # set: nothing waits for a retry any more
    over: asyncio.Event  # set: everything ends

    def set(self, event: asyncio.Event) -> None:
        """Set one of the two from another thread."""
        self.loop.call_soon_threadsafe(event.set)


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
    with _session(server) as here:

        def start(index: int) -> "Future[Answer | Failure]":
            asked = _answer(
                lambda: ask(here.client, index), read, (server, node), http, here.hopeless
            )
            return asyncio.run_coroutine_threadsafe(asked, here.loop)

        for index, answered in _taken(here, left, start, http.concurrency):
            yield index, answered
            failed = isinstance(answered, Failure) and answered.status == "error"
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
                answered = future.result()
            except EndpointError as error:
                hopeless = hopeless or error
                here.set(here.hopeless)
            except CancelledError:  # it waited for a retry when another proved hopeless
                continue
            else:
                yield index, answered
            if not hopeless:
                fill()
    if hopeless:
        raise hopeless


@contextmanager
def _session(server: ServerConfig) -> Iterator[Session]:
    """A client of `server` on a running loop; leaving ends what is under way, and the thread."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient  # takes a second

    for name in ("httpx", "httpx2"):  # a line per request would hide everything else
        logging.getLogger(name).setLevel(logging.WARNING)
    client = AsyncOpenAI(
        api_key=key_of(server),
        base_url=address(server),
        max_retries=0,
        timeout=None,
        # A redirect may turn a POST into a GET, and sends prompts where the user did not.
        http_client=DefaultAsyncHttpxClient(follow_redirects=False),
    )
    opened: Future[Session] = Future()
    thread = threading.Thread(
        target=lambda: asyncio.run(_live(client, opened)), name="dcr.endpoints"
    )
    thread.start()
    try:
        yield opened.result()
    finally:
        opened.result().set(opened.result().over)
        thread.join()


async def _live(client: "AsyncOpenAI", opened: "Future[Session]") -> None:
    async with client:
        here = Session(asyncio.get_running_loop(), client, asyncio.Event(), asyncio.Event())
        opened.set_result(here)
        await here.over.wait()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


async def _answer(
    ask: Callable[[], Awaitable[bytes]],
    read: Callable[[Any], Answer | Failure],
    to: tuple[ServerConfig, str],
    http: HTTPConfig,
    hopeless: asyncio.Event,
) -> Answer | Failure:
    """What `ask` brings as `read` understands it, asked again up to `http.retries` times.

    `to` is the server with its configuration node. Raises EndpointError as `judged` does, and
    CancelledError in place of waiting for a retry once `hopeless` is set.
    """
    outcome = await _attempt(ask, read, to, http.timeout)
    for retry in range(http.retries):
        if not isinstance(outcome, Again):
            break
        await _pause(seconds_before(retry, outcome.wait), hopeless)
        outcome = await _attempt(ask, read, to, http.timeout)
    return outcome.failure if isinstance(outcome, Again) else outcome


async def _pause(seconds: float, hopeless: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(seconds):
            await hopeless.wait()
    except TimeoutError:
        return
    raise asyncio.CancelledError


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
    server, node = to
    brought = await _brought(ask, server, timeout)
    if isinstance(brought, Rejection):
        # Outside an except clause: the client's exception, with the request and its key, would
        # be chained to the one raised here.
        return judged(brought, server, node)
    if not isinstance(brought, bytes):
        return brought
    try:
        body = json.loads(brought)
    except (ValueError, RecursionError):
        start = brought[:60].decode(errors="replace")
        return Again(Failure("invalid", redacted(f"the answer is not JSON: {start!r}", server)))
    answered = read(body)
    if isinstance(answered, Failure):
        return Failure(answered.status, redacted(answered.reason, server))
    return answered


async def _brought(
    ask: Callable[[], Awaitable[bytes]], server: ServerConfig, timeout: float
) -> bytes | Rejection | Again | Failure:
    """The body of a good answer, or what came in its place; `timeout` is for all of it."""
    from openai import APIConnectionError, APIStatusError

    try:
        async with asyncio.timeout(timeout):
            return await ask()
    except TimeoutError:
        return Again(Failure("error", f"no whole answer within {timeout:g} s"))
    except UnicodeEncodeError as error:  # half a character, which JSON allows and UTF-8 does not
        return Failure("invalid", f"the text cannot be sent: {error.reason}")
    except APIStatusError as error:
        return rejection(error.status_code, error.body, error.response.headers)
    except APIConnectionError as error:
        cause = error.__cause__ or error
        reason = redacted(f"{type(cause).__name__}: {cause}", server)
        return Again(Failure("error", f"connection failed: {reason}"))
