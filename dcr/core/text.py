"""Text as it is compared, named, shown and stored; knows nothing else of the house.

`normalise` for comparing prompts, `label_of` for folders' names, `CHATML` for chats of which a
tokenizer says nothing, and for all that is printed or written: `printable` without control codes,
`encodable` without half characters, `redact` without secrets, `single_line` all of it in one line.
"""

import os
import re
import unicodedata
from pathlib import PurePath

CHATML = (  # how a chat is written where a tokenizer does not say
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DROPPED_CATEGORIES = "PC"  # punctuation; control, format and the like
# The rule of `normalise` for each ASCII character: three times as fast as asking for each.
ASCII_DROPPED = {
    i: None
    for i in range(128)
    if not chr(i).isspace() and unicodedata.category(chr(i))[0] in DROPPED_CATEGORIES
}
REMOVED = "[removed]"
# Variables of the environment whose values are secrets, if they are as long as one.
KEYS = re.compile(r"(?i)(?:key|token|secret|password|passwd|credentials?)$")
SHORTEST_KEY = 8
LONGEST_LINE = 1_000  # characters of an error's line
LONGEST_READ = 10_000  # characters of a text that is to be one line
NAMES = (
    r"(?:[\w.-]{0,40}(?:(?:api|access)[_-]?key|(?:access|api|auth|hf|refresh|session)[_-]?token"
    r"|secret|password|passwd|credentials?)|token)"
)
# What looks like a secret wherever it stands; the first group stays.
SECRETS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?i)\b((?:authorization|x-api-key|api-key)['\"]?\s*[:=]\s*).*",
        r"(?i)\b(bearer\s+)\S+",
        r"\b([Bb]asic\s+)(?=\S*(?:[0-9=+/]|[a-z][A-Z]))[A-Za-z0-9+/]{8,}={0,2}",
        r"()\bsk-[\w*.-]{3,}",
        r"()\b(?:hf|gsk|ghp|gho|github_pat|glpat|nvapi|xai|AIza)[_-]?\w{16,}",
        # user and password, also where the password holds an @ or a slash, and without a scheme
        r"(:/{1,2})(?:[^\s/?#\"'<>@]*:[^\s\"'<>]*|[^\s/?#\"'<>]*)@",
        r"()(?<![\w/.:+-])[\w.+-]+\\?:[^\s/@\"'<>]+(?=@[\w-])",
        # whatever an address says behind its path
        r"(:/{1,2}[^\s?#\"'<>]*[?#])[^\s\"'<>]+",
        r"(?i)([?&;](?:\w*key|sig|signature|auth|code|session)=)[^\s&\"'<>]+",
        rf"(?i)\b({NAMES}(?:=|['\"]\s*[:=]\s*)['\"]?)[^\s&,;\"'<>}}]+",
    )
)


def normalise(text: str) -> str:
    """Lower case, compatibility forms, no punctuation or invisible characters, single spaces.

    A text of punctuation alone keeps it, since otherwise all such texts would be equal.
    """
    if text.isascii():
        folded = text.lower()
        kept = folded.translate(ASCII_DROPPED)
    else:
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        kept = "".join(
            c for c in folded if c.isspace() or unicodedata.category(c)[0] not in DROPPED_CATEGORIES
        )
    return " ".join(kept.split()) or " ".join(folded.split())


def label_of(name: str) -> str:
    """A model's name as part of a folder's: letters, digits, '.', '_' and '-'."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", PurePath(name).name or name).strip("-.") or "model"


def printable(text: str) -> str:
    """Control characters as pictures, no half characters; line ends and tabs stay.

    So no text of a file's, a model's or a server's can move the cursor, or colour or rename a
    terminal.
    """
    return "".join(_shown(character) for character in text.replace("\r\n", "\n"))


def _shown(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs"):
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "\N{REPLACEMENT CHARACTER}"


def encodable(text: str) -> str:
    """Half characters, which JSON can spell and UTF-8 cannot, joined or replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def redact(text: str, *secrets: str) -> str:
    """`text` without `secrets`, and without whatever else looks like one.

    Keys of this environment, keys by their usual beginnings and headers, user and password of an
    address, all that stands behind an address's path, and values of names such as api_key, token
    and password.
    """
    known = (v for name, v in os.environ.items() if KEYS.search(name) and len(v) >= SHORTEST_KEY)
    for secret in sorted({*secrets, *known}, key=len, reverse=True):
        text = text.replace(secret, REMOVED) if secret else text
    for pattern in SECRETS:
        text = pattern.sub(rf"\1{REMOVED}", text)
    return text


def single_line(text: object, *secrets: str, longest: int | None = None) -> str:
    """`text`, or an exception's, fit to be printed or stored: one line, printable, redacted.

    No longer than `longest` characters and an ellipsis; without one, what is too long to be read
    loses its middle, so that the key at its beginning and the cure at its end stay.
    """
    line = redact(printable(" ".join(str(text)[:LONGEST_READ].split())), *secrets)
    if longest is not None:
        return line if len(line) <= longest else f"{line[:longest]}…"
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} … {line[-half:]}"
