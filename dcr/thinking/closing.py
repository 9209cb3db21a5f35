"""Templates that end the thought before an answer, so that a prompt ends behind an empty one.

Marks and switch come from the template, never from the model's name.
"""

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from dcr.chat_templates import UNTEMPLATED
from dcr.core.config import ModelConfig
from dcr.core.prompts import ANSWER, PLACEHOLDER, SWITCHES, ChatFormat, given
from dcr.core.text import Marks

log = logging.getLogger(__name__)

# A template's text of a dialogue of PLACEHOLDER, with ANSWER or with the header of an answer alone.
Render = Callable[[str, bool, Mapping[str, Any]], str]


def ending_thoughts(chat: ChatFormat, config: ModelConfig) -> str:
    """The template of a format, whose prompts end behind an empty thought.

    A warning, once a model, tells of a template that speaks of thoughts and begins none.
    """
    assert chat.marks is not None
    template, known = closed(chat.template, chat.marks, chat.render, bool(config.close_thoughts))
    if not known and config.name not in UNTEMPLATED:
        UNTEMPLATED.add(config.name)
        log.warning(
            "model.name=%s: its chat template speaks of thoughts and begins none: if this model "
            "thinks by itself, model.close_thoughts=true ends prompts behind an empty thought",
            config.name,
        )
    return template


def closed(template: str, marks: Marks, render: Render, always: bool) -> tuple[str, bool]:
    """The template whose prompts end behind an empty thought, and whether that is known to be so.

    The empty thought is the template's own: that of its switch, else that of its dialogues, else
    the end of the thought that it opens. A template with none of these gets an empty thought only
    with `always`. Whoever sets the switch, or `enable_thinking` where there is none, thinks again.
    """
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
    header = prompt.rpartition(PLACEHOLDER)[2]
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
