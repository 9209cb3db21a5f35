"""A bias for weights that were tuned on, chosen anew and written into their folder."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from dcr import chat_templates, entry, extensions, gating
from dcr.calibration import CalibrationConfig, relations
from dcr.core import machine, prompts, storage
from dcr.core.config import ConfigError, Language, ModelConfig, Precision
from dcr.extensions import EvalSettings

log = logging.getLogger(__name__)

FILE = "generation_config.json"
DEFAULT = CalibrationConfig()


@dataclass
class Options:
    """python -m dcr.recalibration model=<folder> calibrate=0.8

    Chooses the bias on the first token of refusals anew, as after a tuning of one's own, and writes
    it into the folder's generation config, with its record in calibration.json. Nothing else there
    changes; an adapter's folder gets the generation config of its base.
    """

    model: Path = entry.option("a model's or an adapter's folder, with its tokenizer")
    calibrate: str = entry.option(
        "the share of toxic prompts to refuse, or a run whose share is to be reached, or a "
        "calibrated export whose bias is taken"
    )
    toxic: list[str] = entry.option("toxic validation prompts; none: held-out contrasts", [])
    seemingly_toxic: list[str] = entry.option("seemingly toxic ones; none: likewise", [])
    language: str | None = entry.option(
        "of the answers; none: that which an export names, else en",
        None,
        choices=[language.value for language in Language],
    )
    root: str | None = entry.option("a local folder with the sets' files", None, key="data.root")
    precision: str = entry.option(
        "of the weights while they answer; auto: what the device does natively",
        "auto",
        choices=("auto", "bf16", "fp32"),
    )
    trust_remote_code: bool = entry.option("run code that comes with the weights", False)


@entry.command(Options)
def main(options: Options) -> None:
    folder, settings = options.model, _settings(options)
    from dcr.calibration import biases
    from dcr.core import models
    from dcr.core.evaluation import check_names
    from dcr.core.models import folders, structure

    biases.check(settings, {"method": "base"})
    check_names(biases.validation(settings))
    machine.use_threads()
    extensions.hand_in_passes()
    if folders.is_adapter(folder):
        policy = folders.open_adapter(folder, settings.precision, options.trust_remote_code)
    else:
        policy = models.open_policy(settings.model, settings.precision)
    machine.to_gpu(policy.model, "auto")
    named, spoken = options.language, policy.tokenizer
    language = Language(named) if named else chat_templates.kept_language(spoken)
    settings.model.language = language
    chat = prompts.chat_format(policy.tokenizer, settings.model)
    bias, record = biases.calibrated(policy, chat, settings)
    decoding = structure.unwrapped(policy.model).generation_config
    decoding.sequence_bias = bias.sequences
    if decoding.do_sample:
        log.warning(
            "%s asks for sampling; the share of refusals holds only for greedy decoding",
            folder / FILE,
        )
    if (folder / "README.md").exists():
        log.warning("%s may still name the old bias; please correct it", folder / "README.md")
    storage.write_text(folder / FILE, decoding.to_json_string())
    storage.write_json(folder / "calibration.json", record)
    for name, of in record["sets"].items():
        print(f"{name}: {of['plain']} of {of['n']} refused, {of['refused']} with the bias")
    print(f"bias {bias.bias:+.3f}: {folder / FILE}")


def _settings(options: Options) -> EvalSettings:
    """The settings of the answers. Raises ConfigError for a folder or settings that cannot be."""
    folder = options.model
    if not folder.is_dir():
        raise ConfigError(f"model={folder}: not a folder; name the one of the tuned weights")
    if (folder / storage.CHECKSUMS).exists():
        raise ConfigError(
            f"model={folder}: is a run's own, which stays as it was made; export it, with "
            "python -m dcr.export calibrate="
        )
    if (folder / "gate" / gating.RECORD).exists():
        raise ConfigError(
            f"model={folder}: holds a gate, and a bias is chosen on answers without one; move "
            "gate/ away to answer without it"
        )
    asked = machine.settled({"evaluation": Precision(options.precision)})
    settings = EvalSettings(
        model=ModelConfig(name=str(folder), trust_remote_code=options.trust_remote_code),
        calibrate=options.calibrate,
        precision=asked.precisions["evaluation"],
        calibration=CalibrationConfig(
            options.toxic or DEFAULT.toxic, options.seemingly_toxic or DEFAULT.seemingly_toxic
        ),
    )
    settings.data.root = options.root
    for fault in relations(settings):
        raise ConfigError(fault)
    return settings


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
