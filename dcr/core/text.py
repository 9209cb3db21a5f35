"""Text to compare, name, show and store; imports nothing else of the package.

`normalise` compares prompts, `label_of` names folders, and `CHATML` is the template of tokenizers
without one. Printed and stored text goes through `printable` (no control codes), `encodable` (no
lone surrogates), `redact` (no secrets) or `single_line` (all of it in one line).
"""

import os
import re
import unicodedata
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import PurePath

CHATML = (  # for tokenizers without a chat template
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LIKENESS = 0.6  # below it, the nearest name is no help
NEAREST = 3  # names to offer when they are equally near
DROPPED_CATEGORIES = "PC"  # punctuation; control, format and the like
# the rule of `normalise` as a table for ASCII, three times as fast
ASCII_DROPPED = {
    i: None
    for i in range(128)
    if not chr(i).isspace() and unicodedata.category(chr(i))[0] in DROPPED_CATEGORIES
}
REMOVED = "[removed]"
# names of environment variables whose values, if long enough, are secrets
KEYS = re.compile(r"(?i)(?:key|token|secret|password|passwd|credentials?)$")
SHORTEST_KEY = 8
LONGEST_LINE = 1_000  # characters of an error's line
LONGEST_READ = 10_000  # characters read of a text that becomes one line
NAMES = (
    r"(?:[\w.-]{0,40}(?:(?:api|access)[_-]?key|(?:access|api|auth|hf|refresh|session)[_-]?token"
    r"|secret|password|passwd|credentials?)|token)"
)
# patterns of secrets; the first group stays
SECRETS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?i)\b((?:authorization|x-api-key|api-key)['\"]?\s*[:=]\s*).*",
        r"(?i)\b(bearer\s+)\S+",
        r"\b([Bb]asic\s+)(?=\S*(?:[0-9=+/]|[a-z][A-Z]))[A-Za-z0-9+/]{8,}={0,2}",
        r"()\bsk-[\w*.-]{3,}",
        r"()\b(?:hf|gsk|ghp|gho|github_pat|glpat|nvapi|xai|AIza)[_-]?\w{16,}",
        # user and password, also without a scheme, and with an @ or a slash in the password
        r"(:/{1,2})(?:[^\s/?#\"'<>@]*:[^\s\"'<>]*|[^\s/?#\"'<>]*)@",
        r"()(?<![\w/.:+-])[\w.+-]+\\?:[^\s/@\"'<>]+(?=@[\w-])",
        # the query of an address
        r"(:/{1,2}[^\s?#\"'<>]*[?#])[^\s\"'<>]+",
        r"(?i)([?&;](?:\w*key|sig|signature|auth|code|session)=)[^\s&\"'<>]+",
        rf"(?i)\b({NAMES}(?:=|['\"]\s*[:=]\s*)['\"]?)[^\s&,;\"'<>}}]+",
    )
)


def normalise(text: str) -> str:
    """The text in lower case and compatibility forms, without punctuation or invisible characters.

    Words are joined by single spaces. A text of only punctuation keeps it, or all such texts would
    be equal.
    """
    if text.isascii():
        folded = text.lower()
        words = folded.translate(ASCII_DROPPED)
    else:
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        words = "".join(
            c for c in folded if c.isspace() or unicodedata.category(c)[0] not in DROPPED_CATEGORIES
        )
    return " ".join(words.split()) or " ".join(folded.split())


def label_of(name: str) -> str:
    """A model's name as part of a folder's: letters, digits, '.', '_' and '-'."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", PurePath(name).name or name).strip("-.") or "model"


def printable(text: str) -> str:
    """The text with control characters as pictures, and without lone surrogates.

    Line ends and tabs stay. No text of a file, a model or a server can so move the cursor, or
    colour or rename a terminal.
    """
    return "".join(_shown(character) for character in text.replace("\r\n", "\n"))


def _shown(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs"):
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "\N{REPLACEMENT CHARACTER}"


def encodable(text: str) -> str:
    """The text with surrogates, which JSON can spell and UTF-8 cannot, joined or made U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def redact(text: str, *secrets: str) -> str:
    """`text` without `secrets` and all else that looks like one.

    It removes keys of this environment, keys with usual beginnings or headers, user and password of
    an address, an address's query, and values of names such as api_key, token and password.
    """
    known = (v for name, v in os.environ.items() if KEYS.search(name) and len(v) >= SHORTEST_KEY)
    for secret in sorted({*secrets, *known}, key=len, reverse=True):
        text = text.replace(secret, REMOVED) if secret else text
    for pattern in SECRETS:
        text = pattern.sub(rf"\1{REMOVED}", text)
    return text


def single_line(text: object, *secrets: str, longest: int | None = None) -> str:
    """`text`, or an exception's text, in one printable line without secrets.

    It has at most `longest` characters and an ellipsis. Without `longest`, a line that is too long
    to be read loses its middle, so that the key at its beginning and the cure at its end stay.
    """
    line = redact(printable(" ".join(str(text)[:LONGEST_READ].split())), *secrets)
    if longest is not None:
        return line if len(line) <= longest else f"{line[:longest]}…"
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} … {line[-half:]}"


def nearest(key: str, known: Sequence[str]) -> list[str]:
    """The names most like a misspelt one; a right name in the wrong place counts as near."""
    leaf = key.split(".")[-1]
    scores: dict[str, float] = {}
    for name in known:
        whole = SequenceMatcher(None, key, name).ratio()
        scores[name] = max(whole, 0.9 * SequenceMatcher(None, leaf, name.split(".")[-1]).ratio())
    best = max(scores.values(), default=0.0)
    return sorted(k for k, v in scores.items() if v == best >= LIKENESS)[:NEAREST]
