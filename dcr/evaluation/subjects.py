"""What is evaluated: the weights of a run, a model by name, or whatever answers at an endpoint."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dcr import data, generation, models, prompts, refusal, steering, storage
from dcr.config import (
    EMBEDDED_MODEL,
    TINY_MODEL,
    ConfigError,
    DataError,
    EvalConfig,
    ModelConfig,
    ServerConfig,
    Stage,
)
from dcr.generation import Completion, OpeningBias
from dcr.models import Policy
from dcr.runs import Run
from dcr.sources import Example
from dcr.steering import Steered

log = logging.getLogger(__name__)


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
    if settings.gen.self_cd is not None:
        identity["self_cd"] = settings.gen.self_cd
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
        policy = models.open_policy(settings.model, settings.precision, settings.seed)
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
    wanted = settings.trainer.accelerator in ("auto", "gpu", "cuda")
    if wanted and torch.cuda.is_available():
        policy.model.to("cuda")
    return policy


def steered(settings: EvalConfig, policy: Policy, folder: Path) -> Steered:
    """The activation edits that `steering=` asks for, from vectors kept in `folder`."""
    chat = prompts.chat_format(policy.tokenizer, settings.model)
    return steering.steer(
        policy, chat, settings.data, settings.steering, settings.seed, folder=folder
    )


def answer(
    settings: EvalConfig, subject: Subject, policy: Callable[[], Policy], rows: list[Example]
) -> Iterator[list[Completion]]:
    """Completions of the rows; the weights are opened only where there are rows to answer."""
    if subject.weights == "endpoint":
        return generation.complete_remote(
            server_of(settings), settings.http, rows, settings.gen, settings.model.system_prompt
        )
    chat = prompts.chat_format(policy().tokenizer, settings.model)
    openings = refusal.refusal_openings(chat.tokenizer)
    return generation.complete(
        policy(),
        chat,
        rows,
        settings.gen,
        score=lambda logits: refusal.refusal_mass(logits, openings),
        bias=subject.bias,
    )


def trained_texts(run: Run) -> dict[str, list[str]]:
    """All that a run was trained on, by source; empty, with a warning, where a source has changed.

    Empty as well for what was not trained here.
    """
    try:
        return data.trained_texts(run.config()["data"], run.record())
    except DataError as error:
        log.warning("what was trained on is not known: %s", error)
        return {}
