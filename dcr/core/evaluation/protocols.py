"""The parts that extensions can play in an evaluation: a subject, a change, a task, judges.

Ours stand in the table of the settings' schema (`config.evaluation.Table`). A user's own is a
dataclass below `Change`, `Task` or `Judge` that its path names, see `extending`.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dcr.core import extending, storage
from dcr.core.config import ConfigError, Kind, class_of, is_path
from dcr.core.config.evaluation import EvalConfig
from dcr.core.runs import Run

if TYPE_CHECKING:
    from dcr.core.evaluation import PromptSet
    from dcr.core.generation import Completion, Decoding
    from dcr.core.models import Policy
    from dcr.core.prompts import ChatFormat
    from dcr.core.sources import Example

VERSION: Literal[2] = 2  # of the layout of `metrics.json`

Answers = Mapping[str, "list[Completion]"]  # by set
Rules = Mapping[str, Callable[[str], str]]  # the outcome of a response by keywords, by name
Masses = Mapping[str, Mapping[str, float]]  # refusal masses by set, and by id of its prompts
Ask = Callable[["list[Example]"], "Iterator[list[Completion]]"]  # batches of answers to rows


class Subject(ABC):
    """The weights that answer: base, contrastive, sft, readout, snapshot or endpoint.

    A `with` block around it ends what it has opened.
    """

    def __init__(
        self,
        settings: EvalConfig,
        run: Run,
        weights: str,
        source: Path | None = None,
        step: int | None = None,
    ) -> None:
        self.settings, self.run = settings, run
        self.weights, self.source, self.step = weights, source, step

    def __enter__(self) -> None:  # noqa: B027
        """Opens what stays open until the block ends."""

    def __exit__(self, *_: object) -> None:  # noqa: B027
        """Closes it."""

    def check(self) -> None:  # noqa: B027
        """Raises a UserError for what can be known wrong before anything is opened."""

    def check_prompts(self, asked: Sequence["PromptSet"]) -> None:  # noqa: B027
        """Raises a UserError for a prompt that it cannot be asked, before anything is opened."""

    @abstractmethod
    def under(self, settings: EvalConfig) -> "Subject":
        """The same, opened once for both, under other settings."""

    @abstractmethod
    def identity(self) -> dict[str, object]:
        """Everything that an answer depends on besides the prompt."""

    @property
    def folder(self) -> Path:
        """The folder of the answers, named by `identity`."""
        label = self.weights if self.step is None else f"snapshot-{self.step:06d}"
        return self.run.evaluation(f"{label}-{storage.fingerprint(self.identity())}")

    @abstractmethod
    def answers(self, asked: Sequence["PromptSet"], folder: Path) -> Answers:
        """The completions of every set, kept in `folder`; only what is missing is asked."""

    @abstractmethod
    def masses(self, asked: Sequence["PromptSet"], folder: Path) -> tuple[Masses, Masses | None]:
        """Refusal masses of first answer tokens, and the most they can be where they are bounds."""


class Change:
    """Something that changes how weights answer: an edit of activations, a bias, a way to decode.

    One that the settings do not ask for changes nothing: `recorded` is then empty.
    """

    def check(self, settings: EvalConfig, run: Run) -> None:
        """Raises a UserError for what can be known wrong before a model is loaded."""

    def recorded(self, settings: EvalConfig) -> dict[str, Any]:
        """The entries of `metrics.json`'s settings that tell these answers from plain ones."""
        return {}

    def identity(self, subject: Any) -> dict[str, object]:
        """Everything that answers depend on because of it, for their fingerprint."""
        return self.recorded(subject.settings)

    def prepared(self, subject: Any) -> dict[str, Any]:
        """Blocks of `metrics.json`, measured before the changed subject is asked anything."""
        return {}

    def around(self, subject: Any, policy: "Policy") -> contextlib.AbstractContextManager[Any]:
        """A context that is open around the weights as long as they are."""
        return contextlib.nullcontext()

    def decoding(self, settings: EvalConfig) -> "Decoding | None":
        """A way to decode in place of plain greedy decoding."""
        return None

    def chat(self, subject: Any, chat: "ChatFormat") -> "ChatFormat":
        """Another format of prompts in place of the plain one."""
        return chat

    def before(self, subject: Any, asked: Sequence["PromptSet"], folder: Path) -> None:
        """Makes what answers to these sets begin behind, kept in `folder`."""

    def answering(self, subject: Any, asked: Sequence["PromptSet"], folder: Path, ask: Ask) -> Ask:
        """Another way to answer rows of these sets, whose answers `folder` keeps, than `ask`."""
        return ask

    def masses(self, subject: Any, asked: Sequence["PromptSet"], folder: Path) -> "Masses | None":
        """Refusal masses in place of those of the weights."""
        return None

    def measured(self, subject: Any, answers: Answers, folder: Path) -> dict[str, Any]:
        """Blocks of `metrics.json`, of what `folder` holds beside the answers."""
        return {}

    def noted(self, subject: Any, folder: Path) -> dict[str, Any]:
        """Blocks of `metrics.json` that it has left in `folder`, read whenever that is written."""
        return {}

    def prompts(self, settings: EvalConfig) -> "list[PromptSet] | None":
        """Sets that are asked in place of those of `data.evaluation`."""
        return None

    def made_from(self, settings: EvalConfig, sets: Sequence["PromptSet"]) -> dict[str, int]:
        """The number of prompts of each set that it was made from."""
        return {}


class MetricsFile:
    """`metrics.json` of a subject; this one holds what one command measures, and checks nothing.

    `origin` has the entries that say where its numbers come from.
    """

    def __init__(self, subject: Subject, folder: Path, origin: Mapping[str, Any]) -> None:
        self.subject, self.folder, self.origin = subject, folder, origin
        self.file = folder / "metrics.json"

    def kept(self) -> dict[str, Any]:
        """The blocks of earlier commands that hold here."""
        return {}

    def joined(self, counted: dict[str, Any]) -> dict[str, Any]:
        """The counts of this command, with those of sets that only an earlier one has asked."""
        return counted

    def merged(self, blocks: Mapping[str, Any]) -> dict[str, Any]:
        """The content of the file: these blocks, and those that are kept."""
        return {**self.origin, **blocks}

    def write(self, metrics: Mapping[str, Any]) -> str:
        """Writes the file, and gives a warning of numbers that say little, or nothing."""
        storage.write_json(self.file, metrics)
        return ""


@dataclass(frozen=True)
class Work:
    """One subject to measure, and its answers."""

    settings: EvalConfig
    run: Run
    subject: Any  # with weights that are here: `subjects.Local`
    folder: Path
    asked: Sequence["PromptSet"]
    answers: Answers
    before: Mapping[str, Any]  # what `metrics.json` holds of an earlier command

    def policy(self) -> "Policy":
        """The weights, under all changes, opened when they are first needed.

        Raises ConfigError for an endpoint, which gives none.
        """
        if self.settings.endpoint is not None:
            raise ConfigError(
                f"endpoint={self.settings.endpoint}: a task needs the model itself; leave it out, "
                "or name the model with model="
            )
        return self.subject.policy()

    def chat(self) -> "ChatFormat":
        """The chat format that the prompts are put in."""
        return self.subject.plain_chat()


class Task(ABC):
    """A measurement of a subject, which becomes a block of `metrics.json` under the task's name."""

    widens: ClassVar[bool] = False  # it leaves the weights in fp32: measured behind the others
    closed: ClassVar[bool] = False  # it reads answers alone, once the weights are closed

    def check(self, settings: EvalConfig, run: Run) -> None:  # noqa: B027
        """Raises a UserError for what can be known wrong before a model is loaded."""

    def prompts(self, settings: EvalConfig) -> "list[PromptSet]":
        """Sets whose answers it needs beside those of over-refusal and safety."""
        return []

    @abstractmethod
    def measure(self, work: Work) -> Any:
        """The block, of plain JSON."""


@dataclass(frozen=True)
class Judged:
    """The counts of judges' verdicts by set and judge, and further blocks of `metrics.json`."""

    counts: Mapping[str, Mapping[str, Mapping[str, Any]]]
    blocks: Mapping[str, Any]


class Judge(ABC):
    """The base of a judge of a user's own.

    `labels` are all that it can say. Those of `judges.verdicts.COMPLIANCE` or `SAFETY` are
    counted and compared as other judges' are, any others by their own names.
    """

    labels: ClassVar[tuple[str, ...]]
    kinds: ClassVar[tuple[Kind, ...]] = tuple(Kind)  # of prompts whose answers it judges

    def check(self, settings: EvalConfig) -> None:  # noqa: B027
        """Raises a UserError for what can be known wrong before a model is loaded."""

    @abstractmethod
    def judge(self, answers: "Sequence[Completion]") -> "Iterable[str | None]":
        """A label for each answer, in their order; None where there is none."""


class Judges(ABC):
    """The judges beside keywords."""

    @abstractmethod
    def check(self, names: Sequence[str], settings: EvalConfig) -> None:
        """Raises a UserError for what can be known wrong before a model is loaded."""

    @abstractmethod
    def judged(
        self,
        names: Sequence[str],
        settings: EvalConfig,
        sets: Sequence["PromptSet"],
        answers: Answers,
        rules: Rules,
        folder: Path,
    ) -> Judged:
        """The word of each judge on the answers to the sets that it judges.

        The blocks tell as well how far all agree, the keyword `rules` among them.
        """


def changes(settings: EvalConfig) -> Iterator[Change]:
    """The changes that the settings ask for, in the table's order."""
    for change in settings.table.changes:
        if change.asked(settings):
            yield extending.ours(change.path)()


def tasks(settings: EvalConfig) -> dict[str, Task]:
    """The tasks that the settings ask for besides over-refusal and safety, in their order."""
    paths = settings.table.tasks
    found: dict[str, Task] = {
        name: extending.ours(paths[name])() for name in paths if name in settings.tasks
    }
    for path in filter(is_path, settings.tasks):
        found[class_of(path)] = extending.made(path, Task, "tasks")
    return dict(sorted(found.items(), key=lambda entry: (entry[1].closed, entry[1].widens)))
