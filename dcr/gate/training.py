"""The training of a gate, from its pairs to its folder."""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

from torch import Generator, Tensor
from torch.nn import functional as F

from dcr import frames
from dcr.calibration import CalibrationConfig
from dcr.core import config, data, machine, models, prompts, runs, sources, statistics, storage
from dcr.core.config import ConfigError, Kind, LoraConfig, Precision, Quantization, Stage
from dcr.core.config.training import NLLConfig, Pooling, Sampler, Schedule, TrainConfig
from dcr.core.data import Splits
from dcr.core.data.rows import SEEMINGLY_TOXIC, TOXIC, PromptBatch, permutation
from dcr.core.models import folders, structure
from dcr.core.models.structure import DTYPES
from dcr.core.prompts import ChatFormat
from dcr.core.runs import Run
from dcr.core.storage import Lease
from dcr.core.training import SafetyData, callbacks, lightning_trainer, resuming
from dcr.core.training.resuming import ResumableModule, adamw, rate_factor
from dcr.frames import in_frames
from dcr.gate import Recipe
from dcr.gating import RECORD, REFUSAL, classifier
from dcr.gating.classifier import Gate
from dcr.public import SOURCES

log = logging.getLogger(__name__)

NAME = "gate"  # as a stage is named in logs
LORA = LoraConfig(rank=16, alpha=32, dropout=0.0, targets=[config.ALL_LINEAR])
WEIGHT_DECAY, WARMUP, CLIP = 0.01, 10, 1.0
CHUNK = 16  # batches that are sorted by length together
MADE_WITH = "made_with.json"  # beside the checkpoints of a gate that is not finished


def train(settings: TrainConfig, recipe: Recipe, out: Path) -> dict[str, Any]:
    """Trains a gate into `out`, or finds it there; returns what its `gate.json` holds.

    Raises ConfigError for a folder that holds anything else, a gate of other settings too, for
    settings that a gate cannot be trained with, and as `classifier.new_classifier` does.
    """
    _check(settings)
    asked = {"sft": settings.sft.precision}
    arithmetic = machine.settled(asked, settings.trainer.accelerator)
    precision = arithmetic.precisions["sft"]
    tokenizer = models.open_tokenizer(settings.model)
    chat = prompts.chat_format(tokenizer, settings.model)
    rows = pairs(settings)
    batches = _batches(settings, recipe, rows, chat)
    made_with = _made_with(settings, recipe, precision, rows, chat)
    if (known := _finished(out, made_with)) is not None:
        log.info("%s: done in %s, skipped", NAME, out)
        return known
    arithmetic.say()
    machine.use_threads(settings.trainer.threads)
    run = Run(out.with_name(f"{out.name}.unfinished"))
    with callbacks.quiet(), storage.locked(run.folder) as lease:
        _begin(run, made_with)
        counts = {name: len(part) for name, part in rows.parts().items() if part}
        log.info("rows: %s", ", ".join(f"{count} {name}" for name, count in counts.items()))
        for line in rows.told():
            log.info(line)
        model = classifier.new_classifier(settings.model, precision, settings.seed)
        classifier.set_padding(model, tokenizer, chat)
        model = structure.add_lora(model, LORA, settings.seed, task_type="SEQ_CLS")
        module = GateModule(model, recipe, batches.steps_per_epoch * recipe.epochs)
        _fit(settings, run, module, batches, recipe.epochs, precision, lease)
        model = module.model.float().merge_and_unload().eval()
        model.to(DTYPES[machine.evaluated_in(precision)])
        machine.to_gpu(model, settings.trainer.accelerator)
        prompts.keep_template(chat)
        record = {"made_with": made_with, "threshold": 0.5, "refusal": REFUSAL}
        record["heldout_auroc"] = _measured(Gate(model, chat), rows, settings.seed)
        with storage.replaced_folder(out) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            shutil.copyfile(run.metrics_file, staging / run.metrics_file.name)
            storage.write_json(staging / RECORD, record)
            storage.write_checksums(staging)
        _clear(run)
    return record


# --- rows -----------------------------------------------------------------------------------------


def pairs(settings: TrainConfig) -> Splits:
    """The readout's pairs as rows of stage one, with the prompts of calibration as held-out ones.

    Raises ConfigError for a source that calibration chooses thresholds on.
    """
    readout, calibrating = settings.sft.readout, CalibrationConfig()
    for kind in ("toxic", "seemingly_toxic"):
        if both := {*getattr(readout, kind)} & {*getattr(calibrating, kind)}:
            raise ConfigError(
                f"sft.readout.{kind}=[{min(both)}]: calibrate= chooses a gate's threshold on it; "
                "name prompts of another origin"
            )
    cleaning = data.Cleaning(settings.data, settings.seed, settings.at_most)
    whole = replace(readout, heldout=0.0)
    found = data.with_readout(Splits(), whole, settings.seed, cleaning)
    heldout = {
        kind: [row for name in getattr(calibrating, kind.value) for row in sources.read(name)]
        for kind in (Kind.toxic, Kind.seemingly_toxic)
    }
    asked = [row for part in heldout.values() for row in part]
    return Splits(
        seemingly_toxic=data.without(found.readout_seemingly_toxic, asked),
        toxic=data.without(found.readout_toxic, asked),
        seemingly_toxic_heldout=heldout[Kind.seemingly_toxic],
        toxic_heldout=heldout[Kind.toxic],
        dropped=dict(cleaning.dropped),
    )


def _check(settings: TrainConfig) -> None:
    trainer = settings.trainer
    for key, value in (("plan", settings.plan), ("run", settings.run)):
        if value:
            raise ConfigError(f"{key}={value}: a gate has none; leave it out, and name out=")
    if trainer.devices * trainer.num_nodes > 1:
        raise ConfigError(f"trainer.devices={trainer.devices}: a gate trains on one device")
    if settings.model.quantization is not Quantization.none:
        raise ConfigError(
            f"model.quantization={settings.model.quantization.value}: a gate is trained on weights "
            "in full; leave it out"
        )


def _batches(settings: TrainConfig, recipe: Recipe, rows: Splits, chat: ChatFormat) -> SafetyData:
    """Batches as those of stage one, every pair once an epoch. Raises UserError as they do."""
    for part in rows.parts().values():
        chat.check(part)
    kinds = (rows.seemingly_toxic, rows.toxic)
    counts, copies = [len(kind) for kind in kinds], recipe.epochs if recipe.framed else 0
    harmless, toxic = (
        [*kind, *(row for copy in range(copies) for row in in_frames(kind, settings.seed + copy))]
        for kind in kinds
    )
    node = replace(
        settings.dcr,
        batch_size=recipe.batch_size,
        draws=sum(counts),
        sampler=Sampler.proportional,
        pooling=Pooling.last,
        nll=NLLConfig(weight=0.0),
    )
    context = models.facts(settings.model).context
    worded = replace(rows, seemingly_toxic=harmless, toxic=toxic)
    batches = SafetyData(Stage.contrastive, worded, chat, replace(settings, dcr=node), context)
    lengths = [len(row.ids) for row in batches.rows.prompts]
    sampler: Any = batches.sampler

    def order(drawing: Generator) -> list[int]:
        places = wordings(counts, copies, recipe.framed, drawing)
        return alike(places, lengths, recipe.batch_size, drawing)

    sampler.order = order
    return batches


def wordings(counts: Sequence[int], copies: int, share: float, drawing: Generator) -> list[int]:
    """The place of each pair in one of its wordings, a drawn share of each kind in a frame.

    Each kind has so many rows in its own words, followed by as many in each of the copies.
    """
    found, first = list[int](), 0
    for count in counts:
        for rank, row in enumerate(permutation(count, drawing)):
            copy = 1 + rank % copies if rank < round(share * count) else 0
            found.append(first + copy * count + row)
        first += (1 + copies) * count
    return found


def alike(
    places: Sequence[int], lengths: Sequence[int], size: int, drawing: Generator
) -> list[int]:
    """The places in a drawn order of batches, the rows of a batch of about one length.

    They are sorted within drawn chunks, which saves most of the padding.
    """
    drawn, chunk = [places[n] for n in permutation(len(places), drawing)], CHUNK * size
    rows = [
        row
        for start in range(0, len(drawn), chunk)
        for row in sorted(drawn[start : start + chunk], key=lengths.__getitem__)
    ]
    order = permutation(len(rows) // size, drawing)
    whole = [row for place in order for row in rows[place * size : (place + 1) * size]]
    return whole + rows[len(whole) :]


# --- the folder -----------------------------------------------------------------------------------


def _made_with(
    settings: TrainConfig, recipe: Recipe, precision: Precision, rows: Splits, chat: ChatFormat
) -> dict[str, Any]:
    """Everything that decides the weights, without the machine's paths."""
    source = Path(models.source_of(settings.model))
    local = source.is_dir()
    return {
        "model": source.name if local else settings.model.name,
        "weights": folders.weights_fingerprint(source) if local else settings.model.revision,
        "chat": storage.fingerprint([chat.template, chat.system_prompt]),
        **asdict(recipe),
        "frames": storage.fingerprint([frame.text for frame in frames.training()]),
        "lora": config.plain(LORA),
        "precision": precision.value,
        "seed": settings.seed,
        "pairs": {
            name: {
                "sources": sorted({_called(row.source) for row in part}),
                "count": len(part),
                "fingerprint": sources.fingerprint(part),
            }
            for name, part in rows.parts().items()
            if part
        },
    }


def _called(source: str) -> str:
    """A source's name; of a user's file without the folders of this machine."""
    return source if source in SOURCES else Path(source).name


def _finished(out: Path, made_with: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the gate in `out`; None if nothing is there. ConfigError for anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    known: dict[str, Any] = dict(classifier.record_of(out)) if (out / RECORD).is_file() else {}
    changed = storage.differences(known.get("made_with", {}), made_with)
    if not known or changed:
        other = f"a gate of other settings ({'; '.join(changed[:4])})" if known else "no gate"
        raise ConfigError(f"out={out}: holds {other}; name a new folder")
    storage.check_checksums(out)
    return known


def _begin(run: Run, made_with: dict[str, Any]) -> None:
    """Leaves in the folder only what training with these settings has begun there."""
    file = run.folder / MADE_WITH
    if not file.is_file() or storage.read_json(file, dict[str, Any]) != made_with:
        _clear(run)
        storage.write_json(file, made_with)


def _clear(run: Run) -> None:
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    for file in (run.metrics_file, run.folder / MADE_WITH):
        file.unlink(missing_ok=True)


# --- training -------------------------------------------------------------------------------------


class GateModule(ResumableModule):
    """Trains an adapted classifier by binary cross entropy; held-out rows give an AUROC."""

    def __init__(self, model: Any, recipe: Recipe, total_steps: int) -> None:
        super().__init__()
        self.model, self.recipe, self.total_steps = model, recipe, total_steps
        for weight in model.parameters():
            if weight.requires_grad:  # the head is in the base's type
                weight.data = weight.data.float()
        self.heldout: dict[int, list[float]] = {TOXIC: [], SEEMINGLY_TOXIC: []}

    def training_step(self, batch: PromptBatch, _: int) -> Tensor:
        scores = classifier.logits(self.model, batch.ids, batch.mask)
        loss = F.binary_cross_entropy_with_logits(scores, batch.labels.float())
        self.log("gate/step_loss", loss)
        return self.checked(loss, batch.names)

    def validation_step(self, batch: PromptBatch, _: int) -> None:
        scores = classifier.logits(self.model, batch.ids, batch.mask).tolist()
        for score, label in zip(scores, batch.labels.tolist(), strict=True):
            self.heldout[label].append(score)

    def on_validation_epoch_end(self) -> None:
        auroc = statistics.auroc(self.heldout[TOXIC], self.heldout[SEEMINGLY_TOXIC])
        self.log("gate/auroc/heldout", auroc)
        self.heldout = {TOXIC: [], SEEMINGLY_TOXIC: []}

    def configure_optimizers(self) -> Any:
        factor = rate_factor(Schedule.linear, self.total_steps, WARMUP)
        return adamw(self, self.recipe.lr, WEIGHT_DECAY, factor)


def _fit(
    settings: TrainConfig,
    run: Run,
    module: GateModule,
    batches: SafetyData,
    epochs: int,
    precision: Precision,
    lease: Lease,
) -> None:
    """Trains to the end, from the newest checkpoint on."""
    options, folder = settings.trainer, run.checkpoints(NAME)
    checkpoint = resuming.newest_checkpoint(folder)
    runs.forget_metrics_beyond(run, NAME, resuming.step_of(checkpoint))
    bar = callbacks.Progress(NAME, module.total_steps, "gate/step_loss")
    trainer = lightning_trainer(
        settings,
        run,
        NAME,
        module,
        precision,
        max_epochs=epochs,
        callbacks=[
            *([bar] if options.progress else []),
            resuming.StepSeed(settings.seed),
            callbacks.FolderGuard(lease),
            resuming.Checkpoints(folder, options.checkpoint_every_n_steps),
        ],
        gradient_clip_val=CLIP,
    )
    with resuming.faults_explained("lower batch_size, or name a smaller model"):
        trainer.fit(module, datamodule=batches, ckpt_path=checkpoint, weights_only=True)
    lease.check()


def _measured(gate: Gate, rows: Splits, seed: int) -> list[float]:
    """The AUROC on the prompts held out, with its interval."""
    sides = (rows.toxic_heldout, rows.seemingly_toxic_heldout)
    toxic, others = (gate.scores([row.prompt for row in side]) for side in sides)
    return list(astuple(statistics.auroc_interval(toxic, others, seed=seed)))
