"""Chats and moderations: many requests to the servers of a model, each retried.

Every server has a bounded number of them under way and is given the next one as it answers, so that
a slow one takes fewer. One that answers nothing is put aside, what it had goes to the others, and
now and then it is tried with one request: its answer brings it back.

They run on an event loop in a thread of its own, which lives as long as the iterator, so that
leaving it can end requests midway and callers may run an event loop themselves. The retries are
ours: the client's own take neither a body that is no JSON nor a whole answer that is late for
something to ask again, ask an account without quota again, and go on waiting when all is hopeless.
"""

import asyncio
import json
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from anyio.from_thread import BlockingPortal, start_blocking_portal

from dcr import storage
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
    NO_KEY,
    EndpointError,
    address,
    check,
    each,
    key_of,
    redacted,
    sent_parameters,
    silence_client,
)

if TYPE_CHECKING:
    from openai import AsyncOpenAI

FIRST_WAIT = 1.0  # seconds before the first retry, doubled before each further one
HOPELESS_ROUNDS = 2  # of `concurrency` requests in a row, none answered even when asked again
RECORD = "servers.json"  # beside the answers: what every server took for them

log = logging.getLogger(__name__)

Answer = TypeVar("Answer", Reply, Moderation)
# Each with the index of its request. Closing it ends what is under way.
Arrivals = Generator[tuple[int, Answer | Failure], None, None]


@dataclass
class Taken:
    """What a server took: requests sent, those without an answer, and the seconds of all."""

    requests: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


@dataclass(eq=False)
class Line:
    """One server, and what it is doing.

    `aside` is set while it answers nothing: what waits for a retry is then left to the others.
    """

    server: ServerConfig
    client: "AsyncOpenAI"
    aside: asyncio.Event
    taken: Taken = field(default_factory=Taken)
    under_way: int = 0
    answered: int = 0
    probes: int = 0
    probe_at: float = 0.0  # of time.monotonic()

    def has_room(self, concurrency: int) -> bool:
        """Whether it takes another request; put aside it takes one at a time, now and then."""
        if self.aside.is_set():
            return not self.under_way and time.monotonic() >= self.probe_at
        return self.under_way < concurrency

    def rest(self) -> None:
        """Until the next probe."""
        self.probe_at = time.monotonic() + seconds_before(self.probes, None)
        self.probes += 1


_record: ContextVar[Path | None] = ContextVar("record", default=None)


@contextmanager
def recorded(folder: Path | None) -> Iterator[None]:
    """What servers take within is added up in the folder's RECORD, by node and address."""
    token = _record.set(folder and folder / RECORD)
    try:
        yield
    finally:
        _record.reset(token)


def _keep(node: str, lines: Sequence[Line]) -> None:
    """Add what the servers took to the record; of a command killed outright it is not known.

    Where none answered there is nothing that a record could stand beside.
    """
    file = _record.get()
    if file is None or not any(line.answered for line in lines):
        return
    kept = storage.read_json(file, dict[str, dict[str, Taken]]) if file.is_file() else {}
    own = kept.setdefault(node, {})
    for line in lines:
        total, taken = own.setdefault(address(line.server), Taken()), asdict(line.taken)
        for name, value in taken.items():
            setattr(total, name, round(getattr(total, name) + value, 3))
    storage.write_json(
        file, {name: {at: asdict(of) for at, of in by.items()} for name, by in kept.items()}
    )


def chats(
    server: ServerConfig,
    http: HTTPConfig,
    conversations: Sequence[Sequence[Message]],
    *,
    node: str,
) -> Arrivals[Reply]:
    """The answers to `conversations`, in order of arrival.

    At most `http.concurrency` requests to each server are under way, or answered and not yet taken:
    a caller who stores each answer before asking for the next loses no more than these when killed.
    Connection errors, time-outs, 408, 409, 429, 5xx and bodies that are not JSON are asked again up
    to `http.retries` times, after the time the server asks for or a growing one. What has no answer
    then goes to a server that has not failed at it; its own is put aside where it answered nothing
    else meanwhile either and another one is left. Every index comes up once, as a Failure at the
    worst; once two rounds of `http.concurrency` requests in a row have ended in errors, the rest is
    not asked. `node` is the configuration node of `server`, for messages.

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
    asking, unanswered = Asking(deque(range(requests))), 0  # in a row that ended in an error
    with _connected(server, node) as (portal, lines):

        def start(index: int, line: Line) -> Future[Answer | Failure | Again | None]:
            retries = 0 if line.aside.is_set() else http.retries  # a probe has one attempt
            asked = partial(ask, line.client, index), read, line.server, node, http.timeout
            return portal.start_task_soon(_answer, partial(_brought, *asked), line, retries)

        try:
            for index, answered in _settling(asking, lines, portal, start, node, http.concurrency):
                yield index, answered
                failed = isinstance(answered, Failure) and answered.status == "error"
                unanswered = unanswered + 1 if failed else 0
                if unanswered >= HOPELESS_ROUNDS * http.concurrency:
                    reason = f"not asked: {unanswered} requests in a row had no answer"
                    asking.hopeless = Failure("error", reason)
                    yield from ((index, asking.hopeless) for index in asking.left)
                    asking.left.clear()
        finally:
            for future in asking.under_way:
                future.cancel()
            _keep(node, lines)
    if asking.end:
        raise asking.end


@dataclass
class Asking:
    """How far requests have come.

    `under_way` has by request what is asked, its server, and how many answers had come from there
    before; `tried` the servers that one had no answer of after all retries. What has no answer once
    it is `hopeless` has that one; after the `end` nothing more is asked.
    """

    left: deque[int]
    under_way: dict[Future[Any], tuple[int, Line, int]] = field(default_factory=dict)
    tried: dict[int, list[Line]] = field(default_factory=dict)
    hopeless: Failure | None = None
    end: EndpointError | None = None


def _settling(
    asking: Asking,
    lines: Sequence[Line],
    portal: BlockingPortal,
    start: Callable[[int, Line], Future[Answer | Failure | Again | None]],
    node: str,
    most: int,
) -> Arrivals[Answer]:
    """What is left, asked wherever there is room, until each request is settled."""
    left, under_way, tried = asking.left, asking.under_way, asking.tried
    while True:
        while not asking.end and (chosen := _next(left, lines, tried, most)):
            index, line = chosen
            left.remove(index)
            under_way[start(index, line)] = index, line, line.answered
            line.under_way += 1
        if not under_way:
            return
        seconds = _until_probe(lines) if left and not asking.end else None
        future = next(iter(wait(under_way, seconds, FIRST_COMPLETED).done), None)
        if future is None:
            continue
        index, line, before = under_way.pop(future)
        line.under_way -= 1
        try:
            outcome = future.result()
        except EndpointError as error:
            asking.end = asking.end or error
            for one in lines:
                portal.call(one.aside.set)
            continue
        if asking.end:  # what is under way is handed over, and no more
            answered = None if isinstance(outcome, Again) else outcome
        else:
            had, since = tried.setdefault(index, []), line.answered > before
            answered = _settled(outcome, line, lines, had, since, node, portal)
        if answered := answered or asking.hopeless:
            yield index, answered
        else:
            left.appendleft(index)


def _next(
    left: Sequence[int], lines: Sequence[Line], tried: Mapping[int, Sequence[Line]], most: int
) -> tuple[int, Line] | None:
    """What is asked next, of the server with the least to do: not of one that has failed at it as
    long as others have not.
    """
    for line in sorted(lines, key=lambda line: line.under_way):
        if line.has_room(most):
            for index in left:
                before = tried.get(index, ())
                if line not in before or not _others(line, lines, before):
                    return index, line
    return None


def _others(line: Line, lines: Sequence[Line], before: Sequence[Line]) -> list[Line]:
    """Further servers that answer and have not yet been asked."""
    return [
        one for one in lines if one is not line and not one.aside.is_set() and one not in before
    ]


def _until_probe(lines: Sequence[Line]) -> float | None:
    """Seconds until a server that was put aside is tried again; None where none is."""
    times = [line.probe_at for line in lines if line.aside.is_set() and not line.under_way]
    return max(0.0, min(times) - time.monotonic()) if times else None


def _settled(
    outcome: Answer | Failure | Again | None,
    line: Line,
    lines: Sequence[Line],
    tried: list[Line],
    answered_since: bool,
    node: str,
    portal: BlockingPortal,
) -> Answer | Failure | None:
    """What a request came to; None where another server is to be asked.

    Puts its server aside where it answers nothing while others do, and takes it back.
    """
    if outcome is None:
        return None
    where = address(line.server)
    if not isinstance(outcome, Again):
        line.answered += 1
        if line.aside.is_set():
            portal.call(line.aside.clear)
            line.probes = 0
            log.warning("%s: %s answers again", node, where)
        return outcome
    if line.aside.is_set():  # a probe, or the last of what was under way
        line.rest()
        return None
    tried.append(line)
    if not answered_since and _others(line, lines, ()):
        portal.call(line.aside.set)
        line.rest()
        log.warning(
            "%s: %s is put aside (%s); what it was asked goes to the other servers, and from time "
            "to time it is tried again",
            *(node, where, outcome.failure.reason),
        )
        return None
    return None if _others(line, lines, tried) else outcome.failure


@contextmanager
def _connected(server: ServerConfig, node: str) -> Iterator[tuple[BlockingPortal, list[Line]]]:
    """The servers with their clients, and the running loop they live on; leaving ends all."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient  # takes a second

    silence_client()
    client = AsyncOpenAI(
        api_key=key_of(server) or NO_KEY,
        base_url=address(each(server)[0]),
        max_retries=0,
        timeout=None,
        # A redirect may turn a POST into a GET, and sends prompts where the user did not.
        http_client=DefaultAsyncHttpxClient(follow_redirects=False),
    )
    with (
        start_blocking_portal(name="dcr.endpoints") as portal,
        portal.wrap_async_context_manager(client),
    ):
        yield (
            portal,
            [
                Line(one, client.with_options(base_url=address(one)), portal.call(asyncio.Event))
                for one in each(server)
            ],
        )


async def _answer(
    bring: Callable[[], Awaitable[Answer | Failure | Again]], line: Line, retries: int
) -> Answer | Failure | Again | None:
    """What a server is brought to answer, asked again up to `retries` times.

    None in place of waiting for a retry once the line is put aside. Raises EndpointError as
    `judged` does.
    """
    for retry in count():
        outcome = await _attempt(bring, line)
        if not isinstance(outcome, Again) or retry == retries:
            return outcome
        try:
            async with asyncio.timeout(seconds_before(retry, outcome.wait)):
                await line.aside.wait()
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
    bring: Callable[[], Awaitable[Answer | Failure | Again]], line: Line
) -> Answer | Failure | Again:
    """One request, counted."""
    began = time.monotonic()
    line.taken.requests += 1
    line.taken.failures += 1  # until it has an answer
    outcome = await bring()
    line.taken.seconds += time.monotonic() - began
    if not isinstance(outcome, Again) and getattr(outcome, "status", "ok") != "error":
        line.taken.failures -= 1
    if isinstance(outcome, Reply):
        line.taken.prompt_tokens += outcome.prompt_tokens
        line.taken.completion_tokens += outcome.completion_tokens
    return outcome


async def _brought(
    ask: Callable[[], Awaitable[bytes]],
    read: Callable[[Any], Answer | Failure],
    server: ServerConfig,
    node: str,
    timeout: float,
) -> Answer | Failure | Again:
    """What `ask` brings as `read` understands it; `timeout` is for the whole of the answer."""
    from openai import APIConnectionError, APIStatusError

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
