"""A server whose replies are a Python function of the request: fast, for unit tests."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.servers.loopback import Answer, Request, answering, as_json

Body = dict[str, Any]


@dataclass(frozen=True)
class Scripted:
    """A running server; `requests` grows as they come."""

    url: str
    requests: list[Request] = field(default_factory=list)

    @property
    def bodies(self) -> list[Body]:
        return [request.body for request in self.requests]


def completion(
    text: str | None,
    *,
    finish: str = "stop",
    top: Sequence[Mapping[str, float]] | None = None,
    tokens: tuple[int, int] = (7, 3),
    refusal: str | None = None,
) -> Body:
    """A chat completion as OpenAI words it; `top` has log-probabilities per token."""
    content = [
        {
            "token": next(iter(token)),
            "logprob": next(iter(token.values())),
            "top_logprobs": [{"token": t, "logprob": value} for t, value in token.items()],
        }
        for token in top or ()
    ]
    message = {"role": "assistant", "content": text, "refusal": refusal}
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": finish,
        "logprobs": None if top is None else {"content": content},
    }
    usage = {
        "prompt_tokens": tokens[0],
        "completion_tokens": tokens[1],
        "total_tokens": sum(tokens),
    }
    return {"id": "c", "object": "chat.completion", "choices": [choice], "usage": usage}


def moderated(**categories: bool) -> Body:
    """A moderation, flagged where a category is."""
    result = {"flagged": any(categories.values()), "categories": categories}
    return {"id": "m", "model": "scripted-moderation", "results": [result]}


def rejected(status: int, message: str, **fields: Any) -> Answer:
    """An error as OpenAI words it; `fields` are code, param and type."""
    return as_json({"error": {"message": message, **fields}}, status)


def last_user(body: Body) -> str:
    """The text that a request is about: its last user message, or what is to be moderated."""
    if "input" in body:
        return body["input"]
    return [m["content"] for m in body["messages"] if m["role"] == "user"][-1]


@contextmanager
def scripted(reply: Callable[[Body], str | Body | Answer]) -> Iterator[Scripted]:
    """Answers with `reply(body)`: a text to wrap as a completion, a whole body, or an Answer."""
    requests: list[Request] = []

    def respond(request: Request) -> Answer:
        requests.append(request)
        made = reply(request.body)
        if isinstance(made, str):
            made = completion(made)
        return made if isinstance(made, Answer) else as_json(made)

    with answering(respond) as url:
        yield Scripted(url, requests)
