"""Lists of overrides drawn at random from the typed tree and a list of nasty values."""

import dataclasses
import enum
import shutil
import types
import typing
from pathlib import Path
from random import Random
from typing import Any

import commands
from commands import Ended

SMALL = (  # a run of both stages in two seconds
    *("model=tiny", "trainer.accelerator=cpu", "trainer.progress=false", "wandb.mode=disabled"),
    *("data.normal.count=12", "data.safety.count=6", "data.seemingly_toxic.count=8"),
    *("dcr.batch_size=8", "trainer.checkpoint_every_n_steps=2"),
)
SCORED = (  # an evaluation of six prompts a set
    *("wandb.mode=disabled", "limit=6", "gen.max_new_tokens=6", "http.retries=0", "http.timeout=2"),
)
NUMBERS = (
    *("0", "-1", "1", "2", "3", "1e-38", "1e38", "1e308", "-1e308", "inf", "-inf", "nan", ".nan"),
    *("1.5", "0.5", "99999999999999999999", "2147483648", "-2147483649", "1_000", "0x10", "1e400"),
)
PATHS = ("/proc/x", "/dev/null", "/dev/full", "''", ".", "..", "a/../b", "'a b'", f"x{'y' * 300}")
TEXTS = (
    *("abc", "''", "null", "true", "no", "???", "'${seed}'", "${seed}", "${nope}"),
    "${oc.env:HOME}",
    *("'\x1b[31mred'", "'a\x00b'", "'\n'", "'é漢🙂'", "'‮right'", "'\\ud800'", "x" * 5000, "a:b"),
    *("'a: b'", "'- x'", "'&a'", "'*a'", "'!!python/object:os.system'", "'{{7*7}}'", "'%s'", "~"),
    *("https://user:word@127.0.0.1:9/?key=k", "http://127.0.0.1:9/v1", "file:///etc/passwd"),
)
SHAPES = (
    *("[]", "[1]", "[a,b]", "[null]", "[[a]]", "[nan]", "['']", "{}", "{a:1}", "{a:{b:[1]}}"),
    *(f"[{'x' * 200}]", f"[{','.join('a' * 300)}]", "{a:null}", "[all-linear]", "[nope]"),
)
EVERY = NUMBERS + PATHS + TEXTS + SHAPES
LEFT_OUT = {"online"}  # W&B's servers are no part of this


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A setting: its dotted key, its annotated type, and whether null is one of its values."""

    key: str
    kind: Any
    optional: bool


def leaves(schema: type, prefix: str = "") -> list[Leaf]:
    """Every setting of a typed tree."""
    found = []
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind, optional = hints[field.name], False
        if isinstance(kind, types.UnionType):
            (kind,) = [part for part in typing.get_args(kind) if part is not type(None)]
            optional = True
        if dataclasses.is_dataclass(kind):
            found += leaves(typing.cast(type, kind), f"{prefix}{field.name}.")
        else:
            found.append(Leaf(f"{prefix}{field.name}", kind, optional))
    return found


def value(leaf: Leaf, rng: Random) -> str:
    """A nasty value; half of the time one that looks like the type."""
    if rng.random() < 0.5:
        return rng.choice(EVERY)
    if leaf.kind in (int, float):
        return rng.choice(NUMBERS)
    if isinstance(leaf.kind, type) and issubclass(leaf.kind, enum.Enum):
        return rng.choice([member.name for member in leaf.kind if member.name not in LEFT_OUT])
    if leaf.kind is bool:
        return rng.choice(["true", "false", "1", "0", "maybe"])
    if leaf.kind is str:
        return rng.choice(PATHS + TEXTS)
    return rng.choice(SHAPES)


def must_be_refused(leaf: Leaf, given: str) -> bool:
    """Whether a value is wrong by its setting's type alone, whatever the code makes of it."""
    if given in ("???", "${nope}"):
        return True
    if given in ("null", "~"):
        return not leaf.optional and leaf.kind is not Any
    if given in ("nan", ".nan"):
        return leaf.kind is float or leaf.kind is int
    listed = given.startswith(("[", "{"))
    scalar = leaf.kind in (int, float, bool) or isinstance(leaf.kind, enum.EnumType)
    if scalar and (listed or given in ("abc", "''", "'é漢🙂'")):
        return True
    if leaf.kind is int:
        return given in ("1.5", "0.5", "inf", "-inf", "1e-38")
    return leaf.kind is str and listed


def mangled(key: str, rng: Random) -> str:
    """A key that there is not, or a way of writing one that Hydra reads differently."""
    cut = rng.randrange(len(key))
    ways = [f"+{key}", f"++{key}", f"~{key}", key[:cut] + key[cut + 1 :], f"{key}.x", key.upper()]
    return rng.choice([*ways, key.rpartition(".")[0] or "=", f"{key}@y", f"/{key}"])


def draw(schema: type, rng: Random, how_many: int) -> tuple[list[str], list[str]]:
    """Overrides, and those of them that must be refused."""
    given, wrong = [], []
    for leaf in rng.sample(leaves(schema), how_many):
        if leaf.key in ("plan", "run", "output") and rng.random() < 0.8:
            continue
        chosen = value(leaf, rng)
        odd = rng.random() < 0.08
        given.append(f"{mangled(leaf.key, rng) if odd else leaf.key}={chosen}")
        if not odd and must_be_refused(leaf, chosen):
            wrong.append(given[-1])
    return given, wrong


OWN = {  # of commands that are no Hydra script: options, and values that would be good ones
    "dcr.report": ("out", "margin", "data", "--table", "--figure", "--claims", "--nope"),
    "dcr.export": ("run", "out", "stage", "dtype", "nope"),
    "dcr.chat": ("run", "stage", "max_new_tokens", "nope"),
    "dcr.augment": ("source", "out", "count", "attempts", "nope"),
    "dcr.choice": ("limit", "pairs", "tests", "out", "nope"),
}
GOOD = {
    "dcr.report": ("run",),
    "dcr.export": ("run=run", "out=exported"),
    "dcr.chat": ("run=run", "max_new_tokens=4"),
    "dcr.augment": (
        "source=demo_seemingly_toxic",
        "out=rows.jsonl",
        "count=2",
        "model=tiny",
        *SCORED,
    ),
    "dcr.choice": ("model=tiny", "limit=8", "wandb.mode=disabled", "out=choice.json"),
}


def _module(rng: Random) -> tuple[list[str], list[str], list[str]]:
    """One of `python -m dcr.*`: its good arguments, what is laid over them, what must not pass."""
    from dcr.extensions import EvalSettings, TrainSettings

    name = rng.choice(list(OWN))
    given, wrong = [], []
    for option in rng.choices(OWN[name], k=rng.choice([1, 1, 2])):
        chosen = rng.choice(EVERY).strip("'")  # no Hydra takes the quotes away
        given += [option, chosen] if option.startswith("--") else [f"{option}={chosen}"]
        if option == "nope":
            wrong.append(given[-1])
    schemas = {"dcr.augment": EvalSettings, "dcr.choice": TrainSettings}
    schema = schemas.get(name)
    if schema is not None and rng.random() < 0.6:
        more, refused = draw(schema, rng, 1)
        given, wrong = [*given, *more], [*wrong, *refused]
    return [name, *GOOD[name]], given, wrong


def drawn(rng: Random) -> tuple[list[str], list[str], list[str]]:
    """A good command, what is laid over it, and which of that must be refused."""
    from dcr.extensions import EvalSettings, TrainSettings

    kind, count = rng.random(), rng.choice([1, 1, 2, 3])
    if kind < 0.25:
        return _module(rng)
    if kind < 0.5:
        subject = rng.choice([["run=run"], ["model=tiny", "output=base"]])
        good, schema = ["eval.py", *subject, *SCORED], EvalSettings
    else:
        good, schema = ["train.py", *SMALL, "run=new"], TrainSettings
        if kind < 0.85:
            good.append("plan=true")
    if rng.random() < 0.1:
        good.insert(1, "-m")  # a sweep of one
    return good, *draw(schema, rng, count)


def case(rng: Random, place: Path, base: Path) -> tuple[str, Ended, list[tuple[str, str]]]:
    """One list of overrides: the command, how it ended, and every fault."""
    good, given, wrong = drawn(rng)
    shutil.copytree(base / "run", place / "run")
    before = commands.contents(place)
    ended = commands.run([*good, *given], place)
    faults = ended.faults()
    after = commands.contents(place)
    if ended.code == 2 and (left := sorted(after.keys() - before.keys())):
        faults.append(("files left", f"{left[:4]} after: {ended.err.strip()[:160]}"))
    if ended.code == 2 and any(after.get(name) != held for name, held in before.items()):
        faults.append(("files left", f"a file changed after: {ended.err.strip()[:160]}"))
    if ended.code == 0 and wrong and not _later_wins(given):
        faults.append(("silent", f"accepted {wrong}"))
    return commands.spell([*good, *given]), ended, faults


def _later_wins(given: list[str]) -> bool:
    """Whether one key is set twice, or something ends the command before settings are read."""
    keys = [argument.partition("=")[0] for argument in given]
    return len(set(keys)) < len(keys) or any(key.startswith("--") for key in keys)
