"""Which answers are learnt, and the file that keeps them, never another program's or person's.

An answer must be whole, no refusal by keywords, and full compliance by every judge that is asked.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcr import judges, refusal, storage
from dcr.config import ConfigError, DataError, EvalConfig, Judge, KeywordRules, Kind
from dcr.generation import Completion
from dcr.judges import Verdict
from dcr.sources import Example

SET = "answers"  # the name of the completions' and the verdicts' files
ACCEPTED, UNDECIDED = "accepted", "without a verdict"
OPEN = (ACCEPTED, UNDECIDED)  # no reason to reject
UNREADABLE = re.compile("[\0\ud800-\udfff]")  # no JSONL file of training pairs may hold these
MARK = "answered_by"  # who wrote a row's answer: rows without it are not of this command


def reasons(answers: Sequence[Completion], settings: EvalConfig, folder: Path) -> dict[str, str]:
    """By id: ACCEPTED, UNDECIDED where a judge failed, or why the answer is rejected.

    Judges are asked, one after the other, only about what nothing before them has rejected.
    """
    why = {answer.id: by_rules(answer) for answer in answers}
    for name in settings.judge:
        if name is Judge.keyword:  # always asked, above
            continue
        passed = [answer for answer in answers if why[answer.id] == ACCEPTED]
        if passed:
            verdicts = judges.judge(
                name, settings, {SET: passed}, folder, settings.trainer.progress
            )
            why |= {verdict.id: _of(name, verdict) for verdict in verdicts[SET]}
    return why


def by_rules(answer: Completion) -> str:
    """ACCEPTED, or what no judge is needed to see."""
    if not answer.ended:
        return "cut off at gen.max_new_tokens"
    if not answer.response.strip():
        return "empty"
    if UNREADABLE.search(answer.response):
        return "not text"
    for rules in KeywordRules:
        if refusal.is_refusal(answer.response, rules.value):
            return f"refused by the keyword rules {rules.value}"
    return ACCEPTED


def _of(name: Judge, verdict: Verdict) -> str:
    if verdict.status == "error":
        return UNDECIDED
    if verdict.status != "ok" or verdict.compliance is None:
        return f"without a valid verdict of {name.value}"
    if verdict.compliance != "complied":
        return f"called {verdict.compliance} by {name.value}"
    return "called unsafe by " + name.value if verdict.safety == "unsafe" else ACCEPTED


def judges_compliance(name: Judge) -> bool:
    """Whether a judge can say that a harmless prompt was answered in full."""
    return Kind.seemingly_toxic in judges.KINDS[name]


def answered(path: Path, author: str, rows: Sequence[Example]) -> set[str]:
    """The ids that the file holds an answer of.

    Raises ConfigError where a row was not written by this command for the same author and source,
    and DataError for a line that is whole but no row.
    """
    prompts = {row.id: row.prompt for row in rows}
    source = {row.source for row in rows}
    ids: set[str] = set()
    for number, _, row in _lines(path):
        where, cure = f"out={path}: line {number} ", "name another file"
        if MARK not in row:
            raise ConfigError(f"{where}was not written by this command; {cure}")
        if row[MARK] != author:
            raise ConfigError(f"{where}was answered by {row[MARK]}, not by {author}; {cure}")
        if row.get("source") not in source:
            raise ConfigError(f"{where}answers a prompt of {row.get('source')}; {cure}")
        for key in ("id", "prompt", "response"):
            if not isinstance(row.get(key), str):
                raise DataError(f"{path}:{number}: {key}: no text; {cure}")
        if prompts.get(row["id"], row["prompt"]) != row["prompt"]:
            raise ConfigError(f"{where}holds another prompt than {row['id']} has now; {cure}")
        ids.add(row["id"])
    return ids


def add(path: Path, author: str, rows: Sequence[Example], answers: Sequence[Completion]) -> None:
    """The file with these answers behind what it holds, in the rows' order; replaced as a whole.

    A last line that some other program tore is left out. Raises UserError where it cannot be
    written.
    """
    if not answers:
        return
    by_id = {answer.id: answer for answer in answers}
    lines = [line for _, line, _ in _lines(path)]
    for row in rows:
        if row.id in by_id:
            lines.append(json.dumps(_line(row, by_id[row.id], author), ensure_ascii=False))
    storage.write_text(path, "".join(f"{line}\n" for line in lines))


def _line(row: Example, answer: Completion, author: str) -> dict[str, Any]:
    about = {"category": row.category, "group": row.group}
    return {
        "id": row.id,
        "prompt": row.prompt,
        "response": answer.response,
        **{key: value for key, value in about.items() if value is not None},
        "source": row.source,
        MARK: author,
    }


def _lines(path: Path) -> list[tuple[int, str, dict[str, Any]]]:
    """Each line that is not blank: number, text and row; without a last one that is torn."""
    try:
        whole, _, torn = path.read_bytes().rpartition(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"out={path}: {error.strerror or error}; name a file") from error
    lines = enumerate(whole.split(b"\n"), start=1)
    rows = [_row(path, number, line) for number, line in lines if line.strip()]
    try:
        return [*rows, _row(path, whole.count(b"\n") + 2, torn)] if torn.strip() else rows
    except DataError:
        return rows


def _row(path: Path, number: int, line: bytes) -> tuple[int, str, dict[str, Any]]:
    try:
        text = line.decode("utf-8").strip()
        row = json.loads(text)
    except (ValueError, RecursionError):
        text, row = "", None
    if not isinstance(row, dict):
        raise DataError(f"{path}:{number}: line: no JSON object; name another file with out=")
    return number, text, row
