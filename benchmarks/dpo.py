"""DPO on the prompts that a run's readout learns, from the same SFT, in the readout's place.

    python benchmarks/dpo.py <run> <out> [--lr 5e-4] [--beta 0.1] [--epochs 1]

DPO is that of Rafailov et al. 2023 (arXiv 2305.18290), with the optimiser and schedule of TRL's
DPOTrainer, against which tests/test_dpo.py holds it. To a toxic prompt the model's own answer that
opens with a refusal is preferred to its own other one, to a seemingly toxic prompt the other one to
the refusal (both as `calibrate` begins them), so that no wording is learnt that SFT did not teach.
`<out>` becomes a run folder with `data.label: dpo`, for `eval.py run=<out>`.
"""

import argparse
import json
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from dcr import extensions, resolving
from dcr.activations import head_logits
from dcr.calibration import biases
from dcr.core import learning, passes, prompts, sources, storage
from dcr.core.config import ConfigError, Kind, Precision, UserError
from dcr.core.models import Policy, folders, structure
from dcr.core.models.training import save_adapter
from dcr.core.prompts import ChatFormat
from dcr.core.runs import Run
from dcr.core.sources import Example

BATCH = 16  # pairs a step, as many as SFT has rows
WARMUP = 8  # steps
CLIP = 1.0  # the norm of gradients, as TRL has it
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


def log_probs(
    policy: Policy, asked: Sequence[list[int]], answers: Sequence[list[int]]
) -> Float[Tensor, "answers"]:
    """The log-probability of each answer behind its prompt, in nats."""
    whole = [[*prompt, *answer] for prompt, answer in zip(asked, answers, strict=True)]
    ids, mask = passes.padded(whole, 0), passes.attention_mask(whole)
    read = torch.zeros_like(mask)  # the states that the answers' tokens are read from
    for row, prompt, ids_of in zip(read, asked, whole, strict=True):
        row[len(prompt) - 1 : len(ids_of) - 1] = True
    hidden = learning.current().states(structure.backbone(policy.model), ids, mask)
    log_p = head_logits(policy.model, hidden[read]).log_softmax(-1)
    each = log_p.gather(1, ids[:, 1:][read[:, :-1]][:, None])[:, 0]
    return torch.stack([part.sum() for part in each.split([len(answer) for answer in answers])])


def margins(policy: Policy, batch: Sequence[Preference]) -> Float[Tensor, "pairs"]:
    """How much likelier the preferred answer of each pair is than the other, in nats."""
    asked = [each["prompt_ids"] for each in batch]
    answers = [[each[key] for each in batch] for key in ("chosen_ids", "rejected_ids")]
    chosen, rejected = log_probs(policy, asked * 2, answers[0] + answers[1]).chunk(2)
    return chosen - rejected


def train(policy: Policy, data: Sequence[Preference], lr: float, beta: float) -> list[float]:
    """Trains the adapter on one batch after another; the losses. Its weights are the reference."""
    batches = [data[start : start + BATCH] for start in range(0, len(data), BATCH)]
    weights = [w for name, w in policy.model.named_parameters() if ".lora_" in name]
    with torch.no_grad():
        before = [margins(policy, batch) for batch in batches]
    for weight in weights:
        weight.requires_grad = True
    optimiser = torch.optim.AdamW(weights, lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimiser, WARMUP, len(batches))
    losses: list[float] = []
    for batch, reference in zip(batches, before, strict=True):
        gained = margins(policy, batch) - reference
        loss = -F.logsigmoid(beta * gained).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        print(f"step {len(losses)} of {len(batches)}: loss {losses[-1]:.3f}", flush=True)
    return losses


def keep(policy: Policy, run: Run, made: Run) -> None:
    """Writes the run of DPO: that of SFT with another adapter, label and no readout."""
    shutil.copytree(
        run.folder, made.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*LEFT)
    )
    save_adapter(policy, made.stage("sft"), folders.adapter_base(run.stage("sft")))
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
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=1)
    given = parser.parse_args()
    extensions.hand_in_passes()
    try:
        run = Run(given.run)
        asked, config = learnt(run), run.config()
        policy = folders.open_adapter(run.stage("sft"), Precision.bf16)
        chat = prompts.chat_format(policy.tokenizer, resolving.model_of(config, False))
        data = preferences(policy, chat, asked)
        print(f"{len(data)} pairs", flush=True)
        drawn = random.Random(config["seed"])
        taken = [pair for _ in range(given.epochs) for pair in drawn.sample(data, len(data))]
        train(policy, taken, given.lr, given.beta)
        keep(policy, run, Run(given.out))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
