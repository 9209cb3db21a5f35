"""`python -m dcr.plan`, which prints the same as `train.py plan=true`."""

import sys
from dataclasses import dataclass

from dcr import entry, plan
from dcr.core import cli
from dcr.core.config import resolving
from dcr.extensions import TrainSettings


@dataclass
class Options:
    """python -m dcr.plan [any setting of train.py]

    Says what a training command would do, without loading a weight: rows, parameters, steps, and
    estimates of memory and time. The same as train.py plan=true.
    """

    settings: list[str] = entry.option(
        "any setting of train.py; python train.py --cfg job lists them", [], rest=True
    )


@entry.command(Options)
def main(options: Options) -> None:
    composed = cli.compose("train", options.settings, Options)
    print(plan.describe(resolving.resolve(composed, TrainSettings)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
