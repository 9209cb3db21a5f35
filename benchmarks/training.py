"""Time and memory of both stages against a plain transformers training loop on the same rows.

    python benchmarks/training.py [model=smollm2_135m] [steps=6] [threads=2]

Every variant runs in a process of its own (so that peak memory is its own), one after another, on
the embedded corpus: the same rows in the same steps, the same precision, the same optimiser. The
plain loops are what one writes by hand: micro-batches of four rows as they come, padded to their
longest, `model(..., labels=labels).loss`; for stage one, one full forward with
`output_hidden_states=True`. CPU seconds of the steps are summed without the first step, whose loss,
of the same weights, must be the plain loop's. Only the ratios of one run of this script mean
anything.
"""

import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from dcr import cli, extensions, resolving
from dcr.core import config, data, learning, losses, models, prompts
from dcr.core.config import Stage
from dcr.core.config.training import TrainConfig, block_of
from dcr.core.data.rows import StageRows, micro_batches, pair_batch, prompt_batch
from dcr.core.models import Policy, structure
from dcr.core.models.training import freeze_beyond, head_arguments
from dcr.core.training.resuming import adamw
from dcr.core.training.stages import ContrastiveModule, SFTModule
from dcr.extensions import TrainSettings
from dcr.fast import frozen

CONF = Path(__file__).resolve().parent.parent / "conf"
MICRO_ROWS = 4  # the paper's micro-batch
NEAR = 1e-3  # relative, of the first loss, ours against the plain loop's, both in bf16
DECAY = 0.01
VARIANTS = {
    "sft, plain loop": "plain_sft",
    "sft, dcr": "ours_sft",
    "stage one with NLL, plain loop": "plain_contrastive",
    "stage one with NLL, dcr": "ours_contrastive",
    "stage one without NLL, plain loop": "plain_circle_alone",
    "stage one without NLL, dcr": "ours_circle_alone",
}


def settings(model: str, *overrides: str) -> TrainConfig:
    cli.prepare()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        named = [f"model={model}", "dcr.precision=mixed", "sft.precision=bf16", *overrides]
        return resolving.resolve(compose("train", named), TrainSettings)


@contextmanager
def opened(cfg: TrainConfig, stage: Stage) -> Iterator[tuple[Policy, StageRows]]:
    """A fresh policy in training mode and the rows of a stage."""
    precision = (cfg.dcr if stage is Stage.contrastive else cfg.sft).precision
    policy = models.open_policy(cfg.model, precision)
    chat = prompts.chat_format(policy.tokenizer, cfg.model)
    if stage is Stage.sft:
        adapted = structure.add_lora(policy.model, cfg.sft.lora, cfg.seed)
        policy = Policy(adapted, policy.tokenizer, policy.name)
    rows = data.rows_of(cfg)
    policy.model.train()
    yield policy, StageRows(stage, rows, chat, cfg)


def plain_sft(cfg: TrainConfig, steps: int) -> dict[str, float]:
    with opened(cfg, Stage.sft) as (policy, rows):
        model, chosen = policy.model, row_lists(rows, steps)
        optimizer = _adamw(model, cfg.sft.lr)

        def step(index: int) -> tuple[int, float]:
            batch, summed, labelled = [rows.pairs[i] for i in chosen[index]], 0.0, 0
            groups = [batch[i : i + MICRO_ROWS] for i in range(0, len(batch), MICRO_ROWS)]
            for group in groups:
                micro = pair_batch(group, rows.pad)
                # transformers shifts labels itself: position t holds the label of token t
                labels = torch.full_like(micro.targets, prompts.IGNORED)
                labels[:, 1:] = micro.targets[:, :-1]
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(micro.ids, attention_mask=micro.mask, labels=labels).loss
                (loss / len(groups)).backward()
                count = int((labels != prompts.IGNORED).sum())
                summed, labelled = summed + count * loss.item(), labelled + count
            optimizer.step()
            optimizer.zero_grad()
            return sum(len(row.ids) for row in batch), summed / labelled

        return _timed(step, steps)


def ours_sft(cfg: TrainConfig, steps: int) -> dict[str, float]:
    with opened(cfg, Stage.sft) as (policy, rows):
        chosen = row_lists(rows, steps)
        module = SFTModule(policy, cfg.sft, total_steps=steps)
        optimizer = adamw(policy.model, cfg.sft.lr, DECAY, lambda _: 1.0)["optimizer"]

        def step(index: int) -> tuple[int, float]:
            batch, loss = [rows.pairs[i] for i in chosen[index]], 0.0
            groups = micro_batches(batch, cfg.sft.micro_tokens)
            micros = [pair_batch(group, rows.pad) for group in groups]
            tokens = sum(int((micro.targets != prompts.IGNORED).sum()) for micro in micros)
            for micro in micros:
                with torch.autocast("cpu", torch.bfloat16):
                    total, _ = module.nll(micro)
                (total / tokens).backward()
                loss += total.item() / tokens
            optimizer.step()
            optimizer.zero_grad()
            return sum(len(row.ids) for row in batch), loss

        return _timed(step, steps)


def plain_contrastive(cfg: TrainConfig, steps: int) -> dict[str, float]:
    with opened(cfg, Stage.contrastive) as (policy, rows):
        model, chosen = policy.model, row_lists(rows, steps)
        block = block_of(cfg.dcr, models.facts(cfg.model).depth)
        freeze_beyond(model, block, cfg.dcr.train_embeddings)
        optimizer = _adamw(model, cfg.dcr.optim.lr)

        def step(index: int) -> tuple[int, float]:
            batch = prompt_batch([rows.prompts[i] for i in chosen[index]], rows.pad)
            anchored = cfg.dcr.nll.weight > 0
            labels = torch.where(batch.mask, batch.ids, prompts.IGNORED) if anchored else None
            with torch.autocast("cpu", torch.bfloat16):
                output: Any = model(
                    batch.ids,
                    attention_mask=batch.mask,
                    labels=labels,
                    output_hidden_states=True,
                )
            last = batch.mask.sum(1) - 1
            features = output.hidden_states[block][torch.arange(len(last)), last]
            circle = losses.circle_loss(features, batch.labels, cfg.dcr.margin, cfg.dcr.scale)
            loss = circle + cfg.dcr.nll.weight * output.loss if anchored else circle
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return int(batch.mask.sum()), loss.item()

        return _timed(step, steps)


def ours_contrastive(cfg: TrainConfig, steps: int) -> dict[str, float]:
    with opened(cfg, Stage.contrastive) as (policy, rows):
        chosen = row_lists(rows, steps)
        block = block_of(cfg.dcr, models.facts(cfg.model).depth)
        module = ContrastiveModule(policy, cfg.dcr, block, total_steps=steps)
        learning.current().shrink_frozen(policy.model, block, whole=cfg.dcr.nll.weight > 0)
        optimizer = adamw(policy.model, cfg.dcr.optim.lr, DECAY, lambda _: 1.0)["optimizer"]

        def step(index: int) -> tuple[int, float]:
            batch = prompt_batch([rows.prompts[i] for i in chosen[index]], rows.pad)
            with torch.autocast("cpu", torch.bfloat16):
                features, nll = module.features_and_nll(batch)
                circle, _ = module.circle(features, batch.labels)
            loss = circle + cfg.dcr.nll.weight * nll
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return int(batch.mask.sum()), loss.item()

        return _timed(step, steps)


def plain_circle_alone(cfg: TrainConfig, steps: int) -> dict[str, float]:
    cfg.dcr.nll.weight = 0.0
    return plain_contrastive(cfg, steps)


def ours_circle_alone(cfg: TrainConfig, steps: int) -> dict[str, float]:
    cfg.dcr.nll.weight = 0.0
    return ours_contrastive(cfg, steps)


def head_values() -> None:
    """The head's NLL equals transformers' own on one batch, or the comparison means nothing."""
    policy = models.open_policy(settings("tiny").model, config.Precision.fp32)
    ids = torch.randint(4, 250, (2, 12))
    hidden = structure.backbone(policy.model)(input_ids=ids).last_hidden_state
    labelled = {"hidden": hidden[:, :-1].flatten(0, 1), "targets": ids[:, 1:].flatten()}
    total, _ = frozen.token_nll(**labelled, **head_arguments(policy.model))
    torch.testing.assert_close(total / 22, policy.model(ids, labels=ids).loss)


def row_lists(rows: StageRows, steps: int) -> list[list[int]]:
    found: list[list[int]] = []
    for epoch in range(steps):
        rows.sampler.set_epoch(epoch)
        found += list(rows.sampler)
    return found[: steps + 1]


def _adamw(model: Any, lr: float) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=DECAY)


def _timed(step: Callable[[int], tuple[int, float]], steps: int) -> dict[str, float]:
    _, loss = step(0)
    began, tokens = time.process_time(), 0
    for index in range(1, steps + 1):
        tokens += step(index)[0]
    seconds = time.process_time() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    speed = tokens / seconds
    return {"loss": loss, "seconds": seconds, "tokens_per_second": speed, "peak_gib": memory}


def main() -> None:
    extensions.hand_in_passes()
    options = {"model": "smollm2_135m", "steps": "6", "threads": "2", "variant": ""}
    options |= dict(argument.split("=", 1) for argument in sys.argv[1:])
    if options["variant"]:
        torch.set_num_threads(int(options["threads"]))
        measured = globals()[options["variant"]](settings(options["model"]), int(options["steps"]))
        print(json.dumps(measured))
        return
    head_values()
    table = Table(
        "variant",
        "first loss",
        "CPU seconds",
        "tokens/s",
        "peak GiB",
        "time against the plain loop",
    )
    plain, ratios = {"seconds": 1.0, "peak_gib": 1.0}, {}
    for name, variant in VARIANTS.items():
        command = [sys.executable, __file__, *sys.argv[1:], f"variant={variant}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        got = json.loads(done.stdout.splitlines()[-1])
        plain = got if variant.startswith("plain") else plain
        if not variant.startswith("plain"):
            assert math.isclose(got["loss"], plain["loss"], rel_tol=NEAR), (name, got, plain)
            ratios[f"{name}: time of the plain loop"] = plain["seconds"] / got["seconds"]
            ratios[f"{name}: memory of the plain loop"] = plain["peak_gib"] / got["peak_gib"]
        table.add_row(
            name,
            f"{got['loss']:.4f}",
            f"{got['seconds']:.1f}",
            f"{got['tokens_per_second']:.0f}",
            f"{got['peak_gib']:.2f}",
            f"{got['seconds'] / plain['seconds']:.2f}",
        )
    print(OmegaConf.to_yaml(options).strip())
    Console(width=100).print(table)
    for name, ratio in ratios.items():
        print(f"ratio {name}: {ratio:.3f}")


if __name__ == "__main__":
    main()
