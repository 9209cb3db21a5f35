"""The command of dcr.choice: a table of layers, one of pairs, the conclusions, and a JSON file."""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from dcr import cli, entry, resolving
from dcr.choice.origins import FEWEST, LIMIT
from dcr.core import machine, storage
from dcr.core.config import Precision, UserError
from dcr.core.statistics import Interval
from dcr.core.text import label_of
from dcr.extensions import TrainSettings

if TYPE_CHECKING:
    from dcr.choice.transfer import Choice

CHANCE = 0.5
WEAK = 0.65  # a mean transfer below it is hardly better than guessing


@dataclass
class Options:
    """python -m dcr.choice model=<name> data=<name> [data.root=<data>] [pairs=<a>:<b>,...]

    Says which layer and which pair of sources stage one should use: those on which a fitted linear
    probe best tells toxic from seemingly toxic prompts of another origin.
    """

    limit: int = entry.option(f"prompts of each class of a pair, {FEWEST} or more", LIMIT)
    pairs: str | None = entry.option(
        "candidates beside the configured pair, <seemingly toxic>:<toxic>,... with + between "
        "sources of one side; 'none': no others; not given: the usual ones that can be read",
        None,
    )
    tests: str | None = entry.option(
        "pairs to test on, in the same form; not given: the benchmarks that can be read", None
    )
    out: Path | None = entry.option(
        "a .json file; not given: outputs/choice/<model>-<data>.json", None
    )
    precision: str = entry.option(
        "of the model; auto: what the device does natively",
        "auto",
        choices=[each.value for each in Precision],
    )
    settings: list[str] = entry.settings_of("train.py")


@entry.command(Options)
def main(options: Options) -> None:
    words = [*options.settings, f"precision={options.precision}"]
    settings = resolving.resolve(cli.compose("train", words, Options), TrainSettings)
    label = f"{settings.model.label or label_of(settings.model.name)}-{settings.data.label}"
    out = Path(options.out or f"outputs/choice/{label_of(label)}.json")
    if out.is_dir() or out.suffix != ".json":
        raise UserError(f"out={out}: name a .json file")
    stage_one = {"contrastive": settings.dcr.precision}
    arithmetic = machine.settled(stage_one, settings.trainer.accelerator)
    arithmetic.say()
    node = replace(settings.dcr, precision=arithmetic.precisions["contrastive"])
    settings = replace(settings, dcr=node)
    machine.use_threads(settings.trainer.threads)
    from dcr.choice import transfer  # with torch, for which help and a user's error do not wait

    found = transfer.choose(settings, limit=options.limit, pairs=options.pairs, tests=options.tests)
    found = replace(found, notes=[*found.notes, f"precision: {arithmetic.told}"])
    storage.write_json(out, found.record())
    print(f"{describe(found)}\n\n{out}")


def describe(choice: "Choice") -> str:
    """Tables and conclusions, 100 columns wide."""
    return entry.plain_text(
        f"Layer and sources for stage one on {choice.model}: AUROC of a linear probe, toxic against"
        "\nseemingly toxic, cross-validated within the training sources, and its transfer, the mean"
        "\nover test sets of another origin. 0.5 is guessing.\n",
        _layer_table(choice),
        _pair_table(choice),
        *(f"- {line}" for line in (*_conclusions(choice), *choice.notes)),
    )


def _layer_table(choice: "Choice") -> Table:
    pair = choice.pairs[0]
    tests = list(pair.best.tests)
    table = entry.table(f"Layers, {pair.pair}", ["dcr.layer", "within", "transfer", "95%", *tests])
    for layer in pair.layers:
        marks = [" best"] * (layer.layer == choice.layer)
        marks += [" configured"] * (layer.layer == choice.configured)
        measured = [_number(layer.within), _number(layer.transfer), _ends(layer.transfer)]
        by_test = (_number(layer.tests[name]) for name in tests)
        table.add_row(f"{layer.layer}{''.join(marks)}", *measured, *by_test)
    return table


def _pair_table(choice: "Choice") -> Table:
    heads = ("rows", "questions", "form", "dcr.layer", "within", "transfer", "on common sets")
    title = "Pairs of sources, at the best layer of each"
    table = entry.table(title, ["seemingly toxic / toxic", *heads])
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


def _conclusions(choice: "Choice") -> list[str]:
    """The best layer, the best pair, and what speaks against either, a sentence each."""
    configured, best = choice.pairs[0], choice.pairs[0].best
    lines = [
        f"dcr.layer={best.layer}: the probe on {configured.pair} transfers best there, "
        f"{_number(best.transfer)} {_ends(best.transfer)}"
    ]
    if len(choice.pairs) > 1:
        first = choice.by_transfer()[0]
        named = (f"data.{kind.value}.source=[{','.join(of)}]" for kind, of in first.pair.sides)
        if (top := first.on(choice.common)) is None:
            lines.append("no pair is best: no test set is common to all")
        elif top.low <= CHANCE:
            lines.append(f"no pair transfers better than guessing, {_number(top)} {_ends(top)}")
        else:
            sets = ", ".join(choice.common)
            measured = f"{_number(top)} {_ends(top)}"
            lines.append(f"{' '.join(named)} transfers best on {sets}, {measured}")
    lines += [f"{p.pair}: {p.balance.warning}" for p in choice.pairs if p.balance.warning]
    if best.transfer.estimate < WEAK and best.within.estimate > best.transfer.estimate:
        lines.append(
            f"{configured.pair}: at no layer does the probe separate other sets nearly as well as "
            f"these ({_number(best.within)}), so intent may not be what separates these sources"
        )
    tests = ", ".join(dict.fromkeys(name for pair in choice.pairs for name in pair.best.tests))
    return [*lines, f"scores on {tests} do not test this choice: it used their labels"]


def _number(interval: Interval) -> str:
    return "-" if math.isnan(interval.estimate) else f"{interval.estimate:.2f}"


def _ends(interval: Interval) -> str:
    return f"[{interval.low:.2f}, {interval.high:.2f}]"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
