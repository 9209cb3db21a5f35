"""SFT by TRL's SFTTrainer and by ours on the same rows: tokens a CPU second, and memory.

    python benchmarks/sft.py [model=smollm2_135m] [data=demo] [root=] [steps=2] [micro=1,2,4]
                             [micro_tokens=] [threads=1]

TRL, at a pinned version and with this environment's torch, transformers and PEFT, is installed
into an environment of its own, `$DCR_CACHE/trl-<version>` (`~/.cache/dcr` where that is unset); one
line says so where it cannot be. Each side runs in processes of its own, in turn; both through
their own trainer (TRL's, and ours through Lightning), in bf16, with the same LoRA, optimiser and
rate. TRL runs at each micro-batch, its rows sorted by length within a step, so that little is
padded. The step that warms up does not count. Only the ratios of one run of this script mean
anything.
"""

import importlib
import json
import os
import resource
import site
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
import training

from dcr import builtin, extensions
from dcr.core.config import Stage
from dcr.core.config.training import TrainConfig
from dcr.core.data.rows import pair_batch
from dcr.core.training import callbacks
from dcr.core.training.stages import SFTModule

VERSION = "1.16.0"
OPTIONS = {
    "model": "smollm2_135m",
    "data": "demo",
    "root": "",
    "steps": "2",
    "micro": "1,2,4",
    "micro_tokens": "",
    "threads": "1",
    "variant": "",
}


class Timed:
    """CPU seconds of the steps behind the first."""

    def __init__(self) -> None:
        self.seconds, self.steps, self.began = 0.0, 0, 0.0
        self.losses: list[float] = []

    def begin(self) -> None:
        self.began = time.process_time()

    def end(self) -> None:
        self.seconds += (time.process_time() - self.began) * (self.steps > 0)
        self.steps += 1


def theirs(cfg: TrainConfig, steps: int, micro: int) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import TrainerCallback

    trl: Any = importlib.import_module("trl")

    timed = Timed()

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            timed.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            timed.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            timed.losses += [logs["loss"]] if "loss" in logs else []

    with training.opened(cfg, Stage.sft) as (policy, data):
        chosen, made = training.row_lists(data, steps), []
        for indices in chosen:
            for row in sorted((data.pairs[i] for i in indices), key=lambda row: len(row.ids)):
                learnt = [0, *(int(target != -100) for target in row.targets[:-1])]
                made.append({"input_ids": row.ids, "completion_mask": learnt})
        arguments = trl.SFTConfig(
            output_dir=str(builtin.cache_folder() / "trl-runs"),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=cfg.sft.batch_size // micro,
            max_steps=steps + 1,
            learning_rate=cfg.sft.lr,
            lr_scheduler_type="constant",
            weight_decay=cfg.sft.weight_decay,
            max_grad_norm=0.0,
            bf16=True,
            use_cpu=True,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            completion_only_loss=True,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        trainer = trl.SFTTrainer(
            model=policy.model,
            args=arguments,
            train_dataset=Dataset.from_list(made),
            processing_class=policy.tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
        tokens = sum(len(data.pairs[i].ids) for indices in chosen[1:] for i in indices)
    return found(timed, tokens)


def ours(cfg: TrainConfig, steps: int) -> dict[str, Any]:
    from lightning import Callback, Trainer
    from torch.utils.data import DataLoader

    timed = Timed()

    class Clock(Callback):
        def on_train_batch_start(self, *_: Any, **__: Any) -> None:
            timed.begin()

        def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
            timed.end()
            timed.losses.append(float(trainer.callback_metrics["sft/step_nll"]))

    cfg.sft.schedule = type(cfg.sft.schedule).constant
    cfg.sft.warmup = 0.0
    with training.opened(cfg, Stage.sft) as (policy, data), callbacks.quiet():
        chosen = training.row_lists(data, steps)
        made = [
            [pair_batch(group, data.pad) for group in data.sft_step([data.pairs[i] for i in step])]
            for step in chosen
        ]
        trainer = Trainer(
            accelerator="cpu",
            precision="bf16-mixed",
            max_steps=steps + 1,
            callbacks=[Clock()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(SFTModule(policy, cfg.sft, steps + 1), DataLoader(made, batch_size=None))  # pyright: ignore
        tokens = sum(len(data.pairs[i].ids) for indices in chosen[1:] for i in indices)
    return found(timed, tokens)


def found(timed: Timed, tokens: int) -> dict[str, Any]:
    return {
        "rate": tokens / timed.seconds,
        "tokens": tokens,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "losses": timed.losses,
    }


def folder_of_trl() -> Path:
    return builtin.cache_folder() / f"trl-{VERSION}"


def is_installed() -> bool:
    return (folder_of_trl() / "whole").exists()


def environment() -> str:
    """The interpreter of TRL's own environment, made where it is not there yet."""
    folder = folder_of_trl()
    python = folder / "bin" / "python"
    if not is_installed():
        print(f"installing trl {VERSION} into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        own = subprocess.run(
            [python, "-c", "import site; print(site.getsitepackages()[0])"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        repository = Path(__file__).resolve().parent.parent
        shared = [*site.getsitepackages(), str(repository)]
        (Path(own) / "ours.pth").write_text("\n".join(shared) + "\n")
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", f"trl=={VERSION}"]
        subprocess.run(install, check=True)
        (folder / "whole").touch()
    return str(python)


def main() -> None:
    extensions.hand_in_passes()
    options = OPTIONS | dict(argument.split("=", 1) for argument in sys.argv[1:])
    if options["variant"]:
        torch.set_num_threads(int(options["threads"]))
        asked = [f"data={options['data']}"]
        asked += [f"data.root={options['root']}"] if options["root"] else []
        asked += [f"sft.micro_tokens={options['micro_tokens']}"] if options["micro_tokens"] else []
        cfg, steps = training.settings(options["model"], *asked), int(options["steps"])
        side, _, micro = options["variant"].partition(":")
        made = theirs(cfg, steps, int(micro)) if side == "trl" else ours(cfg, steps)
        print(json.dumps(made))
        return
    try:
        python = environment()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"skipped: trl {VERSION} cannot be installed ({error})")
        return
    rows: dict[str, dict[str, Any]] = {}
    variants = [("dcr", "ours", sys.executable)]
    for micro in options["micro"].split(","):
        variants.append((f"TRL, micro-batch {micro}", f"trl:{micro}", python))
    for name, variant, interpreter in variants:
        command = [interpreter, __file__, *sys.argv[1:], f"variant={variant}"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        rows[name] = json.loads(done.stdout.splitlines()[-1])
    table = Table("SFT", "tokens a CPU second", "peak GiB", "loss of each step")
    for name, row in rows.items():
        losses = ", ".join(f"{loss:.3f}" for loss in row["losses"])
        table.add_row(name, f"{row['rate']:.0f}", f"{row['peak']:.2f}", losses)
    print(OmegaConf.to_yaml(options).strip())
    Console(width=110).print(table)
    own = rows.pop("dcr")
    best = max(rows.values(), key=lambda row: row["rate"])
    print(
        f"ratio sft, dcr: tokens a CPU second of TRL at its best: {own['rate'] / best['rate']:.3f}"
    )
    print(f"ratio sft, memory of TRL at its best: {best['peak'] / own['peak']:.3f}")


if __name__ == "__main__":
    main()
