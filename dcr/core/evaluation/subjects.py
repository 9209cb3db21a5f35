"""The weights that are evaluated, of a run or of a model by name, and their answers.

Stored answers are kept and missing ones asked for; the weights are opened for those alone.
"""

import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dcr.core import evaluation as sets
from dcr.core import extending, generation, machine, models, prompts, storage
from dcr.core.config import (
    EMBEDDED_MODEL,
    STAGES,
    TINY_MODEL,
    ConfigError,
    ModelConfig,
    Quantization,
    Stage,
)
from dcr.core.config.evaluation import AUTO_LENGTH, EvalConfig
from dcr.core.evaluation import PromptSet, protocols
from dcr.core.evaluation.protocols import Answers, Ask, Change, Masses, Subject
from dcr.core.generation import Completion, Decoding, OpeningBias
from dcr.core.models import Policy, folders
from dcr.core.prompts import ChatFormat
from dcr.core.refusal import opening as refusal
from dcr.core.runs import Run
from dcr.core.sources import Example
from dcr.core.text import turns_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opening:
    """The first answer token of a prompt: `refusal.refusal_mass` and `refusal.refusal_margin`."""

    id: str
    prompt: str
    mass: float
    margin: float


def subjects(settings: EvalConfig, run: Run) -> Sequence[Subject]:
    """Everything that a command evaluates. ConfigError for a run with nothing to evaluate yet."""
    for others in settings.table.subjects:
        if others.asked(settings):
            return extending.ours(others.path)(settings, run)
    if settings.run is None:
        return [base(settings, run)]
    if settings.stage is Stage.all:
        return [final(settings, run)]
    stage = settings.stage.value
    if not run.done(stage):
        raise ConfigError(f"stage={stage}: {run.folder} holds no {stage}/; train that stage first")
    return [local(settings, run, stage, run.stage(stage))]


def base(settings: EvalConfig, run: Run) -> "Local":
    """The model by name, with its folder where the name is one's."""
    name = settings.model.name
    is_folder = name not in (TINY_MODEL, EMBEDDED_MODEL) and Path(name).is_dir()
    return local(settings, run, "base", Path(name) if is_folder else None)


def final(settings: EvalConfig, run: Run) -> "Local":
    """The last stage that a run has finished. ConfigError if there is none."""
    for stage in reversed(STAGES):
        if run.done(stage.value):
            return local(settings, run, stage.value, run.stage(stage.value))
    raise ConfigError(f"run={run.folder}: no stage is done there; train it first")


def local(settings: EvalConfig, run: Run, *of: Any) -> "Local":
    """Weights that this process opens, or several that share the prompts."""
    several = settings.trainer.devices > 1
    return (extending.ours(settings.table.sharing) if several else Local)(settings, run, *of)


# --- weights that are here ------------------------------------------------------------------------


class Local(Subject):
    """Weights in memory, opened when they are first needed, under the changes asked for.

    Calibration adds `bias` at the beginning of answers.
    """

    bias: OpeningBias | None = None

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._open: dict[str, Policy] = {}
        self.thoughts: dict[str, list[int]] = {}  # tokens before the answer, by prompt
        self._contexts = ExitStack()

    def check_prompts(self, asked: Sequence[PromptSet]) -> None:
        """Checks the chat template, which for a run training did, and that it takes all turns.

        Raises ConfigError for a template that fails, and DataError for a conversation that it
        refuses.
        """
        rows = [row for part in asked for row in part.rows]
        if any(self.weights == "base" or len(turns_of(row.prompt)) > 1 for row in rows):
            self.closed_chat().check(rows)

    def closed_chat(self) -> ChatFormat:
        """The chat format by the tokenizer alone, before weights are opened."""
        model, folder = self.settings.model, self.result
        if folder is None:
            tokenizer = models.open_tokenizer(model)
        else:
            tokenizer = models.result_tokenizer(folder, model.trust_remote_code)
        return prompts.chat_format(tokenizer, model)

    @property
    def result(self) -> Path | None:
        """The folder of a stage's result, or of an adapter by name; None for a model by name."""
        source = self.source
        named = source is None or (self.weights == "base" and not folders.is_adapter(source))
        return None if named else source

    def under(self, settings: EvalConfig) -> "Local":
        """The same weights, opened once for both, under other settings."""
        other = type(self).__new__(type(self))
        vars(other).update(vars(self), settings=settings)
        return other

    def __exit__(self, *fault: Any) -> None:
        self._open.clear()  # a guard of eight billion parameters may need the room
        self._contexts.close()

    @cached_property
    def _content(self) -> object:
        """The fingerprint of these weights."""
        if self.source is None:
            return [self.settings.model.name, self.settings.model.revision]
        if self.weights == "base":
            return _content(self.source)
        return storage.weights_fingerprint(self.source)

    def identity(self) -> dict[str, object]:
        model, settings = self.settings.model, self.settings
        template = extending.part("written_template")(model.template) or model.template
        identity: dict[str, object] = {
            "weights": self._content,
            "chat": [model.system_prompt, template, *_further(model)],
            "max_new_tokens": settings.gen.max_new_tokens,
            "precision": settings.precision.value,
        }
        if model.quantization is not Quantization.none:
            identity["quantization"] = model.quantization.value
        for change in protocols.changes(settings):
            identity |= change.identity(self)
        if self.bias is not None:
            identity["opening_bias"] = asdict(self.bias)
        return identity

    def policy(self) -> Policy:
        """The weights under the changes asked for; remembered until the subject is closed."""
        if not self._open:
            policy = opened(self)
            for change in protocols.changes(self.settings):
                self._contexts.enter_context(change.around(self, policy))
            self._open["policy"] = policy
        return self._open["policy"]

    def plain_chat(self) -> ChatFormat:
        """The chat format of prompts, without words that answers begin with."""
        chat = prompts.chat_format(self.policy().tokenizer, self.settings.model)
        for change in protocols.changes(self.settings):
            chat = change.chat(self, chat)
        return chat

    def begin(self, asked: Sequence[PromptSet], folder: Path) -> None:
        """Makes what comes between these prompts and their answers, where a change asks for it."""
        for change in protocols.changes(self.settings):
            change.before(self, asked, folder)

    def chat(self) -> ChatFormat:
        """The same with the words of `gen.prefill`, which answers begin with."""
        return replace(self.plain_chat(), prefill=self.settings.gen.prefill or "")

    def decoding(self) -> Decoding | None:
        """Another way to decode than plainly, where a change brings one."""
        brought = (change.decoding(self.settings) for change in protocols.changes(self.settings))
        return next(filter(None, brought), None)

    def answers(self, asked: Sequence[PromptSet], folder: Path) -> Answers:
        self.begin(asked, folder)
        ask: Ask = extending.part("recorded")(self, folder)
        for change in protocols.changes(self.settings):
            ask = change.answering(self, asked, folder, ask)
        progress = self.settings.trainer.progress
        return sets.kept(asked, ask, folder, Completion, "generating", progress)

    def answer(self, rows: list[Example]) -> Iterator[list[Completion]]:
        """Completions of the rows, as they end."""
        settings, chat = self.settings.gen, self.chat()
        openings = refusal.refusal_openings(chat)
        decided = functools.partial(refusal.is_decided, language=chat.language.value)
        return generation.complete(
            self.policy(),
            chat,
            rows,
            settings,
            score=lambda logits: refusal.refusal_mass(logits, openings),
            bias=self.bias,
            decoding=self.decoding(),
            decided=decided if settings.max_new_tokens == AUTO_LENGTH else None,
        )

    def masses(self, asked: Sequence[PromptSet], folder: Path) -> tuple[Masses, None]:
        """The masses by one forward pass a prompt, kept in `folder`, or those of a change."""
        for change in protocols.changes(self.settings):
            if (masses := change.masses(self, asked, folder)) is not None:
                return masses, None
        self.begin(asked, folder)
        place, progress = folder / "openings", self.settings.trainer.progress
        read = sets.kept(asked, self.openings, place, Opening, "reading", progress)
        return {name: {row.id: row.mass for row in rows} for name, rows in read.items()}, None

    def openings(self, rows: list[Example]) -> Iterator[list[Opening]]:
        """The first answer token of each row."""
        return read_openings(self.policy(), self.plain_chat(), rows)


def opened(subject: Local) -> Policy:
    """The weights in memory as they are, on the device they run on."""
    settings, folder = subject.settings, subject.result
    if folder is None:
        policy = models.open_policy(settings.model, settings.precision)
    else:
        trusted, held = settings.model.trust_remote_code, settings.model.quantization
        policy = folders.open_result(folder, settings.precision, trusted, held)
    if getattr(policy.model.generation_config, "sequence_bias", None):
        log.warning(
            "%s: its generation config holds a sequence_bias, which a calibrated export decodes "
            "with; here it is set aside, calibrate=<share> chooses one",
            policy.name,
        )
    machine.to_gpu(policy.model, settings.trainer.accelerator)
    return policy


def read_openings(
    policy: Policy, chat: ChatFormat, rows: Sequence[Example]
) -> Iterator[list[Opening]]:
    """The openings of rows as a model here gives them, in any order.

    Raises DataError for a prompt longer than its context, when it is called rather than with the
    first batch.
    """
    chat.check(rows)
    encoded = [(row, chat.prompt_ids(row.prompt)) for row in rows]
    generation.check_context(policy, encoded, 1)
    tokens = refusal.refusal_openings(chat)

    def read() -> Iterator[list[Opening]]:
        for places, logits in refusal.first_logits(policy.model, [ids for _, ids in encoded]):
            both = refusal.refusal_mass(logits, tokens), refusal.refusal_margin(logits, tokens)
            values = zip(places, *(each.tolist() for each in both), strict=True)
            yield [Opening(rows[i].id, rows[i].prompt, *numbers) for i, *numbers in values]

    return read()


def _further(model: ModelConfig) -> list[object]:
    """Settings that prompts and refusals' openings also depend on; none where all are defaults."""
    kept = [model.template_variables, model.close_thoughts, model.language.value]
    # as in evaluations from before these settings, whose answers are so found again
    return [] if kept == [{}, None, "en"] else kept


class Prefilling(Change):
    """Answers that begin with the words of `gen.prefill`."""

    def recorded(self, settings: EvalConfig) -> dict[str, Any]:
        return {"prefill": settings.gen.prefill}


def _content(folder: Path) -> list[str]:
    """The fingerprints of a user's own folder: weights, settings, tokenizer and template.

    Those of an adapter's base follow, which must be the one that it was trained on.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".jinja", ".model", ".txt") and file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    content = [storage.weights_fingerprint(folder), digest.hexdigest()[:16]]
    if folders.is_adapter(folder):
        beneath = Path(folders.adapter_base(folder))
        content += _content(beneath) if beneath.is_dir() else [str(beneath)]
    return content
