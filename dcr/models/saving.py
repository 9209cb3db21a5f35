"""Results as Hugging Face and PEFT folders, opened again wherever their run folder went."""

import json
import os
import warnings
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoTokenizer

from dcr.config import EMBEDDED_MODEL, TINY_MODEL, ConfigError, Precision
from dcr.models.files import weights_fingerprint
from dcr.models.opening import DTYPES, Policy, embedded_folder, refused_as, whole_model
from dcr.storage import replaced_folder

ORIGIN_FILE = "dcr.json"  # beside an adapter: which weights it stands on, with their fingerprint


def save_full(policy: Policy, folder: Path) -> None:
    """Weights and tokenizer as a plain Hugging Face folder, whole or not at all."""
    with replaced_folder(folder) as staging:
        policy.model.save_pretrained(staging)
        policy.tokenizer.save_pretrained(staging)


def save_adapter(policy: Policy, folder: Path, base: Path | str) -> None:
    """A PEFT adapter folder that names the weights it was trained on.

    `adapter_config.json` holds the absolute path (what `peft` opens), `dcr.json` the relative
    one with a fingerprint (what survives a move of the run folder).
    """
    local = Path(base).is_dir()
    name = str(Path(base).resolve()) if local else str(base)
    origin = {
        "base": os.path.relpath(name, folder.resolve()) if local else name,
        "fingerprint": weights_fingerprint(Path(base)) if local else None,
    }
    with replaced_folder(folder) as staging:
        for settings in policy.model.peft_config.values():
            settings.base_model_name_or_path = name
        # no embedding was resized; to find that out PEFT would ask the hub for the base
        policy.model.save_pretrained(staging, save_embedding_layers=False)
        policy.tokenizer.save_pretrained(staging)
        (staging / ORIGIN_FILE).write_text(json.dumps(origin, indent=1) + "\n")


def adapter_base(folder: Path) -> str:
    """The weights that an adapter folder stands on, found again after its run folder moved.

    Raises ConfigError when they are gone or are not those it was trained on.
    """
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    if not (folder / ORIGIN_FILE).exists():
        return named
    origin = json.loads((folder / ORIGIN_FILE).read_text())
    if origin["fingerprint"] is None:
        return origin["base"]
    base = next((p for p in (folder / origin["base"], Path(named)) if p.is_dir()), None)
    if base is None and Path(named).name == EMBEDDED_MODEL:
        base = embedded_folder()  # each machine converts its own
    if base is None:
        raise ConfigError(f"{folder}: its base weights {named} are gone; restore them")
    if weights_fingerprint(base) != origin["fingerprint"]:
        raise ConfigError(
            f"{folder}: {base.resolve()} is not the base this adapter was trained on; restore that"
        )
    return str(base.resolve())


def open_folder(folder: str, precision: Precision, trust_remote_code: bool = False) -> Policy:
    """A full Hugging Face folder, such as a run's `contrastive/`, in evaluation mode.

    Raises ConfigError when it cannot be read or its weights are not whole.
    """
    with refused_as(folder):
        model = whole_model(folder, DTYPES[precision], trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return Policy(model, tokenizer, folder)


def open_adapter(folder: Path, precision: Precision, trust_remote_code: bool = False) -> Policy:
    """The adapter in `folder` on its base weights, in evaluation mode.

    Raises ConfigError when the base is gone, was changed, or is none that the adapter fits.
    """
    base = adapter_base(folder)
    if base == TINY_MODEL:
        raise ConfigError(
            f"{folder}: stands on model=tiny, which is only made in memory; "
            "train with method=dcr or on a model in a folder"
        )
    revision = json.loads((folder / "adapter_config.json").read_text()).get("revision")
    with refused_as(str(folder)):
        model = whole_model(
            base, DTYPES[precision], revision=revision, trust_remote_code=trust_remote_code
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return Policy(_adapted(model, folder, base).eval(), tokenizer, str(folder))


def _adapted(model: object, folder: Path, base: str) -> PeftModel:
    unfit = ConfigError(
        f"{folder}: its weights do not fit those of {base}: another model's adapter"
    )
    with warnings.catch_warnings():
        # It warns of a base unlike the path in the file, which moves with the run, and of weights
        # without a counterpart, which are an error below.
        warnings.simplefilter("ignore")
        try:
            adapted = PeftModel.from_pretrained(model, folder)  # pyright: ignore[reportArgumentType]
        except (RuntimeError, ValueError) as error:  # other shapes; targets that match nothing
            raise unfit from error
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        saved = set(file.keys())
    if saved != set(get_peft_model_state_dict(adapted, save_embedding_layers=False)):
        raise unfit
    return adapted
