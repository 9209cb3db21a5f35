"""Time of greedy completions against what one writes by hand and transformers' own batching.

    python benchmarks/generation.py [model=smollm2_135m] [prompts=64] [new=48,256] [batch=16]
                                    [precision=fp32] [threads=2] [device=auto] [root=<data>]

Every variant runs in a process of its own, one after another, for each number of new tokens, on the
same prompts, shuffled once: of the embedded corpus, or, with a folder `root` (by default what
`DCR_DATA` names), 100 of each of the seven over-refusal sets of `data=paper`. Batches of `batch` in
that order with `model.generate`; the same, sorted by length; transformers' continuous batching
(`model.generate_batch`, on a CPU with pages for `batch` prompts); `dcr.core.generation`, with the
same `batch` and with as many at once as it chooses; the same with `gen.max_new_tokens=auto`, which
ends an answer where XSTest's keywords have decided; and the first token's refusal mass alone,
which is all that `tasks=[discernment]` reads. Loading is not timed; seconds are the processor's, on
a GPU the clock's. `other texts` counts prompts whose answer differs from the first variant's: in
bf16 two tokens with nearly one logit may swap wherever a batch has another shape; `other verdicts`
those on which XSTest's keywords differ. Only the ratios of one run of this script mean anything.
"""

import json
import math
import os
import random
import resource
import subprocess
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
from transformers import ContinuousBatchingConfig, GenerationConfig

from dcr import cli, extensions, resolving
from dcr.core import generation, models, prompts, sources
from dcr.core.config import Kind, Precision
from dcr.core.config.evaluation import GenConfig
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
from dcr.core.refusal import opening as refusal
from dcr.core.sources import Example
from dcr.extensions import TrainSettings

PAGE = 64  # tokens a page of the paged cache
EACH = 100  # prompts of a set
CONF = Path(__file__).resolve().parent.parent / "conf"
VARIANTS = {
    "generate, batches as they come": "batches_as_they_come",
    "generate, batches sorted by length": "sorted_batches",
    "transformers' continuous batching": "continuous_batching",
    "dcr, the same batch": "ours",
    "dcr, its own choice": "ours_measured",
    "dcr, until keywords have decided": "ours_decided",
    "dcr, the first token's mass alone": "ours_first",
}
THEIRS = ("batches_as_they_come", "sorted_batches", "continuous_batching")
OPTIONS = {
    "model": "smollm2_135m",
    "prompts": "64",
    "new": "48,256",
    "batch": "16",
    "precision": "fp32",
    "threads": "2",
    "device": "auto",
    "root": os.environ.get("DCR_DATA", ""),
    "variant": "",
}
Answers = dict[str, list[int] | str]  # token ids, or the text where ids are not given away


def opened(options: dict[str, str]) -> tuple[Policy, ChatFormat, list[Example]]:
    """The model where it is to run, and the prompts in one shuffled order."""
    cli.prepare()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = [f"model={options['model']}", "data=paper"]
        cfg = resolving.resolve(compose("train", given), TrainSettings)
    policy = models.open_policy(cfg.model, Precision(options["precision"]))
    if options["device"] == "cuda" or (options["device"] == "auto" and torch.cuda.is_available()):
        policy.model.to("cuda")
    names = {f"demo_{kind.value}{part}": kind for kind in Kind for part in ("_heldout", "")}
    if root := options["root"]:
        read = [sources.read(name, root=root) for name in cfg.data.evaluation.over_refusal]
        drawn = [sources.draw(of_one, min(EACH, len(of_one)), 0) for of_one in read]
        rows = list({row.id: row for of_one in drawn for row in of_one}.values())
    else:
        rows = [row for name, kind in names.items() for row in sources.read(name, kind=kind)]
    random.Random(0).shuffle(rows)
    return policy, prompts.chat_format(policy.tokenizer, cfg.model), rows[: int(options["prompts"])]


def settings_of(chat: ChatFormat, new: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=list(chat.stop),
        pad_token_id=chat.stop[0],
    )


def batches_as_they_come(
    policy: Policy, chat: ChatFormat, rows: Sequence[Example], new: int, batch: int
) -> Answers:
    """Answers as one writes it by hand: the tokenizer pads on the left, then `generate` runs."""
    tokenizer: Any = policy.tokenizer
    tokenizer.padding_side = "left"
    found: Answers = {}
    for start in range(0, len(rows), batch):
        group = rows[start : start + batch]
        texts = [chat.text(row.prompt) for row in group]
        inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        ids = inputs["input_ids"].to(policy.model.device)
        output = policy.model.generate(
            input_ids=ids,
            attention_mask=inputs["attention_mask"].to(ids.device),
            generation_config=settings_of(chat, new),
        )
        answers = output[:, ids.shape[1] :].tolist()
        found |= {row.id: answer for row, answer in zip(group, answers, strict=True)}
    return found


def sorted_batches(
    policy: Policy, chat: ChatFormat, rows: Sequence[Example], new: int, batch: int
) -> Answers:
    longest_first = sorted(rows, key=lambda row: -len(chat.prompt_ids(row.prompt)))
    return batches_as_they_come(policy, chat, longest_first, new, batch)


def continuous_batching(
    policy: Policy, chat: ChatFormat, rows: Sequence[Example], new: int, batch: int
) -> Answers:
    """Raises RuntimeError with the reason where the device or the model is refused."""
    encoded = [chat.prompt_ids(row.prompt) for row in rows]
    tokens = max(map(len, encoded)) + new
    # left alone it takes most of the machine's memory, which on a CPU is everybody's
    pages = ContinuousBatchingConfig(
        num_blocks=batch * math.ceil(tokens / PAGE),
        page_size=PAGE,
        max_requests_per_batch=batch,
        max_batch_tokens=max(tokens, 512),
    )
    on_gpu = policy.model.device.type == "cuda"
    done = policy.model.generate_batch(
        inputs=encoded,
        generation_config=settings_of(chat, new),
        continuous_batching_config=None if on_gpu else pages,
    )
    answers = list(done.values())
    failed = [answer.error for answer in answers if answer.error is not None]
    if failed or len(answers) < len(rows):
        raise RuntimeError(failed[0] if failed else "its generation thread ended early")
    return {row.id: answer.generated_tokens for row, answer in zip(rows, answers, strict=True)}


def ours(
    policy: Policy,
    chat: ChatFormat,
    rows: Sequence[Example],
    new: int,
    batch: int | None,
    decided: Callable[[str], bool] | None = None,
) -> Answers:
    openings = refusal.refusal_openings(chat)
    batches = generation.complete(
        policy,
        chat,
        rows,
        GenConfig(max_new_tokens=new, batch_size=batch),
        score=lambda logits: refusal.refusal_mass(logits, openings),
        decided=decided,
    )
    return {done.id: done.response for found in batches for done in found}


def ours_measured(
    policy: Policy, chat: ChatFormat, rows: Sequence[Example], new: int, batch: int
) -> Answers:
    return ours(policy, chat, rows, new, None)


def ours_decided(
    policy: Policy, chat: ChatFormat, rows: Sequence[Example], new: int, batch: int
) -> Answers:
    return ours(policy, chat, rows, new, batch, refusal.is_decided)


def ours_first(
    policy: Policy, chat: ChatFormat, rows: Sequence[Example], new: int, batch: int
) -> Answers:
    openings = refusal.refusal_openings(chat)
    encoded = [chat.prompt_ids(row.prompt) for row in rows]
    for _, logits in refusal.first_logits(policy.model, encoded):
        refusal.refusal_mass(logits, openings)
    return {row.id: [] for row in rows}


def timed(variant: Callable[..., Answers], options: dict[str, str]) -> dict[str, Any]:
    """One variant after a warm-up of two prompts: seconds, peak memory and every text."""
    policy, chat, rows = opened(options)
    new, batch = int(options["new"]), int(options["batch"])
    try:
        variant(policy, chat, rows[:2], 2, batch)
        clock = time.process_time if policy.model.device.type == "cpu" else time.perf_counter
        began = clock()
        answers = variant(policy, chat, rows, new, batch)
        seconds = clock() - began
    except (RuntimeError, ValueError, ImportError, AttributeError) as error:
        return {"refused": (str(error).strip().splitlines() or [type(error).__name__])[0]}
    texts = {name: _text(chat, answer) for name, answer in answers.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if policy.model.device.type == "cuda":
        peak = torch.cuda.max_memory_reserved()
    return {"seconds": seconds, "peak_gib": peak / 2**30, "texts": texts}


def _text(chat: ChatFormat, answer: list[int] | str) -> str:
    if isinstance(answer, str):
        return answer
    end = next((i for i, token in enumerate(answer) if token in chat.stop), len(answer))
    return str(chat.tokenizer.decode(answer[:end], skip_special_tokens=True)).strip()


def _measured(options: dict[str, str], variant: str) -> dict[str, Any]:
    """Measures a variant in a process of its own."""
    given = [f"{key}={value}" for key, value in (options | {"variant": variant}).items()]
    command = [sys.executable, __file__, *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{variant} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compared(options: dict[str, str]) -> None:
    """Prints the table of one number of new tokens, and its ratios."""
    columns = ("variant", "seconds", "prompts/s", "peak GiB", "time against the first")
    title = f"up to {options['new']} new tokens"
    table = Table(*columns, "other texts", "other verdicts", title=title)
    first: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    verdicts: dict[str, list[bool]] = {}
    for name, variant in VARIANTS.items():
        got = _measured(options, variant)
        if "refused" in got:
            table.add_row(name, f"not on this device: {got['refused']}", *[""] * 5)
            continue
        first = first or got
        pairs = [(got["texts"][row], text) for row, text in first["texts"].items()]
        other = sum(text != expected for text, expected in pairs)
        differ = sum(refusal.is_refusal(t) != refusal.is_refusal(e) for t, e in pairs)
        seconds[variant] = got["seconds"]
        verdicts[variant] = [refusal.is_refusal(text) for text, _ in pairs]
        table.add_row(
            name,
            f"{got['seconds']:.1f}",
            f"{len(got['texts']) / got['seconds']:.2f}",
            f"{got['peak_gib']:.2f}",
            f"{got['seconds'] / first['seconds']:.2f}",
            f"{other} of {len(pairs)}",
            "-" if variant == "ours_first" else f"{differ} of {len(pairs)}",
        )
    Console(width=120).print(table)
    if verdicts["ours_decided"] != verdicts["ours"]:
        raise SystemExit("gen.max_new_tokens=auto: other verdicts than whole answers have")
    best = min(seconds[v] for v in THEIRS if v in seconds)
    for what, value in (
        ("generation, the best of generate and continuous batching", best / seconds["ours"]),
        ("generation until decided, whole answers", seconds["ours"] / seconds["ours_decided"]),
        ("discernment, generation", seconds["ours"] / seconds["ours_first"]),
    ):
        print(f"ratio {what}, {options['new']} tokens: {value:.3f}")


def main() -> None:
    extensions.hand_in_passes()
    options = OPTIONS | dict(argument.split("=", 1) for argument in sys.argv[1:])
    if options["variant"]:
        torch.set_num_threads(int(options["threads"]))
        print(json.dumps(timed(globals()[options["variant"]], options)))
        return
    print(OmegaConf.to_yaml(options).strip())
    for new in options["new"].split(","):
        compared(options | {"new": new})


if __name__ == "__main__":
    main()
