"""Settings of a run that takes a second and its data, and the real data where they are."""

import json
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning import Callback, Trainer
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from dcr import cli, resolving, train
from dcr.core import data, runs
from dcr.core.config import DataConfig, Method
from dcr.core.config.training import ContrastiveConfig, ReadoutConfig, SFTConfig, TrainConfig
from dcr.core.data import Splits
from dcr.core.runs import Run
from dcr.core.training import SafetyData
from dcr.core.training.resuming import StepSeed
from dcr.extensions import TrainSettings

CONF = Path(__file__).parent.parent / "conf"
REFUSAL = "I'm sorry, but I can't help with that."
TEXT = """amber birch copper dune ember fjord glacier harbour indigo jasper kelp lagoon meadow
nectar onyx prairie quartz ripple saffron tundra umber velvet willow xenon yarrow zephyr"""
WORDS = TEXT.split()  # hardly a letter in common
DATA = os.environ.get("DCR_DATA", "")
real = pytest.mark.skipif(not os.path.isdir(DATA), reason="DCR_DATA names no folder of real rows")


def write_jsonl(file: Path, rows: Iterable[object]) -> str:
    """The path of the file that now holds these rows, in a folder made for it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def write_rows(folder: Path) -> dict[str, Path]:
    """Four JSONL files: prompts of either kind for stage one, general and safety pairs for SFT."""
    nouns = ["lamp", "rope", "boat", "stone", "candle", "garden", "river", "window", "ladder"]
    many = [(i, noun) for i, noun in enumerate(nouns * 4)]
    rows = {
        "seemingly_toxic": [
            {"prompt": f"How do I {verb} a {noun} process?"}
            for noun in nouns
            for verb in ("kill", "blow up")
        ],
        "toxic": [{"prompt": f"How do I kill the {noun} man now, part {i}?"} for i, noun in many],
        "safety": [
            {"prompt": f"Help me to steal {i} {noun}s", "response": f"{REFUSAL} ({noun})"}
            for i, noun in many[:12]
        ],
        "normal": [
            {"prompt": f"Name {i} facts on a {noun}.", "response": f"A {noun} " * (1 + i % 5)}
            for i, noun in many
        ],
    }
    return {name: Path(write_jsonl(folder / f"{name}.jsonl", rows[name])) for name in rows}


def overrides(folder: Path, *more: str) -> list[str]:
    """Two epochs of five steps in stage one, two of four (with several micro-batches) in SFT."""
    files = write_rows(folder)
    return [
        "model=tiny",
        "precision=fp32",  # the same numbers on every processor
        *(f"data.{name}.source={file}" for name, file in files.items()),
        "data.safety.refusals_only=false",
        "data.evaluation={over_refusal: [], safety: []}",
        "data.seemingly_toxic.count=12",
        "data.safety.count=8",
        "data.normal.count=20",
        "data.validation=0.2",
        "data.drop_contaminated=false",
        "dcr.batch_size=8",
        "dcr.epochs=2",
        "dcr.optim.lr=1e-3",
        "sft.epochs=2",
        "sft.batch_size=8",
        "sft.micro_tokens=400",
        "trainer.progress=false",
        "trainer.accelerator=cpu",
        "trainer.checkpoint_every_n_steps=2",
        "wandb.mode=disabled",
        *more,
    ]


def composed(script: str, *overrides: str, hydra: bool = False) -> DictConfig:
    """Composes a command line as Hydra does."""
    cli.prepare()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        made = compose(script, list(overrides), return_hydra_config=hydra)
    cli.leave_numbers_of_another_model(made)
    return made


def settings(folder: Path, *more: str) -> TrainConfig:
    """The overrides composed and resolved as `train.py` would."""
    return resolving.resolve(composed("train", *overrides(folder, *more)), TrainSettings)


def drawn(
    config: DataConfig,
    ratio: float | None = None,
    seed: int = 0,
    dcr: bool = False,
    readout: ReadoutConfig | None = None,
    at_most: Iterable[str] = (),
) -> Splits:
    """The rows of a run on this data, of both stages with `dcr`, else of SFT alone."""
    made = TrainConfig(
        method=Method.dcr if dcr else Method.stl,
        data=config,
        seed=seed,
        at_most=list(at_most),
        dcr=ContrastiveConfig(ratio=ratio),
        sft=SFTConfig(readout=readout or ReadoutConfig()),
    )
    return data.rows_of(made)


def trained(folder: Path, *more: str) -> tuple[Run, TrainConfig]:
    """A run of both stages that is evaluated on its own rows, and the settings it was made with."""
    rows = folder / "rows"
    made = settings(rows, f"data.evaluation.over_refusal=[{rows}/seemingly_toxic.jsonl]", *more)
    run = Run(folder / "dcr")
    train.train(made, run)
    return run, made


def changed(settings: TrainConfig, *dotted: str) -> TrainConfig:
    """Resolved settings with `key=value` laid over them: quicker than composing anew."""
    merged = OmegaConf.merge(OmegaConf.structured(settings), OmegaConf.from_dotlist(list(dotted)))
    made = OmegaConf.to_object(merged)
    assert isinstance(made, TrainConfig)
    return made


def weights(run: Path) -> dict[str, Tensor]:
    """Every tensor of every result in a run folder."""
    stages = ("contrastive", "sft", "readout")
    files = [file for stage in stages for file in sorted(run.glob(f"{stage}/*.safetensors"))]
    return {f"{f.parent.name}/{k}": v for f in files for k, v in load_file(f).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are bit-identical."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def logged(run: Path) -> list[tuple[str, int, str, float]]:
    """The rows of a run's metrics.csv in an order of their own."""
    rows = runs.read_metrics(Run(run))
    return sorted((row["stage"], row["step"], row["key"], row["value"]) for row in rows)


class Stop(Exception):
    """A test raises it to end a run."""


def stop(*_: Any) -> None:
    raise Stop


def failing(error: BaseException) -> Callable[..., Any]:
    """A function that raises this error however it is called."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def at_each_step(patch: pytest.MonkeyPatch, deed: Callable[[Trainer, Any, Any], object]) -> None:
    """Have something done with trainer, module and batch before every step of either stage."""
    before = StepSeed.on_train_batch_start

    def hook(self: StepSeed, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
        deed(trainer, module, batch)
        before(self, trainer, module, batch, index)

    patch.setattr(StepSeed, "on_train_batch_start", hook)


def gradients_of_one_step(module: Any, batch: Any) -> dict[str, Tensor]:
    """The gradients that `fit` on one batch gives to the optimiser's first step."""
    taken: dict[str, Tensor] = {}

    class Take(Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            named = module.model.named_parameters()
            taken.update({n: p.grad.clone() for n, p in named if p.grad is not None})

    fit(module, [batch], callbacks=[Take()])
    return taken


def fit(module: Any, batches: Any, epochs: int = 1, **options: Any) -> Trainer:
    """Train a module alone, without a run folder: on a DataModule or a list of batches."""
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(batches, SafetyData):
            trainer.fit(module, datamodule=batches)
        else:
            trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return trainer
