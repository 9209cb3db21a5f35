"""Time of refusal probabilities against one forward pass for each of the paper's 31 phrases.

    python benchmarks/refusal.py [model=smollm2_135m] [prompts=24] [batch=16] [threads=2]
                                 [phrases=paper] [precision=fp32] [device=auto] [rows=file.jsonl]

The prompts are those of the embedded corpus, shuffled once, or the `prompt` fields of a JSON-lines
file. Three ways in one process, after a warm-up of two prompts: what one writes by hand, `model`
on prompt and phrase for each phrase of each prompt; the same with `batch` prompts padded in one
pass per phrase; and `dcr.core.refusal` with the same `batch`. Reading the token ids is timed in
all. The values are compared before any time is printed; a difference beyond rounding ends the run.
Only the ratios of one run of this script mean anything.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dcr import cli, extensions, resolving
from dcr.analyses import probability
from dcr.core import models, passes, prompts, sources
from dcr.core.config import Kind, Precision
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
from dcr.core.refusal.opening import continuations, ending
from dcr.extensions import TrainSettings

CONF = Path(__file__).resolve().parent.parent / "conf"
TOLERANCE = {"fp32": 1e-3}  # relative; half the digits of bf16 are gone by themselves
OPTIONS = {
    "model": "smollm2_135m",
    "prompts": "24",
    "batch": "16",
    "threads": "2",
    "phrases": "paper",
    "precision": "fp32",
    "device": "auto",
    "rows": "",
}
Measured = Callable[[Policy, ChatFormat, Sequence[str], Sequence[str], int], Tensor]


def opened(options: dict[str, str]) -> tuple[Policy, ChatFormat, list[str]]:
    """The model where it is to run, and the prompts in one shuffled order."""
    cli.prepare()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = resolving.resolve(compose("train", [f"model={options['model']}"]), TrainSettings)
    policy = models.open_policy(cfg.model, Precision(options["precision"]))
    policy.model.eval()
    if options["device"] == "cuda" or (options["device"] == "auto" and torch.cuda.is_available()):
        policy.model.to("cuda")
    if options["rows"]:
        lines = Path(options["rows"]).read_text("utf-8").splitlines()
        texts = [str(json.loads(line)["prompt"]) for line in lines if line.strip()]
    else:
        texts = [
            row.prompt for kind in Kind for row in sources.read(f"demo_{kind.value}", kind=kind)
        ]
    random.Random(0).shuffle(texts)
    chat = prompts.chat_format(policy.tokenizer, cfg.model)
    return policy, chat, texts[: int(options["prompts"])]


def answers_to(chat: ChatFormat, ids: list[int], phrases: Sequence[str]) -> list[list[int]]:
    found = continuations(chat.tokenizer, ending(chat.tokenizer, ids), phrases)
    return [list(answer) for answer in found]


@torch.inference_mode()
def pass_per_phrase(
    policy: Policy, chat: ChatFormat, texts: Sequence[str], phrases: Sequence[str], batch: int
) -> Tensor:
    """One prompt and one phrase at a time."""
    return separate_passes(policy, chat, texts, phrases, 1)


@torch.inference_mode()
def separate_passes(
    policy: Policy, chat: ChatFormat, texts: Sequence[str], phrases: Sequence[str], batch: int
) -> Tensor:
    """One phrase behind `batch` prompts at a time, padded on the right, with all logits."""
    model: Any = policy.model
    totals = torch.zeros(len(texts))
    for start in range(0, len(texts), batch):
        encoded = [chat.prompt_ids(text) for text in texts[start : start + batch]]
        for answer in answers_to(chat, encoded[0], phrases):
            rows = [ids + answer for ids in encoded]
            inputs = passes.padded(rows, 0).to(model.device)
            mask = passes.attention_mask(rows).long().to(model.device)
            logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
            for row, ids in enumerate(encoded):
                places = slice(len(ids) - 1, len(ids) - 1 + len(answer))
                log_p = logits[row, places].float().log_softmax(-1)
                each = log_p[range(len(answer)), answer]
                totals[start + row] += each.sum().exp().cpu()
    return totals


def ours(
    policy: Policy, chat: ChatFormat, texts: Sequence[str], phrases: Sequence[str], batch: int
) -> Tensor:
    encoded = [chat.prompt_ids(text) for text in texts]
    return probability.probabilities(policy.model, chat.tokenizer, encoded, phrases, batch)[0]


VARIANTS: dict[str, Measured] = {
    "a pass per phrase and prompt": pass_per_phrase,
    "a pass per phrase, batched": separate_passes,
    "dcr.core.refusal": ours,
}


def timed(
    variant: Measured,
    opened_parts: tuple[Policy, ChatFormat, list[str]],
    phrases: Sequence[str],
    batch: int,
) -> tuple[float, Tensor]:
    policy, chat, texts = opened_parts
    variant(policy, chat, texts[:2], phrases, batch)
    clock = time.process_time if policy.model.device.type == "cpu" else time.perf_counter
    began = clock()
    values = variant(policy, chat, texts, phrases, batch)  # on the CPU: nothing is under way
    return clock() - began, values


def main() -> None:
    extensions.hand_in_passes()
    options = OPTIONS | dict(argument.split("=", 1) for argument in sys.argv[1:])
    torch.set_num_threads(int(options["threads"]))
    parts = opened(options)
    phrases, batch = probability.PHRASES[options["phrases"]], int(options["batch"])
    measured = {n: timed(v, parts, phrases, batch) for n, v in VARIANTS.items()}
    seconds, expected = next(iter(measured.values()))
    own, _ = measured["dcr.core.refusal"]
    columns = (
        "CPU seconds",
        "prompts/s",
        "mean probability",
        "largest difference",
        "time against ours",
    )
    table = Table("variant", *columns)
    for name, (took, values) in measured.items():
        apart = float(((values - expected).abs() / expected.clamp(min=1e-30)).max())
        if apart > TOLERANCE.get(options["precision"], 0.1):
            raise SystemExit(
                f"{name}: values differ by {apart:.1e} relative; the times mean nothing"
            )
        table.add_row(
            name,
            f"{took:.2f}",
            f"{len(values) / took:.2f}",
            f"{float(values.mean()):.3e}",
            f"{apart:.1e}",
            f"{took / own:.1f}",
        )
    print(OmegaConf.to_yaml(options).strip())
    lengths = [len(parts[1].prompt_ids(text)) for text in parts[2]]
    answers = answers_to(parts[1], parts[1].prompt_ids(parts[2][0]), phrases)
    inner = {tuple(y[:i]) for y in answers for i in range(1, len(y))}
    print(
        f"prompts of {sum(lengths) / len(lengths):.0f} tokens; {len(answers)} phrases of "
        f"{sum(map(len, answers))} tokens in all, {len(inner)} inner nodes in their trie"
    )
    Console(width=120).print(table)
    print(f"ratio refusal probability, a pass per phrase and prompt: {seconds / own:.3f}")


if __name__ == "__main__":
    main()
