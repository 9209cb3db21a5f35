"""Evaluates what composed settings name: completions, verdicts, metrics."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from dcr.core import config, extending, machine, runs, storage
from dcr.core.config import ConfigError, DataError, Method, ModelConfig, Precision, resolving
from dcr.core.config.evaluation import EvalConfig
from dcr.core.runs import Run
from dcr.core.text import label_of

Settings = TypeVar("Settings", bound=EvalConfig)


def resolved(composed: DictConfig, schema: type[Settings]) -> tuple[Settings, Run]:
    """The settings of an evaluation and the folder it is for, as `eval.py` composes them.

    `schema` holds the core's settings, the extensions' and their table. Raises ConfigError where it
    is not clear what is to be evaluated.
    """
    run = _run_of(composed)
    own = resolving.own_paths(composed)  # before those of the run join them
    made_with = run.config() if composed.run is not None else {}
    return resolving.resolve(completed(composed, made_with), schema, own), run


def settle_precision(
    settings: Settings, recorded: Mapping[str, Precision] | None = None
) -> tuple[Settings, machine.Settled]:
    """The settings with the precision that `auto` means for a model here and for guards."""
    accelerator = settings.trainer.accelerator
    found = machine.settled({"evaluation": settings.precision}, accelerator, recorded)
    others = {
        name: replace(node, precision=own.precisions["evaluation"])
        for name, node in vars(settings).items()
        if hasattr(node, "precision")
        for own in [machine.settled({"evaluation": node.precision}, accelerator)]
    }
    if settings.endpoint is None:
        settings = replace(settings, precision=found.precisions["evaluation"])
    return replace(settings, **others), found


def _run_of(composed: DictConfig) -> Run:
    """The folder to evaluate: the user's run, or one for a model or endpoint without a run."""
    if composed.endpoint is not None:
        _refuse_two_subjects(composed)
        if composed.endpoint_model is None:
            raise ConfigError(
                f"endpoint={composed.endpoint}: say which model there, with endpoint_model=<name>"
            )
    if composed.run is not None:
        if not OmegaConf.is_missing(composed.model, "name"):
            raise ConfigError(
                f"run={composed.run} model={composed.model.name}: a run brings its own model; "
                "give one of the two"
            )
        own = OmegaConf.structured(ModelConfig(trust_remote_code=composed.model.trust_remote_code))
        for key in own:
            if composed.model._get_node(key) != own._get_node(key):
                raise ConfigError(
                    f"run={composed.run} model.{key}={composed.model[key]}: a run brings its own; "
                    "leave it out"
                )
        run = Run(Path(str(composed.run)))
        run.config()  # what is not there or damaged is named before a model opens
        run.record()
        return run
    if composed.endpoint is None and OmegaConf.is_missing(composed.model, "name"):
        raise ConfigError("nothing to evaluate: give run=<folder>, model=<name> or endpoint=<url>")
    return Run(Path(str(composed.output)))


def _refuse_two_subjects(composed: DictConfig) -> None:
    for key, named in (
        ("run", composed.run),
        ("model", None if OmegaConf.is_missing(composed.model, "name") else composed.model.name),
    ):
        if named is not None:
            raise ConfigError(
                f"endpoint={composed.endpoint} {key}={named}: two things to evaluate; give one"
            )


def completed(composed: DictConfig, made_with: Mapping[str, Any]) -> DictConfig:
    """The user's settings, with model and data of the run that was `made_with` its settings where
    they are not named.
    """
    merged = OmegaConf.create(OmegaConf.to_container(composed, resolve=False))
    assert isinstance(merged, DictConfig)
    if made_with:
        trusted = composed.model.trust_remote_code or made_with["model"].get("trust_remote_code")
        merged.model = config.literal({**made_with["model"], "trust_remote_code": bool(trusted)})
    if composed.endpoint is not None and composed.endpoint_model is not None:
        named = str(composed.endpoint_model)
        merged.model.name, merged.model.label = named, ""
    if not merged.model.label:
        merged.model.label = label_of(str(merged.model.name))
    if OmegaConf.is_missing(composed.data, "label"):
        own = config.literal(made_with.get("data"))
        base = own or OmegaConf.load(config.CONF / "data" / "demo.yaml")
        merged.data = OmegaConf.merge(base, resolving.named(composed.data))
    return merged


def evaluate(settings: EvalConfig, run: Run) -> None:
    """Answer what is unanswered, judge what is unjudged, count, and write `metrics.json`."""
    # not at the top: what is asked is checked before torch is loaded
    from dcr.core.evaluation import metrics, subjects

    settings, arithmetic = settle_precision(settings, run.precisions() if settings.run else {})
    if settings.endpoint is None:
        arithmetic.say()
    found = subjects.subjects(settings, run)
    metrics.check(settings, run)
    asked = metrics.read(settings)
    place = run.folder / "eval"
    if place.exists() and not place.is_dir():
        raise DataError(f"{place}: a file or a device, not a folder; move it away")
    machine.use_threads(settings.trainer.threads)
    with storage.locked(run.folder), _claimed(settings, run), ExitStack() as stack:
        showing = extending.ours(settings.table.showing)
        show = stack.enter_context(showing(settings, run)) if showing else None
        for subject in found:
            measured, answers = metrics.measure(settings, run, subject, asked)
            if show:
                show(measured, answers)


@contextmanager
def _claimed(settings: EvalConfig, run: Run) -> Iterator[None]:
    """The folder with a `config.yaml` of what is evaluated; a run's own stays as it is.

    Where a command ends before it has kept anything, the folder is as it was before.
    """
    before = run.config_file.read_bytes() if run.config_file.is_file() else None
    kept = _kept(run)
    try:
        if settings.run is None:
            if run.config_file.exists() and run.config()["method"] in Method.__members__:
                raise ConfigError(
                    f"output={run.folder}: is the folder of a trained run; evaluate it with run=, "
                    "or name another"
                )
            method = "endpoint" if settings.endpoint else "base"
            made: dict[str, Any] = {"method": method, "seed": settings.seed, "preset_name": "-"}
            if settings.endpoint is None:
                made["precision"] = settings.precision.value
            made |= {"model": config.plain(settings.model), "data": config.plain(settings.data)}
            runs.write_config(run, made)
        yield
    except BaseException:
        if settings.run is None and _kept(run) == kept:
            if before is None:
                run.config_file.unlink(missing_ok=True)
            else:
                storage.write_bytes(run.config_file, before)
        raise


def _kept(run: Run) -> set[Path]:
    """Answers, verdicts and vectors: what a later command need not make again."""
    return {file for name in ("eval", "steering") for file in (run.folder / name).rglob("*.*")}
