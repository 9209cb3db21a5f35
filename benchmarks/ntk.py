"""Time of the exact kernel against the paper's finite differences, on the same prompts.

    python benchmarks/ntk.py [model=smollm2_135m] [prompts=5] [full=25] [k=10] [params=tail:2]
                             [head=yes] [batch=8] [threads=2]

Both are timed on 3 x `prompts` prompts of the embedded corpus, in one process, in fp32, with the
same padding and the same batches, and their values are compared. The paper's scheme is then
carried to 3 x `full` prompts by its counts: N k gradients, N k moves of the parameters there and
back, and 2 N^2 k forward passes, each timed by itself in the small run. The exact kernel is also
timed there. The last table doubles one thing at a time. Only the ratios of one run of this script
mean anything.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from dcr import cli, resolving
from dcr.analyses import ntk
from dcr.analyses.ntk import Settings, empirical
from dcr.core import models, sources
from dcr.core.config import Kind, Precision
from dcr.core.models import Policy
from dcr.extensions import TrainSettings

CONF = Path(__file__).resolve().parent.parent / "conf"
OPTIONS = {
    "model": "smollm2_135m",
    "prompts": "5",
    "full": "25",
    "k": "10",
    "params": "tail:2",
    "head": "yes",
    "batch": "8",
    "threads": "2",
}
GROWTH = """
With N prompts of T tokens, k tokens each, width d and a subset of P parameters:
  paper   2 N^2 k forward passes of the whole model: N^2 k T d^2 for each block, the subset's or not
  exact   one forward and k backward passes per prompt, N k T d^2 for each block from the last down
          to the subset's first (with a tied matrix in the subset, to the embeddings), and inner
          products, N^2 k T (T + k) d or N^2 k^2 d^2, the less, for each block of the subset
So the ratio grows with N until the inner products prevail. In k the paper's scheme is linear; the
inner products are quadratic once k exceeds T. Memory: N k T d for each block at most, in sweeps
within the budget; the paper's scheme holds 3 P.
"""
Rows = list[list[int]]


def opened(options: dict[str, str]) -> tuple[Policy, Callable[[int], Rows]]:
    """The model, and so many prompts of each kind as token ids, cycled through if there are less.

    Repeated prompts cost what new ones do: nothing is kept between them.
    """
    cli.prepare()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = resolving.resolve(compose("train", [f"model={options['model']}"]), TrainSettings)
    policy = models.open_policy(cfg.model, Precision.fp32)
    parts = ("_heldout", "")
    texts = [
        [row.prompt for part in parts for row in sources.read(f"demo_{k.value}{part}", kind=k)]
        for k in Kind
    ]

    def rows(count: int) -> Rows:
        chosen = [of[i % len(of)] for of in texts for i in range(count)]
        return [ntk.prompt_ids(policy.tokenizer, text) for text in chosen]

    return policy, rows


def timed(model: Any, rows: Rows, settings: Settings) -> tuple[float, ntk.Kernel]:
    began = time.process_time()
    found = ntk.measure(model, rows, settings)
    return time.process_time() - began, found


def paper(model: Any, rows: Rows, settings: Settings) -> tuple[dict[str, float], float, ntk.Kernel]:
    """Seconds of gradients and of the forward loop, of the whole, and the values."""
    spent = {"gradients": 0.0, "forward": 0.0}
    gradient, forward = empirical.gradient, empirical.last_logits

    def clocked(call: Callable[..., Any], name: str) -> Any:
        def inner(*given: Any) -> Any:
            began = time.process_time()
            got = call(*given)
            spent[name] += time.process_time() - began
            return got

        return inner

    empirical.gradient = clocked(gradient, "gradients")
    empirical.last_logits = clocked(forward, "forward")
    try:
        seconds, found = timed(
            model, rows, dataclasses.replace(settings, method="finite_difference")
        )
    finally:
        empirical.gradient, empirical.last_logits = gradient, forward
    return spent, seconds, found


def comparison(model: Any, small: Rows, full: Rows, settings: Settings) -> Table:
    ntk.measure(model, small[:2], settings)  # first calls are slow
    ours, exact = timed(model, small, settings)
    theirs_spent, theirs, approximate = paper(model, small, settings)
    ours_full, _ = timed(model, full, settings)
    growth = len(full) / len(small)
    # moves of the parameters, and what is left, go with N k as gradients do
    carried = theirs_spent["forward"] * growth**2 + (theirs - theirs_spent["forward"]) * growth
    difference = (exact.blocks - approximate.blocks).norm() / exact.blocks.norm()
    n, k = len(small), exact.settings.top_k
    print(f"relative difference of the two at {n} prompts: {float(difference):.1e}")
    print(f"paper: {n * k} gradients {theirs_spent['gradients']:.1f} s, "
          f"{2 * n * n * k} forward passes {theirs_spent['forward']:.1f} s")  # fmt: skip
    table = Table("prompts", "paper, s", "exact, s", "ratio", title="exact against the paper's")
    print(f"ratio exact kernel, the paper's finite differences: {theirs / ours:.3f}")
    table.add_row(str(n), f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.1f}")
    full_row = f"{carried:.0f} (carried)", f"{ours_full:.1f}", f"{carried / ours_full:.1f}"
    table.add_row(str(len(full)), *full_row)
    return table


def doubled(model: Any, small: Rows, twice: Rows, settings: Settings) -> Table:
    """Measures the cost of the exact kernel when one thing doubles."""
    cases = {
        "prompts": (model, twice, settings),
        "k": (model, small, dataclasses.replace(settings, top_k=2 * settings.top_k)),
        "length": (model, [row * 2 for row in small], settings),
    }
    base, _ = timed(model, small, settings)
    table = Table("doubled", "time against the same without", title="cost of the exact kernel")
    for name, case in cases.items():
        table.add_row(name, f"{timed(*case)[0] / base:.2f}")
    narrow, wide = (
        timed(of_width(width), [[i % 250 for i in row] for row in small], settings)[0]
        for width in (256, 512)
    )
    table.add_row("width (random weights, 4 blocks)", f"{wide / narrow:.2f}")
    return table


def of_width(width: int) -> Any:
    shape = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4, vocab_size=260,
        num_attention_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shape).eval()


def main() -> None:
    options = OPTIONS | dict(argument.split("=", 1) for argument in sys.argv[1:])
    torch.set_num_threads(int(options["threads"]))
    policy, rows = opened(options)
    settings = Settings(
        top_k=int(options["k"]),
        params=options["params"],
        head=options["head"] == "yes",
        batch_size=int(options["batch"]),
    )
    print(OmegaConf.to_yaml(options).strip())
    console, each = Console(width=100), int(options["prompts"])
    console.print(comparison(policy.model, rows(each), rows(int(options["full"])), settings))
    console.print(doubled(policy.model, rows(each), rows(2 * each), settings))
    print(GROWTH.strip())


if __name__ == "__main__":
    main()
