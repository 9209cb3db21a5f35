"""Command line of dcr.choice: the settings of train.py, and four of its own."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from dcr import cli, config, storage
from dcr.choice.choosing import choose
from dcr.choice.origins import LIMIT
from dcr.choice.text import describe
from dcr.config import ConfigError, TrainConfig, UserError
from dcr.text import label_of, single_line

CONF = Path(__file__).resolve().parents[2] / "conf"
USAGE = (
    f"python -m dcr.choice [any setting of train.py] [limit={LIMIT}] "
    "[pairs=<seemingly toxic>:<toxic>,…|none] [tests=<seemingly toxic>:<toxic>,…] [out=<file.json>]"
)


@dataclass(frozen=True)
class Options:
    """What is not a setting of train.py."""

    limit: int = LIMIT
    pairs: str | None = None
    tests: str | None = None
    out: str | None = None


def main(arguments: Sequence[str]) -> int:
    """Print the comparison and the file's place; one line and 2 for a user's error."""
    if {"-h", "--help"} & set(arguments):
        print(f"usage: {USAGE}")
        return 0
    try:
        cli.prepare()
        with cli.faults_in_words():
            options, overrides = _options(arguments)
            settings = _settings(overrides)
            out = _out(options, settings)
            choice = choose(settings, limit=options.limit, pairs=options.pairs, tests=options.tests)
            storage.write_json(out, choice.record())
    except UserError as error:
        print(f"error: {single_line(error)}", file=sys.stderr)
        return error.exit_code
    print(f"{describe(choice)}\n\n{out}")
    return 0


def _options(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """The command's own options, and everything else."""
    given: dict[str, Any] = {}
    others = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or argument.startswith("-"):
            raise ConfigError(f"{argument}: settings are written key=value; {USAGE}")
        if key not in Options.__dataclass_fields__:
            others.append(argument)
        elif key == "limit" and not value.isdecimal():
            raise ConfigError(f"limit={value}: give a whole number of prompts of each class")
        elif not value:
            raise ConfigError(f"{argument}: give a value or leave it out")
        else:
            given[key] = int(value) if key == "limit" else value
    return Options(**given), others


def _settings(overrides: list[str]) -> TrainConfig:
    """As train.py resolves them."""
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            composed = compose("train", overrides)
    except (HydraException, ValueError) as error:
        raise ConfigError(config.one_line(error, TrainConfig)) from error
    named = [override.lstrip("+~").split("=")[0] for override in overrides]
    fields = [key.removeprefix("model.") for key in named if key.startswith("model.")]
    config.leave_numbers_of_another_model(composed, fields)
    return config.resolve(composed, TrainConfig)


def _out(options: Options, settings: TrainConfig) -> Path:
    label = f"{settings.model.label or label_of(settings.model.name)}-{settings.data.label}"
    out = Path(options.out or f"outputs/choice/{label_of(label)}.json")
    if out.is_dir() or out.suffix != ".json":
        raise UserError(f"out={out}: name a .json file")
    return out


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
