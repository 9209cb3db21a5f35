"""One request with its retries, on an event loop in a thread of its own.

The thread lives as long as the session, so that leaving it can end requests midway, and so that
callers may run an event loop themselves.
"""

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_result,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from dcr.config import HTTPConfig, ServerConfig
from dcr.endpoints.messages import Failure, Moderation, Reply
from dcr.endpoints.rejections import LONGEST_WAIT, Again, Rejection, judged, rejection
from dcr.endpoints.servers import address, key_of, redacted

if TYPE_CHECKING:
    from openai import AsyncOpenAI

FIRST_WAIT = 1.0  # seconds before the first retry, doubled before each further one

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


@contextmanager
def session(server: ServerConfig) -> Iterator[Session]:
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


async def answer(
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

    async def pause(seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await hopeless.wait()
        except TimeoutError:
            return
        raise asyncio.CancelledError

    retrying = AsyncRetrying(
        stop=stop_after_attempt(http.retries + 1),
        retry=retry_if_result(lambda outcome: isinstance(outcome, Again)),
        wait=_seconds,
        sleep=pause,
        retry_error_callback=lambda state: _outcome(state).failure,
    )
    return await retrying(_attempt, ask, read, to, http.timeout)


def _outcome(state: RetryCallState) -> Again:
    assert state.outcome is not None
    return state.outcome.result()


def _seconds(state: RetryCallState) -> float:
    """How long to wait: what the server asks for, or twice as long each time; with jitter."""
    asked = _outcome(state).wait
    if asked is None:
        growing = wait_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)
        return growing(state) + wait_random(0, FIRST_WAIT)(state)
    return asked + wait_random(0, FIRST_WAIT / 10)(state)


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
    found = read(body)
    if isinstance(found, Failure):
        return Failure(found.status, redacted(found.reason, server))
    return found


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
        said = redacted(f"{type(cause).__name__}: {cause}", server)
        return Again(Failure("error", f"connection failed: {said}"))
