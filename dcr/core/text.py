"""Text to compare, name, show and store; imports nothing else of the package.

`normalise` compares prompts, `conversation` spells turns as one prompt, `Marks` stand around the
thought before an answer, and `label_of` names folders.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePath

CHARACTERS_PER_TOKEN = 4  # of English prose, where tokens are estimated
ROLES = ("system", "user", "assistant")
TURN = "\u2063"  # no eye sees it; it begins each turn of a conversation
TURNS = re.compile(rf"(?:\A|\n\n){TURN}({'|'.join(map(str.capitalize, ROLES))}): ")
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


# --- conversations --------------------------------------------------------------------------------


def conversation(turns: Iterable[tuple[str, str]]) -> str:
    """Turns of a role and its words as one prompt, whose words alone it is if there is one turn.

    It reads as a transcript. The sign before each turn, which no turn may hold, keeps it apart from
    every prompt of one turn and from every other conversation.
    """
    given = list(turns)
    if len(given) == 1:
        return given[0][1]
    return "\n\n".join(f"{TURN}{role.capitalize()}: {words}" for role, words in given)


def turns_of(prompt: str) -> list[tuple[str, str]]:
    """The turns of a prompt, of which the last is the user's; mostly that one alone."""
    if prompt.startswith(TURN):
        before, *parts = TURNS.split(prompt)
        turns = [(role.lower(), words) for role, words in zip(parts[::2], parts[1::2], strict=True)]
        if not before and len(turns) > 1 and follows(role for role, _ in turns):
            return turns
    return [("user", prompt)]


def follows(roles: Iterable[str]) -> bool:
    """Whether user and assistant take turns, behind one system turn at most, and the user ends."""
    return re.fullmatch("(system )?(user assistant )*user", " ".join(roles)) is not None


def last_turn(prompt: str) -> str:
    """The words that an answer replies to: all of a prompt that is no conversation."""
    return turns_of(prompt)[-1][1]


def messages(
    prompt: str, system: str | None = None, form: Callable[[str], str] = str
) -> list[dict[str, str]]:
    """The turns of a prompt, their words in a `form`, as chat templates and servers take them.

    A `system` prompt comes before them, in one turn with a conversation's own.
    """
    turns = [(role, form(words)) for role, words in turns_of(prompt)]
    if system:
        own = [turns.pop(0)[1]] if turns[0][0] == "system" else []
        turns.insert(0, ("system", "\n\n".join([system, *own])))
    return [{"role": role, "content": words} for role, words in turns]


# --- thoughts -------------------------------------------------------------------------------------
#
# A thinking model reasons before it answers. The marks around a thought come from the template of
# the model, never from its name.


@dataclass(frozen=True)
class Marks:
    """The texts around a thought.

    Attributes:
        opens: the text that a thought stands behind.
        closes: the text that ends it.
        answers: the text that an answer stands behind, by which a template is known.
        between: stands between `closes` and the answer where the template does not show it.
    """

    opens: str
    closes: str
    answers: str
    between: str = ""

    def ending(self, begun: str) -> str:
        """The text that ends a thought at once: on a line of its own where a line has `begun`."""
        return "\n" * begun.endswith("\n") + self.closes + self.between


def _tags(opens: str, closes: str) -> Marks:
    return Marks(opens, closes, closes, "\n\n" if opens.endswith("\n") else "")


MARKS = (
    _tags("<think>\n", "</think>"),  # Qwen3, DeepSeek R1, SmolLM3, GLM and most others
    _tags("<seed:think>", "</seed:think>"),
    _tags("[THINK]", "[/THINK]"),  # Magistral
    _tags("<|channel>thought\n", "<channel|>"),  # Gemma 4
    Marks(  # gpt-oss, whose channels are turns of their own
        opens="<|channel|>analysis<|message|>",
        closes="<|end|>",
        answers="<|channel|>final<|message|>",
        between="<|start|>assistant<|channel|>final<|message|>",
    ),
)


@functools.lru_cache(maxsize=16)
def marks_of(template: str) -> Marks | None:
    """The marks that a chat template speaks of; None if it knows no thoughts."""
    return next((marks for marks in MARKS if marks.answers in template), None)


def answer_in(text: str, marks: Marks) -> str:
    """The part of a text that is no thought: nothing if the thought has no end."""
    _, found, answer = text.rpartition(marks.answers)
    if found:
        return answer
    return "" if text.lstrip().startswith(marks.opens.strip()) else text


def opens_thought(text: str) -> bool:
    """Whether a text begins with a mark that opens a thought, or is the token that begins one."""
    begun = text.strip()
    return begun == "<|channel|>" or any(begun.startswith(m.opens.strip()) for m in MARKS)


# --- names ----------------------------------------------------------------------------------------


def label_of(name: str) -> str:
    """A model's name as part of a folder's: letters, digits, '.', '_' and '-'."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", PurePath(name).name or name).strip("-.") or "model"
