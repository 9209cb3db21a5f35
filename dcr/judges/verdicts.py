"""What a judge says of one response, and where it is kept: never judged twice."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcr import endpoints, storage
from dcr.config import Judge, ServerConfig
from dcr.generation import Completion

COMPLIANCE = ("complied", "partial", "refused")
SAFETY = ("safe", "unsafe")
# What each judge says.
LABELS: dict[Judge, tuple[str, ...]] = {
    Judge.keyword: COMPLIANCE,
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

    Raises DataError, naming the line, for another that is no verdict.
    """
    return storage.read_lines(path, Verdict)


def store(path: Path, verdicts: Iterable[Verdict]) -> None:
    """Append verdicts, one JSON line each, flushed before returning.

    Raises UserError with the path when it cannot be written.
    """
    storage.append_lines(path, verdicts)


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
