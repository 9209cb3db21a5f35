"""The command that trains a gate."""

import sys
from dataclasses import dataclass
from pathlib import Path

from dcr import cli, entry, resolving
from dcr.extensions import TrainSettings
from dcr.gate import Recipe


@dataclass
class Options:
    """python -m dcr.gate model.name=<folder or hub id> [out=<folder>] [any setting of train.py]

    Trains a gate: the model as a classifier that tells toxic from seemingly toxic prompts, on the
    pairs of sft.readout. eval.py, dcr.export and dcr.chat put it in front of a model with
    gate=<folder>. The same command continues after a kill.
    """

    out: Path = entry.option("a new folder for the gate", Path("outputs/gate"))
    lr: float = entry.option("the highest learning rate", Recipe.lr, least=1e-9, most=1)
    epochs: int = entry.option("how often each pair is seen", Recipe.epochs, least=1)
    batch_size: int = entry.option("prompts a step", Recipe.batch_size, least=1)
    framed: float = entry.option(
        "the share of pairs that stand in other words around them", Recipe.framed, least=0, most=1
    )
    settings: list[str] = entry.settings_of("train.py")


@entry.command(Options, goes_on=True)
def main(options: Options) -> None:
    settings = resolving.resolve(cli.compose("train", options.settings, Options), TrainSettings)
    recipe = Recipe(options.lr, options.epochs, options.batch_size, options.framed)
    from dcr.gate import training  # with torch, which a user's error need not wait for

    found = training.train(settings, recipe, options.out)["heldout_auroc"]
    print("AUROC {:.2f} [{:.2f}–{:.2f}] on held-out pairs".format(*found))
    print(options.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
