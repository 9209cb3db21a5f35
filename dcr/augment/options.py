"""The command line: what is this command's own, and for the rest the settings of `eval.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from dcr import cli, config, endpoints, judges
from dcr.augment import checking
from dcr.config import ConfigError, EvalConfig, Steering
from dcr.evaluation import subjects
from dcr.text import label_of

CONF = Path(__file__).parents[2] / "conf"


@dataclass(frozen=True)
class Options:
    """What the command line may hold besides settings of `eval.py`."""

    source: str = ""
    out: Path = Path()
    count: int | None = None
    attempts: int = 1


OWN = ("source", "out", "count", "attempts")


def read(arguments: Sequence[str]) -> tuple[Options, EvalConfig]:
    """Raises ConfigError, in one line, for whatever cannot be."""
    own: dict[str, str] = {}
    overrides: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument}: cannot be read; settings are written key=value")
        if key in OWN:
            own[key] = value
        else:
            one = key == "judge" and "[" not in value  # where Hydra wants a list
            overrides.append(f"judge=[{value}]" if one else argument)
    return _options(own), _settings(overrides)


def _options(own: dict[str, str]) -> Options:
    for key in ("source", "out"):
        if not own.get(key):
            raise ConfigError(
                f"{key}: nothing given; say which prompts with source=<name or .jsonl> and where "
                "their answers go with out=<file.jsonl>"
            )
    if not own["out"].endswith(".jsonl"):
        raise ConfigError(f"out={own['out']}: training reads files that end in .jsonl; add it")
    return Options(
        own["source"],
        Path(own["out"]),
        _number(own, "count") if "count" in own else None,
        _number(own, "attempts") if "attempts" in own else Options.attempts,
    )


def _number(own: dict[str, str], key: str) -> int:
    if not own[key].isdecimal() or int(own[key]) < 1:
        raise ConfigError(f"{key}={own[key]}: give 1 or more")
    return int(own[key])


def _settings(overrides: Sequence[str]) -> EvalConfig:
    """As `eval.py` would read them; sets of `data` that are not named are the embedded ones."""
    keys = {override.partition("=")[0].lstrip("+") for override in overrides}
    data = [] if "data" in keys else ["data=demo"]
    cli.prepare()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            composed = compose("eval", [*data, *overrides])
    except HydraException as error:
        raise ConfigError(config.one_line(error, EvalConfig, Options)) from error
    if composed.run is not None:
        raise ConfigError(
            f"run={composed.run}: give model=<name or folder> or endpoint=<url>; "
            "python -m dcr.export makes a folder of a run"
        )
    named = {"model", "model.name"} & keys
    if (composed.endpoint is not None) == bool(named):
        raise ConfigError("who answers? give either model=<name> or endpoint=<url>")
    if composed.endpoint is not None:
        name = str(composed.endpoint_model or "unnamed")  # which the checks then refuse
        composed.model.name, composed.model.label = name, label_of(name)
    return config.resolve(composed, EvalConfig)


def check(told: Options, settings: EvalConfig, most: int) -> None:
    """Raises a UserError for what can be known wrong before anything is read or loaded.

    `most` is the number of attempts there are instructions for.
    """
    if told.attempts > most:
        raise ConfigError(f"attempts={told.attempts}: give 1 to {most}")
    if settings.steering.method is not Steering.none:
        raise ConfigError(f"steering={settings.steering.method.value}: not done here; leave it out")
    for name in settings.judge:
        if not checking.judges_compliance(name):
            raise ConfigError(
                f"judge={name.value}: does not say whether a harmless prompt was answered; "
                "use llm or wildguard"
            )
    judges.check(settings.judge, settings)
    if settings.endpoint is not None:
        if settings.gen.self_cd:
            raise ConfigError(
                f"gen.self_cd={settings.gen.self_cd}: an endpoint shows no logits to contrast; "
                "leave it out, or name the model with model="
            )
        endpoints.check(subjects.server_of(settings), "endpoint")


def author(settings: EvalConfig) -> str:
    """Who answers, as it stands in every row."""
    return str(settings.endpoint_model) if settings.endpoint is not None else settings.model.name
