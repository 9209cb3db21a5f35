"""Evaluate: a run folder or a model -> completions, verdicts, metrics.

python eval.py run=outputs/<folder> tasks=[over_refusal,safety]
python eval.py model=smollm2_135m data=paper data.root=<data> limit=100
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import MISSING, DictConfig, OmegaConf

from dcr import benchmarks, cli, config, models, prompts, runs
from dcr.config import ConfigError, EvalConfig, ModelConfig
from dcr.models import Policy
from dcr.runs import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """Weights to evaluate: which they are, where they lie, and the SFT step of a snapshot."""

    weights: str
    folder: Path | None
    step: int | None = None


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
@cli.job
def main(composed: DictConfig) -> None:
    run = _run_of(composed)
    evaluate(config.resolve(_completed(composed, run), EvalConfig), run)


def _run_of(composed: DictConfig) -> Run:
    """The folder to evaluate: the user's run, or one for a model without a run."""
    if composed.run is not None:
        if not OmegaConf.is_missing(composed.model, "name"):
            raise ConfigError(
                f"run={composed.run} model={composed.model.name}: a run brings its own model; "
                "give one of the two"
            )
        run = Run(Path(str(composed.run)))
        run.config()  # names a folder without a run before anything else does
        return run
    if OmegaConf.is_missing(composed.model, "name"):
        raise ConfigError("nothing to evaluate: give run=<folder> or model=<name>")
    return Run(Path(str(composed.output)))


def _completed(composed: DictConfig, run: Run) -> DictConfig:
    """The user's settings, with model and data of the run where they are not named."""
    merged = OmegaConf.create(OmegaConf.to_container(composed, resolve=False))
    assert isinstance(merged, DictConfig)
    made_with: dict[str, Any] = run.config() if composed.run is not None else {}
    if made_with:
        merged.model = made_with["model"]
    if OmegaConf.is_missing(composed.data, "label"):
        base = made_with.get("data") or OmegaConf.load(_demo_data())
        merged.data = OmegaConf.merge(base, _named(composed.data))
    return merged


def _demo_data() -> Path:
    return Path(__file__).parent / "conf" / "data" / "demo.yaml"


def _named(node: DictConfig) -> dict[str, Any]:
    """What a user set in a node that no file filled: everything unlike the schema's default."""
    default = OmegaConf.to_container(OmegaConf.structured(config.DataConfig), resolve=False)
    given = OmegaConf.to_container(node, resolve=False)
    assert isinstance(default, dict)
    assert isinstance(given, dict)
    return {
        str(key): value
        for key, value in given.items()
        if value != default.get(key) and value != MISSING
    }


def evaluate(settings: EvalConfig, run: Run) -> None:
    """Generate what is missing for every chosen set, judge it, and write `metrics.json`."""
    subjects = _subjects(settings, run)
    sets = benchmarks.read(settings.tasks, settings.data, settings.limit, settings.seed)
    if settings.trainer.threads:
        torch.set_num_threads(settings.trainer.threads)
    with runs.locked(run):
        if settings.run is None:
            base = {"method": "base", "seed": settings.seed, "preset_name": "-"}
            whole = base | {"model": cli.plain(settings.model), "data": cli.plain(settings.data)}
            runs.claim(run, whole, force=True)
        for subject in subjects:
            _evaluate_one(settings, run, subject, sets)


def _subjects(settings: EvalConfig, run: Run) -> list[Subject]:
    if settings.run is None:
        return [Subject("base", None)]
    if settings.snapshots:
        found = sorted(run.snapshots.glob("step-*"))
        if not found:
            raise ConfigError(
                f"run={run.folder}: holds no snapshots; train with tracking.snapshots=<number>"
            )
        return [Subject("snapshot", f, int(f.name.removeprefix("step-"))) for f in found]
    for stage in ("sft", "contrastive"):
        if run.done(stage):
            return [Subject(stage, run.stage(stage))]
    raise ConfigError(f"run={run.folder}: no stage is done there; train it first")


def _open(settings: EvalConfig, subject: Subject) -> Policy:
    if subject.folder is None:
        return models.open_policy(settings.model, settings.precision, settings.seed)
    if (subject.folder / "adapter_config.json").is_file():
        return models.open_adapter(
            subject.folder, settings.precision, trust_remote_code=settings.model.trust_remote_code
        )
    return models.open_folder(
        str(subject.folder),
        settings.precision,
        trust_remote_code=settings.model.trust_remote_code,
    )


def _evaluate_one(
    settings: EvalConfig, run: Run, subject: Subject, sets: list[benchmarks.Benchmark]
) -> None:
    label = subject.weights if subject.step is None else f"snapshot-{subject.step:06d}"
    folder = run.evaluation(f"{label}-{_decoding_fingerprint(settings, subject)}")
    began = time.perf_counter()
    policy = _open(settings, subject)
    _to_device(policy, settings.trainer.accelerator)
    chat = prompts.chat_format(policy.tokenizer, settings.model)
    completions = benchmarks.complete(
        sets, policy, chat, settings.gen, folder, progress=settings.trainer.progress
    )
    record, made_with = run.record(), run.config()
    metrics = benchmarks.score(
        sets,
        completions,
        record.get("in_distribution", []),
        record.get("unseen_groups", []),
        settings.seed,
    )
    origin = {
        "weights": subject.weights,
        "step": subject.step,
        "method": made_with["method"],
        "model": made_with["model"]["label"],
        "preset": made_with["preset_name"],
        "seed": made_with["seed"],
        "data": settings.data.label,
        "settings": {
            "max_new_tokens": settings.gen.max_new_tokens,
            "limit": settings.limit,
            "seed": settings.seed,
            "precision": settings.precision.value,
        },
        "seconds": round(time.perf_counter() - began, 1),
        "peak_memory_gib": round(runs.peak_memory_gib(), 2),
    }
    runs.write_json(folder / "metrics.json", origin | metrics)
    print(f"{subject.weights}: {folder}")


def _decoding_fingerprint(settings: EvalConfig, subject: Subject) -> str:
    """Names everything a completion depends on besides its prompt."""
    weights = models.weights_fingerprint(subject.folder) if subject.folder else None
    model: ModelConfig = settings.model
    return runs.fingerprint(
        {
            "weights": weights or [model.name, model.revision],
            "chat": [model.system_prompt, model.template],
            "max_new_tokens": settings.gen.max_new_tokens,
            "precision": settings.precision.value,
        }
    )


def _to_device(policy: Policy, accelerator: str) -> None:
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        policy.model.to("cuda")


if __name__ == "__main__":
    cli.run(main)
