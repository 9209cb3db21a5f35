"""How SFT, stage one, generation and the kernel grow, against the arithmetic of the plan.

    python benchmarks/growth.py [rounds=2] [threads=1]

Random Llama-shaped models of four blocks; rows, their length and the width are doubled twice, each
alone. The exponents are slopes of CPU seconds, the least of `rounds`, and of the arithmetic, by
least squares in logarithms: `dcr.plan.cost` for the stages, 2 x parameters x tokens for generation
(its head for new tokens alone), and what benchmarks/ntk.py derives for the kernel. The second table
says by the plan alone where memory ends. No ratio: what grows is compared with itself.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))
import training

from dcr import builtin, extensions
from dcr.analyses import ntk
from dcr.core import prompts
from dcr.core.config import Stage
from dcr.core.data.rows import PairBatch, PromptBatch
from dcr.core.generation import continued
from dcr.core.models import Policy, structure
from dcr.core.training.resuming import adamw
from dcr.core.training.stages import ContrastiveModule, SFTModule
from dcr.plan import cost
from dcr.plan.cost import Load

BASE = {"rows": 16, "length": 64, "width": 256}
RESERVED = 1.5e9  # CUDA's context, its libraries' workspaces, and fragmentation
DOUBLED = (1, 2, 4)
DEPTH, VOCABULARY, NEW, TOP = 4, 1024, 16, 4
GIB = (24, 40, 80)
Made = tuple[Callable[[], object], float]  # a step, and its arithmetic


def shape(width: int) -> dict[str, Any]:
    return {
        **{"model_type": "llama", "hidden_size": width, "intermediate_size": 3 * width},
        **{"num_hidden_layers": DEPTH, "num_attention_heads": width // 32, "head_dim": 32},
        **{"num_key_value_heads": width // 64, "vocab_size": VOCABULARY},
        "tie_word_embeddings": True,
    }


def opened(width: int) -> tuple[Any, Policy]:
    cfg = training.settings("smollm2_135m", "trainer.accelerator=cpu", "dcr.layer=2")
    cfg.model.architecture = shape(width)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape(width)))
    return cfg, Policy(model, builtin.byte_tokenizer(), "random")


def stage(which: Stage, rows: int, length: int, width: int) -> Made:
    cfg, policy = opened(width)
    ids = torch.randint(0, VOCABULARY, (rows, length))
    targets = torch.cat([ids[:, 1:], torch.full((rows, 1), prompts.IGNORED)], 1)
    mask, names = torch.ones_like(ids, dtype=torch.bool), tuple(map(str, range(rows)))
    tokens, first = rows * length, which is Stage.contrastive
    if first:
        labels, spans = torch.arange(rows) % 2, torch.tensor([[0, length]] * rows)
        batch: Any = PromptBatch(ids, mask, labels, spans, targets, names)
        module: Any = ContrastiveModule(policy, cfg.dcr, 2, 1)
    else:
        batch = PairBatch(ids, mask, targets, torch.zeros(rows, dtype=torch.bool), names)
        adapted = structure.add_lora(policy.model.bfloat16(), cfg.sft.lora, 0)
        module = SFTModule(Policy(adapted, policy.tokenizer, "random"), cfg.sft, 1)
    optimizer = adamw(module, 1e-4, 0.01, lambda _: 1.0)["optimizer"]

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            if first:
                features, nll = module.features_and_nll(batch)
                loss = module.circle(features, batch.labels)[0] + nll
            else:
                loss = module.nll(batch)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    labelled = rows * (length - 1)
    load = Load(0, tokens, tokens, labelled, 0, tokens, 0)
    return step, cost.epoch_flops(cfg, which, cost.stage_shape(cfg, which), load)


def generation(rows: int, length: int, width: int) -> Made:
    cfg, policy = opened(width)
    chat = replace(prompts.chat_format(policy.tokenizer, cfg.model), stop=(VOCABULARY - 1,))
    asked = torch.randint(0, VOCABULARY - 1, (rows, length)).tolist()
    blocks = sum(weight.numel() for weight in structure.decoder_blocks(policy.model).parameters())
    flops = 2 * rows * (blocks * (length + NEW - 1) + NEW * VOCABULARY * width)

    def step() -> None:
        continued(policy, chat, asked, NEW, lambda logits: logits[:, 0])

    return step, flops


def kernel(rows: int, length: int, width: int) -> Made:
    _, policy = opened(width)
    asked = torch.randint(0, VOCABULARY, (rows, length)).tolist()
    settings = ntk.Settings(params=f"tail:{DEPTH}", head=False, top_k=TOP, batch_size=8)
    blocks = sum(weight.numel() for weight in structure.decoder_blocks(policy.model).parameters())
    products = rows**2 * TOP * length * (length + TOP) * width * 7 * DEPTH
    flops = 2 * rows * length * blocks * (1 + 2 * TOP) + 2 * products
    return (lambda: ntk.measure(policy.model, asked, settings)), flops


WORKS: dict[str, Callable[[int, int, int], Made]] = {
    "SFT, a step": lambda *sizes: stage(Stage.sft, *sizes),
    "stage one with NLL, a step": lambda *sizes: stage(Stage.contrastive, *sizes),
    f"generation of {NEW} tokens": generation,
    "exact kernel": kernel,
}


def seconds(step: Callable[[], object], rounds: int) -> float:
    step()
    found = []
    for _ in range(rounds):
        began = time.process_time()
        step()
        found.append(time.process_time() - began)
    return min(found)


def slope(values: list[float]) -> float:
    return float(np.polyfit(np.log(DOUBLED), np.log(values), 1)[0])


def ends() -> Table:
    """Tokens of one pass that a GPU holds, by the plan's memory."""
    table = Table("tokens in one pass at most, by the plan", *(f"{size} GB" for size in GIB))
    for model, which, more in (
        ("llama3_8b", Stage.sft, ()),
        ("llama3_8b", Stage.sft, ("sft.gradient_checkpointing=true",)),
        ("llama3_8b", Stage.contrastive, ()),
        ("llama3_8b", Stage.contrastive, ("dcr.adapter=lora",)),
        ("smollm2_135m", Stage.sft, ()),
        ("smollm2_135m", Stage.contrastive, ()),
    ):
        cfg = training.settings(model, "trainer.accelerator=gpu", *more)
        made = cost.stage_shape(cfg, which)

        def needed(tokens: int, cfg: Any = cfg, which: Stage = which, made: Any = made) -> float:
            load = Load(0, tokens, tokens, tokens, 0, tokens, 0)
            return RESERVED + sum(cost.memory(cfg, which, made, load).values())

        cells = []
        for size in GIB:
            fits = 2**30  # halved until it fits, then as many halves more as fit
            while fits and needed(fits) > size * 2**30:
                fits //= 2
            for part in range(1, 8):
                more_of_it = fits + (2 * fits >> part if part > 1 else 0)
                fits = more_of_it if needed(more_of_it) <= size * 2**30 else fits
            cells.append(f"{fits:,}" if fits > 1 else "-")
        table.add_row(f"{model}, {which.value} {' '.join(more)}", *cells)
    return table


def main() -> None:
    extensions.hand_in_passes()
    options = {"rounds": "2", "threads": "1"}
    options |= dict(argument.split("=", 1) for argument in sys.argv[1:])
    torch.set_num_threads(int(options["threads"]))
    table = Table("exponent in", *BASE, "seconds at the smallest and largest width")
    for name, made in WORKS.items():
        cells, spent = [], []
        for axis in BASE:
            sizes = [{**BASE, axis: factor * BASE[axis]} for factor in DOUBLED]
            steps = [made(*size.values()) for size in sizes]
            spent = [seconds(step, int(options["rounds"])) for step, _ in steps]
            cells.append(f"{slope(spent):.2f} (plan {slope([flops for _, flops in steps]):.2f})")
        table.add_row(name, *cells, f"{spent[0]:.2f}, {spent[-1]:.2f}")
    Console(width=120).print(table, ends())


if __name__ == "__main__":
    main()
