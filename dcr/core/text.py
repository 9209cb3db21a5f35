"""Text to compare, name, show and store; imports nothing else of the package.

`normalise` compares prompts, `label_of` names folders, and `CHATML` is the template of tokenizers
without one. Text is shown as `printable` (no control codes) and stored as `encodable` (no lone
surrogates); `ending` takes secrets away wherever a command prints.
"""

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


def is_chinese(text: str) -> bool:
    """Whether at least half of the letters are Chinese, and none Japanese.

    A language model of letters takes a short Chinese sentence for Japanese.
    """
    han, letters = (
        len(re.findall("[\u3400-\u4dbf\u4e00-\u9fff]", text)),
        sum(map(str.isalpha, text)),
    )
    return 2 * han >= max(1, letters) and not re.search("[\u3040-\u30ff]", text)


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


def nearest(key: str, known: Sequence[str]) -> list[str]:
    """The names most like a misspelt one; a right name in the wrong place counts as near."""
    leaf = key.split(".")[-1]
    scores: dict[str, float] = {}
    for name in known:
        whole = SequenceMatcher(None, key, name).ratio()
        scores[name] = max(whole, 0.9 * SequenceMatcher(None, leaf, name.split(".")[-1]).ratio())
    best = max(scores.values(), default=0.0)
    return sorted(k for k, v in scores.items() if v == best >= LIKENESS)[:NEAREST]
