"""Write the answers that STL-aug learns: compliant ones to seemingly toxic prompts, each checked.

python -m dcr.augment source=xstest_safe model=<name> out=answers.jsonl [data.root=<data>]
python -m dcr.augment source=xstest_safe endpoint=https://…/v1 endpoint_model=<name>
    out=answers.jsonl judge=llm llm.model=<name>

Every other setting is one of `eval.py`. `answers` says why one is rejected and keeps the file.
Training only reads that file:

python train.py method=stl_aug stl_aug.responses=answers.jsonl

Completions and verdicts stand beside it in `<out>.work/`, so that a command killed at any point
and given again asks nothing twice.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from dcr import cli, config, endpoints, judges, sources, storage
from dcr.augment import answers
from dcr.config import ConfigError, EvalConfig, Kind, Steering
from dcr.endpoints import EndpointError
from dcr.evaluation import answers as stored_answers
from dcr.evaluation import subjects
from dcr.evaluation.sets import PromptSet
from dcr.evaluation.subjects import Subject
from dcr.generation import Completion
from dcr.models import Policy
from dcr.runs import Run
from dcr.sources import Example
from dcr.text import label_of

__all__ = ["INSTRUCTIONS", "Options", "Tally", "augment", "main"]

CONF = Path(__file__).parents[2] / "conf"
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


@dataclass(frozen=True)
class Options:
    """What the command line may hold besides settings of `eval.py`."""

    source: str = ""
    out: Path = Path()
    count: int | None = None
    attempts: int = 1


@dataclass
class Tally:
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
    options, settings = _read(arguments)
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
    _check(options, settings)
    rows = sources.read(options.source, root=settings.data.root, kind=Kind.seemingly_toxic)
    if options.count is not None:
        rows = sources.draw(rows, options.count, settings.seed)
    work = Run(Path(f"{options.out}.work"))
    author = _author(settings)
    answered = answers.answered(options.out, author, rows)
    subject = (
        Subject("endpoint") if settings.endpoint is not None else subjects.base(settings.model)
    )
    policy = functools.cache(functools.partial(subjects.opened, settings, subject))
    tally = Tally(len(rows), accepted=sum(row.id in answered for row in rows))
    left = [row for row in rows if row.id not in answered]
    with storage.locked(work.folder):
        for instruction in INSTRUCTIONS[: options.attempts]:
            if not left:
                break
            asking = _instructed(settings, instruction)
            given = _answered(asking, subject, policy, left, work)
            folder = subjects.answers_folder(asking, work, subject)
            reasons = answers.reasons(given, asking, folder)
            accepted = [a for a in given if reasons[a.id] == answers.ACCEPTED]
            answers.add(options.out, author, left, accepted)
            tally.accepted += len(accepted)
            refused = {i: why for i, why in reasons.items() if why not in answers.OPEN}
            tally.unanswered += len(left) - len(accepted) - len(refused)
            tally.rejected = Counter(refused.values())
            left = [row for row in left if row.id in refused]
    return tally


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
    prompts = PromptSet(answers.SET, Kind.seemingly_toxic, list(rows))
    ask = functools.partial(subjects.answer, settings, subject, policy)
    return stored_answers.complete([prompts], ask, folder, settings.trainer.progress)[answers.SET]


OWN = ("source", "out", "count", "attempts")


def _read(arguments: Sequence[str]) -> tuple[Options, EvalConfig]:
    """Raises ConfigError, in one line, for whatever cannot be."""
    own: dict[str, str] = {}
    overrides: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument}: cannot be read; settings are written key=value")
        if key in OWN:
            own[key] = value
        else:
            one = key == "judge" and "[" not in value  # where Hydra wants a list
            overrides.append(f"judge=[{value}]" if one else argument)
    return _options(own), _settings(overrides)


def _options(own: dict[str, str]) -> Options:
    for key in ("source", "out"):
        if not own.get(key):
            raise ConfigError(
                f"{key}: nothing given; say which prompts with source=<name or .jsonl> and where "
                "their answers go with out=<file.jsonl>"
            )
    if not own["out"].endswith(".jsonl"):
        raise ConfigError(f"out={own['out']}: training reads files that end in .jsonl; add it")
    return Options(
        own["source"],
        Path(own["out"]),
        _number(own, "count") if "count" in own else None,
        _number(own, "attempts") if "attempts" in own else Options.attempts,
    )


def _number(own: dict[str, str], key: str) -> int:
    if not own[key].isdecimal() or int(own[key]) < 1:
        raise ConfigError(f"{key}={own[key]}: give 1 or more")
    return int(own[key])


def _settings(overrides: Sequence[str]) -> EvalConfig:
    """As `eval.py` would read them; sets of `data` that are not named are the embedded ones."""
    keys = {override.partition("=")[0].lstrip("+") for override in overrides}
    data = [] if "data" in keys else ["data=demo"]
    cli.prepare()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            composed = compose("eval", [*data, *overrides])
    except HydraException as error:
        raise ConfigError(config.one_line(error, EvalConfig, Options)) from error
    if composed.run is not None:
        raise ConfigError(
            f"run={composed.run}: give model=<name or folder> or endpoint=<url>; "
            "python -m dcr.export makes a folder of a run"
        )
    named = {"model", "model.name"} & keys
    if (composed.endpoint is not None) == bool(named):
        raise ConfigError("who answers? give either model=<name> or endpoint=<url>")
    if composed.endpoint is not None:
        name = str(composed.endpoint_model or "unnamed")  # which the checks then refuse
        composed.model.name, composed.model.label = name, label_of(name)
    return config.resolve(composed, EvalConfig)


def _check(options: Options, settings: EvalConfig) -> None:
    """Raises a UserError for what can be known wrong before anything is read or loaded."""
    if options.attempts > len(INSTRUCTIONS):
        raise ConfigError(f"attempts={options.attempts}: give 1 to {len(INSTRUCTIONS)}")
    if settings.steering.method is not Steering.none:
        raise ConfigError(f"steering={settings.steering.method.value}: not done here; leave it out")
    for name in settings.judge:
        if not answers.judges_compliance(name):
            raise ConfigError(
                f"judge={name.value}: does not say whether a harmless prompt was answered; "
                "use llm or wildguard"
            )
    judges.check(settings.judge, settings)
    if settings.endpoint is not None:
        if settings.gen.self_cd:
            raise ConfigError(
                f"gen.self_cd={settings.gen.self_cd}: an endpoint shows no logits to contrast; "
                "leave it out, or name the model with model="
            )
        endpoints.check(subjects.server_of(settings), "endpoint")


def _author(settings: EvalConfig) -> str:
    """Who answers, as it stands in every row."""
    return str(settings.endpoint_model) if settings.endpoint is not None else settings.model.name
