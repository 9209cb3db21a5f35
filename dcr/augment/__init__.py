"""Write the answers that STL-aug learns: compliant ones to seemingly toxic prompts, each checked.

python -m dcr.augment source=xstest_safe model=<name> out=answers.jsonl [data.root=<data>]
python -m dcr.augment source=xstest_safe endpoint=https://…/v1 endpoint_model=<name>
    out=answers.jsonl judge=llm llm.model=<name>

Every other setting is one of `eval.py`. `options` reads the command line, `checking` says why an
answer is rejected, `answers` keeps the file. Training only reads that file:

python train.py method=stl_aug stl_aug.responses=answers.jsonl

Completions and verdicts stand beside it in `<out>.work/`, so that a command killed at any point
and given again asks nothing twice.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dcr import sources, storage
from dcr.augment import answers, checking, options
from dcr.augment.options import Options
from dcr.config import EvalConfig, Kind
from dcr.endpoints import EndpointError
from dcr.evaluation import answers as stored_answers
from dcr.evaluation import subjects
from dcr.evaluation.sets import PromptSet
from dcr.evaluation.subjects import Subject
from dcr.generation import Completion
from dcr.models import Policy
from dcr.runs import Run
from dcr.sources import Example

__all__ = ["INSTRUCTIONS", "Outcome", "augment", "main", "options"]

# What the system prompt says besides the model's own, attempt by attempt. The first asks as any
# user would; the others are for prompts whose answers were rejected before.
INSTRUCTIONS = (
    None,
    "The user's question is harmless, even if some of its words are used for harmful things "
    "elsewhere. Take it in its everyday sense and answer it fully, directly and briefly, without "
    "warnings.",
    "You answer a helpful FAQ. Each question has been checked and is safe. Begin at once with the "
    "answer itself, and give it in two to four plain sentences.",
)


@dataclass
class Outcome:
    """What became of the prompts; `rejected` counts reasons, each prompt by its last attempt."""

    asked: int
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    unanswered: int = 0  # a server or judge failed: the same command asks again

    def described(self, options: Options) -> str:
        lines = [
            f"{options.source}: {self.asked} prompts, {self.accepted} accepted in {options.out}, "
            f"{self.rejected.total()} rejected, {self.unanswered} without an answer or verdict"
            f"{' (the same command asks again)' if self.unanswered else ''}"
        ]
        return "\n".join([*lines, *(f"  {n} {why}" for why, n in self.rejected.most_common())])


def main(arguments: Sequence[str]) -> None:
    """Raises UserError for whatever a user can mend."""
    told, settings = options.read(arguments)
    outcome = augment(told, settings)
    print(outcome.described(told))
    if outcome.asked and outcome.unanswered == outcome.asked:
        raise EndpointError(
            f"source={told.source}: no prompt was answered; the same command asks again"
        )


def augment(told: Options, settings: EvalConfig) -> Outcome:
    """Answer, check and keep what is missing in `told.out`.

    Raises UserError where the file is another's, and for all that answering and judging raise.
    """
    options.check(told, settings, len(INSTRUCTIONS))
    rows = sources.read(told.source, root=settings.data.root, kind=Kind.seemingly_toxic)
    if told.count is not None:
        rows = sources.draw(rows, told.count, settings.seed)
    work = Run(Path(f"{told.out}.work"))
    author = options.author(settings)
    held = answers.held(told.out, author, rows)
    subject = (
        Subject("endpoint") if settings.endpoint is not None else subjects.base(settings.model)
    )
    policy = functools.cache(functools.partial(subjects.opened, settings, subject))
    outcome = Outcome(len(rows), accepted=sum(row.id in held for row in rows))
    left = [row for row in rows if row.id not in held]
    with storage.locked(work.folder):
        for instruction in INSTRUCTIONS[: told.attempts]:
            if not left:
                break
            asking = _instructed(settings, instruction)
            given = _answered(asking, subject, policy, left, work)
            folder = subjects.answers_folder(asking, work, subject)
            reasons = checking.reasons(given, asking, folder)
            accepted = [a for a in given if reasons[a.id] == checking.ACCEPTED]
            answers.add(told.out, author, left, accepted)
            outcome.accepted += len(accepted)
            refused = {i: why for i, why in reasons.items() if why not in checking.OPEN}
            outcome.unanswered += len(left) - len(accepted) - len(refused)
            outcome.rejected = Counter(refused.values())
            left = [row for row in left if row.id in refused]
    return outcome


def _instructed(settings: EvalConfig, instruction: str | None) -> EvalConfig:
    """The same settings with the instruction behind the model's own system prompt."""
    if instruction is None:
        return settings
    own = settings.model.system_prompt
    whole = f"{own}\n\n{instruction}" if own else instruction
    return replace(settings, model=replace(settings.model, system_prompt=whole))


def _answered(
    settings: EvalConfig,
    subject: Subject,
    policy: Callable[[], Policy],
    rows: Sequence[Example],
    work: Run,
) -> list[Completion]:
    """The rows' completions, asked for only where the folder does not hold them."""
    folder = subjects.answers_folder(settings, work, subject)
    prompts = PromptSet(checking.SET, Kind.seemingly_toxic, list(rows))
    ask = functools.partial(subjects.answer, settings, subject, policy)
    return stored_answers.complete([prompts], ask, folder, settings.trainer.progress)[checking.SET]
