"""Hydra's and OmegaConf's several lines as one that names key, value and cure."""

import re
from dataclasses import MISSING, fields, is_dataclass
from difflib import SequenceMatcher

LIKENESS = 0.6  # below it, the nearest name is no help
NEAREST = 3  # names to offer when they are equally near

# OmegaConf's reason -> ours, with the groups of the pattern put in.
REASONS = (
    (r"Invalid value '.*', expected one of \[(.*)\]", r"choose one of \1"),
    (r"could not be converted to Float", "give a number"),
    (r"could not be converted to Integer", "give a whole number"),
    (r"is not a valid bool", "give true or false"),
    (r"is not Optional", "it needs a value"),
    (r"is not a ListConfig, list or tuple", "give a list, as in key=[a,b]"),
    (r"is not a subclass of", "it is a group of settings; set one of those inside"),
    (r"Cannot convert .* to string", "give text"),
    (r"Cannot assign .* to Dict", "give pairs, as in key={a:1}"),
    (r"[Mm]issing mandatory value", "it needs a value"),
)


def one_line(error: Exception, *schemas: type) -> str:
    """What is wrong with an override, and what to write instead."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__
    whole = "\n".join(texts)
    known = [key for schema in schemas for key in _keys(schema)]
    for explain in (_option, _unknown, _grammar, _value):
        found = explain(whole, error, known)
        if found:
            return found
    return " ".join(texts[0].split()) or type(error).__name__


def _option(text: str, error: Exception, known: list[str]) -> str | None:
    """A file that a config group does not hold."""
    if "Config group override" in text or isinstance(error, TypeError):  # a list or dict for a name
        return "model=, data=, preset= and sweep= take the name of a file in conf/"
    missing = re.search(r"Could not find '(.*?)'", text)
    options = re.search(r"Available options in '(.*)':\n((?:\t.*\n?)+)", text)
    if not missing or not options:
        return None
    group, names = options[1], ", ".join(options[2].split())
    message = f"{group}={missing[1].removeprefix(f'{group}/')}: choose one of {names}"
    return message + ("; any other: model.name=<folder or hub id>" if group == "model" else "")


def _unknown(text: str, error: Exception, known: list[str]) -> str | None:
    """A key that does not exist."""
    key = re.search(r"Could not override '(.+?)'", text)
    if not key and re.search(r"Key '.*' (is )?not in ", text):
        key = re.search(r"full_key: (\S+)", text)
    if not key:
        return None
    near = nearest(key[1], known)
    hint = f"did you mean {' or '.join(near)}?" if near else "--cfg job lists what there is"
    return f"{key[1]}: no such setting; {hint}"


def _grammar(text: str, error: Exception, known: list[str]) -> str | None:
    """An override that cannot be read, or not in this place."""
    unread = getattr(error, "override", None)
    if unread is not None:
        return f"{unread}: cannot be read; settings are written key=value"
    several = re.search(r"(?:Ambiguous value for argument|Sweep parameters) '(.*)'", text)
    if several:
        return f"{several[1]}: several values; add -m to try each, or write key=[a,b] for a list"
    there = re.search(r"An item is already at '(.*)'", text)
    if there:
        return f"+{there[1]}: exists already; leave out the +"
    deleted = re.search(r"Error merging override (~\S+)", text)
    return f"{deleted[1]}: a setting cannot be taken away; give it a value" if deleted else None


def _value(text: str, error: Exception, known: list[str]) -> str | None:
    """A value that its key does not take."""
    source = re.search(r"Interpolation key '(.*)' not found", text)
    if source:
        return f"${{{source[1]}}}: there is no such setting to take a value from"
    key = re.search(r"full_key: (\S*)", text)
    if not key:
        return None
    written = re.search(r"Error merging override \+*(.*)", text) or re.search(
        r"\b[Vv]alue '(.*?)'", text
    )
    what = key[1]
    if written:
        what = written[1] if "Error merging" in written[0] else f"{key[1]}={written[1]}"
    for pattern, cure in REASONS:
        reason = re.search(pattern, text)
        if reason:
            return f"{what}: {reason.expand(cure)}"
    reason = next(line for line in text.splitlines() if not line.startswith("Error merging"))
    return f"{what}: {reason}"


def nearest(key: str, known: list[str]) -> list[str]:
    """The names most like a misspelt one; a right name in the wrong place counts as near."""
    leaf = key.split(".")[-1]
    scores: dict[str, float] = {}
    for name in known:
        whole = SequenceMatcher(None, key, name).ratio()
        scores[name] = max(whole, 0.9 * SequenceMatcher(None, leaf, name.split(".")[-1]).ratio())
    best = max(scores.values(), default=0.0)
    return sorted(k for k, v in scores.items() if v == best >= LIKENESS)[:NEAREST]


def _keys(schema: type, prefix: str = "") -> list[str]:
    """Every path of a tree of dataclasses, groups and leaves."""
    found = []
    for entry in fields(schema):
        found.append(prefix + entry.name)
        inner = entry.default_factory
        if inner is not MISSING and isinstance(inner, type) and is_dataclass(inner):
            found += _keys(inner, f"{prefix}{entry.name}.")
    return found
