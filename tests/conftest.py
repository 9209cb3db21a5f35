"""What every test shares: one thread, no network, checked array shapes, and a tiny model."""

import logging
import os
from collections.abc import Iterator

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
}

from pathlib import Path

import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

torch.set_num_threads(1)

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float as well
# Before any module of ours is imported: shapes and types in signatures are checked from here on,
# in every module that handles tensors.
CHECKED = (
    *("activations", "claims", "contamination", "data", "generation", "losses"),
    *("models", "ntk", "prompts", "refusal", "separability", "statistics", "steering", "training"),
)
hook = install_import_hook([f"dcr.{name}" for name in CHECKED], f"{__name__}.typechecked")

from dcr import models  # noqa: E402
from dcr.config import ModelConfig, Precision  # noqa: E402
from dcr.models import Policy  # noqa: E402

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 260,
    "tie_word_embeddings": True,
}


@pytest.fixture
def policy() -> Policy:
    """Two random blocks over bytes in fp32, fresh for each test."""
    settings = ModelConfig(name="tiny", label="tiny", layer=1, architecture=dict(TINY))
    return models.open_policy(settings, Precision.fp32)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kind of model with its byte tokenizer as a local Hugging Face folder: read only."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    settings = ModelConfig(name="tiny", label="tiny", layer=1, architecture=dict(TINY))
    made = models.open_policy(settings, Precision.fp32, seed=1)
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def root_logger_left_alone() -> Iterator[None]:
    """Takes away what a command that ran in this process, as Hydra's do, logged through.

    Its handler writes to a stream that ends with the test, and the next test's log would fail.
    """
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler and handler not in before:
            root.removeHandler(handler)
    root.setLevel(level)
