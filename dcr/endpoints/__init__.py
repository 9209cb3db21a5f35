"""OpenAI-compatible servers: the settings of each, and the checks of what a server cannot do.

`servers` checks a server and prices its tokens, `calls` sends bounded, retried requests, `answers`
reads replies, and `subject` evaluates a model behind a server.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from dcr.core.config import Language
from dcr.resolving import cut_short, not_negative, positive, ranged

PRICE = "give USD per million tokens, or null"


@dataclass
class HTTPConfig:
    """The limits of requests to every server."""

    # requests at once to a server
    concurrency: int = ranged(8, positive, "give the requests under way at once, 1 or more")
    # seconds that an attempt waits for the server
    timeout: float = ranged(60.0, positive, "give seconds above 0")
    # further attempts after a time-out, a dropped connection, 429 or 5xx
    retries: int = ranged(6, not_negative, "give 0 or more")


@dataclass
class ServerConfig:
    """A model behind an OpenAI-compatible server."""

    url: str | None = None  # its address; null: OpenAI's own
    model: str = MISSING
    # The environment variable that holds the key, never the key itself; null: OPENAI_API_KEY for
    # OpenAI's own server, and no key for another.
    key: str | None = None
    # Sent with each request, by the server's own names; null leaves one of the defaults out.
    parameters: dict[str, Any] = field(default_factory=dict)
    # USD per million tokens, for the estimate
    input_price: float | None = ranged(None, not_negative, PRICE)
    output_price: float | None = ranged(None, not_negative, PRICE)


def relations(settings: Any) -> Iterator[str]:
    """The contradictions between an endpoint and settings that need the model itself."""
    if settings.endpoint is None:
        if settings.endpoint_model is not None:
            yield f"endpoint_model={settings.endpoint_model}: say where, with endpoint=http://…/v1"
        return
    named, gen = f"endpoint={settings.endpoint}", settings.gen
    if settings.endpoint_model is None:
        yield f"{named}: say which model there, with endpoint_model=<name>"
    for task in settings.table.on_weights:
        if task in settings.tasks:
            yield (
                f"tasks=[{task}]: needs the model itself, which an endpoint does not give; "
                f"leave {task} out, or name the model with model="
            )
    language = settings.model.language
    if "discernment" in settings.tasks and language is not Language.en:
        yield (
            f"model.language={language.value} tasks=[discernment]: the tokens of an endpoint are "
            "known by English words; leave one of the two out"
        )
    if settings.snapshots:
        yield "snapshots=true: an endpoint has none; name a run with run="
    for name, value in gen.contrast.items():
        yield (
            f"gen.{name}={value}: an endpoint shows no logits to contrast; leave it out, or name "
            "the model with model="
        )
    if gen.prefill is not None:
        yield (
            f"gen.prefill={gen.prefill!r}: a server writes the assistant's turn from its "
            "beginning; leave it out, or name the model with model= or run="
        )
    if (devices := settings.trainer.devices) > 1:
        yield (
            f"trainer.devices={devices} {named}: no model is here to share; use http.concurrency"
        )
    yield from cut_short(settings, named)
