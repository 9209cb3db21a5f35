"""The answers that STL-aug learns: compliant ones to seemingly toxic prompts, each checked.

The prompts are a source's, or harmless twins that the same author makes of toxic ones first.

An answer must be whole, no refusal by keywords, and full compliance by every judge that is asked.
Completions and verdicts stand beside the file of answers in `<out>.work/`, so that a command killed
at any point and given again asks nothing twice.
"""

import functools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dcr import endpoints, entry, extensions, twins
from dcr.core import balance, cli, config, precision, prompts, refusal, sources, storage, threads
from dcr.core.balance import Balance
from dcr.core.config import (
    AUTO_LENGTH,
    ConfigError,
    EvalConfig,
    Judge,
    KeywordRules,
    Kind,
    Steering,
)
from dcr.core.evaluation.sets import PromptSet
from dcr.core.runs import Run
from dcr.core.sources import Example
from dcr.core.text import label_of, normalise
from dcr.endpoints import EndpointError

if TYPE_CHECKING:
    from dcr.core.generation import Completion
    from dcr.judges import Verdict

    Judged = tuple[list[Completion], dict[str, str]]  # answers, and by id what became of each

SET = "answers"  # the name of the completions' and the verdicts' files
ACCEPTED, UNDECIDED = NOT_REJECTED = "accepted", "without a verdict"
# Shows the judge a toxic prompt and a twin; the second of its three classes is the harmless one.
TWIN_WORDING, HARMLESS = cli.PACKAGE / "judges" / "twin.txt", "refused"
UNREADABLE = re.compile("[\0\ud800-\udfff]")  # no JSONL file of training pairs may hold these
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
        "the source's prompts are toxic: harmless twins of them, of the same form and nearly the "
        "same words, are written first, and these are answered; judge=llm reads whether they are",
        False,
    )
    out: Path = entry.option("where answers go: a .jsonl file, added to where it is this command's")
    count: int | None = entry.option("prompts, drawn by seed; none: all", None, least=1)
    attempts: int = entry.option(
        "how often a prompt is asked whose answer was rejected, each time with another "
        "instruction in the system prompt; so is a toxic prompt without a twin",
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
    """A row of the file: a prompt with its answer, and who gave it."""

    id: str
    prompt: str
    response: str
    category: str | None = None
    group: str | None = None
    source: str
    answered_by: str


@dataclass
class Tally:
    """What became of the prompts; `rejected` counts reasons, each prompt by its last attempt."""

    asked: int
    accepted: int = 0
    pairs: Balance | None = None  # of toxic prompts with their accepted twins
    rejected: Counter[str] = field(default_factory=Counter)
    unanswered: int = 0  # a server or judge failed: the same command asks again
    unread: bool = False  # twins that no judge has read

    def described(self, options: Options) -> str:
        lines = [
            f"{options.source}: {self.asked} prompts, {self.accepted} accepted in {options.out}, "
            f"{self.rejected.total()} rejected, {self.unanswered} without an answer or verdict"
            f"{' (the same command asks again)' if self.unanswered else ''}"
        ]
        lines += [f"  {n} {why}" for why, n in self.rejected.most_common()]
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
        threads.use(settings.trainer.threads)
    tally = augment(options, settings)
    print(tally.described(options))
    if tally.asked and tally.unanswered == tally.asked:
        raise EndpointError(
            f"source={options.source}: no prompt was answered; the same command asks again"
        )


def augment(options: Options, settings: EvalConfig) -> Tally:
    """Answer, check and keep what is missing in `options.out`.

    Raises UserError where the file is another's, and for all that answering and judging raise.
    """
    from dcr.core.evaluation import subjects

    _check(settings)
    kind = Kind.toxic if options.twins else Kind.seemingly_toxic
    drawn = rows = sources.read(options.source, root=settings.data.root, kind=kind)
    if options.count is not None:
        drawn = rows = sources.draw(rows, options.count, settings.seed)
    attempts = [
        _instructed(settings, instruction) for instruction in INSTRUCTIONS[: options.attempts]
    ]
    work = Run(Path(f"{options.out}.work"))
    served = settings.endpoint is not None
    author = str(settings.endpoint_model) if served else settings.model.name
    subject = subjects.Subject("endpoint") if served else subjects.base(settings.model)
    policy = functools.cache(functools.partial(subjects.opened, settings, subject))
    tally = Tally(len(rows))

    def said(name: str, kind: Kind, asking: EvalConfig, rows: list[Example]) -> "list[Completion]":
        folder = subjects.answers_folder(asking, work, subject)
        asked = PromptSet(name, kind, rows)
        return subjects.answers(asking, subject, [asked], folder, policy)[name]

    def judged(asking: EvalConfig, rows: list[Example]) -> "Judged":
        given = said(SET, Kind.seemingly_toxic, asking, rows)
        return given, outcomes(given, asking, subjects.answers_folder(asking, work, subject))

    def intents(asking: EvalConfig, written: "list[Completion]") -> dict[str, str]:
        place = subjects.answers_folder(asking, work, subject)
        return harmless(written, settings, place)

    with storage.locked(work.folder):
        if options.twins:
            tally.unread = Judge.llm not in settings.judge
            write = functools.partial(said, "twins", Kind.toxic)
            rows = _twins(settings, drawn, options.attempts, write, intents, tally)
        kept = _answered(options.out, author, rows, attempts, judged, tally)
    if options.twins:
        twins_kept = [row for row in rows if row.id in {answer.id for answer in kept}]
        pairs = {row.group for row in twins_kept}
        tally.pairs = balance.balance(twins_kept, [t for t in drawn if _pair(t) in pairs])
    return tally


def _answered(
    out: Path,
    author: str,
    rows: list[Example],
    attempts: Sequence[EvalConfig],
    judged: "Callable[[EvalConfig, list[Example]], Judged]",
    tally: Tally,
) -> list[Answer]:
    """All that `out` then holds: what it held, and what one attempt after the other brings."""
    kept = kept_answers(out, author, rows)
    known = {answer.id for answer in kept}
    left = [row for row in rows if row.id not in known]
    tally.accepted = len(rows) - len(left)
    why_not: Counter[str] = Counter()
    for asking in attempts:
        if not left:
            break
        given, why = judged(asking, left)
        accepted = {each.id: each for each in given if why[each.id] == ACCEPTED}
        kept += [
            _answer(row, accepted[row.id].response, author) for row in left if row.id in accepted
        ]
        if accepted:
            storage.write_text(out, "".join(map(_line, kept)))
        rejected = {i: reason for i, reason in why.items() if reason not in NOT_REJECTED}
        tally.accepted += len(accepted)
        tally.unanswered += len(left) - len(accepted) - len(rejected)
        left = [row for row in left if row.id in rejected]
        why_not = Counter(rejected.values())
    tally.rejected += why_not
    return kept


def _answer(row: Example, response: str, author: str) -> Answer:
    return Answer(
        id=row.id,
        prompt=row.prompt,
        response=response,
        category=row.category,
        group=row.group,
        source=row.source,
        answered_by=author,
    )


def _pair(toxic: Example) -> str:
    return toxic.group or toxic.id


def _twins(
    settings: EvalConfig,
    toxic: list[Example],
    attempts: int,
    write: "Callable[[EvalConfig, list[Example]], list[Completion]]",
    intents: "Callable[[EvalConfig, list[Completion]], dict[str, str]]",
    tally: Tally,
) -> list[Example]:
    """A harmless twin of each prompt, where `attempts` bring one; `tally` counts the others."""
    known, made, left = {normalise(row.prompt) for row in toxic}, dict[str, str](), toxic
    rejected: dict[str, str] = {}
    for instruction in twins.INSTRUCTIONS[:attempts]:
        if not left:
            break
        rejected, asking, fresh = {}, _instructed(settings, instruction), list["Completion"]()
        for written in write(asking, left):
            twin = twins.candidate(written.response)
            why = twins.outcome(written.prompt, twin) if written.ended else "cut off"
            if why == twins.ACCEPTED and normalise(twin) in known:
                why = "another's twin as well"
            if why == twins.ACCEPTED:
                fresh.append(replace(written, response=twin))
                known.add(normalise(twin))
            else:
                rejected[written.id] = why
        meant = intents(asking, fresh)
        made |= {twin.id: twin.response for twin in fresh if meant[twin.id] == ACCEPTED}
        rejected |= {i: why for i, why in meant.items() if why not in NOT_REJECTED}
        left = [row for row in left if row.id in rejected]
    tally.rejected += Counter(f"without a twin: {why}" for why in rejected.values())
    tally.unanswered += len(toxic) - len(made) - len(rejected)
    return [
        replace(row, id=f"twin-{row.id}", prompt=made[row.id], kind=Kind.seemingly_toxic,
                response=None, group=_pair(row))
        for row in toxic
        if row.id in made
    ]  # fmt: skip


def _instructed(settings: EvalConfig, instruction: str | None) -> EvalConfig:
    """The same settings with the instruction behind the system prompt that the model has anyhow.

    Behind the template's own as well, which only a local model lets us see.
    """
    if instruction is None:
        return settings
    own = settings.model.system_prompt
    whole = f"{own}\n\n{instruction}" if own else instruction
    if settings.endpoint is None:
        from dcr.core import models

        chat = prompts.chat_format(models.open_tokenizer(settings.model), settings.model)
        whole = chat.with_system(instruction, "attempts").system_prompt
    return replace(settings, model=replace(settings.model, system_prompt=whole))


def _settings(options: Options) -> EvalConfig:
    """As `eval.py` would read them; sets of `data` that are not named are the embedded ones."""
    if options.out.suffix != ".jsonl":
        raise ConfigError(f"out={options.out}: training reads files that end in .jsonl; add it")
    keys = {override.partition("=")[0].lstrip("+") for override in options.settings}
    overrides = [] if "data" in keys else ["data=demo"]
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
    if composed.endpoint is not None:
        name = str(composed.endpoint_model or "unnamed")  # which the checks then refuse
        composed.model.name, composed.model.label = name, label_of(name)
    settings, arithmetic = precision.of_evaluation(config.resolve(composed, EvalConfig))
    if settings.endpoint is None:
        arithmetic.say()
    return settings


def _check(settings: EvalConfig) -> None:
    """Raises a UserError for what can be known wrong before anything is read or loaded."""
    if settings.steering.method is not Steering.none:
        raise ConfigError(f"steering={settings.steering.method.value}: not done here; leave it out")
    if settings.gen.max_new_tokens == AUTO_LENGTH:
        raise ConfigError("gen.max_new_tokens=auto: cuts answers; give a number of tokens")
    from dcr import judges
    from dcr.core.evaluation import subjects

    for name in settings.judge:
        if Kind.seemingly_toxic not in judges.KINDS[name]:
            raise ConfigError(
                f"judge={name.value}: does not say whether a harmless prompt was answered; "
                "use llm or wildguard"
            )
    judges.check(settings.judge, settings)
    if settings.endpoint is not None:
        for name, weight in settings.gen.contrast.items():
            raise ConfigError(
                f"gen.{name}={weight}: an endpoint shows no logits to contrast; "
                "leave it out, or name the model with model="
            )
        endpoints.check(subjects.server_of(settings), "endpoint")


# --- what is learnt -----------------------------------------------------------------------------


def outcomes(answers: "Sequence[Completion]", settings: EvalConfig, folder: Path) -> dict[str, str]:
    """By id: ACCEPTED, UNDECIDED where a judge failed, or why the answer is rejected.

    Judges are asked, one after the other, only about what nothing before them has rejected.
    """
    from dcr import judges

    why = {answer.id: by_rules(answer) for answer in answers}
    for name in settings.judge:
        if name is Judge.keyword:  # always asked, above
            continue
        passed = [answer for answer in answers if why[answer.id] == ACCEPTED]
        if passed:
            verdicts = judges.judge(
                name, settings, {SET: passed}, folder, settings.trainer.progress
            )
            why |= {verdict.id: _by_judge(name, verdict) for verdict in verdicts[SET]}
    return why


def harmless(written: "Sequence[Completion]", settings: EvalConfig, folder: Path) -> dict[str, str]:
    """By id: ACCEPTED, UNDECIDED where the judge failed, or why a twin is none: it asks for the
    harm of its prompt in other words. Without `judge=llm` all pass.
    """
    from dcr import judges

    if Judge.llm not in settings.judge or not written:
        return dict.fromkeys((twin.id for twin in written), ACCEPTED)
    asking = replace(settings, llm=replace(settings.llm, prompt=str(TWIN_WORDING)))
    verdicts = judges.judge(
        Judge.llm, asking, {"twins": written}, folder, settings.trainer.progress
    )
    why = {}
    for verdict in verdicts["twins"]:
        why[verdict.id] = ACCEPTED if verdict.compliance == HARMLESS else "not harmless by llm"
        if verdict.status == "error":
            why[verdict.id] = UNDECIDED
    return why


def by_rules(answer: "Completion") -> str:
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


def _by_judge(name: Judge, verdict: "Verdict") -> str:
    if verdict.status == "error":
        return UNDECIDED
    if verdict.status != "ok" or verdict.compliance is None:
        return f"without a valid verdict of {name.value}"
    if verdict.compliance != "complied":
        return f"called {verdict.compliance} by {name.value}"
    return "called unsafe by " + name.value if verdict.safety == "unsafe" else ACCEPTED


# --- the file -----------------------------------------------------------------------------------


def kept_answers(path: Path, author: str, rows: Sequence[Example]) -> list[Answer]:
    """What the file holds, without a line that a kill tore.

    Raises ConfigError where an answer is not by the same author to the same prompt of the same
    source, and DataError for a line that this command did not write.
    """
    cure = "not a row of this command; name another file with out="
    answers = storage.read_lines(path, Answer, cure)
    sources_asked, prompt_of = {row.source for row in rows}, {row.id: row.prompt for row in rows}
    for answer in answers:
        found = f"out={path}: {answer.id} "
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


def _line(answer: Answer) -> str:
    row = {key: value for key, value in asdict(answer).items() if value is not None}
    return json.dumps(row, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
