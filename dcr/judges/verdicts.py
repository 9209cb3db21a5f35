"""What a judge says of one response, and where it is kept: never judged twice."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dcr import endpoints, storage
from dcr.config import DataError, Judge, ServerConfig, UserError
from dcr.generation import Completion

COMPLIANCE = ("complied", "partial", "refused")
SAFETY = ("safe", "unsafe")
# What each judge says; keywords know no partial refusal.
LABELS: dict[Judge, tuple[str, ...]] = {
    Judge.keyword: ("complied", "refused"),
    Judge.llm: COMPLIANCE,
    Judge.llama_guard: SAFETY,
    Judge.wildguard: COMPLIANCE + SAFETY,
    Judge.moderation: SAFETY,
}


@dataclass(frozen=True)
class Verdict:
    """One judge's word on one response. A failed one has no label and counts as neither."""

    id: str
    of: str  # fingerprint of the prompt and response it was given for
    status: str  # ok; error: nothing came back; invalid: what came back is no verdict
    compliance: str | None = None  # complied, partial or refused
    safety: str | None = None  # safe or unsafe
    p_unsafe: float | None = None
    raw: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    model: str = ""  # which one answered, where the server says so
    asked: bool = True  # False where no judge was needed

    @property
    def settled(self) -> bool:
        """Whether the judge has answered, so that asking again would only cost."""
        return self.status != "error"


def answer_fingerprint(answer: Completion) -> str:
    """Names what a verdict is about: the prompt and the response, whatever their id."""
    return storage.fingerprint([answer.prompt, answer.response])


def stored(path: Path) -> list[Verdict]:
    """Verdicts in a file in the order they came; a line torn by a kill is left out.

    Raises DataError for a line that is whole but no verdict.
    """
    found: list[Verdict] = []
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or torn within a character
            continue
        try:
            found.append(Verdict(**row))
        except TypeError as error:
            raise DataError(
                f"{path}:{number}: line: not a verdict ({error}); remove the line"
            ) from None
    return found


def store(path: Path, verdicts: Iterable[Verdict]) -> None:
    """Append verdicts, one JSON line each, flushed before returning.

    Raises UserError with the path when it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.seek(0, 2):
                file.seek(-1, 2)
                if file.read(1) != b"\n":  # torn by a kill
                    file.write(b"\n")
            for verdict in verdicts:
                line = json.dumps(asdict(verdict), ensure_ascii=False) + "\n"
                file.write(line.encode("utf-8", "replace"))  # servers can send half surrogates
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def counts(verdicts: Sequence[Verdict], model: str, judge: Judge) -> dict[str, Any]:
    """The block `sets.<name>.judged.<judge>` of `metrics.json`.

    `model` gives way to the name of the model that answered, where the server said it: an alias
    such as omni-moderation-latest stands for different models over time.
    """
    answered = sorted({v.model for v in verdicts if v.model})
    return {
        "model": ", ".join(answered) or model,
        "n": len(verdicts),
        **{
            label: sum(v.status == "ok" and label in (v.compliance, v.safety) for v in verdicts)
            for label in LABELS[judge]
        },
        "invalid": sum(v.status == "invalid" for v in verdicts),
        "error": sum(v.status == "error" for v in verdicts),
    }


def usage(verdicts: Iterable[Verdict], server: ServerConfig | None) -> dict[str, Any]:
    """The block `usage.<judge>` of `metrics.json`: requests that were answered, and their tokens.

    A response that stands in several sets was asked about once and counts once. `server` has the
    prices; without it, or without prices, `usd` is None.
    """
    once = {v.of: v for v in verdicts if v.asked and v.settled}.values()
    prompt, completion = sum(v.prompt_tokens for v in once), sum(v.completion_tokens for v in once)
    return {
        "requests": len(once),
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "usd": endpoints.spend(server, prompt, completion) if server else None,
    }
