"""A model behind an OpenAI-compatible server, evaluated by its answers and their first tokens."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dcr.core.config import ConfigError, UserError
from dcr.core.config.evaluation import EvalConfig, GenConfig
from dcr.core.evaluation import OfPrompt, PromptSet, kept
from dcr.core.evaluation.protocols import Answers, Masses, Subject
from dcr.core.generation import Completion
from dcr.core.refusal import opening as refusal
from dcr.core.runs import Run
from dcr.core.sources import Example
from dcr.core.text import MARKS, answer_in, messages, opens_thought
from dcr.endpoints import HTTPConfig, ServerConfig, calls, servers
from dcr.endpoints.answers import Failure, Reply
from dcr.endpoints.servers import EndpointError

log = logging.getLogger(__name__)

LIKELIEST = 20  # tokens with log-probabilities: OpenAI's and vLLM's default limit
GREETING = "Hello."  # the prompt that tries whether a server shows log-probabilities


@dataclass(frozen=True)
class ShownOpening:
    """The refusal mass as far as a server shows it (`refusal.shown_mass`): at least `mass`."""

    id: str
    prompt: str
    mass: float
    margin: float
    most: float


class Served(Subject):
    """The model of `endpoint=`. A row without an answer is asked again by the next command."""

    def __init__(self, settings: EvalConfig, run: Run) -> None:
        super().__init__(settings, run, "endpoint")

    def under(self, settings: EvalConfig) -> "Served":
        """The same model under other settings."""
        return Served(settings, self.run)

    def check(self) -> None:
        servers.check(server_of(self.settings), "endpoint")

    def identity(self) -> dict[str, object]:
        server = server_of(self.settings)
        return {
            "endpoint": [server.url, server.model, server.parameters],
            "system": self.settings.model.system_prompt,
            "max_new_tokens": self.settings.gen.max_new_tokens,
        }

    def answers(self, asked: Sequence[PromptSet], folder: Path) -> Answers:
        """Stores the answers as they arrive, then puts the files in order."""
        settings = self.settings

        def ask(rows: list[Example]) -> Iterator[list[Completion]]:
            server, system = server_of(settings), settings.model.system_prompt
            return complete(server, settings.node(HTTPConfig), rows, settings.gen, system)

        progress = settings.trainer.progress
        given = kept(asked, ask, folder, Completion, "generating", progress)
        calls.put_in_order(folder, Completion, {of.name: of.rows for of in asked})
        return given

    def masses(self, asked: Sequence[PromptSet], folder: Path) -> tuple[Masses, Masses]:
        """The least and the most that each mass can be, from the tokens that the server shows.

        Raises ConfigError, before any prompt is sent, if it shows none, and Unanswered if no prompt
        brought an answer.
        """
        settings, server = self.settings, server_of(self.settings)
        parameters = {"temperature": 1, "top_logprobs": LIKELIEST} | server.parameters
        limit = "max_completion_tokens" if "max_completion_tokens" in parameters else "max_tokens"
        one_token = replace(server, parameters=parameters | {limit: 1, "logprobs": True})

        def ask(rows: list[Example]) -> Iterator[list[ShownOpening]]:
            check_shown(one_token, settings.node(HTTPConfig))
            system = settings.model.system_prompt
            for row, reply in replies(one_token, settings.node(HTTPConfig), rows, system):
                if reply.top and reply.top[0]:
                    yield [ShownOpening(row.id, row.prompt, *refusal.shown_mass(reply.top[0]))]

        place, progress = folder / "openings", settings.trainer.progress
        by_set = kept(asked, ask, place, ShownOpening, "reading", progress)
        calls.put_in_order(place, ShownOpening, {of.name: of.rows for of in asked})
        check_answered(asked, by_set)
        least = {name: {row.id: row.mass for row in rows} for name, rows in by_set.items()}
        return least, {name: {row.id: row.most for row in rows} for name, rows in by_set.items()}


def subjects(settings: EvalConfig, run: Run) -> list[Subject]:
    """The server that `endpoint=` names."""
    return [Served(settings, run)]


class Unanswered(UserError):
    """Not one prompt brought an answer."""

    exit_code = 1


def check_answered(asked: Sequence[PromptSet], given: Mapping[str, Sequence[OfPrompt]]) -> None:
    """Warns of sets that lack answers, as when a server failed; raises Unanswered if all do."""
    total = sum(len(of.rows) for of in asked)
    if total and not any(given[of.name] for of in asked):
        raise Unanswered(
            f"none of {total} prompts was answered, so there is nothing to count; the log "
            "above says why: mend that and give the same command again"
        )
    for of in asked:
        if without := len(of.rows) - len(given[of.name]):
            log.warning("%s: %d of %d prompts without an answer", of.name, without, len(of.rows))


def server_of(settings: Any) -> ServerConfig:
    """The settings of the server that `endpoint=` names."""
    return ServerConfig(
        url=settings.endpoint,
        model=str(settings.endpoint_model),
        key=settings.endpoint_key,
        parameters=settings.endpoint_parameters,
    )


def check_shown(server: ServerConfig, http: HTTPConfig) -> None:
    """Raises ConfigError if the server shows no likeliest tokens, or those of a thought.

    A failed request is no proof.
    """
    why = ""
    try:
        greeting = [[{"role": "user", "content": GREETING}]]
        once = replace(http, retries=0)
        ((_, reply),) = calls.chats(server, once, greeting, node="endpoint")
    except EndpointError as error:
        if "logprobs" not in str(error):
            raise
        reply, why = None, f" ({error})"
    if reply is None or (isinstance(reply, Reply) and len(reply.top[0] if reply.top else ()) < 2):
        raise ConfigError(
            f"tasks=[discernment] endpoint={server.url}: answers without log-probabilities of "
            f"several first tokens{why}; leave discernment out, or ask a server that gives them, "
            "such as vLLM"
        )
    shown = reply.top[0] if isinstance(reply, Reply) and reply.top else {}
    likeliest = max(shown, key=lambda text: shown[text], default="")
    if opens_thought(likeliest):
        raise ConfigError(
            f"tasks=[discernment] endpoint={server.url}: its answers begin with a thought "
            f"({likeliest.strip()}), behind which no token is shown; turn thoughts off, as "
            "+endpoint_parameters.chat_template_kwargs.enable_thinking=false, or leave it out"
        )


def complete(
    server: ServerConfig,
    http: HTTPConfig,
    rows: Sequence[Example],
    settings: GenConfig,
    system_prompt: str | None = None,
) -> Iterator[list[Completion]]:
    """Completions of the rows as they arrive, one at a time; the server applies its own template.

    A row without an answer yields nothing, so that a rerun asks it again: its request failed after
    all retries, or a content filter withheld the answer. A last line of the log counts both. Raises
    EndpointError if every request would fail.
    """
    # greedy and as long as here, unless the user says otherwise (null leaves a parameter out)
    ours: dict[str, object] = {"temperature": 0, "max_tokens": settings.max_new_tokens}
    if "max_completion_tokens" in server.parameters:  # its successor; servers refuse both at once
        del ours["max_tokens"]
    theirs = {k: v for k, v in server.parameters.items() if k not in ("logprobs", "top_logprobs")}
    asked = replace(server, parameters=ours | theirs)
    for row, answer in replies(asked, http, rows, system_prompt):
        text, ended = without_thought(answer.text).strip(), answer.finish == "stop"
        yield [Completion(row.id, row.prompt, text, answer.completion_tokens, ended, None)]


def without_thought(text: str) -> str:
    """The answer in the text of a server, whose template is not known: of marks that are tags."""
    for marks in MARKS:
        if marks.answers == marks.closes and (behind := answer_in(text, marks)) != text:
            return behind
    return text


def replies(
    server: ServerConfig, http: HTTPConfig, rows: Sequence[Example], system_prompt: str | None
) -> Iterator[tuple[Example, Reply]]:
    """Rows with the server's replies to their turns, in order of arrival.

    It leaves out, logs and raises as `complete` does.
    """
    conversations = [messages(row.prompt, system_prompt) for row in rows]
    failures: Counter[str] = Counter()
    reason = ""
    arriving = calls.chats(server, http, conversations, node="endpoint")
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
