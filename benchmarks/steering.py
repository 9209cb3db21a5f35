"""Time of steered against plain generation, and of computing the vectors.

    python benchmarks/steering.py [model=smollm2_135m] [prompts=32] [new=32] [batch=16] [repeats=2]
                                  [threads=2] [run=<stl run>] [root=<data>]
                                  [train=64] [validation=16]

Every variant answers the same prompts of the embedded corpus in one process, in fp32, taking turns;
the fastest turn of each counts. The edits are made in full but with a strength of 1e-6, so that
every variant writes the same tokens, which is checked: what is left is the time that editing takes.
Vectors are those that the embedded corpus gives; Surgical's, which asks for a model that refuses,
are random and cost the same. `positions` counts tokens that went through the first block, `beyond`
those above plain generation: SCANS pays for one more pass over each prompt and its suffix, Self-CD
for a second prompt and a second stream. With `run=`, a folder trained with method=stl, the time to
compute vectors from `data.extraction` is measured as well, for Surgical with `train` and
`validation` prompts a kind. Only the ratios of one run of this script mean anything.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from dcr import cli, extensions, resolving
from dcr.contrast import ContrastConfig
from dcr.contrast.decoding import asked_for
from dcr.core import generation, models, prompts, sources
from dcr.core.config import Kind, Precision
from dcr.core.models import Policy, folders, structure
from dcr.core.prompts import ChatFormat
from dcr.core.refusal import opening as refusal
from dcr.core.runs import Run
from dcr.core.sources import Example
from dcr.extensions import EvalSettings
from dcr.steering import SteeringConfig, surgical
from dcr.steering import edits as editing
from dcr.steering import methods as steering
from dcr.steering.edits import Edits, Plan

CONF = Path(__file__).resolve().parent.parent / "conf"
FAINT = 1e-6  # a strength that changes no token
SELF_CD = "self_cd"
OPTIONS = {
    "model": "smollm2_135m",
    "prompts": "32",
    "new": "32",
    "batch": "16",
    "repeats": "2",
    "threads": "2",
    "run": "",
    "root": "",
    "train": "64",
    "validation": "16",
}


def settings_of(*overrides: str) -> EvalSettings:
    cli.prepare()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolving.resolve(compose("eval", list(overrides)), EvalSettings)


def questions(count: int) -> list[Example]:
    names = {f"demo_{kind.value}_heldout": kind for kind in Kind}
    rows = [row for name, kind in names.items() for row in sources.read(name, kind=kind)]
    return sources.draw(rows, min(count, len(rows)), 0)


def found_edits(
    settings: EvalSettings, policy: Policy, chat: ChatFormat, method: str
) -> Edits | Plan:
    chosen = replace(settings.steering, method=method, strength=FAINT)
    if method == "surgical":
        return random_surgical(policy, chat, chosen)
    return steering.steer(policy, chat, settings.data, chosen, settings.seed).edits


def random_surgical(policy: Policy, chat: ChatFormat, settings: SteeringConfig) -> Edits:
    width = policy.model.get_input_embeddings().embedding_dim
    one, other = torch.nn.functional.normalize(
        torch.randn(2, width, generator=torch.Generator().manual_seed(0)), dim=1
    )
    found = {"ablated": one, "added": other}, {"added": {"block": 1}}
    return surgical.edits(policy, chat, found, settings)


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Passes of the first block, and the tokens in them."""
    seen = [0, 0]

    def count(_module: Any, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        stream = given[0] if given else options["hidden_states"]
        seen[0] += 1
        seen[1] += stream.shape[0] * stream.shape[1]

    handle = structure.decoder_blocks(model)[0].register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def answers(
    policy: Policy, chat: ChatFormat, rows: Sequence[Example], settings: ContrastConfig
) -> dict[str, str]:
    openings = refusal.refusal_openings(chat)
    batches = generation.complete(
        policy,
        chat,
        rows,
        settings,
        score=lambda logits: refusal.refusal_mass(logits, openings),
        decoding=asked_for(settings),
    )
    return {done.id: done.response for batch in batches for done in batch}


def compared(settings: EvalSettings, options: dict[str, str]) -> Table:
    policy = models.open_policy(settings.model, Precision.fp32)
    chat = prompts.chat_format(policy.tokenizer, settings.model)
    rows = questions(int(options["prompts"]))
    plain = ContrastConfig(max_new_tokens=int(options["new"]), batch_size=int(options["batch"]))
    methods = ("scans", "surgical", "ablation")
    edits = {m: found_edits(settings, policy, chat, m) for m in methods}

    def steered(name: str) -> Callable[[], dict[str, str]]:
        def ask() -> dict[str, str]:
            with editing.edited(policy.model, edits[name]):
                return answers(policy, chat, rows, plain)

        return ask

    variants: dict[str, Callable[[], dict[str, str]]] = {
        "plain": lambda: answers(policy, chat, rows, plain),
        **{name: steered(name) for name in edits},
        SELF_CD: lambda: answers(policy, chat, rows, replace(plain, self_cd=FAINT)),
    }
    answers(policy, chat, rows[:2], replace(plain, max_new_tokens=2))  # first calls are slow
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    passes: dict[str, list[int]] = {}
    texts: dict[str, dict[str, str]] = {}
    for _ in range(int(options["repeats"])):
        for name, ask in variants.items():
            with counted(policy.model) as seen:
                began = time.perf_counter()
                texts[name] = ask()
                seconds[name].append(time.perf_counter() - began)
            passes[name] = seen
    return _table(seconds, passes, texts)


def _table(
    seconds: dict[str, list[float]], passes: dict[str, list[int]], texts: dict[str, dict[str, str]]
) -> Table:
    columns = ("passes", "positions", "beyond", "other texts")
    table = Table("variant", "seconds", "time against plain", *columns)
    base, first = min(seconds["plain"]), texts["plain"]
    for name, took in seconds.items():
        other = sum(texts[name][row] != text for row, text in first.items())
        calls, positions = passes[name]
        table.add_row(
            name,
            f"{min(took):.2f}",
            f"{min(took) / base:.2f}",
            str(calls),
            str(positions),
            str(positions - passes["plain"][1]),
            f"{other} of {len(first)}",
        )
    return table


def extracted(options: dict[str, str]) -> Table:
    """Seconds to compute vectors on the SFT weights of a run, in bf16 as evaluation does."""
    run = Run(Path(options["run"]))
    sets = ["data=paper", f"data.root={options['root']}"] if options["root"] else ["data=demo"]
    settings = settings_of(f"model={options['model']}", *sets)
    policy = folders.open_adapter(run.stage("sft"), Precision.bf16)
    model = resolving.model_of(run.config(), trust_remote_code=False)
    chat = prompts.chat_format(policy.tokenizer, model)
    table = Table("vectors of", "seconds", "what was found", title=f"extraction on {run.folder}")
    for method in ("ablation", "scans", "surgical"):
        chosen = replace(settings.steering, method=method)
        chosen.surgical.train = int(options["train"])
        chosen.surgical.validation = int(options["validation"])
        began = time.perf_counter()
        record = steering.steer(policy, chat, settings.data, chosen, settings.seed).record
        seconds = time.perf_counter() - began
        asked = ("block", "blocks", "threshold", "kept", "ablated", "added")
        told = ", ".join(f"{key} {record[key]}" for key in asked if key in record)
        table.add_row(method, f"{seconds:.1f}", told)
    return table


def main() -> None:
    extensions.hand_in_passes()
    options = OPTIONS | dict(argument.split("=", 1) for argument in sys.argv[1:])
    torch.set_num_threads(int(options["threads"]))
    print(OmegaConf.to_yaml(options).strip())
    console = Console(width=110)
    console.print(compared(settings_of(f"model={options['model']}", "data=demo"), options))
    if options["run"]:
        console.print(extracted(options))


if __name__ == "__main__":
    main()
