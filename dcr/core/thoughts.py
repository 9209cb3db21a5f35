"""The thought before an answer: the marks around it, and variables of templates.

A thinking model reasons before it answers. All that is read where an answer begins stands behind
that, so that a prompt has to end behind a thought: an empty one, or one that the model has written.
Marks come from the template, never from the model's name.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PROMPT, ANSWER = "0x5f3759df", "0x9e3779b9"  # turns that no template holds
SWITCHES = ("enable_thinking", "thinking")  # variables by which templates turn thinking off


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


def opens_one(text: str) -> bool:
    """Whether a text begins with a mark that opens a thought, or is the token that begins one."""
    begun = text.strip()
    return begun == "<|channel|>" or any(begun.startswith(m.opens.strip()) for m in MARKS)


def given(template: str, variables: Mapping[str, Any]) -> str:
    """The template with values for variables that whoever renders it leaves undefined."""
    set_ones = (
        f"{{% if not {name} is defined %}}{{% set {name} = {json.dumps(value)} %}}{{% endif %}}"
        for name, value in variables.items()
    )
    return "".join(set_ones) + template
