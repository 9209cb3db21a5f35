"""Results of stages opened again: whole weights, or an adapter on its base, wherever that moved."""

import warnings
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open

from dcr.core import storage
from dcr.core.config import (
    EMBEDDED_MODEL,
    ConfigError,
    ModelConfig,
    Precision,
    Quantization,
    check_installed,
)
from dcr.core.models import (
    ORIGIN_FILE,
    Policy,
    check_finite,
    check_tokenizer,
    held_model,
    open_folder,
    refused_as,
    result_tokenizer,
    source_of,
)
from dcr.core.storage import weights_fingerprint


@dataclass(frozen=True)
class AdapterSettings:
    """The fields of PEFT's `adapter_config.json` in use."""

    base_model_name_or_path: str
    revision: str | None = None
    megatron_config: object = None  # PEFT would import a module named beside it


@dataclass(frozen=True)
class Origin:
    """`dcr.json`: an adapter's base weights; a folder's path is relative to the adapter."""

    base: str
    fingerprint: str | None
    quantization: Quantization = Quantization.none  # of the base; older adapters lack it


def adapter_base(folder: Path) -> str:
    """The base weights of an adapter folder, also after its run folder moved.

    Raises UserError if the folder is damaged, or its base is gone, damaged or other than in
    training.
    """
    storage.check_checksums(folder, needed=(folder / ORIGIN_FILE).exists())
    named = storage.read_json(folder / "adapter_config.json", AdapterSettings)
    if not (folder / ORIGIN_FILE).exists():
        base = named.base_model_name_or_path
        if is_adapter(Path(base)):  # perhaps itself
            raise ConfigError(f"{folder}: its base {base} is an adapter, too; merge that one first")
        return base
    origin = storage.read_json(folder / ORIGIN_FILE, Origin)
    if origin.fingerprint is None:
        return origin.base
    place = Path(named.base_model_name_or_path)
    base = next((p for p in (folder / origin.base, place) if p.is_dir()), None)
    if base is None and place.name == EMBEDDED_MODEL:
        base = Path(source_of(ModelConfig(name=place.name)))  # each machine converts its own
    if base is None:
        raise ConfigError(f"{folder}: its base weights {place} are gone; restore them")
    storage.check_checksums(base.resolve(), needed=False)
    if weights_fingerprint(base) != origin.fingerprint:
        raise ConfigError(
            f"{folder}: {base.resolve()} is not the base this adapter was trained on; restore that"
        )
    return str(base.resolve())


def is_adapter(folder: Path) -> bool:
    """Whether a folder, damaged or not, holds an adapter rather than whole weights."""
    return any((folder / name).exists() for name in (ORIGIN_FILE, "adapter_config.json"))


def open_result(
    folder: Path,
    precision: Precision,
    trust_remote_code: bool = False,
    quantization: Quantization = Quantization.none,
) -> Policy:
    """The result of a stage in evaluation mode: whole weights, or an adapter on its base.

    `quantization` is that of whole weights. Raises UserError as `open_folder` and `open_adapter`
    do.
    """
    if is_adapter(folder):
        return open_adapter(folder, precision, trust_remote_code)
    return open_folder(str(folder), precision, trust_remote_code, quantization)


def open_adapter(folder: Path, precision: Precision, trust_remote_code: bool = False) -> Policy:
    """The adapter in `folder` on its base weights, held as it was trained on them, for evaluation.

    Raises UserError if either is damaged, or if the base is gone, changed or does not fit.
    """
    base = adapter_base(folder)
    settings = storage.read_json(folder / "adapter_config.json", AdapterSettings)
    if settings.megatron_config is not None:
        raise ConfigError(f"{folder}: its megatron_config names a module to import; remove it")
    quantization = Quantization.none
    if (folder / ORIGIN_FILE).exists():
        quantization = storage.read_json(folder / ORIGIN_FILE, Origin).quantization
    if quantization is Quantization.nf4:
        check_installed("bitsandbytes", "memory", f"{folder}: was trained on weights in four bits")
    options = {"revision": settings.revision, "trust_remote_code": trust_remote_code}
    with refused_as(str(folder)):
        model = held_model(base, precision, quantization, **options)
        tokenizer = result_tokenizer(folder, trust_remote_code)
        adapted = _adapted(model, folder, base).eval()
        check_finite(adapted, str(folder))
    check_tokenizer(str(folder), tokenizer, model.config.get_text_config().vocab_size)
    return Policy(adapted, tokenizer, str(folder))


def _adapted(model: object, folder: Path, base: str) -> PeftModel:
    unfit = ConfigError(
        f"{folder}: its weights do not fit those of {base}: another model's adapter"
    )
    with warnings.catch_warnings():
        # PEFT warns of a base that is not the path in the file, which moves with the run, and of
        # weights without a counterpart, which are an error below.
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
