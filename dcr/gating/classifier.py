"""A gate opened from its folder: a sequence classifier of one logit, and its chat format."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from dcr.core import machine, models, prompts, storage
from dcr.core.config import ConfigError, DataError, ModelConfig, Precision
from dcr.core.machine import attention_mask, padded
from dcr.core.models import folders, structure
from dcr.core.models.structure import DTYPES
from dcr.core.prompts import ChatFormat
from dcr.gating import RECORD, Record

TOKENS = 4096  # of one pass, padding too
HEAD = "score.weight"  # of the classifiers in transformers


@dataclass(frozen=True)
class Gate:
    """A classifier in evaluation mode, and the format that it reads prompts in, its own."""

    model: Any
    chat: ChatFormat

    @torch.inference_mode()
    def scores(self, asked: Sequence[str]) -> list[float]:
        """The probability that each prompt is toxic, a conversation being read as a whole.

        Raises DataError for a prompt or a conversation that the gate cannot read.
        """
        encoded = [self.chat.prompt_ids(prompt) for prompt in asked]
        room = structure.context_length(self.model.config)
        if (longest := max(map(len, encoded), default=0)) > room:
            raise DataError(
                f"gate: a prompt has {longest} tokens and the gate reads {room}; shorten it, or "
                "train a gate on a model with a longer context"
            )
        found = [math.nan] * len(encoded)
        for places in machine.by_tokens(encoded, TOKENS):
            batch = [encoded[place] for place in places]
            scores = logits(self.model, padded(batch, pad_of(self.model)), attention_mask(batch))
            for place, score in zip(places, scores.cpu().double().sigmoid().tolist(), strict=True):
                found[place] = score
        return found


def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The logits of prompts that are padded on the right, [prompts], in fp32."""
    device = structure.unwrapped(model).device
    output = model(input_ids=ids.to(device), attention_mask=mask.long().to(device), use_cache=False)
    return output.logits[:, 0].float()


def pad_of(model: Any) -> int:
    """The token behind shorter prompts of a batch: the classifier reads the last other one."""
    return structure.unwrapped(model).config.get_text_config().pad_token_id


def open_gate(
    folder: Path, precision: Precision, accelerator: str = "auto", trust_remote_code: bool = False
) -> Gate:
    """The gate that a folder holds, on the device it runs on.

    Raises ConfigError where there is none, and DataError where it is damaged.
    """
    record_of(folder)
    storage.check_checksums(folder)
    tokenizer = folders.result_tokenizer(folder, trust_remote_code)
    chat = prompts.chat_format(tokenizer, ModelConfig(name=str(folder)))
    options = {"trust_remote_code": trust_remote_code, "dtype": DTYPES[precision]}
    model = classifier(str(folder), f"gate={folder}", (), **options)
    machine.to_gpu(model, accelerator)
    return Gate(model, chat)


def record_of(folder: Path) -> Record:
    """The content of a gate's `gate.json`. Raises ConfigError where the folder holds no gate."""
    if not (folder / RECORD).is_file():
        there = "holds no gate.json" if folder.is_dir() else "no such folder"
        raise ConfigError(
            f"gate={folder}: {there}; name what python -m dcr.gate out=<folder> has written"
        )
    return storage.read_json(folder / RECORD, Record, "train the gate anew")


def classifier(source: str, called: str, absent: Sequence[str], **options: Any) -> Any:
    """A folder or hub id as a sequence classifier, in evaluation mode.

    Raises ConfigError, naming the model as `called`, if it cannot be read as one or lacks other
    weights than those that may be `absent`, which the global generator then draws.
    """
    trusted, revision = options.get("trust_remote_code", False), options.get("revision")
    models.read_architecture(source, called, revision, trusted)
    cure = "name a model that transformers knows as a sequence classifier"
    with models.refused_as(called, cure):
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, **options
        )
        model, loading = loaded
        if lacking := sorted({*loading["missing_keys"]} - {*absent}):
            raise OSError(f"{len(lacking)} weights are absent, {lacking[0]} the first")
    models.check_finite(model, called)
    return model.eval()


def new_classifier(config: ModelConfig, precision: Precision, seed: int) -> Any:
    """The model of the settings with a new head of one logit, drawn by `seed`."""
    called = f"model.name={config.name}"
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    options |= {"id2label": {0: "toxic"}, "label2id": {"toxic": 0}, "dtype": DTYPES[precision]}
    with structure.seeded(seed):
        # the loss and the pipelines of transformers then take the logit through a sigmoid
        options["problem_type"] = "multi_label_classification"
        return classifier(models.source_of(config), called, [HEAD], **options)


def set_padding(model: Any, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat) -> None:
    """Gives model and tokenizer a padding token that no prompt ends with.

    Raises ConfigError where there is none.
    """
    last = chat.prompt_ids(prompts.PLACEHOLDER)[-1]
    known: tuple[Any, ...] = (tokenizer.pad_token_id, *chat.stop)
    pad = next((int(token) for token in known if token is not None and token != last), None)
    if pad is None:
        raise ConfigError(
            "model.template: its prompts end with the one token that could pad them; name another"
        )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    tokenizer.padding_side = "right"
    structure.unwrapped(model).config.get_text_config().pad_token_id = pad
