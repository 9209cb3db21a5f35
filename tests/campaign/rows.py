"""Bad data files, at every place that a data file can stand."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import commands
from commands import Ended
from overrides import SCORED, SMALL

REFUSAL = "I'm sorry, but I can't help with that."
PLACES: dict[str, tuple[str, ...]] = {  # {} is the file
    "toxic": ("train.py", *SMALL, "plan=true", "data.toxic.source={}", "dcr.ratio=1"),
    "seemingly toxic": (
        *("train.py", *SMALL, "plan=true", "data.seemingly_toxic.source={}"),
        "data.seemingly_toxic.count=null",
    ),
    "normal": (
        *("train.py", *SMALL, "plan=true", "data.normal.source={}", "data.normal.count=null"),
    ),
    "safety": (
        *("train.py", *SMALL, "plan=true", "data.safety.source={}", "data.safety.count=null"),
    ),
    "aug": ("train.py", *SMALL, "method=stl_aug", "stl_aug.responses={}", "run=new"),
    "training": (
        *("train.py", *SMALL, "method=stl", "data.normal.source={}", "data.normal.count=null"),
        "run=new",
    ),
    "evaluation": (
        *("eval.py", "model=tiny", "output=base", *SCORED, "tasks=[over_refusal]"),
        "data.evaluation.over_refusal=[{}]",
    ),
    "analysis": (
        *("eval.py", "model=tiny", "output=base", *SCORED, "tasks=[refusal_probability]"),
        *("data.analysis.toxic=[{}]", "data.analysis.normal=[demo_normal]"),
        "data.analysis.seemingly_toxic=[demo_seemingly_toxic]",
    ),
    "extraction": (
        *("eval.py", "model=tiny", "output=base", *SCORED, "tasks=[over_refusal]"),
        *("steering=scans", "steering.scans.anchors=4", "data.extraction.toxic=[{}]"),
        *("steering.scans.layers=middle_third", "data.extraction.normal=[demo_normal]"),
    ),
    "augment": (
        *("dcr.augment", "source={}", "out=answers.jsonl", "model=tiny", "count=2", *SCORED),
    ),
    "template": ("train.py", *SMALL, "plan=true", "model.template={}"),
}


def good_rows(count: int = 24) -> list[dict[str, str]]:
    """Pairs that every place takes: refused prompts, no two alike."""
    words = ("lamp", "rope", "boat", "stone", "candle", "garden", "river", "window")
    return [
        {"prompt": f"How do I {words[i % 8]} the {words[i // 8]} of part {i}?", "response": REFUSAL}
        for i in range(count)
    ]


def _lines(rows: list[dict[str, str]], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def _with(change: Callable[[dict[str, object]], object], at: int = 5) -> bytes:
    """Good rows with one of them changed."""
    rows: list[object] = [dict(row) for row in good_rows()]
    rows[at] = change(rows[at])  # pyright: ignore[reportArgumentType]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


GOOD = {  # what must be taken
    "plain": lambda: _lines(good_rows()),
    "byte order mark": lambda: b"\xef\xbb\xbf" + _lines(good_rows()),
    "CRLF": lambda: _lines(good_rows(), "\r\n"),
    "no last newline": lambda: _lines(good_rows())[:-1],
    "another column": lambda: _with(lambda row: row | {"note": "x", "n": 3}),
    "right to left": lambda: _with(
        lambda row: row | {"prompt": "كيف أقتل عملية؟ ‮abc‬ 🙂‍🙂 e\u0301"}
    ),
    "control tokens": lambda: _with(
        lambda row: row | {"prompt": "<|im_end|><|endoftext|>[INST]</s><|eot_id|> a lamp"}
    ),
    "duplicates": lambda: _lines(good_rows() + good_rows()[:9]),
    "separators": lambda: _with(lambda row: row | {"prompt": "a\u2028b\u0085c\fd\x1ee lamp"}),
    "nested column": lambda: _with(lambda row: row | {"extra": {"a": [1, {"b": None}]}}),
}
BAD = {  # what must be refused, in one line
    "empty": lambda: b"",
    "only newlines": lambda: b"\n\n\n",
    "invalid UTF-8": lambda: _lines(good_rows()) + b'{"prompt": "\xff\xfe", "response": "a"}\n',
    "UTF-16": lambda: _lines(good_rows()).decode().encode("utf-16"),
    "no prompt": lambda: _with(lambda row: {"promt": row["prompt"], "response": row["response"]}),
    "prompt is a number": lambda: _with(lambda row: row | {"prompt": 3}),
    "prompt is null": lambda: _with(lambda row: row | {"prompt": None}),
    "prompt is a list": lambda: _with(lambda row: row | {"prompt": ["a"]}),
    "prompt is nested": lambda: _with(lambda row: row | {"prompt": {"text": "a"}}),
    "prompt is empty": lambda: _with(lambda row: row | {"prompt": ""}),
    "prompt is blank": lambda: _with(lambda row: row | {"prompt": " \t\n"}),
    "row is a list": lambda: _with(lambda row: list(row.values())),
    "row is a string": lambda: _with(lambda row: "text"),
    "row is null": lambda: _with(lambda row: None),
    "one JSON list": lambda: json.dumps(good_rows()).encode(),
    "half a row": lambda: _lines(good_rows())[:-20],
    "not JSON": lambda: b"prompt,response\na,b\n",
    "binary": lambda: bytes(range(256)) * 20,
    "deep nesting": lambda: b"[" * 100_000 + b"\n",
    "a NUL byte": lambda: _lines(good_rows()) + b"\0",
    "trailing comma": lambda: _lines(good_rows()) + b'{"prompt": "a", "response": "b",}\n',
}
ANY = {  # either way, but in good order
    "huge line": lambda: _with(lambda row: row | {"prompt": "lamp " * 2_000_000}),
    "NUL in a prompt": lambda: _with(lambda row: row | {"prompt": "a\0b lamp"}),
    "half a surrogate": lambda: _with(lambda row: row | {"prompt": "a\ud800b lamp"}),
    "huge integer": lambda: _lines(good_rows()) + b'{"prompt": "a b", "x": ' + b"9" * 5000 + b"}\n",
    "NaN column": lambda: _with(lambda row: row | {"score": float("nan")}),
    "blank lines": lambda: _lines(good_rows(), "\n\n"),
    "one row": lambda: _lines(good_rows(1)),
    "one prompt": lambda: _lines(good_rows(1) * 30),
    "response is empty": lambda: _with(lambda row: row | {"response": ""}),
    "response is a number": lambda: _with(lambda row: row | {"response": 3}),
    "key twice": lambda: _lines(good_rows()) + b'{"prompt": "a x", "prompt": "b y"}\n',
}
PIPES = ("FIFO", "folder", "dangling link", "device", "link to itself", "nothing there")


def _put(file: Path, kind: str) -> None:
    if kind == "FIFO":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "dangling link":
        file.symlink_to("nowhere")
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "link to itself":
        file.symlink_to(file.name)


def case(rng: Random, place: Path, base: Path) -> tuple[str, Ended, list[tuple[str, str]]]:
    """One file at one place."""
    where = rng.choice(list(PLACES))
    kind = rng.choice([*GOOD, *BAD, *ANY, *PIPES])
    file = place / "data.jsonl"
    made = {**GOOD, **BAD, **ANY}.get(kind)
    if made is None:
        _put(file, kind)
    elif where == "template":
        file.write_bytes(rng.choice(TEMPLATES))
    else:  # what stl_aug learns from must not be refusals
        answer = b"So." if where == "aug" else REFUSAL.encode()
        file.write_bytes(made().replace(REFUSAL.encode(), answer))
    arguments = [part.replace("{}", "data.jsonl") for part in PLACES[where]]
    ended = commands.run(arguments, place)
    faults = [(fault, f"{kind} as {where}: {detail}") for fault, detail in ended.faults()]
    taken = where != "template" and (kind in GOOD)
    if taken and ended.code == 2:
        faults.append(("good refused", f"{kind} as {where}: {ended.err.strip()[-200:]}"))
    wrong = where != "template" and (kind in BAD or kind in PIPES)
    if ended.code == 0 and wrong:
        faults.append(("silent", f"{kind} as {where} was taken"))
    left = [p.name for p in place.iterdir() if p != file]
    if ended.code == 2 and left:
        faults.append(("files left", f"{kind} as {where}: {left} after {ended.err.strip()[:160]}"))
    return f"{kind}: {commands.spell(arguments)}", ended, faults


TEMPLATES = (
    b"{% for m in messages %}",
    b"{{ messages[0].content.__class__.__mro__ }}",
    b"{% for i in range(10**9) %}x{% endfor %}",
    b"{{ nothing.at.all }}",
    b"",
    b"\xff\xfe",
    b"no message here",
    b"{{ 1/0 }}",
    b"{% include '/etc/passwd' %}",
    b"{{ raise_exception('no') }}",
    b"{{ 'x' * 10**10 }}",
)
