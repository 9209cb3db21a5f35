"""What a model answered, the files that keep it, and prompts answered by a server.

The files hold one JSON object a line and are only appended to.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import FiniteFloat

from dcr import endpoints
from dcr.core import storage
from dcr.core.config import GenConfig, HTTPConfig, ServerConfig
from dcr.core.prompts import ChatFormat
from dcr.core.sources import Example
from dcr.endpoints import Failure, Reply

log = logging.getLogger(__name__)

Encoded = tuple[Example, list[int]]  # a row and its prompt's token ids


@dataclass(frozen=True)
class Completion:
    """What a model answered.

    `refusal_mass` is whatever the caller reads off the first token's logits; None where a server
    answered, which is asked for these apart from its answers.
    """

    id: str
    prompt: str
    response: str
    tokens: int
    ended: bool  # by an end token, not by the token limit
    refusal_mass: FiniteFloat | None


def completion(chat: ChatFormat, row: Example, answer: Sequence[int], mass: float) -> Completion:
    """The record of an answer's token ids; what stands behind an end token does not count."""
    end = next((i for i, token in enumerate(answer) if token in chat.stop), len(answer))
    return Completion(row.id, row.prompt, text(chat, answer), end, end < len(answer), mass)


def text(chat: ChatFormat, answer: Sequence[int]) -> str:
    """What the token ids of an answer say up to its end token."""
    end = next((i for i, token in enumerate(answer) if token in chat.stop), len(answer))
    said = chat.tokenizer.decode(list(answer[:end]), skip_special_tokens=True)
    assert isinstance(said, str)
    return said.strip()


def stored(path: Path) -> dict[str, Completion]:
    """Completions already in a file, by id; a line torn by a kill is left out.

    Raises DataError, naming the line, for another that is no completion.
    """
    return {row.id: row for row in storage.read_lines(path, Completion)}


def complete_remote(
    server: ServerConfig,
    http: HTTPConfig,
    rows: Sequence[Example],
    settings: GenConfig,
    system_prompt: str | None = None,
) -> Iterator[list[Completion]]:
    """Completions of the rows as they arrive, one at a time; the server applies its own template.

    A row without an answer yields nothing, so that a rerun asks it again: neither one that failed
    after all retries nor one whose answer the server withheld (a content filter's doing, not the
    model's). A last line of the log counts both. Raises EndpointError where every request would
    fail.
    """
    # greedy and as long as here, unless the user says otherwise (null leaves a parameter out)
    ours: dict[str, object] = {"temperature": 0, "max_tokens": settings.max_new_tokens}
    if "max_completion_tokens" in server.parameters:  # its successor: servers refuse both at once
        del ours["max_tokens"]
    theirs = {k: v for k, v in server.parameters.items() if k not in ("logprobs", "top_logprobs")}
    asked = replace(server, parameters=ours | theirs)
    for row, answer in replies(asked, http, rows, system_prompt):
        text, ended = answer.text.strip(), answer.finish == "stop"
        yield [Completion(row.id, row.prompt, text, answer.completion_tokens, ended, None)]


def replies(
    server: ServerConfig, http: HTTPConfig, rows: Sequence[Example], system_prompt: str | None
) -> Iterator[tuple[Example, Reply]]:
    """Rows with what the server says to them as a user's first words, as it arrives.

    What is left out, told and raised is as in `complete_remote`.
    """
    first = [{"role": "system", "content": system_prompt}] if system_prompt else []
    conversations = [[*first, {"role": "user", "content": row.prompt}] for row in rows]
    failures: Counter[str] = Counter()
    reason = ""
    arriving = endpoints.chats(server, http, conversations, node="endpoint")
    with closing(arriving):  # a caller who stops early ends what is under way
        for index, answer in arriving:
            if isinstance(answer, Failure):
                failures[answer.status] += 1
                reason = reason or answer.reason
                continue
            yield rows[index], answer
    if failures:
        log.warning(
            "endpoint: %d of %d prompts without an answer (error: %d, invalid: %d; the first: %s); "
            "the same command asks them again",
            *(failures.total(), len(rows), failures["error"], failures["invalid"], reason),
        )
