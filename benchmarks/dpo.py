"""DPO by TRL on the pairs that the readout learns, from the SFT of a run that had one.

    python benchmarks/dpo.py <run> <out> [--lr 5e-5] [--beta 0.1] [--epochs 1]

Preferred and other answer are the model's own two (as `tasks=[frontier]` decodes them): to a toxic
prompt the one that opens with a refusal is preferred, to a seemingly toxic one the other. So no
wording is learnt that SFT did not teach. `<out>` is a run folder with `data.label: dpo`, which
`eval.py run=<out>` takes. TRL is no dependency of this project:
`pip install --no-deps trl==1.16.0`.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]

from dcr.calibration import biases
from dcr.core import models, prompts, sources
from dcr.core.config import Kind, Precision, resolving
from dcr.core.models import Policy
from dcr.core.runs import Run

ANSWER = 64  # tokens, most of which the sign of a preference depends on
BATCH = 16  # pairs, as many as SFT's rows


class Trainer(DPOTrainer):
    """DPO on rows that are token ids already; TRL would end answers that were cut."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


def learnt(run: Run) -> list[sources.Example]:
    """The rows of either kind whose contrast the run's readout learnt."""
    told = json.loads(run.rows_file.read_text())["rows"]
    names = run.config()["sft"]["readout"]
    return [
        row
        for kind in (Kind.seemingly_toxic, Kind.toxic)
        for source in names[kind.value]
        for row in sources.read(source)
        if row.id in set(told[f"readout_{kind.value}"]["ids"])
    ]


def preferences(policy: Policy, chat: prompts.ChatFormat, rows: list[sources.Example]) -> Dataset:
    """A row for each prompt, in token ids."""
    found: list[dict[str, list[int]]] = []
    for batch in biases.both_answers(policy, chat, rows, ANSWER):
        for two in batch:
            answers = [two.refusing, two.answering]
            chosen, rejected = answers if two.row.kind is Kind.toxic else answers[::-1]
            asked = chat.prompt_ids(two.row.prompt)
            found.append({"prompt_ids": asked, "chosen_ids": chosen, "rejected_ids": rejected})
    return Dataset.from_list(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--epochs", type=float, default=1)
    given = parser.parse_args()
    run = Run(given.run)
    config = run.config()
    policy = models.open_adapter(run.stage("sft"), Precision.bf16)
    chat = prompts.chat_format(policy.tokenizer, resolving.model_of(config, False))
    with torch.random.fork_rng():
        data = preferences(policy, chat, learnt(run))
    print(f"{len(data)} pairs", flush=True)
    for name, weight in policy.model.named_parameters():
        weight.requires_grad_("lora_" in name)
    settings = DPOConfig(
        output_dir=str(given.out / "dpo"),
        learning_rate=given.lr,
        beta=given.beta,
        num_train_epochs=given.epochs,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="cosine",
        warmup_steps=8,
        seed=config["seed"],
        use_cpu=True,
        bf16=True,
        gradient_checkpointing=False,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    policy.model.train()
    trainer = Trainer(
        policy.model, args=settings, train_dataset=data, processing_class=policy.tokenizer
    )
    trainer.train()
    policy.model.delete_adapter("ref")
    policy.model.eval()
    shutil.copytree(
        run.folder,
        given.out,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("eval", "readout*", "evaluated.json", "looked"),
    )
    shutil.rmtree(given.out / "dpo", ignore_errors=True)
    made = Run(given.out)
    models.save_adapter(policy, made.stage("sft"), models.adapter_base(run.stage("sft")))
    config["data"]["label"], config["sft"]["readout"]["steps"] = "dpo", 0
    config["stage"], config["run"] = "all", str(given.out)
    (given.out / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    base = json.loads((given.out / "base.json").read_text())
    base.pop("readout", None)
    (given.out / "base.json").write_text(json.dumps(base, indent=1) + "\n")


if __name__ == "__main__":
    main()
