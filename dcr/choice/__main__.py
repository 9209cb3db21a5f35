"""The command of dcr.choice: two tables, of layers and of pairs, the reasons, and a JSON file."""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from dcr import choice, entry
from dcr.choice.origins import FEWEST, LIMIT
from dcr.core import cli, config, precision, storage, threads
from dcr.core.config import Precision, TrainConfig, UserError
from dcr.core.statistics import Interval
from dcr.core.text import label_of

if TYPE_CHECKING:
    from dcr.choice import Choice

CHANCE = 0.5
WEAK = 0.65  # a mean transfer below it is hardly better than guessing


@dataclass
class Options:
    """python -m dcr.choice model=<name> data=<name> [data.root=<data>] [pairs=<a>:<b>,...]

    Which layer and which pair of sources stage one should use: how well a linear probe that is
    fitted to them tells toxic from seemingly toxic prompts of another origin.
    """

    limit: int = entry.option(f"prompts of each class of a pair, {FEWEST} or more", LIMIT)
    pairs: str | None = entry.option(
        "other candidates, <seemingly toxic>:<toxic>,... with + between sources of one side; "
        "'none': the configured pair alone; not given: the usual ones that can be read",
        None,
    )
    tests: str | None = entry.option(
        "pairs to test on, written alike; not given: the benchmarks that can be read", None
    )
    out: Path | None = entry.option(
        "a .json file; not given: outputs/choice/<model>-<data>.json", None
    )
    precision: str = entry.option(
        "of the model; auto: what the device does natively",
        "auto",
        choices=[each.value for each in Precision],
    )
    settings: list[str] = entry.option(
        "any setting of train.py; python train.py --cfg job lists them", [], rest=True
    )


@entry.command(Options)
def main(options: Options) -> None:
    words = [*options.settings, f"precision={options.precision}"]
    settings = config.resolve(cli.compose("train", words, Options), TrainConfig)
    out = _out(options, settings)
    stage_one = {"contrastive": settings.dcr.precision}
    arithmetic = precision.settled(stage_one, settings.trainer.accelerator)
    arithmetic.say()
    node = replace(settings.dcr, precision=arithmetic.precisions["contrastive"])
    settings = replace(settings, dcr=node)
    threads.use(settings.trainer.threads)
    found = choice.choose(settings, limit=options.limit, pairs=options.pairs, tests=options.tests)
    found = replace(found, notes=[*found.notes, f"precision: {arithmetic.told}"])
    storage.write_json(out, found.record())
    print(f"{describe(found)}\n\n{out}")


def _out(options: Options, settings: TrainConfig) -> Path:
    label = f"{settings.model.label or label_of(settings.model.name)}-{settings.data.label}"
    out = Path(options.out or f"outputs/choice/{label_of(label)}.json")
    if out.is_dir() or out.suffix != ".json":
        raise UserError(f"out={out}: name a .json file")
    return out


def describe(choice: "Choice") -> str:
    """Tables and conclusions, 100 columns wide."""
    reasons = _of_layer(choice), *_of_sources(choice), _selected_on(choice), *choice.notes
    return entry.plain_text(
        f"Layer and sources for stage one on {choice.model}: AUROC of a linear probe,\n"
        "toxic against seemingly toxic. within: cross-validated on the training sources;\n"
        "transfer: the mean over test sets of another origin. 0.5 is guessing.\n",
        _layer_table(choice),
        _pair_table(choice),
        *(f"- {reason}" for reason in reasons),
    )


def _layer_table(choice: "Choice") -> Table:
    pair = choice.pairs[0]
    tests = list(pair.best.tests)
    table = entry.table(f"Layers, {pair.pair}", ["dcr.layer", "within", "transfer", "95%", *tests])
    for layer in pair.layers:
        marks = [
            *(["best"] if layer.layer == choice.layer else []),
            *(["configured"] if layer.layer == choice.configured else []),
        ]
        table.add_row(
            " ".join([str(layer.layer), *marks]),
            _number(layer.within),
            _number(layer.transfer),
            _ends(layer.transfer),
            *(_number(layer.tests[name]) for name in tests),
        )
    return table


def _pair_table(choice: "Choice") -> Table:
    heads = [
        "seemingly toxic / toxic",
        "rows",
        "questions",
        "form",
        "dcr.layer",
        "within",
        "transfer",
    ]
    table = entry.table("Pairs of sources, at the best layer of each", [*heads, "on common sets"])
    for pair in choice.by_transfer():
        best, shared = pair.best, pair.on(choice.common)
        table.add_row(
            str(pair.pair) + (" (configured)" if pair is choice.pairs[0] else ""),
            " / ".join(map(str, pair.rows)),
            " / ".join(f"{share:.0%}" for share in pair.balance.questions),
            "-" if pair.balance.form is None else f"{pair.balance.form:.2f}",
            str(best.layer),
            _number(best.within),
            _number(best.transfer),
            f"{_number(shared)} {_ends(shared)}" if shared else "-",
        )
    return table


def _of_layer(choice: "Choice") -> str:
    pair = choice.pairs[0]
    transfer = pair.best.transfer
    return (
        f"dcr.layer={pair.best.layer}: the probe fitted there to {pair.pair} transfers best, "
        f"{_number(transfer)} {_ends(transfer)}"
    )


def _of_sources(choice: "Choice") -> list[str]:
    lines = [_of_best_pair(choice)] if len(choice.pairs) > 1 else []
    for pair in choice.pairs:
        lines += [f"{pair.pair}: {pair.balance.warning}"] if pair.balance.warning else []
    best = choice.pairs[0].best
    if best.transfer.estimate < WEAK and best.within.estimate > best.transfer.estimate:
        lines.append(
            f"{choice.pairs[0].pair}: told apart within ({_number(best.within)}) but hardly "
            "elsewhere at any layer: what separates these sources may well not be intent"
        )
    return lines


def _of_best_pair(choice: "Choice") -> str:
    names, first = choice.common, choice.by_transfer()[0]
    top = first.on(names)
    if top is None:
        return "no test set is common to all pairs, so they are not ranked: compare within tests"
    if top.low <= CHANCE:
        return (
            f"no pair transfers better than guessing on the sets common to all: the best is "
            f"{first.pair}, {_number(top)} {_ends(top)}"
        )
    return (
        f"data.seemingly_toxic.source={_override(first.pair.seemingly_toxic)} "
        f"data.toxic.source={_override(first.pair.toxic)} transfers best on the sets common to "
        f"all pairs ({', '.join(names)}), {_number(top)} {_ends(top)}"
    )


def _selected_on(choice: "Choice") -> str:
    tests = ", ".join(dict.fromkeys(name for pair in choice.pairs for name in pair.best.tests))
    return (
        f"the labels of {tests} were looked at: a score on these sets is no longer blind to the "
        "choice, and the best of many layers looks better than it is"
    )


def _override(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"[{','.join(names)}]"


def _number(interval: Interval) -> str:
    return "-" if math.isnan(interval.estimate) else f"{interval.estimate:.2f}"


def _ends(interval: Interval) -> str:
    return f"[{interval.low:.2f}, {interval.high:.2f}]"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
