"""DPO by TRL on the prompts that a run's readout learns, from the same SFT, without that readout.

    python benchmarks/dpo.py <run> <out> [--lr 2e-4] [--beta 0.1] [--epochs 1]

To a toxic prompt the model's own answer that opens with a refusal is preferred to its own other
one, to a seemingly toxic prompt the other one to the refusal (both as `calibrate` begins them), so
that no wording is learnt that SFT did not teach. `<out>` becomes a run folder with
`data.label: dpo`, for `eval.py run=<out>`. TRL is no dependency of this project:
`pip install --no-deps trl==1.16.0`.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dcr import extensions
from dcr.calibration import biases
from dcr.core import prompts, sources, storage
from dcr.core.config import ConfigError, Kind, Precision, UserError, resolving
from dcr.core.models import Policy, folders
from dcr.core.prompts import ChatFormat
from dcr.core.runs import Run
from dcr.core.sources import Example

BATCH = 16  # pairs a step, as many as SFT has rows
WARMUP = 8  # steps
LABEL = "dpo"
# parts of a run that are of its readout, of its own training or of evaluations
LEFT = ("eval", "steering", "readout*", "evaluated.json", "checkpoints", "metrics.csv", "*.cost.*")

Preference = dict[str, list[int]]


def learnt(run: Run) -> list[Example]:
    """The prompts that the run's readout learnt, of either kind.

    Raises ConfigError for a run without a readout.
    """
    told, config = run.record().get("rows", {}), run.config()
    named, root = config["sft"]["readout"], config["data"]["root"]
    if f"readout_{Kind.toxic.value}" not in told:
        raise ConfigError(
            f"{run.folder}: has no readout; name a run with sft.readout.steps above 0"
        )
    found: list[Example] = []
    for kind in (Kind.seemingly_toxic, Kind.toxic):
        ids = set(told[f"readout_{kind.value}"]["ids"])
        for source in named[kind.value]:
            rows = sources.read(source, root=root, kind=kind)
            found += [row for row in rows if row.id in ids]
    return found


def preferences(policy: Policy, chat: ChatFormat, rows: Sequence[Example]) -> list[Preference]:
    """The token ids of each prompt, of the answer preferred and of the one rejected."""
    found: list[Preference] = []
    for batch in biases.both_answers(policy, chat, rows, biases.BEGUN):
        for two in batch:
            chosen, rejected = two.refusing, two.answering
            if two.row.kind is not Kind.toxic:
                chosen, rejected = rejected, chosen
            asked = chat.prompt_ids(two.row.prompt)
            found.append({"prompt_ids": asked, "chosen_ids": chosen, "rejected_ids": rejected})
    return found


def train(
    policy: Policy, data: Sequence[Preference], out: Path, seed: int, given: argparse.Namespace
) -> None:
    """Trains the adapter, whose weights so far are the reference."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
            return dataset  # token ids already; TRL would end answers that were cut

    settings = DPOConfig(
        output_dir=str(out),
        learning_rate=given.lr,
        beta=given.beta,
        num_train_epochs=given.epochs,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        seed=seed,
        use_cpu=True,
        bf16=True,
        gradient_checkpointing=False,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    for name, weight in policy.model.named_parameters():
        weight.requires_grad_(".lora_" in name)
    trainer = Trainer(
        policy.model,
        args=settings,
        train_dataset=Dataset.from_list(list(data)),
        processing_class=policy.tokenizer,
    )
    trainer.train()
    policy.model.delete_adapter("ref")  # TRL's copy of the weights before
    policy.model.eval()


def keep(policy: Policy, run: Run, made: Run) -> None:
    """Writes the run of DPO: that of SFT with another adapter, label and no readout."""
    shutil.copytree(
        run.folder, made.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*LEFT)
    )
    folders.save_adapter(policy, made.stage("sft"), folders.adapter_base(run.stage("sft")))
    config = run.config()
    config["data"]["label"], config["sft"]["readout"]["steps"] = LABEL, 0
    config["stage"], config["run"] = "all", str(made.folder)
    storage.write_bytes(made.config_file, yaml.safe_dump(config, sort_keys=False).encode())
    before = json.loads(made.base_file.read_text())
    storage.write_json(made.base_file, {"sft": before["sft"]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--epochs", type=float, default=1)
    given = parser.parse_args()
    extensions.hand_in_passes()
    try:
        run = Run(given.run)
        asked, config = learnt(run), run.config()
        policy = folders.open_adapter(run.stage("sft"), Precision.bf16)
        chat = prompts.chat_format(policy.tokenizer, resolving.model_of(config, False))
        data = preferences(policy, chat, asked)
        print(f"{len(data)} pairs", flush=True)
        train(policy, data, given.out / "trl", config["seed"], given)
        keep(policy, run, Run(given.out))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
