"""What is evaluated, and its answers: the weights of a run, a model by name, or an endpoint.

What is stored is kept, what is missing is asked for, and the weights are opened for that alone.
"""

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from typing_extensions import TypedDict

from dcr import steering
from dcr.core import activations, batching, data, generation, models, prompts, refusal, storage
from dcr.core.config import (
    AUTO_LENGTH,
    EMBEDDED_MODEL,
    TINY_MODEL,
    ConfigError,
    DataError,
    EvalConfig,
    ModelConfig,
    ServerConfig,
    Stage,
    UserError,
)
from dcr.core.evaluation.sets import PromptSet
from dcr.core.generation import Completion, OpeningBias
from dcr.core.models import Policy
from dcr.core.progress import Bar
from dcr.core.prompts import ChatFormat
from dcr.core.runs import Run
from dcr.core.sources import Example

log = logging.getLogger(__name__)

Answers = dict[str, list[Completion]]
DECODING = "decoding.json"  # beside the answers


class Made(TypedDict):
    """All that answers of one folder were made with: threads, and the largest batch of each time.

    Neither is in the folder's name.
    """

    threads: list[int]
    batch_size: list[int]


@dataclass(frozen=True)
class Subject:
    """Which weights (base, contrastive, sft, snapshot, endpoint), where they lie, at which step.

    `bias` is what calibration adds where their answers begin.
    """

    weights: str
    folder: Path | None = None
    step: int | None = None
    bias: OpeningBias | None = None


def subjects(settings: EvalConfig, run: Run) -> list[Subject]:
    """All that a command evaluates. ConfigError where a run has nothing to evaluate yet."""
    if settings.endpoint is not None:
        return [Subject("endpoint")]
    if settings.run is None:
        return [base(settings.model)]
    if settings.snapshots:
        return _snapshots(settings, run)
    if settings.stage is Stage.all:
        return [final(run)]
    stage = settings.stage.value
    if not run.done(stage):
        raise ConfigError(f"stage={stage}: {run.folder} holds no {stage}/; train that stage first")
    return [Subject(stage, run.stage(stage))]


def base(model: ModelConfig) -> Subject:
    """A model by name, with its folder where the name is one's."""
    local = model.name not in (TINY_MODEL, EMBEDDED_MODEL) and Path(model.name).is_dir()
    return Subject("base", Path(model.name) if local else None)


def _snapshots(settings: EvalConfig, run: Run) -> list[Subject]:
    saved = {int(f.name.removeprefix("step-")): f for f in sorted(run.snapshots.glob("step-*"))}
    if not saved:
        raise ConfigError(
            f"run={run.folder}: holds no snapshots; train with tracking.snapshots=<number>"
        )
    wanted = saved if settings.steps is None else dict.fromkeys(settings.steps)
    if missing := [step for step in wanted if step not in saved]:
        raise ConfigError(
            f"steps={settings.steps}: {run.folder} holds no snapshot of step {missing[0]}; choose "
            f"from {', '.join(map(str, saved))}"
        )
    return [Subject("snapshot", saved[step], step) for step in wanted]


def final(run: Run) -> Subject:
    """The last stage that a run has finished. ConfigError if there is none."""
    for stage in ("sft", "contrastive"):
        if run.done(stage):
            return Subject(stage, run.stage(stage))
    raise ConfigError(f"run={run.folder}: no stage is done there; train it first")


def answers_folder(settings: EvalConfig, run: Run, subject: Subject) -> Path:
    """Where the completions lie: named by all that they depend on besides the prompt."""
    label = subject.weights if subject.step is None else f"snapshot-{subject.step:06d}"
    return run.evaluation(f"{label}-{storage.fingerprint(_identity(settings, subject))}")


def _identity(settings: EvalConfig, subject: Subject) -> dict[str, object]:
    model = settings.model
    if subject.weights == "endpoint":
        server = server_of(settings)
        return {
            "endpoint": [server.url, server.model, server.parameters],
            "system": model.system_prompt,
            "max_new_tokens": settings.gen.max_new_tokens,
        }
    if subject.folder is None:
        weights: object = [model.name, model.revision]
    elif subject.weights == "base":
        weights = _content(subject.folder)
    else:
        weights = models.weights_fingerprint(subject.folder)
    file = Path(model.template) if model.template else None
    template = file.read_text(encoding="utf-8") if file and file.is_file() else model.template
    identity: dict[str, object] = {
        "weights": weights,
        "chat": [model.system_prompt, template],
        "max_new_tokens": settings.gen.max_new_tokens,
        "precision": settings.precision.value,
    }
    if edits := steering.identity(settings.data, settings.steering, settings.seed):
        identity["steering"] = edits
    identity |= settings.gen.contrast
    if settings.gen.prefill is not None:
        identity["prefill"] = settings.gen.prefill
    if subject.bias is not None:
        identity["opening_bias"] = asdict(subject.bias)
    return identity


def _content(folder: Path) -> list[str]:
    """What a folder of a user's own says of its model: weights, settings, tokenizer, template.

    With the base of an adapter, which must be the one it was trained on as a run's must.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".jinja", ".model", ".txt") and file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    content = [models.weights_fingerprint(folder), digest.hexdigest()[:16]]
    if models.is_adapter(folder):
        beneath = Path(models.adapter_base(folder))
        content += _content(beneath) if beneath.is_dir() else [str(beneath)]
    return content


def server_of(settings: EvalConfig) -> ServerConfig:
    """The server that `endpoint=` names, as every other server is described."""
    return ServerConfig(
        url=settings.endpoint,
        model=str(settings.endpoint_model),
        key=settings.endpoint_key,
        parameters=settings.endpoint_parameters,
    )


def opened(settings: EvalConfig, subject: Subject) -> Policy:
    """The weights in memory, on the device they run on."""
    trusted = settings.model.trust_remote_code
    if subject.folder is not None and models.is_adapter(subject.folder):
        policy = models.open_adapter(subject.folder, settings.precision, trust_remote_code=trusted)
    elif subject.folder is None or subject.weights == "base":
        policy = models.open_policy(settings.model, settings.precision)
    else:
        policy = models.open_folder(
            str(subject.folder), settings.precision, trust_remote_code=trusted
        )
    if getattr(policy.model.generation_config, "sequence_bias", None):
        log.warning(
            "%s: its generation config holds a sequence_bias, which a calibrated export decodes "
            "with; here it is set aside, calibrate=<share> chooses one",
            policy.name,
        )
    batching.to_gpu(policy.model, settings.trainer.accelerator)
    return policy


def opener(settings: EvalConfig, run: Run, subject: Subject, stack: ExitStack, folder: Path) -> Any:
    """Opens the weights, under the edits asked for, when they are first needed; then remembers."""

    @functools.cache
    def remembered() -> Policy:
        policy = opened(settings, subject)
        if steering.acts(settings.steering):
            chat = prompts.chat_format(policy.tokenizer, settings.model)
            vectors = run.folder / "steering"
            steered = steering.steer(
                policy, chat, settings.data, settings.steering, settings.seed, folder=vectors
            )
            stack.enter_context(activations.edited(policy.model, steered.edits))
            # at once: another command will find all answers here and open nothing
            storage.write_json(folder / "steering.json", steered.record)
        return policy

    return remembered


def trained_texts(run: Run) -> dict[str, list[str]]:
    """All that a run was trained on, by source; empty, with a warning, where a source has changed.

    Empty as well for what was not trained here.
    """
    try:
        return data.trained_texts(run.config()["data"], run.record())
    except DataError as error:
        log.warning("what was trained on is not known: %s", error)
        return {}


# --- answers --------------------------------------------------------------------------------------


def answers(
    settings: EvalConfig,
    subject: Subject,
    asked: Sequence[PromptSet],
    folder: Path,
    policy: Callable[[], Policy],
    among: "Among | None" = None,
) -> Answers:
    """The subject's completions of every set, kept in `folder`; only what is missing is asked.

    Of this process, or of those `among` which the rows are then shared.
    """
    ask = functools.partial(answer, settings, subject, policy)
    if among is not None:
        cut = functools.partial(cut_answers, settings, subject)
        work = functools.partial(all_answers, settings, subject)
        ask = functools.partial(among.shared, cut, work)
    sizes: set[int] = set()

    def noted(batch: list[Completion]) -> list[Completion]:
        sizes.add(len(batch))
        return batch

    def counted(rows: list[Example]) -> Iterator[list[Completion]]:
        return map(noted, ask(rows))  # which opens the weights now, as `kept` expects

    given = kept(asked, counted, folder, Completion, "generating", settings.trainer.progress)
    if subject.weights == "endpoint":
        put_in_order(asked, folder, Completion)
    elif sizes:
        _note_decoding(folder, settings.trainer.devices, max(sizes))
    return given


def _note_decoding(folder: Path, processes: int, largest: int) -> None:
    """Keep with how many threads, and how many prompts at once, answers in `folder` were made.

    Both change a near tie's last bits, and with them perhaps a text.
    """
    file = folder / DECODING
    before = storage.read_json(file, Made) if file.is_file() else Made(threads=[], batch_size=[])
    threads = {*before["threads"], max(1, torch.get_num_threads() // processes)}
    sizes = {*before["batch_size"], largest}
    storage.write_json(file, Made(threads=sorted(threads), batch_size=sorted(sizes)))


class Among(Protocol):
    """Processes that share rows, `workers.Workers`."""

    def shared(self, cut: Any, work: Any, rows: list[Any]) -> Iterator[Any]: ...

    def each(self, function: Any, givens: Sequence[tuple[Any, ...]]) -> Iterator[Any]: ...


def cut_answers(
    settings: EvalConfig,
    subject: Subject,
    policy: Callable[[], Policy],
    rows: list[Example],
    processes: int,
) -> list[list[Example]]:
    """The batches in which so many processes answer the rows."""
    chat = _chat(settings, policy())
    return generation.cut(policy(), chat, rows, settings.gen, processes)


def all_answers(
    settings: EvalConfig, subject: Subject, policy: Callable[[], Policy], rows: list[Example]
) -> list[Completion]:
    """What `answer` gives, at once."""
    return [each for batch in answer(settings, subject, policy, rows) for each in batch]


def _chat(settings: EvalConfig, policy: Policy) -> ChatFormat:
    chat = prompts.chat_format(policy.tokenizer, settings.model)
    return replace(chat, prefill=settings.gen.prefill or "")


def answer(
    settings: EvalConfig, subject: Subject, policy: Callable[[], Policy], rows: list[Example]
) -> Iterator[list[Completion]]:
    """Completions of the rows; the weights are opened only where there are rows to answer."""
    if subject.weights == "endpoint":
        return generation.complete_remote(
            server_of(settings), settings.http, rows, settings.gen, settings.model.system_prompt
        )
    chat = _chat(settings, policy())
    openings = refusal.refusal_openings(chat)
    return generation.complete(
        policy(),
        chat,
        rows,
        settings.gen,
        score=lambda logits: refusal.refusal_mass(logits, openings),
        bias=subject.bias,
        decided=refusal.is_decided if settings.gen.max_new_tokens == AUTO_LENGTH else None,
    )


class OfPrompt(Protocol):
    """A record of what a model does with one prompt."""

    @property
    def id(self) -> str: ...

    @property
    def prompt(self) -> str: ...


Record = TypeVar("Record", bound=OfPrompt)


def kept(
    prompt_sets: Sequence[PromptSet],
    ask: Callable[[list[Example]], Iterator[list[Record]]],
    folder: Path,
    schema: type[Record],
    doing: str,
    progress: bool,
) -> dict[str, list[Record]]:
    """Every record of each set's file in `folder`; what is missing is asked for and stored.

    The sets are asked together, so that batches stay full and of one length. A row that `ask`
    leaves out (a server that failed) is absent from the result, and asked next time.
    """
    homes: dict[str, list[tuple[str, str]]] = {}  # a prompt may stand in several sets
    rows: dict[str, Example] = {}
    for prompt_set in prompt_sets:
        done = {record.id for record in _of_rows(folder, prompt_set, schema)}
        for row in prompt_set.rows:
            if row.id not in done:
                homes.setdefault(row.prompt, []).append((prompt_set.name, row.id))
                rows.setdefault(row.prompt, row)
    # first what opens the weights and may fail: a bar would stand before the line that says so
    batches = ask(list(rows.values())) if rows else ()
    hidden = not (progress and rows)
    with Bar(total=len(rows), unit="prompt", desc=doing, disable=hidden) as bar:
        for batch in batches:
            by_set: dict[str, list[Any]] = {}
            for record in batch:
                for name, identity in homes[record.prompt]:
                    copied: Any = record
                    by_set.setdefault(name, []).append(replace(copied, id=identity))
            for name, records in by_set.items():
                storage.append_lines(folder / f"{name}.jsonl", records)
            bar.update(len(batch))
    return {b.name: _of_rows(folder, b, schema) for b in prompt_sets}


def put_in_order(asked: Sequence[PromptSet], folder: Path, schema: type[OfPrompt]) -> None:
    """Let the files of `kept` hold their rows in order, whichever server answered first."""
    for prompt_set in asked:
        file = folder / f"{prompt_set.name}.jsonl"
        storage.put_in_order(file, schema, [row.id for row in prompt_set.rows])


def _of_rows(folder: Path, prompt_set: PromptSet, schema: type[Record]) -> list[Record]:
    """The stored records of the set's rows, in their order; none of a prompt that has changed."""
    lines = storage.read_lines(folder / f"{prompt_set.name}.jsonl", schema)
    done = {record.id: record for record in lines}
    return [
        done[row.id]
        for row in prompt_set.rows
        if row.id in done and done[row.id].prompt == row.prompt
    ]


class Unanswered(UserError):
    """Not one prompt brought an answer."""

    exit_code = 1


def check_answered(asked: Sequence[PromptSet], given: Mapping[str, Sequence[OfPrompt]]) -> None:
    """Say which sets lack answers, as where a server failed; Unanswered where all of them do."""
    lacking = {b.name: (len(b.rows) - len(given[b.name]), len(b.rows)) for b in asked}
    missing, total = (sum(counts[i] for counts in lacking.values()) for i in (0, 1))
    if total and missing == total:
        raise Unanswered(
            f"none of {total} prompts was answered, so there is nothing to count; see to the "
            "reason above, and give the same command again"
        )
    for name, (without, of) in lacking.items():
        if without:
            log.warning("%s: %d of %d prompts without an answer", name, without, of)
