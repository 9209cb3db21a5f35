"""What `tracking.quantities=[refusal_probability,kernel]` adds to the time of SFT.

    python benchmarks/tracking.py [model=smollm2_135m] [root=<data>] [steps=2] [epochs=3]
                                  [batch=128] [prompts=25] [kernel=5] [threads=2]

In one process: steps of SFT as training takes them (the first is not counted), and one measurement
of each quantity at the default settings, on the weights as they then are. Both are carried to the
paper's schedule, 21,000 rows in batches of 128 over `epochs`, by the number of its steps and of the
steps that are measured. With `root=`, rows and prompts are the paper's; else the embedded corpus's,
whose rows are shorter, so that steps are cheaper than the paper's and the share is an upper bound.
Only the ratios of one run of this script mean anything.
"""

import math
import sys
import tempfile
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from dcr import cli, extensions, resolving
from dcr.core import data, models, prompts
from dcr.core.config import Stage
from dcr.core.config.training import TrainConfig
from dcr.core.data.rows import StageRows, micro_batches, pair_batch
from dcr.core.models import Policy, structure
from dcr.core.prompts import IGNORED, ChatFormat
from dcr.core.training.stages import SFTModule
from dcr.extensions import TrainSettings
from dcr.tracking import Quantity
from dcr.tracking import curves as tracking
from dcr.tracking.curves import MEASURES

CONF = Path(__file__).resolve().parent.parent / "conf"
PAPER_ROWS = 21_000
OPTIONS = {
    "model": "smollm2_135m",
    "root": "",
    "steps": "2",
    "epochs": "3",
    "batch": "128",
    "prompts": "25",
    "kernel": "5",
    "threads": "2",
}


def settings_of(options: dict[str, str]) -> TrainConfig:
    cli.prepare()
    rows = ["data=demo"]
    if options["root"]:
        rows = ["data=paper", f"data.root={options['root']}", "data.toxic.source=stl_safety"]
    overrides = [
        f"model={options['model']}",
        "method=stl",
        *rows,
        f"sft.batch_size={options['batch']}",
        "tracking.quantities=[refusal_probability,kernel]",
        f"tracking.refusal_prob.prompts={options['prompts']}",
        f"tracking.entk.prompts={options['kernel']}",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolving.resolve(compose("train", ["precision=bf16", *overrides]), TrainSettings)


def step_seconds(
    settings: TrainConfig, policy: Policy, chat: ChatFormat, steps: int
) -> tuple[float, float]:
    """Mean seconds and tokens of an optimiser step of SFT."""
    rows = data.rows_of(settings)
    batches = StageRows(Stage.sft, rows, chat, settings)
    module = SFTModule(policy, settings.sft, total_steps=steps)
    moved = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moved, lr=settings.sft.lr)
    policy.model.train()
    seconds, tokens = 0.0, 0
    for index in range(steps + 1):
        began = time.perf_counter()
        chosen = list(batches.sampler)[index % len(batches.sampler)]
        batch = [batches.pairs[i] for i in chosen]
        micros = [
            pair_batch(group, batches.pad)
            for group in micro_batches(batch, settings.sft.micro_tokens)
        ]
        learnt = sum(int((micro.targets != IGNORED).sum()) for micro in micros)
        for micro in micros:
            with torch.autocast("cpu", torch.bfloat16):
                total, _ = module.nll(micro)
            (total / learnt).backward()
        optimizer.step()
        optimizer.zero_grad()
        if index:
            seconds += time.perf_counter() - began
            tokens += sum(len(row.ids) for row in batch)
    return seconds / steps, tokens / steps


def measuring_seconds(
    settings: TrainConfig, policy: Policy, chat: ChatFormat
) -> dict[Quantity, float]:
    """Seconds of one measurement of each quantity, under autocast as while training."""
    tracked = tracking.tracked(settings)
    assert tracked is not None
    found = {}
    with tempfile.TemporaryDirectory() as folder, torch.autocast("cpu", torch.bfloat16):
        for quantity, rows in tracked.rows.items():
            measure, _ = MEASURES[quantity]
            began = time.perf_counter()
            measure(policy, chat, rows, tracked, Path(folder))
            found[quantity] = time.perf_counter() - began
    return found


def main() -> None:
    extensions.hand_in_passes()
    options = OPTIONS | dict(argument.split("=", 1) for argument in sys.argv[1:])
    torch.set_num_threads(int(options["threads"]))
    settings = settings_of(options)
    policy = models.open_policy(settings.model, settings.sft.precision)
    chat = prompts.chat_format(policy.tokenizer, settings.model)
    adapted = structure.add_lora(policy.model, settings.sft.lora, settings.seed)
    policy = Policy(adapted, policy.tokenizer, policy.name)
    step, tokens = step_seconds(settings, policy, chat, int(options["steps"]))
    measured = measuring_seconds(settings, policy, chat)
    total = int(options["epochs"]) * math.ceil(PAPER_ROWS / int(options["batch"]))
    times = len(tracking.tracked_steps(total))
    print(OmegaConf.to_yaml(options).strip())
    table = Table("", "seconds", "times", "hours", "share of SFT")
    table.add_row(
        f"step of {options['batch']} rows, {tokens:.0f} tokens",
        f"{step:.1f}",
        str(total),
        f"{step * total / 3600:.2f}",
        "1.000",
    )
    for quantity, seconds in measured.items():
        share = seconds * times / (step * total)
        row = f"{seconds:.1f}", str(times), f"{seconds * times / 3600:.2f}", f"{share:.3f}"
        table.add_row(quantity.value, *row)
    console = Console(width=100)
    console.print(table)
    print(f"tracking adds {sum(measured.values()) * times / (step * total):.1%} to the time of SFT")


if __name__ == "__main__":
    main()
