"""The command line of exports: see dcr.export."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from dcr.config import ConfigError, UserError
from dcr.export import DTYPES, ROUNDED, export, relink
from dcr.runs import Run
from dcr.text import single_line

STAGES = ("sft", "contrastive")


@dataclass(frozen=True)
class Options:
    """What the command line may hold."""

    run: str = ""
    out: str = ""
    stage: str = "sft"
    dtype: str = "bfloat16"
    relink: bool = False


def main(arguments: Sequence[str]) -> None:
    """Raises UserError for whatever a user can mend; nothing is then written."""
    options = _options(arguments)
    run = Run(Path(options.run))
    if options.relink:
        for folder, base in relink(run).items():
            print(f"{folder} stands on {base}")
    else:
        print(export(run, Path(options.out), options.stage, options.dtype))
        if DTYPES[options.dtype] is not torch.float32:
            print(ROUNDED)


def _options(arguments: Sequence[str]) -> Options:
    kinds = {entry.name: entry.type for entry in fields(Options)}
    given: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in kinds:
            raise ConfigError(f"{argument}: no such setting; give {', '.join(kinds)} as key=value")
        if kinds[key] is bool and value not in ("true", "false"):
            raise ConfigError(f"{argument}: give true or false")
        given[key] = value == "true" if kinds[key] is bool else value
    options = Options(**given)
    if not options.run or not (options.out or options.relink):
        raise ConfigError("give run=<folder> and out=<folder>, or run=<folder> relink=true")
    for value, key, known in ((options.stage, "stage", STAGES), (options.dtype, "dtype", DTYPES)):
        if value not in known:
            raise ConfigError(f"{key}={value}: give {' or '.join(known)}")
    return options


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {single_line(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
