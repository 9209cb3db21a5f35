"""The origin of a number: prompts, training rows, machine, date, and the code that measured."""

import ast
import datetime
import io
import platform
import re
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcr import results
from dcr.core import config, machine, storage
from dcr.core.config import UserError
from dcr.core.runs import Run

ROOT = config.CONF.parent  # of the repository
PARTS = ("dcr", "benchmarks")
KINDS = (".py", ".json", ".jsonl")  # of files that decide what is measured
ANSWERS = ("", "openings", "frontier")  # folders of an evaluation with a file a set
RULES = ("dcr/core/refusal/keywords.py", "dcr/keywords", "dcr/core/evaluation/scoring.py")
RANKING = (
    "dcr/core/evaluation/scoring.py",
    "dcr/core/refusal/opening.py",
    "dcr/core/statistics.py",
)
# without their sections of the page, which show numbers and decide none
ABILITY = ("dcr/ability/__init__.py", "dcr/ability/questions.py", "dcr/ability/scores.py")
QUALITY = ("dcr/quality/__init__.py", "dcr/quality/win_rates.py")
ATTACKS = tuple(f"dcr/robustness/{n}" for n in ("__init__.py", "attacked.py", "tuning.py"))
ANALYSES = tuple(f"dcr/analyses/{n}.py" for n in ("__init__", "kinds", "weights"))
# The files that decide a metric, by its first word; any other is counted by `RULES`. How a model
# answers is not among them: tests/goldens holds that.
MEASURED_BY = {
    **dict.fromkeys(("discernment", "answered_at_safety", "refused_at_over_refusal"), RANKING),
    "kernel": (*ANALYSES, "dcr/analyses/ntk"),
    "separability": (*ANALYSES, "dcr/analyses/separability.py"),
    "claims": (*ANALYSES, "dcr/analyses/ntk", "dcr/analyses/claims.py"),
    "refusal_probability": (*ANALYSES, "dcr/analyses/probability.py", *RANKING),
    **dict.fromkeys(("acc", "acc_norm"), ABILITY),
    **dict.fromkeys(("win_rate", "length_controlled", "discrete"), QUALITY),
    "calibration": ("dcr/calibration", *RULES[:1]),
    "agreement": (*RULES[:2], "dcr/outcomes", "benchmarks/keywords.py", "benchmarks/outcomes.py"),
    "balance": ("dcr/balance.py", "dcr/contrasts", *RANKING[2:]),
    "robustness": (
        *ATTACKS,
        "dcr/robustness/openings.jsonl",
        "dcr/frames",
        "dcr/outcomes",
        *RULES,
        *RANKING,
    ),
    "gates": (
        "benchmarks/gates.py",
        "dcr/core/statistics.py",
        "dcr/frames",
        "dcr/frontier",
        "dcr/gate",
        "dcr/gating/classifier.py",
        "dcr/inference.py",
        "dcr/outcomes",
    ),
    "frontier": ("dcr/frontier", "dcr/calibration", "dcr/inference.py", "dcr/outcomes", *RULES[:2]),
}


@dataclass(frozen=True)
class Identity:
    id: str
    prompt: str


@dataclass(frozen=True)
class Origin:
    """The origin of one evaluation's numbers. `prompts` has a hash of ids and prompts by set."""

    prompts: dict[str, str]
    trained_on: str  # label of the data and a hash of the rows of all stages, or "nothing"
    machine: str
    date: str


def of(evaluation: Path) -> Origin:
    """The origin of the numbers in `<run>/eval/<fingerprint>/`, measured on a machine like this."""
    file = evaluation / "metrics.json"
    measured = results.read(file)
    run = Run(evaluation.parent.parent)
    rows = run.record().get("rows", {})
    drawn = {name: part["fingerprint"] for name, part in rows.items()}
    made_with = storage.read_yaml(run.config_file, dict[str, Any]) if rows else {}
    decoded = (measured.decoding or {}).get("threads") or [run.threads()]
    threads = ", ".join(f"{n} thread{'s' * (n > 1)}" for n in decoded if n)
    made_in = str(measured.settings.get("precision", ""))
    return Origin(
        _prompts(evaluation, measured),
        f"{made_with['data']['label']} {storage.fingerprint(drawn)}" if rows else "nothing",
        ", ".join(filter(None, [device(), threads, made_in])),
        date_of(file),
    )


def date_of(file: Path) -> str:
    return datetime.datetime.fromtimestamp(file.stat().st_mtime, datetime.UTC).isoformat()


def _prompts(evaluation: Path, measured: results.Metrics) -> dict[str, str]:
    """A hash of each set's prompts, and under "" one of all of them."""
    ranked = measured.discernment.sets if measured.discernment else {}
    attacked = {name for of in measured.robustness.values() for name in of.sets}
    found: dict[str, str] = {}
    for place in ANSWERS:
        for file in sorted((evaluation / place).glob("*.jsonl")):
            name = file.stem
            counted = measured.sets.get(name) or ranked.get(name)
            known = counted is not None or name in attacked or place == "frontier"
            if name in found or not known:
                continue
            rows = {row.id: row.prompt for row in storage.read_lines(file, Identity)}
            ids = rows if counted is None or counted.ids is None else counted.ids
            found[name] = storage.fingerprint(sorted((i, rows.get(i)) for i in ids))
    return found | {"": storage.fingerprint(found)}


def device() -> str:
    """The processor or accelerator, and what it multiplies in."""
    if machine.kind_of() != "cpu":
        return machine.device().why
    cpu = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.is_file() else None
    return f"{named[1] if named else platform.machine()}, {machine.cpu_unit() or 'no bf16 unit'}"


# --- the code that measured ---------------------------------------------------------------------


def commit_of(named: str | None, date: str) -> str:
    """The commit by its name, or the last one before a date. UserError outside a repository."""
    if named is None:
        named = git("rev-list", "-1", f"--before={date}", "HEAD").decode().strip()
    return git("rev-parse", "--short=12", f"{named}^{{commit}}").decode().strip()


def git(*words: str) -> bytes:
    ended = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True)
    if ended.returncode:
        said = ended.stderr.decode(errors="replace").strip().splitlines() or ["no reason told"]
        raise UserError(f"git {' '.join(words)}: {said[-1]}; record from a clone, commit=<one>")
    return ended.stdout


def code_at(commit: str) -> dict[str, str]:
    """The text of each file that may decide a number, as it was at a commit."""
    with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", commit))) as files:
        opened = {
            f.name: files.extractfile(f)
            for f in files
            if f.name.startswith(PARTS) and f.name.endswith(KINDS)
        }
        return {name: file.read().decode() for name, file in opened.items() if file}


def code_now() -> dict[str, str]:
    """The same of the checkout as it is."""
    named = (file for part in PARTS for file in (ROOT / part).rglob("*.*"))
    files = (file for file in named if file.name.endswith(KINDS))
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


def measured_by(metric: str, code: Mapping[str, str]) -> str:
    """A hash of the code that decides a metric: statements without comments, docstrings, imports.

    How files are called does not count.
    """
    places = MEASURED_BY.get(metric.split("/")[0], RULES)
    deciding = [name for name in code if any(f"{name}/".startswith(f"{p}/") for p in places)]
    shapes = (_shape(ast.parse(code[n])) if n.endswith(".py") else code[n] for n in deciding)
    return storage.fingerprint(sorted(map(repr, shapes)))


def _shape(node: Any) -> Any:
    """A syntax tree as nested lists that are the same for every version of Python."""
    if isinstance(node, ast.AST):
        parts = ((name, _shape(value)) for name, value in ast.iter_fields(node))
        # fields that a newer Python adds are empty in older code
        return [type(node).__name__, *(part for part in parts if part[1] not in (None, []))]
    if isinstance(node, list):
        return [_shape(each) for each in node if not _says_nothing(each)]
    return None if node is None else repr(node)


def _says_nothing(node: Any) -> bool:
    """Whether a statement is an import or a docstring."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    return isinstance(node, (ast.Import, ast.ImportFrom))
