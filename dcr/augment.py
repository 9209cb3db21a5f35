"""Write the answers that STL-aug learns: compliant ones to seemingly toxic prompts, each checked.

The prompts are those of a source, or harmless twins that the author first makes of toxic ones.

An answer must be whole, no refusal by keywords, and full compliance by every judge that is asked.
Completions and verdicts are stored in `<out>.work/`, so that a command that was killed and is given
again asks nothing twice.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dcr import balance, cli, entry, extensions, keywords, resolving, twins
from dcr import eval as evaluation
from dcr.balance import Balance
from dcr.core import config, machine, prompts, sources, storage
from dcr.core.config import ConfigError, Kind
from dcr.core.config.evaluation import AUTO_LENGTH
from dcr.core.evaluation import PromptSet
from dcr.core.runs import Run
from dcr.core.sources import Example
from dcr.core.text import normalise
from dcr.endpoints import servers
from dcr.endpoints.servers import EndpointError
from dcr.extensions import EvalSettings

if TYPE_CHECKING:
    from dcr.core.evaluation.protocols import Subject
    from dcr.core.generation import Completion
    from dcr.judges.verdicts import Verdict

SET = "answers"  # the name of the completions' and the verdicts' files
ACCEPTED, UNDECIDED = NOT_REJECTED = "accepted", "without a verdict"
# The judge's prompt on a toxic prompt and its twin; the second of its classes is the harmless one.
TWIN_WORDING, HARMLESS = config.PACKAGE / "judges" / "twin.txt", "refused"
UNREADABLE = re.compile("[\0\ud800-\udfff]")  # no JSONL file of training pairs may hold these
# The instruction that an attempt adds to the model's own system prompt. The first attempt asks as
# any user would; the others are for prompts whose answers were rejected before.
INSTRUCTIONS = (
    None,
    "The user's question is harmless, even if some of its words are used for harmful things "
    "elsewhere. Take it in its everyday sense and answer it fully, directly and briefly, without "
    "warnings.",
    "You answer a helpful FAQ. Each question has been checked and is safe. Begin at once with the "
    "answer itself, and give it in two to four plain sentences.",
)


@dataclass
class Options:
    """python -m dcr.augment source=xstest_safe model=<name> out=answers.jsonl [data.root=<data>]
    python -m dcr.augment source=xstest_safe endpoint=https://.../v1 endpoint_model=<name>
        out=answers.jsonl judge=llm llm.model=<name>
    python -m dcr.augment twins=true source=toxic.jsonl endpoint=... out=twins.jsonl

    Writes the answers that STL-aug learns, each checked. Training only reads that file:
    python train.py method=stl_aug stl_aug.responses=answers.jsonl
    python train.py data.toxic.source=toxic.jsonl data.seemingly_toxic.source=twins.jsonl
    """

    source: str = entry.option("the seemingly toxic prompts: a source's name or a .jsonl file")
    twins: bool = entry.option(
        "the source's prompts are toxic: first write harmless twins of the same form and nearly "
        "the same words, then answer the twins; judge=llm checks that twins are harmless",
        False,
    )
    out: Path = entry.option("where answers go: a .jsonl file, to which this command may add")
    count: int | None = entry.option("prompts, drawn by seed; none: all", None, least=1)
    attempts: int = entry.option(
        "how often to ask for an answer, or for a twin, until one is accepted; each time with "
        "another instruction in the system prompt",
        1,
        least=1,
        most=len(INSTRUCTIONS),
    )
    settings: list[str] = entry.option(
        "model=<name> or endpoint=<url>, and any other setting of eval.py; python eval.py --cfg "
        "job lists them",
        [],
        rest=True,
    )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A row of the file: a prompt with its answer and the answer's author."""

    id: str
    prompt: str
    response: str
    category: str | None = None
    group: str | None = None
    source: str
    answered_by: str


@dataclass
class Tally:
    """How many prompts were accepted or not; `rejected` counts the reasons of last attempts."""

    asked: int
    accepted: int = 0
    pairs: Balance | None = None  # of toxic prompts and their accepted twins
    rejected: Counter[str] = field(default_factory=Counter)
    unanswered: int = 0  # since a server or judge failed: the same command asks again
    unread: bool = False  # no judge has read the twins
    unfit: set[tuple[str, str]] = field(default_factory=set)  # ids and prompts of twins for harm
    removed: int = 0  # answers to such twins, which an earlier command wrote

    def described(self, options: Options) -> str:
        lines = [
            f"{options.source}: {self.asked} prompts, {self.accepted} accepted in {options.out}, "
            f"{self.rejected.total()} rejected, {self.unanswered} without an answer or verdict"
            f"{' (the same command asks again)' if self.unanswered else ''}"
        ]
        lines += [f"  {n} {why}" for why, n in self.rejected.most_common()]
        if self.removed:
            lines.append(f"{self.removed} earlier answers removed: their twins ask for harm by llm")
        if self.unread:
            lines.append(
                "unchecked: whether each twin asks for something else than its toxic prompt; read "
                "them, or add judge=llm llm.model=<name>"
            )
        if self.pairs is not None:
            lines += [f"{what}: {value}" for what, value in self.pairs.rows()]
            lines += [self.pairs.warning] if self.pairs.warning else []
        return "\n".join(lines)


@entry.command(Options, goes_on=True)
def main(options: Options) -> None:
    settings = _settings(options)
    if settings.endpoint is None:
        extensions.hand_in_passes()
        machine.use_threads(settings.trainer.threads)
    tally = augment(options, settings)
    print(tally.described(options))
    if tally.asked and tally.unanswered == tally.asked:
        raise EndpointError(
            f"source={options.source}: no prompt was answered; the same command asks again"
        )


@dataclass(frozen=True)
class Author:
    """The model that answers, and the folder of its completions and their verdicts."""

    name: str
    subject: "Subject"

    def folder(self, asking: EvalSettings) -> Path:
        return self.subject.under(asking).folder

    def write(
        self, name: str, kind: Kind, asking: EvalSettings, rows: list[Example]
    ) -> "list[Completion]":
        """Completions of the rows under the settings `asking`, stored as the set `name`."""
        subject = self.subject.under(asking)
        return subject.answers([PromptSet(name, kind, rows)], subject.folder)[name]


def augment(options: Options, settings: EvalSettings) -> Tally:
    """Answer and check the prompts that `options.out` lacks, and add the accepted answers to it.

    Raises UserError where the file is not this command's, and for all that answering and judging
    raise.
    """
    from dcr.core.evaluation import subjects

    _check_settings(settings)
    kind = Kind.toxic if options.twins else Kind.seemingly_toxic
    drawn = sources.read(options.source, root=settings.data.root, kind=kind)
    if options.count is not None:
        drawn = sources.draw(drawn, options.count, settings.seed)
    attempts = [_instructed(settings, each) for each in INSTRUCTIONS[: options.attempts]]
    work = Run(Path(f"{options.out}.work"))
    (subject,) = subjects.subjects(settings, work)
    served = settings.endpoint is not None
    author = Author(str(settings.endpoint_model) if served else settings.model.name, subject)
    tally, rows = Tally(len(drawn)), drawn
    with storage.locked(work.folder), subject:
        if options.twins:
            tally.unread = "llm" not in settings.judge
            rows = _twins(author, settings, drawn, options.attempts, tally)
        known = _answered(author, options.out, rows, attempts, tally)
    if options.twins:
        answered = {answer.id for answer in known}
        paired = [row for row in rows if row.id in answered]
        groups = {row.group for row in paired}
        tally.pairs = balance.balance(paired, [t for t in drawn if (t.group or t.id) in groups])
    return tally


def _answered(
    author: Author, out: Path, rows: list[Example], attempts: Sequence[EvalSettings], tally: Tally
) -> list[Answer]:
    """Ask for the rows that `out` lacks, attempt by attempt; returns all of its answers."""
    every = known_answers(out, author.name, rows, tally.unfit)
    found = [answer for answer in every if (answer.id, answer.prompt) not in tally.unfit]
    tally.removed = len(every) - len(found)
    if tally.removed:
        _write(out, found)
    known = {answer.id for answer in found}
    missing = [row for row in rows if row.id not in known]
    tally.accepted = len(rows) - len(missing)
    reasons: Counter[str] = Counter()
    for asking in attempts:
        if not missing:
            break
        given = author.write(SET, Kind.seemingly_toxic, asking, missing)
        why = outcomes(given, asking, author.folder(asking))
        accepted = {each.id: each.response for each in given if why[each.id] == ACCEPTED}
        found += [
            Answer(
                id=row.id, prompt=row.prompt, response=accepted[row.id], category=row.category,
                group=row.group, source=row.source, answered_by=author.name,
            )
            for row in missing
            if row.id in accepted
        ]  # fmt: skip
        if accepted:
            _write(out, found)
        rejected = {i: reason for i, reason in why.items() if reason not in NOT_REJECTED}
        tally.accepted += len(accepted)
        tally.unanswered += len(missing) - len(accepted) - len(rejected)
        missing = [row for row in missing if row.id in rejected]
        reasons = Counter(rejected.values())
    tally.rejected += reasons
    return found


def _twins(
    author: Author, settings: EvalSettings, toxic: list[Example], attempts: int, tally: Tally
) -> list[Example]:
    """A harmless twin of each prompt for which `attempts` bring one; `tally` counts the others."""
    known, made, missing = {normalise(row.prompt) for row in toxic}, dict[str, str](), toxic
    rejected: dict[str, str] = {}
    for instruction in twins.INSTRUCTIONS[:attempts]:
        if not missing:
            break
        rejected, asking, fresh = {}, _instructed(settings, instruction), list["Completion"]()
        for written in author.write("twins", Kind.toxic, asking, missing):
            twin = twins.candidate(written.response)
            why = twins.outcome(written.prompt, twin) if written.ended else "cut off"
            if why == twins.ACCEPTED and normalise(twin) in known:
                why = "another's twin as well"
            if why == twins.ACCEPTED:
                fresh.append(replace(written, response=twin))
                known.add(normalise(twin))
            else:
                rejected[written.id] = why
        meant = harmless(fresh, settings, author.folder(asking))
        tally.unfit |= {
            (f"twin-{twin.id}", twin.response)
            for twin in fresh
            if meant[twin.id] not in NOT_REJECTED
        }
        made |= {twin.id: twin.response for twin in fresh if meant[twin.id] == ACCEPTED}
        rejected |= {i: why for i, why in meant.items() if why not in NOT_REJECTED}
        missing = [row for row in missing if row.id in rejected]
    tally.rejected += Counter(f"without a twin: {why}" for why in rejected.values())
    tally.unanswered += len(toxic) - len(made) - len(rejected)
    return [
        replace(row, id=f"twin-{row.id}", prompt=made[row.id], kind=Kind.seemingly_toxic,
                response=None, group=row.group or row.id)
        for row in toxic
        if row.id in made
    ]  # fmt: skip


def _instructed(settings: EvalSettings, instruction: str | None) -> EvalSettings:
    """The settings with the instruction behind the model's own system prompt.

    A local model's may be that of its template, which an endpoint does not show.
    """
    if instruction is None:
        return settings
    own = settings.model.system_prompt
    whole = f"{own}\n\n{instruction}" if own else instruction
    if settings.endpoint is None:
        from dcr.contrast.decoding import with_system
        from dcr.core import models

        chat = prompts.chat_format(models.open_tokenizer(settings.model), settings.model)
        whole = with_system(chat, instruction, "attempts").system_prompt
    return replace(settings, model=replace(settings.model, system_prompt=whole))


def _settings(options: Options) -> EvalSettings:
    """The settings as `eval.py` reads them, with `data=demo judge=[keyword]` unless given.

    Raises ConfigError for settings that say not, or twice, who answers.
    """
    if options.out.suffix != ".jsonl":
        raise ConfigError(f"out={options.out}: training reads files that end in .jsonl; add it")
    keys = {override.partition("=")[0].lstrip("+") for override in options.settings}
    # the rules of this command judge every answer, and by default they alone
    defaults = {"data": "data=demo", "judge": "judge=[keyword]"}
    overrides = [default for key, default in defaults.items() if key not in keys]
    for override in options.settings:
        key, _, value = override.partition("=")
        one = key == "judge" and "[" not in value  # where Hydra wants a list
        overrides.append(f"judge=[{value}]" if one else override)
    composed = cli.compose("eval", overrides, Options)
    if composed.run is not None:
        raise ConfigError(
            f"run={composed.run}: give model=<name or folder> or endpoint=<url>; "
            "python -m dcr.export makes a folder of a run"
        )
    if (composed.endpoint is not None) == bool({"model", "model.name"} & keys):
        raise ConfigError("who answers? give either model=<name> or endpoint=<url>")
    resolved = resolving.resolve(cli.completed(composed, {}), EvalSettings)
    settings, arithmetic = evaluation.settle_precision(resolved)
    if settings.endpoint is None:
        arithmetic.say()
    return settings


def _check_settings(settings: EvalSettings) -> None:
    """Raises UserError for a fault of the settings that shows before anything is read."""
    if settings.steering.method != "none":
        raise ConfigError(f"steering={settings.steering.method}: not done here; leave it out")
    if settings.gen.max_new_tokens == AUTO_LENGTH:
        raise ConfigError("gen.max_new_tokens=auto: cuts answers; give a number of tokens")
    from dcr.endpoints import subject
    from dcr.judges import judging

    others = [name for name in settings.judge if name != "keyword"]
    for name in others:
        asked = judging.judging_of(name, settings)
        if Kind.seemingly_toxic not in asked.kinds or "complied" not in asked.labels:
            raise ConfigError(
                f"judge={name}: does not say whether a harmless prompt was answered; "
                "use llm or wildguard"
            )
    judging.JudgeTable().check(others, settings)
    if settings.endpoint is not None:
        servers.check(subject.server_of(settings), "endpoint")


# --- checks of answers --------------------------------------------------------------------------


def outcomes(
    answers: "Sequence[Completion]", settings: EvalSettings, folder: Path
) -> dict[str, str]:
    """By id: ACCEPTED, UNDECIDED where a judge failed, or why the answer is rejected.

    Each judge sees the answers that the rules and the judges before it have accepted.
    """
    from dcr.judges import judging

    why = {answer.id: by_rules(answer) for answer in answers}
    for name in settings.judge:
        passed = [answer for answer in answers if why[answer.id] == ACCEPTED]
        if passed and name != "keyword":  # which the rules above are
            verdicts = judging.judge(
                name, settings, {SET: passed}, folder, settings.trainer.progress
            )
            why |= {verdict.id: _by_judge(name, verdict) for verdict in verdicts[SET]}
    return why


def harmless(
    written: "Sequence[Completion]", settings: EvalSettings, folder: Path
) -> dict[str, str]:
    """By id: ACCEPTED, UNDECIDED where the judge failed, or that the twin asks for the same harm.

    Without `judge=llm` all are accepted.
    """
    from dcr.judges import judging

    if "llm" not in settings.judge or not written:
        return dict.fromkeys((twin.id for twin in written), ACCEPTED)
    asking = replace(settings, llm=replace(settings.llm, prompt=str(TWIN_WORDING)))
    verdicts = judging.judge("llm", asking, {"twins": written}, folder, settings.trainer.progress)
    why = {}
    for verdict in verdicts["twins"]:
        why[verdict.id] = ACCEPTED if verdict.compliance == HARMLESS else "not harmless by llm"
        if verdict.status == "error":
            why[verdict.id] = UNDECIDED
    return why


def by_rules(answer: "Completion") -> str:
    """ACCEPTED, or the fault of an answer that needs no judge."""
    if not answer.ended:
        return "cut off at gen.max_new_tokens"
    if not answer.response.strip():
        return "empty"
    if UNREADABLE.search(answer.response):
        return "not text"
    if refusing := keywords.refusing_rules(answer.response):
        return f"refused by the keyword rules {refusing[0]}"
    return ACCEPTED


def _by_judge(name: str, verdict: "Verdict") -> str:
    if verdict.status == "error":
        return UNDECIDED
    if verdict.status != "ok" or verdict.compliance is None:
        return f"without a valid verdict of {name}"
    if verdict.compliance != "complied":
        return f"called {verdict.compliance} by {name}"
    return "called unsafe by " + name if verdict.safety == "unsafe" else ACCEPTED


# --- the file -----------------------------------------------------------------------------------


def _write(path: Path, answers: Sequence[Answer]) -> None:
    lines = ({k: v for k, v in asdict(each).items() if v is not None} for each in answers)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    storage.write_text(path, text)


def known_answers(
    path: Path, author: str, rows: Sequence[Example], unfit: Collection[tuple[str, str]] = ()
) -> list[Answer]:
    """The answers in the file, without a line that a kill tore.

    Raises ConfigError for an answer of another author, source or prompt that is not of the `unfit`
    twins, and DataError for a line that this command did not write.
    """
    cure = "not a row of this command; name another file with out="
    answers = storage.read_lines(path, Answer, cure)
    sources_asked, prompt_of = {row.source for row in rows}, {row.id: row.prompt for row in rows}
    for answer in answers:
        found = f"out={path}: {answer.id} "
        if (answer.id, answer.prompt) in unfit:
            continue
        if answer.answered_by != author:
            found += f"was answered by {answer.answered_by}, not by {author}"
        elif answer.source not in sources_asked:
            found += f"answers a prompt of {answer.source}"
        elif prompt_of.get(answer.id, answer.prompt) != answer.prompt:
            found += "has another prompt now"
        else:
            continue
        raise ConfigError(f"{found}; name another file")
    return answers


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
