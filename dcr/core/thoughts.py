"""The thought before an answer: the marks around it, and templates that end it.

A thinking model reasons before it answers. All that is read where an answer begins stands behind
that, so that a prompt has to end behind a thought: an empty one (`closed`), or one that the model
has written. Marks and switch come from the template, never from the model's name.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PROMPT, ANSWER = "0x5f3759df", "0x9e3779b9"  # turns that no template holds
SWITCHES = ("enable_thinking", "thinking")  # variables by which templates turn thinking off

# A template's text of a dialogue of PROMPT, with ANSWER or with the header of an answer alone.
Render = Callable[[str, bool, Mapping[str, Any]], str]


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


def closed(template: str, render: Render, always: bool = False) -> tuple[str, bool]:
    """The template whose prompts end behind an empty thought, and whether that is known to be so.

    The empty thought is the template's own: that of its switch, else that of its dialogues, else
    the end of the thought that it opens. A template with none of these gets an empty thought only
    with `always`. Whoever sets the switch, or `enable_thinking` where there is none, thinks again.
    """
    marks = marks_of(template)
    if marks is None:
        return template, True
    switch = switch_of(template, render)
    plain = given(template, {switch: False} if switch else {})
    prompt, dialogue = render(plain, False, {}), render(plain, True, {})
    behind = dialogue[len(prompt) :] if dialogue.startswith(prompt) else ""
    shown, state = behind.partition(ANSWER)[0], state_of(prompt, marks)
    if marks.answers in shown or (state == marks.answers and shown.isspace()):
        end = shown
    elif state == marks.opens:
        end = marks.ending(prompt)
    elif always and state != marks.answers:
        tags = marks.answers == marks.closes
        end = marks.opens + marks.ending(marks.opens) if tags else marks.answers
    else:
        end = ""
    known = bool(switch or end or state)
    return ended(plain, end, f"not {switch or SWITCHES[0]}"), known


def switch_of(template: str, render: Render) -> str | None:
    """The variable that turns the thoughts of a template on and off."""
    for name in SWITCHES:
        off, on = (render(template, False, {name: value}) for value in (False, True))
        if off != on:
            return name
    return None


def state_of(prompt: str, marks: Marks) -> str:
    """The mark that stands last behind the user's words, in the header of the answer; or none."""
    header = prompt.rpartition(PROMPT)[2]
    places = {mark: header.rfind(mark.strip()) for mark in (marks.opens, marks.answers)}
    last = max(places, key=lambda mark: places[mark])
    return last if places[last] >= 0 else ""


def ended(template: str, end: str, condition: str) -> str:
    """The template with `end` behind its header of an answer."""
    if not end:
        return template
    words = json.dumps(end, ensure_ascii=False)
    put = f"{{% if add_generation_prompt and {condition} %}}{{{{ {words} }}}}{{% endif %}}"
    return template.removesuffix("\n") + put  # the newline that Jinja would have removed
