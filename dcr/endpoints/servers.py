"""A server's address, key, parameters and prices: checked early; no text ever holds the key."""

import json
import os
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from dcr.core.config import ConfigError, UserError, check_installed
from dcr.ending import single_line
from dcr.endpoints import ServerConfig

OPENAI = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
NO_KEY = "none"  # sent if the variable is unset: local servers want a header, not a key
LONGEST_TEXT = 240  # characters of a server's own words that a message quotes
OURS = {"model", "messages", "input", "stream", "stream_options"}  # the program sets these
SECRET = {"api_key", "key", "authorization", "headers", "extra_headers"}


class EndpointError(UserError):
    """Every further request would fail the same way: no key, no such model, a refused parameter."""


def setting(node: str, field: str) -> str:
    """The override that names `field` of the server configured at `node`."""
    if node == "endpoint":  # it is spread over EvalConfig's top level
        return node if field == "url" else f"{node}_{field}"
    return f"{node}.{field}"


def address(server: ServerConfig) -> str:
    """The address of the requests, without a slash at the end."""
    return (server.url or OPENAI).rstrip("/")


def variable(server: ServerConfig) -> str | None:
    """The environment variable of the key; OpenAI's own goes to no other server unasked."""
    if server.key is not None:
        return server.key
    return OPENAI_KEY if server.url is None else None


def key_of(server: ServerConfig) -> str:
    """The key itself, empty if there is none."""
    named = variable(server)
    return os.environ.get(named, "").strip() if named else ""


def sent_parameters(server: ServerConfig) -> dict[str, object]:
    """The parameters of each request; null leaves one out, since overrides remove no default."""
    return {name: value for name, value in server.parameters.items() if value is not None}


def check(server: ServerConfig, node: str) -> None:
    """Checks a server's settings before anything is sent or loaded.

    Raises ConfigError for a setting that cannot be or a client that is not installed, and
    EndpointError if the server is OpenAI's own and the variable with its key is unset. Neither
    quotes a key, nor a text that may be one.
    """
    check_installed("openai", "judges", node)
    _check_key(server, node)
    if server.url is not None:
        _check_url(server.url, node)
    if not server.model.strip():
        raise ConfigError(f"{setting(node, 'model')}: empty; name a model of {address(server)}")
    _check_parameters(server, node)


def _check_parameters(server: ServerConfig, node: str) -> None:
    parameters = setting(node, "parameters")
    for name, value in server.parameters.items():
        if name.lower() in SECRET:
            raise ConfigError(
                f"{parameters}.{name}: not a parameter of a request; keys go into the environment "
                f"variable that {setting(node, 'key')} names"
            )
        if name in OURS:
            cure = f"say it with {setting(node, 'model')}" if name == "model" else "leave it out"
            raise ConfigError(f"{parameters}.{name}: set by the program; {cure}")
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise ConfigError(
                f"{parameters}.{name}={value}: JSON has no such number; give a finite one"
            ) from None


def _check_key(server: ServerConfig, node: str) -> None:
    key = setting(node, "key")
    named = variable(server)
    if named is None:
        return
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", named):
        raise ConfigError(
            f"{key}: not a name in capitals, digits and '_'; give the name of the environment "
            "variable that holds the key, such as OPENAI_API_KEY, never the key itself"
        )
    value = key_of(server)
    if not value and server.url is None:
        raise EndpointError(
            f"{key}={named}: this environment variable is unset; export it, or name a server "
            f"that needs no key with {setting(node, 'url')}=http://…/v1"
        )
    if not re.fullmatch(r"[!-~]*", value):
        raise EndpointError(
            f"{key}={named}: this environment variable holds blanks or characters outside "
            "ASCII, which no key has; export the key alone"
        )


def _check_url(url: str, node: str) -> None:
    name = setting(node, "url")
    try:
        parts = urlsplit("" if re.search(r"[\s\x00-\x1f\x7f]", url) else url)
        _ = parts.port
    except ValueError:  # a port that is no number
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        shown = "" if "@" in url or "?" in url else f"={url}"
        raise ConfigError(f"{name}{shown}: not an address; give http://host:port/v1 or https://…")
    if "@" in parts.netloc:
        raise ConfigError(
            f"{name}: holds a user or password; leave them out, and put a key into the environment "
            f"variable that {setting(node, 'key')} names"
        )
    if parts.query or parts.fragment:
        raise ConfigError(f"{name}: ends in a query; give the address up to the path, as in …/v1")


def redacted(text: object, server: ServerConfig) -> str:
    """`text` as one short line without this server's key and all else that looks like a key."""
    return single_line(text, key_of(server), longest=LONGEST_TEXT)


def spend(server: ServerConfig, prompt_tokens: int, completion_tokens: int) -> float | None:
    """The price of these tokens in USD; None if a price is missing."""
    if server.input_price is None or server.output_price is None:
        return None
    cost = prompt_tokens * server.input_price + completion_tokens * server.output_price
    return cost / 1_000_000


def usage(records: Iterable[Any], server: ServerConfig | None) -> dict[str, Any]:
    """A `usage` of `metrics.json`: the cost of these requests, in this run or an earlier one.

    A record has its tokens and the fingerprint `of` its content; several of one request count once.
    `usd` is None without a server or its prices.
    """
    once = {record.of: record for record in records}.values()
    prompt = sum(record.prompt_tokens for record in once)
    completion = sum(record.completion_tokens for record in once)
    return {
        "requests": len(once),
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "usd": spend(server, prompt, completion) if server else None,
    }
