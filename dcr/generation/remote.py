"""Prompts answered by a model behind an OpenAI-compatible server."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

from dcr import endpoints
from dcr.config import GenConfig, HTTPConfig, ServerConfig
from dcr.endpoints import Failure
from dcr.generation.completions import Completion
from dcr.sources import Example

log = logging.getLogger(__name__)


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
    asked = replace(server, parameters=_parameters(server, settings))
    first = [{"role": "system", "content": system_prompt}] if system_prompt else []
    conversations = [[*first, {"role": "user", "content": row.prompt}] for row in rows]
    failures: Counter[str] = Counter()
    reason = ""
    arriving = endpoints.chats(asked, http, conversations, node="endpoint")
    with closing(arriving):  # a caller who stops early ends what is under way
        for index, answer in arriving:
            if isinstance(answer, Failure):
                failures[answer.status] += 1
                reason = reason or answer.reason
                continue
            row, ended = rows[index], answer.finish == "stop"
            text = answer.text.strip()
            yield [Completion(row.id, row.prompt, text, answer.completion_tokens, ended, None)]
    if failures:
        log.warning(
            "endpoint: %d of %d prompts without an answer (error: %d, invalid: %d; the first: %s); "
            "the same command asks them again",
            *(failures.total(), len(rows), failures["error"], failures["invalid"], reason),
        )


def _parameters(server: ServerConfig, settings: GenConfig) -> dict[str, object]:
    """Greedy and as long as here, unless the user says otherwise (null leaves a parameter out)."""
    ours: dict[str, object] = {"temperature": 0, "max_tokens": settings.max_new_tokens}
    if "max_completion_tokens" in server.parameters:  # its successor: servers refuse both at once
        del ours["max_tokens"]
    return ours | server.parameters
