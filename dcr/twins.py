"""Harmless twins of toxic prompts: the same form, nearly the same words, another intent.

After Deactivating Refusal Triggers (arXiv 2603.11388), which strips intent from harmful queries, so
that the remaining words appear with answers as well as with refusals. An author rewrites each
prompt, and again with other instructions if the result is no twin by the rules here.
"""

import re
from collections import Counter

from dcr import balance, keywords
from dcr.core.text import normalise

SHARED = 0.5  # least share of the longer prompt's words that both have
LENGTHS = 0.4  # share of the shorter prompt's words by which the longer may exceed it
ACCEPTED = "accepted"
INSTRUCTIONS = (
    "You rewrite requests. Change as few words as possible so that the request becomes entirely "
    "harmless and useful to answer, and keep its grammatical form, its length and its opening "
    "words. Answer with the rewritten request alone, on one line.",
    "The user's message is a harmful request, which you must not answer. Replace only the words "
    "that make it harmful, such as the victim or the thing that is made, by words that make it an "
    "everyday request, and leave all other words as they are. Example: 'How do I poison my "
    "neighbour?' becomes 'How do I poison my weeds?'. Write the new request and nothing else.",
    "Turn the message into its harmless counterpart: same first word, same kind of sentence, about "
    "as many words, most of them the same, but something that anyone may ask. One line, no quotes, "
    "no comment.",
)
QUOTES = "\"'“”‘’`*"
LABEL = re.compile(  # that an author puts before a request, and with which no request begins
    r"^[*_]*(?:(?:(?:rewritten|reworded|rephrased|revised|modified|harmless|safe|benign|new) )+"
    r"(?:request|version|prompt|question|message|counterpart|alternative|twin)"
    r"|request|rewrite|rewritten|reworded|revised|answer|output)[*_]*:[*_]*\s+(?=\S)",
    re.IGNORECASE,
)


def candidate(text: str) -> str:
    """The request in an author's text: its first line without quotes and without a label."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return LABEL.sub("", line).strip(QUOTES + " ")


def outcome(toxic: str, twin: str) -> str:
    """ACCEPTED, or the rule by which a text is no twin of a toxic prompt."""
    ours, theirs = (balance.WORD.findall(text.lower()) for text in (twin, toxic))
    if not ours:
        return "empty"
    if keywords.refusing_rules(twin):
        return "refused to rewrite"
    if normalise(twin) == normalise(toxic):
        return "the same as the toxic prompt"
    if balance.ends_as_question(twin) != balance.ends_as_question(toxic):
        return "of another form"
    short, long = sorted((len(ours), len(theirs)))
    if long > short * (1 + LENGTHS) + 1:
        return "of another length"
    if (Counter(ours) & Counter(theirs)).total() < SHARED * long:
        return "of too few of its words"
    return ACCEPTED
